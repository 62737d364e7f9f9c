"""A table of one's own: every column is recognised and accounted for, or an error says why not."""

from __future__ import annotations

import gzip
import logging
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_cache.cli.main import cli
from cxr_cache.common import tables
from cxr_cache.common.tables import read_csv, read_table
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.codes import combine_rows, read_lists
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.columns import read_ages, read_views
from cxr_cache.datasets.dicom.pseudonyms import hash_id
from cxr_cache.datasets.labels import read_labels
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.errors import ConfigError, TableError
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import find_labelled_rows
from tests.small_stores import ENCODER, make_store

NAN = np.nan


def write(folder: Path, content: str, name: str = "mine.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def load(folder: Path, content: str, **options) -> Cohort:
    return load_cohort(write(folder, content), config=ReadConfig(**options))


FIVE = """Image Path,Patient ID,View Position,Patient Age,Gender,Split,Edema,Mass,Comment
a.png,1,PA,57,F,train,1,0,hello
sub/b.png,1,LAT,414,f,Valid,0,-1,x
c.png,2,AP,050Y,Male,dev,,1.0,y
d.png,3,,-3,U,test,False,true,z
e.png,nan,AP,,,,1,0.0,
"""


def test_five_lines_are_understood_without_a_word(tmp_path):
    cohort = load(tmp_path, FIVE)
    assert cohort.image_ids.tolist() == ["a.png", "sub/b.png", "c.png", "d.png", "e.png"]
    assert cohort.patient_ids.tolist() == ["1", "1", "2", "3", ""]
    assert cohort.study_uids.tolist() == cohort.image_ids.tolist()  # each image for itself
    assert cohort.projections.tolist() == ["Frontal", "Lateral", "Frontal", "", "Frontal"]
    images = cohort.images
    assert images["view_position"].tolist() == ["PA", "", "AP", "", "AP"]
    assert images["given_split"].tolist() == ["train", "val", "val", "test", ""]
    assert images["sex"].tolist() == ["F", "F", "M", "", ""]
    assert images["age"].tolist() == ["57", "", "50", "", ""]
    assert cohort.findings == ("Edema", "Mass")
    np.testing.assert_array_equal(cohort.targets, [[1, 0], [0, NAN], [NAN, 1], [0, 1], [1, 0]])


def test_every_column_is_accounted_for(tmp_path):
    cohort = load(tmp_path, FIVE)
    reading = cohort.reading
    assert reading is not None
    assert reading.columns == {
        "Image Path": "image file",
        "Patient ID": "patient",
        "View Position": "view",
        "Patient Age": "information (age)",
        "Gender": "information (sex)",
        "Split": "given split",
        "Edema": "finding",
        "Mass": "finding",
        "Comment": "ignored: not label codes",
    }
    assert reading.codes["Mass"] == {"present": 2, "absent": 2, "uncertain": 1}
    assert reading.split == "the column 'Split' of mine.csv"
    assert reading.notes == (
        "2 ages in 'Patient Age' of mine.csv are impossible (below 0, above 120 or no number) and "
        "left blank.",
    )
    text = reading.to_text()
    assert "2 findings:          Edema, Mass" in text
    assert "ignored:             Comment (not label codes)" in text


def test_the_store_keeps_how_the_data_set_was_read(tmp_path):
    cohort = load(tmp_path, FIVE)
    shapes = {"embeddings": (1, 8)}
    FeatureStore.create(tmp_path / "s.h5", cohort, encoder=ENCODER, features=shapes).close()
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert store.cohort.reading == cohort.reading
        assert store.cohort.images.equals(cohort.images)
    without = cohort.with_reading(None)
    FeatureStore.create(tmp_path / "old.h5", without, encoder=ENCODER, features=shapes).close()
    with FeatureStore.open(tmp_path / "old.h5") as store:
        assert store.cohort.reading is None


@pytest.mark.parametrize("values", [{}, [], {"format": 1}, {"format": "x", "codes": {"a": 1}}])
def test_another_account_of_reading_is_refused(values):
    with pytest.raises(ValueError, match="not how a data set was read"):
        Reading.of_dict(values)


@pytest.mark.parametrize(
    "name",
    [
        "patient_id",
        "Patient ID",
        "PatientID",
        "subject_id",
        "SUBJECT ID",
        "patient-id",
        "PatID",
        "Patient No",
        "Patient_Identifier",
        "participant_id",
        "anon_patient_id",
    ],
)
def test_patients_are_known_by_the_names_of_public_tables(tmp_path, name):
    cohort = load(tmp_path, f"Image Index,{name},Mass\na.png,7,1\nb.png,8,0\n")
    assert cohort.patient_ids.tolist() == ["7", "8"]


@pytest.mark.parametrize("name", ["image_id", "Image Index", "Path", "dicom_id", "filename"])
def test_images_are_known_by_the_names_of_public_tables(tmp_path, name):
    assert load(tmp_path, f"{name},Mass\na.png,1\n").image_ids.tolist() == ["a.png"]


@pytest.mark.parametrize("word", ["", "nan", "None", "NA", "unknown", "N/A", "NULL", "?"])
def test_words_for_unknown_are_no_patient(tmp_path, word):
    cohort = load(tmp_path, f"path,patient,Mass\na.png,{word},1\nb.png,p,0\n")
    assert cohort.patient_ids.tolist() == ["", "p"]


def test_two_candidates_for_one_role_are_an_error_that_names_both_and_the_option(tmp_path):
    content = "path,Patient ID,subject_id,Mass\na.png,1,x,1\nb.png,2,y,0\n"
    with pytest.raises(TableError, match=r"'Patient ID' and 'subject_id' .* --patient-column"):
        load(tmp_path, content)
    cohort = load(tmp_path, content, patient_column="subject_id")
    assert cohort.patient_ids.tolist() == ["x", "y"]
    assert cohort.reading.columns["Patient ID"] == "ignored: the patient is 'subject_id'"
    same = load(tmp_path, "path,Patient ID,subject_id,Mass\na.png,1,1,1\nb.png,2,2,0\n")
    assert same.patient_ids.tolist() == ["1", "2"]  # no matter which
    with pytest.raises(TableError, match="no column 'MRN'"):
        load(tmp_path, content, patient_column="MRN")


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["Edema|Mass", "No Finding", "Mass", ""], ("Edema", "Mass")),
        (["Edema; Mass", "none", "mass ", ""], ("Edema", "Mass")),
        (["Edema, Mass", "negative", "Mass", ""], ("Edema", "Mass")),
        (["['Edema', ' Mass']", "[]", "['Mass']", ""], ("Edema", "Mass")),
    ],
)
def test_one_column_may_list_the_findings(tmp_path, cells, names):
    rows = "".join(f'{i}.png,"{cell}"\n' for i, cell in enumerate(cells))
    cohort = load(tmp_path, f"path,Finding Labels\n{rows}")
    assert cohort.findings == names
    expected = [[1, 1], [0, 0] if cells[1] != "[]" else [NAN, NAN], [0, 1], [NAN, NAN]]
    np.testing.assert_array_equal(cohort.targets, expected)


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "unknown", "n/a", "<NA>"])
def test_a_word_for_not_said_is_a_blank_label(tmp_path, word):
    listed = load(tmp_path, f"image,Finding Labels\na,Edema|Mass\nb,{word}\nc,none\nd,Mass\n")
    assert listed.findings == ("Edema", "Mass")
    np.testing.assert_array_equal(listed.targets, [[1, 1], [NAN, NAN], [0, 0], [0, 1]])
    columns = load(tmp_path, f"image,Edema,Mass\na,1,0\nb,{word},1\nc,{word},\n")
    np.testing.assert_array_equal(columns.targets, [[1, 0], [NAN, 1], [NAN, NAN]])
    images = pd.DataFrame({"image_id": ["a", "b"], "study_uid": ["1", "2"]})
    cohort = Cohort(images, np.zeros((2, 1), np.float32), ("Mine",))
    for column in ("label", "labels"):
        labelled = read_labels(write(tmp_path, f"image,{column}\na,Mine\nb,{word}\n"), cohort)
        assert labelled.findings == ("Mine",)
        np.testing.assert_array_equal(labelled.targets, [[1], [NAN]])


