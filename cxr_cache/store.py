"""The feature store: one HDF5 file whose finished rows survive any crash.

h5py creates, describes and checks the file. Rows are read and written at their
byte offsets, so no libhdf5 handle is open while anything runs. The protocol,
and the measurements behind it, are in ``docs/design.md``, section 5:

* **create** under a temporary name, reserve the space, fsync, rename, fsync the folder;
* **commit** row bytes, digest and status, then fsync. A row is done when its status says
  so *and* its digest matches: a batch torn by a crash is simply pending again.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from cxr_cache.cohort import Cohort
from cxr_cache.errors import (
    DiskFullError,
    StoreFormatError,
    StoreMismatchError,
    StoreNotFoundError,
)
from cxr_cache.locks import WriterLock

FORMAT_VERSION: Final = 1
PENDING, DONE, FAILED = 0, 1, 2
FEATURES: Final = ("embeddings", "pooled", "tokens")
_ROWS_PER_COPY: Final = 4096
ERROR_WIDTH: Final = 240  # bytes kept of the reason why a row failed
MAX_HEADER_BYTES: Final = (
    1 << 20
)  # of one attribute: a header is kilobytes, a hostile one may not be

_TEXT_COLUMNS: Final = ("image_id", "study_uid", "patient_id", "projection")
_TABLE_COLUMNS: Final = (*_TEXT_COLUMNS, "targets")
_OUT_OF_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Column:
    """One contiguous dataset: ``n_rows`` rows of `shape` and `dtype`, from byte `offset` on."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What describes a store besides its rows; kept as JSON attributes of the root group."""

    encoder: dict[str, Any]
    """Identity of what made the features; equal identities may be mixed."""
    findings: tuple[str, ...]
    cohort: dict[str, Any]
    """Where the image table came from (file names and digests)."""
    table_digest: str
    """xxh3-128 of the image table (ids, studies, patients, projections, targets)."""
    boundary_block: int | None = None
    """First block that `tokens` enter; None without tokens."""
    versions: dict[str, str] | None = None
    format_version: int = FORMAT_VERSION


