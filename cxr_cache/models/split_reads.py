"""How often a test split has been read: kept beside the store, and told with the figures."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from cxr_cache.common.files import WriterLock, write_whole
from cxr_cache.common.tables import hash_file
from cxr_cache.common.wording import count
from cxr_cache.errors import CxrCacheError, StoreBusyError
from cxr_cache.models.run import Run

SUFFIX: Final = ".test_reads.json"
"""What the name of the file that counts ends in, after the store's."""
MEANING: Final = (
    "Whatever is chosen after a reading, such as a recipe, a seed or a rule for thresholds, is "
    "chosen on the test images, and then the figures are a little too good."
)
_WAIT_S: Final = 10.0
_ABOUT: Final = (
    "How often test figures of a test split have been computed, by digest of its image ids; runs "
    "are told apart by digests of their predictions. Written by cxr-cache."
)


@dataclass(frozen=True)
class SplitReads:
    """How often the figures of the same test images have been computed."""

    split: str
    """SHA-256 of the sorted ids of the test images, its first 16 digits."""
    n_reads: int
    """The present reading included, if it was counted."""
    n_runs: int
    """Different runs whose test figures were computed."""
    problem: str = ""
    """Why the present reading could not be counted, in a sentence."""

    @staticmethod
    def of_run(run: Run) -> SplitReads | None:
        """As the run's ``test_reads.json`` has it; None where there is none."""
        reads = run.read_reads()
        return None if reads is None else SplitReads(**reads)

    def to_text(self) -> str:
        """Say it in sentences."""
        by = f"by {count(self.n_runs, 'run')}"
        times = "once" if self.n_reads == 1 else f"{self.n_reads:,} times"
        if self.problem:
            before = f" Before, it had been read {times} {by}." if self.n_reads else ""
            return f"This reading of the test split was not counted: {self.problem}{before}"
        return f"This test split has been read {times} {by}. {MEANING}"

    def to_dict(self) -> dict[str, Any]:
        """As ``test_reads.json`` of a run has it."""
        return asdict(self)


def digest_ids(image_ids: Iterable[str]) -> str:
    """Name a set of images by the first 16 digits of a SHA-256 over their sorted ids."""
    ids = json.dumps(sorted(image_ids)).encode()  # no id can run into the next
    return hashlib.sha256(ids).hexdigest()[:16]


def count_reading(verb: str, *runs: Run) -> SplitReads:
    """Count that test figures of one or more runs on the same test images are computed now.

    Parameters
    ----------
    verb
        The command that computes them.
    runs
        Finished runs with the same test images, which are all images of nested ones. The count is
        kept beside the store of the first.
    """
    test = runs[0].tested_ids
    store = runs[0].find_store()
    if store is None:
        problem = f"it is counted beside the store, and {runs[0].store_path} is not there."
        return SplitReads(digest_ids(test), 0, 0, problem)
    return count_reading_beside(store, test, verb, runs)


def count_reading_beside(
    store: Path, image_ids: Iterable[str], verb: str, runs: Sequence[Run]
) -> SplitReads:
    """Count that figures of `runs` on these images are computed now, in a file beside a store.

    Other processes may count at the same time. What cannot be counted is said, and stops nobody.
    """
    split = digest_ids(image_ids)
    path = store.with_name(store.name + SUFFIX)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    ids = sorted({hash_file(run.path / "predictions.csv")[:16] for run in runs})
    try:
        lock = _acquire(path)
        try:
            known = _read(path)
            reads = [*known.get(split, []), {"time": now, "command": verb, "runs": ids}]
            content = {"about": _ABOUT, "splits": {**known, split: reads}}
            write_whole(path, json.dumps(content, indent=1).encode())
        finally:
            lock.release()
    except (CxrCacheError, OSError, ValueError) as error:
        reads, problem = _read_quietly(path).get(split, []), str(error)
    else:
        problem = ""
    n_runs = len({run for read in reads for run in read["runs"]})
    return SplitReads(split, len(reads), n_runs, problem)


def _acquire(path: Path) -> WriterLock:
    """Take the lock; who counts holds it for a moment, so it is worth a wait."""
    ends = time.monotonic() + _WAIT_S
    while True:
        try:
            return WriterLock.acquire(path)
        except StoreBusyError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Readings by split; ValueError where the file holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(_damaged(path)) from error
    splits = content.get("splits") if isinstance(content, dict) else None
    is_whole = isinstance(splits, dict) and all(
        isinstance(reads, list)
        and all(isinstance(read, dict) and isinstance(read.get("runs"), list) for read in reads)
        for reads in splits.values()
    )
    if not is_whole:
        raise ValueError(_damaged(path))
    return dict(splits or {})


def _read_quietly(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        return _read(path)
    except (OSError, ValueError):
        return {}


def _damaged(path: Path) -> str:
    return f"{path} is damaged. Delete it to begin to count anew."
