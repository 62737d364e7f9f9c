"""Calibration slope and intercept: how stated probabilities would have to be changed.

Logistic regression of outcomes on the logits of stated probabilities (Cox, "Two further
applications of a model for binary regression", 1958). A slope below 1 says that probabilities are
too extreme. The intercept is that of a regression with the slope held at 1, also called
calibration-in-the-large: below 0, probabilities are too high on average.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from cxr_cache.metrics.intervals import Interval, count_rarer_class, student_interval
from cxr_cache.metrics.scores import (
    Array,
    FloatArray,
    count_clusters,
    has_both_classes,
    number_names,
)

_CLOSEST: Final = float(np.finfo(np.float32).eps)
_N_STEPS: Final = 50
_LARGEST: Final = 50.0
"""Slope beyond which the classes are taken to be separated, so that none is defined."""


class Recalibration(NamedTuple):
    """Slope and intercept of F findings, ``(F,)`` each, with their intervals; NaN if undefined."""

    slope: FloatArray
    slope_interval: Interval
    intercept: FloatArray
    intercept_interval: Interval


def recalibrate(targets: Array, probabilities: Array, clusters: Array) -> Recalibration:
    """Fit slope and intercept of every finding, with intervals over clusters.

    Standard errors are the cluster-robust ones of Liang and Zeger (1986), times the root of n / (n
    - 1); n is the number of clusters with a positive, or with a negative where those are fewer.
    Intervals are Student's t with n - 1 degrees of freedom.

    Parameters
    ----------
    targets, probabilities
        As in :func:`cxr_cache.metrics.operating_point.fit_calibration`.
    clusters
        Patient or study of every row, ``(N,)``.
    """
    codes = number_names(clusters)[1]
    z = logit(np.clip(np.asarray(probabilities, np.float64), _CLOSEST, 1 - _CLOSEST))
    fitted = np.full((4, targets.shape[1]), np.nan)
    for f in np.flatnonzero(has_both_classes(targets)):
        rows = ~np.isnan(targets[:, f])
        y, x, own = targets[rows, f], z[rows, f], codes[rows]
        both = np.stack([np.ones_like(x), x], axis=1)
        (_, slope), errors = _regress(y, both, np.zeros_like(x), own)
        (intercept,), (error,) = _regress(y, both[:, :1], x, own)
        fitted[:, f] = slope, errors[1], intercept, error
    slope, slope_error, intercept, error = fitted
    n = count_rarer_class(targets, codes)
    return Recalibration(
        slope,
        student_interval(slope, slope_error, n, "identity"),
        intercept,
        student_interval(intercept, error, n, "identity"),
    )


def _regress(
    y: FloatArray, x: FloatArray, offset: FloatArray, codes: NDArray[np.intp]
) -> tuple[FloatArray, FloatArray]:
    """Fit a logistic regression of n rows on P columns by Newton's method.

    Gives coefficients and cluster-robust standard errors, ``(P,)`` each; NaN where the classes are
    separated.
    """
    coefficients, undefined = np.zeros(x.shape[1]), np.full(x.shape[1], np.nan)
    coefficients[1:] = 1.0
    for _ in range(_N_STEPS):
        p = expit(x @ coefficients + offset)
        curvature = (x * (p * (1 - p))[:, None]).T @ x
        try:
            step = np.linalg.solve(curvature, x.T @ (y - p))
        except np.linalg.LinAlgError:  # all logits are equal
            return undefined, undefined
        step /= max(1.0, float(np.abs(step).max()))
        coefficients += step
        if np.abs(step).max() < 1e-9:
            break
    if np.abs(coefficients).max() > _LARGEST:
        return undefined, undefined
    scores = np.stack([np.bincount(codes, column * (y - p)) for column in x.T], axis=1)
    inverse = np.linalg.inv(curvature)
    n = count_clusters(np.stack([y == 0, y == 1], axis=1), codes).min()
    variances = np.diag(inverse @ (scores.T @ scores) @ inverse) * (
        n / (n - 1) if n > 1 else np.nan
    )
    with np.errstate(invalid="ignore"):  # NaN where rounding leaves a variance below 0
        return coefficients, np.sqrt(variances)
