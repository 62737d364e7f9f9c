"""Cohort and encoder to store: every image through the frozen encoder, once."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from cxr_cache.cohort import Cohort
from cxr_cache.encoder import Encoder, EncoderIdentity
from cxr_cache.errors import (
    ConfigError,
    CxrCacheError,
    ImageError,
    StoreMismatchError,
    TooManyFailuresError,
)
from cxr_cache.images import Preprocessing, read_bytes, read_image
from cxr_cache.store import DONE, FAILED, PENDING, FeatureStore

N_CANARIES: Final = 8
CANARY_COSINE: Final = 0.9999
"""Recomputed features must agree this well: batch size and device change bits, not directions."""


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

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        if self.num_workers < 0:
            raise ConfigError(f"--num-workers is {self.num_workers}; it must be 0 or more.")
        if self.max_failures is not None and self.max_failures < 0:
            raise ConfigError(f"--max-failures is {self.max_failures}; it must be 0 or more.")

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


def extract(
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
    another cohort are taken over if their image bytes are the same. Whatever ends the call
    (an error, Ctrl-C), rows that were finished are in the store.

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
        The store holds features of another encoder, preprocessing, precision or set of views.
    TooManyFailuresError
        More images failed than `config` tolerates; everything done so far is kept.
    StoreBusyError
        Another process writes to the store.
    DiskFullError
        There is not enough space for the whole store.
    """
    config = config or ExtractConfig()
    image_dir, store_path = Path(image_dir), Path(store_path)
    if not image_dir.is_dir():
        raise ConfigError(f"{image_dir} is not a folder; give the one with the images.")
    if not len(cohort):
        raise ConfigError("The image table has no rows, so there is nothing to extract.")
    summary = ExtractSummary(store_path)
    started = time.perf_counter()
    with _open_or_create(cohort, image_dir, store_path, encoder, config, summary) as store:
        try:
            _fill(store, image_dir, encoder, config, summary, on_progress)
        finally:
            summary.elapsed_s = time.perf_counter() - started
            _count(store, summary)
    return summary


# -- the store to write to --------------------------------------------------------------


def _open_or_create(
    cohort: Cohort,
    image_dir: Path,
    path: Path,
    encoder: Encoder,
    config: ExtractConfig,
    summary: ExtractSummary,
) -> FeatureStore:
    identity = encoder.identity
    n_views = 2 if config.flip else 1
    shapes = {
        "embeddings": (n_views, identity.embedding_width),
        "pooled": (n_views, identity.pooled_width),
    }
    canary = encode_canaries(encoder)
    if not path.exists():
        return FeatureStore.create(
            path, cohort, encoder=identity.to_dict(), features=shapes, canary=canary
        )
    store = FeatureStore.open(path, "r+")
    try:
        require_same_encoder(store, encoder, canary)
        _require_views(store, n_views)
        store.mark_pending(store.find_damaged())
        if not _same_table(store.cohort, cohort):
            rows = _match_rows(store, cohort, image_dir)
            store = store.replace_cohort(cohort, rows)
            summary.n_taken_over = int((rows >= 0).sum())
    except BaseException:
        store.close()
        raise
    return store


