"""Promises of splits that came with the data: used as they are, and what is lacking is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.splits import (
    assign_folds,
    find_shared,
    has_given_split,
    split_test,
    take_given_split,
)
from cxr_cache.errors import ConfigError

N_PATIENTS = 40


def make(split: Any = None, fold: Any = None, *, patients: bool = True, whose: str = "") -> Cohort:
    """Two studies of one image for each patient, whose place is told per image."""
    rng, n = np.random.default_rng(0), 2 * N_PATIENTS
    images = {
        "image_id": [f"{row:03d}.png" for row in range(n)],
        "study_uid": [f"s{row:03d}" for row in range(n)],
        "patient_id": [f"p{row // 2:02d}" if patients else "" for row in range(n)],
    }
    images |= {name: v for name, v in {"given_split": split, "given_fold": fold}.items() if v}
    targets = (rng.random((n, 3)) < 0.4).astype(np.float32)
    return Cohort(
        pd.DataFrame(images), targets, ("A", "B", "C"), reading=Reading("table", split=whose)
    )


def deal(*parts: tuple[str, int]) -> list[str]:
    """So many patients for each word, two images each."""
    words = [word for word, n_patients in parts for _ in range(2 * n_patients)]
    assert len(words) == 2 * N_PATIENTS
    return words


def test_given_test_images_are_the_test_images_and_val_is_trained_on():
    words = deal(("train", 28), ("val", 4), ("test", 8))

    split = take_given_split(make(words, whose="the official lists"), n_folds=4)

    np.testing.assert_array_equal(split.is_test, np.array(words) == "test")
    assert split.whose == "the official lists"
    assert split.notes == (
        "8 images marked val are trained on: folds inside train and val take the part of val.",
    )
    cohort = make(words)
    assert split.n_folds == 4
    inside = ~split.is_test
    expected = assign_folds(cohort.targets[inside], cohort.groups[inside], 4, seed=42)
    np.testing.assert_array_equal(split.fold[inside], expected)  # whole patients


def test_without_test_images_val_is_the_test():
    """CheXpert comes with train and valid alone."""
    words = deal(("train", 34), ("val", 6))
    split = take_given_split(make(words))
    np.testing.assert_array_equal(split.is_test, np.array(words) == "val")
    assert split.notes == ("No images are marked test, so the 12 marked val are the test images.",)


@pytest.mark.parametrize("words", [deal(("train", 40)), deal(("train", 30), ("", 10))])
def test_without_test_and_val_a_new_test_split_is_made(words):
    cohort = make(words)
    split = take_given_split(cohort, seed=3)
    expected = split_test(cohort.targets, cohort.groups, 0.2, seed=3)
    np.testing.assert_array_equal(split.is_test, expected)
    assert split.whose == ""
    assert split.notes == ("No test images are given, so a new test split was made.",)


def test_images_without_a_place_follow_their_patient_into_test_or_are_trained_on():
    words = deal(("train", 30), ("test", 6), ("", 4))
    words[62] = ""  # the other image of its patient is marked test
    split = take_given_split(make(words))
    expected = np.array(words) == "test"
    expected[62] = True
    np.testing.assert_array_equal(split.is_test, expected)
    assert split.notes == (
        "9 images have no place in the given split: 1 joined the test images, where the same "
        "patient is, and 8 the train images.",
    )


def test_patients_on_both_sides_are_counted_and_named():
    words = deal(("train", 30), ("test", 10))
    for first_image in (60, 64, 70, 74):
        words[first_image] = "train"
    cohort = make(words)
    split = take_given_split(cohort)
    np.testing.assert_array_equal(split.is_test, np.array(words) == "test")
    assert find_shared(split.is_test, cohort.groups) == [f"patient p{n}" for n in (30, 32, 35, 37)]
    assert split.notes == (
        "4 patients are on both sides of the given split, with 4 of 16 test images: p30, p32, p35 "
        "and 1 more. Figures on test are therefore too good. --split new makes a split that keeps "
        "them whole.",
    )


def test_where_patients_are_unknown_studies_are_counted():
    cohort = make(deal(("train", 30), ("test", 10)), patients=False)
    studies = cohort.study_uids.copy()
    studies[0] = studies[79]
    (note,) = take_given_split(cohort.assign(study_uid=studies)).notes
    assert note.startswith("1 study is on both sides of the given split, with 1 of 20 test images")
    assert "s079." in note


def test_given_folds_are_the_folds_and_their_number_counts():
    words = deal(("train", 30), ("test", 10))
    folds = ["" if word == "test" else str(row // 2 % 10) for row, word in enumerate(words)]
    split = take_given_split(make(words, folds))
    assert split.n_folds == 10
    assert split.fold.tolist() == [int(fold or -1) for fold in folds]
    assert split.notes == ("10 folds are given and used, where --folds says 5.",)
    assert take_given_split(make(words, folds), n_folds=10).notes == ()


def test_folds_are_ordered_by_number():
    folds = [str(row // 2 % 12 + 1) for row in range(2 * N_PATIENTS)]
    split = take_given_split(make(deal(("train", 30), ("test", 10)), folds), n_folds=12)
    inside = ~split.is_test
    assert (split.fold + 1)[inside].tolist() == [int(fold) for fold in folds[:60]]


def test_folds_alone_come_with_a_new_test_split():
    folds = [str(row // 2 % 4) for row in range(2 * N_PATIENTS)]
    cohort = make(fold=folds)
    split = take_given_split(cohort, n_folds=4)
    expected = split_test(cohort.targets, cohort.groups, 0.2, seed=42)
    np.testing.assert_array_equal(split.is_test, expected)
    assert split.whose == ""
    assert split.notes == (
        "No test images are given, so a new test split was made.",
        "The folds are those given by the image table.",
    )
    np.testing.assert_array_equal(split.fold[~expected], np.array(folds, np.int64)[~expected])


def test_train_images_without_a_fold_join_their_patient():
    words = deal(("train", 30), ("test", 10))
    folds = [str(row // 2 % 3) for row in range(2 * N_PATIENTS)]
    folds[5] = folds[6] = folds[7] = ""  # one image of patient 2, both of patient 3
    split = take_given_split(make(words, folds), n_folds=3)
    assert split.fold[5] == 2
    assert split.fold[6] == split.fold[7]
    assert split.notes == (
        "3 train images without a given fold joined the others of their patient or study, or were "
        "dealt out.",
    )


def test_a_patient_in_two_folds_is_named_and_a_single_fold_is_none():
    words = deal(("train", 30), ("test", 10))
    folds = [str(row // 2 % 3) for row in range(2 * N_PATIENTS)]
    folds[0] = "1"
    (note,) = take_given_split(make(words, folds), n_folds=3).notes
    assert note.startswith("1 patient is in more than one fold: p00. The scores of the folds")
    split = take_given_split(make(words, ["7"] * 80))
    assert split.n_folds == 5
    assert split.notes == ("A single fold is given, 7, so 5 new ones were made.",)


def test_by_image_concerns_the_folds_of_a_given_split():
    words = deal(("train", 30), ("test", 10))
    split = take_given_split(make(words), by="image")
    np.testing.assert_array_equal(split.is_test, np.array(words) == "test")
    assert split.notes[0] == (
        "As the test split is given, --split-by image acts on the folds alone."
    )


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ConfigError, match=r"given by the image table has 80 test images and "):
        take_given_split(make(["test"] * 80))


def test_blank_columns_are_no_given_split():
    assert not has_given_split(make())
    assert not has_given_split(make([""] * 80, [""] * 80))
    assert has_given_split(make(fold=["1"] * 80))
