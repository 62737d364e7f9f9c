"""Thresholds and calibration of a model, chosen on predictions for images it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cxr_cache.metrics.calibration import Calibration, fit_calibration
from cxr_cache.metrics.scores import Array, FloatArray
from cxr_cache.metrics.thresholds import choose_thresholds
from cxr_cache.models.run import SavedModel


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """How a model's probabilities are read."""

    calibration: Calibration
    """Applied first."""
    thresholds: FloatArray
    """Calibrated probability from which on each finding counts as present, ``(F,)``."""
    rule: str
    """How the thresholds were chosen."""

    def by_finding(self, findings: Sequence[str]) -> dict[str, float]:
        """The thresholds by name, as a model stores them."""
        return dict(zip(findings, self.thresholds.tolist(), strict=True))

    def put_into(self, model: SavedModel) -> SavedModel:
        """The model with this operating point instead of its own."""
        return replace(
            model,
            thresholds=self.by_finding(model.findings),
            threshold_rule=self.rule,
            calibration=self.calibration.to_dict(),
        )


def choose_operating_point(
    targets: Array, probabilities: Array, *, rule: str, calibration: str
) -> OperatingPoint:
    """Fit the calibration, then choose thresholds on the calibrated probabilities.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    probabilities
        Of models that have not seen the rows (out of fold), in [0, 1], shape ``(N, F)``.
    rule
        As :func:`cxr_cache.metrics.thresholds.choose_thresholds` takes it.
    calibration
        Method, as :func:`cxr_cache.metrics.calibration.fit_calibration` takes it.
    """
    fitted = fit_calibration(targets, probabilities, calibration)
    calibrated = fitted.apply(np.asarray(probabilities, np.float64))
    return OperatingPoint(fitted, choose_thresholds(targets, calibrated, rule), rule)
