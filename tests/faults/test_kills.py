"""Processes that die: at random moments, and at every single call that changes a file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cxr_cache.store.feature_store import DONE, FAILED, FeatureStore
from cxr_cache.store.merge import merge
from tests.faults.disk import CallCounter, die, die_half_way
from tests.faults.oracle import (
    PART_ENCODER,
    Violations,
    fails_by_rule,
    fill,
    give_tokens,
    inspect_after,
    kill,
    open_or_create,
    run_in_child,
    write_rows,
)
from tests.small_stores import SHAPES, make_cohort

N_IMAGES = 120

Acknowledge = Callable[[np.ndarray], None]
Work = Callable[[Path, Acknowledge], None]


def chain_of_kills(folder: Path, n_kills: int, seed: int, *, tokens: bool) -> Violations:
    """Kill and resume until a store is complete, then begin another, until n_kills are done.

    With `tokens` each store begins complete but for these, and may not lose an embedding.
    """
    rng, found, acknowledged, path = np.random.default_rng(seed), Violations(), set(), None
    embedded = set(np.flatnonzero(~fails_by_rule(np.arange(N_IMAGES)))) if tokens else set()
    n_done = 0
    while n_done < n_kills:
        if path is None:
            path, acknowledged = folder / f"{n_done}.h5", set()
            if tokens:
                fill(path, N_IMAGES, seed, lambda _: None)

        target, batches, patience = path, int(rng.integers(1 << 30)), float(rng.exponential(0.02))

        def work(acknowledge: Acknowledge, path: Path = target, seed: int = batches) -> None:
            (give_tokens if tokens else fill)(path, N_IMAGES, seed, acknowledge)

        def stop(child: int, after_s: float = patience) -> None:
            time.sleep(after_s)
            kill(child)

        reported, status = run_in_child(work, stop)
        assert status in (0, -9), f"the writer ended with {status}"
        acknowledged |= reported
        state = inspect_after(path, acknowledged, found, embedded)
        n_done += 1
        if len(state) and np.isin(state, (DONE, FAILED)).all():
            path.unlink()
            path = None
    return found


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(False, id="embeddings"),
        pytest.param(True, id="tokens", marks=pytest.mark.faults),
    ],
)
def test_random_kills(fast_path, seed, tokens):
    found = chain_of_kills(fast_path, 60, seed, tokens=tokens)
    assert found.total == 0, found


@pytest.mark.faults
@pytest.mark.parametrize("tokens", [False, True], ids=["embeddings", "tokens"])
def test_a_thousand_random_kills(tmp_path, seed, tokens):
    found = chain_of_kills(tmp_path, 1000, seed, tokens=tokens)
    print(f"random kills, {'tokens' if tokens else 'embeddings'}: {found}")
    assert found.total == 0, found


# -- every call -------------------------------------------------------------------------


N_FEW = 10


def create_and_commit(folder: Path, acknowledge: Acknowledge) -> None:
    fill(folder / "s.h5", N_FEW, 1, acknowledge)


def repair_and_commit(folder: Path, acknowledge: Acknowledge) -> None:
    with open_or_create(folder / "s.h5", N_FEW) as store:
        store.mark_pending(np.array([3, 4]))
        write_rows(store, np.array([3, 4, 5, 6]))
        acknowledge(np.array([3, 4, 5, 6]))


def replace_table(folder: Path, acknowledge: Acknowledge) -> None:
    with open_or_create(folder / "s.h5", N_FEW) as store:
        rows = np.concatenate([np.arange(6), np.full(N_FEW - 4, -1)])
        store.replace(make_cohort(N_FEW + 2), rows, features=SHAPES).close()


def add_tokens(folder: Path, acknowledge: Acknowledge) -> None:
    give_tokens(folder / "s.h5", N_FEW, 1, acknowledge)


def merge_parts(folder: Path, acknowledge: Acknowledge) -> None:
    if not (folder / "s.h5").exists():
        merge([folder / "2.part", folder / "1.part"], folder / "s.h5")
        acknowledge(np.arange(N_FEW))


def prepare(work: Work, folder: Path) -> set[int]:
    """What was there before, and the rows of it that must survive."""
    if work in (repair_and_commit, replace_table, add_tokens):
        with open_or_create(folder / "s.h5", N_FEW) as store:
            write_rows(store, np.arange(6))
        return {0, 1, 2, 5} if work is repair_and_commit else set(range(6))
    if work is merge_parts:
        write_parts(folder)
    return set()


def write_parts(folder: Path) -> None:
    for number, rows in enumerate(np.array_split(np.arange(N_FEW), 2), 1):
        part = {"number": number, "of": 2, "first_row": int(rows[0]), "n_rows_of_whole": N_FEW}
        with FeatureStore.create(
            folder / f"{number}.part",
            make_cohort(N_FEW).take(rows),
            encoder=PART_ENCODER,
            features=SHAPES,
            part=part,
        ) as store:
            write_rows(store, rows, int(rows[0]))


ALL = (create_and_commit, repair_and_commit, replace_table, add_tokens, merge_parts)
QUICK = [
    (create_and_commit, die_half_way, 1),
    (repair_and_commit, die_half_way, 1),
    (replace_table, die_half_way, 4),  # these three begin with the calls of a creation
    (add_tokens, die_half_way, 2),
    (merge_parts, die_half_way, 4),
]
LONG = [case for work in ALL for case in ((work, die, 1), (work, die_half_way, 1))]


@pytest.mark.parametrize(
    ("work", "act", "step"),
    [
        *QUICK,
        *(pytest.param(*case, marks=pytest.mark.faults) for case in LONG if case not in QUICK),
    ],
)
def test_a_kill_at_every_call(fast_path, seed, work, act, step):
    """Every `step`-th write, fsync, truncation, reservation and renaming, or the middle of one."""
    before, folder = fast_path / "before", fast_path / "now"
    before.mkdir()
    survivors = prepare(work, before)
    counter, found = CallCounter(), Violations()
    shutil.copytree(before, folder)
    with counter.installed():
        work(folder, lambda _: None)
    assert counter.n_calls > 5
    for at in range(seed % step, counter.n_calls, step):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)

        def run(acknowledge: Acknowledge, at: int = at) -> None:
            with CallCounter(at, act).installed():
                work(folder, acknowledge)

        acknowledged, status = run_in_child(run)
        assert status == -9, f"call {at} was not reached"
        if work is add_tokens:  # what was there were embeddings
            inspect_after(folder / "s.h5", acknowledged, found, embedded=survivors)
        else:
            inspect_after(folder / "s.h5", acknowledged | survivors, found)
        work(folder, lambda _: None)  # nothing is locked, and nothing is in the way
        left = {file.name for file in folder.iterdir() if file.suffix not in (".part", ".lock")}
        assert left == {"s.h5"}
    print(f"{work.__name__}, {act.__name__}: {counter.n_calls} calls, {found}")
    assert found.total == 0, found
