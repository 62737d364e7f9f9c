"""Random histories against a dictionary, and random damage against the file."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cxr_cache.errors import (
    ConfigError,
    CxrCacheError,
    StoreBusyError,
    StoreFormatError,
    StoreMismatchError,
)
from cxr_cache.store.feature_store import DONE, FAILED, PENDING, FeatureStore
from cxr_cache.store.merge import merge
from cxr_cache.store.verify import verify
from tests.faults.disk import CallCounter, die_half_way
from tests.faults.oracle import (
    FAILURE,
    PART_ENCODER,
    count_wrong,
    fails_by_rule,
    open_or_create,
    run_in_child,
    write_rows,
)
from tests.small_stores import SHAPES, flip_bit, make_cohort

N_IMAGES = 30
ROWS = st.lists(st.integers(0, N_IMAGES - 1), min_size=1, max_size=8, unique=True)
PARTS = (range(15), range(15, N_IMAGES))  # whose rows of the whole each part holds
NUMBERS = st.integers(0, len(PARTS) - 1)


class StoreHistory(RuleBasedStateMachine):
    """Whatever happens to a store, finished rows are right and acknowledged rows are there."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "s.h5"
        self.kept: dict[int, int] = {}  # row -> its state, as acknowledged
        self.parts = [Path(self.folder.name) / f"{number}.part" for number in range(len(PARTS))]
        self.kept_of_part: list[dict[int, int]] = [{} for _ in PARTS]  # by row of the whole
        self.broken_parts: set[int] = set()

    def teardown(self) -> None:
        self.folder.cleanup()

    def open(self) -> FeatureStore:
        return open_or_create(self.path, N_IMAGES)

    def states(self, rows: np.ndarray) -> dict[int, int]:
        failed = fails_by_rule(rows)
        return {int(row): FAILED if bad else DONE for row, bad in zip(rows, failed, strict=True)}

    @rule(rows=ROWS)
    def extract_some(self, rows: list[int]) -> None:
        with self.open() as store:
            pending = np.array([row for row in rows if store.status[row] == PENDING], np.intp)
            if len(pending):
                write_rows(store, pending)
                self.kept |= self.states(pending)

    @rule(rows=ROWS, at=st.integers(0, 30))
    def be_killed(self, rows: list[int], at: int) -> None:
        def work(acknowledge) -> None:
            with CallCounter(at, die_half_way).installed(), self.open() as store:
                pending = np.array([row for row in rows if store.status[row] == PENDING], np.intp)
                if len(pending):
                    write_rows(store, pending)
                    acknowledge(pending)

        acknowledged, _ = run_in_child(work)
        self.kept |= self.states(np.array(sorted(acknowledged), np.intp))

    @precondition(lambda self: self.path.exists())
    @rule(row=st.integers(0, N_IMAGES - 1), byte=st.integers(0, 30), bit=st.integers(0, 7))
    def corrupt(self, row: int, byte: int, bit: int) -> None:
        with FeatureStore.open(self.path) as store:
            column = store.columns["embeddings"]
            is_done = store.status[row] == DONE
        flip_bit(self.path, column.offset + row * column.row_bytes + byte, bit)
        if is_done:
            assert row in [bad.row for bad in verify(self.path).bad_rows]
            assert verify(self.path, repair=True).is_repaired
            self.kept.pop(row, None)

    @rule()
    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        self.kept.clear()

    @rule(seed=st.integers(0, 3))
    def take_over(self, seed: int) -> None:
        """Other labels, the same images in the same order."""
        with self.open() as store:
            rows = np.where(store.status == DONE, np.arange(N_IMAGES), -1)
            store.replace(make_cohort(N_IMAGES, seed), rows, features=SHAPES).close()
        self.kept = {row: state for row, state in self.kept.items() if state == DONE}

    @rule()
    def second_writer(self) -> None:
        with self.open(), pytest.raises(StoreBusyError):
            FeatureStore.open(self.path, "r+")

    # Parts, which another machine could have made, and what becomes of them in a merge.

    @rule(rows=ROWS)
    def extract_parts(self, rows: list[int]) -> None:
        for number, path in enumerate(self.parts):
            if number in self.broken_parts:
                with pytest.raises(StoreFormatError):
                    FeatureStore.open(path, "r+")
                self.delete_part(number)
            first = PARTS[number][0]
            with open_or_create_part(path, number) as part:
                part.mark_pending(part.find_damaged())
                wanted = np.array([row for row in rows if row in PARTS[number]], np.intp)
                pending = wanted[part.status[wanted - first] == PENDING]
                if len(pending):
                    write_rows(part, pending, first)
                    self.kept_of_part[number] |= self.states(pending)

    @rule(number=NUMBERS)
    def delete_part(self, number: int) -> None:
        self.parts[number].unlink(missing_ok=True)
        self.kept_of_part[number].clear()
        self.broken_parts.discard(number)

    def corrupt_row_of_part(self, choice: int, byte: int, bit: int) -> None:
        """One finished row: it may not come out of a merge as finished."""
        kept = [(n, row) for n, rows in enumerate(self.kept_of_part) for row in sorted(rows)]
        if not kept:
            return
        number, row = kept[choice % len(kept)]
        name = "embeddings" if self.kept_of_part[number].pop(row) == DONE else "error"
        with FeatureStore.open(self.parts[number]) as part:
            column = part.columns[name]
        start = column.offset + (row - PARTS[number][0]) * column.row_bytes
        flip_bit(self.parts[number], start + byte, bit)

    def break_part(self, number: int, cut: bool, bit: int) -> None:
        """Its image table, or its end."""
        path = self.parts[number]
        with FeatureStore.open(path) as part:
            position = part.columns["image_id"].offset
        if cut:
            os.truncate(path, path.stat().st_size - 1000)
        else:
            flip_bit(path, position, bit)
        self.broken_parts.add(number)

    @rule(
        rows=ROWS,
        harm=st.sampled_from(["none", "row", "row", "table", "end", "missing"]),
        overwrite=st.sampled_from([True, True, False]),
        order=st.permutations(range(len(PARTS))),
        choice=st.integers(0, 99),
        bit=st.integers(0, 7),
    )
    def merge_parts(
        self, rows: list[int], harm: str, overwrite: bool, order: list[int], choice: int, bit: int
    ) -> None:
        """A damaged row is pending in the merged store; any other harm is refused."""
        self.extract_parts(rows)
        if harm == "row":
            self.corrupt_row_of_part(choice, choice % 31, bit)
        elif harm == "missing":
            self.delete_part(order[0])
        elif harm != "none":
            self.break_part(order[0], harm == "end", bit)
        there = [self.parts[number] for number in order if self.parts[number].exists()]
        before = self.path.read_bytes() if self.path.exists() else None
        if before is not None and not overwrite:
            refusal: type[CxrCacheError] | None = ConfigError
        elif self.broken_parts:
            refusal = StoreFormatError
        else:
            refusal = None if len(there) == len(PARTS) else StoreMismatchError
        if refusal is not None:
            with pytest.raises(refusal):
                merge(there, self.path, overwrite=overwrite)
            assert (self.path.read_bytes() if self.path.exists() else None) == before
            return
        summary = merge(there, self.path, overwrite=overwrite)
        self.kept = self.kept_in_parts()
        assert summary.n_done + summary.n_failed == len(self.kept)
        assert self.finished() == self.kept

    @precondition(lambda self: all(map(Path.exists, self.parts)) and not self.broken_parts)
    @rule(at=st.integers(0, 40))
    def be_killed_merging(self, at: int) -> None:
        """The store is the old one or the merged one, and nothing between."""
        before, merged = self.finished(), self.kept_in_parts()

        def work(_) -> None:
            with CallCounter(at, die_half_way).installed():
                merge(self.parts, self.path, overwrite=True)

        _, status = run_in_child(work)
        assert status in (0, -signal.SIGKILL)
        now = self.finished()
        assert now == merged if status == 0 else now in (before, merged)
        if now == merged:
            self.kept = merged

    def kept_in_parts(self) -> dict[int, int]:
        return {row: state for rows in self.kept_of_part for row, state in rows.items()}

    def finished(self) -> dict[int, int]:
        """Finished rows of the store with their state."""
        if not self.path.exists():
            return {}
        with FeatureStore.open(self.path) as store:
            state = store.status
            state[store.find_damaged()] = PENDING
        return {int(row): int(state[row]) for row in np.flatnonzero(state != PENDING)}

    @invariant()
    def nothing_is_lost_or_wrong(self) -> None:
        if not self.path.exists():
            assert not self.kept
            return
        with FeatureStore.open(self.path) as store:
            state = store.status
            state[store.find_damaged()] = PENDING
            assert count_wrong(store, state) == 0
            assert all(state[row] == kept for row, kept in self.kept.items())


