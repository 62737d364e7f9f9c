"""How a model's probabilities are read: calibrated first, then cut at a threshold per finding.

Both are chosen on out-of-fold predictions. A calibration acts on the logit and rises strictly, so
that the order of images, and with it AUROC and AP, stays as it was. A finding with too few positive
patients or studies gets no threshold: it is ranked, and never decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

from cxr_cache.config import parse_threshold_rule
from cxr_cache.errors import ConfigError
from cxr_cache.metrics.scores import (
    NEVER,
    UNDECIDED,
    Array,
    FloatArray,
    count_clusters,
    drop_positives_only,
    f1_score,
    has_both_classes,
    require_finite,
)

MIN_SLOPE: Final = 0.01
"""Smallest slope. It keeps the order of a finding that is ranked no better than by chance."""

PRIOR_POSITIVES: Final = 10
"""How many positive clusters the calibrated probabilities are worth where a threshold is chosen.
``scripts/rare_thresholds.py`` measures what other numbers give."""

_N_ROUNDS: Final = 100  # of the search for the common map; it moves little after thirty
_LEAST_VARIANCE: Final = 1e-4  # of maps around the common one, so that none is divided by zero
_CLOSEST: Final = float(np.finfo(np.float32).eps)  # to 0 and 1: probabilities are stored as float32


# --- calibration ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """A map of the probabilities of each finding: logit -> slope * logit + intercept.

    Attributes
    ----------
    method
        ``"none"``, ``"temperature"``, ``"platt"`` or ``"platt-shrunk"``.
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


def fit_calibration(
    targets: Array, probabilities: Array, method: str, clusters: Array | None = None
) -> Calibration:
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
        ``"platt-shrunk"`` draws the maps of findings towards a common one, the more the fewer
        positive clusters they have; see :func:`_fit_shrunk_platt`. Of fewer than three findings
        with both classes there is no common map, and each gets Platt's.
    clusters
        Patient or study of every row, ``(N,)``; without them every row stands for itself.

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
    known = has_both_classes(targets)
    if method == "temperature":
        slope[:] = _fit_temperature(targets, logits)
    elif method == "platt-shrunk" and known.sum() > 2:
        slope[:], intercept[:] = _fit_shrunk_platt(drop_positives_only(targets), logits, clusters)
    else:
        for f in np.flatnonzero(known):
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


def _fit_shrunk_platt(
    targets: Array, logits: FloatArray, clusters: Array | None
) -> tuple[FloatArray, FloatArray]:
    """Fit slope and intercept of every finding by empirical Bayes, ``(F,)`` each.

    Finding f has the map alpha + beta * (z - m), with m the mean of its logits z. A priori, alpha
    and beta are normal around two straight lines in m, which all findings share: the common map.
    (Focal loss bends the logits of rare findings otherwise than those of frequent ones.) Lines and
    variances are those of the greatest marginal likelihood, by the EM algorithm with Laplace's
    approximation (Morris, "Parametric empirical Bayes inference", 1983); each map is then the mode
    of its posterior. The images of a study repeat one another, so a finding's log-likelihood is
    scaled by its positive clusters per positive row. A finding without both classes gets the map
    that the lines give. Three findings at least must have both, for two lie on any line.
    """
    known = has_both_classes(targets)
    labelled, present = ~np.isnan(targets), targets == 1
    n_rows = np.maximum(labelled.sum(axis=0), 1)
    centre = (logits * labelled).sum(axis=0) / n_rows
    centre = np.where(labelled.any(axis=0), centre, logits.mean(axis=0))
    lines = np.stack([np.ones(len(centre)), centre], axis=1)  # (F, 2)
    n_positive = present.sum(axis=0)
    weights = (labelled * count_clusters(present, clusters) / np.maximum(n_positive, 1))[:, known]
    x, y = (logits - centre)[:, known], present[:, known]
    share = n_positive[known] / n_rows[known]
    maps = common = np.stack([logit(share), np.ones_like(share)])
    variances = np.ones(2)
    for _ in range(_N_ROUNDS):
        maps, spread = _step_to_mode(maps, x, y, weights, common, variances)
        fitted = np.linalg.lstsq(lines[known], maps.T, rcond=None)[0]  # (2, 2)
        common = (lines[known] @ fitted).T
        variances = np.maximum((np.square(maps - common) + spread).mean(axis=1), _LEAST_VARIANCE)
    alpha, slope = (lines @ fitted).T
    alpha[known], slope[known] = maps
    slope = np.maximum(slope, MIN_SLOPE)
    return slope, alpha - slope * centre


