"""Reading tokens at random: the store's file against a flat memory-mapped file of the same bytes.

    python scripts/bench_tokens.py [--gb 3] [--rounds 3] [--folder DIR] [--quick] [--out FILE]

Every reader gives the same batches of 16 random rows, one view each, none twice in a turn:

* ``flat``: ``np.memmap`` of a file that holds the tokens and nothing else, indexed with the rows;
* ``flat_pread``: the same file, each row read at its offset, which spares it the system's
  read-ahead;
* ``read_views``: the store's own reading at offsets;
* ``StoredTokens``: the batches that fine-tuning takes, with its thread that reads ahead.

They take turns, each in a process of its own. Warm: all rows that are read are in the page cache.
Larger than memory: as root, each process lives in a memory cgroup (v1) that holds a fifth of the
file, cached pages included. As the two files' readers would find each other's pages, these are
dropped before each turn (``posix_fadvise``); where no cgroup can be made, that is all that is done.
The table says how much of what was read came from the disk.

Then a training takes the batches of fine-tuning from the store, none of which is in memory: two
transformer blocks as wide as ViT-B's, forward and backward on the CPU, beside the same from memory;
and waiting as long as a GPU would take that computes so many images per second.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import xxhash
from benchmarking import (
    commit_tokens,
    describe_machine,
    format_table,
    make_cohort,
    results_path,
    write_json,
)
from numpy.typing import NDArray

from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.tokens import ResidentTokens, StoredTokens, TokenSource

BATCH_SIZE, N_WRITTEN_AT_ONCE = 16, 64
GOAL = 0.6
"""Share of the flat file's speed."""
SHARE_IN_MEMORY = 0.2
"""Of the file, what a process may hold where the store is to be larger than memory."""
PROCESS_BYTES = 128 << 20
"""What a process may take for itself, beside what it shares with its parent."""
CGROUPS = Path("/sys/fs/cgroup/memory")
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Bench:
    """Two files with the same tokens, and how they are read."""

    folder: Path
    n_images: int
    row_shape: tuple[int, ...]
    n_read: int
    """Rows of a turn; of a warm one always the same."""
    n_rounds: int

    @property
    def n_token_bytes(self) -> int:
        """Of each of the two files."""
        return self.n_images * int(np.prod(self.row_shape)) * 2

    @property
    def paths(self) -> tuple[Path, Path]:
        """The flat file and the store."""
        return self.folder / "flat", self.folder / "store.h5"


def write_files(bench: Bench) -> None:
    """A store with random tokens, and the same tokens alone."""
    flat_path, store_path = bench.paths
    encoder = {"name": "made for a benchmark", "weights_sha256": "0" * 64, "is_random": True}
    features = {"embeddings": (1, 512), "tokens": bench.row_shape}
    rng = np.random.default_rng(0)
    with (
        FeatureStore.create(
            store_path, make_cohort(bench.n_images), encoder=encoder, features=features
        ) as store,
        flat_path.open("wb") as flat,
    ):
        for start in range(0, bench.n_images, N_WRITTEN_AT_ONCE):
            rows = np.arange(start, min(start + N_WRITTEN_AT_ONCE, bench.n_images))
            bits = rng.integers(0, 0x7C00, (len(rows), *bench.row_shape), np.uint16)  # all finite
            commit_tokens(store, rows, bits.view(np.float16))
            flat.write(bits.data)
        flat.flush()
        os.fsync(flat.fileno())


# -- readers ----------------------------------------------------------------------------


def _batches(rows: Rows) -> Iterator[Rows]:
    return (rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))


Read = Callable[[Rows], Iterator[NDArray[Any]]]


@contextlib.contextmanager
def flat_file(bench: Bench) -> Iterator[Read]:
    """Fancy indexing copies."""
    flat = np.memmap(bench.paths[0], np.float16, "r", shape=(bench.n_images, *bench.row_shape))
    yield lambda rows: (flat[chosen, np.zeros_like(chosen)] for chosen in _batches(rows))


@contextlib.contextmanager
def flat_file_at_offsets(bench: Bench) -> Iterator[Read]:
    """One system call per row."""

    def read(rows: Rows) -> Iterator[NDArray[Any]]:
        for chosen in _batches(rows):
            values = np.empty((len(chosen), *bench.row_shape[1:]), np.float16)
            for value, row in zip(values, chosen.tolist(), strict=True):
                os.preadv(file.fileno(), [value.view(np.uint8).data], row * value.nbytes)
            yield values

    with bench.paths[0].open("rb") as file:
        yield read


@contextlib.contextmanager
def store_views(bench: Bench) -> Iterator[Read]:
    """One call per batch."""
    with FeatureStore.open(bench.paths[1]) as store:
        yield lambda rows: (
            store.read_views("tokens", chosen, np.zeros_like(chosen)) for chosen in _batches(rows)
        )


