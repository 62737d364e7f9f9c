"""Figures and their bootstrap resamples -> interval bounds that hold for rare findings too.

A percentile interval of a finding with few positives is too narrow, and of an average of such
findings it lies beside its own estimate: resampling three positive studies shows two thirds of
their variance, and the AP of a resample is biased. So the bootstrap is asked for one thing only,
the standard error, and the interval is that of Student's t on a scale without bounds:

    g(estimate) +- t(n - 1) * g'(estimate) * sd(resamples) * sqrt(n / (n - 1)),

where g is the logit for shares and n the number of clusters (patients where known, else studies)
that the figure rests on: those with a positive, say. It contains the estimate, stays inside [0, 1]
and, with n of three, is as wide as three studies deserve. ``scripts/interval_coverage.py`` measures
how often it covers.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from scipy.special import stdtrit

from cxr_cache.metrics import Array, FloatArray, macro_mean

LEVEL: Final = 0.95
"""How often an interval is meant to cover."""

Scale: TypeAlias = Literal["logit", "log", "identity"]
"""Where a figure's error is taken as symmetric: shares, positive numbers, differences."""


class Interval(NamedTuple):
    """Bounds, NaN where there is none: the figure is undefined, or rests on a single cluster."""

    low: FloatArray
    high: FloatArray


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
    """Normal interval of a mean over findings, which share their clusters.

    The resamples are joint, so the findings' covariance is in the variance of their mean. A finding
    that rests on one cluster shows no variance at all; it is given that of one of the others,
    as strata with a single unit are collapsed in survey sampling.

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
    mean, error = macro_mean(estimates), macro_error(resampled, n_clusters)
    if scale == "logit" and mean in (0, 1):  # as many clusters as the best known finding has
        return student_interval(mean, error, np.max(n_clusters), scale, level)
    return student_interval(mean, error, np.inf, scale, level)


def macro_error(resampled: FloatArray, n_clusters: Array) -> float:
    """Standard error of a mean over findings, shapes ``(R, F)`` and ``(F,)``; see above."""
    defined = ~np.isnan(resampled).all(axis=0)
    if not defined.any():
        return math.nan
    n = np.asarray(n_clusters, np.float64)[defined]
    deviations = _deviations(resampled[:, defined], n)
    measured = n > 1
    variance = np.nan_to_num(deviations).mean(axis=1).var()
    if not measured.all():
        of_one_cluster = (deviations.var(axis=0) * n)[measured]
        mean = of_one_cluster.mean() if measured.any() else math.nan
        variance += mean * (~measured).sum() / len(n) ** 2
    return math.sqrt(variance)


def _deviations(resampled: FloatArray, n_clusters: Array | int) -> FloatArray:
    """Resamples less their mean, widened by sqrt(n / (n - 1)); NaN with fewer than two clusters."""
    n_defined = (~np.isnan(resampled)).sum(axis=0)
    centre = np.nansum(resampled, axis=0) / np.maximum(n_defined, 1)
    deviations = np.nan_to_num(resampled - centre)  # what a resample leaves out deviates by nothing
    n = np.asarray(n_clusters, np.float64)
    shown = np.where((n > 1) & (n_defined > 0), 1 - 1 / np.maximum(n, 1), np.nan)
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
