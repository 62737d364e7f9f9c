"""Estimates -> tables with one row per finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cxr_cache.evaluation.figures import MEASURES, Estimates
from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.calibration import (
    Calibration,
    expected_calibration_error,
    log_losses,
    squared_errors,
)
from cxr_cache.metrics.scores import (
    CONFUSION_COLUMNS,
    FloatArray,
    confusion_counts,
    weighted_mean,
)


def calibration_columns(raw: ScoredImages, calibration: Calibration) -> dict[str, FloatArray]:
    """Errors without calibration, and the map of each finding."""
    errors = probability_errors(raw.targets, raw.probabilities)
    return {
        **{f"{name}_before": values for name, values in errors.items()},
        "calibration_slope": calibration.slope,
        "calibration_intercept": calibration.intercept,
    }


def tabulate_findings(images: ScoredImages, cuts: FloatArray, estimates: Estimates) -> pd.DataFrame:
    """One row per finding, in the order of the findings."""
    targets = images.targets
    counts = confusion_counts(targets, images.probabilities >= cuts).astype(np.int64)
    columns: dict[str, Any] = {
        "finding": images.findings,
        "n_test": (~np.isnan(targets)).sum(axis=0),
        "n_positive_test": (targets == 1).sum(axis=0),
        "n_positive_studies_test": images.count_studies(targets == 1),
        "prevalence_test": weighted_mean(targets),
        "threshold": cuts,
    }
    for name in MEASURES:
        if name != "prevalence":
            interval = estimates.intervals.get(name)
            columns[name] = estimates.figures[name]
            columns[f"{name}_low"] = np.nan if interval is None else interval.low
            columns[f"{name}_high"] = np.nan if interval is None else interval.high
    columns |= dict(zip(CONFUSION_COLUMNS, counts.T, strict=True))
    columns["calibration_error"] = estimates.calibration_error
    columns["n_undefined_resamples"] = estimates.n_undefined.get("auroc", 0)
    table: pd.DataFrame = pd.DataFrame(columns)
    return table


def tabulate_groups(
    subsets: Sequence[tuple[str, str, ScoredImages, Estimates]], cuts: FloatArray
) -> pd.DataFrame:
    """The findings of one group after the other."""
    names = ["group", "value", "n_images_group", "n_studies_group"]
    parts = []
    for group, value, images, estimates in subsets:
        part = tabulate_findings(images, cuts, estimates)
        described = pd.DataFrame(
            [(group, value, len(images), images.n_studies)] * len(part), columns=names
        )
        parts.append(pd.concat([described, part], axis=1))
    table: pd.DataFrame = (
        pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names)
    )
    return table


def probability_errors(targets: FloatArray, probabilities: FloatArray) -> dict[str, FloatArray]:
    """Brier score, log loss and calibration error per finding, each ``(F,)``."""
    return {
        "brier": weighted_mean(squared_errors(targets, probabilities)),
        "log_loss": weighted_mean(log_losses(targets, probabilities)),
        "calibration_error": expected_calibration_error(targets, probabilities),
    }
