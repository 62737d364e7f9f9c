"""Figures and their bootstrap resamples -> interval bounds that hold for rare findings too.

A percentile interval of a finding with few positives is too narrow, and of an average of such
findings it lies beside its own estimate: resampling three positive studies shows two thirds of
their variance, and the AP of a resample is biased. So the bootstrap is asked for one thing only,
the standard error, and the interval is that of Student's t on a scale without bounds:

    g(estimate) +- t(n - 1) * g'(estimate) * sd(resamples) * sqrt((n + 1) / (n - 1)),

where g is the logit for shares and n the number of clusters (patients where known, else studies)
that the figure rests on: those with a positive, say. The root makes the error of a mean of n values
the textbook's: with their mean square deviation d, a mean under exponential weights that are made
to sum to one has the variance d / (n + 1) (Rubin 1981), and is to have d / (n - 1). The interval
contains the estimate, stays inside [0, 1] and, with n of three, is as wide as three studies
deserve. A mean over findings has the degrees of freedom of Satterthwaite (1946).
``scripts/interval_coverage.py`` measures how often they cover.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from cxr_cache.metrics.scores import Array, FloatArray, macro_mean, mean_ranks

LEVEL: Final = 0.95
"""How often an interval is meant to cover."""

Scale: TypeAlias = Literal["logit", "log", "identity"]
"""Where a figure's error is taken as symmetric: shares, positive numbers, differences."""


class Interval(NamedTuple):
    """Bounds, NaN where there is none: the figure is undefined, or rests on a single cluster."""

    low: FloatArray
    high: FloatArray


Bounded: TypeAlias = tuple[Array, Interval]
"""Figures and their intervals."""


def standard_errors(resampled: FloatArray, n_clusters: Array | int) -> FloatArray:
    """Standard deviation over resamples, corrected for the number of clusters behind a figure.

    Parameters
    ----------
    resampled
        Shape ``(R, ...)``, NaN where a resample leaves a figure undefined.
    n_clusters
        Clusters that each figure rests on, shape ``(...)``.

    Returns
    -------
    FloatArray
        Shape ``(...)``; NaN with fewer than two clusters.
    """
    errors: FloatArray = _deviations(resampled, n_clusters).std(axis=0)
    return errors


def student_interval(
    estimates: Array,
    errors: Array | float,
    n_clusters: Array | float,
    scale: Scale,
    level: float = LEVEL,
) -> Interval:
    """Student's t interval on a scale without bounds.

    A share of exactly 0 or 1 shows no variance; it gets the bound of Clopper and Pearson (1934)
    for as many clusters, which also holds for the mean of anything inside [0, 1].

    Parameters
    ----------
    estimates, errors, n_clusters
        Figures, their standard errors and the clusters that they rest on, shape ``(...)``.
    scale
        Of the figures.
    level
        How often to cover, in (0, 1).
    """
    estimates, errors, n_clusters = np.broadcast_arrays(
        *(np.asarray(values, np.float64) for values in (estimates, errors, n_clusters))
    )
    tail = (1 - level) / 2
    quantile = stdtrit(np.where(n_clusters > 1, n_clusters - 1, np.nan), 1 - tail)
    low, high = _on_scale(estimates, quantile * errors, scale)
    if scale == "logit":
        with np.errstate(divide="ignore"):
            furthest = tail ** (1 / np.maximum(n_clusters, 0))  # all of n, by chance
        is_none, is_all = estimates == 0, estimates == 1
        low = np.where(is_none, 0.0, np.where(is_all, furthest, low))
        high = np.where(is_none, 1 - furthest, np.where(is_all, 1.0, high))
    return Interval(low, high)


def macro_interval(
    estimates: Array, resampled: FloatArray, n_clusters: Array, scale: Scale, level: float = LEVEL
) -> Interval:
    """Interval of a mean over findings, which share their clusters.

    Parameters
    ----------
    estimates
        One per finding, NaN where undefined, shape ``(F,)``.
    resampled
        The same on resampled clusters, shape ``(R, F)``.
    n_clusters
        Clusters that each finding's figure rests on, shape ``(F,)``.
    scale, level
        As in :func:`student_interval`.
    """
    mean, spread = macro_mean(estimates), macro_error(resampled, n_clusters)
    if scale == "logit" and mean in (0, 1):  # as many clusters as the best known finding has
        return student_interval(mean, spread.error, np.max(n_clusters), scale, level)
    # Without any variance, though the mean is none of the bounds, nothing is known of its error.
    error = spread.error or math.nan
    return student_interval(mean, error, spread.n_clusters, scale, level)