def test_no_cell_of_an_ignored_column_is_kept(tmp_path):
    cohort = load(tmp_path, "image,PatientID,PatientName,PatientBirthDate,Mass\na,1,Doe^J,1950,1\n")
    assert cohort.reading.columns["PatientName"] == "ignored: not label codes"
    assert "Doe" not in str(cohort.reading)
    assert "1950" not in str(cohort.reading)


def test_a_column_label_of_codes_is_a_finding(tmp_path):
    images = pd.DataFrame({"image_id": ["a", "b"], "study_uid": ["1", "2"]})
    cohort = Cohort(images, np.zeros((2, 1), np.float32), ("Mine",))
    labelled = read_labels(write(tmp_path, "image_id,label\na,1\nb,0\n"), cohort)
    assert labelled.findings == ("label",)
    assert labelled.targets.tolist() == [[1], [0]]


def test_list_text_is_never_run(tmp_path):
    cells = pd.Series(["['a']", "[__import__('os').system('touch /tmp/x')]"], [2, 3], name="Labels")
    with pytest.raises(
        TableError, match=r"mine\.csv, line 3: column 'Labels': .* no list of names"
    ):
        read_lists(cells, "mine.csv")


def test_findings_are_picked_in_the_order_asked_for(tmp_path):
    content = "path,Edema,n_views,Mass\na.png,1,1,0\nb.png,0,2,1\n"
    with pytest.raises(TableError, match="line 3: column 'n_views' holds '2'"):
        load(tmp_path, content)
    cohort = load(tmp_path, content, findings=("mass", "Edema"))
    assert cohort.findings == ("Mass", "Edema")
    assert cohort.reading.columns["n_views"] == "ignored"
    with pytest.raises(ConfigError, match=r"findings names 'Masss', .* Did you mean Mass\?"):
        load(tmp_path, content, findings=("Masss",))


