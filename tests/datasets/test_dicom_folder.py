"""A folder of DICOM files as a data set: its facts, its ids, and what is never kept."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pydicom = pytest.importorskip("pydicom", minversion="3")

from cxr_cache.config import ReadConfig  # noqa: E402
from cxr_cache.datasets.cohort import Cohort  # noqa: E402
from cxr_cache.datasets.dicom.folder import find_instances, read_dicom  # noqa: E402
from cxr_cache.datasets.dicom.pseudonyms import default_key_path, hash_id, load_key  # noqa: E402
from cxr_cache.datasets.readers import load_cohort  # noqa: E402
from cxr_cache.errors import ConfigError, TableError  # noqa: E402
from tests.datasets.dicoms import dicom, make_header, to_bytes  # noqa: E402

KEEP = ReadConfig(keep_ids=True)


@pytest.fixture(autouse=True)
def key_home(tmp_path_factory, monkeypatch) -> Path:
    """No test makes a key where the user keeps one."""
    home = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    return home


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (32, 24)).astype(np.uint16)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures of two patients, in sub-folders and without endings, and three other files."""
    who = {"PatientName": "Doe^Jane", "PatientBirthDate": "19600615", "BitsStored": 12}
    files: dict[str, dict[str, Any]] = {
        "a/IM0": {"PatientID": "MRN7", "ViewPosition": "PA", "PatientAge": "057Y"},
        "a/IM1": {"PatientID": "MRN7", "ViewPosition": "LL", "PatientSex": "F"},
        "b/IM2": {"PatientID": "MRN8", "StudyDate": "20200614", "PatientSex": "M"},
        "c.dcm": {"PatientID": "Anonymous", "PatientAge": "414Y", "PatientBirthDate": ""},
    }
    for number, (name, fields) in enumerate(files.items()):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        study = {"StudyInstanceUID": f"1.2.4.{max(number, 1)}"}
        uid = {"SOPInstanceUID": f"1.2.826.0.1.{number}", "SeriesInstanceUID": "1.2.9"}
        path.write_bytes(dicom(picture(number), **(who | study | uid | fields)))
    report = make_header(picture())
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    del report.Rows, report.PixelData
    (tmp_path / "set" / "report").write_bytes(to_bytes(report))
    (tmp_path / "set" / "readme.txt").write_text("no DICOM")
    (tmp_path / "set" / "broken.dcm").write_bytes(b"cut")
    return tmp_path / "set"


def by_id(cohort: Cohort) -> pd.DataFrame:
    return cohort.images.set_index("image_id")


def test_the_headers_say_study_patient_view_sex_and_age(folder):
    images = by_id(load_cohort(folder, "dicom", config=KEEP))
    assert images.index.tolist() == ["broken.dcm", "c.dcm", "a/IM0", "a/IM1", "b/IM2"]
    assert images["patient_id"].tolist() == ["", "", "MRN7", "MRN7", "MRN8"]
    assert images.loc["a/IM0", "study_uid"] == images.loc["a/IM1", "study_uid"]
    assert images["projection"].tolist() == ["", "", "Frontal", "Lateral", ""]
    assert images["view_position"].tolist() == ["", "", "PA", "LL", ""]
    assert images["sex"].tolist() == ["", "", "", "F", "M"]
    assert images["age"].tolist() == ["", "", "57", "", "59"]  # the day before a 60th birthday


def test_what_was_left_out_or_looks_odd_is_said(folder):
    notes = load_cohort(folder, "dicom", config=KEEP).reading.notes
    assert "DICOM objects without a picture were left out: 1 Basic Text SR Storage." in notes
    assert "Left out as no DICOM: 1 file (the first: readme.txt)." in notes
    assert any("The headers of 1 file (the first: broken.dcm) cannot be read" in n for n in notes)
    assert "Left blank as impossible: 1 age." in notes


def test_ids_are_keyed_hashes_that_stay_the_same(folder, tmp_path):
    once, again = (by_id(load_cohort(folder, "dicom")) for _ in range(2))
    pd.testing.assert_frame_equal(once, again)
    assert once.loc["a/IM0", "patient_id"] == once.loc["a/IM1", "patient_id"]
    assert once.loc["a/IM0", "patient_id"] != once.loc["b/IM2", "patient_id"]
    for name in ("patient_id", "study_uid", "series_uid", "instance_uid"):
        assert re.fullmatch(r"[0-9a-f]{20}", once.loc["a/IM0", name]), name
    other = tmp_path / "key"
    other.write_text("f" * 64)
    with_other = by_id(load_cohort(folder, "dicom", config=ReadConfig(id_key=str(other))))
    assert with_other.loc["a/IM0", "patient_id"] != once.loc["a/IM0", "patient_id"]
    assert with_other.loc["a/IM0", "patient_id"] == hash_id(b"f" * 64, "patient", "MRN7")


