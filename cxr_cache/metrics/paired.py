"""AUROCs of several models on the same resamples, with intervals of each and of differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_cache.metrics.intervals import (
    Scale,
    count_rarer_class,
    macro_error,
    standard_errors,
    student_interval,
)
from cxr_cache.metrics.resampled import RankedScores, bootstrap
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
    n_clusters: FloatArray
    """Number of clusters with a positive, or with a negative where those are fewer, ``(F,)``."""
    scale: Scale = "logit"

    def macro(self) -> Figure:
        """Average over the defined findings."""
        return self._figure(macro_mean(self.once), *macro_error(self.resampled, self.n_clusters))

    def of_finding(self, f: int) -> Figure:
        """Give the figure of finding number `f`."""
        errors = standard_errors(self.resampled, self.n_clusters)
        return self._figure(self.once[f], errors[f], self.n_clusters[f])

    def minus(self, other: JointAuroc) -> JointAuroc:
        """Subtract, finding by finding and resample by resample; NaN where either is undefined."""
        return JointAuroc(
            self.once - other.once,
            self.resampled - other.resampled,
            np.minimum(self.n_clusters, other.n_clusters),
            "identity",
        )

    @classmethod
    def average(cls, trainings: Sequence[JointAuroc]) -> JointAuroc:
        """Average several trainings that were tested on the same rows, resample by resample."""
        return cls(
            np.mean([one.once for one in trainings], axis=0),
            np.mean([one.resampled for one in trainings], axis=0),
            trainings[0].n_clusters,
            trainings[0].scale,
        )

    def _figure(self, value: Array, error: Array | float, n_clusters: Array | float) -> Figure:
        interval = student_interval(value, error, n_clusters, self.scale)
        return Figure(float(value), float(interval.low), float(interval.high))


def score_jointly(
    models: Mapping[str, ScoredRows], clusters: Array, *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, JointAuroc]:
    """Score models on joint resamples of all clusters, so that differences have intervals too.

    The models need not have been scored on the same rows. A cluster that two models share has the
    same weight for both: `clusters` are the patients (or studies) of the N rows. `n_resamples` and
    `seed` are those of :func:`cxr_cache.metrics.resampled.bootstrap`.
    """
    ranked = {name: RankedScores(m.targets, m.scores) for name, m in models.items()}

    def areas(weights: NDArray[np.float32]) -> dict[str, FloatArray]:
        return {
            name: ranked[name].auroc_and_ap(weights[:, models[name].rows])[0] for name in models
        }

    once = areas(np.ones((1, len(clusters)), np.float32))
    resampled = bootstrap(areas, clusters, n_resamples, seed)
    return {
        name: JointAuroc(
            once[name][0], resampled[name], count_rarer_class(model.targets, clusters[model.rows])
        )
        for name, model in models.items()
    }