CODES = "path,Edema,Mass\na.png,-1,1\nb.png,,0\nc.png,1,-1\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[NAN, 1], [NAN, 0], [1, NAN]]),
        ({"uncertain": "ones"}, [[1, 1], [NAN, 0], [1, 1]]),
        ({"uncertain": "zeros,mass=ones"}, [[0, 1], [NAN, 0], [1, 1]]),
        ({"blank": "Edema=zeros"}, [[NAN, 1], [0, 0], [1, NAN]]),
    ],
)
def test_uncertain_and_blank_are_a_choice_that_is_shown(tmp_path, options, expected):
    cohort = load(tmp_path, CODES, **options)
    np.testing.assert_array_equal(cohort.targets, expected)
    assert cohort.reading.codes["Edema"] == {"present": 1, "uncertain": 1, "blank": 1}
    assert cohort.reading.policy.startswith("uncertain: " + options.get("uncertain", "ignore")[:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncertain": "maybe"}, "uncertain must be .*'maybe' is wrong, as it is made of ignore"),
        ({"blank": "ones"}, "blank must be .* made of ignore, zeros and such as Edema=zeros"),
        ({"uncertain": "zeros,ones"}, "names two choices for all"),
        ({"uncertain": "Edma=ones"}, "uncertain names 'Edma', .* Did you mean Edema"),
    ],
)
def test_another_choice_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, CODES, **options)