def test_nothing_kept_tells_the_name_the_birth_date_or_an_id(folder):
    cohort = load_cohort(folder, "dicom")
    kept = cohort.images.to_csv() + str(cohort.reading.to_dict()) + str(cohort.source)
    for secret in ("Doe", "Jane", "1960", "MRN7", "MRN8", "1.2.826", "20200614"):
        assert secret not in kept, secret


def test_all_images_of_a_study_are_of_one_patient(tmp_path):
    for name, patient in (("a", "MRN1"), ("b", ""), ("c", "MRN1")):
        (tmp_path / f"{name}.dcm").write_bytes(dicom(picture(), PatientID=patient))
    assert load_cohort(tmp_path, "dicom", config=KEEP).patient_ids.tolist() == ["MRN1"] * 3
    (tmp_path / "d.dcm").write_bytes(dicom(picture(), PatientID="MRN2"))
    with pytest.raises(TableError, match=r"of a\.dcm and d\.dcm have the same StudyInstanceUID"):
        load_cohort(tmp_path, "dicom")


def test_a_path_that_tells_who_it_is_is_named(tmp_path):
    (tmp_path / "doe_jane.dcm").write_bytes(dicom(picture(), PatientName="Doe^Jane"))
    notes = load_cohort(tmp_path, "dicom").reading.notes
    assert any(
        "paths of 1 file (the first: doe_jane.dcm) hold the patient's name" in n for n in notes
    )
    assert load_cohort(tmp_path, "dicom", config=KEEP).reading.notes == ()


def test_the_key_is_made_once_for_the_user_alone(key_home):
    key = load_key()
    assert load_key() == key
    assert len(key) == 64
    file = default_key_path()
    assert file == key_home / "cxr-cache" / "id_key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_a_named_key_must_be_there_and_long_enough(tmp_path):
    with pytest.raises(ConfigError, match=r"absent, by which ids .* --id-key.*--keep-ids"):
        load_key(tmp_path / "absent")
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(ConfigError, match="short has 3 bytes; ids could be guessed"):
        load_key(tmp_path / "short")


def test_a_folder_without_dicom_pictures_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(TableError, match=r"no DICOM picture: 0 DICOM objects .* and 1 other file"):
        read_dicom(tmp_path, KEEP)
    with pytest.raises(TableError, match="absent is not a folder"):
        read_dicom(tmp_path / "absent", KEEP)


def test_files_without_ending_are_recognised_by_their_content(folder):
    for name in ("c.dcm", "broken.dcm", "readme.txt", "report"):
        (folder / name).unlink()
    cohort = load_cohort(folder, config=KEEP)
    assert cohort.reading.format == "dicom"
    assert "DICOM" in cohort.reading.why


# -- a table of labels for it ----------------------------------------------------------------


def test_a_table_may_name_images_by_their_instance_uid(folder):
    assert find_instances(folder)["1.2.826.0.1.2"] == "b/IM2"
    (folder.parent / "labels.csv").write_text(
        "SOPInstanceUID,Edema\n1.2.826.0.1.2,1\n1.2.826.0.1.0,0\n"
    )
    cohort = load_cohort(folder.parent / "labels.csv", image_dir=folder, config=KEEP)
    assert cohort.image_ids.tolist() == ["b/IM2", "a/IM0"]
    assert cohort.targets[:, 0].tolist() == [1, 0]


def test_a_table_without_patients_takes_them_from_the_headers(folder):
    """Else two images of one patient end up on both sides of a split."""
    (folder.parent / "labels.csv").write_text(
        "image,sex,Edema\na/IM0,M,1\na/IM1,,0\nb/IM2,,0\nbroken.dcm,,0\n"
    )
    cohort = load_cohort(folder.parent / "labels.csv", image_dir=folder, config=KEEP)
    assert cohort.patient_ids.tolist() == ["MRN7", "MRN7", "MRN8", ""]
    assert cohort.images["study_uid"].nunique() == 3
    assert cohort.images["sex"].tolist() == ["M", "F", "M", ""], "what the table says stays"
    assert cohort.images["age"].tolist() == ["57", "", "59", ""]
    assert cohort.reading.columns["DICOM PatientID"] == "patient"


def test_a_table_with_patients_keeps_its_own(folder):
    (folder.parent / "labels.csv").write_text("image,patient,Edema\na/IM0,p1,1\na/IM1,p1,0\n")
    cohort = load_cohort(folder.parent / "labels.csv", image_dir=folder, config=KEEP)
    assert cohort.patient_ids.tolist() == ["p1", "p1"]
