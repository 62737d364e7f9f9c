"""Weighting whole studies equals what scikit-learn does with the same weights."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from cxr_cache.metrics import resampled as bootstrap_module
from cxr_cache.metrics.resampled import RankedScores, RankedWithin, bootstrap
from cxr_cache.metrics.scores import auroc, confusion_counts
from tests.oracles import average_precision, bootstrap_weights
from tests.predictions import SEEDS, F, N, make_predictions, per_finding

STUDIES = np.arange(N) // 2


def test_weights_are_those_of_whole_groups():
    groups = np.array(["b", "a", "b", "c", "a"])

    weights = bootstrap_weights(groups, 4000, seed=0)

    assert weights.shape == (4000, 5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert (weights > 0).all()
    of_groups = weights[:, [0, 1, 3]]
    np.testing.assert_allclose(of_groups.mean(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(of_groups.var(axis=0), 1, atol=0.15)
    correlations = np.corrcoef(of_groups.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(correlations, 0, atol=0.06)


def test_resamples_do_not_depend_on_how_they_are_chunked(monkeypatch):
    together = bootstrap_weights(STUDIES, 40, seed=3)

    np.testing.assert_array_equal(together[4:], bootstrap_weights(STUDIES, 36, seed=3, first=4))
    monkeypatch.setattr(bootstrap_module, "_CHUNK_BYTES", 4 * N * 3)
    shapes = []

    def statistics(weights):
        shapes.append(weights.shape)
        return {"weights": weights}

    chunked = bootstrap(statistics, STUDIES, 40, seed=3)
    assert shapes == [(16, N), (16, N), (8, N)]
    np.testing.assert_array_equal(chunked["weights"], together)
    assert not np.array_equal(together, bootstrap_weights(STUDIES, 40, seed=4))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1, 0], ids=["distinct", "tied", "two values"])
def test_weighted_figures_equal_scikit_learn(seed, decimals):
    """With its own ``sample_weight``, finding by finding, labels missing, ties and all."""
    targets, scores = make_predictions(seed, decimals=decimals)
    weights = bootstrap_weights(STUDIES, 5, seed)

    areas, precisions = RankedScores(targets, scores).auroc_and_ap(weights)

    for r, of_rows in enumerate(weights.astype(np.float64)):
        for f in range(F):
            labelled = ~np.isnan(targets[:, f])
            t, s, w = targets[labelled, f], scores[labelled, f], of_rows[labelled]
            if len(np.unique(t)) < 2:
                assert np.isnan(areas[r, f])
                assert np.isnan(precisions[r, f])
                continue
            assert areas[r, f] == pytest.approx(reference.roc_auc_score(t, s, sample_weight=w))
            assert precisions[r, f] == pytest.approx(
                reference.average_precision_score(t, s, sample_weight=w)
            )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1], ids=["distinct", "tied"])
def test_whole_weights_equal_repeated_rows(seed, decimals):
    """Also where a row counts nothing; against scikit-learn on the rows that are then there."""
    targets, scores = make_predictions(seed, decimals=decimals)
    decisions = scores >= 0.6
    weights = np.random.default_rng(seed).integers(0, 3, (8, N)).astype(np.float32)

    areas, precisions = RankedScores(targets, scores).auroc_and_ap(weights)
    counts = confusion_counts(targets, decisions, weights)

    for r, of_rows in enumerate(weights):
        rows = np.repeat(np.arange(N), of_rows.astype(int))
        t, s = targets[rows], scores[rows]
        np.testing.assert_allclose(areas[r], per_finding(reference.roc_auc_score, t, s), atol=1e-12)
        np.testing.assert_allclose(
            precisions[r], per_finding(reference.average_precision_score, t, s), atol=1e-12
        )
        np.testing.assert_array_equal(counts[r], confusion_counts(t, decisions[rows]))


@pytest.mark.parametrize("decimals", [16, 1, 0], ids=["distinct", "tied", "two values"])
def test_weights_of_one_give_the_plain_figures(decimals):
    targets, scores = make_predictions(0, decimals=decimals)

    areas, precisions = RankedScores(targets, scores).auroc_and_ap(np.ones((1, N)))

    np.testing.assert_allclose(areas[0], auroc(targets, scores), atol=1e-13)
    np.testing.assert_allclose(precisions[0], average_precision(targets, scores), atol=1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_pooled_cells_are_scikit_learns_micro_average(seed):
    targets, scores = make_predictions(seed, decimals=2)
    cells = ~np.isnan(targets)
    weights = bootstrap_weights(STUDIES, 3, seed)

    areas, precisions = RankedScores(targets, scores, pooled=True).auroc_and_ap(weights)

    assert areas.shape == (3, 1)
    for r, of_rows in enumerate(weights.astype(np.float64)):
        w = np.broadcast_to(of_rows[:, None], targets.shape)[cells]
        expected = reference.roc_auc_score(targets[cells], scores[cells], sample_weight=w)
        assert areas[r, 0] == pytest.approx(expected)
        expected = reference.average_precision_score(targets[cells], scores[cells], sample_weight=w)
        assert precisions[r, 0] == pytest.approx(expected)


@pytest.mark.parametrize("n_rows", [0, 1])
def test_too_few_rows_are_undefined(n_rows):
    ranked = RankedScores(np.ones((n_rows, 2)), np.zeros((n_rows, 2)))

    for values in ranked.auroc_and_ap(np.ones((3, n_rows))):
        assert np.isnan(values).all()
        assert values.shape == (3, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_of_a_diverged_model_are_refused(bad):
    targets, scores = make_predictions(0)
    scores[3, 4] = bad

    with pytest.raises(ValueError, match=f"1 of {N * F} scores are NaN or infinite"):
        RankedScores(targets, scores)


def test_a_finding_of_one_study_is_defined_in_every_resample():
    """Drawing studies with replacement loses it in more than a third of them."""
    targets = (STUDIES == 0).astype(float)[:, None]
    scores = np.random.default_rng(0).random((N, 1))

    areas, precisions = RankedScores(targets, scores).auroc_and_ap(
        bootstrap_weights(STUDIES, 500, seed=0)
    )

    assert not np.isnan(areas).any()
    assert not np.isnan(precisions).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_of_several_models_are_compared_within_folds(seed):
    """The mean of each fold's own figures under the weights, whatever else a fold's model adds."""
    targets, scores = make_predictions(seed, decimals=2)
    folds, weights = np.arange(N) // 2 % 4, bootstrap_weights(STUDIES, 3, seed)
    ranked = RankedWithin(targets, scores, folds)
    areas, precisions = ranked.auroc_and_ap(weights)

    for f, r in np.ndindex(F, len(weights)):
        of_folds = []
        for fold in range(4):
            rows = (folds == fold) & ~np.isnan(targets[:, f])
            y, p, w = targets[rows, f], scores[rows, f], weights[r, rows]
            if len(set(y)) == 2:
                area = reference.roc_auc_score(y, p, sample_weight=w)
                precision = reference.average_precision_score(y, p, sample_weight=w)
                of_folds.append((area, precision, w[y == 1].sum(), w[y == 0].sum()))
        if not of_folds:
            assert np.isnan([areas[r, f], precisions[r, f]]).all()
            continue
        area, precision, present, absent = np.array(of_folds).T
        expected = np.average(area, weights=present * absent)
        np.testing.assert_allclose(areas[r, f], expected, rtol=1e-6)
        expected = np.average(precision, weights=present)
        np.testing.assert_allclose(precisions[r, f], expected, rtol=1e-6)

    shifted = RankedWithin(targets, scores + 10.0 * folds[:, None], folds)
    np.testing.assert_allclose(shifted.auroc_and_ap(weights), [areas, precisions], rtol=1e-12)
    one = RankedWithin(targets, scores, np.zeros(N, int)).auroc_and_ap(weights)
    np.testing.assert_allclose(one, RankedScores(targets, scores).auroc_and_ap(weights), rtol=1e-12)


def test_knowing_the_prevalence_alone_ranks_nothing_within_folds():
    """A fold with more positives left fewer to its model, so pooled scores rank backwards."""
    rng = np.random.default_rng(0)
    targets, folds = (rng.random((200, 1)) < 0.1).astype(np.float32), np.arange(200) % 5
    learnt = np.array([targets[folds != fold].mean() for fold in range(5)])
    scores, weights = learnt[folds][:, None], np.ones((1, 200))

    within, precision = RankedWithin(targets, scores, folds).auroc_and_ap(weights)

    np.testing.assert_allclose(within, 0.5)
    n_positive = np.array([targets[folds == fold].sum() for fold in range(5)])
    np.testing.assert_allclose(precision, np.average(n_positive / 40, weights=n_positive))
    assert RankedScores(targets, scores).auroc_and_ap(weights)[0] < 0.45