def require_same_encoder(
    store: FeatureStore, encoder: Encoder, canary: NDArray[np.float32] | None = None
) -> None:
    """Raise unless features of `encoder` may stand beside those in `store`.

    Parameters
    ----------
    canary
        What `encoder` makes of the canary images now, ``(C, D)``; compared with what is in the
        store, since equal weights may still compute something else (a driver, a library).

    Raises
    ------
    StoreMismatchError
        With every differing field and both its values.
    """
    if store.header.encoder.get("imported"):
        raise StoreMismatchError(
            f"{store.path} holds embeddings imported from {store.header.encoder['name']}, which no "
            "encoder here can continue. Extract to another file."
        )
    identity = EncoderIdentity.from_dict(store.header.encoder)
    if differences := identity.differences(encoder.identity):
        raise StoreMismatchError(
            f"{store.path} holds embeddings from another encoder:\n"
            + "\n".join(
                f"  {name}: {theirs!r} in the store, {ours!r} in this run"
                for name, (theirs, ours) in differences.items()
            )
            + "\nThe two are not comparable. Write to another file, or use the store's encoder."
        )
    if canary is not None and store.canary is not None:
        cosine = float(_cosines(store.canary, canary).min())
        if not cosine >= CANARY_COSINE:
            raise StoreMismatchError(
                f"{store.path}: the encoder computes other embeddings than when the store "
                f"was made: cosine {cosine:.6f} on the worst of {len(canary)} test images, "
                f"at least {CANARY_COSINE} expected. Weights are the same, so compare the versions: "
                f"{store.header.versions}. Write to another file, or restore those versions."
            )


def _require_views(store: FeatureStore, n_views: int) -> None:
    stored = store.columns["embeddings"].shape[0]
    if stored != n_views:
        raise StoreMismatchError(
            f"{store.path} holds {stored} view(s) of each image, this run makes {n_views}. "
            f"Run {'with' if stored == 2 else 'without'} --flip, or write to another file."
        )


def _same_table(stored: Cohort, wanted: Cohort) -> bool:
    return (
        stored.findings == wanted.findings
        and np.array_equal(stored.image_ids, wanted.image_ids)
        and np.array_equal(stored.study_uids, wanted.study_uids)
        and np.array_equal(stored.patient_ids, wanted.patient_ids)
        and np.array_equal(stored.projections, wanted.projections)
        and np.array_equal(stored.targets, wanted.targets, equal_nan=True)
    )


def _match_rows(store: FeatureStore, cohort: Cohort, image_dir: Path) -> NDArray[np.intp]:
    """For each wanted image the done row made from the same bytes, or -1."""
    done = np.flatnonzero(store.status == DONE)
    stored = store.read_column("image_sha256")
    row_of = {stored[row].tobytes(): row for row in done}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = pool.map(lambda image_id: _hash_file(image_dir, image_id), cohort.image_ids)
        rows = [row_of.get(digest, -1) for digest in digests]
    return np.array(rows, dtype=np.intp)


def _hash_file(image_dir: Path, image_id: str) -> bytes:
    try:
        return hashlib.sha256(read_bytes(image_dir, image_id)).digest()
    except ImageError:
        return b""  # extraction will meet it again, and say why


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
    batches = _decode_batches(store.image_ids, rows, image_dir, encoder.preprocessing, config)
    n_failed = 0
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        try:
            for batch in _timed(batches, summary):
                mark = time.perf_counter()
                features = _encode(encoder, batch, flip=config.flip)
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


def _write(store: FeatureStore, batch: _Batch, features: dict[str, NDArray[Any]]) -> None:
    if len(batch.rows):
        store.commit(batch.rows, features, batch.sha256)
    if batch.failures:
        failed_rows, reasons = zip(*batch.failures, strict=True)
        store.record_failures(failed_rows, reasons)


def _encode(encoder: Encoder, batch: _Batch, *, flip: bool) -> dict[str, NDArray[Any]]:
    if not len(batch.rows):
        return {}
    pixels = torch.from_numpy(batch.pixels)
    views = [pixels, pixels.flip(-1)] if flip else [pixels]
    pooled, embeddings = zip(*(encoder.encode(view) for view in views), strict=True)
    return {
        "embeddings": torch.stack(embeddings, dim=1).cpu().numpy(),  # (B, V, D)
        "pooled": torch.stack(pooled, dim=1).cpu().numpy(),  # (B, V, P)
    }


def _set_aside_non_finite(batch: _Batch, features: dict[str, NDArray[Any]]) -> None:
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


# -- decoding ---------------------------------------------------------------------------