@contextlib.contextmanager
def stored_tokens(bench: Bench) -> Iterator[Read]:
    """As fine-tuning reads."""
    with FeatureStore.open(bench.paths[1]) as store:
        source = StoredTokens(store, np.arange(bench.n_images))
        zeros = torch.zeros(bench.n_images, dtype=torch.int64)
        yield lambda rows: (
            batch.numpy()
            for batch in source.batches(torch.from_numpy(rows), zeros[: len(rows)], BATCH_SIZE)
        )


READERS = {
    "flat": flat_file,
    "flat_pread": flat_file_at_offsets,
    "read_views": store_views,
    "StoredTokens": stored_tokens,
}
JUDGED = ("read_views", "StoredTokens")


# -- turns ------------------------------------------------------------------------------


def bytes_from_disk() -> int:
    """That this process has caused to be read, read-ahead of the system included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def take_turns(name: str, bench: Bench, pipe: Connection, cgroup: Path | None) -> None:
    """A reader's process: told which rows, it reads them and reports MB/s and where from."""
    if cgroup is not None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    while (turn := pipe.recv()) is not None:
        rows, checks = turn
        digest, n_bytes, on_disk = xxhash.xxh3_128(), 0, bytes_from_disk()
        with READERS[name](bench) as read:
            started = time.perf_counter()
            for batch in read(rows):
                n_bytes += batch.nbytes
                if checks:
                    digest.update(np.ascontiguousarray(batch).view(np.uint8).data)
            seconds = time.perf_counter() - started
        from_disk = (bytes_from_disk() - on_disk) / n_bytes
        report = {"mb_per_s": n_bytes / 1e6 / seconds, "from_disk": from_disk}
        pipe.send((report, digest.hexdigest()))


def drop_cached_pages(bench: Bench) -> None:
    """Of both files, as far as no process has them mapped."""
    for path in bench.paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def memory_limit(name: str, n_bytes: int) -> Iterator[Path | None]:
    """A cgroup whose processes and their cached pages take no more; None where none can be made."""
    group = CGROUPS / f"bench_tokens_{os.getpid()}_{name}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(n_bytes))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):  # empty it, or its pages stay charged until they go
            (group / "memory.force_empty").write_text("0")
        group.rmdir()


def measure(bench: Bench, limit_bytes: int | None) -> tuple[dict[str, dict[str, float]], str]:
    """Medians over the rounds by reader, and how the files were kept out of memory, if at all.

    All readers read the same rows. The first round warms up and compares what they have read.
    """
    context = multiprocessing.get_context("fork")  # what is imported is not charged
    reports: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
    rng, how = np.random.default_rng(1), "warm" if limit_bytes is None else "cgroup"
    with contextlib.ExitStack() as stack:
        pipes = {}
        for name in READERS:
            group = None
            if limit_bytes is not None:
                group = stack.enter_context(memory_limit(name, limit_bytes))
                how = how if group is not None else "fadvise"
            pipes[name], theirs = context.Pipe()
            reader = context.Process(
                target=take_turns, args=(name, bench, theirs, group), daemon=True
            )
            reader.start()
            stack.callback(reader.join, 10)  # before its cgroup goes
            stack.callback(pipes[name].send, None)
        fixed = rng.permutation(bench.n_images)[: bench.n_read]
        for number in range(bench.n_rounds + 1):
            warm = limit_bytes is None
            rows = rng.permutation(fixed if warm else bench.n_images)[: bench.n_read]
            digests = set()
            for name in sorted(pipes, reverse=bool(number % 2)):
                if how != "warm":
                    drop_cached_pages(bench)
                pipes[name].send((rows, number == 0))
                report, digest = pipes[name].recv()
                reports[name].append(report)
                digests.add(digest)
            assert len(digests) == 1, "the readers do not read the same"
    results = {
        name: {key: median(turn[key] for turn in turns[1:]) for key in turns[0]}
        for name, turns in reports.items()
    }
    return results, how


# -- training ---------------------------------------------------------------------------

WORK_GOAL = 0.8
"""Share of the speed from memory."""
N_TRAINED = 640
"""Images of a turn that waits; a tenth of them of one that computes."""
RATES = (100, 1000, 2000)
"""Images per second of GPUs."""


Take = Callable[[torch.Tensor], object]


