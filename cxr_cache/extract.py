"""Cohort and encoder to store: every image through the frozen encoder, once."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_cache.cohort import Cohort
from cxr_cache.decoding import Batch, dead_workers_explained, decode_batches
from cxr_cache.encoder import Encoder
from cxr_cache.encoding import encode_views
from cxr_cache.errors import ConfigError, TooManyFailuresError
from cxr_cache.resume import open_or_create
from cxr_cache.store import DONE, FAILED, PENDING, FeatureStore


@dataclass(frozen=True)
class ExtractConfig:
    """How to run an extraction; nothing here changes what the embeddings mean."""

    batch_size: int = 32
    num_workers: int = min(8, os.cpu_count() or 1)
    """Decoding processes; 0 decodes in the main process."""
    flip: bool = False
    """Also embed each image's mirror image, as a second view."""
    max_failures: int | None = None
    """Failed rows that are tolerated; None means 1 % of the rows, at least 100."""
    part: tuple[int, int] | None = None
    """(2, 3) extracts the second third of the rows, for ``merge`` to join; None extracts all."""
    recheck_images: bool = True
    """Hash the files of rows that are done already, and compute those that have changed."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        if self.num_workers < 0:
            raise ConfigError(f"--num-workers is {self.num_workers}; it must be 0 or more.")
        if self.max_failures is not None and self.max_failures < 0:
            raise ConfigError(f"--max-failures is {self.max_failures}; it must be 0 or more.")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ConfigError(
                f"--part is {self.part[0]}/{self.part[1]}; it must be one of 1/N, 2/N ... N/N."
            )

    def tolerated_failures(self, n_images: int) -> int:
        """Failed rows with which an extraction of `n_images` still counts as a success."""
        return max(100, n_images // 100) if self.max_failures is None else self.max_failures


@dataclass
class ExtractSummary:
    """What an extraction did, and where its time went."""

    store_path: Path
    n_images: int = 0
    n_done: int = 0
    n_failed: int = 0
    n_pending: int = 0
    n_computed: int = 0
    """Rows encoded by this call; the others were there already."""
    n_taken_over: int = 0
    n_damaged: int = 0
    """Rows that were done but whose bytes had changed on the disk; computed again."""
    changed: tuple[str, ...] = ()
    """Images whose file had changed; computed again."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Image id and reason of every failed row."""
    decode_s: float = 0.0
    """Time the encoder waited for pixels."""
    inference_s: float = 0.0
    write_s: float = 0.0
    """Time the encoder waited for the disk."""
    elapsed_s: float = 0.0

    def to_text(self) -> str:
        """Closing lines for a terminal: the count, the failures by reason, speed and its limit."""
        lines = [
            f"{self.store_path}: {self.n_images:,} images = {self.n_done:,} done + "
            f"{self.n_failed:,} failed + {self.n_pending:,} pending"
        ]
        if self.n_taken_over:
            lines.append(f"  {self.n_taken_over:,} rows taken over from the store as it was")
        if self.n_damaged:
            lines.append(f"  {self.n_damaged:,} damaged rows were found, to be computed again")
        if self.changed:
            lines.append(
                f"  {len(self.changed):,} image files have changed, to be computed again "
                f"(first: {self.changed[0]})"
            )
        for reason, count in Counter(reason for _, reason in self.failures).most_common(8):
            first = next(image_id for image_id, why in self.failures if why == reason)
            lines.append(f"  {count:,} failed: {reason} (first: {first})")
        if not self.n_computed:
            return "\n".join([*lines, "  nothing was left to compute"])
        waits = {
            "decode": self.decode_s,
            "inference": self.inference_s,
            "write": self.write_s,
        }
        shares = ", ".join(f"{name} {s / self.elapsed_s:.0%}" for name, s in waits.items())
        lines.append(
            f"  {self.n_computed:,} images in {self.elapsed_s:,.0f} s: "
            f"{self.n_computed / self.elapsed_s:,.1f} images/s; time went to {shares}; "
            f"the limit was {max(waits, key=lambda name: waits[name])}"
        )
        return "\n".join(lines)


