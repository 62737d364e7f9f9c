"""Scored rows -> points of ROC, precision-recall, calibration and decision curves, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.intervals import count_rarer_class, student_interval, widen_errors
from cxr_cache.metrics.resampled import RankedScores, bootstrap_variance
from cxr_cache.metrics.scores import (
    N_BINS,
    NEVER,
    Array,
    FloatArray,
    divide,
    drop_positives_only,
    has_both_classes,
    reliability,
)

BAND_RESAMPLES: Final = 500
"""Resamples of those of the figures, the first ones, that bands of curves are made of. They show a
standard deviation to 3 %, which a band's reader cannot see, in a quarter of the time."""
MAX_POINTS: Final = 200
"""Of one finding's curve; a page for any number of images stays small."""

RANKING_COLUMNS: Final = (
    *("finding", "threshold", "sensitivity", "specificity", "ppv"),
    *("sensitivity_low", "sensitivity_high", "ppv_low", "ppv_high"),
)

THRESHOLDS: Final = np.concatenate(
    [np.arange(1, 20) / 200, np.arange(10, 50, 2) / 100, np.arange(50, 100, 5) / 100]
)
"""Probabilities from which on something is done, ``(T,)``. They are closer together where findings
are as rare as most are: half a percent up to 10 %, 2 % up to 50 %, then 5 %."""
DECISION_COLUMNS: Final = (
    *("finding", "threshold", "n_called", "net_benefit", "net_benefit_low", "net_benefit_high"),
    *("treat_all", "gain", "gain_low", "gain_high"),
)

POOLED: Final = ""
"""What stands for the finding where all cells are taken together."""


def ranking_curves(images: ScoredImages, *, n_resamples: int = 0, seed: int = 0) -> pd.DataFrame:
    """Points of the ROC and precision-recall curves of every finding that has both classes.

    Parameters
    ----------
    images
        N rows, F findings.
    n_resamples, seed
        As in :func:`cxr_cache.metrics.resampled.bootstrap`; without resamples there are no bands.

    Returns
    -------
    pd.DataFrame
        Columns :data:`RANKING_COLUMNS`, with finding ``""`` for all cells pooled; per finding from
        the highest threshold, which calls nothing, to the lowest probability. Points are on the
        curve; those left out lie between points closer than a hundredth in sensitivity or
        specificity. Bounds are pointwise: those of the sensitivity hold at the point's specificity,
        those of the PPV at its sensitivity, whichever threshold that takes in another sample.
    """
    columns = _columns(images)
    curves = [
        _curve(
            targets[:, 0],
            probabilities[:, 0],
            np.repeat(images.clusters, len(targets) // len(images)),
        )
        if has_both_classes(targets).all()
        else None
        for _, targets, probabilities in columns
    ]
    if n_resamples and any(curve is not None for curve in curves):
        curves = _add_bands(images, curves, n_resamples, seed)
    parts = [
        curve.assign(finding=finding)
        for (finding, _, _), curve in zip(columns, curves, strict=True)
        if curve is not None
    ]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    ordered: pd.DataFrame = table.reindex(columns=list(RANKING_COLUMNS))
    return ordered


def _add_bands(
    images: ScoredImages, curves: Sequence[pd.DataFrame | None], n_resamples: int, seed: int
) -> list[pd.DataFrame | None]:
    """Give the curves of every finding, and of all cells pooled, their pointwise bounds."""
    targets = drop_positives_only(images.targets)
    by_finding = RankedScores(targets, images.probabilities)
    pooled = RankedScores(targets, images.probabilities, pooled=True)
    places = [
        None if of is None else (1 - of["specificity"].to_numpy(), of["sensitivity"].to_numpy())
        for of in curves
    ]

    def statistics(weights: Array) -> dict[str, FloatArray]:
        read = by_finding.read_curves(weights, places[:-1])
        read += pooled.read_curves(weights, places[-1:])
        return {str(f): np.stack(of, axis=-1) for f, of in enumerate(read) if of is not None}

    variances = bootstrap_variance(statistics, images.clusters, n_resamples, seed)
    of_pooled = [
        int(images.count_clusters((targets == value).any(axis=1, keepdims=True))[0])
        for value in (1, 0)
    ]
    n_clusters = [*count_rarer_class(targets, images.clusters), min(of_pooled)]
    banded: list[pd.DataFrame | None] = []
    for f, curve in enumerate(curves):
        if curve is not None:
            errors = widen_errors(variances[str(f)], n_clusters[f])  # (P, 2)
            rests_on = {
                "sensitivity": n_clusters[f],
                "ppv": np.minimum(n_clusters[f], curve["n_called"]),
            }
            for k, (name, n) in enumerate(rests_on.items()):
                bounds = student_interval(curve[name].to_numpy(), errors[:, k], n, "logit")
                curve = curve.assign(**{f"{name}_low": bounds.low, f"{name}_high": bounds.high})
        banded.append(curve)
    return banded


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


def _curve(targets: Array, probabilities: FloatArray, clusters: NDArray[np.intp]) -> pd.DataFrame:
    """Points of both curves, and how many clusters have a row that is called there."""
    labelled = ~np.isnan(targets)
    order = np.argsort(-probabilities[labelled], kind="stable")
    descending, present = probabilities[labelled][order], targets[labelled][order] == 1
    first = np.empty(clusters.max() + 1, np.intp)
    ordered = clusters[labelled][order]
    first[ordered[::-1]] = np.arange(len(order))[::-1]  # of several rows, the last that is written
    is_new = first[ordered] == np.arange(len(order))
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
            "n_called": np.append(0, is_new.cumsum()[last][kept]),
        }
    )
    return table


