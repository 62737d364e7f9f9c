"""The clustered bootstrap: random weights for whole patients or studies, figures under them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cxr_cache.errors import ConfigError
from cxr_cache.metrics.scores import Array, FloatArray

# Weights of one chunk of resamples. Small enough for the caches; what is made of a chunk takes
# several times as much.
_CHUNK_BYTES = 2**22
_MIN_PER_CHUNK = 16  # below, going through the rows costs more than summing them


def bootstrap_weights(
    groups: Array, n_resamples: int, seed: int, *, first: int = 0
) -> NDArray[np.float32]:
    """Random weights of whole groups, mean 1 and variance 1: the Bayesian bootstrap.

    Each group gets one exponential weight (Rubin, "The Bayesian bootstrap", 1981), which all its
    rows share: two images of one study then count more or less together, as they would in another
    hospital's sample, while weights for single rows make intervals too narrow (Field and Welsh,
    "Bootstrapping clustered data", 2007). Drawing groups with replacement gives whole-numbered
    weights of the same mean and, with many groups, the same variance, but leaves a third of the
    groups out of each resample, and with them every positive of some rare finding. Here no group
    has weight zero, so what is defined on the rows is defined in every resample, for all findings
    at once.

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
        Positive, shape ``(R, N)``, rows of one group alike, in memory with the resamples of a
        row side by side.
    """
    names, codes = np.unique(groups, return_inverse=True)
    return _draw(codes, len(names), range(first, first + n_resamples), seed)


def _draw(
    codes: NDArray[np.intp], n_groups: int, resamples: range, seed: int
) -> NDArray[np.float32]:
    """Weights for rows whose groups are numbered, ``(N,)`` -> ``(R, N)``."""
    drawn = np.empty((n_groups, len(resamples)), dtype=np.float32)
    for column, resample in enumerate(resamples):
        rng = np.random.default_rng([seed, resample])
        drawn[:, column] = rng.standard_exponential(n_groups, dtype=np.float32)
    np.maximum(drawn, np.finfo(np.float32).tiny, out=drawn)  # a zero in 2**24 draws
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

    Raises
    ------
    ConfigError
        There are fewer than two resamples.

    Notes
    -----
    A chunk's weights take 4 MiB, or as much as 16 resamples need.
    """
    if n_resamples < 2:
        raise ConfigError(f"{n_resamples} resamples show no spread; 2 or more do.")
    names, codes = np.unique(groups, return_inverse=True)
    n_per_chunk = max(_MIN_PER_CHUNK, _CHUNK_BYTES // (4 * max(1, len(codes))))
    chunks = []
    for first in range(0, n_resamples, n_per_chunk):
        resamples = range(first, min(first + n_per_chunk, n_resamples))
        chunks.append(statistics(_draw(codes, len(names), resamples, seed)))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
