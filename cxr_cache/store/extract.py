"""Cohort and encoder to store: every image through the frozen encoder, once."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from joblib import cpu_count
from numpy.typing import NDArray

from cxr_cache.common.manifest import mark_written
from cxr_cache.common.wording import count
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.decoding import Batch, dead_workers_explained, decode_batches
from cxr_cache.datasets.images import require_any_image, require_stated_bits
from cxr_cache.encoders.encoder import Encoder, trainable_parameter_names
from cxr_cache.encoders.encoding import (
    MIN_COSINE,
    FittingEncoder,
    compiled,
    cosines,
    encoding_threads,
    largest_token,
)
from cxr_cache.errors import ConfigError, StoreMismatchError, TooManyFailuresError
from cxr_cache.store.feature_store import (
    DONE,
    FAILED,
    WITHOUT_TOKENS,
    FeatureStore,
    RowCounts,
    Space,
    are_finite,
)
from cxr_cache.store.resume import open_or_create


def resolve_for(config: ExtractConfig, device: torch.device) -> ExtractConfig:
    """Fill in the numbers that `config` leaves to the device."""
    on_cpu = device.type == "cpu"
    defaults = {
        "batch_size": 8 if on_cpu else 256,  # each core of a CPU has a batch in its own caches
        "num_workers": cpu_count() // 4 if on_cpu else min(16, cpu_count()),
    }
    missing = {name: n for name, n in defaults.items() if getattr(config, name) is None}
    return replace(config, **missing)


@dataclass(kw_only=True)
class ExtractSummary(RowCounts):
    """What an extraction did, how many rows are in which state since, and where its time went."""

    store_path: Path
    n_tried: int = 0
    """Rows whose image was read by this call; the others were there already."""
    n_computed: int = 0
    """Rows encoded by this call."""
    n_taken_over: int = 0
    n_damaged: int = 0
    """Rows that were done but whose bytes had changed on the disk; computed again."""
    changed: tuple[str, ...] = ()
    """Images whose file had changed; computed again."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Image id and reason of every failed row."""
    tokenless: list[tuple[str, str]] = field(default_factory=list)
    """Image id and reason of rows that got no tokens in this call, and keep their embedding."""
    largest_batch: int | None = None
    """Images that went into the device's memory at once, where a batch did not."""
    decode_s: float = 0.0
    """Time that passed waiting for pixels, while they were decoded."""
    encode_s: float = 0.0
    """Time that decoded batches waited for the encoder."""
    disk_s: float = 0.0
    """Time that passed waiting for files to be read, and for features to be written."""
    compile_s: float = 0.0
    """Time that passed before the first image while the encoder was compiled."""
    elapsed_s: float = 0.0

    def failure(self, config: ExtractConfig) -> str | None:
        """Say in one sentence why this extraction has not succeeded; None where it has."""
        if self.n_failed == self.n_images:
            return f"No image could be used, so {self.store_path} holds no embedding."
        if self.n_failed > config.tolerated_failures(self.n_images):
            return f"{count(self.n_failed, 'image')} failed, more than --max-failures tolerates."
        return None

    def to_text(self) -> str:
        """Closing lines for a terminal: the count, the failures by reason, speed and its limit."""
        lines = self.describe(self.store_path)
        if self.n_taken_over:
            lines.append(f"  {self.n_taken_over:,} rows taken over from the store as it was")
        if self.n_damaged:
            lines.append(f"  {self.n_damaged:,} damaged rows were found, to be computed again")
        if self.changed:
            lines.append(
                f"  {len(self.changed):,} image files have changed, to be computed again "
                f"(first: {self.changed[0]})"
            )
        lines += _by_reason("failed", self.failures)
        lines += _by_reason("got no tokens and keep their embedding", self.tokenless)
        if not self.n_computed:
            tried = f"  none of {count(self.n_tried, 'image')} could be used; see the reasons above"
            return "\n".join([*lines, tried if self.n_tried else "  nothing was left to compute"])
        if self.largest_batch:
            lines.append(
                f"  the device's memory took {self.largest_batch:,} images at a time, not a batch"
            )
        if self.compile_s:
            lines.append(f"  compiling the encoder took {self.compile_s:,.0f} s of the time below")
        waits = {"disk": self.disk_s, "decode": self.decode_s, "encoder": self.encode_s}
        shares = ", ".join(f"{name} {s / self.elapsed_s:.0%}" for name, s in waits.items())
        lines.append(
            f"  {self.n_computed:,} images in {self.elapsed_s:,.0f} s: "
            f"{self.n_computed / self.elapsed_s:,.1f} images/s; time went to {shares}; "
            f"the limit was: {max(waits, key=lambda name: waits[name])}"
        )
        return "\n".join(lines)