class FeatureStore:
    """Rows of embeddings on disk, keyed by image id.

    Open one with :meth:`open`, make one with :meth:`create`. Reading needs no
    lock and survives forks: every process may read while one writes.

    Attributes
    ----------
    path
        The HDF5 file.
    header
        Encoder identity, findings, cohort source, versions.
    columns
        The datasets by name; feature columns have shape ``(V, ...)`` per row.
    """

    def __init__(
        self, path: Path, header: Header, columns: Mapping[str, Column], n_images: int
    ) -> None:
        self.path = path
        self.header = header
        self.columns = dict(columns)
        self.n_images = n_images
        self._write_fd: int | None = None
        self._lock: WriterLock | None = None

    # -- opening and closing ------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | Path,
        cohort: Cohort,
        *,
        encoder: Mapping[str, Any],
        features: Mapping[str, tuple[int, ...]],
        canary: NDArray[np.float32] | None = None,
        boundary_block: int | None = None,
    ) -> FeatureStore:
        """Write a new store in which every row is pending, and open it for writing.

        The file appears under its name only when it is whole and its space is
        reserved, so that a full disk is met here and not hours later.

        Parameters
        ----------
        path
            Where to write; an existing file is replaced only at the very end.
        cohort
            The image table; rows keep its order.
        encoder
            Identity of what will make the features, JSON-able.
        features
            Shape of one row per feature column, e.g. ``{"embeddings": (1, 512)}``;
            float32, except ``tokens``, which are float16.
        canary
            Embeddings of the generated canary images, ``(C, D)``, if there are any.
        boundary_block
            First block that the tokens enter.

        Raises
        ------
        StoreBusyError
            Another process is writing to `path`.
        DiskFullError
            The file system has less space than the store takes.
        """
        path = Path(path)
        lock = WriterLock.acquire(path)
        try:
            _publish(path, cohort, encoder, features, canary, boundary_block)
            store = cls._read(path)
        except BaseException:
            lock.release()
            raise
        store._hold_for_writing(lock)
        return store

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "r+"] = "r") -> FeatureStore:
        """Open an existing store and check that it can be trusted.

        Only the header and the layout are read here; embeddings stay on disk
        until they are indexed.

        Parameters
        ----------
        path
            HDF5 file written by :meth:`create`.
        mode
            ``"r"`` to read, from as many processes as you like; ``"r+"`` to
            write rows, from one process at a time.

        Raises
        ------
        StoreNotFoundError
            There is no file at `path`.
        StoreFormatError
            The file is not a store, is damaged, or has another format version.
        StoreBusyError
            ``"r+"`` while another process writes.
        """
        path = Path(path)
        if mode == "r":
            return cls._read(path)
        _require_file(path)
        lock = WriterLock.acquire(path)
        try:
            store = cls._read(path)
        except BaseException:
            lock.release()
            raise
        store._hold_for_writing(lock)
        return store

    @classmethod
    def _read(cls, path: Path) -> FeatureStore:
        _require_file(path)
        try:
            with h5py.File(path, "r", locking=False) as file:
                header = _read_header(file, path)
                n_images, columns = _read_layout(file, path)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            if isinstance(error, StoreFormatError):
                raise
            raise StoreFormatError(
                f"{path} cannot be read as a feature store: {error}. If it was made by "
                "cxr-cache it is damaged: restore a copy, or delete it and run `cxr-cache extract` "
                "again."
            ) from error
        return cls(path, header, columns, n_images)

    def _hold_for_writing(self, lock: WriterLock) -> None:
        self._lock = lock
        self._write_fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Release the file and the writer's lock; reading by memory map stays possible."""
        if self._write_fd is not None:
            os.close(self._write_fd)
            self._write_fd = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.n_images

    # -- reading ------------------------------------------------------------------------

    def read_column(self, name: str) -> NDArray[Any]:
        """Memory map of one dataset, read-only, shape ``(N, ...)``."""
        column = self.columns[name]
        return np.memmap(
            self.path,
            dtype=column.dtype,
            mode="r",
            offset=column.offset,
            shape=(self.n_images, *column.shape),
        )

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """``(N, V, D)`` float32 in the encoder's own scale, not L2-normalised; a memory map."""
        return self.read_column("embeddings")

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the feature columns that this store has."""
        return tuple(name for name in FEATURES if name in self.columns)

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the F columns of :attr:`targets`."""
        return self.header.findings

    @property
    def status(self) -> NDArray[np.uint8]:
        """State of each row now, ``(N,)``: 0 pending, 1 done, 2 failed."""
        return np.array(self.read_column("status"))

    @cached_property
    def image_ids(self) -> NDArray[np.str_]:
        """``(N,)`` text."""
        return self._read_text("image_id")

    @cached_property
    def cohort(self) -> Cohort:
        """The image table that the store was made from.

        Raises
        ------
        StoreFormatError
            Its bytes are not those written when the store was created.
        """
        table = (np.array(self.read_column(name)) for name in _TABLE_COLUMNS)
        if _digest(table).hex() != self.header.table_digest:
            raise StoreFormatError(
                f"{self.path} is damaged: the bytes of its image table (ids, studies, "
                "targets) have changed since it was written. Restore a "
                "copy, or delete it and extract again."
            )
        return Cohort(
            image_ids=self.image_ids,
            study_uids=self._read_text("study_uid"),
            patient_ids=self._read_text("patient_id"),
            projections=self._read_text("projection"),
            targets=np.array(self.read_column("targets")),
            findings=self.findings,
            source=self.header.cohort,
        )

    @property
    def canary(self) -> NDArray[np.float32] | None:
        """Embeddings of the canary images as first computed, ``(C, D)``; None without them."""
        with h5py.File(self.path, "r", locking=False) as file:
            return np.array(file["canary"]) if "canary" in file else None

    def read_errors(self, rows: NDArray[np.intp]) -> list[str]:
        """Why each of the failed `rows` failed."""
        return [_as_text(reason) for reason in self.read_column("error")[rows]]

    def find_damaged(self, rows: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
        """Rows whose status says done but whose digest does not match their bytes.

        Parameters
        ----------
        rows
            Rows to look at; None for every done row.
        """
        candidates = np.flatnonzero(self.status == DONE) if rows is None else rows
        stored = self.read_column("row_digest")
        sources = self._digest_sources()
        damaged = [
            row
            for row in candidates
            if _digest(source[row] for source in sources) != stored[row].tobytes()
        ]
        return np.array(damaged, dtype=np.intp)

    def _digest_sources(self) -> list[NDArray[Any]]:
        return [self.read_column(name) for name in ("image_id", "image_sha256", *self.features)]

    def _read_text(self, name: str) -> NDArray[np.str_]:
        return np.char.decode(np.array(self.read_column(name)), "utf-8")

    # -- writing ------------------------------------------------------------------------

    def commit(
        self,
        rows: Sequence[int] | NDArray[np.intp],
        features: Mapping[str, NDArray[Any]],
        image_sha256: NDArray[np.uint8],
    ) -> None:
        """Write finished rows; when this returns, no crash can lose them.

        Parameters
        ----------
        rows
            B row numbers.
        features
            Every feature column of the store, ``(B, V, ...)`` each.
        image_sha256
            SHA-256 of each image file's bytes, ``(B, 32)``.
        """
        if set(features) != set(self.features):
            raise ValueError(f"the store has {self.features}, the batch {tuple(features)}")
        rows = np.asarray(rows, dtype=np.intp)
        batch: dict[str, NDArray[Any]] = {"image_sha256": image_sha256, **features}
        for name, values in batch.items():
            batch[name] = np.ascontiguousarray(values, dtype=self.columns[name].dtype)
        image_ids = self.read_column("image_id")[rows]
        ordered = [image_ids, image_sha256, *(batch[name] for name in self.features)]
        digests = [_digest(column[i] for column in ordered) for i in range(len(rows))]
        batch["row_digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        batch["status"] = np.full(len(rows), DONE, np.uint8)
        for name, values in batch.items():
            self._write_rows(name, rows, values)
        self._sync()

    def record_failures(
        self, rows: Sequence[int] | NDArray[np.intp], reasons: Sequence[str]
    ) -> None:
        """Mark rows as failed, with the reason for each."""
        rows = np.asarray(rows, dtype=np.intp)
        encoded = np.array(
            [_cut_utf8(reason, ERROR_WIDTH) for reason in reasons], f"S{ERROR_WIDTH}"
        )
        self._write_rows("error", rows, encoded)
        self._write_rows("status", rows, np.full(len(rows), FAILED, np.uint8))
        self._sync()

    def mark_pending(self, rows: NDArray[np.intp]) -> None:
        """Forget rows, so that the next extraction computes them again."""
        self._write_rows("status", rows, np.full(len(rows), PENDING, np.uint8))
        self._sync()

    def replace_cohort(self, cohort: Cohort, rows: NDArray[np.intp]) -> FeatureStore:
        """Replace the file by one for another image table, and return it open for writing.

        Until the new file is whole, the old one stays in its place. This object is closed.

        Parameters
        ----------
        cohort
            The new image table, of M images.
        rows
            For each new image the row of this store to take over, or -1; shape ``(M,)``.
        """
        wanted = np.flatnonzero(rows >= 0)

        def take_over(new: FeatureStore) -> None:
            for chunk in np.array_split(wanted, max(1, len(wanted) // _ROWS_PER_COPY)):
                source = {name: self.read_column(name)[rows[chunk]] for name in self.features}
                new.commit(chunk, source, self.read_column("image_sha256")[rows[chunk]])

        features = {name: self.columns[name].shape for name in self.features}
        header = self.header
        _publish(
            self.path,
            cohort,
            header.encoder,
            features,
            self.canary,
            header.boundary_block,
            take_over,
        )
        new = self._read(self.path)
        lock, self._lock = self._lock, None
        self.close()
        assert lock is not None, "only a store opened for writing is replaced"
        new._hold_for_writing(lock)
        return new

    def _write_rows(self, name: str, rows: NDArray[np.intp], values: NDArray[Any]) -> None:
        column, start = self.columns[name], 0
        for end in [*np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)]:  # runs of neighbours
            data = memoryview(values[start:end].tobytes())
            _write_at(self._fd, data, column.offset + int(rows[start]) * column.row_bytes)
            start = int(end)

    def _sync(self) -> None:
        os.fsync(self._fd)

    @property
    def _fd(self) -> int:
        if self._write_fd is None:
            raise StoreMismatchError(f"{self.path} was opened for reading; open it with mode 'r+'")
        return self._write_fd


# -- the file ---------------------------------------------------------------------------


def _encode_table(cohort: Cohort) -> dict[str, NDArray[Any]]:
    """The columns that are known before any image is read, as they lie in the file."""
    text = (cohort.image_ids, cohort.study_uids, cohort.patient_ids, cohort.projections)
    encoded = (np.char.encode(values, "utf-8") for values in text)
    table = {
        name: values.astype(f"S{max(1, values.dtype.itemsize)}")
        for name, values in zip(_TEXT_COLUMNS, encoded, strict=True)
    }
    return {**table, "targets": np.ascontiguousarray(cohort.targets, "<f4")}


def _layout(
    table: Mapping[str, NDArray[Any]], features: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and row shape of every dataset; the one place where they are decided."""
    return {
        **{name: (values.dtype, values.shape[1:]) for name, values in table.items()},
        "status": (np.dtype("u1"), ()),
        "error": (np.dtype(f"S{ERROR_WIDTH}"), ()),
        "image_sha256": (np.dtype("u1"), (32,)),
        "row_digest": (np.dtype("u1"), (16,)),
        **{name: (_feature_dtype(name), tuple(shape)) for name, shape in features.items()},
    }


def _feature_dtype(name: str) -> np.dtype[Any]:
    return np.dtype("<f2" if name == "tokens" else "<f4")


def _require_space(
    path: Path, n_images: int, layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
    needed, free = n_images * row_bytes, shutil.disk_usage(path.parent).free
    if needed > free:
        raise _disk_full(path, needed, free)


def _disk_full(path: Path, needed: int, free: int) -> DiskFullError:
    return DiskFullError(
        f"{path} needs {needed:,} bytes and {path.parent} has {free:,} free. "
        "Free some space, or write the store to another disk with --store."
    )


def _publish(
    path: Path,
    cohort: Cohort,
    encoder: Mapping[str, Any],
    features: Mapping[str, tuple[int, ...]],
    canary: NDArray[np.float32] | None,
    boundary_block: int | None,
    fill: Callable[[FeatureStore], None] | None = None,
) -> None:
    """Write the file under a temporary name and give it its own only when it is on disk."""
    table = _encode_table(cohort)
    layout = _layout(table, features)
    header = Header(
        encoder=dict(encoder),
        findings=cohort.findings,
        cohort=dict(cohort.source),
        table_digest=_digest(table.values()).hex(),
        boundary_block=boundary_block,
        versions=_versions(),
    )
    _require_space(path, len(cohort), layout)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_file(temporary, header, table, layout, canary)
        with _opened(temporary, os.O_RDWR) as fd:
            _reserve(fd, path)
            if fill is not None:
                store = FeatureStore._read(temporary)
                store._write_fd = fd
                fill(store)
            os.fsync(fd)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_file(
    path: Path,
    header: Header,
    table: Mapping[str, NDArray[Any]],
    layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    canary: NDArray[np.float32] | None,
) -> None:
    n_images = len(table["image_id"])
    with h5py.File(path, "w", libver="earliest") as file:
        for key, value in vars(header).items():
            file.attrs[key] = np.bytes_(json.dumps(value).encode())
        for name, (dtype, shape) in layout.items():
            dataset = _create_contiguous(file, name, dtype, (n_images, *shape))
            if name in table:
                dataset[...] = table[name]
        if canary is not None:
            _create_contiguous(file, "canary", np.dtype("<f4"), canary.shape)[...] = canary


def _create_contiguous(
    file: h5py.File, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> h5py.Dataset:
    """A dataset whose bytes get their place in the file now: no later write moves anything."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    space = h5py.h5s.create_simple(shape)
    file_type = h5py.h5t.py_create(dtype, logical=True)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), file_type, space, creation))


def _reserve(fd: int, path: Path) -> None:
    """Turn the sparse file into real blocks: early allocation alone leaves holes."""
    size = os.fstat(fd).st_size
    if not hasattr(os, "posix_fallocate"):  # macOS: the check of free space has to do
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise _disk_full(path, size, shutil.disk_usage(path.parent).free) from error
        raise


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    with _opened(folder, os.O_RDONLY) as fd:
        os.fsync(fd)


# -- checking a file before it is used --------------------------------------------------


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise StoreNotFoundError(
            f"There is no feature store at {path}. Make one with `cxr-cache extract`, or check "
            "the path."
        )


def _read_header(file: h5py.File, path: Path) -> Header:
    fields: dict[str, Any] = {}
    for key in Header.__dataclass_fields__:
        if key not in file.attrs:
            raise StoreFormatError(
                f"{path} is an HDF5 file but not a feature store: it has no attribute '{key}'. "
                "Features made elsewhere come in with `cxr-cache import`."
            )
        if file.attrs.get_id(key).get_storage_size() > MAX_HEADER_BYTES:
            raise StoreFormatError(f"{path}: attribute '{key}' is larger than 1 MiB; refused.")
        fields[key] = json.loads(file.attrs[key])
    if fields["format_version"] != FORMAT_VERSION:
        raise StoreFormatError(
            f"{path} has format version {fields['format_version']}, this cxr-cache reads "
            f"{FORMAT_VERSION}. Use the version of cxr-cache that wrote it: {fields['versions']}."
        )
    return Header(**{**fields, "findings": tuple(fields["findings"])})


def _read_layout(file: h5py.File, path: Path) -> tuple[int, dict[str, Column]]:
    """Offsets of the datasets, each checked to be plain bytes inside this very file."""
    size, columns, lengths = path.stat().st_size, {}, {}
    for name in file:
        if file.get(name, getclass=True, getlink=True) is not h5py.HardLink:
            raise StoreFormatError(f"{path}: '{name}' is a link; a store has plain datasets only.")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise StoreFormatError(f"{path}: '{name}' is a group; a store has plain datasets only.")
        creation = dataset.id.get_create_plist()
        if (
            creation.get_layout() != h5py.h5d.CONTIGUOUS
            or creation.get_nfilters()
            or creation.get_external_count()
            or dataset.dtype.hasobject
        ):
            raise StoreFormatError(
                f"{path}: dataset '{name}' is not plain contiguous data inside the file; refused."
            )
        offset = dataset.id.get_offset()
        if offset is None or offset + dataset.nbytes > size:
            raise StoreFormatError(
                f"{path} is cut short: dataset '{name}' needs {dataset.nbytes:,} bytes from byte "
                f"{offset}, the file has {size:,}. Restore a copy, or delete it and extract again."
            )
        columns[name] = Column(name, dataset.dtype, dataset.shape[1:], offset)
        lengths[name] = dataset.shape[0]
    columns.pop("canary", None), lengths.pop("canary", None)
    _require_columns(path, columns, lengths)
    return lengths["image_id"], columns


def _require_columns(path: Path, columns: Mapping[str, Column], lengths: Mapping[str, int]) -> None:
    required = {*_TABLE_COLUMNS, "status", "error", "image_sha256", "row_digest"}
    if missing := sorted((required | {"embeddings"}) - set(columns)):
        raise StoreFormatError(f"{path} is not a whole feature store: it lacks {missing}.")
    if unknown := sorted(set(columns) - required - set(FEATURES)):
        raise StoreFormatError(f"{path} holds datasets that a store does not have: {unknown}.")
    if len(set(lengths.values())) != 1:
        raise StoreFormatError(f"{path}: its datasets differ in length: {dict(lengths)}.")
    expected = {"status": ("u1", 0), "image_sha256": ("u1", 1), "row_digest": ("u1", 1)}
    expected |= {"targets": ("<f4", 1), "embeddings": ("<f4", 2)}
    for name, (dtype, n_axes) in expected.items():
        column = columns[name]
        if column.dtype != np.dtype(dtype) or len(column.shape) != n_axes:
            raise StoreFormatError(
                f"{path}: dataset '{name}' has type {column.dtype} and row shape {column.shape}; "
                f"expected {dtype} and {n_axes} axes."
            )


# -- small things -----------------------------------------------------------------------


def _digest(parts: Iterable[Any]) -> bytes:
    """xxh3-128 over the bytes of `parts`, in order."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else bytes(part))
    return digest.digest()


def _cut_utf8(text: str, width: int) -> bytes:
    return text.encode("utf-8")[:width].decode("utf-8", "ignore").encode("utf-8")


def _as_text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _versions() -> dict[str, str]:
    packages = ("cxr-cache", "torch", "open-clip-torch", "timm", "h5py", "numpy", "Pillow")
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"hdf5": h5py.version.hdf5_version}
