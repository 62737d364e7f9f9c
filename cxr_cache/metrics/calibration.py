"""How far probabilities are from frequencies, and maps that bring them closer.

The maps act on the logit, rise strictly, and are fitted to out-of-fold predictions: the order of
images, and with it AUROC and AP, stays what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

from cxr_cache.metrics.scores import (
    Array,
    FloatArray,
    divide,
    require_finite,
)

N_BINS: Final = 10
"""Of equal width over [0, 1]."""

MIN_SLOPE: Final = 0.01
"""A finding that out-of-fold predictions rank no better than chance keeps its order, barely."""

_CLOSEST: Final = float(np.finfo(np.float32).eps)  # probabilities are stored as float32


# --- how well calibrated -------------------------------------------------------------------------


def squared_errors(targets: Array, probabilities: Array) -> FloatArray:
    """Squared error per cell, NaN where unlabelled, ``(N, F)``; the mean is the Brier score."""
    return np.square(np.asarray(probabilities, dtype=np.float64) - targets)


def log_losses(targets: Array, probabilities: Array) -> FloatArray:
    """Cross-entropy of every cell in nats, NaN where unlabelled, ``(N, F)``.

    Probabilities are kept a rounding step of float64 away from 0 and 1, as scikit-learn does, so
    that one confident mistake costs 36 nats and not infinity.
    """
    step = np.finfo(np.float64).eps
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), step, 1 - step)
    losses = -np.log(np.where(targets == 1, clipped, 1 - clipped))
    return np.where(np.isnan(targets), np.nan, losses)


@dataclass(frozen=True, eq=False)
class Reliability:
    """What falls into each of the B bins, per finding."""

    n: FloatArray
    """Labelled cells, shape ``(F, B)``."""
    mean_probability: FloatArray
    """What was stated; NaN in an empty bin, shape ``(F, B)``."""
    observed: FloatArray
    """Share of positives; NaN in an empty bin, shape ``(F, B)``."""


def reliability(targets: Array, probabilities: Array, n_bins: int = N_BINS) -> Reliability:
    """Sort cells into bins of equal width over [0, 1], an upper edge belonging to the bin below.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    probabilities
        In [0, 1], shape ``(N, F)``.
    n_bins
        B.
    """
    edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    sums = np.zeros((3, targets.shape[1], n_bins))
    for f, (t, p) in enumerate(
        zip(targets.T, np.asarray(probabilities, np.float64).T, strict=True)
    ):
        labelled = ~np.isnan(t)
        bins = np.searchsorted(edges, p[labelled], side="left")
        for values, summed in zip((None, p[labelled], t[labelled]), sums[:, f], strict=True):
            summed[:] = np.bincount(bins, weights=values, minlength=n_bins)
    n, stated, seen = sums
    return Reliability(n, divide(stated, n), divide(seen, n))


def expected_calibration_error(
    targets: Array, probabilities: Array, n_bins: int = N_BINS
) -> FloatArray:
    """Mean gap between stated probability and observed frequency, per finding.

    Gaps of the bins of :func:`reliability` are averaged by their number of rows (Guo et al., "On
    Calibration of Modern Neural Networks", 2017). It is biased upwards where bins hold few rows.

    Returns
    -------
    FloatArray
        In [0, 1], shape ``(F,)``; NaN for a finding without labels.
    """
    bins = reliability(targets, probabilities, n_bins)
    gaps = np.nan_to_num(np.abs(bins.mean_probability - bins.observed))
    return divide((bins.n * gaps).sum(axis=1), bins.n.sum(axis=1))


# --- maps ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """A map of probabilities per finding: logit -> slope * logit + intercept.

    Attributes
    ----------
    method
        ``"none"``, ``"temperature"`` or ``"platt"``.
    slope, intercept
        Shape ``(F,)``; 1 and 0 for a finding that is left as it is.
    """

    method: str
    slope: FloatArray
    intercept: FloatArray

    def apply(self, probabilities: Array) -> FloatArray:
        """Calibrated probabilities, ``(..., F)`` -> ``(..., F)`` in float64; NaN stays NaN."""
        given = np.asarray(probabilities, np.float64)
        if self.method == "none":
            return given
        kept = (self.slope == 1) & (self.intercept == 0)
        mapped = expit(self.slope * logit(given) + self.intercept)
        return np.where(kept, given, mapped)

    @property
    def temperature(self) -> float | None:
        """What logits are divided by, if it is one number for all findings."""
        return float(1 / self.slope[0]) if self.method == "temperature" else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "method": self.method,
            "slope": self.slope.tolist(),
            "intercept": self.intercept.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """What :meth:`to_dict` gave."""
        slope, intercept = (np.array(values[k], np.float64) for k in ("slope", "intercept"))
        return cls(values["method"], slope, intercept)

    @classmethod
    def none(cls, n_findings: int) -> Calibration:
        """The map that changes nothing."""
        return cls("none", np.ones(n_findings), np.zeros(n_findings))


def fit_calibration(targets: Array, probabilities: Array, method: str) -> Calibration:
    """Fit a map to predictions of images that the model has not seen.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    probabilities
        In [0, 1], shape ``(N, F)``.
    method
        ``"none"``; ``"temperature"``: one number for all findings, that logits are divided by, with
        the least log loss over all labelled cells (Guo et al., 2017); ``"platt"``: slope and
        intercept per finding (Platt, "Probabilistic outputs for support vector machines", 1999,
        with his smoothed targets), the slope at least :data:`MIN_SLOPE`. A finding without a
        positive or without a negative is left as it is.

    Raises
    ------
    ValueError
        A probability is NaN or infinite.
    """
    calibration = Calibration.none(targets.shape[1])
    if method == "none":
        return calibration
    given = require_finite(np.asarray(probabilities, np.float64))
    logits = logit(np.clip(given, _CLOSEST, 1 - _CLOSEST))
    slope, intercept = calibration.slope, calibration.intercept
    if method == "temperature":
        slope[:] = _fit_temperature(targets, logits)
    else:
        for f in np.flatnonzero(has_both_classes(targets)):
            labelled = ~np.isnan(targets[:, f])
            slope[f], intercept[f] = _fit_platt(targets[labelled, f] == 1, logits[labelled, f])
    return Calibration(method, slope, intercept)


def has_both_classes(targets: Array) -> NDArray[np.bool_]:
    """Whether a finding has a labelled positive and a labelled negative, shape ``(F,)``."""
    both: NDArray[np.bool_] = (targets == 1).any(axis=0) & (targets == 0).any(axis=0)
    return both


def _fit_temperature(targets: Array, logits: FloatArray) -> float:
    """1 / T; log loss is convex in it, hence has one minimum in its logarithm too."""
    from scipy.optimize import minimize_scalar  # half a second, which most runs need not wait for

    labelled = ~np.isnan(targets)
    if not (labelled & (targets == 1)).any() or not (targets == 0).any():
        return 1.0
    margins = np.where(targets == 1, logits, -logits)[labelled]

    def loss(log_slope: float) -> float:
        return -float(log_expit(np.exp(log_slope) * margins).mean())

    found = minimize_scalar(loss, bounds=(np.log(MIN_SLOPE), 5), method="bounded")
    return float(np.exp(found.x))


def _fit_platt(present: NDArray[np.bool_], logits: FloatArray) -> tuple[float, float]:
    """Slope and intercept with the least log loss against targets that are not quite 0 and 1."""
    from scipy.optimize import minimize  # as above

    n_present = int(present.sum())
    n_absent = len(present) - n_present
    wanted = np.where(present, (n_present + 1) / (n_present + 2), 1 / (n_absent + 2))

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        z = parameters[0] * logits + parameters[1]
        error = (expit(z) - wanted) / len(z)
        value = -(wanted * log_expit(z) + (1 - wanted) * log_expit(-z)).mean()
        return float(value), np.array([error @ logits, error.sum()])

    start = np.array([1.0, np.log((n_present + 1) / (n_absent + 1)) - logits.mean()])
    found = minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(MIN_SLOPE, None), (None, None)],
        options={"ftol": 1e-12, "gtol": 1e-8},
    )
    return float(found.x[0]), float(found.x[1])
