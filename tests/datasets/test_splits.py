"""Promises of the splits: whole groups, even findings, the same for the same seed."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.model_selection import train_test_split

from cxr_cache.datasets.cohort import Cohort, assign_clusters
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.datasets.splits import (
    Split,
    assign_folds,
    count_shared_studies,
    draw_rows,
    make_split,
    split_test,
    split_test_by_image,
)
from cxr_cache.errors import ConfigError

SEEDS = range(5)


@pytest.fixture(scope="module")
def indiana(shared_data) -> Cohort:
    return load_cohort(shared_data / "indiana_csv")


@st.composite
def labelled_groups(draw, min_groups: int = 6):
    """Targets with NaN, rare and absent findings; groups of very different sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_groups = draw(st.integers(min_groups, 40))
    sizes = rng.geometric(draw(st.sampled_from([0.1, 0.5, 0.9])), n_groups)
    groups = rng.permutation(np.repeat([f"study {g}" for g in range(n_groups)], sizes))
    shape = (len(groups), draw(st.integers(1, 8)))
    targets = (rng.random(shape) < rng.random(shape[1]) ** 3).astype(np.float32)
    targets[rng.random(shape) < draw(st.sampled_from([0, 0.5, 1]))] = np.nan
    return targets, groups


def assert_whole(groups: np.ndarray, part: np.ndarray) -> None:
    for group in np.unique(groups):
        assert len(np.unique(part[groups == group])) == 1, f"{group} is on both sides"


@settings(max_examples=25, deadline=None)
@given(data=labelled_groups(), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_whole_groups_are_drawn_and_a_smaller_draw_is_part_of_a_larger_one(data, share, seed):
    _, groups = data
    fold = assign_folds(data[0], groups, 2, 0)
    rows, n = np.flatnonzero(fold == 0), round(share * (fold == 0).sum())
    draws = [draw_rows(rows, groups, wanted, [seed]) for wanted in range(len(rows) + 1)]

    drawn = draws[n]
    assert len(drawn)
    assert_whole(groups[rows], np.isin(rows, drawn))
    sizes = np.unique([len(one) for one in draws])  # all that this order of groups can give
    assert abs(len(drawn) - n) == np.abs(sizes - n).min()
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(draws))
    np.testing.assert_array_equal(draws[-1], rows)


def test_draws_from_other_rows_share_what_these_have_in_common():
    groups = np.repeat(np.arange(100), 2)
    first, second = (np.flatnonzero(groups % 5 != k) for k in (0, 1))
    ours, theirs = (draw_rows(rows, groups, 80, [7]) for rows in (first, second))
    assert len(np.intersect1d(ours, theirs)) > 50
    assert len(np.intersect1d(ours, draw_rows(first, groups, 80, [8]))) < 60


