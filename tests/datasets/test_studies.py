"""Images brought together by study: what a study is, and what is said where images disagree."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import Split
from cxr_cache.datasets.studies import group_by_study, read_studies
from cxr_cache.errors import ConfigError, TableError

NAN = np.nan


@pytest.fixture
def images() -> Cohort:
    table = pd.DataFrame(
        {
            "image_id": ["b1.png", "a1.png", "b2.png", "a2.png", "a3.png", "c1.png"],
            "study_uid": ["b", "a", "b", "a", "a", "c"],
            "projection": ["Frontal", "Lateral", "Lateral", "Frontal", "Frontal", ""],
            "sex": ["F", "", "F", "M", "M", ""],
        }
    )
    targets = [[1, NAN], [0, 0], [0, NAN], [0, 1], [NAN, NAN], [NAN, 0]]
    return Cohort(table, np.array(targets, np.float32), ("Edema", "Mass"))


def test_a_study_has_what_any_of_its_images_has(images):
    studies = group_by_study(images)
    assert studies.cohort.images.to_dict("list") == {
        "image_id": ["b", "a", "c"],
        "study_uid": ["b", "a", "c"],
        "patient_id": ["", "", ""],
        "projection": ["Frontal + Lateral", "Frontal + Lateral", ""],
        "sex": ["F", "M", ""],
        "n_images": ["2", "3", "1"],
    }
    np.testing.assert_array_equal(studies.cohort.targets, [[1, NAN], [0, 1], [NAN, 0]])
    assert studies.notes == (
        "The images of 2 of 3 studies disagree about a finding. A study has a finding if any of "
        "its images has it.",
        "1 of 6 images have no known projection and count as frontal.",
    )


def test_the_images_of_some_studies_come_study_by_study_with_their_slots(images):
    rows, slots = group_by_study(images).pick(np.array([1, 0]))  # a, then b
    assert images.image_ids[rows].tolist() == ["a1.png", "a2.png", "a3.png", "b1.png", "b2.png"]
    assert slots.tolist() == [1, 0, 0, 2, 3]


def test_a_split_of_images_becomes_that_of_their_studies(images):
    studies = group_by_study(images)
    fold = np.array([0, -1, 0, -1, -1, 1])
    split = studies.take_split(Split(fold < 0, fold), np.arange(6))
    assert split.fold.tolist() == [0, -1, 1]
    labelled = np.array([0, 3, 5])  # one image of each study is enough
    part = Split(fold[labelled] < 0, fold[labelled])
    assert studies.take_split(part, labelled).fold.tolist() == [0, -1, 1]


def test_a_study_on_two_sides_of_a_given_split_is_refused(images):
    fold = np.array([0, -1, 0, 1, -1, 1])
    split = Split(fold < 0, fold, whose="the authors")
    message = "Study 'a' has images in .* of the split given by the authors.* --split new"
    with pytest.raises(ConfigError, match=message):
        group_by_study(images).take_split(split, np.arange(6))


# -- of files -----------------------------------------------------------------------------


def test_a_table_says_which_files_make_a_study(tmp_path):
    table = tmp_path / "studies.csv"
    table.write_text(
        "image_id,study_uid,projection\na/1.png,s1,PA\na/2,s1,LATERAL\nb/1.png,s2,AP\nb/2.png,s2,\n"
    )
    studies = read_studies(table, ["/data/a/2.png", "/data/b/1.png", "/data/a/1.png"])
    assert studies.cohort.image_ids.tolist() == ["s1", "s2"]
    assert studies.cohort.projections.tolist() == ["Frontal + Lateral", "Frontal"]
    assert studies.notes == (f"{table} has 1 more image of these studies, not given here.",)


def test_without_a_table_every_image_is_a_study_and_that_is_said():
    studies = read_studies(None, ["a.png", "b.png"])
    assert studies.cohort.image_ids.tolist() == ["a.png", "b.png"]
    assert studies.pick(np.array([0, 1]))[1].tolist() == [0, 2]
    assert "taken for a study of one frontal view" in studies.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,study\na.png,1\n", "no column 'study_uid'; its columns are image_id, study"),
        ("image_id,study_uid\nb.png,1\n", "no row for 1 image, the first is 'a.png'"),
        ("image_id,study_uid\na.png,\n", "names no study for 'a.png'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, text, message):
    (tmp_path / "studies.csv").write_text(text)
    with pytest.raises(TableError, match=message):
        read_studies(tmp_path / "studies.csv", ["a.png"])