READERS = """image_id,rad_ID,Edema,Mass
a.png,R1,1,0
a.png,R2,1,0
a.png,R3,0,1
b.png,R1,1,
b.png,R2,0,0
"""


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("majority", [[1, 0], [NAN, 0]]),
        ("any", [[1, 1], [1, 0]]),
        ("all", [[0, 0], [0, 0]]),
        ("mean", [[1, 0], [1, 0]]),
    ],
)
def test_several_readers_become_one_label(tmp_path, rule, expected):
    cohort = load(tmp_path, READERS, readers=rule)
    assert cohort.image_ids.tolist() == ["a.png", "b.png"]
    np.testing.assert_array_equal(cohort.targets, expected)
    with pytest.raises(TableError, match=r"reader 'R2' labels image_id 'b\.png' twice; .* line 7"):
        load(tmp_path, READERS + "b.png,R2,1,0\n", readers=rule)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_readers_are_combined_as_pandas_would(data):
    cells = st.sampled_from([0.0, 1.0, NAN])
    n = data.draw(st.integers(1, 30))
    labels = np.array(data.draw(st.lists(cells, min_size=n, max_size=n)), np.float32)
    groups = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    means = pd.Series(labels).groupby(groups).mean().reindex(range(6)).to_numpy()
    rules = {
        "any": np.where(np.isnan(means), NAN, means > 0),
        "all": np.where(np.isnan(means), NAN, means == 1),
        "mean": np.where(np.isnan(means), NAN, means >= 0.5),
        "majority": np.where(np.isnan(means) | (means == 0.5), NAN, means > 0.5),
    }
    for rule, expected in rules.items():
        combined = combine_rows(labels[:, None], groups.astype(np.intp), 6, rule)[:, 0]
        np.testing.assert_array_equal(combined, expected.astype(np.float32), rule)


# -- several tables -----------------------------------------------------------------------

IMAGES = "path,study_id,subject_id\na.png,s1,p1\nb.png,s1,p1\nc.png,s2,p2\n"


def test_rows_per_study_and_per_patient_are_joined_to_their_images(tmp_path):
    write(tmp_path, IMAGES, "images.csv")
    write(tmp_path, "study_id,Edema\ns1,1\ns2,0\n", "labels.csv")
    write(tmp_path, "subject_id,Sex,Age\np1,F,40\n", "people.csv")
    cohort = load_cohort(tmp_path)
    np.testing.assert_array_equal(cohort.targets, [[1], [1], [0]])
    assert cohort.images["age"].tolist() == ["40", "40", ""]
    assert set(cohort.source) == {"images.csv", "labels.csv", "people.csv"}
    assert "1 image of 3 has no row in people.csv." in cohort.reading.notes


def test_two_tables_that_contradict_each_other_are_refused(tmp_path):
    write(tmp_path, IMAGES, "images.csv")
    write(tmp_path, "study_id,subject_id,Edema\ns1,p1,1\ns2,p9,0\n", "labels.csv")
    with pytest.raises(
        TableError,
        match=r"images\.csv and labels\.csv contradict each other: "
        r"study 's2' of labels\.csv has patient 'p2' in images\.csv and 'p9'",
    ):
        load_cohort(tmp_path)


def test_tables_of_other_images_continue_each_other_and_may_be_the_given_split(tmp_path):
    header = "image,patient,labels\n"
    write(tmp_path / "A", f"{header}a.png,1,Edema\nb.png,2,Mass\nc.png,3,\n", "train.csv")
    write(tmp_path / "A", f"{header}d.png,4,Edema;Cyst\n", "test.csv")
    cohort = load_cohort(tmp_path / "A", "table")
    given = dict(zip(cohort.image_ids.tolist(), cohort.images["given_split"], strict=True))
    assert given == {"a.png": "train", "b.png": "train", "c.png": "train", "d.png": "test"}
    assert cohort.findings == ("Cyst", "Edema", "Mass")
    assert cohort.reading.codes["Edema"] == {"present": 2, "absent": 1, "blank": 1}
    assert cohort.reading.split == "the file names test.csv, train.csv"
    assert cohort.reading.notes == ()
    assert cohort.source.keys() == {"train.csv", "test.csv"}
    write(tmp_path / "A", f"{header}d.png,4,Edema;Cyst\nd.png,4,Mass\n", "test.csv")
    with pytest.raises(TableError, match=r"on line 2 of test\.csv and on line 3 of test\.csv"):
        load_cohort(tmp_path / "A", "table")
    write(tmp_path / "A", f"{header}a.png,1,Edema\nd.png,4,Mass\n", "test.csv")
    with pytest.raises(TableError, match=r"train.csv and test.csv name some of the same images"):
        load_cohort(tmp_path / "A", "table")
    write(tmp_path / "A", "image,Mass\nd.png,1\n", "test.csv")
    with pytest.raises(TableError, match="name different images, and their columns differ"):
        load_cohort(tmp_path / "A", "table")


