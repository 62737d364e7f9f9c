"""Scored rows -> points of ROC, precision-recall and calibration curves, as tables."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.scores import (
    N_BINS,
    NEVER,
    Array,
    FloatArray,
    drop_positives_only,
    has_both_classes,
    reliability,
)

MAX_POINTS: Final = 200
"""Of one finding's curve; a page for any number of images stays small."""

POOLED: Final = ""
"""What stands for the finding where all cells are taken together."""


def ranking_curves(images: ScoredImages) -> pd.DataFrame:
    """Points of the ROC and precision-recall curves of every finding that has both classes.

    Parameters
    ----------
    images
        N rows, F findings.

    Returns
    -------
    pd.DataFrame
        Columns finding (``""`` for all cells pooled), threshold, sensitivity, specificity and ppv;
        per finding from the highest threshold, which calls nothing, to the lowest probability.
        Points are on the curve; those left out lie between points closer than a hundredth in
        sensitivity or specificity.
    """
    parts = []
    for finding, targets, probabilities in _columns(images):
        if has_both_classes(targets).all():
            points = _curve(targets[:, 0], probabilities[:, 0])
            points.insert(0, "finding", finding)
            parts.append(points)
    columns = ["finding", "threshold", "sensitivity", "specificity", "ppv"]
    table: pd.DataFrame = (
        pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    )
    return table


def calibration_curves(before: ScoredImages, after: ScoredImages | None) -> pd.DataFrame:
    """What was stated and what was observed, by bin.

    Parameters
    ----------
    before, after
        The same rows without and with calibration; None where there is none.

    Returns
    -------
    pd.DataFrame
        Columns stage, finding (``""`` for all cells pooled), bin (from 1), n, mean_probability,
        observed; bins without a cell are left out.
    """
    stages = {"before": before} if after is None else {"before": before, "after": after}
    parts = []
    for stage, images in stages.items():
        for finding, targets, probabilities in _columns(images):
            bins = reliability(targets, probabilities)
            part = pd.DataFrame(
                {
                    "stage": stage,
                    "finding": finding,
                    "bin": np.arange(1, N_BINS + 1),
                    "n": bins.n[0].astype(np.int64),
                    "mean_probability": bins.mean_probability[0],
                    "observed": bins.observed[0],
                }
            )
            parts.append(part[part["n"] > 0])
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return table


def _columns(images: ScoredImages) -> list[tuple[str, Array, FloatArray]]:
    """Each finding with its column of targets and of probabilities, then all pooled."""
    targets = drop_positives_only(images.targets)
    columns = [
        (finding, targets[:, [f]], images.probabilities[:, [f]])
        for f, finding in enumerate(images.findings)
    ]
    pooled = targets.reshape(-1, 1), images.probabilities.reshape(-1, 1)
    return [*columns, (POOLED, *pooled)]


def _curve(targets: Array, probabilities: FloatArray) -> pd.DataFrame:
    labelled = ~np.isnan(targets)
    order = np.argsort(-probabilities[labelled], kind="stable")
    descending, present = probabilities[labelled][order], targets[labelled][order] == 1
    last = np.flatnonzero(np.append(descending[1:] < descending[:-1], True))  # of each tie
    tp = present.cumsum()[last]
    fp = last + 1 - tp
    sensitivity, false_alarms = tp / tp[-1], fp / fp[-1]
    grid = np.linspace(0, 1, MAX_POINTS // 2)[:-1]  # the first point is added, the last is in both
    kept = np.unique([np.searchsorted(of, grid) for of in (sensitivity, false_alarms)])
    kept = np.union1d(kept, len(last) - 1)
    table: pd.DataFrame = pd.DataFrame(
        {
            "threshold": np.append(NEVER, descending[last][kept]),
            "sensitivity": np.append(0.0, sensitivity[kept]),
            "specificity": np.append(1.0, 1 - false_alarms[kept]),
            "ppv": np.append(np.nan, (tp / (tp + fp))[kept]),
        }
    )
    return table
