"""The bootstrap over patients or studies, and AUROC and AP under any number of its weightings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cxr_cache.errors import ConfigError
from cxr_cache.metrics.scores import Array, FloatArray, divide, number_names, require_finite

# Size of the weights of one chunk of resamples. A chunk fits into the caches, since what is
# computed from it takes several times as much.
_CHUNK_BYTES = 2**22
_MIN_PER_CHUNK = 16  # with fewer resamples, going through the rows costs more than summing them

_STEPS_AT_ONCE = 2048

METHOD: Final = "Bayesian bootstrap"
"""How :func:`bootstrap` draws weights, as reports name it."""


def bootstrap(
    statistics: Callable[[NDArray[np.float32]], dict[str, FloatArray]],
    groups: Array,
    n_resamples: int,
    seed: int,
) -> dict[str, FloatArray]:
    """Evaluate statistics on every resample of the groups, by the Bayesian bootstrap.

    In each resample every group gets one random exponential weight, of mean 1 and variance 1
    (Rubin, "The Bayesian bootstrap", 1981), which all its rows share. Two images of one study then
    count more or less together, as they would in another hospital's sample. Weights for single rows
    would make intervals too narrow (Field and Welsh, "Bootstrapping clustered data", 2007).

    Drawing groups with replacement would give whole-numbered weights of the same mean and, with
    many groups, the same variance. But it leaves a third of the groups out of each resample, and
    with them every positive of some rare finding. Here no group has weight zero, so what is defined
    on the rows is defined in every resample, for all findings at once.

    Parameters
    ----------
    statistics
        Takes weights ``(R, N)``, float32 and positive, and returns named arrays ``(R, ...)``. In
        memory the weights of a row lie side by side. To compare two models on the same resamples,
        pair by pair, compute the statistics of both by one such function.
    groups
        Study (or patient) of every row, shape ``(N,)``.
    n_resamples, seed
        Resample ``r`` depends on `seed` and its number only, and not on how resamples are chunked.

    Returns
    -------
    dict[str, FloatArray]
        The same names, shape ``(n_resamples, ...)``.

    Raises
    ------
    ConfigError
        There are fewer than two resamples.

    Notes
    -----
    The weights of a chunk take 4 MiB, or as much as 16 resamples need.
    """
    chunks = list(_in_chunks(statistics, groups, n_resamples, seed))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def bootstrap_variance(
    statistics: Callable[[NDArray[np.float32]], dict[str, FloatArray]],
    groups: Array,
    n_resamples: int,
    seed: int,
) -> dict[str, FloatArray]:
    """Compute variances over the resamples of :func:`bootstrap`, without keeping all of them.

    Parameters and errors are those of :func:`bootstrap`; what a resample leaves undefined must be
    undefined in all. Gives the same names, shape ``(...)``.
    """
    n_before, means, squares = 0, dict[str, FloatArray](), dict[str, FloatArray]()
    for chunk in _in_chunks(statistics, groups, n_resamples, seed):
        for name, values in chunk.items():
            n, mean = len(values), values.mean(axis=0)
            off = mean - means.get(name, 0.0)
            share = n / (n_before + n)
            means[name] = means.get(name, 0.0) + share * off
            spread = np.square(values - mean).sum(axis=0) + n_before * share * np.square(off)
            squares[name] = squares.get(name, 0.0) + spread
        n_before += n
    return {name: total / n_resamples for name, total in squares.items()}


def _in_chunks(
    statistics: Callable[[NDArray[np.float32]], dict[str, FloatArray]],
    groups: Array,
    n_resamples: int,
    seed: int,
) -> Iterator[dict[str, FloatArray]]:
    if n_resamples < 2:
        raise ConfigError(f"{n_resamples} resamples show no spread; 2 or more do.")
    names, codes = number_names(groups)
    n_per_chunk = max(_MIN_PER_CHUNK, _CHUNK_BYTES // (4 * max(1, len(codes))))
    for first in range(0, n_resamples, n_per_chunk):
        resamples = range(first, min(first + n_per_chunk, n_resamples))
        yield statistics(draw_weights(codes, len(names), resamples, seed))


def draw_weights(
    codes: NDArray[np.intp], n_groups: int, resamples: range, seed: int
) -> NDArray[np.float32]:
    """Draw the weights of :func:`bootstrap` for rows whose groups are numbered, ``(N,)``.

    They are positive, ``(R, N)``, and equal for all rows of a group.
    """
    drawn = np.empty((n_groups, len(resamples)), dtype=np.float32)
    for column, resample in enumerate(resamples):
        rng = np.random.default_rng([seed, resample])
        drawn[:, column] = rng.standard_exponential(n_groups, dtype=np.float32)
    np.maximum(drawn, np.finfo(np.float32).tiny, out=drawn)  # one draw in 2**24 is zero
    weights: NDArray[np.float32] = drawn[codes].T
    return weights


class RankedScores:
    """Scores of every finding, sorted once for AUROC and AP under any number of weightings.

    A weighting changes how much each row counts, but never the order. So the rows between two
    scores of positives can be summed as one. That is the product of a sparse matrix, which is built
    here, with the weights.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    scores
        Logits or probabilities, finite, shape ``(N, F)``.
    pooled
        Treat all cells as one finding, for micro averages; F is then 1.

    Raises
    ------
    ValueError
        A score is NaN or infinite.
    """

    def __init__(self, targets: Array, scores: Array, *, pooled: bool = False) -> None:
        require_finite(scores)
        N, F = targets.shape
        if pooled:
            rows = np.repeat(np.arange(N, dtype=np.int32), F)
            columns = [(targets.ravel(), scores.ravel(), rows)]
        else:
            rows = np.arange(N, dtype=np.int32)
            columns = [(t, s, rows) for t, s in zip(targets.T, scores.T, strict=True)]
        ones = np.ones(len(rows))  # in memory, and in the caches, once for all findings
        self._rankings = [_rank(*column, ones, n_rows=N) for column in columns]

    def auroc_and_ap(self, weights: Array) -> tuple[FloatArray, FloatArray]:
        """Compute AUROC and AP, ``(R, F)`` each, as if rows occurred as often as weights say.

        AP is the mean, over positives, of the precision among the rows that score at least as high.
        Both are NaN where :func:`cxr_cache.metrics.scores.auroc` would be; tied scores are handled
        exactly, as in scikit-learn. Weights, ``(R, N)``, are not negative, and quickest in the
        memory layout of :func:`bootstrap`.
        """
        by_row = np.ascontiguousarray(weights.T, dtype=np.float64)
        pairs = [_auroc_and_ap(ranking, by_row) for ranking in self._rankings]
        return np.stack([pair[0] for pair in pairs], -1), np.stack([pair[1] for pair in pairs], -1)

    def read_curves(
        self, weights: Array, places: Sequence[tuple[FloatArray, FloatArray] | None]
    ) -> list[tuple[FloatArray, FloatArray] | None]:
        """Read each finding's ROC and precision-recall curves, as if weights were counts.

        Parameters
        ----------
        weights
            As in :meth:`auroc_and_ap`.
        places
            Of each finding, shares of false alarms (1 - specificity) at which the sensitivity is
            read, and recalls at which the precision is, ``(P,)`` each; None for a finding that is
            left out. The precision is that of the highest threshold that reaches the recall.

        Returns
        -------
        list
            Of each finding sensitivity and precision, ``(R, P)`` each, or None.
        """
        by_row = np.ascontiguousarray(weights.T, dtype=np.float64)
        return [
            None if at is None else _sensitivity_and_ppv(ranking, by_row, *at)
            for ranking, at in zip(self._rankings, places, strict=True)
        ]


class RankedWithin:
    """Scores of rows in several folds, of which only those of one fold can be compared.

    The models of two folds differ, so a score of one says nothing beside a score of the other. The
    AUROC is the share of pairs, a positive and a negative of one fold, that are in the right order:
    the mean of the folds' AUROCs, weighted by their numbers of pairs. The AP is the mean, over the
    positives, of the precision among the rows of the own fold that score at least as high: the mean
    of the folds' APs, weighted by their positives. A fold without a positive, or without a
    negative, counts in neither. Parameters are those of :class:`RankedScores`, and the fold of
    every row, ``(N,)``.
    """

    def __init__(
        self, targets: Array, scores: Array, folds: Array, *, pooled: bool = False
    ) -> None:
        self._pooled = pooled
        self._parts = []
        for fold in np.unique(folds):
            rows = np.flatnonzero(folds == fold)
            ranked = RankedScores(targets[rows], scores[rows], pooled=pooled)
            self._parts.append((rows, ranked, targets[rows] == 1, targets[rows] == 0))

    def auroc_and_ap(self, weights: Array) -> tuple[FloatArray, FloatArray]:
        """Compute AUROC and AP, ``(R, F)`` each, for weights ``(R, N)``; NaN where undefined."""
        sums: Any = 0  # pairs in order, pairs, precisions and positives, (4, R, F)
        for rows, ranked, present, absent in self._parts:
            own = np.asarray(weights[:, rows], np.float64)
            n_present, n_absent = own @ present, own @ absent
            if self._pooled:
                n_present, n_absent = (n.sum(axis=1, keepdims=True) for n in (n_present, n_absent))
            n_present = np.where(n_absent > 0, n_present, 0)
            n_pairs = n_present * n_absent
            areas, precisions = (np.nan_to_num(of) for of in ranked.auroc_and_ap(own))
            sums = sums + np.stack([areas * n_pairs, n_pairs, precisions * n_present, n_present])
        return divide(sums[0], sums[1]), divide(sums[2], sums[3])


def rank_scores(
    targets: Array, scores: Array, folds: Array | None, *, pooled: bool = False
) -> RankedScores | RankedWithin:
    """Sort the scores of one model; or of a model for each fold, where rows have `folds`."""
    if folds is None:
        return RankedScores(targets, scores, pooled=pooled)
    return RankedWithin(targets, scores, folds, pooled=pooled)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Labelled rows of one finding in order of their scores, as matrices of ones that sum weights.

    A step is a score that at least one positive has. There are S steps, from the highest score
    down.
    """

    positives: sparse.csr_array  # (S, N): positives of each step
    between: sparse.csr_array  # (S + 1, N): negatives above each step and below the one before
    tied: sparse.csr_array | None  # (S, N): negatives with a step's score; None if there are none


