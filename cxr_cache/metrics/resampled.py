"""The bootstrap over patients or studies, and AUROC and AP under any number of its weightings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cxr_cache.errors import ConfigError
from cxr_cache.metrics.scores import Array, FloatArray, divide, require_finite

# Size of the weights of one chunk of resamples. A chunk fits into the caches, since what is
# computed from it takes several times as much.
_CHUNK_BYTES = 2**22
_MIN_PER_CHUNK = 16  # with fewer resamples, going through the rows costs more than summing them

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
    if n_resamples < 2:
        raise ConfigError(f"{n_resamples} resamples show no spread; 2 or more do.")
    names, codes = np.unique(groups, return_inverse=True)
    n_per_chunk = max(_MIN_PER_CHUNK, _CHUNK_BYTES // (4 * max(1, len(codes))))
    chunks = []
    for first in range(0, n_resamples, n_per_chunk):
        resamples = range(first, min(first + n_per_chunk, n_resamples))
        chunks.append(statistics(draw_weights(codes, len(names), resamples, seed)))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


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
        self._rankings = [_rank(*column, n_rows=N) for column in columns]

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


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Labelled rows of one finding in order of their scores, as matrices of ones that sum weights.

    A step is a score that at least one positive has. There are S steps, from the highest score
    down.
    """

    positives: sparse.csr_array  # (S, N): positives of each step
    between: sparse.csr_array  # (S + 1, N): negatives above each step and below the one before
    tied: sparse.csr_array | None  # (S, N): negatives with a step's score; None if there are none


def _rank(targets: Array, scores: Array, row_of: NDArray[np.int32], *, n_rows: int) -> _Ranking:
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
        ones = np.ones(len(rows))
        return sparse.csr_array((ones, rows, starts), shape=(n_sums, n_rows))

    return _Ranking(
        positives=sums(rows[present], step_of, len(steps)),
        between=sums(negatives[~is_tied], places[~is_tied], len(steps) + 1),
        tied=sums(negatives[is_tied], places[is_tied], len(steps)) if is_tied.any() else None,
    )


def _auroc_and_ap(ranking: _Ranking, by_row: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Compute AUROC and AP of one finding for weights ``(N, R)``, both ``(R,)``."""
    step = ranking.positives @ by_row  # (S, R)
    if not len(step):
        undefined = np.full(by_row.shape[1], np.nan)
        return undefined, undefined
    tp = np.cumsum(step, axis=0)
    above = np.cumsum(ranking.between @ by_row, axis=0)  # (S + 1, R)
    n_present, n_absent, above = tp[-1], above[-1], above[:-1]
    half_tied: FloatArray | float = 0.0
    if ranking.tied is not None:
        half_tied = (ranking.tied @ by_row) / 2
        tied_so_far = 2 * np.cumsum(half_tied, axis=0)
        n_absent = n_absent + tied_so_far[-1]
        above += tied_so_far - half_tied  # a negative above a step is lost, a tied one half
    n_won = np.einsum("sr,sr->r", step, n_absent - above)
    called = tp + above + half_tied
    precision = np.divide(tp, called, out=np.zeros_like(tp), where=called > 0)
    precision_sum = np.einsum("sr,sr->r", step, precision)
    return (
        divide(n_won, n_present * n_absent),
        divide(precision_sum, np.where(n_absent > 0, n_present, 0)),
    )
