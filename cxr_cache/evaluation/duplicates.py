"""Embeddings and file digests -> pairs of images that may be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

N_NEIGHBOURS: Final = 10
"""Neighbours that are looked up for every image."""


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """The nearest other images of every image, P of them, nearest first.

    Distances are 1 - cosine between embeddings less their mean. Without subtracting it, all
    radiographs look alike to most encoders.
    """

    rows: NDArray[np.intp]
    """``(N, P)``."""
    distances: NDArray[np.float64]
    """``(N, P)``, from 0 to 2."""

    @property
    def usual_distance(self) -> float:
        """Median distance to the last of the P: how close unrelated images come."""
        return float(np.median(self.distances[:, -1]))

    def close_pairs(self, closeness: float) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Pairs closer than `closeness` times the usual distance, and their distances.

        What is close depends on the encoder: the median image's nearest neighbour lies at a cosine
        of 0.6 for one and 0.97 for another. So the data set itself says what is usual.

        Returns
        -------
        pairs
            ``(n, 2)``, the smaller row first, each pair once, nearest first.
        distances
            ``(n,)``.
        """
        return self.pairs_within(closeness * self.usual_distance)

    def pairs_within(self, distance: float) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Pairs closer than `distance`, and their distances; as :meth:`close_pairs`."""
        own, n_each = np.arange(len(self.rows)), self.rows.shape[1]
        pairs = np.stack([np.repeat(own, n_each), self.rows.ravel()], axis=1)
        distances = self.distances.ravel()
        is_close = distances < distance
        pairs, first = np.unique(np.sort(pairs[is_close], axis=1), axis=0, return_index=True)
        distances = distances[is_close][first]
        order = np.argsort(distances, kind="stable")
        return pairs[order], distances[order]


def find_neighbours(embeddings: NDArray[np.float32], *, less_mean: bool = True) -> Neighbourhood:
    """Look up the nearest others of every image, exactly.

    Parameters
    ----------
    embeddings
        Encoder scale, shape ``(N, D)``, finite, N at least 3.
    less_mean
        Subtract the mean over images first. Without it, distances are 1 - cosine of what is given.

    Notes
    -----
    scikit-learn compares block by block and keeps the nearest only: memory grows with N, time with
    its square.
    """
    mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = embeddings - mean if less_mean else embeddings.copy()
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.float32(1e-12))
    n_wanted = min(N_NEIGHBOURS + 1, len(centred))
    search = NearestNeighbors(n_neighbors=n_wanted, algorithm="brute", metric="sqeuclidean")
    squares, rows = search.fit(centred).kneighbors(centred)
    # An image is among its own neighbours, but behind its copies it need not come first.
    is_self = rows == np.arange(len(rows))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    others = (len(rows), n_wanted - 1)
    return Neighbourhood(rows[~is_self].reshape(others), squares[~is_self].reshape(others) / 2)


def find_same_digests(digests: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Pairs of rows with equal digests, ``(N, bytes) -> (n, 2)``: the first of each with the rest.

    Rows of zeros have no digest (embeddings that were imported). A group on two sides of a split,
    or with two labels, has at least one such pair that shows it.
    """
    known = np.flatnonzero(digests.any(axis=1))
    _, first, group = np.unique(digests[known], axis=0, return_index=True, return_inverse=True)
    pairs = np.stack([known[first[group.ravel()]], known], axis=1)
    distinct: NDArray[np.intp] = pairs[pairs[:, 0] != pairs[:, 1]]
    return distinct