def open_or_create_part(path: Path, number: int) -> FeatureStore:
    if path.exists():
        return FeatureStore.open(path, "r+")
    rows = PARTS[number]
    described = {"number": number + 1, "of": len(PARTS), "first_row": rows[0]}
    return FeatureStore.create(
        path,
        make_cohort(N_IMAGES).take(slice(rows.start, rows.stop)),
        encoder=PART_ENCODER,
        features=SHAPES,
        part={**described, "n_rows_of_whole": N_IMAGES},
    )


TestHistory = StoreHistory.TestCase
TestHistory.settings = settings(
    max_examples=12,
    stateful_step_count=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.faults
class TestLongHistory(StoreHistory.TestCase):
    settings = settings(
        max_examples=60,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


# -- mutated files ----------------------------------------------------------------------


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, zero pages, cut, extend, or write garbage where HDF5 keeps its structures."""
    changed = bytearray(content)
    kind = rng.integers(5)
    if kind == 0:
        for position in rng.integers(len(changed), size=rng.integers(1, 4)):
            changed[position] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        start = int(rng.integers(len(changed))) // 512 * 512
        n_bytes = len(changed[start : start + 512])
        changed[start : start + 512] = bytes(n_bytes)
    elif kind == 2:
        del changed[int(rng.integers(len(changed))) :]
    elif kind == 3:
        changed += rng.bytes(int(rng.integers(1, 5000)))
    else:
        start, n_bytes = int(rng.integers(1500)), int(rng.integers(1, 65))
        changed[start : start + n_bytes] = rng.bytes(n_bytes)
    return bytes(changed)


def outcome_of(path: Path, original: dict[str, np.ndarray]) -> str:
    """What opening and checking a mutated store comes to; anything else is an error."""
    try:
        with FeatureStore.open(path) as store:
            state = store.status
            state[store.find_damaged()] = PENDING
            for row in np.flatnonzero(state == DONE):
                for name, values in original.items():
                    if store.read_column(name)[row].tobytes() != values[row].tobytes():
                        return "wrong row taken for done"
            for row in np.flatnonzero(state == FAILED):
                if store.read_errors(np.array([row])) != [FAILURE.format(row)]:
                    return "wrong reason"
            return "intact" if (state != PENDING).all() else "rows found damaged"
    except StoreFormatError:
        return "refused"
    except CxrCacheError as error:
        return f"unexpected {type(error).__name__}"


@pytest.mark.parametrize("n_files", [1000, pytest.param(20_000, marks=pytest.mark.faults)])
def test_mutated_stores_do_no_harm(fast_path, seed, n_files):
    """Parsed in a child with limits on memory and time: refused, or every wrong row is found."""
    path = fast_path / "s.h5"
    with open_or_create(path, 12) as store:
        write_rows(store, np.arange(12))
        original = {
            name: np.array(store.read_column(name))
            for name in ("image_id", "study_uid", "image_sha256", *store.features)
        }
    content = path.read_bytes()
    report = fast_path / "report"

    def work(_) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        outcomes: Counter[str] = Counter()
        for number in range(n_files):
            rng = np.random.default_rng([seed, number])
            path.write_bytes(mutate(content, rng))
            signal.alarm(2)  # ends the process where one file takes longer
            outcomes[outcome_of(path, original)] += 1
            signal.alarm(0)
        report.write_text(json.dumps(outcomes))

    assert run_in_child(work)[1] == 0
    outcomes = json.loads(report.read_text())
    print(f"mutated stores: {outcomes}")
    assert outcomes.keys() <= {"refused", "rows found damaged", "intact"}, outcomes
    assert (
        outcomes.get("intact", 0) < n_files / 10
    )  # changed bytes that nobody reads, such as padding


@pytest.mark.parametrize("n_rows", [100, pytest.param(1000, marks=pytest.mark.faults)])
def test_planted_corruption_is_found(fast_path, seed, n_rows):
    """One changed bit each, anywhere in what a finished row consists of."""
    path = fast_path / "s.h5"
    with open_or_create(path, 40) as store:
        write_rows(store, np.arange(40))
        columns = [store.columns[name] for name in ("image_sha256", "row_digest", *store.features)]
    rng = np.random.default_rng(seed)
    done = np.flatnonzero(~fails_by_rule(np.arange(40)))
    n_found = 0
    for _ in range(n_rows):
        column, row = columns[rng.integers(len(columns))], int(rng.choice(done))
        position = column.offset + row * column.row_bytes + int(rng.integers(column.row_bytes))
        bit = int(rng.integers(8))
        flip_bit(path, position, bit)
        found = verify(path)
        n_found += found.exit_status == 3 and [bad.row for bad in found.bad_rows] == [row]
        flip_bit(path, position, bit)
    print(f"planted corruption: {n_found} of {n_rows} found")
    assert n_found == n_rows
    assert verify(path).exit_status == 0
