"""Random damage to everything else that is read: models, run configurations, tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.errors import CxrCacheError
from cxr_cache.models.run import Run, SavedModel

FILES = pytest.mark.parametrize("n_files", [150, pytest.param(2000, marks=pytest.mark.faults)])


def damage(content: bytes, rng: np.random.Generator, reach: int) -> bytes:
    """Cut, extend, overwrite or flip, mostly within the first `reach` bytes."""
    changed, start = bytearray(content), int(rng.integers(min(reach, len(content))))
    kind = rng.integers(4)
    if kind == 0:
        del changed[start:]
    elif kind == 1:
        changed += rng.bytes(int(rng.integers(1, 100)))
    elif kind == 2:
        n_bytes = int(rng.integers(1, 17))
        changed[start : start + n_bytes] = rng.bytes(n_bytes)
    else:
        changed[start] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def read_damaged(path: Path, n_files: int, seed: int, read: Callable[[], object]) -> int:
    """Read each damaged file; any error but our own fails the test. Returns the refusals."""
    content, n_refused = path.read_bytes(), 0
    for number in range(n_files):
        path.write_bytes(damage(content, np.random.default_rng([seed, number]), 2000))
        with contextlib.suppress(CxrCacheError):
            read()
            n_refused -= 1
        n_refused += 1
    path.write_bytes(content)
    return n_refused


@pytest.fixture
def run(fast_path) -> Run:
    run = Run.create(fast_path / "run", {"kind": "train", "findings": ["a", "b"]})
    encoder = {"name": "x", "imported": True, "embedding_width": 4}
    tensors = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
    run.save_model(SavedModel(tensors, ("a", "b"), {"a": 0.5, "b": 0.1}, encoder, {"hidden": []}))
    run.finish()
    return run


@FILES
def test_damaged_models_are_refused_or_whole(run, seed, n_files):
    path = run.path / "model.safetensors"
    n_refused = read_damaged(path, n_files, seed, lambda: Run.open(run.path).load_model())
    print(f"models: {n_refused} of {n_files} refused")
    assert n_refused > n_files / 2


@FILES
def test_damaged_run_configurations_are_refused_or_read(run, seed, n_files):
    n_refused = read_damaged(run.path / "config.json", n_files, seed, lambda: Run.open(run.path))
    print(f"run configurations: {n_refused} of {n_files} refused")
    assert n_refused > 0


@FILES
@pytest.mark.parametrize("name", ["indiana_reports.csv", "indiana_projections.csv"])
def test_damaged_tables_are_refused_or_read(fast_path, seed, n_files, name):
    write_phantoms(fast_path / "data", n_studies=6, image_size_px=64, seed=1)
    n_refused = read_damaged(
        fast_path / "data" / name, n_files, seed, lambda: load_cohort(fast_path / "data")
    )
    print(f"{name}: {n_refused} of {n_files} refused")
    assert n_refused > 0