def test_codes_of_a_finding_in_two_tables_are_counted_in_the_fuller(tmp_path):
    write(tmp_path, "image,patient,Mass\na,1,1\nb,2,0\n", "all.csv")
    write(tmp_path, "image,patient,Mass\na,1,1\n", "some.csv")
    assert load_cohort(tmp_path, "table").reading.codes == {"Mass": {"present": 1, "absent": 1}}


def test_studies_are_matched_with_files_where_no_table_names_them(tmp_path):
    for name in ("s1/one.png", "s1/two.png", "s2.png", "other/x.png"):
        write(tmp_path / "images", "", name)
    path = write(tmp_path, "study_id,patient_id,Edema\ns1,p1,1\ns2,p2,0\n")
    cohort = load_cohort(path)
    assert cohort.image_ids.tolist() == ["s1/one.png", "s1/two.png", "s2.png"]
    assert cohort.patient_ids.tolist() == ["p1", "p1", "p2"]
    np.testing.assert_array_equal(cohort.targets, [[1], [1], [0]])


def test_studies_that_are_numbered_by_patient_get_the_patients_id(tmp_path):
    rows = "".join(f"{p}_{s}.png,{p},study{s},1\n" for p in range(4) for s in range(2))
    cohort = load(tmp_path, f"path,patient,study,Mass\n{rows}")
    assert cohort.study_uids.tolist()[:3] == ["0/study0", "0/study1", "1/study0"]


def test_an_unknown_patient_is_that_of_the_study_and_numbered_studies_have_none(tmp_path):
    cohort = load(tmp_path, "path,patient,study,Mass\na,p1,s,1\nb,,s,1\nc,,t,0\n")
    assert cohort.patient_ids.tolist() == ["p1", "p1", ""]
    rows = "".join(f"{p}_{s},{p},{s},1\n" for p in range(4) for s in range(2))
    numbered = load(tmp_path, f"path,patient,study,Mass\n{rows}x,,1,1\ny,nan,1,0\n")
    assert numbered.study_uids.tolist()[-3:] == ["3/1", "x", "y"]
    assert numbered.patient_ids.tolist()[-3:] == ["3", "", ""]


def test_columns_that_look_like_patients_sexes_or_splits_are_named_if_not_read(tmp_path):
    content = "path,Hashed Patient,Sex,is_test,predicted,Mass\na,k1,0,0,1,1\nb,k2,1,1,0,0\n"
    cohort = load(tmp_path, content)
    assert cohort.findings == ("Mass",)
    patient, sex, split = (
        next(note for note in cohort.reading.notes if word in note)
        for word in ("'Hashed Patient'", "'Sex'", "'is_test'")
    )
    assert "--patient-column" in patient
    assert sex == (
        "'Sex' of mine.csv holds neither F and M nor female and male, so the sex is left blank."
    )
    assert "a column 'split' with train, val or test" in split
    named = load(tmp_path, content, patient_column="Hashed Patient")
    assert not any("--patient-column" in note for note in named.reading.notes)


# -- files --------------------------------------------------------------------------------


def test_files_are_found_below_the_image_folder_however_they_are_named(tmp_path):
    for name in ("images_001/images/1.png", "images_002/images/2.png", "x/3.jpg"):
        write(tmp_path / "all", "", name)
    path = write(tmp_path, "image,Mass\n1.png,1\nimages/2.png,0\nroot/x/3,1\n")
    cohort = load_cohort(path, image_dir=tmp_path / "all")
    assert cohort.image_ids.tolist() == [
        "images_001/images/1.png", "images_002/images/2.png", "x/3.jpg",
    ]  # fmt: skip
    write(tmp_path / "all", "", "again/1.png")
    with pytest.raises(TableError, match=r"'1\.png' may be 'again/1\.png' or 'images_001/"):
        load_cohort(path, image_dir=tmp_path / "all")


def test_a_file_of_another_folder_is_another_image(tmp_path):
    """Of one name: the label of ``a/001.png`` is not that of ``b/001.png``."""
    for name in ("b/001.png", "c/001.png", "a/002.png"):
        write(tmp_path / "all", "", name)
    path = write(tmp_path, "image,Mass\na/001.png,1\na/002.png,0\n")
    cohort = load_cohort(path, image_dir=tmp_path / "all")
    assert cohort.image_ids.tolist() == ["a/001.png", "a/002.png"]
    assert "1 of 2 images" in cohort.reading.notes[0]