def _step_to_mode(
    maps: FloatArray,
    x: FloatArray,
    y: NDArray[np.bool_],
    weights: FloatArray,
    common: FloatArray,
    variances: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Take a Newton step towards the mode of each posterior; it and its variances, ``(2, F)``.

    No step is longer than 1, since far from the mode the curvature says little.
    """
    alpha, beta = maps
    p = expit(alpha + beta * x)
    error, curvature = weights * (p - y), weights * p * (1 - p)
    gradient = np.stack([error.sum(axis=0), (error * x).sum(axis=0)])
    gradient += (maps - common) / variances[:, None]
    aa = curvature.sum(axis=0) + 1 / variances[0]
    ab = (curvature * x).sum(axis=0)
    bb = (curvature * x * x).sum(axis=0) + 1 / variances[1]
    determinant = aa * bb - ab * ab
    step = np.stack([bb * gradient[0] - ab * gradient[1], aa * gradient[1] - ab * gradient[0]])
    step /= determinant
    step /= np.maximum(1, np.abs(step).max(axis=0))
    return maps - step, np.stack([bb, aa]) / determinant


# --- thresholds ----------------------------------------------------------------------------------


class ThresholdRule(NamedTuple):
    """How the threshold of a finding is chosen among the C that give different decisions."""

    choose: Callable[[FloatArray, FloatArray, float], int | None]
    """Function of true and false positives at each candidate, ``(C,)``, and of the target. It gives
    the number of the chosen candidate, or None if none reaches the target. Candidates run from the
    highest threshold to the lowest, at which everything is called present."""
    example: float | None = None
    """Example of a target, for messages; None for a rule without a target."""


def _maximise_f1(tp: FloatArray, fp: FloatArray, _: float) -> int:
    return int(np.argmax(f1_score(tp, fp, tp[-1] - tp)))


def _maximise_youden(tp: FloatArray, fp: FloatArray, _: float) -> int:
    # Sensitivity - (1 - specificity) with one denominator, since whole numbers have exact ties.
    return int(np.argmax(tp * fp[-1] - fp * tp[-1]))


def _keep_sensitivity(tp: FloatArray, _: FloatArray, target: float) -> int:
    return int(np.argmax(tp / tp[-1] >= target))  # the last candidate always reaches it


def _keep_specificity(_: FloatArray, fp: FloatArray, target: float) -> int | None:
    return _find_last((fp[-1] - fp) / fp[-1] >= target)


def _keep_ppv(tp: FloatArray, fp: FloatArray, target: float) -> int | None:
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


def choose_thresholds(
    targets: Array,
    probabilities: Array,
    rule: str = "f1",
    *,
    clusters: Array | None = None,
    min_positives: int = 0,
    prior_positives: float = 0.0,
) -> FloatArray:
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
    clusters
        Patient or study of every row, ``(N,)``; without them every row stands for itself.
    min_positives
        Positive clusters that a finding needs; with fewer it stays undecided.
    prior_positives
        Positive clusters that the probabilities are worth, which must be calibrated. True and false
        positives are then counted by ``w * target + (1 - w) * probability``, where w is n / (n +
        `prior_positives`) and n the finding's number of positive clusters. So the threshold of a
        rare finding is nearly that of its calibrated probabilities, on which the accidents of a few
        rows have little hold.

    Returns
    -------
    FloatArray
        Shape ``(F,)``. It is :data:`cxr_cache.metrics.scores.UNDECIDED` for a finding with fewer
        than `min_positives`, and :data:`cxr_cache.metrics.scores.NEVER` where no threshold reaches
        the target, and for a finding without a labelled positive or without a labelled negative.

    Raises
    ------
    ConfigError
        There is no such rule.
    ValueError
        A probability is NaN or infinite.
    """
    found, target = find_rule(rule)
    probabilities = require_finite(np.asarray(probabilities, dtype=np.float64))
    n_positive = count_clusters(targets == 1, clusters)
    shares = n_positive / np.maximum(n_positive + prior_positives, 1)
    chosen = [
        UNDECIDED if n < min_positives else _choose_threshold(t, p, share, found, target)
        for t, p, n, share in zip(targets.T, probabilities.T, n_positive, shares, strict=True)
    ]
    return np.array(chosen, dtype=np.float64)


def _choose_threshold(
    targets: Array, probabilities: FloatArray, share: float, rule: ThresholdRule, target: float
) -> float:
    """Choose the threshold of one finding; `share` is how much its targets count."""
    labelled = ~np.isnan(targets)
    order = np.argsort(-probabilities[labelled], kind="stable")
    present = targets[labelled][order] == 1
    if not present.any() or present.all():
        return NEVER
    descending = probabilities[labelled][order]
    last = np.flatnonzero(np.append(descending[1:] < descending[:-1], True))  # row of each tie
    candidates = descending[last]
    tp = (share * present + (1 - share) * descending).cumsum()[last]
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
    min_positives: int = 0
    """Positive patients or studies without which a finding stays undecided."""

    @property
    def undecided(self) -> NDArray[np.bool_]:
        """Findings that are ranked only, ``(F,)``."""
        return self.thresholds >= UNDECIDED

    def by_finding(self, findings: Sequence[str]) -> dict[str, float]:
        """Return the thresholds by finding, as a model stores them."""
        return dict(zip(findings, self.thresholds.tolist(), strict=True))


def choose_operating_point(
    targets: Array,
    probabilities: Array,
    *,
    rule: str,
    calibration: str,
    clusters: Array | None = None,
    min_positives: int = 0,
) -> OperatingPoint:
    """Fit the calibration, then choose thresholds on the calibrated probabilities.

    The probabilities are those of models that have not seen the rows (out of fold). `calibration`
    is the method of :func:`fit_calibration`; `rule`, `clusters` and `min_positives` are those of
    :func:`choose_thresholds`. With ``"platt-shrunk"``, thresholds of rare findings lean on the
    probabilities as if these were :data:`PRIOR_POSITIVES` positive clusters.
    """
    fitted = fit_calibration(targets, probabilities, calibration, clusters)
    thresholds = choose_thresholds(
        targets,
        fitted.apply(np.asarray(probabilities, np.float64)),
        rule,
        clusters=clusters,
        min_positives=min_positives,
        prior_positives=PRIOR_POSITIVES if calibration == "platt-shrunk" else 0,
    )
    return OperatingPoint(fitted, thresholds, rule, min_positives)
