"""From which probability on a finding counts as present: chosen by a rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxr_cache.config import parse_threshold_rule
from cxr_cache.metrics.scores import (
    NEVER,
    Array,
    FloatArray,
    f1_score,
    require_finite,
)


def choose_thresholds(targets: Array, probabilities: Array, rule: str = "f1") -> FloatArray:
    """Threshold of every finding that a rule asks for on these rows.

    A finding is called present where its probability is **at least** the threshold. Every distinct
    probability is tried, so the answer is exact. The threshold lies half-way between the lowest
    probability called present and the next one below (or zero), so that rounding in a table moves
    no row across it.

    Choose on out-of-fold predictions, never on the rows that will be reported.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    probabilities
        In [0, 1], shape ``(N, F)``.
    rule
        ``"f1"`` and ``"youden"`` maximise F1 and sensitivity + specificity - 1 (Youden, 1950); of
        equal maxima the highest threshold wins. ``"sensitivity=0.9"`` takes the highest threshold
        that reaches it, ``"specificity=0.9"`` and ``"ppv=0.5"`` the lowest: each keeps the target
        and gives up as little as possible of what it costs.

    Returns
    -------
    FloatArray
        Shape ``(F,)``; :data:`cxr_cache.metrics.scores.NEVER` for a finding without a labelled positive,
        since nothing supports ever calling it, for one without a labelled negative if the rule
        looks at specificity, and where no threshold reaches the target.

    Raises
    ------
    ConfigError
        There is no such rule.
    ValueError
        A probability is NaN or infinite.
    """
    name, target = parse_threshold_rule(rule)
    probabilities = require_finite(np.asarray(probabilities, dtype=np.float64))
    columns = zip(targets.T, probabilities.T, strict=True)
    return np.array([_choose_threshold(t, p, name, target) for t, p in columns], dtype=np.float64)


def _choose_threshold(targets: Array, probabilities: FloatArray, name: str, target: float) -> float:
    labelled = ~np.isnan(targets)
    order = np.argsort(-probabilities[labelled], kind="stable")
    present = targets[labelled][order] == 1
    if not present.any() or (present.all() and name in ("youden", "specificity")):
        return NEVER
    descending = probabilities[labelled][order]
    last = np.flatnonzero(np.append(descending[1:] < descending[:-1], True))  # of each tie
    candidates = descending[last]
    tp = present.cumsum()[last]
    best = _choose_candidate(tp, last + 1 - tp, name, target)
    if best is None:
        return NEVER
    below = candidates[best + 1] if best + 1 < len(candidates) else 0.0
    half_way = float(candidates[best] + below) / 2
    return half_way if half_way > below else float(candidates[best])


def _choose_candidate(
    tp: NDArray[np.intp], fp: NDArray[np.intp], name: str, target: float
) -> int | None:
    """Which of the candidates, from the highest threshold down; None if none will do."""
    n_present, n_absent = tp[-1], fp[-1]
    if name == "f1":
        return int(np.argmax(f1_score(tp, fp, n_present - tp)))
    if name == "youden":
        # Sensitivity - (1 - specificity) over one denominator: whole numbers have exact ties.
        return int(np.argmax(tp * n_absent - fp * n_present))
    if name == "sensitivity":
        return int(np.argmax(tp / n_present >= target))  # the last one has 1
    kept = (n_absent - fp) / n_absent if name == "specificity" else tp / (tp + fp)
    reaching = np.flatnonzero(kept >= target)
    return int(reaching[-1]) if len(reaching) else None
