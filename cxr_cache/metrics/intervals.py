"""Standard errors and confidence intervals that hold for rare findings too.

Clusters are patients where known, else studies. A percentile interval of a finding with few
positives is too narrow, and for an average of such findings it can exclude its own estimate:
resampling three positive studies shows two thirds of their variance, and the AP of a resample is
biased. So only the standard error is taken from the bootstrap, and the interval is that of
Student's t on a scale without bounds:

    g(estimate) +- t(n - 1) * g'(estimate) * sd(resamples) * sqrt((n + 1) / (n - 1)),

where g is the logit for shares and n the number of clusters on which the figure rests, for example
those with a positive. The root makes the error of a mean of n values equal to the textbook's. Let d
be their mean square deviation: a mean under exponential weights that sum to one has the variance
d / (n + 1) (Rubin 1981), where the textbook has d / (n - 1). The interval contains the estimate,
stays inside [0, 1] and, with n = 3, is as wide as three studies deserve. A mean over findings has
the degrees of freedom of Satterthwaite (1946). ``scripts/interval_coverage.py`` measures how often
such intervals cover the true value.

Differences of AUROCs need no resampling: their errors follow from the influence of every row.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from cxr_cache.metrics.scores import Array, FloatArray, macro_mean, mean_ranks

LEVEL: Final = 0.95
"""Share of intervals that are meant to contain the true value."""

Scale: TypeAlias = Literal["logit", "log", "identity"]
"""Scale on which a figure's error is symmetric: for shares, positive numbers, or differences."""


class Interval(NamedTuple):
    """Bounds; NaN where a figure is undefined or rests on a single cluster."""

    low: FloatArray
    high: FloatArray


Bounded: TypeAlias = tuple[Array, Interval]
"""Figures and their intervals."""


def standard_errors(resampled: FloatArray, n_clusters: Array | int) -> FloatArray:
    """Compute standard deviations over resamples, corrected for the number of clusters.

    `resampled`, ``(R, ...)``, is NaN where a resample leaves a figure undefined; `n_clusters`,
    ``(...)``, is the number of clusters on which each figure rests. NaN with fewer than two.
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
    """Compute Student's t interval on a scale without bounds.

    A share of exactly 0 or 1 shows no variance. It gets the bound of Clopper and Pearson (1934) for
    its number of clusters, which also holds for the mean of any values inside [0, 1].

    Parameters
    ----------
    estimates, errors, n_clusters
        Figures, their standard errors and the numbers of clusters on which they rest, ``(...)``.
    scale
        Scale on which the figures' errors are symmetric.
    level
        Share of intervals that shall contain the true value, in (0, 1).
    """
    estimates, errors, n_clusters = np.broadcast_arrays(
        *(np.asarray(values, np.float64) for values in (estimates, errors, n_clusters))
    )
    tail = (1 - level) / 2
    quantile = stdtrit(np.where(n_clusters > 1, n_clusters - 1, np.nan), 1 - tail)
    low, high = _on_scale(estimates, quantile * errors, scale)
    if scale == "logit":
        with np.errstate(divide="ignore"):
            # The share with which all n clusters are hits in a fraction `tail` of samples.
            furthest = tail ** (1 / np.maximum(n_clusters, 0))
        is_none, is_all = estimates == 0, estimates == 1
        low = np.where(is_none, 0.0, np.where(is_all, furthest, low))
        high = np.where(is_none, 1 - furthest, np.where(is_all, 1.0, high))
    return Interval(low, high)


def macro_interval(
    estimates: Array, resampled: FloatArray, n_clusters: Array, scale: Scale, level: float = LEVEL
) -> Interval:
    """Compute the interval of a mean over findings that share their clusters.

    Takes one figure per finding, ``(F,)``, NaN where undefined; these figures on resampled
    clusters, ``(R, F)``; and the number of clusters on which each rests, ``(F,)``. `scale` and
    `level` are those of :func:`student_interval`.
    """
    mean, spread = macro_mean(estimates), macro_error(resampled, n_clusters)
    if scale == "logit" and mean in (0, 1):  # take the number of the finding with most clusters
        return student_interval(mean, spread.error, np.max(n_clusters), scale, level)
    # No variance, although the mean is neither 0 nor 1, says nothing about its error.
    error = spread.error or math.nan
    return student_interval(mean, error, spread.n_clusters, scale, level)


class MeanError(NamedTuple):
    """Standard error of a mean over findings, and the number of clusters that it is worth."""

    error: float
    n_clusters: float
    """Satterthwaite's degrees of freedom, plus one."""