def _by_reason(what: str, images: list[tuple[str, str]]) -> list[str]:
    """One line for each of the commonest reasons."""
    counts = Counter(reason for _, reason in images)
    first = {reason: image_id for image_id, reason in reversed(images)}
    return [
        f"  {n:,} {what}: {reason} (first: {first[reason]})" for reason, n in counts.most_common(8)
    ]


def extract_embeddings(
    cohort: Cohort,
    image_dir: str | Path,
    store_path: str | Path,
    encoder: Encoder,
    config: ExtractConfig | None = None,
    *,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_space: Callable[[Space], None] | None = None,
) -> ExtractSummary:
    """Embed every image of a cohort that the store does not hold yet.

    Where the store does not exist it is created; where it does, extraction continues. Rows of
    another cohort are taken over if their image bytes are the same; rows whose image has changed
    are computed again. A store without tokens can be given them: its embeddings stay as they are.
    Whatever ends the call (an error, Ctrl-C), rows that were finished are in the store.

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
    on_space
        Called with what the file takes and what is free, before one is written or replaced.

    Returns
    -------
    ExtractSummary
        Counts, reasons for failures, and where the time went.

    Raises
    ------
    EncoderError
        Tokens are wanted of a tower that cannot be split, or at a block that it does not have.
    StoreMismatchError
        The store holds features of another encoder, preprocessing, precision or set of views,
        tokens of another block, or another part.
    TooManyFailuresError
        More images failed than `config` tolerates; everything done so far is kept.
    StoreBusyError
        Another process writes to the store.
    DiskFullError, DiskError
        There is not enough space for the whole store, or the disk failed.

    Examples
    --------
    >>> cohort, encoder = load_cohort("DATA"), load_encoder()  # doctest: +SKIP
    >>> summary = extract_embeddings(
    ...     cohort, "DATA/images", "features.h5", encoder, ExtractConfig(unfreeze_layers=2)
    ... )  # doctest: +SKIP
    >>> print(summary.to_text())  # doctest: +SKIP
    """
    config = resolve_for(config or ExtractConfig(), encoder.device)

    def fill(store: FeatureStore, summary: ExtractSummary) -> None:
        _fill(store, Path(image_dir), encoder, config, summary, on_progress)

    return run_extraction(cohort, image_dir, store_path, encoder, config, fill, on_space=on_space)


def run_extraction(
    cohort: Cohort,
    image_dir: str | Path,
    store_path: str | Path,
    encoder: Encoder,
    config: ExtractConfig,
    fill: Callable[[FeatureStore, ExtractSummary], None],
    *,
    on_space: Callable[[Space], None] | None = None,
) -> ExtractSummary:
    """Open or create the store, have `fill` do the rows that are left, and count.

    Parameters and errors are those of :func:`extract_embeddings`; `fill` is given the store, open
    for writing, and the summary to add its work to.
    """
    image_dir, store_path = Path(image_dir), Path(store_path)
    if not len(cohort):
        raise ConfigError("The image table has no rows, so there is nothing to extract.")
    if config.unfreeze_layers is not None:
        trainable_parameter_names(encoder, config.unfreeze_layers)  # raises where there are none
    cohort, part = _take_part(cohort, config.part)
    require_any_image(image_dir, [] if store_path.exists() else cohort.image_ids)
    if not store_path.exists():
        require_stated_bits(image_dir, cohort.image_ids, encoder.preprocessing)
    summary = ExtractSummary(store_path=store_path)
    started = time.perf_counter()
    resumed = open_or_create(
        store_path,
        cohort,
        image_dir,
        encoder,
        n_views=2 if config.flip else 1,
        n_unfrozen=config.unfreeze_layers,
        tokens_dtype=config.tokens_dtype,
        part=part,
        recheck_images=config.recheck_images,
        on_space=on_space,
    )
    mark_written(store_path)
    summary.n_taken_over, summary.n_damaged = resumed.n_taken_over, resumed.n_damaged
    summary.changed = resumed.changed
    with resumed.store as store:
        if (store.status != DONE).any():  # images of a whole store may be gone
            require_any_image(image_dir, cohort.image_ids)
        try:
            fill(store, summary)
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
    place = {"first_row": first, "n_rows_of_whole": len(cohort)}
    return cohort.take(slice(first, end)), {"number": number, "of": n_parts, **place}


# -- filling it -------------------------------------------------------------------------


