"""Ages of Indiana's studies, out of Open-i's table of DICOM headers."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pandas as pd
import pytest

from cxr_cache.datasets.readers import load_cohort
from cxr_cache.errors import TableError

HEADERS = "indiana_dicom_metadata.csv.gz"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "indiana_reports.csv").write_text("uid,Problems\n7,normal\n8,Nodule\n9,normal\n")
    images = "7,7_IM-1.dcm.png,Frontal\n7,7_IM-2.dcm.png,Lateral\n8,8_IM-1.dcm.png,Frontal\n"
    (tmp_path / "indiana_projections.csv").write_text(
        f"uid,filename,projection\n{images}9,9_IM-1.dcm.png,Frontal\n"
    )
    return tmp_path


def write_headers(folder: Path, *rows: str) -> None:
    table = "\n".join(["imageid,,Study Date,Patient's Birth Date", *rows])
    (folder / HEADERS).write_bytes(gzip.compress(table.encode()))


def test_ages_are_whole_years_at_the_study_for_all_of_its_images(folder, caplog):
    rows = ("CXR7_IM-1,,20100819,19500820", "CXR8_8_IM-1,,20100820,19500820")
    write_headers(folder, *rows, "CXR9_IM-1,,20100101,17000101")

    cohort = load_cohort(folder)

    assert cohort.images["age"].tolist() == ["59", "59", "60", ""]
    assert "1 of 3 rows tell no age" in caplog.text
    assert HEADERS in cohort.source


def test_ages_of_the_csv_files_count_first(folder):
    write_headers(folder, "CXR7_IM-1,,20100819,19500820")
    reports = "uid,Problems,age\n7,normal,33\n8,Nodule,\n9,normal,44\n"
    (folder / "indiana_reports.csv").write_text(reports)
    assert load_cohort(folder).images["age"].tolist() == ["33", "33", "", "44"]


def test_a_table_of_other_columns_and_two_tables_are_named(folder):
    (folder / HEADERS).write_bytes(gzip.compress(b"a,b\n1,2\n"))
    with pytest.raises(
        TableError, match=f"{HEADERS} is no table of DICOM headers with the columns"
    ):
        load_cohort(folder)
    write_headers(folder, "CXR7_IM-1,,20100819,19500820")
    (folder / "nlmcxr_dicom_metadata.csv").write_text("x")
    with pytest.raises(TableError, match="several tables of DICOM headers: indiana_dicom"):
        load_cohort(folder)


def test_all_real_studies_have_an_age(shared_data, tmp_path):
    for path in (shared_data / "indiana_csv").glob("*.csv"):
        shutil.copy(path, tmp_path)
    shutil.copy(shared_data / "tables" / HEADERS, tmp_path)

    images = load_cohort(tmp_path).images

    ages = images["age"].astype(int)
    assert (ages.min(), ages.max()) == (17, 99)
    table = pd.read_csv(shared_data / "tables" / HEADERS, dtype=str, low_memory=False)
    born, studied = (pd.to_datetime(table[c]) for c in ("Patient's Birth Date", "Study Date"))
    years = (studied - born).dt.days / 365.2425
    expected = years.groupby(table["Patient ID"]).first().loc[images["study_uid"]].to_numpy()
    assert ((expected - ages).between(-0.01, 1.01)).all()
