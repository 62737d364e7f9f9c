"""AUROC, AP, thresholds, calibration and the study-clustered bootstrap, on plain arrays.

N is rows (images, or studies), F findings, R bootstrap resamples. Targets are 1 present, 0 absent,
NaN unlabelled; an unlabelled cell counts for nothing, finding by finding.

One rule for what is undefined, everywhere: without a labelled positive or without a labelled
negative, AUROC and AP are NaN; without a positive, F1 is NaN; a rate whose denominator is zero is
NaN. Means over findings leave NaN out. (scikit-learn gives AP and F1 of 0.0 there, which pulls
every macro mean down by findings that nobody could have scored on.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array: TypeAlias = NDArray[Any]
FloatArray: TypeAlias = NDArray[np.float64]

NEVER = 2.0
"""Threshold of a finding that is never called present: no probability reaches it."""

CONFUSION_COLUMNS = ("tp", "fp", "fn", "tn")
N_CALIBRATION_BINS = 10

# Weights of one chunk of resamples; gathering and summing them takes up to five times as much.
_CHUNK_BYTES = 2**24


# --- ranking -------------------------------------------------------------------------------------


def auroc(targets: Array, scores: Array) -> FloatArray:
    """Area under the ROC curve of every finding, ties counted half.

    Equal to ``sklearn.metrics.roc_auc_score`` on the labelled rows of each finding, through the
    Mann-Whitney statistic: the ranks of the positives say how many negatives lie below them.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    scores
        Logits or probabilities, finite, shape ``(..., N, F)``. Leading axes (epochs, heads) share
        the targets.

    Returns
    -------
    FloatArray
        Shape ``(..., F)``; NaN where a finding has no labelled positive or no labelled negative.

    Raises
    ------
    ValueError
        A score is NaN or infinite. A diverged model must not look like an undefined finding.

    Examples
    --------
    >>> auroc(np.array([[0.0], [1.0], [1.0]]), np.array([[0.2], [0.2], [0.9]]))
    array([0.75])
    """
    present, n_present, n_absent = _count(targets)
    unlabelled = np.isnan(targets)
    weights = present.astype(np.float64)

    def rank_sum(matrix: Array) -> FloatArray:
        # Unlabelled rows rank above everything, where they leave the ranks below them alone.
        ranks = rankdata(np.where(unlabelled, np.inf, matrix), axis=0)
        summed: FloatArray = np.einsum("nf,nf->f", ranks, weights)
        return summed

    n_won = _per_matrix(rank_sum, scores) - n_present * (n_present + 1) / 2
    return _divide(n_won, n_present * n_absent)


def average_precision(targets: Array, scores: Array) -> FloatArray:
    """Average precision of every finding, tied scores taken as one step.

    Equal to ``sklearn.metrics.average_precision_score`` on the labelled rows of each finding: the
    mean, over positives, of the precision among the rows that score at least as high.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    scores
        Logits or probabilities, finite, shape ``(..., N, F)``.

    Returns
    -------
    FloatArray
        Shape ``(..., F)``; NaN where :func:`auroc` is, so that both are means over the same
        findings.

    Raises
    ------
    ValueError
        A score is NaN or infinite.
    """
    present, n_present, n_absent = _count(targets)
    unlabelled = np.isnan(targets)

    def precision_sum(matrix: Array) -> FloatArray:
        n_called = rankdata(np.where(unlabelled, np.inf, -matrix), "max", axis=0)
        n_found = rankdata(np.where(present, -matrix, np.inf), "max", axis=0)
        summed: FloatArray = np.where(present, n_found / n_called, 0.0).sum(axis=0)
        return summed

    return _divide(_per_matrix(precision_sum, scores), np.where(n_absent > 0, n_present, 0))


def macro_mean(values: Array) -> FloatArray:
    """Mean over the findings that are defined, shape ``(..., F)`` -> ``(...)``; NaN if none is."""
    defined = ~np.isnan(values)
    return _divide(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1))


def _count(targets: Array) -> tuple[NDArray[np.bool_], FloatArray, FloatArray]:
    """Where a finding is present, and its labelled positives and negatives, (N, F), (F,), (F,)."""
    present = targets == 1
    n_present = present.sum(axis=0, dtype=np.float64)
    return present, n_present, (targets == 0).sum(axis=0, dtype=np.float64)


def _per_matrix(statistic: Callable[[Array], FloatArray], scores: Array) -> FloatArray:
    """Apply ``(N, F) -> (F,)`` along leading axes, one matrix at a time: quicker, and small."""
    _require_finite(scores)
    *leading, N, F = scores.shape
    matrices = scores.reshape(math.prod(leading), N, F)
    return np.array([statistic(matrix) for matrix in matrices]).reshape(*leading, F)


def _require_finite(scores: Array) -> Array:
    if not np.isfinite(scores).all():
        n_bad = int((~np.isfinite(scores)).sum())
        raise ValueError(f"{n_bad} of {scores.size} scores are NaN or infinite; did it diverge?")
    return scores


def _divide(numerator: Array, denominator: Array | float) -> FloatArray:
    """Quotient in float64, NaN wherever the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    quotient = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