def _fill(
    store: FeatureStore,
    image_dir: Path,
    encoder: Encoder,
    config: ExtractConfig,
    summary: ExtractSummary,
    on_progress: Callable[[int, int, int], None] | None,
) -> None:
    """Decode, encode and write at once; bounded queues between, however many rows there are."""
    rows = np.flatnonzero(store.status != DONE)
    tolerated = config.tolerated_failures(len(store))
    failures: list[tuple[str, str]] = []
    encoded = _encoded_batches(store, rows, image_dir, encoder, config, summary)
    with dead_workers_explained(), ThreadPoolExecutor(1, "writer") as writer:
        writing: Future[None] | None = None
        try:
            for batch, features in encoded:
                with _counted(summary, "disk_s"):
                    if writing is not None:
                        writing.result()  # at most one batch waits for the disk
                    writing = writer.submit(_write, store, batch, features, summary)
                failures += [(str(store.image_ids[row]), why) for row, why in batch.failures]
                summary.n_computed += len(batch.rows)
                summary.n_tried += len(batch.rows) + len(batch.failures)
                if on_progress is not None:
                    on_progress(len(batch.rows), len(batch.failures), len(rows))
                if len(failures) > tolerated:
                    writing.result()
                    give_up(store, failures, tolerated)
        finally:
            encoded.close()
            with _counted(summary, "disk_s"):
                if writing is not None:
                    writing.result()


def _encoded_batches(
    store: FeatureStore,
    rows: NDArray[np.intp],
    image_dir: Path,
    encoder: Encoder,
    config: ExtractConfig,
    summary: ExtractSummary,
) -> Generator[tuple[Batch, dict[str, NDArray[Any]]], None, None]:
    """Rows as batches with their features, in order.

    One batch per encoding thread is under way, and one waits. Who waits for whom is counted: time
    spent on the next batch of pixels goes to decoding and the disk, as the batch's own time did;
    time spent on a result, while pixels wait, to the encoder.
    """
    assert config.batch_size is not None
    assert config.num_workers is not None
    batches = decode_batches(
        store.image_ids,
        rows,
        image_dir,
        encoder.preprocessing,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )
    fitting = FittingEncoder(
        encoder,
        flip=config.flip,
        n_unfrozen=config.unfreeze_layers,
        tokens_dtype=config.tokens_dtype,
    )
    under_way: deque[tuple[Batch, Future[dict[str, NDArray[Any]]]]] = deque()
    with (
        closing(batches),
        encoder.cast_weights(),
        encoding_threads(encoder.device) as (threads, n_threads),
        compiled(encoder, threads, min(config.batch_size, len(rows)), config.unfreeze_layers)
        if config.compile and len(rows)
        else nullcontext(0.0) as compile_s,
    ):
        summary.compile_s += compile_s
        for batch in _timed(batches, summary):
            under_way.append((batch, threads.submit(_encode, store, batch, fitting, config)))
            if len(under_way) > n_threads:
                yield _finish(under_way, summary)
        while under_way:
            yield _finish(under_way, summary)
    summary.largest_batch = fitting.largest


def _finish(
    under_way: deque[tuple[Batch, Future[dict[str, NDArray[Any]]]]], summary: ExtractSummary
) -> tuple[Batch, dict[str, NDArray[Any]]]:
    """The oldest batch that is being encoded, with its features."""
    batch, encoding = under_way.popleft()
    with _counted(summary, "encode_s"):
        return batch, encoding.result()


def give_up(store: FeatureStore, failures: list[tuple[str, str]], tolerated: int) -> NoReturn:
    """Raise TooManyFailuresError with the first images that failed, and why."""
    first = [f"  {image_id}: {reason}" for image_id, reason in failures[:5]]
    raise TooManyFailuresError(
        f"{count(len(failures), 'image')} failed, more than the {tolerated:,} tolerated "
        "(--max-failures). The first:\n"
        + "\n".join(first)
        + f"\n{count(len(store.embedded_rows), 'finished image')} in {store.path}; once the cause "
        "is mended, the same command continues there."
    )


def _encode(
    store: FeatureStore, batch: Batch, fitting: FittingEncoder, config: ExtractConfig
) -> dict[str, NDArray[Any]]:
    """The features of a batch as they are to be stored."""
    if not len(batch.rows):
        return {}
    features = fitting.encode(batch.pixels)
    if reasons := _find_unusable(batch, features, fitting.encoder, config):
        batch.failures += [(int(batch.rows[i]), reason) for i, reason in reasons.items()]
        usable = ~np.isin(np.arange(len(batch.rows)), list(reasons))
        batch.rows, batch.sha256 = batch.rows[usable], batch.sha256[usable]
        features = {name: values[usable] for name, values in features.items()}
    _keep_embeddings(store, batch, features)
    return features


