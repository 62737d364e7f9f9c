"""The complete label tables of published data sets, counted once more by pandas alone."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pandas as pd
import pytest

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.describe import describe_cohort
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.errors import ConfigError


def count_present(cohort: Cohort) -> dict[str, int]:
    return {finding.finding: finding.images for finding in describe_cohort(cohort).findings}


@pytest.fixture(scope="module")
def tables(shared_data) -> Path:
    return shared_data / "tables"


def test_nih(tables):
    path = tables / "nih_Data_Entry_2017_v2020.csv.gz"
    raw = pd.read_csv(path)
    with gzip.open(tables / "nih_test_list.txt.gz", "rt") as lines:
        official = {line.strip() for line in lines}

    cohort = load_cohort(path)

    told = describe_cohort(cohort).to_dict()
    assert (told["images"], told["patients"]) == (112_120, 30_805)
    assert told["patients"] == raw["Patient ID"].nunique()
    in_test = cohort.images["given_split"] == "test"
    assert set(cohort.images["image_id"][in_test]) == official
    assert in_test.sum() == 25_596
    patients = cohort.images["patient_id"]
    assert set(patients[in_test]).isdisjoint(patients[~in_test])
    counted = raw["Finding Labels"].str.split("|").explode().value_counts().to_dict()
    assert count_present(cohort) == {name: n for name, n in counted.items() if name != "No Finding"}
    assert cohort.images["view_position"].value_counts().to_dict() == {"PA": 67_310, "AP": 44_810}


def test_a_sample_of_nih_with_its_pixels_and_the_official_list(shared_data, tables, tmp_path):
    """63 patients, none on both sides: the sample has its own table, the list is the whole one."""
    shutil.copy(shared_data / "nih_1024" / "Data_Entry_2017.csv", tmp_path)
    shutil.copy(tables / "nih_test_list.txt.gz", tmp_path)
    (tmp_path / "images").symlink_to(shared_data / "nih_1024" / "images")

    cohort = load_cohort(tmp_path, image_dir=tmp_path / "images")

    patients = cohort.images["patient_id"]
    assert (len(cohort), patients.nunique(), len(cohort.findings)) == (112, 63, 14)
    sides = cohort.images.groupby("patient_id")["given_split"].nunique()
    assert (sides == 1).all()
    assert set(cohort.images["given_split"]) == {"train", "test"}


@pytest.mark.slow
def test_chexpert(tables):
    path = tables / "chexpert_train.csv.gz"
    raw = pd.read_csv(path)
    patients = raw["Path"].str.split("/").str[2]
    studies = patients + raw["Path"].str.split("/").str[3]

    cohort = load_cohort(path)

    told = describe_cohort(cohort).to_dict()
    assert (told["images"], told["patients"], told["studies"]) == (223_414, 64_540, 187_641)
    assert (patients.nunique(), studies.nunique()) == (64_540, 187_641)
    present = (raw[list(cohort.findings)] == 1).sum().to_dict()
    assert count_present(cohort) == present
    uncertain = {name: of.get("uncertain", 0) for name, of in cohort.reading.codes.items()}
    assert uncertain == (raw[list(cohort.findings)] == -1).sum().to_dict()
    assert cohort.images["view_position"].value_counts().to_dict() == {
        **{"AP": 161_590, "": 32_387, "PA": 29_420, "LL": 16, "RL": 1}
    }
    expected = raw[list(cohort.findings)].fillna(0).replace(-1, float("nan")).to_numpy("float32")
    assert pd.DataFrame(cohort.targets).equals(pd.DataFrame(expected))


def test_vindr(tables):
    path = tables / "vindr_image_labels_train.csv.gz"
    raw = pd.read_csv(path)
    votes = raw.drop(columns="rad_id").groupby("image_id").sum()

    cohort = load_cohort(path)

    assert (len(raw), len(cohort), len(cohort.findings)) == (45_000, 15_000, 28)
    assert count_present(cohort) == (votes >= 2).sum().to_dict()
    assert "given_split" not in cohort.images


def test_vinbigdata(tables):
    path = tables / "vinbigdata-train.csv.gz"
    raw = pd.read_csv(path)
    votes = raw.drop_duplicates(["image_id", "rad_id", "class_name"])
    votes = votes.groupby(["class_name", "image_id"]).size()
    majority = (votes >= 2).groupby("class_name").sum().drop("No finding").to_dict()

    cohort = load_cohort(path)

    assert (len(raw), len(cohort), len(cohort.findings)) == (67_914, 15_000, 14)
    assert count_present(cohort) == majority


def test_rsna(tables):
    path = tables / "rsna_stage_2_train_labels.csv.zip"
    raw = pd.read_csv(path)
    targets = raw.groupby("patientId")["Target"].max()

    cohort = load_cohort(path)

    assert (len(raw), len(cohort)) == (30_227, raw["patientId"].nunique()) == (30_227, 26_684)
    assert count_present(cohort) == {"Pneumonia": int(targets.sum())} == {"Pneumonia": 6_012}


def test_indiana(shared_data):
    raw = pd.read_csv(shared_data / "indiana_csv" / "indiana_projections.csv")

    cohort = load_cohort(shared_data / "indiana_csv")

    assert len(cohort) == len(raw) == 7_466
    assert describe_cohort(cohort).n_studies == raw["uid"].nunique() == 3_851
    assert cohort.reading.format == "indiana"


def test_a_folder_of_two_data_sets_is_refused_with_both(tables):
    with pytest.raises(ConfigError) as refusal:
        load_cohort(tables)

    assert "files of two data sets: nih (nih_Data_Entry" in str(refusal.value)
    assert "Say which is meant with --format nih or --format chexpert" in str(refusal.value)
    assert load_cohort(tables, format="rsna").reading.format == "rsna"