# --- decisions -----------------------------------------------------------------------------------


def _f1(tp: Array, fp: Array, fn: Array) -> FloatArray:
    """F1 from counts; NaN without a positive."""
    return _divide(2 * tp, np.where(tp + fn > 0, 2 * tp + fp + fn, 0))


_THRESHOLD_RULES: dict[str, Callable[[Array, Array, Array], FloatArray]] = {"f1": _f1}


def choose_thresholds(
    targets: Array, probabilities: Array, rule: Literal["f1"] = "f1"
) -> FloatArray:
    """Threshold of every finding that makes `rule` largest on these rows.

    A finding is called present where its probability is **at least** the threshold. Every distinct
    probability is tried, so the maximum is exact; of equal maxima the highest threshold wins. The
    threshold lies half-way between the lowest probability called present and the next one below
    (or zero), so that rounding in a table moves no row across it.

    Choose on out-of-fold predictions, never on the rows that will be reported.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    probabilities
        In [0, 1], shape ``(N, F)``.
    rule
        What to maximise; ``"f1"``.

    Returns
    -------
    FloatArray
        Shape ``(F,)``; :data:`NEVER` for a finding without a labelled positive, since nothing
        supports ever calling it.
    """
    quality = _THRESHOLD_RULES[rule]
    probabilities = _require_finite(np.asarray(probabilities, dtype=np.float64))
    columns = zip(targets.T, probabilities.T, strict=True)
    return np.array([_choose_threshold(t, p, quality) for t, p in columns], dtype=np.float64)


def _choose_threshold(
    targets: Array, probabilities: FloatArray, quality: Callable[[Array, Array, Array], FloatArray]
) -> float:
    labelled = ~np.isnan(targets)
    order = np.argsort(-probabilities[labelled], kind="stable")
    present = targets[labelled][order] == 1
    if not present.any():
        return NEVER
    descending = probabilities[labelled][order]
    last = np.flatnonzero(np.append(descending[1:] < descending[:-1], True))  # of each tie
    candidates = descending[last]
    tp = present.cumsum()[last]
    fp = last + 1 - tp
    best = int(np.argmax(quality(tp, fp, tp[-1] - tp)))
    below = candidates[best + 1] if best + 1 < len(candidates) else 0.0
    half_way = float(candidates[best] + below) / 2
    return half_way if half_way > below else float(candidates[best])


def confusion_counts(
    targets: Array, decisions: NDArray[np.bool_], weights: Array | None = None
) -> FloatArray:
    """Count true and false calls of every finding, over its labelled rows.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    decisions
        Where a finding is called present, shape ``(N, F)``.
    weights
        How often each row counts, one weighting per resample, shape ``(R, N)``; None counts each
        row once.

    Returns
    -------
    FloatArray
        Whole numbers, columns as :data:`CONFUSION_COLUMNS`, shape ``(F, 4)``, with weights
        ``(R, F, 4)``.
    """
    present, absent = targets == 1, targets == 0
    cells = (present & decisions, absent & decisions, present & ~decisions, absent & ~decisions)
    if weights is None:
        return np.stack([cell.sum(axis=0, dtype=np.float64) for cell in cells], axis=-1)
    # In the weights' own type BLAS does it; float32 counts are exact below 2**24 rows.
    return np.stack([weights @ cell.astype(weights.dtype) for cell in cells], axis=-1).astype(
        np.float64
    )