def compute_blocks(row_shape: tuple[int, ...]) -> Take:
    """Forward and backward of two blocks, without a step."""
    layer = torch.nn.TransformerEncoderLayer(
        *(row_shape[-1], 12 if row_shape[-1] % 12 == 0 else 4, 4 * row_shape[-1]),
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    blocks = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return lambda batch: blocks(batch.float().nan_to_num(0, 1, -1).clamp(-1, 1)).sum().backward()


def wait_at(rate: float) -> Take:
    """Take as long as a GPU of so many images per second."""
    return lambda batch: time.sleep(len(batch) / rate)


def measure_training(bench: Bench) -> dict[str, dict[str, float]]:
    """Images per second of a training that never waits for tokens, and of one that reads them.

    Medians over the rounds. Blocks on the CPU do not wait where tokens are in memory; a GPU that
    does not wait has the speed that it was given.
    """
    n_few, n_many = (min(n, bench.n_images) for n in (N_TRAINED // 10, N_TRAINED))
    blocks, results = compute_blocks(bench.row_shape), {}
    with FeatureStore.open(bench.paths[1]) as store:
        memory = ResidentTokens.load(store, np.arange(n_few), torch.device("cpu"))
        disk = StoredTokens(store, np.arange(bench.n_images))

        def train(source: TokenSource, n_known: int, n_rows: int, take: Take) -> float:
            rows = torch.randperm(n_known)[:n_rows]
            views = torch.zeros_like(rows)
            drop_cached_pages(bench)
            started = time.perf_counter()
            for batch in source.batches(rows, views, BATCH_SIZE):
                take(batch)
            return n_rows / (time.perf_counter() - started)

        turns = [
            (train(memory, n_few, n_few, blocks), train(disk, bench.n_images, n_few, blocks))
            for _ in range(bench.n_rounds + 1)
        ][1:]
        without, read = (median(speeds) for speeds in zip(*turns, strict=True))
        results["two blocks on the CPU"] = {"without": without, "disk": read}
        for rate in RATES:
            take = wait_at(rate)
            speeds = [train(disk, bench.n_images, n_many, take) for _ in range(bench.n_rounds)]
            results[f"a GPU of {rate:,} images/s"] = {"without": rate, "disk": median(speeds)}
    return {name: of | {"ratio": of["disk"] / of["without"]} for name, of in results.items()}


def tabulate_training(results: dict[str, dict[str, float]]) -> str:
    """A row per consumer."""
    rows = [["training", "without waiting", "from disk", "ratio", "goal", "met"]]
    for name, of in results.items():
        speeds = [f"{of[where]:,.1f} images/s" for where in ("without", "disk")]
        verdict = "yes" if of["ratio"] >= WORK_GOAL else "no"
        rows.append([name, *speeds, f"{of['ratio']:.2f}", f"{WORK_GOAL:.2f}", verdict])
    return format_table(rows)


# -- together ---------------------------------------------------------------------------

KINDS = {
    "warm": "in the page cache",
    "cgroup": "larger than memory (cgroup)",
    "fadvise": "cached pages dropped before each turn (fadvise; no cgroup could be made)",
}


def main() -> None:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gb", type=float, default=3.0, help="size of each file")
    parser.add_argument("--rounds", type=int, default=3, help="turns that count")
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is measured")
    parser.add_argument("--quick", action="store_true", help="64 small rows: does it run at all?")
    parser.add_argument("--out", type=Path, default=results_path("tokens"))
    options = parser.parse_args()
    row_shape = (1, 5, 64) if options.quick else (1, 197, 768)
    n_images = 64 if options.quick else round(options.gb * 1e9 / np.prod(row_shape) / 2)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(Path(folder), n_images, row_shape, min(n_images, 2000), options.rounds)
        write_files(bench)
        written_s = time.perf_counter() - started
        limit_bytes = int(SHARE_IN_MEMORY * bench.n_token_bytes) + PROCESS_BYTES
        measured = [measure(bench, None), measure(bench, limit_bytes)]
        training = measure_training(bench)
    results = {how: by_reader for by_reader, how in measured}
    ratios = {
        (how, name): result["mb_per_s"] / by_reader["flat"]["mb_per_s"]
        for how, by_reader in results.items()
        for name, result in by_reader.items()
    }
    goals = [
        {"figure": name, "turns": how, "ratio": ratio, "goal": GOAL, "met": ratio >= GOAL}
        for (how, name), ratio in ratios.items()
        if name in JUDGED
    ]
    machine, elapsed_s = describe_machine(), time.perf_counter() - started
    print(
        f"{n_images:,} images, {bench.n_token_bytes / 1e9:.2f} GB in each file; random rows in "
        f"batches of {BATCH_SIZE}, {options.rounds} turns each; memory limit of the cgroup "
        f"{limit_bytes / 1e9:.2f} GB; written in {written_s:.0f} s, {elapsed_s:.0f} s in all"
    )
    rows = [["", "MB/s", "from disk", "÷ flat", "goal", "met"]]
    for how, by_reader in results.items():
        rows.append([KINDS[how], *[""] * 5])
        for name, result in by_reader.items():
            cells = [f"{result['mb_per_s']:,.0f}", f"{result['from_disk']:.0%}"]
            ratio = ratios[how, name]
            verdict = [f"{GOAL:.2f}", "yes" if ratio >= GOAL else "no"]
            rows.append(
                [f"  {name}", *cells, f"{ratio:.2f}", *(verdict if name in JUDGED else ["", ""])]
            )
    print(format_table(rows))
    print(tabulate_training(training))
    settings = {
        "images": n_images,
        "row_shape": row_shape,
        "store_gb": bench.n_token_bytes / 1e9,
        "memory_limit_gb": limit_bytes / 1e9,
        "rounds": options.rounds,
    }
    write_json(
        options.out,
        {"machine": machine, "settings": settings, "results": results, "goals": goals}
        | {"training": training, "elapsed_s": elapsed_s},
    )


if __name__ == "__main__":
    main()