@settings(max_examples=60, deadline=None)
@given(data=labelled_groups(), n_folds=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_a_group_is_never_on_both_sides_of_a_fold_and_no_fold_is_empty(data, n_folds, seed):
    """Frontal and lateral views share a report, so splitting them would leak the label."""
    targets, groups = data

    folds = assign_folds(targets, groups, n_folds, seed)

    assert set(folds) == set(range(n_folds))
    assert_whole(groups, folds)
    np.testing.assert_array_equal(folds, assign_folds(targets, groups, n_folds, seed))


@settings(max_examples=60, deadline=None)
@given(data=labelled_groups(), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_a_group_is_never_both_in_test_and_in_train(data, share, seed):
    targets, groups = data

    is_test = split_test(targets, groups, share, seed)

    assert is_test.any()
    assert not is_test.all()
    assert_whole(groups, is_test)


@settings(max_examples=30, deadline=None)
@given(data=labelled_groups(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_rows_does_not_matter(data, seed):
    targets, groups = data
    order = np.random.default_rng(seed).permutation(len(groups))

    folds = assign_folds(targets, groups, 3, seed)

    np.testing.assert_array_equal(
        folds[order], assign_folds(targets[order], groups[order], 3, seed)
    )


@settings(max_examples=30, deadline=None)
@given(data=labelled_groups(min_groups=12), seed=st.integers(0, 2**32 - 1))
def test_make_split_gives_each_row_one_place(data, seed):
    targets, groups = data
    findings = [f"finding {f}" for f in range(targets.shape[1])]

    split = make_split(targets, groups, findings, n_folds=3, seed=seed)

    assert split.n_folds == 3
    assert_whole(groups, split.fold)
    for fold in range(3):
        rows = [split.held_out(fold), split.trained_on(fold), np.flatnonzero(split.is_test)]
        assert sorted(np.concatenate(rows)) == list(range(len(split)))


def test_unlabelled_counts_as_absent():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (60, 3)).astype(np.float32)
    unlabelled = np.where(targets == 0, np.nan, targets)
    groups = rng.integers(0, 20, 60)
    np.testing.assert_array_equal(
        assign_folds(targets, groups, 4, 0), assign_folds(unlabelled, groups, 4, 0)
    )


def test_rows_without_any_label_are_spread_evenly():
    targets = np.full((100, 5), np.nan, np.float32)
    folds = assign_folds(targets, np.arange(100), n_folds=5, seed=0)
    assert np.bincount(folds).tolist() == [20] * 5


def test_another_seed_gives_another_test_set(indiana):
    """The rare findings too: they decide the order, but must not always end on the same side."""
    rare = (indiana.targets[:, FINDINGS.index("Mass") :] == 1).any(axis=1)
    tests = [split_test(indiana.targets, indiana.groups, 0.2, seed) for seed in SEEDS]
    in_some_test = np.any(tests, axis=0)
    assert in_some_test[rare].mean() > 0.4  # 0.67 for independent draws, 0.2 for one and the same


RARE = (2, 3, 4, 7, 12, 40)


def make_rare_findings(*, is_odd: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """300 studies of two images, of which the first 2, the next 3, ... have a finding of their own.

    If `is_odd`, the last study of each finding has one image, which no other can make up for.
    """
    ends = np.cumsum(RARE)
    n_images = np.full(300, 2)
    n_images[ends - 1] -= is_odd
    groups = np.repeat(np.arange(300), n_images)
    targets = np.searchsorted(ends, groups, side="right")[:, None] == np.arange(len(RARE))
    return targets.astype(np.float32), groups


def draw_rare_findings(n_seeds: int, *, is_odd: bool = False) -> list[np.ndarray]:
    """Which positive studies of each finding are in test, ``(n_seeds, n)`` each."""
    targets, groups = make_rare_findings(is_odd=is_odd)
    tests = np.stack([split_test(targets, groups, 0.2, seed) for seed in range(n_seeds)])
    first = np.unique(groups, return_index=True)[1]
    return [tests[:, first[of_finding[first] == 1]] for of_finding in targets.T]


@pytest.fixture(scope="module")
def tests_of_80_seeds() -> list[np.ndarray]:
    return draw_rare_findings(80)


def test_every_positive_study_is_in_test_as_often_as_the_others(tests_of_80_seeds):
    for n, chosen in zip(RARE, tests_of_80_seeds, strict=True):
        often = chosen.sum(axis=0)
        bounds = binom.interval(1 - 1e-3 / n, len(chosen), chosen.mean())
        assert bounds[0] <= often.min() <= often.max() <= bounds[1], f"{n} studies: {often}"


def test_balance_does_not_put_the_same_study_into_every_test():
    """A study that alone has an odd number of images was in test with each of 30 seeds."""
    for n, chosen in zip(RARE[3:], draw_rare_findings(30, is_odd=True)[3:], strict=True):
        assert chosen[:, -1].mean() < 0.65, f"{n} studies"


def test_two_seeds_share_as_many_positive_test_studies_as_independent_draws(tests_of_80_seeds):
    for n, chosen in zip(RARE, tests_of_80_seeds, strict=True):
        n_test = chosen.sum(axis=1)
        pairs = np.triu_indices(len(chosen), 1)
        shared = (chosen[:, None] & chosen).sum(axis=2)[pairs].mean()
        independent = np.outer(n_test, n_test)[pairs].mean() / n
        assert shared == pytest.approx(independent, rel=0.15), f"{n} studies"


def test_a_finding_of_two_studies_has_one_in_test_and_one_in_train(tests_of_80_seeds):
    assert (tests_of_80_seeds[0].sum(axis=1) == 1).all()
    for n, chosen in zip(RARE, tests_of_80_seeds, strict=True):
        assert chosen.any(axis=1).all(), f"{n} studies"
        assert not chosen.all(axis=1).any(), f"{n} studies"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_finding_of_two_negative_studies_has_one_on_each_side(seed):
    """Without a negative in test, there is no AUROC either."""
    targets = np.ones((200, 2), np.float32)
    targets[:, 1] = np.nan  # and one without any label is no concern
    targets[[3, 77], 0] = 0
    is_test = split_test(targets, np.arange(200), 0.2, seed)
    assert is_test[[3, 77]].sum() == 1
    assert is_test.sum() == pytest.approx(40, abs=1)


def test_the_single_study_of_a_finding_is_trained_on():
    targets = np.zeros((100, 1), np.float32)
    targets[3] = 1
    assert not any(split_test(targets, np.arange(100), 0.2, seed)[3] for seed in range(20))


def test_many_rare_findings_do_not_make_the_test_split_of_everything():
    """60 findings of two studies each, of 120: half of them at most, where a fifth is due."""
    targets = np.repeat(np.eye(60, dtype=np.float32), 2, axis=0)
    for seed in SEEDS:
        is_test = split_test(targets, np.arange(120), 0.2, seed)
        assert 0.2 <= is_test.mean() <= 0.5
        assert targets[~is_test].any(axis=0).all()


def test_no_study_is_always_in_the_same_fold():
    """Folds are numbered anew for every seed; the rarest studies came first, and went to fold 1."""
    targets, groups = make_rare_findings()
    folds = np.stack([assign_folds(targets, groups, 5, seed) for seed in range(80)])
    positive = (targets == 1).any(axis=1)
    of_fold = np.stack([(folds[:, positive] == k).mean(axis=0) for k in range(5)])
    low, high = binom.interval(1 - 1e-6, 80, 0.2)
    assert of_fold.min() * 80 >= low
    assert of_fold.max() * 80 <= high


@pytest.mark.parametrize("seed", SEEDS)
def test_real_findings_keep_their_prevalence_in_test(indiana, seed):
    """Mean relative error over the 26 findings with 50 images or more; random studies give 16 %."""
    is_test = split_test(indiana.targets, indiana.groups, 0.2, seed)

    totals = indiana.targets.sum(axis=0)
    errors = np.abs(indiana.targets[is_test].sum(axis=0) / (0.2 * totals) - 1)[totals >= 50]
    assert len(errors) == 26
    assert errors.mean() < 0.01  # whole images alone cost 0.006
    assert is_test.mean() == pytest.approx(0.2, abs=0.001)
    assert count_shared_studies(is_test, indiana.study_uids) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_real_findings_keep_their_prevalence_in_every_fold(indiana, seed):
    folds = assign_folds(indiana.targets, indiana.groups, 5, seed)

    totals = indiana.targets.sum(axis=0)
    counts = np.stack([indiana.targets[folds == fold].sum(axis=0) for fold in range(5)])
    errors = np.abs(counts / (totals / 5) - 1)[:, totals >= 50]
    assert errors.mean() < 0.01
    assert np.bincount(folds) / len(folds) == pytest.approx([0.2] * 5, abs=0.001)


def count_moved(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> int:
    """The larger number of groups that left test, or entered it, among those of both splits."""
    (groups, is_test), (now, is_test_now) = before, after
    left = np.intersect1d(groups[is_test], now[~is_test_now])
    entered = np.intersect1d(groups[~is_test], now[is_test_now])
    return max(len(left), len(entered))


def one_more_or_less(targets: np.ndarray, groups: np.ndarray, rng: np.random.Generator):
    """An image more of a study, a new study, an image less; labels are those of some image."""
    row, other = rng.integers(len(groups), size=2)
    more = np.append(targets, targets[other][None], axis=0)
    yield np.append(targets, targets[row][None], axis=0), np.append(groups, groups[row])
    yield more, np.append(groups, "a new study")
    yield np.delete(targets, row, axis=0), np.delete(groups, row)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_image_moves_at_most_2_percent_of_the_real_test_studies(indiana, seed):
    """Measured over 20 seeds and 600 images: 2.0 of 770 on average, 13 at most."""
    targets, groups = indiana.targets, indiana.groups
    is_test = split_test(targets, groups, 0.2, seed)
    n_test = len(np.unique(groups[is_test]))

    for changed in one_more_or_less(targets, groups, np.random.default_rng(seed)):
        after = split_test(*changed, 0.2, seed)
        assert count_moved((groups, is_test), (changed[1], after)) <= 0.02 * n_test


@pytest.mark.parametrize("n_findings", [1, 5, 14])
def test_one_image_moves_at_most_2_percent_of_other_test_groups(n_findings):
    rng = np.random.default_rng(n_findings)
    groups = np.repeat([f"patient {g}" for g in range(2000)], rng.geometric(0.5, 2000))
    targets = rng.random((len(groups), n_findings)) < np.geomspace(0.3, 0.01, n_findings)
    targets = targets.astype(np.float32)
    is_test = split_test(targets, groups, 0.2, 0)
    n_test = len(np.unique(groups[is_test]))
    for changed in one_more_or_less(targets, groups, rng):
        after = split_test(*changed, 0.2, 0)
        assert count_moved((groups, is_test), (changed[1], after)) <= 0.02 * n_test


def test_half_as_many_images_again_leave_most_test_studies_where_they_are(indiana):
    """A place depends on the name and the seed; by chance, a fifth would still be in test."""
    studies = np.unique(indiana.groups)
    first = np.isin(indiana.groups, studies[np.arange(len(studies)) % 3 > 0])
    before = split_test(indiana.targets[first], indiana.groups[first], 0.2, 0)
    after = split_test(indiana.targets, indiana.groups, 0.2, 0)[first]
    tested = np.unique(indiana.groups[first][before])
    still = np.unique(indiana.groups[first][before & after])
    assert len(still) / len(tested) > 0.85


def test_the_first_known_patient_moves_no_other_study():
    """Groups are then called "study ..." and "patient ...", where they had the studies' names."""
    targets = np.full((200, 1), np.nan, np.float32)
    studies = np.array([f"{s}" for s in range(200)])
    before = split_test(targets, assign_clusters(np.full(200, ""), studies), 0.2, 0)
    patients = np.where(studies == "7", "a", "")
    after = split_test(targets, assign_clusters(patients, studies), 0.2, 0)
    assert (before != after).sum() <= 2


def test_by_image_reproduces_the_reference(indiana):
    """1,494 test images; three in four have another image of their study in train."""
    split = make_split(indiana.targets, indiana.groups, indiana.findings, by="image")

    first_label = [FINDINGS[column] for column in indiana.targets.argmax(axis=1)]
    _, expected = train_test_split(
        np.arange(len(indiana)), test_size=0.2, random_state=42, stratify=first_label
    )
    np.testing.assert_array_equal(np.flatnonzero(split.is_test), np.sort(expected))
    assert split.is_test.sum() == 1494
    assert count_shared_studies(split.is_test, indiana.study_uids) == 1133  # 76 %
    assert np.ptp(np.bincount(split.fold[~split.is_test])) <= 2


def test_by_image_deals_with_labels_that_occur_once_or_not_at_all():
    """scikit-learn refuses a class of one, and real cohorts have them."""
    targets = np.zeros((50, 3), np.float32)
    targets[:40, 0] = 1
    targets[40, 1] = 1
    targets[41:44] = np.nan
    assert split_test_by_image(targets, ["a", "b", "c"]).sum() == 10


def test_by_image_says_when_there_are_too_few_images():
    with pytest.raises(ConfigError, match=r"8 images with 4 first labels .* Split by study"):
        split_test_by_image(np.eye(4, dtype=np.float32).repeat(2, axis=0), ["a", "b", "c", "d"])


def test_counting_shared_studies():
    is_test = np.array([True, True, False, False, True])
    study_uids = np.array(["a", "b", "b", "c", "b"])
    assert count_shared_studies(is_test, study_uids) == 2


def test_more_folds_than_groups_is_refused_with_both_numbers():
    targets, studies = np.ones((6, 2), np.float32), np.array(list("aabbcc"))
    with pytest.raises(ConfigError, match=r"5 folds need .* only 3\. Use fewer folds"):
        assign_folds(targets, studies, n_folds=5, seed=0)
    with pytest.raises(ConfigError, match=r"2 parts \(test and train\) need .* only 1"):
        split_test(targets, np.full(6, "a"), 0.2, seed=0)


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5, float("nan")])
def test_a_test_fraction_out_of_range_is_refused(fraction):
    targets = np.ones((6, 2), np.float32)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_test(targets, np.arange(6), fraction, seed=0)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_test_by_image(targets, ["a", "b"], fraction)


def test_a_single_fold_is_refused():
    with pytest.raises(ConfigError, match="at least 2 folds, not 1"):
        assign_folds(np.ones((6, 2), np.float32), np.arange(6), n_folds=1, seed=0)


def test_a_split_cannot_hold_out_test_rows():
    with pytest.raises(AssertionError):
        Split(np.array([True, False]), np.array([0, 1]))


@pytest.mark.slow
def test_a_quarter_of_a_million_studies_take_seconds():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 250_000, 500_000)
    targets = (rng.random((500_000, 14)) < np.geomspace(0.4, 0.002, 14)).astype(np.float32)
    start = time.perf_counter()
    assign_folds(targets, groups, n_folds=5, seed=0)
    assert time.perf_counter() - start < 10


@pytest.mark.slow
def test_a_test_split_of_a_quarter_of_a_million_studies_takes_seconds():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 250_000, 500_000)
    targets = (rng.random((500_000, 14)) < np.geomspace(0.4, 0.002, 14)).astype(np.float32)
    start = time.process_time()
    is_test = split_test(targets, groups, 0.2, seed=0)
    assert time.process_time() - start < 10
    np.testing.assert_allclose(targets[is_test].sum(axis=0) / targets.sum(axis=0), 0.2, rtol=0.01)