def test_files_that_are_missing_are_counted(tmp_path, caplog):
    for number in range(9):
        write(tmp_path / "images", "", f"{number}.png")
    rows = "".join(f"{number}.png,1\n" for number in range(10))
    with caplog.at_level(logging.WARNING):
        cohort = load_cohort(write(tmp_path, f"image,Mass\n{rows}"), image_dir=tmp_path / "images")
    assert len(cohort) == 10
    [note] = cohort.reading.notes
    assert note == f"1 of 10 images (10%) is not in {tmp_path / 'images'}; the first is '9.png'."
    assert note in caplog.text


BAD = {
    "no file": (
        "image,Mass\nx.png,1\ny.png,0\nz.png,0\nw.png,0\n",
        "no image was found under any recognised column; {0}/images holds 1 image file, and the "
        "first paths tried are {0}/images/x.png, {0}/images/y.png, {0}/images/z.png.",
    ),
    "a split that is none": (
        "image,split,Mass\na.png,holiday,1\n",
        "mine.csv, line 2: column 'split' holds 'holiday', but a split is train, val",
    ),
    "a fold that is none": (
        "image,fold,Mass\na.png,first,1\n",
        "column 'fold' holds 'first', but a fold is a whole number",
    ),
    "the same image twice": (
        "image,Mass\na.png,1\nb.png,0\na.png,1\n",
        "mine.csv: image 'a.png' is on line 2 and on line 4. Keep one of the rows",
    ),
    "a study of two patients": (
        "image,study,patient,Mass\na.png,s,1,1\nb.png,s,2,1\n",
        "study 's' belongs to patient '1' and to patient '2'",
    ),
    "no image column": ("picture,Mass\na.png,1\n", "no column with the image files"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables_are_refused_in_a_sentence(tmp_path, kind):
    content, message = BAD[kind]
    write(tmp_path / "images", "", "a.png")
    path = write(tmp_path, content)
    result = CliRunner().invoke(
        cli, ["describe", "--data", str(path), "--image-dir", str(tmp_path / "images")]
    )
    assert result.exit_code == 1, result.output
    assert result.output.count("Error: ") == 1
    assert message.format(tmp_path) in result.output


def test_a_packed_table_that_is_missing_is_named_and_so_is_its_neighbour(tmp_path):
    with pytest.raises(
        TableError, match=r"x\.csv\.gz cannot be read: No such file or directory\.$"
    ):
        load_cohort(tmp_path / "x.csv.gz")
    write(tmp_path, CODES, "x.csv")
    with pytest.raises(TableError, match=r"x\.csv\.gz cannot be read: .*x\.csv is there"):
        load_cohort(tmp_path / "x.csv.gz")


def test_a_patient_in_two_hospitals_is_named_and_stays_together(tmp_path):
    content = "image,patient,Hospital,Mass\na.png,1,A,1\nb.png,1,B,0\nc.png,2,B,0\n"
    cohort = load(tmp_path, content)
    assert cohort.images["hospital"].tolist() == ["A", "B", "B"]
    [note] = cohort.reading.notes
    assert note.startswith("1 patient (1) is in two hospitals: '1' in 'A' and in 'B'. Their images")


def test_a_patient_with_more_than_a_tenth_of_the_images_is_named(tmp_path):
    rows = "".join(f"{i}.png,{'anon' if i < 12 else i},1\n" for i in range(100))
    [note] = load(tmp_path, f"image,patient,Mass\n{rows}").reading.notes
    assert note.startswith("Patient 'anon' has 12 of the 100 images (12%)")


# -- cells --------------------------------------------------------------------------------


def test_ages_and_views_as_they_are_written():
    ages, n_impossible = read_ages(
        pd.Series(["57", "057Y", "018M", "3.0", "90+", "414", "-1", "", "unknown", "old"])
    )
    assert ages.tolist() == ["57", "57", "1", "3", "90", "", "", "", "", ""]
    assert n_impossible == 3
    projections, positions = read_views(pd.Series(["PA", "AP supine", "L", "LL", "Frontal", "?"]))
    assert projections.tolist() == ["Frontal", "Frontal", "Lateral", "Lateral", "Frontal", ""]
    assert positions.tolist() == ["PA", "AP", "L", "LL", "", ""]
    projections, positions = read_views(
        pd.Series(["AP portable", "portable AP", "Lateral (L)", "Left-lateral", "Postero anterior"])
    )
    assert projections.tolist() == ["Frontal", "Frontal", "Lateral", "Lateral", "Frontal"]
    assert positions.tolist()[:3] == ["AP", "AP", ""]
    projections, _ = read_views(
        pd.Series(["AP and lateral", "lateral decubitus", "AP decubitus", "PA (L)"])
    )
    assert projections.tolist() == ["", "", "Frontal", "Frontal"]


# -- kinds of files -----------------------------------------------------------------------


def test_packed_tables_are_read_as_what_is_in_them(tmp_path):
    plain = read_table(write(tmp_path, CODES))
    with gzip.open(tmp_path / "x.csv.gz", "wt") as file:
        file.write(CODES)
    with zipfile.ZipFile(tmp_path / "x.csv.zip", "w") as archive:
        archive.writestr("inner/x.csv", CODES)
        archive.writestr("__MACOSX/x.csv", "")
    write(tmp_path, CODES.replace(",", "\t"), "x.tsv")
    for name in ("x.csv.gz", "x.csv.zip", "x.tsv"):
        assert read_table(tmp_path / name).equals(plain), name
    with zipfile.ZipFile(tmp_path / "x.csv.zip", "a") as archive:
        archive.writestr("y.csv", CODES)
    with pytest.raises(TableError, match=r"holds 2 tables \(inner/x\.csv, y\.csv\); it should"):
        read_table(tmp_path / "x.csv.zip")
    (tmp_path / "x.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(TableError, match=r"x\.csv\.gz cannot be read: Not a gzipped file"):
        read_table(tmp_path / "x.csv.gz")


@pytest.mark.parametrize(("suffix", "library"), [(".parquet", "pyarrow"), (".xlsx", "openpyxl")])
def test_other_kinds_need_their_library(tmp_path, monkeypatch, suffix, library):
    path = tmp_path / f"mine{suffix}"
    path.touch()
    monkeypatch.setitem(__import__("sys").modules, library, None)
    monkeypatch.setattr(pd, "read_excel", lambda *_, **__: __import__(library))
    monkeypatch.setattr(pd, "read_parquet", lambda *_, **__: __import__(library))
    with pytest.raises(TableError, match=f"Run `pip install {library}`, or save the table as CSV"):
        read_table(path)


def test_typed_cells_of_other_kinds_become_text(tmp_path, monkeypatch):
    typed = pd.DataFrame({"path": ["a", "b"], "age": [57.0, None], "Edema": [True, False]})
    monkeypatch.setattr(pd, "read_parquet", lambda *_: typed)
    table = read_table(tmp_path / "x.parquet")
    assert table.to_dict("list") == {
        "path": ["a", "b"], "age": ["57", ""], "Edema": ["True", "False"],
    }  # fmt: skip
    assert table.index.tolist() == [2, 3]


@settings(max_examples=300, deadline=None)
@given(content=st.text(",;\t\n ab1é\xa0-", max_size=60))
def test_the_quick_way_reads_what_the_other_reads(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "quick.csv"
    path.write_text(f"id,text\n{content}", newline="")
    try:
        table = read_csv(path)
    except TableError:
        return
    text = path.read_bytes().decode()
    quick = tables._parse_plain(text, tables.detect_separator(text), path)
    if quick is not None:
        assert quick.equals(table)
        assert quick.index.tolist() == table.index.tolist()


# -- a table of labels --------------------------------------------------------------------


def test_patients_and_splits_of_a_table_of_labels_are_used(tmp_path):
    """Issue 12: they were dropped without a word."""
    make_store(tmp_path / "s.h5", 6).close()
    with FeatureStore.open(tmp_path / "s.h5") as store:
        table = pd.DataFrame({"image_id": store.image_ids})
        table["Patient ID"] = [f"p{uid}" for uid in store.cohort.study_uids]
        table["split"], table["Mine"] = "train", ["1", "0"] * (len(table) // 2)
        table.assign(Comment="x").to_csv(tmp_path / "l.csv", index=False)
        found = find_labelled_rows(store, labels=tmp_path / "l.csv")
    assert found.cohort.findings == ("Mine",)
    assert found.cohort.patient_ids.tolist() == table["Patient ID"].tolist()
    assert set(found.cohort.images["given_split"]) == {"train"}
    assert found.notes == (
        "l.csv also tells patient, given split of the images: it is used.",
        "Not used of l.csv: Comment.",
    )
    assert found.cohort.reading.split == "the column 'split' of l.csv"


@pytest.mark.parametrize(("column", "what"), [("Patient ID", "patient"), ("Split", "given split")])
def test_a_table_of_labels_that_contradicts_the_store_is_refused(tmp_path, column, what):
    images = pd.DataFrame({"image_id": ["a", "b"], "study_uid": ["1", "2"]})
    images = images.assign(patient_id=["test", "test"], given_split="test")
    cohort = Cohort(images, np.zeros((2, 1), np.float32), ("Edema",))
    path = write(tmp_path, f"image_id,{column},Edema\na,test,1\nb,train,0\n")
    with pytest.raises(
        TableError,
        match=rf"mine\.csv and the store contradict each other: the "
        rf"{what} of image 'b' is 'train' in the table and 'test' in the store",
    ):
        read_labels(path, cohort)


def test_patients_are_hashed_as_those_of_the_store_before_they_are_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    write(tmp_path / "cxr-cache", "0123456789abcdef", "id_key")
    hashed = [hash_id(b"0123456789abcdef", "patient", name) for name in ("MRN1", "MRN2")]
    images = pd.DataFrame({"image_id": ["a", "b"], "study_uid": ["1", "2"], "patient_id": hashed})
    how = Reading("dicom", columns={"PatientID": "patient, as a keyed hash"})
    cohort = Cohort(images, np.zeros((2, 1), np.float32), ("Edema",), reading=how)
    table = write(tmp_path, "image_id,PatientID,Mine\na,MRN1,1\nb,MRN2,0\n")
    assert read_labels(table, cohort).patient_ids.tolist() == hashed
    by_patient = write(tmp_path, "PatientID,Mine\nMRN1,1\nMRN2,0\nMRN3,1\n", "patients.csv")
    assert read_labels(by_patient, cohort).targets.tolist() == [[1], [0]]
    swapped = write(tmp_path, "image_id,PatientID,Mine\na,MRN2,1\nb,MRN1,0\n", "swapped.csv")
    with pytest.raises(TableError, match=f"{hashed[1]}' in the table") as error:
        read_labels(swapped, cohort)
    assert "MRN" not in str(error.value)
    write(tmp_path / "cxr-cache", "another key, that is", "id_key")
    labelled = read_labels(table, cohort)
    assert labelled.patient_ids.tolist() == hashed
    assert labelled.reading.notes[0].startswith("'PatientID' of mine.csv is not used: the store ha")
    assert "MRN" not in str(labelled.reading)


def test_labels_may_have_a_row_per_study(tmp_path):
    images = pd.DataFrame({"image_id": ["a", "b", "c"], "study_uid": ["1", "1", "2"]})
    cohort = Cohort(images, np.zeros((3, 1), np.float32), ("Edema",))
    labelled = read_labels(write(tmp_path, "study_id,Mine\n1,1\n2,0\n"), cohort)
    assert labelled.targets[:, 0].tolist() == [1, 1, 0]


def test_own_findings_may_be_listed_too(tmp_path):
    images = pd.DataFrame({"image_id": ["a", "b"], "study_uid": ["1", "2"]})
    cohort = Cohort(images, np.zeros((2, 2), np.float32), ("Mine", "Yours"))
    labelled = read_labels(write(tmp_path, "image_id,label\na,mine; yours\nb,Mine\n"), cohort)
    assert labelled.findings == ("Mine", "Yours")
    assert labelled.targets.tolist() == [[1, 1], [1, 0]]
