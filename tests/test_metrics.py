"""Every figure equals scikit-learn's, and the bootstrap equals resampling by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as reference

from cxr_cache import metrics
from cxr_cache.metrics import (
    NEVER,
    RankedScores,
    auroc,
    average_precision,
    bootstrap,
    bootstrap_weights,
    choose_thresholds,
    confusion_counts,
    percentile_interval,
    rates,
)

SEEDS = [0, 1, 2]
N, F = 60, 7


def make_predictions(
    seed: int, n_rows: int = N, decimals: int = 16
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Targets with signal in the scores; few decimals make ties, and some cells are unlabelled.

    The first finding is never present, the second always, the third has no label at all.
    """
    rng = np.random.default_rng(seed)
    targets = (rng.random((n_rows, F)) < 0.3).astype(np.float32)
    scores = np.clip((rng.random((n_rows, F)) + 0.3 * targets) / 1.3, 0, 1).round(decimals)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    targets[:, 0] = 0
    targets[:, 1] = 1
    targets[:, 2] = np.nan
    return targets, scores


def per_finding(
    score: Callable[..., float], targets: NDArray[np.float32], scores: NDArray[np.floating]
) -> NDArray[np.float64]:
    """A scikit-learn score, one finding at a time, where both classes are there."""
    values = []
    for t, s in zip(targets.T, scores.T, strict=True):
        labelled = ~np.isnan(t)
        both = len(np.unique(t[labelled])) == 2
        values.append(score(t[labelled], s[labelled]) if both else np.nan)
    return np.array(values)


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

    for statistic in (auroc, average_precision, choose_thresholds, RankedScores):
        with pytest.raises(ValueError, match=f"1 of {N * F} scores are NaN or infinite"):
            statistic(targets, scores)


def test_macro_mean_of_nothing_defined_is_undefined():
    assert np.isnan(metrics.macro_mean(np.full(3, np.nan)))


# --- decisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1], ids=["distinct", "tied"])
def test_thresholds_reach_the_best_f1_of_any_cut(seed, decimals):
    targets, scores = make_predictions(seed, decimals=decimals)

    thresholds = choose_thresholds(targets, scores)

    f1 = rates(confusion_counts(targets, scores >= thresholds)).f1
    for f in (1, 3, 4, 5, 6):
        labelled = ~np.isnan(targets[:, f])
        t, s = targets[labelled, f], scores[labelled, f]
        best = max(2 * t[s >= cut].sum() / (t.sum() + (s >= cut).sum()) for cut in np.unique(s))
        assert f1[f] == pytest.approx(best, abs=1e-12), f"finding {f}"


def test_threshold_lies_between_two_probabilities():
    """Tables round probabilities; a threshold that is one of them would let rounding decide."""
    targets = np.array([[1.0], [0.0]])

    assert choose_thresholds(targets, np.array([[0.8], [0.4]])) == pytest.approx([0.6])
    adjacent = np.array([[np.nextafter(0.5, 1)], [0.5]])
    assert (adjacent >= choose_thresholds(targets, adjacent)).tolist() == [[True], [False]]


