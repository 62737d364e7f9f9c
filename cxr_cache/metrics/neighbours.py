"""Nearest neighbours of many vectors, in time that grows with their number and not its square."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

_PER_CELL: Final = 1000
"""Vectors of a cell, on average."""
_N_PROBES: Final = 8
"""Cells in which each vector's neighbours are looked for."""
_CELLS_AT_ONCE: Final = 2**22
"""Products that are held in memory: 16 MB."""
_NEAR: Final = 0.01
"""Distance below which rounding of a product in float32 counts."""


def search_cells(
    vectors: Vectors, n_neighbours: int, *, seed: int = 0
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Look up near others of every vector, which need not be the nearest.

    Vectors drawn at random are the centres of cells, and each vector is put into the cell of its
    nearest centre. Only the vectors of the :data:`_N_PROBES` cells with the nearest centres are
    compared with it (an inverted file, as Jégou, Douze and Schmid use it in "Product quantization
    for nearest neighbor search", 2011). The number of comparisons per vector stays the same,
    whatever the number of vectors. Copies have the same nearest centres, so that they are found;
    of neighbours further away some are missed, and others stand in their place.

    Parameters
    ----------
    vectors
        Of unit length, ``(N, D)``; N is much larger than a cell.
    n_neighbours
        P, the number of others that are wanted.
    seed
        Chooses the centres.

    Returns
    -------
    rows, distances
        The others, nearest first, and 1 - cosine, ``(N, P)`` each. A distance is never smaller than
        that to the nearest of the same rank. Where so few others were compared, the row is -1 and
        the distance 2.
    """
    n_rows = len(vectors)
    centres = np.random.default_rng(seed).choice(n_rows, max(1, n_rows // _PER_CELL), replace=False)
    probed = _find_probes(vectors, vectors[np.sort(centres)])  # (N, probes), the nearest first
    members, member_starts = _sort_by(probed[:, 0], len(centres))
    asking, asking_starts = _sort_by(probed.ravel(), len(centres))
    asking //= probed.shape[1]
    rows = np.full((n_rows, n_neighbours + 1), -1, np.intp)  # it is among its own neighbours
    cosines = np.full((n_rows, n_neighbours + 1), -1, np.float32)
    for cell in range(len(centres)):
        own = members[member_starts[cell] : member_starts[cell + 1]]
        queries = asking[asking_starts[cell] : asking_starts[cell + 1]]
        of_own = np.ascontiguousarray(vectors[own].T)
        for part in _split(queries, max(len(own), vectors.shape[1])):
            _keep_nearest(rows, cosines, part, own, vectors[part] @ of_own)
    cosines[rows == np.arange(n_rows)[:, None]] = -2  # itself
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :n_neighbours]
    rows = np.take_along_axis(rows, order, axis=1)
    distances = 1 - np.take_along_axis(cosines, order, axis=1).astype(np.float64)
    near = np.flatnonzero(distances.min(axis=1) < _NEAR)
    for part in _split(near, n_neighbours * vectors.shape[1]):
        apart = vectors[part][:, None] - vectors[rows[part]]
        exact = np.square(apart, dtype=np.float64).sum(axis=-1) / 2
        distances[part] = np.where(rows[part] < 0, distances[part], exact)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _find_probes(vectors: Vectors, centres: Vectors) -> NDArray[np.int32]:
    """Numbers of the nearest centres of every vector, the nearest first, ``(N, probes)``."""
    n_probes = min(_N_PROBES, len(centres))
    probed = np.empty((len(vectors), n_probes), np.int32)
    for part in _split(np.arange(len(vectors)), max(centres.shape)):
        cosines = vectors[part] @ centres.T
        nearest = np.argpartition(cosines, -n_probes, axis=1)[:, -n_probes:]
        order = np.argsort(-np.take_along_axis(cosines, nearest, axis=1), axis=1, kind="stable")
        probed[part] = np.take_along_axis(nearest, order, axis=1)
    return probed


def _sort_by(
    numbers: NDArray[np.int32], n_numbers: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Places of each number together, and where those of each number start."""
    order = np.argsort(numbers, kind="stable")
    return order, np.searchsorted(numbers[order], np.arange(n_numbers + 1))


def _split(rows: NDArray[np.intp], n_each: int) -> Iterator[NDArray[np.intp]]:
    """Rows a few at a time, where each is compared with so many."""
    n_at_once = max(1, _CELLS_AT_ONCE // max(1, n_each))
    return (rows[start : start + n_at_once] for start in range(0, len(rows), n_at_once))


def _keep_nearest(
    rows: NDArray[np.intp],
    cosines: Vectors,
    queries: NDArray[np.intp],
    own: NDArray[np.intp],
    found: Vectors,
) -> None:
    """Take what is nearer than the neighbours that are known; `found` is ``(queries, own)``."""
    n = cosines.shape[1]
    if len(own) > n:
        best = np.argpartition(found, -n, axis=1)[:, -n:]
        found, named = np.take_along_axis(found, best, axis=1), own[best]
    else:
        named = np.broadcast_to(own, found.shape)
    both = np.concatenate([cosines[queries], found], axis=1)
    names = np.concatenate([rows[queries], named], axis=1)
    best = np.argpartition(both, -n, axis=1)[:, -n:]
    rows[queries] = np.take_along_axis(names, best, axis=1)
    cosines[queries] = np.take_along_axis(both, best, axis=1)
