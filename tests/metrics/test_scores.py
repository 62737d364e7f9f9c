"""Every figure equals scikit-learn's, on random and on degenerate rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from cxr_cache.metrics import scores as metrics
from cxr_cache.metrics.scores import (
    auroc,
    average_precision_of_chance,
    confusion_counts,
    f1_of_calling_all,
    rates,
)
from tests.oracles import average_precision
from tests.predictions import SEEDS, F, N, make_predictions, per_finding

# --- ranking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1, 0], ids=["distinct", "tied", "two values"])
def test_auroc_and_ap_equal_scikit_learn(seed, decimals):
    targets, scores = make_predictions(seed, decimals=decimals)

    np.testing.assert_allclose(
        auroc(targets, scores), per_finding(reference.roc_auc_score, targets, scores), atol=1e-12
    )
    np.testing.assert_allclose(
        average_precision(targets, scores),
        per_finding(reference.average_precision_score, targets, scores),
        atol=1e-12,
    )


def test_many_rows_are_ranked_a_few_findings_at_a_time(monkeypatch):
    targets, scores = make_predictions(0, decimals=1)
    expected = auroc(targets, scores)

    monkeypatch.setattr(metrics, "_RANKED_AT_ONCE", 2 * N + 1)

    np.testing.assert_array_equal(auroc(targets, scores), expected)


def test_without_both_classes_ranking_is_undefined_and_not_zero():
    """scikit-learn says AP = 0 for a finding without positives, which would sink a macro mean."""
    targets, scores = make_predictions(0)

    for values in (auroc(targets, scores), average_precision(targets, scores)):
        assert np.isnan(values[:3]).all()
        assert not np.isnan(values[3:]).any()
        assert metrics.macro_mean(values) == pytest.approx(values[3:].mean())


def test_one_row_is_undefined():
    assert np.isnan(auroc(np.ones((1, 2)), np.zeros((1, 2)))).all()
    assert np.isnan(average_precision(np.zeros((1, 2)), np.zeros((1, 2)))).all()


def test_no_row_is_undefined():
    assert np.isnan(auroc(np.ones((0, 2)), np.zeros((0, 2)))).all()


@pytest.mark.parametrize("statistic", [auroc, average_precision])
def test_leading_axes_are_scored_one_by_one(statistic):
    targets, _ = make_predictions(0)
    scores = np.random.default_rng(1).random((2, 3, N, F))

    values = statistic(targets, scores)

    assert values.shape == (2, 3, F)
    np.testing.assert_array_equal(values[1, 2], statistic(targets, scores[1, 2]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_of_a_diverged_model_are_refused(bad):
    targets, scores = make_predictions(0)
    scores[3, 4] = bad

    for statistic in (auroc, average_precision):
        with pytest.raises(ValueError, match=f"1 of {N * F} scores are NaN or infinite"):
            statistic(targets, scores)


def test_macro_mean_of_nothing_defined_is_undefined():
    assert np.isnan(metrics.macro_mean(np.full(3, np.nan)))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_by_support_is_scikit_learns_weighted_average(seed):
    targets, scores = make_predictions(seed)
    targets, scores = np.nan_to_num(targets[:, 3:]), scores[:, 3:]

    mean = metrics.support_mean(auroc(targets, scores), targets.sum(axis=0))

    assert mean == pytest.approx(reference.roc_auc_score(targets, scores, average="weighted"))


def test_the_mean_by_support_leaves_undefined_findings_out():
    values, n_positive = np.array([0.5, np.nan, 0.8]), np.array([1, 5, 2])

    assert metrics.support_mean(values, n_positive) == pytest.approx(0.7)
    assert np.isnan(metrics.support_mean(values, np.zeros(3)))


# --- decisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_and_rates_equal_scikit_learn(seed):
    targets, scores = make_predictions(seed)
    decisions = scores >= 0.5

    counts = confusion_counts(targets, decisions)
    derived = rates(counts)

    for f in range(3, F):
        labelled = ~np.isnan(targets[:, f])
        t, d = targets[labelled, f].astype(int), decisions[labelled, f].astype(int)
        (tn, fp), (fn, tp) = reference.confusion_matrix(t, d, labels=[0, 1])
        assert counts[f].tolist() == [tp, fp, fn, tn]
        assert derived.f1[f] == pytest.approx(reference.f1_score(t, d))
        assert derived.sensitivity[f] == pytest.approx(reference.recall_score(t, d))
        assert derived.specificity[f] == pytest.approx(reference.recall_score(1 - t, 1 - d))
        assert derived.ppv[f] == pytest.approx(reference.precision_score(t, d))
        assert derived.npv[f] == pytest.approx(reference.precision_score(1 - t, 1 - d))
        assert derived.balanced_accuracy[f] == pytest.approx(
            reference.balanced_accuracy_score(t, d)
        )
    labelled = ~np.isnan(targets)
    micro = rates(counts.sum(axis=0))
    assert micro.f1 == pytest.approx(reference.f1_score(targets[labelled], decisions[labelled]))
    assert micro.npv == pytest.approx(
        reference.precision_score(1 - targets[labelled], ~decisions[labelled])
    )
    assert metrics.label_accuracy(counts) == pytest.approx(
        reference.accuracy_score(targets[labelled], decisions[labelled])
    )
    assert metrics.label_accuracy_all_negative(counts) == pytest.approx(
        reference.accuracy_score(targets[labelled], np.zeros(labelled.sum()))
    )


def test_a_rate_over_nothing_is_undefined():
    targets = np.array([[0.0, 1.0], [0.0, 1.0]])
    derived = rates(confusion_counts(targets, np.array([[True, False], [True, False]])))

    assert np.isnan(derived.f1[0])  # nothing to find, however much is called
    assert derived.f1[1] == 0
    assert np.isnan(derived.sensitivity[0])
    assert np.isnan(derived.specificity[1])
    assert np.isnan(derived.ppv[1])
    assert np.isnan(derived.npv[0])
    assert np.isnan(derived.balanced_accuracy).all()


def test_exact_match_looks_at_labelled_findings_only():
    targets = np.array([[1, 0], [1, np.nan], [0, 1], [np.nan, np.nan]])
    decisions = np.array([[True, False], [True, True], [True, True], [True, True]])

    np.testing.assert_array_equal(
        metrics.exact_matches(targets, decisions), [1.0, 1.0, 0.0, np.nan]
    )


# --- what knowing nothing gets -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_positive", "n_labelled"), [(1, 1), (1, 40), (3, 40), (20, 40), (39, 40)]
)
def test_the_ap_of_chance_is_the_mean_over_random_orders(n_positive, n_labelled):
    rng = np.random.default_rng(n_positive)
    orders = rng.permuted(np.tile(np.arange(n_labelled) < n_positive, (20_000, 1)), axis=1)
    precision = orders.cumsum(axis=1) / np.arange(1, n_labelled + 1)
    areas = (precision * orders).sum(axis=1) / n_positive  # from the definition, no ties

    expected = average_precision_of_chance(n_positive, n_labelled)

    assert expected == pytest.approx(areas.mean(), rel=0.02)
    assert expected >= n_positive / n_labelled
    assert np.isnan(average_precision_of_chance(0, n_labelled))


def test_calling_everything_present_has_scikit_learns_f1():
    targets, _ = make_predictions(0)
    for target in targets.T[~np.isnan(targets).all(axis=0)]:
        known = target[~np.isnan(target)]
        ours = f1_of_calling_all((known == 1).sum(), len(known))
        expected = reference.f1_score(known, np.ones_like(known), zero_division=np.nan)
        np.testing.assert_allclose(ours, expected)


@pytest.mark.parametrize("kind", ["text", "objects", "numbers", "swapped", "nothing"])
def test_names_are_numbered_as_sorting_would(kind):
    names = np.random.default_rng(0).integers(0, 50, 400)
    if kind == "swapped":  # the bytes of another processor
        names = names.astype(">i4")
    elif kind != "numbers":
        names = np.array(
            [f"study {n}" for n in names.tolist()], object if kind == "objects" else str
        )
    names = names[:0] if kind == "nothing" else names
    distinct, codes = metrics.number_names(names)
    expected, expected_codes = np.unique(names, return_inverse=True)
    assert (distinct.dtype, distinct.tolist()) == (names.dtype, expected.tolist())
    assert (codes.dtype, codes.tolist()) == (np.intp, expected_codes.tolist())
