"""How a model's probabilities are read: calibrated first, then cut at a threshold per finding.

Both are chosen on out-of-fold predictions. A calibration acts on the logit and rises strictly, so
that the order of images, and with it AUROC and AP, stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

from cxr_cache.config import parse_threshold_rule
from cxr_cache.errors import ConfigError
from cxr_cache.metrics.scores import (
    NEVER,
    Array,
    FloatArray,
    drop_positives_only,
    f1_score,
    has_both_classes,
    require_finite,
)

MIN_SLOPE: Final = 0.01
"""Smallest slope. It keeps the order of a finding that is ranked no better than by chance."""

_CLOSEST: Final = float(np.finfo(np.float32).eps)  # to 0 and 1: probabilities are stored as float32


# --- calibration ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """A map of the probabilities of each finding: logit -> slope * logit + intercept.

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
        """Calibrate probabilities, ``(..., F)`` -> ``(..., F)`` in float64; NaN stays NaN."""
        given = np.asarray(probabilities, np.float64)
        if self.method == "none":
            return given
        kept = (self.slope == 1) & (self.intercept == 0)
        mapped = expit(self.slope * logit(given) + self.intercept)
        return np.where(kept, given, mapped)

    @property
    def temperature(self) -> float | None:
        """Return the number that divides the logits of all findings, if there is one."""
        return float(1 / self.slope[0]) if self.method == "temperature" else None

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "method": self.method,
            "slope": self.slope.tolist(),
            "intercept": self.intercept.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """Return the calibration of which :meth:`to_dict` gave these values."""
        slope, intercept = (np.array(values[k], np.float64) for k in ("slope", "intercept"))
        return cls(values["method"], slope, intercept)

    @classmethod
    def none(cls, n_findings: int) -> Calibration:
        """Return the calibration that changes nothing."""
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
        ``"none"`` changes nothing. ``"temperature"`` divides the logits of all findings by the one
        number that gives the least log loss over all labelled cells (Guo et al., 2017).
        ``"platt"`` fits slope and intercept per finding (Platt, "Probabilistic outputs for support
        vector machines", 1999, with his smoothed targets), with a slope of at least
        :data:`MIN_SLOPE`. It leaves a finding without a positive or without a negative as it is.

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


def _fit_temperature(targets: Array, logits: FloatArray) -> float:
    """Return 1 / T. Log loss is convex in 1 / T, so it has one minimum in its logarithm too."""
    from scipy.optimize import minimize_scalar  # takes half a second, which most runs can save

    targets = drop_positives_only(targets)
    labelled = ~np.isnan(targets)
    if not (labelled & (targets == 1)).any() or not (targets == 0).any():
        return 1.0
    margins = np.where(targets == 1, logits, -logits)[labelled]

    def loss(log_slope: float) -> float:
        return -float(log_expit(np.exp(log_slope) * margins).mean())

    found = minimize_scalar(loss, bounds=(np.log(MIN_SLOPE), 5), method="bounded")
    return float(np.exp(found.x))


def _fit_platt(present: NDArray[np.bool_], logits: FloatArray) -> tuple[float, float]:
    """Return slope and intercept with the least log loss against targets not quite 0 and 1."""
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


# --- thresholds ----------------------------------------------------------------------------------


Counts: TypeAlias = NDArray[np.intp]


class ThresholdRule(NamedTuple):
    """How the threshold of a finding is chosen among the C that give different decisions."""

    choose: Callable[[Counts, Counts, float], int | None]
    """Function of true and false positives at each candidate, ``(C,)``, and of the target. It gives
    the number of the chosen candidate, or None if none reaches the target. Candidates run from the
    highest threshold to the lowest, at which everything is called present."""
    example: float | None = None
    """Example of a target, for messages; None for a rule without a target."""


def _maximise_f1(tp: Counts, fp: Counts, _: float) -> int:
    return int(np.argmax(f1_score(tp, fp, tp[-1] - tp)))


def _maximise_youden(tp: Counts, fp: Counts, _: float) -> int:
    # Sensitivity - (1 - specificity) with one denominator, since whole numbers have exact ties.
    return int(np.argmax(tp * fp[-1] - fp * tp[-1]))


def _keep_sensitivity(tp: Counts, _: Counts, target: float) -> int:
    return int(np.argmax(tp / tp[-1] >= target))  # the last candidate always reaches it


def _keep_specificity(_: Counts, fp: Counts, target: float) -> int | None:
    return _find_last((fp[-1] - fp) / fp[-1] >= target)


def _keep_ppv(tp: Counts, fp: Counts, target: float) -> int | None:
    return _find_last(tp / (tp + fp) >= target)


def _find_last(reaching: NDArray[np.bool_]) -> int | None:
    return int(np.flatnonzero(reaching)[-1]) if reaching.any() else None


RULES: Final[dict[str, ThresholdRule]] = {
    "f1": ThresholdRule(_maximise_f1),
    "youden": ThresholdRule(_maximise_youden),
    "sensitivity": ThresholdRule(_keep_sensitivity, 0.9),
    "specificity": ThresholdRule(_keep_specificity, 0.9),
    "ppv": ThresholdRule(_keep_ppv, 0.5),
}
"""``"f1"`` and ``"youden"`` maximise F1 and sensitivity + specificity - 1 (Youden, 1950); of equal
maxima the highest threshold wins. ``"sensitivity"`` takes the highest threshold that reaches its
target, ``"specificity"`` and ``"ppv"`` the lowest, so that each reaches its target and loses as
little as possible of the opposite measure."""


def find_rule(rule: str) -> tuple[ThresholdRule, float]:
    """Find a rule and its target, NaN where it takes none: ``"f1"``, ``"ppv=0.5"``.

    Raises
    ------
    ConfigError
        There is no such rule, it lacks its target, or has one that it does not take.
    """
    name, target = parse_threshold_rule(rule)
    found = RULES.get(name)
    if found is None or (found.example is None) != math.isnan(target):
        examples = (
            known if of.example is None else f"{known}={of.example}" for known, of in RULES.items()
        )
        problem = f"{rule!r} is no rule; it is one such as {', '.join(examples)}"
        raise ConfigError(problems=[("threshold_rule", problem)])
    return found, target


def choose_thresholds(targets: Array, probabilities: Array, rule: str = "f1") -> FloatArray:
    """Choose the threshold of every finding by a rule.

    A finding is called present where its probability is **at least** the threshold. Every distinct
    probability is tried, so the answer is exact. The threshold lies half-way between the lowest
    probability called present and the next lower one (or zero), so that rounding in a table moves
    no row across it.

    Choose on out-of-fold predictions, never on the rows that will be reported.

    Parameters
    ----------
    targets, probabilities
        As in :func:`fit_calibration`.
    rule
        A name among :data:`RULES`, with its target where it takes one: ``"f1"``, ``"ppv=0.5"``.

    Returns
    -------
    FloatArray
        Shape ``(F,)``. It is :data:`cxr_cache.metrics.scores.NEVER` where no threshold reaches the
        target, and for a finding without a labelled positive or without a labelled negative.

    Raises
    ------
    ConfigError
        There is no such rule.
    ValueError
        A probability is NaN or infinite.
    """
    found, target = find_rule(rule)
    probabilities = require_finite(np.asarray(probabilities, dtype=np.float64))
    columns = zip(targets.T, probabilities.T, strict=True)
    chosen = [_choose_threshold(t, p, found, target) for t, p in columns]
    return np.array(chosen, dtype=np.float64)


def _choose_threshold(
    targets: Array, probabilities: FloatArray, rule: ThresholdRule, target: float
) -> float:
    """Choose the threshold of one finding."""
    labelled = ~np.isnan(targets)
    order = np.argsort(-probabilities[labelled], kind="stable")
    present = targets[labelled][order] == 1
    if not present.any() or present.all():
        return NEVER
    descending = probabilities[labelled][order]
    last = np.flatnonzero(np.append(descending[1:] < descending[:-1], True))  # row of each tie
    candidates = descending[last]
    tp = present.cumsum()[last]
    best = rule.choose(tp, last + 1 - tp, target)
    if best is None:
        return NEVER
    below = candidates[best + 1] if best + 1 < len(candidates) else 0.0
    half_way = float(candidates[best] + below) / 2
    return half_way if half_way > below else float(candidates[best])


# --- both ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """Calibration and thresholds by which a model's probabilities become decisions."""

    calibration: Calibration
    """The calibration, which is applied first."""
    thresholds: FloatArray
    """Smallest calibrated probability at which each finding is called present, ``(F,)``."""
    rule: str
    """The rule by which the thresholds were chosen."""

    def by_finding(self, findings: Sequence[str]) -> dict[str, float]:
        """Return the thresholds by finding, as a model stores them."""
        return dict(zip(findings, self.thresholds.tolist(), strict=True))


def choose_operating_point(
    targets: Array, probabilities: Array, *, rule: str, calibration: str
) -> OperatingPoint:
    """Fit the calibration, then choose thresholds on the calibrated probabilities.

    The probabilities are those of models that have not seen the rows (out of fold). `calibration`
    is the method of :func:`fit_calibration`, `rule` that of :func:`choose_thresholds`.
    """
    fitted = fit_calibration(targets, probabilities, calibration)
    calibrated = fitted.apply(np.asarray(probabilities, np.float64))
    return OperatingPoint(fitted, choose_thresholds(targets, calibrated, rule), rule)
