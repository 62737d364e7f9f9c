"""Calibrated probabilities -> what acting on them is worth, at every threshold."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.intervals import count_rarer_class, student_interval, widen_errors
from cxr_cache.metrics.resampled import bootstrap_variance
from cxr_cache.metrics.scores import (
    Array,
    FloatArray,
    divide,
    drop_positives_only,
    has_both_classes,
)

THRESHOLDS: Final = np.concatenate(
    [np.arange(1, 20) / 200, np.arange(10, 50, 2) / 100, np.arange(50, 100, 5) / 100]
)
"""Probabilities from which on something is done, ``(T,)``. They are closer together where findings
are as rare as most are: half a percent up to 10 %, 2 % up to 50 %, then 5 %."""
COLUMNS: Final = (
    *("finding", "threshold", "n_called", "net_benefit", "net_benefit_low", "net_benefit_high"),
    *("treat_all", "gain", "gain_low", "gain_high"),
)


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
    return net_benefit(*called, n_rows, THRESHOLDS), net_benefit(*n, n_rows, THRESHOLDS)


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
        Columns :data:`COLUMNS`, a row per finding with both classes and threshold: rows called,
        net benefit of the model and of calling every row (``treat_all``), and the ``gain``, by
        which the model is better than calling every row and calling none, whichever is better.
        Bounds are pointwise, of Student's t over patients (or studies); blank where there is no
        spread, as where nothing is called, or the gain where everything is.
    """
    targets = drop_positives_only(images.targets)
    chosen = np.flatnonzero(has_both_classes(targets))
    if not len(chosen):
        empty: pd.DataFrame = pd.DataFrame(columns=list(COLUMNS))
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
    ordered: pd.DataFrame = table.reindex(columns=list(COLUMNS))
    return ordered
