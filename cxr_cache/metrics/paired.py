"""AUROCs of several models on the same resamples, with intervals of each and of differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_cache.metrics.intervals import (
    Interval,
    Scale,
    auroc_interval,
    count_classes,
    macro_error,
    standard_errors,
    student_interval,
)
from cxr_cache.metrics.resampled import bootstrap, rank_scores
from cxr_cache.metrics.scores import Array, FloatArray, macro_mean


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Scores that one model gives to n of the N rows."""

    rows: NDArray[np.intp]
    """Numbers of these rows, ``(n,)``."""
    targets: Array
    """1 present, 0 absent, NaN unlabelled, ``(n, F)``."""
    scores: Array
    """Logits or probabilities, finite, ``(n, F)``."""
    folds: Array | None = None
    """Outer fold of each, ``(n,)``, where each has a model of its own; None for one model."""


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval over clusters; NaN where undefined."""

    value: float
    low: float
    high: float

    def to_text(self, sign: str = "") -> str:
        """Write the figure with three digits; `sign` is ``"+"`` for differences."""
        if math.isnan(self.value):
            return "undefined"
        if math.isnan(self.low):  # a single cluster shows no variance
            return f"{self.value:{sign}.3f} [no interval]"
        low, high = f"{self.low:{sign}.3f}", f"{self.high:{sign}.3f}"
        return f"{self.value:{sign}.3f} [{low}, {high}]"


@dataclass(frozen=True, eq=False)
class JointAuroc:
    """AUROCs of one model, or differences of two models, finding by finding."""

    once: FloatArray
    """On the rows themselves, ``(F,)``."""
    resampled: FloatArray
    """On the resamples, ``(R, F)``."""
    n_of_class: FloatArray
    """Number of clusters with a positive, and with a negative, ``(2, F)``."""
    is_difference: bool = False

    def macro(self) -> Figure:
        """Average over the defined findings; that of a single one is its own figure."""
        (defined,) = np.nonzero(~np.isnan(self.once))
        if len(defined) == 1:
            return self.of_finding(int(defined[0]))
        mean, rarer = macro_mean(self.once), self.n_of_class.min(axis=0)
        spread = macro_error(self.once, self.resampled, rarer)
        scale: Scale = "identity" if self.is_difference else "logit"
        return _to_figure(mean, student_interval(mean, *spread, scale))

    def of_finding(self, f: int) -> Figure:
        """Give the figure of finding number `f`."""
        value, n = self.once[f], self.n_of_class[:, f]
        error = standard_errors(self.resampled[:, f], int(n.min()))
        if self.is_difference:
            return _to_figure(value, student_interval(value, error, n.min(), "identity"))
        return _to_figure(value, auroc_interval(value, error, *n))

    def minus(self, other: JointAuroc) -> JointAuroc:
        """Subtract, finding by finding and resample by resample; NaN where either is undefined."""
        return JointAuroc(
            self.once - other.once,
            self.resampled - other.resampled,
            np.minimum(self.n_of_class, other.n_of_class),
            is_difference=True,
        )

    @classmethod
    def average(cls, trainings: Sequence[JointAuroc]) -> JointAuroc:
        """Average several trainings that were tested on the same rows, resample by resample."""
        return cls(
            np.mean([one.once for one in trainings], axis=0),
            np.mean([one.resampled for one in trainings], axis=0),
            trainings[0].n_of_class,
            trainings[0].is_difference,
        )


def _to_figure(value: Array, interval: Interval) -> Figure:
    return Figure(float(value), float(interval.low), float(interval.high))


def score_jointly(
    models: Mapping[str, ScoredRows], clusters: Array, *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, JointAuroc]:
    """Score models on joint resamples of all clusters, so that differences have intervals too.

    The models need not have been scored on the same rows. A cluster that two models share has the
    same weight for both: `clusters` are the patients (or studies) of the N rows. `n_resamples` and
    `seed` are those of :func:`cxr_cache.metrics.resampled.bootstrap`.
    """
    ranked = {name: rank_scores(m.targets, m.scores, m.folds) for name, m in models.items()}

    def areas(weights: NDArray[np.float32]) -> dict[str, FloatArray]:
        return {
            name: ranked[name].auroc_and_ap(weights[:, models[name].rows])[0] for name in models
        }

    once = areas(np.ones((1, len(clusters)), np.float32))
    resampled = bootstrap(areas, clusters, n_resamples, seed)
    return {
        name: JointAuroc(
            once[name][0], resampled[name], count_classes(model.targets, clusters[model.rows])
        )
        for name, model in models.items()
    }
