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
d / (n + 1) (Rubin 1981), where the textbook has d / (n - 1). AP does without the root: each
positive counts in the precision at its own score, so resamples of few positives show enough.

A mean over findings has its covariances from the resamples as they are, since those come from
clusters that are in all findings; the root is applied to each finding's own variance. Its degrees
of freedom are Satterthwaite's (1946). The AUROC of a single finding has an interval of its own
(:func:`auroc_interval`). ``scripts/interval_coverage.py`` measures how often intervals cover the
true value, and how often equal models are called different.

Differences of AUROCs need no resampling: their errors follow from the influence of every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from cxr_cache.metrics.scores import (
    Array,
    FloatArray,
    count_clusters,
    macro_mean,
    mean_ranks,
    number_names,
)

LEVEL: Final = 0.95
"""Share of intervals that are meant to contain the true value."""

Scale: TypeAlias = Literal["logit", "log", "identity"]
"""Scale on which a figure's error is symmetric: for shares, positive numbers, or differences."""

_ROUNDING: Final = 1e-6
"""Share of a figure up to which its error is rounding; some are summed in float32."""
_PRIOR_CLUSTERS: Final = 30
"""Clusters that the variance of normal scores is worth beside the observed one in an AUROC's
interval. Chosen by simulation: with fewer, AUROCs near 1 are covered too often; with more, scores
of another shape are covered more rarely."""
_NORMAL: Final = np.linspace(-8, 8, 81)
_DENSITY: Final = np.exp(-np.square(_NORMAL) / 2) / np.exp(-np.square(_NORMAL) / 2).sum()


class Interval(NamedTuple):
    """Bounds; NaN where a figure is undefined or rests on a single cluster."""

    low: FloatArray
    high: FloatArray


Bounded: TypeAlias = tuple[Array, Interval]
"""Figures and their intervals."""


def standard_errors(
    resampled: FloatArray, n_clusters: Array | int, *, widen: bool = True
) -> FloatArray:
    """Compute standard deviations over resamples, corrected for the number of clusters.

    `resampled`, ``(R, ...)``, is NaN where a resample leaves a figure undefined; `n_clusters`,
    ``(...)``, is the number of clusters on which each figure rests. NaN with fewer than two. With
    `widen` they are multiplied by the root in the module's docstring.
    """
    variances = _centre(resampled).var(axis=0)
    is_shown = ~np.isnan(resampled).all(axis=0)
    return widen_errors(np.where(is_shown, variances, np.nan), n_clusters, widen=widen)


def widen_errors(
    variances: FloatArray, n_clusters: Array | int, *, widen: bool = True
) -> FloatArray:
    """Compute standard errors from variances over resamples, as :func:`standard_errors` does."""
    n = np.asarray(n_clusters, np.float64)
    errors: FloatArray = np.sqrt(np.where(n > 1, variances * _widening(n, widen), np.nan))
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
    its number of clusters, which also holds for the mean of any values inside [0, 1]. Another
    figure without variance has no interval: NaN, never a point.

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
    low, high = _on_scale(estimates, quantile * drop_rounding(estimates, errors), scale)
    if scale == "logit":
        low, high = _bound_extremes(estimates, Interval(low, high), n_clusters, tail)
    return Interval(low, high)


def drop_rounding(estimates: FloatArray, errors: FloatArray) -> FloatArray:
    """Replace errors by NaN where the resamples show no spread of a figure that is not 0.

    Nothing is known of its error then, and an interval of one point would claim certainty.
    """
    is_rounding = (errors <= _ROUNDING * np.abs(estimates)) & (estimates != 0)
    shown: FloatArray = np.where(is_rounding, np.nan, errors)
    return shown


def _bound_extremes(
    estimates: FloatArray, interval: Interval, n_clusters: FloatArray, tail: float
) -> Interval:
    """Give shares of exactly 0 or 1 the bound of Clopper and Pearson."""
    with np.errstate(divide="ignore"):
        # The share with which all n clusters are hits in a fraction `tail` of samples.
        furthest = tail ** (1 / np.maximum(n_clusters, 0))
    is_none, is_all = estimates == 0, estimates == 1
    return Interval(
        np.where(is_none, 0.0, np.where(is_all, furthest, interval.low)),
        np.where(is_none, 1 - furthest, np.where(is_all, 1.0, interval.high)),
    )


