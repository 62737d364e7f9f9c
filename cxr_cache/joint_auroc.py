"""AUROC of several models on resamples of the same studies: intervals, and of differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_cache.metrics import (
    Array,
    FloatArray,
    RankedScores,
    bootstrap,
    macro_mean,
    percentile_interval,
)


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What one model says about some of N rows.

    Attributes
    ----------
    rows
        Their numbers, ``(n,)``.
    targets
        1 present, 0 absent, NaN unlabelled, ``(n, F)``.
    scores
        Logits or probabilities, finite, ``(n, F)``.
    """

    rows: NDArray[np.intp]
    targets: Array
    scores: Array


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval over studies; NaN where it is undefined."""

    value: float
    low: float
    high: float

    def to_text(self, sign: str = "") -> str:
        """Three digits, with `sign` ``"+"`` for differences."""
        low, high = f"{self.low:{sign}.3f}", f"{self.high:{sign}.3f}"
        return f"{self.value:{sign}.3f} [{low}, {high}]"


@dataclass(frozen=True, eq=False)
class JointAuroc:
    """AUROCs of one model: on its rows, ``(F,)``, and on every resample, ``(R, F)``."""

    once: FloatArray
    resampled: FloatArray

    def macro(self) -> Figure:
        """Mean over the defined findings."""
        return _figure(macro_mean(self.once), macro_mean(self.resampled))

    def of_finding(self, f: int) -> Figure:
        """One finding's."""
        return _figure(self.once[f], self.resampled[:, f])

    def minus(self, other: JointAuroc) -> JointAuroc:
        """Differences, finding by finding, resample by resample; NaN where either is undefined."""
        return JointAuroc(self.once - other.once, self.resampled - other.resampled)


def score_jointly(
    models: Mapping[str, ScoredRows], study_uids: Array, *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, JointAuroc]:
    """Score models on resamples of all studies, so that their differences can be resampled too.

    The models need not have been scored on the same rows. A study that two of them share counts as
    often for the one as for the other.

    Parameters
    ----------
    models
        By name.
    study_uids
        Study of each of the N rows.
    n_resamples, seed
        As in :func:`cxr_cache.metrics.bootstrap`.
    """
    ranked = {name: RankedScores(m.targets, m.scores) for name, m in models.items()}

    def areas(weights: NDArray[np.float32]) -> dict[str, FloatArray]:
        return {
            name: ranked[name].auroc_and_ap(weights[:, models[name].rows])[0] for name in models
        }

    once = areas(np.ones((1, len(study_uids)), np.float32))
    resampled = bootstrap(areas, study_uids, n_resamples, seed)
    return {name: JointAuroc(once[name][0], resampled[name]) for name in models}


def _figure(value: Array | float, resampled: FloatArray) -> Figure:
    low, high, _ = percentile_interval(resampled)
    return Figure(float(value), float(low), float(high))
