"""Standard errors by influence are DeLong's, and what a bootstrap over studies tends to."""

from __future__ import annotations

import numpy as np
import pytest

from cxr_cache.bootstrap import bootstrap
from cxr_cache.influence import clustered_error, macro_auroc_influence
from cxr_cache.metrics import auroc, macro_mean
from cxr_cache.ranked import RankedScores


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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_one_image_per_study_it_is_delongs_standard_error(seed):
    """To the factors n / (n - 1), which DeLong has for each class and a cluster sum has once."""
    targets, scores = draw(seed, n=3000, n_findings=1)

    error = clustered_error(macro_auroc_influence(targets, scores), np.arange(3000))

    assert error**2 == pytest.approx(delong_variance(targets[:, 0], scores[:, 0]), rel=2e-3)


@pytest.mark.parametrize("unlabelled", [0.0, 0.3])
def test_influence_is_the_slope_of_the_macro_auroc_in_a_rows_weight(unlabelled):
    """Found by weighing one row a little more, with the weighted AUROC of the bootstrap."""
    targets, scores = draw(3, unlabelled=unlabelled)
    influence = macro_auroc_influence(targets, scores)
    step = 1e-5
    weights = 1 + step * np.eye(len(targets))

    areas, _ = RankedScores(targets, scores).auroc_and_ap(weights)

    slopes = (macro_mean(areas) - macro_mean(auroc(targets, scores))) / step
    np.testing.assert_allclose(influence, slopes, atol=1e-6)
    assert influence.sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_over_studies_of_several_images_it_is_the_bootstraps_spread(seed):
    """Three images a study, alike: the error is larger than with the images taken apart."""
    targets, scores = (np.repeat(part, 3, axis=0) for part in draw(seed, n=300))
    studies = np.repeat(np.arange(300), 3)
    ranked = RankedScores(targets, scores)

    error = clustered_error(macro_auroc_influence(targets, scores), studies)

    resampled = bootstrap(
        lambda weights: {"macro": macro_mean(ranked.auroc_and_ap(weights)[0])}, studies, 2000, seed
    )["macro"]
    assert error == pytest.approx(resampled.std(), rel=0.08)
    apart = clustered_error(macro_auroc_influence(targets, scores), np.arange(900))
    assert error > 1.5 * apart


def test_findings_of_one_class_have_no_influence():
    targets, scores = draw(0)
    targets[:, 1] = 0
    targets[:, 2] = np.nan

    influence = macro_auroc_influence(targets, scores)

    np.testing.assert_allclose(
        influence, macro_auroc_influence(targets[:, [0, 3]], scores[:, [0, 3]])
    )
    assert (macro_auroc_influence(targets[:, 1:3], scores[:, 1:3]) == 0).all()