class Rates(NamedTuple):
    """What four counts say about a finding, each of shape ``(..., F)``, NaN where undefined."""

    f1: FloatArray
    sensitivity: FloatArray
    specificity: FloatArray
    ppv: FloatArray
    npv: FloatArray
    balanced_accuracy: FloatArray


def rates(confusion: FloatArray) -> Rates:
    """Derive F1, sensitivity, specificity, PPV, NPV and balanced accuracy from counts.

    Parameters
    ----------
    confusion
        Counts as :func:`confusion_counts` gives them, shape ``(..., F, 4)``.
    """
    tp, fp, fn, tn = np.moveaxis(confusion, -1, 0)
    sensitivity, specificity = _divide(tp, tp + fn), _divide(tn, tn + fp)
    return Rates(
        f1=_f1(tp, fp, fn),
        sensitivity=sensitivity,
        specificity=specificity,
        ppv=_divide(tp, tp + fp),
        npv=_divide(tn, tn + fn),
        balanced_accuracy=(sensitivity + specificity) / 2,
    )


def micro_f1(confusion: FloatArray) -> FloatArray:
    """F1 of the counts summed over findings, ``(..., F, 4)`` -> ``(...)``."""
    tp, fp, fn, _ = np.moveaxis(confusion.sum(axis=-2), -1, 0)
    return _f1(tp, fp, fn)


def label_accuracy(confusion: FloatArray) -> FloatArray:
    """Share of labelled cells decided rightly, ``(..., F, 4)`` -> ``(...)``."""
    tp, _, _, tn = np.moveaxis(confusion.sum(axis=-2), -1, 0)
    return _divide(tp + tn, confusion.sum(axis=(-2, -1)))


def label_accuracy_all_negative(confusion: FloatArray) -> FloatArray:
    """Label accuracy of calling nothing present: the share of labelled cells that are absent."""
    _, fp, _, tn = np.moveaxis(confusion.sum(axis=-2), -1, 0)
    return _divide(fp + tn, confusion.sum(axis=(-2, -1)))


def exact_matches(targets: Array, decisions: NDArray[np.bool_]) -> FloatArray:
    """1 where all labelled findings of a row are decided rightly, else 0; NaN if none is labelled.

    Shape ``(N, F)`` -> ``(N,)``; the exact match ratio is its :func:`weighted_mean`.
    """
    labelled = ~np.isnan(targets)
    is_right = (~labelled | (decisions == (targets == 1))).all(axis=1)
    return np.where(labelled.any(axis=1), is_right, np.nan)


# --- calibration ---------------------------------------------------------------------------------


def squared_errors(targets: Array, probabilities: Array) -> FloatArray:
    """Squared error per cell, NaN where unlabelled, ``(N, F)``; the mean is the Brier score."""
    return np.square(np.asarray(probabilities, dtype=np.float64) - targets)


def log_losses(targets: Array, probabilities: Array) -> FloatArray:
    """Cross-entropy of every cell in nats, NaN where unlabelled, ``(N, F)``.

    Probabilities are kept a rounding step of float64 away from 0 and 1, as scikit-learn does, so
    that one confident mistake costs 36 nats and not infinity.
    """
    step = np.finfo(np.float64).eps
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), step, 1 - step)
    losses = -np.log(np.where(targets == 1, clipped, 1 - clipped))
    return np.where(np.isnan(targets), np.nan, losses)


def expected_calibration_error(
    targets: Array, probabilities: Array, n_bins: int = N_CALIBRATION_BINS
) -> FloatArray:
    """Mean gap between stated probability and observed frequency, per finding.

    Rows fall into `n_bins` bins of equal width over [0, 1], the upper edge belonging to the bin
    below it; gaps are averaged by the number of rows (Guo et al., "On Calibration of Modern Neural
    Networks", 2017). It is biased upwards where bins hold few rows.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    probabilities
        In [0, 1], shape ``(N, F)``.
    n_bins
        Number of bins.

    Returns
    -------
    FloatArray
        In [0, 1], shape ``(F,)``; NaN for a finding without labels.
    """
    edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    excess = np.asarray(probabilities, dtype=np.float64) - targets
    bins = np.searchsorted(edges, probabilities, side="left")
    labelled = ~np.isnan(targets)
    # Count times gap is the bin's summed excess, so the counts cancel.
    summed_gap = np.array(
        [
            np.abs(np.bincount(b[ok], weights=e[ok], minlength=n_bins)).sum()
            for b, e, ok in zip(bins.T, excess.T, labelled.T, strict=True)
        ]
    )
    return _divide(summed_gap, labelled.sum(axis=0))


