"""What is odd about each published data set, and is known here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_cache.config import ReadConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.readers import READERS, load_cohort
from cxr_cache.errors import ConfigError, TableError
from tests.datasets.collections.trees import TREES, write_csv, write_pictures


def lay_out(name: str, folder: Path) -> Path:
    TREES[name][1](folder)
    return folder / "CheXpert-v1.0-small" if name == "chexpert" else folder


def targets_of(cohort: Cohort, finding: str) -> pd.Series:
    """Targets of a finding by image id."""
    column = cohort.targets[:, cohort.findings.index(finding)]
    return pd.Series(column, index=cohort.images["image_id"])


def say_notes(cohort: Cohort) -> str:
    return " ".join(cohort.reading.notes)


# ------------------------------------------------------------------- NIH ChestX-ray14


def test_nih_leaves_impossible_ages_out_and_counts_them(tmp_path):
    cohort = load_cohort(lay_out("nih", tmp_path))

    assert set(cohort.images["age"]) == {"50", ""}
    assert "2 impossible ages" in say_notes(cohort)
    assert cohort.study_uids[:2].tolist() == ["1_0", "1_1"]  # patient and follow-up number


def test_nih_takes_no_finding_as_a_finding_where_it_is_named(tmp_path):
    folder = lay_out("nih", tmp_path)

    cohort = load_cohort(folder, config=ReadConfig(findings=("no finding", "Mass")))

    assert cohort.findings == ("No Finding", "Mass")
    assert (cohort.targets.sum(axis=0) == [6, 12]).all()


@pytest.mark.parametrize("left", ["train_val_list.txt", "test_list.txt"])
def test_nih_needs_one_of_its_two_lists(tmp_path, left):
    folder = lay_out("nih", tmp_path)
    both = load_cohort(folder).images["given_split"]
    (folder / {"train_val_list.txt": "test_list.txt"}.get(left, "train_val_list.txt")).unlink()

    assert load_cohort(folder).images["given_split"].equals(both)


def test_nih_refuses_lists_that_share_an_image(tmp_path):
    folder = lay_out("nih", tmp_path)
    with (folder / "test_list.txt").open("a") as lines:
        lines.write("00000001_000.png\n")

    with pytest.raises(TableError, match=r"train_val_list.txt and .*both list image '00000001_00"):
        load_cohort(folder)


def test_nih_names_labels_that_it_does_not_know(tmp_path):
    folder = lay_out("nih", tmp_path)
    table = folder / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace("Effusion|Mass", "Effusion|Infiltrate"))

    assert "Labels that are no finding here: Infiltrate." in say_notes(load_cohort(folder))


# --------------------------------------------------------------- CheXpert and its kind


def test_blank_is_negative_as_in_chexperts_paper_unless_told_otherwise(tmp_path):
    folder = lay_out("chexpert", tmp_path)

    usual = targets_of(load_cohort(folder), "No Finding")
    ignored = targets_of(load_cohort(folder, config=ReadConfig(blank="ignore")), "No Finding")

    assert set(usual) == {0, 1}
    train = ignored[ignored.index.str.startswith("train/")]
    assert set(train.dropna()) == {1}  # 1 or blank, never 0
    assert "has positives only" in say_notes(load_cohort(folder))


def test_uncertain_is_ignored_unless_told_otherwise(tmp_path):
    folder = lay_out("chexpert", tmp_path)
    ones = load_cohort(folder, config=ReadConfig(uncertain="ignore,Edema=ones"))

    uncertain = targets_of(load_cohort(folder), "Edema").isna()

    assert uncertain.sum() == ones.reading.codes["Edema"]["uncertain"] == 5
    assert (targets_of(ones, "Edema")[uncertain] == 1).all()
    assert ones.reading.policy == "uncertain: ignore, Edema ones; blank: zeros"


def test_test_labels_that_say_airspace_opacity_mean_lung_opacity(tmp_path):
    cohort = load_cohort(lay_out("chexpert", tmp_path))
    in_test = (cohort.images["given_split"] == "test").to_numpy()

    assert "Airspace Opacity" not in cohort.findings
    assert not np.isnan(cohort.targets[in_test]).any()


def test_a_table_of_chexperts_columns_with_other_paths_is_one_of_ones_own(tmp_path):
    rows = [{"Path": "a.png", "No Finding": 0, "Pleural Effusion": 1}]
    write_csv(tmp_path / "mine.csv", rows)

    assert load_cohort(tmp_path / "mine.csv").reading.format == "table"


def test_chexpert_plus_without_labels_says_where_they_belong(tmp_path):
    folder = lay_out("chexpert-plus", tmp_path)
    (folder / "impression_fixed.json").unlink()

    with pytest.raises(TableError, match=r"has no labels\. Put impression_fixed\.json"):
        load_cohort(folder)


def test_mimic_joins_labels_by_study_and_leaves_studies_without_any_unlabelled(tmp_path):
    cohort = load_cohort(lay_out("mimic-cxr-jpg", tmp_path))

    edema = targets_of(cohort, "Edema").groupby(cohort.study_uids).agg(list)
    assert edema["50414267"] == [1, 1]
    unlabelled = np.isnan(cohort.targets).all(axis=1)
    assert set(cohort.study_uids[unlabelled]) == {"50414273", "50414274"}
    assert "2 studies without a single label are unlabelled" in say_notes(cohort)


def test_mimics_test_studies_have_the_labels_of_the_radiologist(tmp_path):
    cohort = load_cohort(lay_out("mimic-cxr-jpg", tmp_path))
    in_test = (cohort.images["given_split"] == "test").to_numpy()

    assert (targets_of(cohort, "Edema")[in_test] == 1).all()
    assert (targets_of(cohort, "Lung Opacity")[in_test] == 0).all()
    assert "are a radiologist's" in say_notes(cohort)


def test_brax_reads_ages_in_steps_and_studies_of_each_patient(tmp_path):
    cohort = load_cohort(lay_out("brax", tmp_path))

    assert cohort.images["age"][[0, 2]].tolist() == ["85", "45"]
    assert cohort.study_uids[0] == "id_0_Study_1"
    assert cohort.projections[:2].tolist() == ["Frontal", "Lateral"]


# ------------------------------------------------------------------------ PadChest


def test_padchests_leading_blanks_make_no_second_finding(tmp_path):
    cohort = load_cohort(lay_out("padchest", tmp_path))

    assert cohort.findings == ("cardiomegaly", "normal", "pneumonia")
    assert cohort.images["age"][0] == "84"
    assert cohort.images["age"][2] == ""


def test_padchests_excluded_images_are_unlabelled(tmp_path):
    cohort = load_cohort(lay_out("padchest", tmp_path))

    unlabelled = np.isnan(cohort.targets).all(axis=1)
    assert unlabelled.sum() == 12  # excluded, suboptimal, and without a report
    assert "marked 'exclude' (4) or 'suboptimal study' (4) are unlabelled" in say_notes(cohort)


def test_padchests_lists_are_never_run(tmp_path):
    folder = lay_out("padchest", tmp_path)
    table = next(folder.glob("*.csv.gz"))
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    write_csv(table, rows.assign(Labels="[print('run')]").to_dict("records"))

    with pytest.raises(TableError, match="is no list of names"):
        load_cohort(folder)


# ----------------------------------------------------------------- VinDr, VinBigData


@pytest.mark.parametrize(("rule", "n_present"), [("majority", 8), ("any", 13), ("all", 4)])
def test_vindrs_three_readers_become_one_label(tmp_path, rule, n_present):
    cohort = load_cohort(lay_out("vindr", tmp_path), config=ReadConfig(readers=rule))

    in_train = (cohort.images["given_split"] == "train").to_numpy()
    assert targets_of(cohort, "Edema")[in_train].sum() == n_present
    assert "Other diseases" in cohort.findings  # which the table of test images calls otherwise


def test_a_reader_who_labels_an_image_twice_is_refused(tmp_path):
    folder = lay_out("vindr", tmp_path)
    table = folder / "annotations" / "image_labels_train.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1]]) + "\n")

    with pytest.raises(TableError, match=r"line 56: image '0+' is labelled twice by reader R0"):
        load_cohort(folder)


def test_vinbigdata_counts_readers_not_boxes(tmp_path):
    cohort = load_cohort(lay_out("vinbigdata", tmp_path), config=ReadConfig(readers="any"))

    assert targets_of(cohort, "Cardiomegaly").sum() == 13
    assert "No finding" not in cohort.findings


# --------------------------------------------------------- competitions on NIH's images


def test_rsna_groups_by_nihs_patients_where_its_mappings_lie_beside_it(tmp_path):
    folder = lay_out("rsna", tmp_path)
    alone = load_cohort(folder)
    mappings = [
        {"subset_img_id": study, "img_id": f"{1 + n // 4:08d}_000.png"}
        for n, study in enumerate(alone.study_uids.tolist())
    ]
    (folder / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(mappings))

    cohort = load_cohort(folder)

    assert set(alone.patient_ids) == {""}
    assert len(set(cohort.patient_ids)) == 6
    assert "the same patients would be in both" in say_notes(cohort)
    assert set(cohort.images["image_class"]) == {"Lung Opacity", "Normal"}


@pytest.mark.parametrize(
    ("name", "table", "row"),
    [
        ("rsna", "stage_2_train_labels.csv", "00000000-0000-4000,,,,,0"),
        ("siim", "train-rle.csv", "1.2.276.0.7230010.3.1.4.0,-1"),
    ],
)
def test_rows_of_an_image_that_contradict_each_other_are_refused(tmp_path, name, table, row):
    folder = lay_out(name, tmp_path)
    with (folder / table).open("a") as lines:
        lines.write(f"{row}\n")

    image = re.escape(row.split(",")[0])
    with pytest.raises(TableError, match=rf"image '{image}' has rows that say it has the finding"):
        load_cohort(folder)


# ---------------------------------------------------------------------- TAIX-Ray


def test_taix_rays_questionable_step_is_uncertain(tmp_path):
    folder = lay_out("taix-ray", tmp_path)

    steps = pd.read_csv(folder / "metadata" / "annotation.csv")["HeartSize"]
    usual = targets_of(load_cohort(folder), "HeartSize")
    ones = targets_of(load_cohort(folder, config=ReadConfig(uncertain="ones")), "HeartSize")

    assert (usual.isna() == (steps == 1).to_numpy()).all()
    assert (ones == (steps > 0).to_numpy()).all()  # as others binarise it


# ----------------------------------------------------------------- folders of images


def test_the_person_in_the_name_of_a_file_is_the_patient(tmp_path):
    cohort = load_cohort(lay_out("paediatric", tmp_path))

    person = cohort.images[cohort.images["patient_id"] == "person0"]
    assert set(person["given_split"]) == {"train", "test"}  # on both sides of the set's own split
    assert set(targets_of(cohort, "PNEUMONIA")[person["image_id"]]) == {1}
    assert "some patients on both sides" in say_notes(cohort)


def test_classes_of_several_sources_are_told(tmp_path):
    cohort = load_cohort(lay_out("covid", tmp_path))

    assert cohort.findings == ("COVID", "Lung_Opacity", "Viral Pneumonia")
    assert "source of an image instead of the disease" in say_notes(cohort)
    assert not any("masks" in image_id for image_id in cohort.image_ids)


@pytest.mark.parametrize(
    "names", [("images_001", "images_002"), ("patient1", "patient2"), ("1", "2")]
)
def test_folders_that_only_hold_images_are_no_classes(tmp_path, names):
    for name in names:
        write_pictures(tmp_path / name, ["a.png"])

    cohort = load_cohort(tmp_path)

    assert (cohort.reading.format, cohort.findings) == ("images", ())
    assert load_cohort(tmp_path, format="classes").findings == names


def test_names_of_files_tell_what_an_image_of_shenzhen_shows(tmp_path):
    cohort = load_cohort(lay_out("shenzhen", tmp_path))

    assert cohort.reading.format == "images"
    expected = [int(name[-5]) for name in cohort.image_ids]  # the last digit of the name
    assert targets_of(cohort, "Tuberculosis").tolist() == expected


# ---------------------------------------------------------------------- recognition


def test_a_data_set_of_two_forms_is_refused_with_both(tmp_path):
    lay_out("openi", tmp_path)
    write_csv(tmp_path / "train-rle.csv", [{"ImageId": "a", "EncodedPixels": "-1"}])

    with pytest.raises(ConfigError, match=r"two data sets: siim .* and openi .*--format openi"):
        load_cohort(tmp_path)


def test_a_folder_around_the_data_set_is_as_good(tmp_path):
    lay_out("chexpert", tmp_path)  # CheXpert-v1.0-small/ is all that tmp_path holds

    cohort = load_cohort(tmp_path, image_dir=tmp_path)

    assert cohort.reading.format == "chexpert"
    assert cohort.image_ids[0].startswith("CheXpert-v1.0-small/t")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_published_table_is_recognised_with_another_separator(tmp_path, separator):
    path = lay_out("rsna", tmp_path) / "stage_2_train_labels.csv"
    path.write_text(path.read_text().replace(",", separator))

    assert load_cohort(path).reading.format == "rsna"


@pytest.mark.parametrize("name", ["x.zip", "x.csv.gz", "x.xlsx", "x.parquet", "x.csv"])
def test_a_table_that_is_none_is_refused_in_a_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK no table\0")

    with pytest.raises(TableError, match=re.escape(name)):
        load_cohort(tmp_path / name)


def test_two_tables_of_one_form_are_refused_with_both(tmp_path):
    folder = lay_out("nih", tmp_path)
    table = folder / "Data_Entry_2017.csv"
    (folder / "Data_Entry_2017_v2020.csv").write_text(table.read_text())

    with pytest.raises(TableError, match=r"2 tables of NIH ChestX-ray14: .*may contradict each ot"):
        load_cohort(folder)
    assert len(load_cohort(table)) == 24


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"holds neither a table \(\.csv, .*\) nor an image"):
        load_cohort(tmp_path)


def test_a_table_of_another_data_set_is_refused_with_the_columns_that_are_missing(tmp_path):
    folder = lay_out("rsna", tmp_path)

    with pytest.raises(TableError, match="no table of NIH ChestX-ray14, which has the columns Im"):
        load_cohort(folder, format="nih")


def test_an_option_that_names_a_column_is_not_lost_on_a_published_data_set(tmp_path):
    folder = lay_out("nih", tmp_path)

    with pytest.raises(
        ConfigError, match=r"patient_column is for --format table; --format nih kno"
    ):
        load_cohort(folder, config=ReadConfig(patient_column="Patient ID"))


def test_images_that_are_not_there_are_counted(tmp_path):
    folder = lay_out("nih", tmp_path)
    (folder / "images_001" / "images" / "00000001_000.png").unlink()

    assert "1 of 24 images is not in" in say_notes(load_cohort(folder))


def test_a_reader_of_ones_own_is_three_lines(tmp_path, monkeypatch):
    def read_ours(path, config, image_dir):
        images = pd.DataFrame({"image_id": ["a.png"], "study_uid": ["1"]})
        return Cohort(images, np.ones((1, 1), np.float32), ("Edema",))

    monkeypatch.setitem(READERS, "ours", read_ours)

    assert load_cohort(tmp_path, format="ours").findings == ("Edema",)


# -------------------------------------------------------------------- damaged tables


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("nih", "Data_Entry_2017.csv", "Patient ID"),
        ("chexpert", "train.csv", "Edema"),
        ("brax", "master_spreadsheet_update.csv", "PatientID"),
        ("taix-ray", "metadata/annotation.csv", "Atelectasis_Left"),
        ("vindr", "annotations/image_labels_train.csv", "Edema"),
    ],
)
def test_a_column_that_is_missing_is_named(tmp_path, name, table, column):
    path = lay_out(name, tmp_path) / table
    path.write_text(path.read_text().replace(column, "renamed", 1))

    with pytest.raises(TableError, match=rf"has no column '{column}'"):
        load_cohort(path.parents[table.count("/")])


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("chexpert-plus", "impression_fixed.json", "{}\n", "line 1: not the labels of an image"),
        ("chexpert-plus", "impression_fixed.json", "no\n", "line 1: not the labels of an image"),
        ("rsna", "x-dataset-mappings.json", "[1]", "is not a list of images of RSNA and NIH"),
        ("openi", "ecgen-radiology/1.xml", "<a>", "is not whole XML"),
        ("openi", "ecgen-radiology/1.xml", "<a/>", "has no uId, which names the study"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, file, content, message):
    folder = lay_out(name, tmp_path)
    (folder / file).write_text(content)

    with pytest.raises(TableError, match=message):
        load_cohort(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mimic-cxr-jpg", "mimic-cxr-2.0.0-chexpert.csv.gz"),
        ("mimic-cxr-jpg", "mimic-cxr-2.0.0-split.csv.gz"),
        ("taix-ray", "metadata/split.csv"),
    ],
)
def test_a_row_that_is_there_twice_is_named_with_its_lines(tmp_path, name, file):
    folder = lay_out(name, tmp_path)
    table = pd.read_csv(folder / file, dtype=str, keep_default_na=False)
    pd.concat([table, table.iloc[:1]]).to_csv(folder / file, index=False)

    with pytest.raises(TableError, match=rf"is on line 2 and on line {len(table) + 2}"):
        load_cohort(folder)


def test_labels_that_are_there_twice_are_named(tmp_path):
    path = lay_out("chexpert-plus", tmp_path) / "impression_fixed.json"
    path.write_text(path.read_text() * 2)

    with pytest.raises(TableError, match=r"impression_fixed\.json labels '.*' on two lines"):
        load_cohort(path.parent)


def test_lists_of_nih_are_read_whatever_they_are_written_in(tmp_path):
    folder = lay_out("nih", tmp_path)
    expected = load_cohort(folder).images["given_split"].tolist()
    path = folder / "test_list.txt"
    words = path.read_text().split()
    path.write_text("\n".join(f"images_001/{word}" for word in words), encoding="utf-16")

    assert load_cohort(folder).images["given_split"].tolist() == expected
    assert "test" in expected

    path.write_text("other.png")
    (folder / "train_val_list.txt").write_text("another.png")
    with pytest.raises(TableError, match="lists none of the table's images, of which the first"):
        load_cohort(folder)
    path = path.rename(folder / "test_list.txt.gz")
    with pytest.raises(TableError, match=r"test_list\.txt\.gz cannot be read"):
        load_cohort(folder)


def test_a_missing_image_is_never_taken_for_that_of_another_patient(tmp_path):
    folder = lay_out("chexpert", tmp_path)
    pictures = sorted(folder.glob("train/*/*/*.jpg"))
    other = folder / "train" / "patient99999" / "study1" / pictures[0].name
    other.parent.mkdir(parents=True)
    pictures[0].rename(other)

    cohort = load_cohort(folder)

    assert not any("patient99999" in name for name in cohort.image_ids)
    assert "1 of " in say_notes(cohort)
