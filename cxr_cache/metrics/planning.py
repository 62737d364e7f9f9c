"""Expected widths of AUROC intervals, and how many test studies give a width, before training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.metrics.intervals import (
    auroc_interval,
    normal_scores_error,
    pool_clusters,
    student_interval,
)
from cxr_cache.metrics.scores import FloatArray

_MOST: Final = 1e9
"""Test studies beyond which nobody plans."""


def expected_half_width(auroc: float, n_positive: FloatArray, n_negative: FloatArray) -> FloatArray:
    """Compute half the width that intervals of AUROCs are expected to have, ``(...)``.

    It is the width of :func:`cxr_cache.metrics.intervals.auroc_interval` for scores that are normal
    with one variance, at numbers of clusters that need not be whole; NaN where there is no
    interval, with a single positive or negative.
    """
    n_positive, n_negative = (np.asarray(n, np.float64) for n in (n_positive, n_negative))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = normal_scores_error(np.full(n_positive.shape, auroc), n_positive, n_negative)
    interval = auroc_interval(np.full(n_positive.shape, auroc), errors, n_positive, n_negative)
    half: FloatArray = (interval.high - interval.low) / 2
    return half


def expected_macro_half_width(
    auroc: float, n_positive: FloatArray, n_negative: FloatArray
) -> tuple[float, int]:
    """Compute half the width expected of the interval of the mean AUROC over findings.

    The findings' errors are taken to be independent of each other, as far as which studies have
    them goes; what models get wrong in many findings at once widens the real one. Findings with
    less than one positive or negative are left out, since a test split may well lack them.

    Takes numbers of positives and negatives, ``(F,)``; gives NaN where no finding has two of both,
    or their errors rest on less than one degree of freedom, and the number of findings that count.
    """
    counted = np.minimum(n_positive, n_negative) >= 1
    n_positive, n_negative = n_positive[counted], n_negative[counted]
    if len(n_positive) == 1:
        return float(expected_half_width(auroc, n_positive, n_negative)[0]), 1
    rarer = np.minimum(n_positive, n_negative)
    measured = rarer > 1
    if not measured.any():
        return math.nan, int(counted.sum())
    variances = np.square(normal_scores_error(np.full(len(rarer), auroc), n_positive, n_negative))
    total = float(variances.sum())
    worth = pool_clusters(variances[measured], rarer[measured], total=total)
    if worth < 2:  # clusters, of which one is spent on the mean
        return math.nan, len(rarer)
    interval = student_interval(np.array(auroc), math.sqrt(total) / len(rarer), worth, "logit")
    return float(interval.high - interval.low) / 2, len(rarer)


def studies_for(
    half_width: float, width_at: Callable[[FloatArray], FloatArray], n: int
) -> NDArray[np.float64]:
    """Find the least numbers of test studies with which intervals are as narrow as is wanted.

    Parameters
    ----------
    half_width
        What is wanted.
    width_at
        Half widths expected with numbers of test studies, ``(n,)`` -> ``(n,)``, which fall as these
        grow; NaN where there are too few.
    n
        How many numbers are looked for at once.

    Returns
    -------
    NDArray[np.float64]
        Whole numbers, ``(n,)``; infinite where no number will do.
    """
    low, high = np.ones(n), np.full(n, _MOST)
    is_possible = width_at(high) <= half_width
    while (high - low > np.maximum(0.5, 1e-6 * low)).any():
        middle = np.sqrt(low * high)
        is_enough = width_at(middle) <= half_width  # False for NaN
        low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
    return np.where(is_possible, np.ceil(high), np.inf)