def test_finding_without_positives_is_never_called():
    targets, scores = make_predictions(0)

    thresholds = choose_thresholds(targets, scores)

    assert thresholds[0] == thresholds[2] == NEVER
    assert json.loads(json.dumps(thresholds.tolist())) == thresholds.tolist()
    assert not (np.ones(F)[[0, 2]] >= thresholds[[0, 2]]).any()


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
    assert metrics.micro_f1(counts) == pytest.approx(
        reference.f1_score(targets[labelled], decisions[labelled])
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


# --- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_brier_and_log_loss_equal_scikit_learn(seed):
    targets, scores = make_predictions(seed)
    scores[0] = 0.0
    scores[1] = 1.0  # certain, and wrong somewhere

    brier = metrics.weighted_mean(metrics.squared_errors(targets, scores))
    log_loss = metrics.weighted_mean(metrics.log_losses(targets, scores))

    defined = slice(3, F)
    np.testing.assert_allclose(
        brier[defined], per_finding(reference.brier_score_loss, targets, scores)[defined]
    )
    np.testing.assert_allclose(
        log_loss[defined], per_finding(reference.log_loss, targets, scores)[defined]
    )
    assert np.isnan(brier[2])
    assert np.isnan(log_loss[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_error_is_the_mean_gap_over_bins(seed):
    targets, scores = make_predictions(seed, n_rows=300, decimals=2)  # edges of bins included

    errors = metrics.expected_calibration_error(targets, scores)

    for f in range(3, F):
        labelled = ~np.isnan(targets[:, f])
        t, p = targets[labelled, f], scores[labelled, f]
        bins = np.ceil(p * 10 - 1e-9).clip(1, 10)  # (0, 0.1], (0.1, 0.2], ...
        gaps = [
            (bins == b).mean() * abs(p[bins == b].mean() - t[bins == b].mean())
            for b in np.unique(bins)
        ]
        assert errors[f] == pytest.approx(sum(gaps))
    assert np.isnan(errors[2])


# --- bootstrap -----------------------------------------------------------------------------------


def test_groups_are_drawn_whole_and_as_often_as_there_are():
    groups = np.array(["b", "a", "b", "c", "a"])

    weights = bootstrap_weights(groups, 200, seed=0)

    assert weights.shape == (200, 5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights.mean() == pytest.approx(1, abs=0.1)


def test_resamples_do_not_depend_on_how_they_are_chunked(monkeypatch):
    groups = np.arange(N) // 2
    together = bootstrap_weights(groups, 10, seed=3)

    np.testing.assert_array_equal(together[4:], bootstrap_weights(groups, 6, seed=3, first=4))
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", 4 * N * 3)
    chunked = bootstrap(lambda weights: {"weights": weights}, groups, 10, seed=3)
    np.testing.assert_array_equal(chunked["weights"], together)
    assert not np.array_equal(together, bootstrap_weights(groups, 10, seed=4))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1], ids=["distinct", "tied"])
def test_weighting_rows_equals_repeating_them(seed, decimals):
    """The vectorised bootstrap against scikit-learn on the rows that were really drawn."""
    targets, scores = make_predictions(seed, decimals=decimals)
    decisions = scores >= 0.6
    weights = bootstrap_weights(np.arange(N) // 2, 8, seed)

    areas, precisions = RankedScores(targets, scores).auroc_and_ap(weights)
    counts = confusion_counts(targets, decisions, weights)
    brier = metrics.weighted_mean(metrics.squared_errors(targets, scores), weights)
    exact = metrics.weighted_mean(metrics.exact_matches(targets, decisions), weights)

    for r, row_weights in enumerate(weights):
        rows = np.repeat(np.arange(N), row_weights.astype(int))
        t, s = targets[rows], scores[rows]
        np.testing.assert_allclose(areas[r], per_finding(reference.roc_auc_score, t, s), atol=1e-12)
        np.testing.assert_allclose(
            precisions[r], per_finding(reference.average_precision_score, t, s), atol=1e-12
        )
        np.testing.assert_array_equal(counts[r], confusion_counts(t, decisions[rows]))
        np.testing.assert_allclose(brier[r], metrics.weighted_mean(metrics.squared_errors(t, s)))
        assert exact[r] == pytest.approx(
            metrics.weighted_mean(metrics.exact_matches(t, decisions[rows]))
        )


def test_a_finding_of_one_study_is_undefined_where_that_study_is_not_drawn():
    groups = np.arange(20) // 2
    targets = (groups == 0).astype(float)[:, None]
    weights = bootstrap_weights(groups, 500, seed=0)

    areas, _ = RankedScores(targets, np.random.default_rng(0).random((20, 1))).auroc_and_ap(weights)
    interval = percentile_interval(areas)

    assert interval.n_undefined[0] == (weights[:, 0] == 0).sum() > 100
    assert 0 <= interval.low[0] <= interval.high[0] <= 1


def test_interval_is_the_percentiles_of_what_is_defined():
    resampled = np.stack([np.arange(101.0), np.full(101, np.nan)], axis=1)
    resampled[0, 0] = np.nan

    interval = percentile_interval(resampled, level=0.9)

    np.testing.assert_allclose(interval.low, [np.percentile(np.arange(1, 101), 5), np.nan])
    np.testing.assert_allclose(interval.high, [np.percentile(np.arange(1, 101), 95), np.nan])
    assert interval.n_undefined.tolist() == [1, 101]


def simulate_studies(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """100 studies of three images that share their label and most of their score."""
    rng = np.random.default_rng([seed, 1])
    present = np.repeat(rng.random(100) < 0.4, 3)
    shared = np.repeat(rng.standard_normal(100), 3)
    scores = present + np.sqrt(0.9) * shared + np.sqrt(0.1) * rng.standard_normal(300)
    return present[:, None].astype(float), scores[:, None]


def test_intervals_over_studies_cover_and_those_over_images_are_too_narrow():
    """Three images of one study are not three pieces of evidence."""
    true_auroc = 0.76025  # of two normals of unit variance, one apart: Phi(1 / sqrt(2))
    n_simulations = 60
    groupings = {"studies": np.arange(300) // 3, "images": np.arange(300)}
    n_covered = dict.fromkeys(groupings, 0)
    for seed in range(n_simulations):
        ranked = RankedScores(*simulate_studies(seed))
        for name, groups in groupings.items():
            weights = bootstrap_weights(groups, 150, seed)
            low, high, _ = percentile_interval(ranked.auroc_and_ap(weights)[0])
            n_covered[name] += bool(low[0] <= true_auroc <= high[0])

    assert 0.88 <= n_covered["studies"] / n_simulations <= 0.99, n_covered
    assert n_covered["images"] / n_simulations < 0.85, n_covered


@pytest.mark.slow
def test_bootstrap_beats_a_loop_over_scikit_learn_twenty_times():
    """2,000 resamples x 35 findings x 1,500 images, in seconds on two cores."""
    rng = np.random.default_rng(0)
    targets = (rng.random((1500, 35)) < np.geomspace(0.42, 0.005, 35)).astype(np.float32)
    scores = rng.random(targets.shape)
    groups = np.arange(1500) // 2

    started = time.perf_counter()
    ranked = RankedScores(targets, scores)
    bootstrap(
        lambda weights: {"auroc": ranked.auroc_and_ap(weights)[0]}, groups, n_resamples=2000, seed=0
    )
    elapsed_s = time.perf_counter() - started

    started = time.perf_counter()
    for row_weights in bootstrap_weights(groups, 5, seed=0):
        rows = np.repeat(np.arange(1500), row_weights.astype(int))
        per_finding(reference.roc_auc_score, targets[rows], scores[rows])
        per_finding(reference.average_precision_score, targets[rows], scores[rows])
    loop_s = (time.perf_counter() - started) * 2000 / 5

    assert elapsed_s < 10
    assert loop_s > 20 * elapsed_s
