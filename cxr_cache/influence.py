"""How much each row moves a macro AUROC: standard errors without resampling.

DeLong et al. (1988) write the variance of an AUROC, and of the difference of two, through one
number per row, how many of the other class it beats; Obuchowski (1997, "Nonparametric analysis of
clustered ROC curve data") sums those numbers over a cluster first. Means over findings are means
of them. It is what a bootstrap over clusters tends to, in the time of a sort.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cxr_cache.metrics import Array, FloatArray, mean_ranks


def macro_auroc_influence(targets: Array, scores: Array) -> FloatArray:
    """Influence of every row on the mean AUROC over findings, ``(N,)``; they sum to zero.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, ``(N, F)``.
    scores
        Finite, ``(N, F)``; ties count half.
    """
    influence = np.zeros(len(targets))
    n_defined = 0
    for target, score in zip(targets.T, scores.T, strict=True):
        positives, negatives = np.flatnonzero(target == 1), np.flatnonzero(target == 0)
        if not len(positives) or not len(negatives):
            continue
        n_defined += 1
        both = np.concatenate([positives, negatives])
        ranks = mean_ranks(score[both])
        n = len(positives)
        beaten = (ranks[:n] - mean_ranks(score[positives])) / len(negatives)
        beating = 1 - (ranks[n:] - mean_ranks(score[negatives])) / n
        influence[positives] += (beaten - beaten.mean()) / n
        influence[negatives] += (beating - beating.mean()) / len(negatives)
    return influence / max(n_defined, 1)


def clustered_error(influence: FloatArray, groups: NDArray[np.generic]) -> float:
    """Standard error of a figure whose rows have this influence, groups drawn as a whole.

    Parameters
    ----------
    influence
        ``(N,)``; for a difference of two figures, the difference of their influences.
    groups
        Study (or patient) of every row, ``(N,)``.
    """
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.bincount(codes, weights=influence)
    n = len(sums)
    return math.sqrt(np.square(sums).sum() * n / (n - 1)) if n > 1 else math.nan