def _find_unusable(
    batch: Batch, features: dict[str, NDArray[Any]], encoder: Encoder, config: ExtractConfig
) -> dict[int, str]:
    """Positions in the batch of what must not be stored, NaN and infinity, and why."""
    finite = are_finite(features["embeddings"]) & are_finite(features["pooled"])
    reason = "the encoder gave NaN or infinity for this image; try --precision fp32"
    reasons = {int(i): reason for i in np.flatnonzero(~finite)}
    if config.unfreeze_layers is None:
        return reasons
    for i in map(int, np.flatnonzero(finite & ~are_finite(features["tokens"]))):
        largest = largest_token(
            encoder, batch.pixels[i : i + 1], flip=config.flip, n_unfrozen=config.unfreeze_layers
        )
        reasons[i] = (
            f"its tokens reach {largest:,.0f}, beyond the 65,504 of float16, their type in the "
            "store; extract to another file with --tokens-dtype bfloat16, or take those that enter "
            "an earlier block (a larger --unfreeze-layers)"
        )
    return reasons


def _keep_embeddings(store: FeatureStore, batch: Batch, features: dict[str, NDArray[Any]]) -> None:
    """Put what rows without tokens hold in the place of what was computed again, bit for bit.

    Where the image is another one by now, or the bytes are damaged, the row is written anew. If the
    same image gives other embeddings, its tokens would not be theirs: StoreMismatchError.
    """
    lacking = batch.rows[store.read_rows("status", batch.rows) == WITHOUT_TOKENS]
    for rows, stored, intact in store.check_rows(lacking, WITHOUT_TOKENS):
        at = np.searchsorted(batch.rows, rows)
        kept = intact & (stored["image_sha256"] == batch.sha256[at]).all(axis=1)
        for name in store.features_of(WITHOUT_TOKENS):
            values = stored[name][kept]
            _require_agreement(store, name, rows[kept], values, features[name][at[kept]])
            features[name][at[kept]] = values


def _require_agreement(
    store: FeatureStore,
    name: str,
    rows: NDArray[np.intp],
    stored: NDArray[np.float32],
    computed: NDArray[np.float32],
) -> None:
    agreement = cosines(stored, computed).min(axis=1)  # (B, V) -> (B,)
    for row, value in zip(rows, agreement, strict=True):
        if not value >= MIN_COSINE:
            raise StoreMismatchError(
                f"{store.path} holds other {name} of {store.image_ids[row]} than the encoder gives "
                f"now: cosine {value:.6f}, at least {MIN_COSINE} expected of the same file. Tokens "
                f"would not belong to them. Compare the versions: {store.header.versions}. "
                f"`cxr-cache verify {store.path} --images DIR --sample {len(store)} --repair` "
                "finds all such rows, and `cxr-cache extract` then computes them anew; or write to "
                "another file."
            )


def _write(
    store: FeatureStore, batch: Batch, features: dict[str, NDArray[Any]], summary: ExtractSummary
) -> None:
    """Commit a batch; a row that has an embedding already keeps it when its image fails now."""
    if len(batch.rows):
        store.commit(batch.rows, features, batch.sha256)
    status = store.status
    lost = [failure for failure in batch.failures if status[failure[0]] != WITHOUT_TOKENS]
    store.record_failures([row for row, _ in lost], [reason for _, reason in lost])
    summary.tokenless += [
        (str(store.image_ids[row]), reason)
        for row, reason in batch.failures
        if status[row] == WITHOUT_TOKENS
    ]


def _count(store: FeatureStore, summary: ExtractSummary) -> None:
    vars(summary).update(vars(store.count_rows()))
    failed = np.flatnonzero(store.status == FAILED)
    image_ids = store.image_ids[failed].tolist()
    summary.failures = list(zip(image_ids, store.read_errors(failed), strict=True))


def _timed(batches: Iterator[Batch], summary: ExtractSummary) -> Iterator[Batch]:
    """Pass batches on, and count the time spent waiting for them."""
    while True:
        mark = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - mark
        if batch is None:
            return
        summary.disk_s += waited * batch.reading_share
        summary.decode_s += waited * (1 - batch.reading_share)
        yield batch


@contextmanager
def _counted(summary: ExtractSummary, name: str) -> Iterator[None]:
    """Add the time that passes to a field of the summary."""
    mark = time.perf_counter()
    try:
        yield
    finally:
        setattr(summary, name, getattr(summary, name) + time.perf_counter() - mark)