def auroc_interval(
    estimates: Array, errors: Array, n_positive: Array, n_negative: Array, level: float = LEVEL
) -> Interval:
    """Compute intervals of AUROCs: the values from which the estimate is not too far.

    The AUROC of few positives near 1 rests on the rarest of them, those that score low. Where a
    sample has none, the observed error is far too small, and an interval around the estimate
    covers too rarely. So an AUROC A lies in the interval if the estimate is at most t errors away,
    with the error that belongs to A, as in Wilson's interval of a share and in Newcombe's method 5
    of an AUROC ("Confidence intervals for an effect measure based on the Mann-Whitney statistic,
    part 2", 2006). The variance that belongs to A is that of normal scores of one variance in both
    classes, multiplied by

        (m * observed variance / variance of normal scores + 30) / (m + 30),

    and t has m + 30 degrees of freedom. Here m is what the observed variance is worth: n - 1, with
    n clusters of the rarer class, or 2 (n - 1) / (kurtosis - 1), which is fewer where A is near 1,
    since a variance of values with such a kurtosis is that uncertain.

    Parameters
    ----------
    estimates, errors
        AUROCs and their standard errors, widened, ``(...)``.
    n_positive, n_negative
        Clusters with a positive and with a negative, ``(...)``. With fewer than two of either, the
        interval is NaN, and Clopper and Pearson's if the AUROC is 0 or 1.
    level
        Share of intervals that shall contain the true value, in (0, 1).
    """
    given = (estimates, errors, n_positive, n_negative)
    estimates, errors, n_positive, n_negative = np.broadcast_arrays(
        *(np.asarray(values, np.float64) for values in given)
    )
    rarer, tail = np.minimum(n_positive, n_negative), (1 - level) / 2

    def is_inside(distances: FloatArray) -> NDArray[np.bool_]:
        """Whether normal scores so far apart, in standard deviations, explain the estimates."""
        areas, variance, kurtosis = _place_normal_scores(distances)
        variances = _sum_variances(areas, variance, n_positive, n_negative)
        worth = (rarer - 1) * np.minimum(1, 2 / (kurtosis - 1))
        weights = worth + _PRIOR_CLUSTERS
        ratio = (worth * np.square(errors) / variances + _PRIOR_CLUSTERS) / weights
        reach: FloatArray = stdtrit(weights, 1 - tail) * np.sqrt(variances * ratio)
        return np.abs(estimates - areas) <= reach

    with np.errstate(divide="ignore", invalid="ignore"):
        middle = math.sqrt(2) * ndtri(estimates)
        bounds = [_find_last(is_inside, middle, np.full_like(middle, end)) for end in (-12.0, 12.0)]
    low, high = (ndtr(bound / math.sqrt(2)) for bound in bounds)
    is_known = (rarer > 1) & ~np.isnan(errors)
    interval = Interval(np.where(is_known, low, np.nan), np.where(is_known, high, np.nan))
    return _bound_extremes(estimates, interval, rarer, tail)


def normal_scores_error(areas: Array, n_positive: Array, n_negative: Array) -> FloatArray:
    """Compute the standard error of AUROCs whose scores are normal, of one variance, ``(...)``.

    It is that of Hanley and McNeil ("The meaning and use of the area under a receiver operating
    characteristic (ROC) curve", 1982) with Q1 and Q2 of normal scores, not of exponential ones.

    Parameters
    ----------
    areas
        AUROCs, in (0, 1).
    n_positive, n_negative
        Numbers of positives and negatives, above 0.
    """
    given = (areas, n_positive, n_negative)
    areas, n_positive, n_negative = (np.asarray(values, np.float64) for values in given)
    _, variance, _ = _place_normal_scores(math.sqrt(2) * ndtri(areas))
    errors: FloatArray = np.sqrt(_sum_variances(areas, variance, n_positive, n_negative))
    return errors


