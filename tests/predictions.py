"""Random targets and scores with everything that real ones have, and scikit-learn beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

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
