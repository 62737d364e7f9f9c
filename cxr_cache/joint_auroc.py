"""AUROC of several models on resamples of the same studies: intervals, and of differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_cache.bootstrap import bootstrap
from cxr_cache.intervals import Scale, macro_error, standard_errors, student_interval
from cxr_cache.metrics import Array, FloatArray, macro_mean
from cxr_cache.ranked import RankedScores


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
        if math.isnan(self.value):
            return "undefined"
        if math.isnan(self.low):  # a single study shows no variance
            return f"{self.value:{sign}.3f} [no interval]"
        low, high = f"{self.low:{sign}.3f}", f"{self.high:{sign}.3f}"
        return f"{self.value:{sign}.3f} [{low}, {high}]"


@dataclass(frozen=True, eq=False)
class JointAuroc:
    """AUROCs of one model, or differences of two: on their rows, ``(F,)``, and resampled."""

    once: FloatArray
    resampled: FloatArray
    """``(R, F)``."""
    n_studies: FloatArray
    """Studies with a positive, or with a negative where those are fewer, ``(F,)``."""
    scale: Scale = "logit"

    def macro(self) -> Figure:
        """Mean over the defined findings."""
        error = macro_error(self.resampled, self.n_studies)
        return self._figure(macro_mean(self.once), np.array(error), np.array(np.inf))

    def of_finding(self, f: int) -> Figure:
        """One finding's."""
        errors = standard_errors(self.resampled, self.n_studies)
        return self._figure(self.once[f], errors[f], self.n_studies[f])

    def minus(self, other: JointAuroc) -> JointAuroc:
        """Differences, finding by finding, resample by resample; NaN where either is undefined."""
        return JointAuroc(
            self.once - other.once,
            self.resampled - other.resampled,
            np.minimum(self.n_studies, other.n_studies),
            "identity",
        )

    @classmethod
    def average(cls, trainings: Sequence[JointAuroc]) -> JointAuroc:
        """Of several trainings tested on the same rows: their mean AUROC, resample by resample."""
        return cls(
            np.mean([one.once for one in trainings], axis=0),
            np.mean([one.resampled for one in trainings], axis=0),
            trainings[0].n_studies,
            trainings[0].scale,
        )

    def _figure(self, value: Array, error: Array, n_studies: Array) -> Figure:
        interval = student_interval(value, error, n_studies, self.scale)
        return Figure(float(value), float(interval.low), float(interval.high))


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
        As in :func:`cxr_cache.bootstrap.bootstrap`.
    """
    ranked = {name: RankedScores(m.targets, m.scores) for name, m in models.items()}

    def areas(weights: NDArray[np.float32]) -> dict[str, FloatArray]:
        return {
            name: ranked[name].auroc_and_ap(weights[:, models[name].rows])[0] for name in models
        }

    once = areas(np.ones((1, len(study_uids)), np.float32))
    resampled = bootstrap(areas, study_uids, n_resamples, seed)
    return {
        name: JointAuroc(
            once[name][0], resampled[name], _count_studies(model.targets, study_uids[model.rows])
        )
        for name, model in models.items()
    }


def _count_studies(targets: Array, study_uids: Array) -> FloatArray:
    """Of each finding, the studies of its rarer class, ``(F,)``."""
    counts = [
        min(len(np.unique(study_uids[target == value])) for value in (0, 1)) for target in targets.T
    ]
    return np.array(counts, np.float64)
