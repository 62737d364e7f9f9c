"""Cohort to store by several workers: each writes a part, and the parts become the store.

The driver creates the store and holds its lock. Workers, wherever they are, see the store, the
parts and the images through a file system that all share. A part is a store of its own, so whatever
interrupts a worker or the driver, the rows that were finished are found there and kept.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from joblib import cpu_count, delayed
from numpy.typing import NDArray

from cxr_cache.common.backends import check_backend, open_backend, streams_results
from cxr_cache.config import EncoderOptions, ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import (
    BackendError,
    ConfigError,
    DiskError,
    StoreMismatchError,
    WorkerLostError,
)
from cxr_cache.store.extract import ExtractSummary, extract_embeddings, give_up, run_extraction
from cxr_cache.store.feature_store import DONE, WITHOUT_TOKENS, FeatureStore, Space
from cxr_cache.store.merge import copy_part, require_same_kind

logger = logging.getLogger(__name__)

MAX_PART_ROWS: Final = 2048
"""Enough to make the eight canaries that open a part cheap, few enough to show progress."""
N_ATTEMPTS: Final = 3
"""How often lost workers are replaced by new ones."""


def load_once(options: EncoderOptions) -> Encoder:
    """Load an encoder, once per process."""
    with _loading:  # a Dask worker may have several threads
        return _load(options)


_loading: Final = threading.Lock()


@lru_cache(maxsize=1)
def _load(options: EncoderOptions) -> Encoder:
    return load_encoder(**vars(options))


@dataclass(frozen=True)
class Workers:
    """Which workers extract; see :func:`cxr_cache.common.backends.open_backend`."""

    backend: str = "loky"
    n_workers: int | None = None
    """None: one per core of this machine, or all that a scheduler has."""
    scheduler: str | None = None

    def count(self) -> int:
        """Workers to start, or to wait for."""
        if self.n_workers is not None:
            return self.n_workers
        return cpu_count() if self.scheduler is None else 1


@dataclass(frozen=True)
class _Part:
    """What a worker is told."""

    path: Path
    store_path: Path
    rows: NDArray[np.intp]
    image_dir: Path
    encoder: EncoderOptions
    config: ExtractConfig


def extract_on_workers(
    cohort: Cohort,
    image_dir: str | Path,
    store_path: str | Path,
    encoder: EncoderOptions,
    config: ExtractConfig | None = None,
    workers: Workers | None = None,
    *,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_space: Callable[[Space], None] | None = None,
) -> ExtractSummary:
    """Do what :func:`cxr_cache.store.extract.extract_embeddings` does, with several workers.

    Rows still to do are cut into parts, written in ``STORE.parts/`` beside the store. A part that
    is finished is copied into the store, read back, and removed. When a worker is lost, another
    goes on with its part; when the driver is, the next call begins with the parts that are there.
    `on_progress` is called after each part. All paths mean the same on every worker. Each worker
    loads the encoder, and so does the driver, for the canaries and to compare identities.

    Raises
    ------
    BackendError
        The workers cannot be started or reached, or do not see the store or the images.
    WorkerLostError
        Workers were lost again and again.
    ConfigError, EncoderError, StoreMismatchError, TooManyFailuresError, StoreBusyError, DiskError
        As there.
    """
    config, workers = config or ExtractConfig(), workers or Workers()
    if config.part is not None:
        raise ConfigError("--part and --backend both split the image table. Give one of them.")
    if config.compile:
        raise ConfigError(
            "--compile does not go with --backend: workers would compile the encoder again for "
            "each part of the table, which takes as long as it saves. Leave one of them out."
        )
    image_dir, store_path = Path(image_dir).resolve(), Path(store_path).absolute()
    folder = store_path.with_name(f"{store_path.name}.parts")
    check_backend(workers.backend, n_workers=workers.count(), scheduler=workers.scheduler)
    _collect_left(store_path, folder)
    own = load_once(encoder)
    encoder = replace(encoder, precision=own.precision)  # one for all, whatever auto means there

    def fill(store: FeatureStore, summary: ExtractSummary) -> None:
        parts = _plan_parts(store, folder, image_dir, encoder, config, workers.count())
        folder.mkdir(exist_ok=True)
        try:
            _fill_by_parts(store, parts, workers, summary, on_progress)
        finally:
            if not any(folder.glob("*.h5")):
                shutil.rmtree(folder)

    return run_extraction(cohort, image_dir, store_path, own, config, fill, on_space=on_space)


def _plan_parts(
    store: FeatureStore,
    folder: Path,
    image_dir: Path,
    encoder: EncoderOptions,
    config: ExtractConfig,
    n_workers: int,
) -> list[_Part]:
    """Rows still to do in neighbouring groups, at least one per worker."""
    rows = np.flatnonzero(store.status != DONE)
    n_parts = min(len(rows), max(n_workers, math.ceil(len(rows) / MAX_PART_ROWS)))
    config = replace(
        config, recheck_images=False, max_failures=config.tolerated_failures(len(store))
    )
    return [
        _Part(folder / f"{i:06d}.h5", store.path, chosen, image_dir, encoder, config)
        for i, chosen in enumerate(np.array_split(rows, n_parts) if n_parts else [])
    ]


def _fill_by_parts(
    store: FeatureStore,
    parts: list[_Part],
    workers: Workers,
    summary: ExtractSummary,
    on_progress: Callable[[int, int, int], None] | None,
) -> None:
    """Have every part made, and take it over; parts of lost workers are done again."""
    started, row_of_id = time.perf_counter(), pd.Index(store.image_ids)
    left = {part.path: part for part in parts}
    made_s, failures = 0.0, list[tuple[str, str]]()
    for attempt in range(N_ATTEMPTS if parts else 0):
        try:
            with closing(_make_parts(list(left.values()), workers)) as finished:
                for path, made in finished:
                    _take_over(store, path, row_of_id)
                    part = left.pop(path)
                    _add_work(summary, made)
                    made_s += made.elapsed_s
                    failures += made.failures
                    if on_progress is not None:
                        on_progress(made.n_computed, made.n_failed, sum(len(p.rows) for p in parts))
                    if len(failures) > (part.config.max_failures or 0):
                        give_up(store, failures, part.config.max_failures or 0)
            break
        except WorkerLostError as error:
            if attempt == N_ATTEMPTS - 1:
                raise
            logger.warning("%s Its parts are done again by new workers.", error)
    _share_time(summary, time.perf_counter() - started, made_s)


def _make_parts(
    parts: list[_Part], workers: Workers
) -> Generator[tuple[Path, ExtractSummary], None, None]:
    """Path and summary of each part as soon as it is made, in any order."""
    streams = streams_results(workers.backend)
    options = {"return_as": "generator_unordered"} if streams else {}
    with open_backend(
        workers.backend, n_workers=workers.count(), scheduler=workers.scheduler, **options
    ) as parallel:
        yield from parallel(delayed(_make_part)(part) for part in parts)


def _make_part(part: _Part) -> tuple[Path, ExtractSummary]:
    """The worker's side: begin a part, or go on with what a lost worker has left of it."""
    for path in (part.store_path, part.path.parent, part.image_dir):
        if not path.exists():
            raise BackendError(
                f"The worker on {socket.gethostname()} does not see {path}. The store and the "
                "images must lie on a file system that all workers and this machine share, under "
                "the same path."
            )
    with FeatureStore.open(part.store_path) as store:
        cohort = store.cohort.take(part.rows)
        if not part.path.exists():
            _begin_part(store, cohort, part)
    summary = extract_embeddings(
        cohort, part.image_dir, part.path, load_once(part.encoder), _adapt_to_worker(part.config)
    )
    return part.path, summary


