"""Power cuts, modelled: of the pages written since the last fsync any may have reached the disk.

Two designs that are common elsewhere go through the same harness and must fail it, or the harness
would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from cxr_cache.store.feature_store import FeatureStore
from tests.faults.disk import RecordedFile, Recorder, recorded
from tests.faults.oracle import (
    BEGUN,
    TOKEN_SHAPES,
    Violations,
    fails_by_rule,
    inspect_after,
    open_or_create,
    write_rows,
)
from tests.small_stores import make_batch

N_IMAGES = 200
State = tuple[bytes, set[int]]
"""A file as a crash may leave it, and the rows that had been acknowledged."""


EMBEDDED_ROWS = set(np.flatnonzero(~fails_by_rule(np.arange(N_IMAGES))).tolist())


def open_without_tokens(path: Path) -> FeatureStore:
    """A store in which every usable row has an embedding, and none its tokens."""
    store = open_or_create(path, N_IMAGES)
    rows = np.array(sorted(EMBEDDED_ROWS))
    write_rows(store, rows)
    taken = np.full(N_IMAGES, -1)
    taken[rows] = rows
    return store.replace(store.cohort, taken, features=TOKEN_SHAPES, boundary_block=10)


def our_states(
    path: Path, rng: np.random.Generator, n_states: int, *, tokens: bool = False
) -> Iterator[State]:
    """Commit batch after batch; before each fsync, cut the power in several ways."""
    recorder, acknowledged = Recorder(), set()
    with open_without_tokens(path) if tokens else open_or_create(path, N_IMAGES) as store:
        recorder.base = path.read_bytes()
        pending = rng.permutation(N_IMAGES)
        batches = np.array_split(pending, 20)
        for batch in batches:
            pending_writes = Recorder(recorder.base)
            with recorded(recorder):
                recorder.sync = lambda: None  # the fsync has not returned yet
                write_rows(store, np.sort(batch))
            del recorder.sync
            pending_writes.writes = list(recorder.writes)
            for _ in range(n_states // len(batches)):
                yield pending_writes.torn(rng), acknowledged | set((batch + BEGUN).tolist())
            recorder.sync()
            acknowledged |= set(batch.tolist())
        yield recorder.base, acknowledged


def count_violations(
    path: Path, states: Iterator[State], embedded: set[int] = frozenset()
) -> Violations:
    found = Violations()
    for content, acknowledged in states:
        path.write_bytes(content)
        inspect_after(path, acknowledged, found, embedded)
    return found


@pytest.mark.parametrize("n_states", [100, pytest.param(400, marks=pytest.mark.faults)])
@pytest.mark.parametrize("tokens", [False, True], ids=["embeddings", "tokens"])
def test_torn_pages_are_never_taken_for_rows(fast_path, seed, n_states, tokens):
    """Tokens that come later put no other embeddings at risk than those of their batch."""
    rng = np.random.default_rng(seed)
    states = our_states(fast_path / "s.h5", rng, n_states, tokens=tokens)
    embedded = EMBEDDED_ROWS if tokens else set()
    found = count_violations(fast_path / "torn.h5", states, embedded)
    print(f"torn pages: {found}")
    assert found.n_trials > n_states
    assert found.total == 0, found


# -- designs that must fail -------------------------------------------------------------


@dataclass
class Design:
    """A way to write rows into HDF5, and to say which of them are finished."""

    create: Callable[[h5py.File], None]
    append: Callable[[h5py.File, np.ndarray], None]
    is_durable: bool
    """Whether an append ends with fsync; else with flush, which many take for it."""


def create_growing(file: h5py.File) -> None:
    file.create_dataset("embeddings", (0, 8), "f4", maxshape=(None, 8), chunks=(16, 8))


def append_and_flush(file: h5py.File, rows: np.ndarray) -> None:
    file["embeddings"].resize(rows[-1] + 1, axis=0)
    file["embeddings"][rows[0] : rows[-1] + 1] = make_batch(rows)[0]["embeddings"][:, 0]
    file.flush()


def create_chunked(file: h5py.File) -> None:
    file.create_dataset("embeddings", (N_IMAGES, 8), "f4", chunks=(16, 8))
    file.create_dataset("done", (N_IMAGES,), "u1", chunks=(64,))


def write_chunks_and_bits(file: h5py.File, rows: np.ndarray) -> None:
    file["embeddings"][rows[0] : rows[-1] + 1] = make_batch(rows)[0]["embeddings"][:, 0]
    file["done"][rows[0] : rows[-1] + 1] = 1
    file.flush()


APPEND_AND_FLUSH = Design(create_growing, append_and_flush, is_durable=False)
CHUNKED_WITH_BITMAP = Design(create_chunked, write_chunks_and_bits, is_durable=True)


def their_states(design: Design, rng: np.random.Generator, n_states: int) -> Iterator[State]:
    """As ours, and also a kill between any two writes of libhdf5."""
    recorder, acknowledged = Recorder(), set()
    view = RecordedFile(recorder)
    with h5py.File(view, "w", libver="earliest") as file:
        design.create(file)
        file.flush()
        recorder.sync()
        batches = np.array_split(np.arange(N_IMAGES), 20)
        for batch in batches:
            design.append(file, batch)
            for _ in range(n_states // len(batches)):
                if rng.random() < 0.5:
                    yield recorder.after(int(rng.integers(len(recorder.writes) + 1))), acknowledged
                else:
                    yield recorder.torn(rng), acknowledged
            if design.is_durable:
                recorder.sync()
            acknowledged = acknowledged | set(batch.tolist())


def count_theirs(states: Iterator[State]) -> Violations:
    """The same questions: does it open, are acknowledged rows there, are finished rows right?"""
    found = Violations()
    everything = make_batch(np.arange(N_IMAGES))[0]["embeddings"][:, 0]
    for content, acknowledged in states:
        found.n_trials += 1
        try:
            with h5py.File(BytesIO(content), "r") as file:
                stored = file["embeddings"][:]
                done = file["done"][:] == 1 if "done" in file else np.ones(len(stored), bool)
        except Exception as error:
            found.unreadable += 1
            found.details.append(str(error))
            continue
        present = set(np.flatnonzero(done).tolist())
        found.lost += len(acknowledged - present)
        found.wrong += sum((stored[row] != everything[row]).any() for row in present)
    return found


@pytest.mark.parametrize("design", [APPEND_AND_FLUSH, CHUNKED_WITH_BITMAP])
def test_the_harness_catches_designs_that_are_known_to_fail(seed, design):
    found = count_theirs(their_states(design, np.random.default_rng(seed), 400))
    print(f"{design.append.__name__}: {found}")
    assert found.total > 0
    assert found.unreadable + found.wrong > 0, "not only rows that were cut off"


def test_a_state_without_a_crash_is_whole(fast_path):
    """The harness does not cry wolf."""
    rng = np.random.default_rng(0)
    *_, (content, acknowledged) = our_states(fast_path / "s.h5", rng, 0)
    (fast_path / "copy.h5").write_bytes(content)
    found = Violations()
    inspect_after(fast_path / "copy.h5", acknowledged, found)
    assert len(acknowledged) == N_IMAGES
    assert found.total == 0
    assert content == (fast_path / "s.h5").read_bytes()
    with FeatureStore.open(fast_path / "copy.h5") as store:
        assert len(store) == N_IMAGES