class MeanError(NamedTuple):
    """Standard error of a mean over findings, and how many clusters it is known as well as."""

    error: float
    n_clusters: float
    """Satterthwaite's degrees of freedom, and one."""


def macro_error(resampled: FloatArray, n_clusters: Array) -> MeanError:
    """Standard error of a mean over findings, shapes ``(R, F)`` and ``(F,)``.

    The resamples are joint, so the findings' covariance is in the variance of their mean. A finding
    that rests on one cluster shows no variance at all; it is given that of one of the others,
    as strata with a single unit are collapsed in survey sampling.
    """
    defined = ~np.isnan(resampled).all(axis=0)
    n = np.asarray(n_clusters, np.float64)[defined]
    measured = n > 1
    if not measured.any():
        return MeanError(math.nan, math.nan)
    deviations = _deviations(resampled[:, defined], n)
    variances = deviations.var(axis=0)[measured]
    variance = np.nan_to_num(deviations).mean(axis=1).var()
    of_one_cluster = (variances * n[measured]).mean()
    variance += of_one_cluster * (~measured).sum() / len(n) ** 2
    return MeanError(math.sqrt(variance), pool_clusters(variances, n[measured]))


def pool_clusters(variances: Array, n_clusters: Array) -> float:
    """How many clusters the variance of a sum is known as well as, by Satterthwaite's formula.

    Satterthwaite, "An approximate distribution of estimates of variance components", 1946, plus
    one, since a variance from n clusters has n - 1 degrees of freedom. Infinite without variance.

    Parameters
    ----------
    variances
        Of the terms, ``(F,)``; their covariances are left out.
    n_clusters
        That each comes from, more than one, ``(F,)``.
    """
    scatter = float((np.square(variances) / (np.asarray(n_clusters) - 1)).sum())
    return float(np.square(np.sum(variances))) / scatter + 1 if scatter > 0 else math.inf


def interval_of_mean(estimate: Array, first: Bounded, second: Bounded) -> Interval:
    """Interval of the mean of two shares that have intervals of their own: MOVER.

    Zou and Donner, "Construction of confidence limits about effect measures", 2008: the distances
    to the bounds are added as independent errors are. Unlike an error by resampling it knows of the
    uncertainty of a share of exactly 0 or 1.
    """
    (a, (a_low, a_high)), (b, (b_low, b_high)) = first, second
    return Interval(
        estimate - np.hypot(a - a_low, b - b_low) / 2,
        estimate + np.hypot(a_high - a, b_high - b) / 2,
    )


def _deviations(resampled: FloatArray, n_clusters: Array | int) -> FloatArray:
    """Resamples less their mean, widened as at the top; NaN with fewer than two clusters."""
    n_defined = (~np.isnan(resampled)).sum(axis=0)
    centre = np.nansum(resampled, axis=0) / np.maximum(n_defined, 1)
    deviations = np.nan_to_num(resampled - centre)  # what a resample leaves out deviates by nothing
    n = np.asarray(n_clusters, np.float64)
    with np.errstate(invalid="ignore"):  # of infinitely many clusters all is shown
        shown = np.where(np.isinf(n), 1.0, (n - 1) / (n + 1))
    shown = np.where((n > 1) & (n_defined > 0), shown, np.nan)
    widened: FloatArray = deviations / np.sqrt(shown)
    return widened


def _on_scale(
    estimates: FloatArray, reach: FloatArray, scale: Scale
) -> tuple[FloatArray, FloatArray]:
    """Step to both sides on the scale, and come back."""
    if scale == "identity":
        return estimates - reach, estimates + reach
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if scale == "log":
            factor = np.exp(reach / estimates)
            return estimates / factor, estimates * factor
        odds = estimates / (1 - estimates)
        factor = np.exp(reach / (estimates * (1 - estimates)))
        return odds / factor / (1 + odds / factor), 1 - 1 / (1 + odds * factor)


def count_rarer_class(targets: Array, clusters: Array) -> FloatArray:
    """Clusters with a positive, or with a negative where those are fewer, of each finding.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, ``(N, F)``.
    clusters
        Of every row, ``(N,)``.

    Returns
    -------
    FloatArray
        Shape ``(F,)``.
    """
    counts = [
        min(len(np.unique(clusters[target == value])) for value in (0, 1)) for target in targets.T
    ]
    return np.array(counts, np.float64)


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