def _begin_part(store: FeatureStore, cohort: Cohort, part: _Part) -> None:
    """A store of the part's rows; those that lack only tokens are there already."""
    lacking = np.flatnonzero(store.status[part.rows] == WITHOUT_TOKENS)
    FeatureStore.create(
        part.path,
        cohort,
        encoder=store.header.encoder,
        features=store.feature_shapes,
        canary=store.canary,
        boundary_block=store.header.boundary_block,
        tokens_dtype=store.header.tokens_dtype,
        fill=lambda new: new.copy_rows(store, part.rows[lacking], lacking),
    ).close()


def _adapt_to_worker(config: ExtractConfig) -> ExtractConfig:
    """Dask starts workers that may have no child processes, unless it is told otherwise."""
    if not multiprocessing.current_process().daemon:
        return config
    if config.num_workers:
        raise BackendError(
            f"This worker may not start the {config.num_workers} decoding processes of "
            "--num-workers. Leave it out, or start workers by `dask worker --no-nanny`."
        )
    return replace(config, num_workers=0)


def _take_over(store: FeatureStore, path: Path, row_of_id: pd.Index[str]) -> None:
    """Copy a part into the store, read it back, and remove it."""
    with FeatureStore.open(path, "r+") as part:  # nobody may be writing to it
        require_same_kind(store, part)
        damaged = part.find_damaged()
        rows = np.setdiff1d(np.arange(len(part)), damaged)
        to_rows = row_of_id.get_indexer(pd.Index(part.image_ids[rows]))
        wanted = to_rows >= 0
        wanted[wanted] = store.status[to_rows[wanted]] != DONE
        copy_part(store, part, rows[wanted], to_rows[wanted])
        if len(lost := store.find_damaged(to_rows[wanted])):
            raise DiskError(
                f"{len(lost):,} rows of {path} read back otherwise from {store.path} than they "
                "were written. The part is kept. Look after the disk, then run the same command."
            )
    path.unlink()


def _collect_left(store_path: Path, folder: Path) -> None:
    """Take over the parts that an interrupted run has left, finished or not."""
    left = sorted(folder.glob("*.h5"))
    if not left:
        return
    if not store_path.exists():
        raise StoreMismatchError(
            f"{folder} holds parts of a store that is not at {store_path} any more. Restore it, or "
            "delete the folder to extract these images again."
        )
    with FeatureStore.open(store_path, "r+") as store:
        row_of_id = pd.Index(store.image_ids)
        for path in left:
            _take_over(store, path, row_of_id)


def _add_work(summary: ExtractSummary, part: ExtractSummary) -> None:
    """Count what a worker did; its times are sums over workers, until :func:`_share_time`."""
    summary.n_computed += part.n_computed
    summary.n_tried += part.n_tried
    summary.tokenless += part.tokenless
    for name in ("decode_s", "encode_s", "disk_s"):
        setattr(summary, name, getattr(summary, name) + getattr(part, name))
    if part.largest_batch:
        summary.largest_batch = min(part.largest_batch, summary.largest_batch or part.largest_batch)


def _share_time(summary: ExtractSummary, elapsed_s: float, made_s: float) -> None:
    """Turn sums over workers into what the average worker's time went to."""
    for name in ("decode_s", "encode_s", "disk_s"):
        setattr(summary, name, getattr(summary, name) * elapsed_s / made_s if made_s else 0.0)