def macro_error(resampled: FloatArray, n_clusters: Array) -> MeanError:
    """Compute the standard error of a mean over findings, from ``(R, F)`` and ``(F,)``.

    All findings share the resamples, so the variance of their mean contains their covariance. A
    finding that rests on one cluster shows no variance at all. It is given the average variance of
    one cluster of the others, as survey sampling does with strata of a single unit.
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
    """Compute how many clusters would show the variance of a sum equally well.

    This is Satterthwaite's number of degrees of freedom ("An approximate distribution of estimates
    of variance components", 1946) plus one, since a variance from n clusters has n - 1 of them.
    Infinite without variance. Variances are those of the terms, ``(F,)``, their covariances left
    out; behind each is more than one cluster.
    """
    scatter = float((np.square(variances) / (np.asarray(n_clusters) - 1)).sum())
    return float(np.square(np.sum(variances))) / scatter + 1 if scatter > 0 else math.inf


def interval_of_mean(estimate: Array, first: Bounded, second: Bounded) -> Interval:
    """Compute the interval of the mean of two shares from their intervals, by the MOVER method.

    The distances to the bounds are added as independent errors are (Zou and Donner, "Construction
    of confidence limits about effect measures", 2008). Unlike a standard error from resamples, this
    includes the uncertainty of a share of exactly 0 or 1.
    """
    (a, (a_low, a_high)), (b, (b_low, b_high)) = first, second
    return Interval(
        estimate - np.hypot(a - a_low, b - b_low) / 2,
        estimate + np.hypot(a_high - a, b_high - b) / 2,
    )


def count_rarer_class(targets: Array, clusters: Array) -> FloatArray:
    """Count each finding's clusters with a positive, or with a negative where those are fewer.

    Targets ``(N, F)`` and the cluster of every row, ``(N,)``, to whole numbers, ``(F,)``.
    """
    counts = [
        min(len(np.unique(clusters[target == value])) for value in (0, 1)) for target in targets.T
    ]
    return np.array(counts, np.float64)


def auroc_influence(targets: Array, scores: Array) -> FloatArray:
    """Compute the influence of every row on each finding's AUROC, ``(N, F)``.

    The influence of a row is how much the AUROC changes with the row's weight (DeLong, DeLong and
    Clarke-Pearson 1988). A column sums to zero. Scores are finite, and ties count half.
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
    """Compute the standard error of a sum of figures, whose clusters were sampled as a whole.

    Takes the influence of every row on each figure, ``(N, F)`` (for differences of two figures, the
    differences of their influences), and the cluster of every row, ``(N,)``. Sums of squares are
    divided by n - 1, with n the number of clusters on which each figure rests, ``(F,)``. A figure
    of fewer than two clusters shows no variance.
    """
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.zeros((codes.max(initial=-1) + 1, influence.shape[1]))
    np.add.at(sums, codes, influence)
    measured = n_clusters > 1
    sums, n = sums[:, measured], n_clusters[measured]
    sums *= np.sqrt(n / (n - 1))
    variances = np.square(sums).sum(axis=0)
    error = math.sqrt(np.square(sums.sum(axis=1)).sum())
    return MeanError(error if measured.any() else math.nan, pool_clusters(variances, n))


def _deviations(resampled: FloatArray, n_clusters: Array | int) -> FloatArray:
    """Subtract the mean over resamples, and widen by the root in the module's docstring.

    NaN with fewer than two clusters; an undefined figure of a resample deviates by 0.
    """
    n_defined = (~np.isnan(resampled)).sum(axis=0)
    centre = np.nansum(resampled, axis=0) / np.maximum(n_defined, 1)
    deviations = np.nan_to_num(resampled - centre)
    n = np.asarray(n_clusters, np.float64)
    with np.errstate(invalid="ignore"):  # infinity / infinity
        share_shown = np.where(np.isinf(n), 1.0, (n - 1) / (n + 1))
    share_shown = np.where((n > 1) & (n_defined > 0), share_shown, np.nan)
    widened: FloatArray = deviations / np.sqrt(share_shown)
    return widened


def _on_scale(
    estimates: FloatArray, reach: FloatArray, scale: Scale
) -> tuple[FloatArray, FloatArray]:
    """Go from the estimates to both sides on the scale, and return to the original scale."""
    if scale == "identity":
        return estimates - reach, estimates + reach
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if scale == "log":
            factor = np.exp(reach / estimates)
            return estimates / factor, estimates * factor
        odds = estimates / (1 - estimates)
        factor = np.exp(reach / (estimates * (1 - estimates)))
        return odds / factor / (1 + odds / factor), 1 - 1 / (1 + odds * factor)