# -- decisions ---


def net_benefit(n_true: Array, n_false: Array, n: Array, thresholds: FloatArray) -> FloatArray:
    """Compute true calls per row, less false calls at the price that the threshold puts on them.

    Who acts from a probability t on holds a false call for t / (1 - t) times as bad as a missed
    positive, so the net benefit is TP / n - FP / n * t / (1 - t) (Vickers and Elkin, "Decision
    curve analysis: a novel method for evaluating prediction models", 2006). Calling nothing scores
    0; the most that there is to gain is the prevalence.

    Takes counts of true and false calls, ``(..., T)``, of rows, ``(..., 1)``, and thresholds in
    [0, 1), ``(T,)``.
    """
    return divide(n_true - n_false * thresholds / (1 - thresholds), n)


class _Cells(NamedTuple):
    """Labelled rows of a finding as matrices of ones, ``(T + 1, N)``, that sum their weights.

    Row t holds those that are called at t thresholds, the lowest ones.
    """

    positives: sparse.csr_array
    negatives: sparse.csr_array


def _sort_cells(targets: Array, n_reached: NDArray[np.intp]) -> _Cells:
    def sums(rows: NDArray[np.intp]) -> sparse.csr_array:
        shape = len(THRESHOLDS) + 1, len(targets)
        return sparse.csr_array((np.ones(len(rows)), (n_reached[rows], rows)), shape=shape)

    return _Cells(sums(np.flatnonzero(targets == 1)), sums(np.flatnonzero(targets == 0)))


def _benefits(weights: Array, cells: _Cells) -> tuple[FloatArray, FloatArray]:
    """Net benefit of the model and of calling every row, for weights ``(R, N)``: ``(R, T)``."""
    by_row = np.ascontiguousarray(weights.T, dtype=np.float64)
    called, n = [], []
    for matrix in cells:
        at_least = np.cumsum((matrix @ by_row)[::-1], axis=0)[::-1].T  # (R, T + 1)
        called.append(at_least[:, 1:])
        n.append(at_least[:, :1])
    n_rows = n[0] + n[1]
    model = net_benefit(called[0], called[1], n_rows, THRESHOLDS)
    return model, net_benefit(n[0], n[1], n_rows, THRESHOLDS)


def decision_curves(images: ScoredImages, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Compute the net benefit of calling findings present from each threshold on.

    Parameters
    ----------
    images
        N rows with calibrated probabilities, F findings.
    n_resamples, seed
        As in :func:`cxr_cache.metrics.resampled.bootstrap`; without resamples there are no bounds.

    Returns
    -------
    pd.DataFrame
        Columns :data:`DECISION_COLUMNS`, a row per finding with both classes and threshold: rows
        called, net benefit of the model and of calling every row (``treat_all``), and the ``gain``,
        by which the model is better than calling every row and calling none, whichever is better.
        Bounds are pointwise, of Student's t over patients (or studies); blank where there is no
        spread, as where nothing is called, or the gain where everything is.
    """
    targets = drop_positives_only(images.targets)
    chosen = np.flatnonzero(has_both_classes(targets))
    if not len(chosen):
        empty: pd.DataFrame = pd.DataFrame(columns=list(DECISION_COLUMNS))
        return empty
    places = np.searchsorted(THRESHOLDS, images.probabilities[:, chosen], side="right")
    cells = [_sort_cells(targets[:, f], places[:, k]) for k, f in enumerate(chosen)]

    def statistics(weights: Array) -> dict[str, FloatArray]:
        """Net benefit and gain, ``(R, F, T)``."""
        by_finding = [_benefits(weights, each) for each in cells]
        model, treat_all = (np.stack(each, axis=1) for each in zip(*by_finding, strict=True))
        return {
            "net_benefit": model,
            "treat_all": treat_all,
            "gain": model - np.maximum(treat_all, 0),
        }

    once = {name: values[0] for name, values in statistics(np.ones((1, len(images)))).items()}
    is_labelled = ~np.isnan(targets[:, chosen])
    n_called = np.stack([(is_labelled & (places > t)).sum(axis=0) for t in range(len(THRESHOLDS))])
    columns = {"n_called": n_called.T, **once}
    if n_resamples:
        variances = bootstrap_variance(statistics, images.clusters, n_resamples, seed)
        n_clusters = count_rarer_class(targets[:, chosen], images.clusters)[:, None]
        for name in ("net_benefit", "gain"):
            error = widen_errors(variances[name], n_clusters)
            error = np.where((n_called.T > 0) & (error > 0), error, np.nan)
            bounds = student_interval(once[name], error, n_clusters, "identity")
            columns |= {f"{name}_low": bounds.low, f"{name}_high": bounds.high}
    names = [images.findings[f] for f in chosen]
    table = pd.DataFrame(
        {
            "finding": np.repeat(np.array(names, object), len(THRESHOLDS)),
            "threshold": np.tile(THRESHOLDS, len(names)),
            **{name: values.ravel() for name, values in columns.items()},
        }
    )
    ordered: pd.DataFrame = table.reindex(columns=list(DECISION_COLUMNS))
    return ordered
