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

from cxr_cache.metrics.intervals import MeanError, pool_clusters
from cxr_cache.metrics.scores import Array, FloatArray, mean_ranks


def auroc_influence(targets: Array, scores: Array) -> FloatArray:
    """Influence of every row on each finding's AUROC, ``(N, F)``; a column sums to zero.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, ``(N, F)``.
    scores
        Finite, ``(N, F)``; ties count half.
    """
    influence = np.zeros(targets.shape)
    for f, (target, score) in enumerate(zip(targets.T, scores.T, strict=True)):
        positives, negatives = np.flatnonzero(target == 1), np.flatnonzero(target == 0)
        if not len(positives) or not len(negatives):
            continue
        both = np.concatenate([positives, negatives])
        ranks = mean_ranks(score[both])
        n = len(positives)
        beaten = (ranks[:n] - mean_ranks(score[positives])) / len(negatives)
        beating = 1 - (ranks[n:] - mean_ranks(score[negatives])) / n
        influence[positives, f] = (beaten - beaten.mean()) / n
        influence[negatives, f] = (beating - beating.mean()) / len(negatives)
    return influence


def clustered_error(
    influence: FloatArray, groups: NDArray[np.generic], n_clusters: FloatArray
) -> MeanError:
    """Standard error of a sum of figures whose rows have these influences, groups drawn as a whole.

    Parameters
    ----------
    influence
        Of the terms, ``(N, F)``; for a difference of two figures, the difference of theirs.
    groups
        Study (or patient) of every row, ``(N,)``.
    n_clusters
        Groups that each figure rests on, ``(F,)``: its squares are made those of n - 1. A figure of
        fewer than two shows no variance.
    """
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.zeros((codes.max(initial=-1) + 1, influence.shape[1]))
    np.add.at(sums, codes, influence)
    shown = n_clusters > 1
    sums, n = sums[:, shown], n_clusters[shown]
    sums *= np.sqrt(n / (n - 1))
    variances = np.square(sums).sum(axis=0)
    error = math.sqrt(np.square(sums.sum(axis=1)).sum())
    return MeanError(error if shown.any() else math.nan, pool_clusters(variances, n))