def _rank(
    targets: Array, scores: Array, row_of: NDArray[np.int32], ones: FloatArray, *, n_rows: int
) -> _Ranking:
    """Sort the cells of one finding; `row_of` names the row that each cell belongs to."""
    labelled = np.flatnonzero(~np.isnan(targets))
    order = labelled[np.argsort(-scores[labelled], kind="stable")]
    descending = scores[order]
    ties = np.cumsum(np.append(False, descending[1:] < descending[:-1])[: len(order)])
    present, rows = targets[order] == 1, row_of[order]

    steps, step_of = np.unique(ties[present], return_inverse=True)
    negative_ties, negatives = ties[~present], rows[~present]
    places = np.searchsorted(steps, negative_ties)
    is_tied = np.append(steps, -1)[places] == negative_ties

    def sums(rows: NDArray[np.int32], places: NDArray[np.intp], n_sums: int) -> sparse.csr_array:
        starts = np.searchsorted(places, np.arange(n_sums + 1))
        if len(rows) < 2**31:
            starts = starts.astype(np.int32)  # or all indices would take eight bytes
        return sparse.csr_array((ones[: len(rows)], rows, starts), shape=(n_sums, n_rows))

    return _Ranking(
        positives=sums(rows[present], step_of, len(steps)),
        between=sums(negatives[~is_tied], places[~is_tied], len(steps) + 1),
        tied=sums(negatives[is_tied], places[is_tied], len(steps)) if is_tied.any() else None,
    )