@dataclass
class _Batch:
    """Decoded images of B rows, and the rows whose file cannot be used."""

    rows: NDArray[np.intp]
    pixels: NDArray[np.uint8]  # (B, 3, S, S)
    sha256: NDArray[np.uint8]  # (B, 32)
    failures: list[tuple[int, str]]


class _Decoding(Dataset[tuple[int, Any]]):
    """Row number to decoded image, or to the reason why there is none."""

    def __init__(
        self,
        image_ids: NDArray[np.str_],
        rows: NDArray[np.intp],
        image_dir: Path,
        preprocessing: Preprocessing,
    ) -> None:
        self._image_ids = image_ids
        self._rows = rows
        self._image_dir = image_dir
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        row = int(self._rows[i])
        image_id = str(self._image_ids[row])
        try:
            return row, read_image(self._image_dir, image_id, self._preprocessing)
        except ImageError as error:
            return row, str(error)


def _collate(items: list[tuple[int, Any]]) -> _Batch:
    """Stack what could be decoded.

    numpy arrays travel through the worker's pipe; torch tensors would need shared memory, of
    which containers often have 64 MB only.
    """
    decoded = [(row, image) for row, image in items if not isinstance(image, str)]
    return _Batch(
        rows=np.array([row for row, _ in decoded], dtype=np.intp),
        pixels=np.stack([image.pixels for _, image in decoded])
        if decoded
        else np.empty((0, 3, 0, 0), np.uint8),
        sha256=np.frombuffer(b"".join(image.sha256 for _, image in decoded), np.uint8).reshape(
            -1, 32
        ),
        failures=[(row, image) for row, image in items if isinstance(image, str)],
    )


def _leave_interrupts_to_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _decode_batches(
    image_ids: NDArray[np.str_],
    rows: NDArray[np.intp],
    image_dir: Path,
    preprocessing: Preprocessing,
    config: ExtractConfig,
) -> Iterator[_Batch]:
    loader: DataLoader[Any] = DataLoader(
        _Decoding(image_ids, rows, image_dir, preprocessing),
        batch_size=config.batch_size,
        num_workers=min(config.num_workers, len(rows)),
        collate_fn=_collate,
        worker_init_fn=_leave_interrupts_to_parent,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise CxrCacheError(
            "A decoding process was killed, most likely for want of memory. What is done is kept; "
            "run the same command again, with fewer --num-workers or a smaller --batch-size."
        ) from error


def _timed(batches: Iterator[_Batch], summary: ExtractSummary) -> Iterator[_Batch]:
    """Pass batches on, and count the time spent waiting for them."""
    while True:
        mark = time.perf_counter()
        batch = next(batches, None)
        summary.decode_s += time.perf_counter() - mark
        if batch is None:
            return
        yield batch


# -- canaries ---------------------------------------------------------------------------


def encode_canaries(encoder: Encoder) -> NDArray[np.float32]:
    """Embeddings of eight generated images, ``(C, D)``: a fingerprint of what is computed.

    Each image is a smooth random field with grain, unlike the others; they need no file and are
    the same on every machine.
    """
    size_px = encoder.preprocessing.image_size_px
    rng = np.random.default_rng(20170802)
    axis = np.linspace(0, 2 * np.pi, size_px)
    images = np.empty((N_CANARIES, 3, size_px, size_px), np.uint8)
    for image in images:
        waves = rng.uniform(0.5, 4.0, size=(2, 1))
        phases = rng.uniform(0, 2 * np.pi, size=(2, 1))
        rows, columns = np.sin(waves * axis + phases)
        field_ = 110 + 60 * np.outer(rows, columns) + rng.normal(0, 12, (size_px, size_px))
        image[:] = field_.clip(0, 255).astype(np.uint8)
    _, embeddings = encoder.encode(torch.from_numpy(images))
    return np.asarray(embeddings.cpu().numpy(), np.float32)


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    products = (a * b).sum(axis=-1)
    return np.asarray(products / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))
