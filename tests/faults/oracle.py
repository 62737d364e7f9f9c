"""What must be true of a store after any fault, known from outside the store.

The writer runs in a child process and reports every row through a pipe after the commit that
wrote it has returned. What a row must hold follows from its number alone. So the parent knows,
whatever became of the child, which rows may not be missing and what every row must be, bit for
bit, without asking the store.
"""

from __future__ import annotations

import gc
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxr_cache.store.feature_store import DONE, EMBEDDED, FAILED, PENDING, FeatureStore
from tests.small_stores import ENCODER, SHAPES, make_batch, make_cohort

FAILURE = "row {} cannot be read"
TOKEN_SHAPES = {**SHAPES, "tokens": (1, 5, 6)}
BEGUN = 1 << 20
"""Added to the number of a row that is reported before it is written, not after."""
PART_ENCODER = {
    **ENCODER,
    **dict.fromkeys(("revision", "n_blocks", "n_tokens", "token_width", "pooled_width")),
    "embedding_width": SHAPES["embeddings"][-1],
    "preprocessing": {},
    "precision": "fp32",
}
"""Parts are compared before they are merged, so theirs is a whole identity."""


@dataclass
class Violations:
    """What the harness counts; every number should be zero."""

    n_trials: int = 0
    unreadable: int = 0
    lost: int = 0
    """Acknowledged rows that are gone."""
    wrong: int = 0
    """Rows that count as finished but hold other bytes than were written."""
    details: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.unreadable + self.lost + self.wrong

    def __str__(self) -> str:
        return (
            f"{self.n_trials} trials: {self.unreadable} unreadable, {self.lost} rows lost, "
            f"{self.wrong} rows wrong {self.details[:3]}"
        )


def fails_by_rule(rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Every seventh row stands for an image that cannot be used."""
    return np.asarray(rows % 7 == 6)


def write_rows(store: FeatureStore, rows: NDArray[np.intp], first_row: int = 0) -> None:
    """What an extraction does with one batch; `first_row` is where a part begins."""
    failed = fails_by_rule(rows)
    if (~failed).any():
        store.commit(rows[~failed] - first_row, *make_batch(rows[~failed], store.feature_shapes))
    reasons = [FAILURE.format(row) for row in rows[failed]]
    store.record_failures(rows[failed] - first_row, reasons)


def open_or_create(path: Path, n_images: int) -> FeatureStore:
    """As an extraction begins: continue what is there, forget what is damaged."""
    if not path.exists():
        return FeatureStore.create(path, make_cohort(n_images), encoder=ENCODER, features=SHAPES)
    store = FeatureStore.open(path, "r+")
    store.mark_pending(store.find_damaged())
    return store


def fill(path: Path, n_images: int, seed: int, acknowledge: Callable[[NDArray], None]) -> None:
    """Write all pending rows in batches of random size and order."""
    rng = np.random.default_rng(seed)
    with open_or_create(path, n_images) as store:
        pending = np.flatnonzero(store.status == PENDING)
        if rng.random() < 0.5:
            pending = rng.permutation(pending)
        while len(pending):
            batch, pending = np.split(pending, [int(rng.integers(1, 9))])
            write_rows(store, batch)
            acknowledge(batch)


def give_tokens(
    path: Path, n_images: int, seed: int, acknowledge: Callable[[NDArray], None]
) -> None:
    """Add tokens to a store that has none yet, or go on with it."""
    rng = np.random.default_rng(seed)
    store = open_or_create(path, n_images)
    if "tokens" not in store.features:
        rows = np.where(np.isin(store.status, EMBEDDED), np.arange(n_images), -1)
        store = store.replace(store.cohort, rows, features=TOKEN_SHAPES, boundary_block=10)
    with store:
        rows = np.flatnonzero(np.isin(store.status, (DONE, FAILED), invert=True))
        while len(rows):
            batch, rows = np.split(rows, [int(rng.integers(1, 9))])
            acknowledge(batch + BEGUN)
            write_rows(store, batch)
            acknowledge(batch)


def run_in_child(
    work: Callable[[Callable[[NDArray], None]], None],
    stop: Callable[[int], int | None] = lambda _: None,
) -> tuple[set[int], int]:
    """Run `work` in a forked child; `stop` gets its process id once it has begun.

    Where `stop` returns a time (``time.monotonic_ns``), only what was acknowledged before counts.

    Returns
    -------
    acknowledged
        Rows that the child reported, whatever its end.
    status
        Exit status; negative for a signal.
    """
    pipe, child_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(pipe)
        gc.disable()  # a collection would copy every page that it looks at

        def acknowledge(rows: NDArray[np.intp]) -> None:
            now = time.monotonic_ns()
            os.write(child_end, b"".join(struct.pack("<qq", row, now) for row in rows))

        try:
            os.write(child_end, b"b")  # begun
            work(acknowledge)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(child_end)
    with os.fdopen(pipe, "rb") as reports:
        reports.read(1)
        until = stop(child)
        received = reports.read()
    status = os.waitpid(child, 0)[1]
    whole = received[: len(received) // 16 * 16]
    acknowledged = {row for row, at in struct.iter_unpack("<qq", whole) if not until or at < until}
    return acknowledged, os.waitstatus_to_exitcode(status)


def kill(child: int) -> None:
    """End a child of ours as a crash would."""
    os.kill(child, signal.SIGKILL)


def inspect_after(
    path: Path, acknowledged: set[int], found: Violations, embedded: set[int] = frozenset()
) -> NDArray[np.uint8]:
    """Compare a store with what is known, and return the state of each row.

    Rows in `embedded` must hold an embedding, but for those that were just being given tokens.
    """
    found.n_trials += 1
    begun = {row - BEGUN for row in acknowledged if row >= BEGUN}
    acknowledged = {row for row in acknowledged if row < BEGUN}
    embedded = embedded - (begun - acknowledged)
    if not path.exists():
        found.lost += len(acknowledged)
        return np.zeros(0, np.uint8)
    try:
        store = FeatureStore.open(path)
    except Exception as error:
        found.unreadable += 1
        found.details.append(f"{type(error).__name__}: {error}")
        return np.zeros(0, np.uint8)
    with store:
        state = store.status
        state[store.find_damaged()] = PENDING
        failed = fails_by_rule(np.arange(len(store)))
        lost = [row for row in acknowledged if state[row] != (FAILED if failed[row] else DONE)]
        lost += [row for row in embedded if state[row] not in EMBEDDED]
        found.lost += len(lost)
        found.wrong += count_wrong(store, state)
        if lost:
            found.details.append(f"lost {lost[:5]}")
    return state


def count_wrong(store: FeatureStore, state: NDArray[np.uint8]) -> int:
    """Finished rows that are not, bit for bit, what was written."""
    failed = np.flatnonzero(state == FAILED)
    n_wrong = sum(
        reason != FAILURE.format(row)
        for row, reason in zip(failed, store.read_errors(failed), strict=True)
    )
    for kind in EMBEDDED:
        rows = np.flatnonzero(state == kind)
        if not len(rows):
            continue
        shapes = {name: store.columns[name].shape for name in store.features_of(kind)}
        features, sha256 = make_batch(rows, shapes)
        equal = (store.read_column("image_sha256")[rows] == sha256).all(axis=1)
        for name, values in features.items():
            stored = store.read_column(name)[rows]
            equal &= (stored == values).reshape(len(rows), -1).all(axis=1)
        n_wrong += int((~equal).sum())
    return n_wrong
