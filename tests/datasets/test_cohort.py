"""The image table: real collections, their labels and their description."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_cache.datasets.cohort import IMAGE_COLUMNS, Cohort
from cxr_cache.datasets.describe import describe_cohort
from cxr_cache.datasets.images import find_missing
from cxr_cache.datasets.labels import FINDINGS, load_labels
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.errors import ConfigError, TableError

REPORTS = "uid,Problems\n1,normal\n2,Cardiomegaly;Edema\n"
IMAGES = "uid,filename,projection\n1,1_a.png,Frontal\n1,1_b.png,Lateral\n2,2_a.png,Frontal\n"


def write_tables(folder: Path, reports: str = REPORTS, images: str = IMAGES) -> Path:
    (folder / "indiana_reports.csv").write_text(reports, encoding="utf-8")
    (folder / "indiana_projections.csv").write_text(images, encoding="utf-8")
    return folder


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def column(cohort: Cohort, finding: str) -> list[float]:
    return cohort.targets[:, cohort.findings.index(finding)].tolist()


def make_cohort(**changes) -> Cohort:
    """Two images, of which columns of the table or whole parts are changed."""
    parts = {"targets": np.zeros((2, 1), np.float32), "findings": ("Edema",), "source": {}}
    parts = {name: changes.pop(name, part) for name, part in parts.items()}
    images = {"image_id": ["a", "b"], "study_uid": ["1", "2"], "patient_id": "", "projection": ""}
    return Cohort(pd.DataFrame(images | changes), **parts)


# ------------------------------------------------------------------- real data


def test_the_complete_collection(shared_data):
    cohort = load_cohort(shared_data / "indiana_csv")

    description = describe_cohort(cohort)
    assert (description.n_images, description.n_studies) == (7466, 3851)
    assert description.n_as_published == 35
    assert description.projections == {"Frontal": 3818, "Lateral": 3648}
    assert description.imbalance_ratio == 1581
    assert sum(description.images_per_study.values()) == 3851
    assert sum(n * studies for n, studies in description.images_per_study.items()) == 7466
    assert description.n_unlabelled == 0
    assert set(cohort.source) == {"indiana_reports.csv", "indiana_projections.csv"}
    assert all(len(digest) == 64 for digest in cohort.source.values())
    assert not np.isnan(cohort.targets).any()


def test_a_partial_collection_names_its_missing_files(shared_data):
    cohort = load_cohort(shared_data / "indiana_256")

    missing = find_missing(shared_data / "indiana_256" / "images", cohort.image_ids)

    description = describe_cohort(cohort, missing)
    assert (description.n_images, description.n_studies) == (6390, 3296)
    assert len(missing) == 38
    assert description.to_dict()["missing_files"] == 38
    assert f"missing files:     38 ({missing[0]}, " in description.to_text()
    assert description.n_as_published is None  # its counts are its own


# ------------------------------------------------------------ joining two files


def test_images_keep_their_order_and_get_the_targets_of_their_report(tmp_path):
    images = "uid,filename,projection\n2,2_a.png,frontal\n1,1_a.png,LATERAL\n2,2_b.png,\n"

    cohort = load_cohort(write_tables(tmp_path, images=images))

    assert cohort.image_ids.tolist() == ["2_a.png", "1_a.png", "2_b.png"]
    assert cohort.study_uids.tolist() == ["2", "1", "2"]
    assert cohort.projections.tolist() == ["Frontal", "Lateral", ""]
    assert column(cohort, "Cardiomegaly") == [1, 0, 1]
    assert column(cohort, "Normal") == [0, 1, 0]
    assert cohort.findings == FINDINGS


def test_a_label_column_of_the_reports_takes_precedence_over_the_rule(tmp_path):
    reports = "uid,Problems,label\n1,normal,Edema\n2,Cardiomegaly,\n"
    cohort = load_cohort(write_tables(tmp_path, reports))
    assert column(cohort, "Edema")[:2] == [1, 1]
    assert column(cohort, "Normal")[:2] == [0, 0]
    assert np.isnan(cohort.targets[2]).all()  # blank: unlabelled


def test_a_label_column_of_the_images_takes_precedence_over_the_reports(tmp_path):
    images = "uid,filename,projection,label\n1,a,Frontal,Edema\n1,b,Lateral,Normal\n"
    cohort = load_cohort(write_tables(tmp_path, "uid,label\n1,Nodule\n", images))
    assert column(cohort, "Edema") == [1, 0]
    assert column(cohort, "Nodule") == [0, 0]


def test_images_without_a_report_are_kept_unlabelled_and_counted(tmp_path, caplog):
    images = IMAGES + "77,77_a.png,Frontal\n"
    with caplog.at_level(logging.WARNING):
        cohort = load_cohort(write_tables(tmp_path, images=images))

    assert len(cohort) == 4
    assert np.isnan(cohort.targets[3]).all()
    assert describe_cohort(cohort).n_unlabelled == 1
    assert "1 of 4 images have no report" in caplog.text
    assert "'77'" in caplog.text


def test_patients_are_read_where_there_are_any(tmp_path):
    reports = "uid,Problems,patient_id\n1,normal,P9\n2,normal,\n"
    cohort = load_cohort(write_tables(tmp_path, reports))
    assert cohort.patient_ids.tolist() == ["P9", "P9", ""]
    assert cohort.groups.tolist() == ["patient P9", "patient P9", "study 2"]
    assert describe_cohort(cohort).n_patients == 1


def test_a_patient_never_shares_a_group_with_a_study_of_the_same_number():
    cohort = make_cohort(study_uid=["7", "8"], patient_id=["8", ""])
    assert len(set(cohort.groups)) == 2


def test_ids_that_look_like_numbers_or_nothing_stay_as_written(tmp_path):
    reports = "uid,Problems\nNA,normal\n00012,Cardiomegaly\n12,normal\n"
    images = "uid,filename,projection\nNA,NA,Frontal\n00012,null,Lateral\n12,007.png,Frontal\n"
    cohort = load_cohort(write_tables(tmp_path, reports, images))
    assert cohort.study_uids.tolist() == ["NA", "00012", "12"]
    assert cohort.image_ids.tolist() == ["NA", "null", "007.png"]
    assert column(cohort, "Cardiomegaly") == [0, 1, 0]


def test_files_of_other_names_are_found_where_they_are_the_only_ones(tmp_path):
    (tmp_path / "my_reports_v2.csv").write_text(REPORTS)
    (tmp_path / "my_projections.csv").write_text(IMAGES)
    assert set(load_cohort(tmp_path).source) == {"my_reports_v2.csv", "my_projections.csv"}


def test_missing_and_ambiguous_files_are_listed(tmp_path):
    with pytest.raises(TableError, match=r"needs indiana_reports\.csv.*holds: no CSV file"):
        load_cohort(tmp_path, format="indiana")
    (tmp_path / "a_reports.csv").write_text(REPORTS)
    (tmp_path / "b_reports.csv").write_text(REPORTS)
    with pytest.raises(TableError, match=r"holds: a_reports\.csv, b_reports\.csv"):
        load_cohort(tmp_path)
    with pytest.raises(TableError, match="is not a folder"):
        load_cohort(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("reports", "images", "message"),
    [
        ("UID,Problems\n1,normal\n", IMAGES, r"reports\.csv has no column 'uid'.*'UID' be renamed"),
        ("uid,MeSH\n1,normal\n", IMAGES, r"no column 'Problems'; its columns are uid, MeSH"),
        (REPORTS, "uid,filename\n1,a\n", r"projections\.csv has no column 'projection'"),
        (REPORTS + "1,Edema\n", IMAGES, r"uid '1' is on line 2 and on line 4\. Keep one"),
        (
            REPORTS,
            IMAGES + "2,1_a.png,Frontal\n",
            r"filename '1_a\.png' is on line 2 and on line 5",
        ),
        (REPORTS, IMAGES + "2,,Frontal\n", r"line 5: filename is blank"),
        (REPORTS, IMAGES + ",x.png,Frontal\n", r"line 5: uid is blank"),
        (REPORTS, IMAGES + "2,x.png,PA\n", r"line 5: projection 'PA' is neither Frontal nor"),
        (REPORTS, "uid,filename,projection\n91,a,Frontal\n", r"no uid .* first are '91' and '1'"),
        ("uid,label\n1,Cardiomegly\n", IMAGES, r"reports\.csv, line 2: .*mean 'Cardiomegaly'"),
        (
            "uid,Problems,patient_id\n1,normal,P1\n2,normal,P2\n",
            "uid,filename,projection,patient_id\n1,a,Frontal,P1\n1,b,Lateral,\n",
            r"study '1' belongs to patient 'P1' and to patient ''",
        ),
    ],
)
def test_tables_that_contradict_themselves_are_refused(tmp_path, reports, images, message):
    with pytest.raises(TableError, match=message):
        load_cohort(write_tables(tmp_path, reports, images))


# ----------------------------------------------------------------- the dataclass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": np.zeros((1, 1), np.float32)},
            r"targets of shape \(1, 1\) for 2 images and 1",
        ),
        (
            {"targets": np.zeros((2, 3), np.float32)},
            r"targets of shape \(2, 3\) for 2 images and 1",
        ),
        ({"targets": np.full((2, 1), 2, np.float32)}, "other values than 1, 0 and NaN"),
        ({"image_id": ["a", "a"]}, "image 'a' is listed twice"),
    ],
)
def test_a_cohort_checks_itself(changes, message):
    with pytest.raises(TableError, match=message):
        make_cohort(**changes)


def test_taking_rows_keeps_them_together(tmp_path):
    cohort = load_cohort(write_tables(tmp_path))
    for rows in (np.array([2, 0]), slice(1, 3), np.array([True, False, True])):
        part = cohort.take(rows)
        assert part.image_ids.tolist() == cohort.image_ids[rows].tolist()
        assert part.study_uids.tolist() == cohort.study_uids[rows].tolist()
        np.testing.assert_array_equal(part.targets, cohort.targets[rows])


# ------------------------------------------------------------- further columns


def test_facts_about_images_are_read_from_either_file_as_written(tmp_path):
    reports = "uid,Problems,sex,age\n1,normal,F,057Y\n2,normal,,\n"
    images = "uid,filename,projection,view_position,age\n1,a,,PA,0\n2,b,,AP,3\n77,c,,,\n"
    cohort = load_cohort(write_tables(tmp_path, reports, images))
    assert cohort.images.columns.tolist() == [*IMAGE_COLUMNS, "sex", "age", "view_position"]
    assert cohort.images["sex"].tolist() == ["F", "", ""]
    assert cohort.images["age"].tolist() == ["0", "3", ""]  # the images' own counts first
    assert cohort.images["view_position"].tolist() == ["PA", "AP", ""]


def test_a_table_of_one_s_own_becomes_text_in_the_usual_order():
    images = pd.DataFrame(
        {"age": [57, None], "study_uid": [1, 2], "weight": [70.25, 1e-3], "image_id": ["a", "b"]},
        index=[7, 7],
    )
    cohort = Cohort(images, np.zeros((2, 1), np.float32), ("Edema",))
    assert cohort.images.columns.tolist() == [*IMAGE_COLUMNS, "age", "weight"]
    assert cohort.images.iloc[0].tolist() == ["a", "1", "", "", "57", "70.25"]
    assert cohort.images.iloc[1].tolist() == ["b", "2", "", "", "", "0.001"]
    assert cohort.images.index.tolist() == [0, 1]
    assert cohort.patient_ids.tolist() == ["", ""]
    assert cohort.assign(sex=["F", pd.NA]).images["sex"].tolist() == ["F", ""]
    assert images.index.tolist() == [7, 7]  # what was given is left as it was


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"image_id": ["a", "b"]}, "has no column 'study_uid'; its columns are image_id"),
        (
            {"split": "train"},
            "'split' is a column of the image table and the name of a column",
        ),
        ({"Edema": 1}, "'Edema' is a column of the image table and the name of a finding"),
        ({"sex": ["F", "\udcf6"]}, r"sex '\\udcf6' is not UTF-8"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(images, message):
    if "image_id" not in images:
        images = {"image_id": ["a", "b"], "study_uid": ["1", "2"], **images}
    with pytest.raises(TableError, match=message):
        Cohort(pd.DataFrame(images, dtype=object), np.zeros((2, 1), np.float32), ("Edema",))


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"format is one of auto, indiana, .* Did you mean"):
        load_cohort(tmp_path, format="indianna")
    write_tables(tmp_path)
    named, found = load_cohort(tmp_path, format="indiana"), load_cohort(tmp_path)
    assert named.images.equals(found.images)


# ----------------------------------------------------------------- the user's labels


IDS = np.array(["x/1.png", "x/2.png", "x/3.png"])


def test_labels_follow_the_images_and_not_the_file(tmp_path):
    path = write(tmp_path, "image_id,Edema,Mine\nx/3.png,1,\nother,0,0\nx/1.png,-1,1\n")

    findings, targets = load_labels(path, IDS)

    assert findings == ("Edema", "Mine")
    nan = np.nan
    np.testing.assert_array_equal(targets, [[nan, 1], [nan, nan], [1, nan]])


def test_labels_may_be_listed_in_one_column(tmp_path):
    path = write(tmp_path, "uid;filename;label\n1;x/1.png;Edema\n2;x/2.png;normal\n")
    findings, targets = load_labels(path, IDS)
    assert findings == FINDINGS
    assert targets[:, FINDINGS.index("Edema")].tolist()[:2] == [1, 0]
    assert np.isnan(targets[2]).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id,Edema\n1.png,1\n", r"none of the 3 images: .*'1\.png', theirs 'x/1\.png'"),
        ("image_id,Edema\nx/1.png,1\nx/1.png,0\n", "image_id 'x/1.png' is on line 2 and on line 3"),
        ("image_id,Edema\nx/1.png,maybe\n", "line 2: column 'Edema' holds 'maybe'"),
        ("image_id,label\n\nx/1.png,Oedema\n", "line 3: unknown finding 'oedema'.*'Edema'"),
        ("id,Edema\nx/1.png,1\n", "no column 'image_id'"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path, content, message):
    with pytest.raises(TableError, match=message):
        load_labels(write(tmp_path, content), IDS)


# ------------------------------------------------------------------ description


def test_prevalence_is_among_labelled_images_and_studies_count_once():
    cohort = Cohort(
        pd.DataFrame(
            {
                "image_id": ["a", "b", "c", "d"],
                "study_uid": ["1", "1", "2", "3"],
                "projection": ["Frontal", "Lateral", "Frontal", ""],
            }
        ),
        targets=np.array([[1, np.nan], [1, np.nan], [0, np.nan], [np.nan, np.nan]], np.float32),
        findings=("Edema", "Never labelled"),
        source={},
    )

    description = describe_cohort(cohort, missing=["c"])

    edema, never = description.to_dict()["findings"]
    assert edema == {"finding": "Edema", "images": 2, "studies": 1, "prevalence": 2 / 3}
    assert never == {"finding": "Never labelled", "images": 0, "studies": 0, "prevalence": None}
    assert description.n_unlabelled == 1
    assert description.images_per_study == {1: 2, 2: 1}
    assert description.imbalance_ratio == 1
    assert json.loads(json.dumps(description.to_dict()))["missing_first"] == ["c"]


def test_the_text_is_aligned_and_fits_a_screen(tmp_path):
    text = describe_cohort(load_cohort(write_tables(tmp_path))).to_text()

    rows = text.splitlines()[-35:]
    assert len({len(row) for row in rows}) == 1
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 50
    assert rows[0].split() == ["Normal", "2", "1", "66.67%"]