class _Steps(NamedTuple):
    """Weights at each step of one finding, ``(S, R)`` each, from the highest score down."""

    positives: FloatArray
    """Positives with the step's score."""
    above: FloatArray
    """Negatives with a higher score."""
    tied: FloatArray
    """Negatives with the same score."""
    n_absent: FloatArray
    """All negatives, ``(R,)``."""


def _sum_steps(ranking: _Ranking, by_row: FloatArray) -> _Steps:
    """Sum weights, ``(N, R)``, at each step of a finding that has a positive."""
    positives = ranking.positives @ by_row
    above = _accumulate(ranking.between @ by_row)  # (S + 1, R)
    n_absent, above = above[-1], above[:-1]
    if ranking.tied is None:
        return _Steps(positives, above, np.zeros((1, 1)), n_absent)
    tied = ranking.tied @ by_row
    tied_so_far = _accumulate(tied.copy())
    return _Steps(positives, above + tied_so_far - tied, tied, n_absent + tied_so_far[-1])


def _accumulate(values: FloatArray) -> FloatArray:
    """Replace each row of ``(S, R)`` by the sum of all rows up to it, as ``np.cumsum`` adds them.

    That goes through all rows once for every column. A part at a time, they stay in the cache.
    """
    for start in range(0, len(values), _STEPS_AT_ONCE):
        part = values[start : start + _STEPS_AT_ONCE]
        if start:
            part[0] += values[start - 1]
        np.cumsum(part, axis=0, out=part)
    return values


