"""Neighbours found in cells: copies always, others nearly as near as the nearest."""

from __future__ import annotations

import numpy as np
import pytest

from cxr_cache.metrics import neighbours
from cxr_cache.metrics.neighbours import search_cells


def make_vectors(n: int, seed: int) -> np.ndarray:
    """Clouds around 30 points, as embeddings of images of some kinds are."""
    rng = np.random.default_rng(seed)
    kinds = rng.standard_normal((30, 32))[rng.integers(30, size=n)]
    vectors = (kinds + 0.5 * rng.standard_normal((n, 32))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compare_all(vectors: np.ndarray, n_neighbours: int) -> np.ndarray:
    distances = 1 - vectors.astype(np.float64) @ vectors.T
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, :n_neighbours]


@pytest.mark.parametrize("seed", [0, 1])
def test_copies_are_found_and_others_are_hardly_further(monkeypatch, seed):
    monkeypatch.setattr(neighbours, "_PER_CELL", 50)
    vectors = make_vectors(3000, seed)
    copies = vectors[1000:1100] + np.float32(1e-3)
    vectors[:100] = copies / np.linalg.norm(copies, axis=1, keepdims=True)

    rows, distances = search_cells(vectors, 10)

    assert (rows[:100, 0] == np.arange(1000, 1100)).all()
    assert (rows != np.arange(3000)[:, None]).all()
    given = 1 - np.einsum("nd,npd->np", vectors.astype(np.float64), vectors[rows])
    np.testing.assert_allclose(distances, given, atol=1e-6)
    assert (np.diff(distances, axis=1) > -1e-6).all()
    nearest = compare_all(vectors, 10)
    assert (distances >= nearest - 1e-6).all()
    assert np.median(distances[:, -1] / nearest[:, -1]) < 1.01
    assert [len(set(of)) for of in rows.tolist()] == [10] * 3000


def test_many_copies_and_lonely_cells_are_no_trouble(monkeypatch):
    """More equal vectors than neighbours, and a cell with fewer than are wanted."""
    monkeypatch.setattr(neighbours, "_PER_CELL", 1)
    monkeypatch.setattr(neighbours, "_N_PROBES", 2)
    vectors = make_vectors(60, 0)
    vectors[:25] = vectors[0]

    rows, distances = search_cells(vectors, 10)

    assert (rows != np.arange(60)[:, None]).all()
    assert ((rows >= 0) | (distances == 2)).all()
