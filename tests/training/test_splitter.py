"""Folds for scikit-learn: whole groups, every finding spread evenly, the package's own rule."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import GroupKFold, cross_validate

from cxr_cache import GroupedMultilabelSplit
from cxr_cache.datasets.splits import assign_folds
from cxr_cache.errors import ConfigError


def make_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets, a tenth unlabelled, of 600 images of 250 patients, common and rare findings."""
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 250, 600)
    prevalence = np.array([0.4, 0.2, 0.1, 0.05])
    sick = rng.random((250, 4)) < prevalence  # a patient's images resemble each other
    targets = (sick[patients] & (rng.random((600, 4)) < 0.8)).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    return targets, np.array([f"patient {p}" for p in patients])


def spread(targets: np.ndarray, folds: list[np.ndarray]) -> float:
    """How far the folds' shares of the positives are from equal, relative, mean over findings."""
    counts = np.array([(targets[fold] == 1).sum(axis=0) for fold in folds])
    return float((counts.std(axis=0) / counts.mean(axis=0)).mean())


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides_and_every_row_is_tested_once(seed):
    targets, patients = make_rows(seed)

    pairs = list(GroupedMultilabelSplit(5, random_state=seed).split(targets, targets, patients))

    assert len(pairs) == 5
    for train, test in pairs:
        assert not set(patients[train]) & set(patients[test])
        np.testing.assert_array_equal(np.sort(np.r_[train, test]), np.arange(600))
    np.testing.assert_array_equal(np.sort(np.concatenate([t for _, t in pairs])), np.arange(600))


def test_findings_are_spread_more_evenly_than_by_random_groups():
    ours, random = [], []
    for seed in range(5):
        targets, patients = make_rows(seed)
        splitters = GroupedMultilabelSplit(5, seed), GroupKFold(5, shuffle=True, random_state=seed)
        for splitter, found in zip(splitters, (ours, random), strict=True):
            folds = [test for _, test in splitter.split(targets, targets, patients)]
            found.append(spread(targets, folds))
    assert np.mean(ours) < 0.2 * np.mean(random), (ours, random)


def test_the_folds_are_those_that_train_uses():
    targets, patients = make_rows(0)
    pairs = GroupedMultilabelSplit(4, random_state=42).split(targets, targets, patients)
    expected = assign_folds(targets, patients, 4, seed=42)
    for k, (_, test) in enumerate(pairs):
        np.testing.assert_array_equal(test, np.flatnonzero(expected == k))


def test_class_labels_are_spread_like_findings():
    _, patients = make_rows(0)
    classes = np.random.default_rng(0).choice(["a", "b", "c"], 600, p=[0.7, 0.25, 0.05])
    for _, test in GroupedMultilabelSplit(3, random_state=0).split(classes, classes, patients):
        shares = [(classes[test] == name).mean() for name in "abc"]
        np.testing.assert_allclose(shares, [(classes == name).mean() for name in "abc"], atol=0.01)


def test_a_seed_repeats_itself_and_none_does_not():
    targets, patients = make_rows(0)

    def first(random_state) -> list[int]:
        pairs = GroupedMultilabelSplit(5, random_state).split(targets, targets, patients)
        return next(iter(pairs))[1].tolist()

    assert first(3) == first(3) != first(4)
    np.random.seed(0)  # noqa: NPY002
    assert first(None) != first(None)
    assert first(np.random.RandomState(1)) == first(np.random.RandomState(1))


@pytest.mark.parametrize("routing", [False, True])
def test_groups_reach_it_through_cross_validation(routing):
    """Also where metadata is routed, without asking for them."""
    targets, patients = make_rows(0)
    targets = np.nan_to_num(targets)
    splitter = GroupedMultilabelSplit(3, random_state=0)
    assert splitter.get_n_splits() == 3
    given = {"params": {"groups": patients}} if routing else {"groups": patients}
    with sklearn.config_context(enable_metadata_routing=routing):
        scores = cross_validate(
            DummyClassifier(), targets, targets, cv=splitter, return_indices=True, **given
        )
    for train, test in zip(*scores["indices"].values(), strict=True):
        assert not set(patients[train]) & set(patients[test])


def test_what_is_missing_is_named():
    targets, patients = make_rows(0)
    with pytest.raises(ConfigError, match=r"needs groups: the patient .* np.arange\(len\(X\)\)"):
        next(GroupedMultilabelSplit().split(targets, targets))
    with pytest.raises(ConfigError, match="needs y: what it spreads"):
        next(GroupedMultilabelSplit().split(targets, groups=patients))
    with pytest.raises(ConfigError, match=r"not a y of shape \(600,\) that looks continuous"):
        next(GroupedMultilabelSplit().split(targets, np.linspace(0, 1, 600), patients))
    with pytest.raises(ConfigError, match="at least 2 folds, not 1"):
        next(GroupedMultilabelSplit(1).split(targets, targets, patients))
    with pytest.raises(ConfigError, match="5 folds need as many groups"):
        next(GroupedMultilabelSplit(5).split(targets, targets, np.arange(600) % 3))


def test_missing_values_of_frames_are_unlabelled():
    targets, groups = make_rows(0)
    frame = pd.DataFrame(targets).astype("Int64")
    frame.iloc[3, 0] = pd.NA
    as_array = targets.astype(np.float64)
    as_array[3, 0] = np.nan
    split = GroupedMultilabelSplit(n_splits=3, random_state=0)
    for ours, theirs in zip(
        split.split(frame, frame, groups), split.split(as_array, as_array, groups), strict=True
    ):
        np.testing.assert_array_equal(ours[1], theirs[1])