def extract_embeddings(
    cohort: Cohort,
    image_dir: str | Path,
    store_path: str | Path,
    encoder: Encoder,
    config: ExtractConfig | None = None,
    *,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> ExtractSummary:
    """Embed every image of a cohort that the store does not hold yet.

    Where the store does not exist it is created; where it does, extraction continues. Rows of
    another cohort are taken over if their image bytes are the same; rows whose image has changed
    are computed again. Whatever ends the call (an error, Ctrl-C), rows that were finished are in
    the store.

    Parameters
    ----------
    cohort
        The image table; rows of the store keep its order.
    image_dir
        Folder that the image ids are relative to.
    store_path
        The HDF5 file.
    encoder
        What makes the embeddings; a store made by another encoder is refused.
    config
        Batch size, workers, views and tolerated failures.
    on_progress
        Called with (rows done now, rows failed now, rows still to do at the start) after each
        batch.

    Returns
    -------
    ExtractSummary
        Counts, reasons for failures, and where the time went.

    Raises
    ------
    StoreMismatchError
        The store holds features of another encoder, preprocessing, precision or set of views, or
        another part.
    TooManyFailuresError
        More images failed than `config` tolerates; everything done so far is kept.
    StoreBusyError
        Another process writes to the store.
    DiskFullError, DiskError
        There is not enough space for the whole store, or the disk failed.
    """
    config = config or ExtractConfig()
    image_dir, store_path = Path(image_dir), Path(store_path)
    if not image_dir.is_dir():
        raise ConfigError(f"{image_dir} is not a folder; give the one with the images.")
    if not len(cohort):
        raise ConfigError("The image table has no rows, so there is nothing to extract.")
    cohort, part = _take_part(cohort, config.part)
    summary = ExtractSummary(store_path)
    started = time.perf_counter()
    resumed = open_or_create(
        store_path,
        cohort,
        image_dir,
        encoder,
        n_views=2 if config.flip else 1,
        part=part,
        recheck_images=config.recheck_images,
    )
    summary.n_taken_over, summary.n_damaged = resumed.n_taken_over, resumed.n_damaged
    summary.changed = resumed.changed
    with resumed.store as store:
        try:
            _fill(store, image_dir, encoder, config, summary, on_progress)
        finally:
            summary.elapsed_s = time.perf_counter() - started
            _count(store, summary)
    return summary


def _take_part(
    cohort: Cohort, part: tuple[int, int] | None
) -> tuple[Cohort, dict[str, int] | None]:
    """The rows that this run is about, and what its store says about them."""
    if part is None:
        return cohort, None
    number, n_parts = part
    first, end = (len(cohort) * k // n_parts for k in (number - 1, number))
    if first == end:
        raise ConfigError(
            f"--part is {number}/{n_parts}, but there are only {len(cohort):,} images. Use fewer "
            "parts."
        )
    described = {
        "number": number,
        "of": n_parts,
        "first_row": first,
        "n_rows_of_whole": len(cohort),
    }
    return cohort.take(slice(first, end)), described


# -- filling it -------------------------------------------------------------------------


def _fill(
    store: FeatureStore,
    image_dir: Path,
    encoder: Encoder,
    config: ExtractConfig,
    summary: ExtractSummary,
    on_progress: Callable[[int, int, int], None] | None,
) -> None:
    """Decode in workers, encode here, write in one thread; the three overlap."""
    rows = np.flatnonzero(store.status != DONE)
    tolerated = config.tolerated_failures(len(store))
    batches = decode_batches(
        store.image_ids,
        rows,
        image_dir,
        encoder.preprocessing,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )
    n_failed = 0
    with dead_workers_explained(), ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        try:
            for batch in _timed(batches, summary):
                mark = time.perf_counter()
                features = (
                    encode_views(encoder, batch.pixels, flip=config.flip) if len(batch.rows) else {}
                )
                _set_aside_non_finite(batch, features)
                summary.inference_s += time.perf_counter() - mark

                mark = time.perf_counter()
                if writing is not None:
                    writing.result()  # at most one batch waits for the disk
                writing = writer.submit(_write, store, batch, features)
                summary.write_s += time.perf_counter() - mark

                n_failed += len(batch.failures)
                summary.n_computed += len(batch.rows)
                if on_progress is not None:
                    on_progress(len(batch.rows), len(batch.failures), len(rows))
                if n_failed > tolerated:
                    writing.result()
                    _give_up(store, n_failed, tolerated)
        finally:
            mark = time.perf_counter()
            if writing is not None:
                writing.result()
            summary.write_s += time.perf_counter() - mark


def _give_up(store: FeatureStore, n_failed: int, tolerated: int) -> None:
    failed = np.flatnonzero(store.status == FAILED)[:5]
    reasons = zip(store.image_ids[failed], store.read_errors(failed), strict=True)
    raise TooManyFailuresError(
        f"{n_failed:,} images failed, more than the {tolerated:,} tolerated (--max-failures). "
        f"The first:\n"
        + "\n".join(f"  {image_id}: {reason}" for image_id, reason in reasons)
        + f"\nWhat is done is kept in {store.path}; the same command continues there."
    )


def _write(store: FeatureStore, batch: Batch, features: dict[str, NDArray[Any]]) -> None:
    if len(batch.rows):
        store.commit(batch.rows, features, batch.sha256)
    store.record_failures(
        [row for row, _ in batch.failures], [reason for _, reason in batch.failures]
    )


def _set_aside_non_finite(batch: Batch, features: dict[str, NDArray[Any]]) -> None:
    """Fail the rows for which the encoder gave NaN or infinity; never store them."""
    if not features:
        return
    usable = np.isfinite(features["embeddings"]).all(axis=(1, 2))
    usable &= np.isfinite(features["pooled"]).all(axis=(1, 2))
    if usable.all():
        return
    reason = "the encoder gave NaN or infinity for this image; try --precision fp32"
    batch.failures += [(int(row), reason) for row in batch.rows[~usable]]
    batch.rows, batch.sha256 = batch.rows[usable], batch.sha256[usable]
    for name in features:
        features[name] = features[name][usable]


def _count(store: FeatureStore, summary: ExtractSummary) -> None:
    status = store.status
    summary.n_images = len(status)
    summary.n_done = int((status == DONE).sum())
    summary.n_failed = int((status == FAILED).sum())
    summary.n_pending = int((status == PENDING).sum())
    failed = np.flatnonzero(status == FAILED)
    image_ids = store.image_ids[failed].tolist()
    summary.failures = list(zip(image_ids, store.read_errors(failed), strict=True))


def _timed(batches: Iterator[Batch], summary: ExtractSummary) -> Iterator[Batch]:
    """Pass batches on, and count the time spent waiting for them."""
    while True:
        mark = time.perf_counter()
        batch = next(batches, None)
        summary.decode_s += time.perf_counter() - mark
        if batch is None:
            return
        yield batch
