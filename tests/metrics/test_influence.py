"""Standard errors by influence are DeLong's, and what a bootstrap over studies tends to."""

from __future__ import annotations

import numpy as np
import pytest

from cxr_cache.metrics.intervals import (
    MeanError,
    auroc_influence,
    clustered_error,
    count_rarer_class,
)
from cxr_cache.metrics.resampled import RankedScores, bootstrap
from cxr_cache.metrics.scores import auroc, macro_mean


def draw(seed: int, n: int = 120, n_findings: int = 4, unlabelled: float = 0.0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, n_findings)) < 0.3).astype(np.float64)
    scores = np.round(rng.standard_normal((n, n_findings)) + targets, 1)  # with ties
    targets[rng.random(targets.shape) < unlabelled] = np.nan
    return targets, scores


def delong_variance(target: np.ndarray, score: np.ndarray) -> float:
    """DeLong et al. 1988, eq. 3 to 5, pair by pair."""
    positives, negatives = score[target == 1], score[target == 0]
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    of_positives, of_negatives = wins.mean(axis=1), wins.mean(axis=0)
    return of_positives.var(ddof=1) / len(positives) + of_negatives.var(ddof=1) / len(negatives)


def macro_spread(targets: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> MeanError:
    influence = auroc_influence(targets, scores) / targets.shape[1]
    return clustered_error(influence, groups, count_rarer_class(targets, groups))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("n", "tolerance"), [(3000, 1e-3), (20, 0.15)])
def test_with_one_image_per_study_it_is_delongs_standard_error(seed, n, tolerance):
    """To the factors n / (n - 1), which DeLong has for each class; here both have the larger."""
    targets, scores = draw(seed, n=n, n_findings=1)

    spread = macro_spread(targets, scores, np.arange(n))

    variance = delong_variance(targets[:, 0], scores[:, 0])
    assert variance <= spread.error**2 == pytest.approx(variance, rel=tolerance)
    assert spread.n_clusters == pytest.approx((targets == 1).sum())


@pytest.mark.parametrize("unlabelled", [0.0, 0.3])
def test_influence_is_the_slope_of_the_auroc_in_a_rows_weight(unlabelled):
    """Found by weighing one row a little more, with the weighted AUROC of the bootstrap."""
    targets, scores = draw(3, unlabelled=unlabelled)
    influence = auroc_influence(targets, scores)
    step = 1e-5
    weights = 1 + step * np.eye(len(targets))

    areas, _ = RankedScores(targets, scores).auroc_and_ap(weights)

    slopes = (areas - auroc(targets, scores)) / step
    np.testing.assert_allclose(influence, slopes, atol=1e-6)
    np.testing.assert_allclose(influence.sum(axis=0), 0, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_over_studies_of_several_images_it_is_the_bootstraps_spread(seed):
    """Three images a study, alike: the error is larger than with the images taken apart."""
    targets, scores = (np.repeat(part, 3, axis=0) for part in draw(seed, n=300))
    studies = np.repeat(np.arange(300), 3)
    ranked = RankedScores(targets, scores)

    error = macro_spread(targets, scores, studies).error

    resampled = bootstrap(
        lambda weights: {"macro": macro_mean(ranked.auroc_and_ap(weights)[0])}, studies, 2000, seed
    )["macro"]
    assert error == pytest.approx(resampled.std(), rel=0.08)
    assert error > 1.5 * macro_spread(targets, scores, np.arange(900)).error


def test_findings_of_one_class_have_no_influence():
    targets, scores = draw(0)
    targets[:, 1] = 0
    targets[:, 2] = np.nan

    influence = auroc_influence(targets, scores)

    assert (influence[:, 1:3] == 0).all()
    np.testing.assert_array_equal(
        influence[:, [0, 3]], auroc_influence(targets[:, [0, 3]], scores[:, [0, 3]])
    )
    groups = np.arange(len(targets))
    assert np.isnan(macro_spread(targets[:, 1:3], scores[:, 1:3], groups).error)