def weighted_mean(values: Array, weights: Array | None = None) -> FloatArray:
    """Mean over rows, leaving NaN out.

    Parameters
    ----------
    values
        Shape ``(N, ...)`` with at most one further axis.
    weights
        How often each row counts, shape ``(R, N)``; None counts each row once.

    Returns
    -------
    FloatArray
        Shape ``(...)``, with weights ``(R, ...)``; NaN where no row counts.
    """
    counted = ~np.isnan(values)
    row_weights = np.ones(len(values)) if weights is None else weights
    return _divide(
        row_weights @ np.where(counted, values, 0.0),
        row_weights @ counted.astype(row_weights.dtype),
    )


# --- bootstrap -----------------------------------------------------------------------------------


def bootstrap_weights(
    groups: Array, n_resamples: int, seed: int, *, first: int = 0
) -> NDArray[np.float32]:
    """How often each row appears when whole groups are drawn with replacement.

    The cluster bootstrap of Field and Welsh ("Bootstrapping clustered data", 2007): as many groups
    as there are, drawn with replacement, each with all its rows. Two images of one study are then
    in or out together, as they would be in another hospital's sample; drawing rows instead makes
    intervals too narrow.

    Parameters
    ----------
    groups
        Study (or patient) of every row, shape ``(N,)``.
    n_resamples, seed
        Resample ``r`` depends on `seed` and its number only, so resamples can be made in parts.
    first
        Number of the first resample.

    Returns
    -------
    NDArray[np.float32]
        Whole numbers, shape ``(R, N)``, rows of one group alike, in memory with the resamples of a
        row side by side.
    """
    names, codes = np.unique(groups, return_inverse=True)
    n_groups = len(names)
    drawn = np.empty((n_groups, n_resamples), dtype=np.float32)
    for column in range(n_resamples):
        rng = np.random.default_rng([seed, first + column])
        drawn[:, column] = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
    weights: NDArray[np.float32] = drawn[codes].T
    return weights