def _sum_variances(
    areas: FloatArray, variance: FloatArray, n_positive: Array, n_negative: Array
) -> FloatArray:
    """Variance of AUROCs, given that of the share that a positive beats; alike for negatives."""
    total = areas * (1 - areas) + (n_positive + n_negative - 2) * variance
    mean: FloatArray = total / (n_positive * n_negative)
    return mean


def _place_normal_scores(distances: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """AUROC of normal scores, and variance and kurtosis of the share that a positive beats."""
    beaten = ndtr(distances[..., None] + _NORMAL)
    areas = beaten @ _DENSITY
    off = np.square(beaten - areas[..., None])
    variance = off @ _DENSITY
    return areas, variance, np.square(off) @ _DENSITY / np.square(variance)


def _find_last(
    is_inside: Callable[[FloatArray], NDArray[np.bool_]], inside: FloatArray, outside: FloatArray
) -> FloatArray:
    """Find by bisection where, from inside to outside, an interval ends."""
    for _ in range(30):
        between = (inside + outside) / 2
        found = is_inside(between)
        inside, outside = np.where(found, between, inside), np.where(found, outside, between)
    return inside


def macro_interval(
    estimates: Array,
    resampled: FloatArray,
    n_clusters: Array,
    scale: Scale,
    level: float = LEVEL,
    *,
    widen: bool = True,
) -> Interval:
    """Compute the interval of a mean over findings that share their clusters.

    Takes one figure per finding, ``(F,)``, NaN where undefined; these figures on resampled
    clusters, ``(R, F)``; and the number of clusters on which each rests, ``(F,)``. `scale` and
    `level` are those of :func:`student_interval`, `widen` is that of :func:`standard_errors`.
    """
    mean = macro_mean(estimates)
    spread = macro_error(estimates, resampled, n_clusters, widen=widen)
    if scale == "logit" and mean in (0, 1):  # take the number of the finding with most clusters
        return student_interval(mean, spread.error, np.max(n_clusters), scale, level)
    return student_interval(mean, *spread, scale, level)


def add_training_error(
    errors: FloatArray, freedom: FloatArray, trainings: Sequence[Array]
) -> tuple[FloatArray, FloatArray]:
    """Add what other trainings of the same recipes would change, to ``(...)`` and ``(...)``.

    `errors` are those over clusters, with their degrees of freedom, of a figure of means over
    trainings; `trainings` has the figures of each recipe's trainings, ``(T, ...)``, T at least 2.
    The variances add up, that of a recipe's training being s^2 / T, with T - 1 degrees of freedom,
    and the degrees of freedom of the sum are Satterthwaite's.
    """
    of_training = [np.var(each, axis=0, ddof=1) / len(each) for each in trainings]
    total = np.square(errors) + sum(of_training)
    scatter = errors**4 / freedom
    for variance, each in zip(of_training, trainings, strict=True):
        scatter = scatter + np.square(variance) / (len(each) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(total), np.where(scatter > 0, np.square(total) / scatter, freedom)


class MeanError(NamedTuple):
    """Standard error of a mean over findings, and the number of clusters that it is worth."""

    error: float
    n_clusters: float
    """Satterthwaite's degrees of freedom, plus one."""


def macro_error(
    estimates: Array, resampled: FloatArray, n_clusters: Array, *, widen: bool = True
) -> MeanError:
    """Compute the standard error of a mean over findings, from ``(F,)``, ``(R, F)`` and ``(F,)``.

    All findings share the resamples, so the variance of their mean contains their covariance. A
    finding that rests on one cluster shows no variance of its own. It is given the square of its
    distance from the mean over findings, as survey sampling does with strata of a single unit
    (``lonely.psu = "adjust"`` in Lumley's ``survey``). `widen` is that of :func:`standard_errors`.
    """
    is_defined = ~np.isnan(resampled).all(axis=0)
    figures = np.asarray(estimates, np.float64)[is_defined]
    n = np.asarray(n_clusters, np.float64)[is_defined]
    deviations = _centre(resampled[:, is_defined])
    own = deviations.var(axis=0)
    shared = deviations.sum(axis=1).var() - own.sum()
    if (n > 1).any():
        own = np.where(n > 1, own, np.square(figures - macro_mean(figures)))
    return _error_of_mean(own, shared, n, widen)


def _error_of_mean(own: FloatArray, shared: float, n: FloatArray, widen: bool) -> MeanError:
    """Add the findings' own variances, ``(F,)``, widened, and what all their covariances sum to."""
    measured = n > 1
    if not measured.any():
        return MeanError(math.nan, math.nan)
    own = own * np.where(measured, _widening(n, widen), 1.0)
    total = max(0.0, float(own.sum() + shared))
    return MeanError(
        math.sqrt(total) / len(n), pool_clusters(own[measured], n[measured], total=total)
    )


def pool_clusters(variances: Array, n_clusters: Array, *, total: float = 0.0) -> float:
    """Compute how many clusters would show the variance of a sum equally well.

    This is Satterthwaite's number of degrees of freedom ("An approximate distribution of estimates
    of variance components", 1946) plus one, since a variance from n clusters has n - 1 of them.
    Infinite without variance. Variances are those of the terms, ``(F,)``, behind each of which is
    more than one cluster. `total` is the variance of the sum, where it exceeds theirs by what is
    known much better, such as covariances, which all clusters show.
    """
    scatter = float((np.square(variances) / (np.asarray(n_clusters) - 1)).sum())
    whole = max(total, float(np.sum(variances)))
    return whole**2 / scatter + 1 if scatter > 0 else math.inf


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


def count_classes(targets: Array, clusters: Array) -> FloatArray:
    """Count each finding's clusters with a positive, and those with a negative, ``(2, F)``.

    Takes targets ``(N, F)`` and the cluster of every row, ``(N,)``.
    """
    codes = number_names(clusters)[1]  # once for both
    return np.array([count_clusters(targets == value, codes) for value in (1, 0)], np.float64)


def count_rarer_class(targets: Array, clusters: Array) -> FloatArray:
    """Count each finding's clusters with a positive, or with a negative where those are fewer.

    Targets ``(N, F)`` and the cluster of every row, ``(N,)``, to whole numbers, ``(F,)``.
    """
    rarer: FloatArray = count_classes(targets, clusters).min(axis=0)
    return rarer


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
    differences of their influences), and the cluster of every row, ``(N,)``. Each figure's own sum
    of squares is multiplied by n / (n - 1), with n the number of clusters on which it rests,
    ``(F,)``. A figure of fewer than two clusters shows no variance.
    """
    _, codes = number_names(groups)
    sums = np.zeros((codes.max(initial=-1) + 1, influence.shape[1]))
    np.add.at(sums, codes, influence)
    measured = n_clusters > 1
    sums, n = sums[:, measured], n_clusters[measured]
    if not measured.any():
        return MeanError(math.nan, math.nan)
    variances = np.square(sums).sum(axis=0)
    shared = np.square(sums.sum(axis=1)).sum() - variances.sum()
    variances *= n / (n - 1)
    total = max(0.0, float(variances.sum() + shared))
    return MeanError(math.sqrt(total), pool_clusters(variances, n, total=total))


def _centre(resampled: FloatArray) -> FloatArray:
    """Subtract the mean over resamples; an undefined figure of a resample deviates by 0."""
    n_defined = (~np.isnan(resampled)).sum(axis=0)
    centre = np.nansum(resampled, axis=0) / np.maximum(n_defined, 1)
    centred: FloatArray = np.nan_to_num(resampled - centre)
    return centred


def _widening(n: FloatArray, widen: bool) -> FloatArray | float:
    """The factor (n + 1) / (n - 1) of variances; 1 where there is nothing to widen."""
    return 1 + 2 / np.maximum(n - 1, 1) if widen else 1.0


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