def _auroc_and_ap(ranking: _Ranking, by_row: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Compute AUROC and AP of one finding for weights ``(N, R)``, both ``(R,)``."""
    if not ranking.positives.shape[0]:
        undefined = np.full(by_row.shape[1], np.nan)
        return undefined, undefined
    step, above, tied, n_absent = _sum_steps(ranking, by_row)
    tp = _accumulate(step.copy())
    n_present = tp[-1]
    # A negative above a step is lost, a tied one half.
    n_won = np.einsum("sr,sr->r", step, n_absent - above - tied / 2)
    called = tp + above + tied
    precision = np.divide(tp, called, out=np.zeros_like(tp), where=called > 0)
    precision_sum = np.einsum("sr,sr->r", step, precision)
    return (
        divide(n_won, n_present * n_absent),
        divide(precision_sum, np.where(n_absent > 0, n_present, 0)),
    )


def _sensitivity_and_ppv(
    ranking: _Ranking, by_row: FloatArray, false_alarms: FloatArray, recalls: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Read the curves of one finding for weights ``(N, R)`` at P places; both ``(R, P)``."""
    step, above, tied, n_absent = (
        np.ascontiguousarray(each.T) for each in _sum_steps(ranking, by_row)
    )
    tp = np.cumsum(step, axis=1)  # (R, S)
    n_present, n_absent = tp[:, -1:], n_absent[:, None]
    ends = np.minimum((above + tied) / n_absent, 1)
    n_passed = _count_below(ends, false_alarms, side="right")  # steps wholly left of each place
    padded = np.pad(tp, ((0, 0), (1, 0)))
    found = np.take_along_axis(padded, n_passed, axis=1)
    if tied.any():  # the curve climbs a step of ties along a straight line
        tied = np.broadcast_to(tied, step.shape)
        at = np.minimum(n_passed, step.shape[1] - 1)
        begun, width, height = (np.take_along_axis(of, at, axis=1) for of in (above, tied, step))
        climbed = divide(false_alarms * n_absent - begun, width)
        inside = (n_passed < step.shape[1]) & (climbed > 0)
        found = found + np.where(inside, height * np.minimum(climbed, 1), 0)
    precision = divide(tp, tp + above + tied)
    n_before = _count_below(tp / n_present, recalls, side="left")
    reached = np.minimum(n_before, step.shape[1] - 1)
    return found / n_present, np.take_along_axis(precision, reached, axis=1)


def _count_below(
    ascending: FloatArray, places: FloatArray, *, side: Literal["left", "right"]
) -> NDArray[np.intp]:
    """Count the values of each row, ``(R, S)`` in [0, 1], below places ``(P,)``: ``(R, P)``.

    All rows are searched at once, each shifted beyond the one before.
    """
    n_rows, n_values = ascending.shape
    shifts = 2.0 * np.arange(n_rows)[:, None]
    found = np.searchsorted((ascending + shifts).ravel(), (places + shifts).ravel(), side=side)
    below: NDArray[np.intp] = found.reshape(n_rows, -1) - n_values * np.arange(n_rows)[:, None]
    return below