def bootstrap(
    statistics: Callable[[NDArray[np.float32]], dict[str, FloatArray]],
    groups: Array,
    n_resamples: int,
    seed: int,
) -> dict[str, FloatArray]:
    """Evaluate statistics on every resample of the groups, a chunk of resamples at a time.

    Parameters
    ----------
    statistics
        Takes weights ``(R, N)`` and returns named arrays ``(R, ...)``. Two models whose statistics
        are computed by one such function are compared on the same resamples, pair by pair.
    groups
        Study (or patient) of every row, shape ``(N,)``.
    n_resamples, seed
        As in :func:`bootstrap_weights`; the chunks change nothing.

    Returns
    -------
    dict[str, FloatArray]
        The same names, shape ``(n_resamples, ...)``.

    Notes
    -----
    A chunk's weights take at most 16 MiB (or one resample), whatever N is, and what
    :class:`RankedScores` makes of them about 100 MiB.
    """
    codes = np.unique(groups, return_inverse=True)[1]
    n_per_chunk = max(1, _CHUNK_BYTES // (4 * max(1, len(codes))))
    chunks = []
    for first in range(0, n_resamples, n_per_chunk):
        n_now = min(n_per_chunk, n_resamples - first)
        chunks.append(statistics(bootstrap_weights(codes, n_now, seed, first=first)))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


class Interval(NamedTuple):
    """Bounds of a percentile interval, and how many resamples could not say anything."""

    low: FloatArray
    high: FloatArray
    n_undefined: NDArray[np.int64]


def percentile_interval(resampled: FloatArray, level: float = 0.95) -> Interval:
    """Percentile interval over the resamples in which the statistic is defined.

    Parameters
    ----------
    resampled
        Shape ``(R, ...)``, NaN where a resample leaves the statistic undefined (a rare finding
        whose only studies were not drawn).
    level
        Share of resamples inside, in (0, 1).

    Returns
    -------
    Interval
        Arrays of shape ``(...)``; NaN bounds where every resample is undefined.
    """
    undefined = np.isnan(resampled)
    n_undefined = undefined.sum(axis=0)
    tail = (1 - level) / 2
    bounds = np.full((2, *resampled.shape[1:]), np.nan)
    defined = n_undefined < len(resampled)
    bounds[:, defined] = np.nanquantile(resampled[:, defined], [tail, 1 - tail], axis=0)
    return Interval(bounds[0], bounds[1], n_undefined)


class RankedScores:
    """Scores of every finding sorted once, for AUROC and AP under any number of weightings."""

    def __init__(self, targets: Array, scores: Array) -> None:
        _require_finite(scores)
        self._rankings = [_rank(t, s) for t, s in zip(targets.T, scores.T, strict=True)]

    def auroc_and_ap(self, weights: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
        """AUROC and AP as if every row stood there as often as its weight says.

        Parameters
        ----------
        weights
            Shape ``(R, N)``, not negative; as :func:`bootstrap_weights` lays them out in memory
            for speed.

        Returns
        -------
        tuple[FloatArray, FloatArray]
            Both of shape ``(R, F)``, NaN where :func:`auroc` would be. Ties are exact.
        """
        by_row = np.ascontiguousarray(weights.T)
        pairs = [_auroc_and_ap(ranking, by_row) for ranking in self._rankings]
        return np.stack([pair[0] for pair in pairs], -1), np.stack([pair[1] for pair in pairs], -1)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Labelled rows of one finding from the highest score down, cut around its positives.

    AUROC and AP only look at the scores that a positive has, called steps here. So it is enough
    to sum weights between the places where steps start and end, which are few when the finding
    is rare.
    """

    rows: NDArray[np.intp]  # (n,)
    cuts: NDArray[np.intp]  # (C,) strictly increasing places in `rows`, the first is 0
    step_starts: NDArray[np.intp]  # (S,) numbers of the cuts where tied scores start ...
    step_ends: NDArray[np.intp]  # (S,) ... and end; C stands for the end of `rows`
    positives: NDArray[np.intp]  # (P,) rows in the same order
    positive_starts: NDArray[np.intp]  # (S,) places in `positives` where steps start


def _rank(targets: Array, scores: Array) -> _Ranking:
    rows = np.flatnonzero(~np.isnan(targets))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    descending = scores[rows]
    tie_starts = np.flatnonzero(np.append(True, descending[1:] < descending[:-1])[: len(rows)])
    tie_ends = np.append(tie_starts[1:], len(rows)).astype(np.intp)[: len(tie_starts)]

    places = np.flatnonzero(targets[rows] == 1)  # of the positives, (P,)
    ties = np.searchsorted(tie_starts, places, side="right") - 1
    steps, positive_starts = np.unique(ties, return_index=True)
    starts, ends = tie_starts[steps], tie_ends[steps]
    cuts = np.unique(np.concatenate([[0], starts, ends[ends < len(rows)]])).astype(np.intp)
    return _Ranking(
        rows=rows,
        cuts=cuts,
        step_starts=np.searchsorted(cuts, starts),
        step_ends=np.searchsorted(cuts, ends),
        positives=rows[places],
        positive_starts=positive_starts,
    )


def _auroc_and_ap(ranking: _Ranking, by_row: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """AUROC and AP of one finding for weights ``(N, R)``, both ``(R,)``."""
    n_resamples = by_row.shape[1]
    if not len(ranking.positives):
        undefined = np.full(n_resamples, np.nan)
        return undefined, undefined
    above = np.zeros((len(ranking.cuts) + 1, n_resamples))  # weight above each cut
    between = np.add.reduceat(by_row[ranking.rows], ranking.cuts, axis=0)
    np.cumsum(between, axis=0, out=above[1:])
    step = np.add.reduceat(by_row[ranking.positives], ranking.positive_starts, axis=0)
    tp = np.cumsum(step, axis=0, dtype=np.float64)  # (S, R)

    called = above[ranking.step_ends]
    n_present, n_absent = tp[-1], above[-1] - tp[-1]
    # Negatives above a step count as lost, those tied with it as half lost.
    fp_twice = (called - tp) + (above[ranking.step_starts] - (tp - step))
    n_won = (step * (n_absent - fp_twice / 2)).sum(axis=0)
    precision = np.divide(tp, called, out=np.zeros_like(tp), where=called > 0)
    precision_sum = (step * precision).sum(axis=0)
    return (
        _divide(n_won, n_present * n_absent),
        _divide(precision_sum, np.where(n_absent > 0, n_present, 0)),
    )
