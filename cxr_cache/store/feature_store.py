"""The feature store: one HDF5 file whose finished rows survive any crash.

Rows are read and written at their byte offsets (`layout.py` finds them), so no libhdf5 handle is
open while anything runs. The protocol, and what it withstands, are in ``docs/reliability.md``:

* **create** under a temporary name, reserve the space, fsync, rename, fsync the folder;
* **commit** row bytes, digest and status, then fsync. A row counts when its status says so *and*
  its digest matches: a batch torn by a crash is simply pending again.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import xxhash
from numpy.typing import NDArray

from cxr_cache.common.files import (
    WriterLock,
    disk_errors_named,
    free_bytes,
    open_file,
    opened,
    read_at,
    require_space,
    reserve,
    sync,
    sync_folder,
    write_at,
)
from cxr_cache.common.wording import count, list_names, package_versions
from cxr_cache.datasets.cohort import IMAGE_COLUMNS, Cohort, Reading
from cxr_cache.errors import (
    ConfigError,
    DiskError,
    StoreFormatError,
    StoreNotFoundError,
    TableError,
)
from cxr_cache.store.layout import (
    ERROR_WIDTH,
    FEATURES,
    MAX_TEXT_BYTES,
    Column,
    Header,
    Layout,
    plan_columns,
    read_layout,
    write_layout,
)

PENDING, DONE, FAILED, WITHOUT_TOKENS = 0, 1, 2, 3
"""What the status of a row may be; one without tokens holds everything but these."""
STATUS_NAMES: Final = {
    PENDING: "pending",
    DONE: "done",
    FAILED: "failed",
    WITHOUT_TOKENS: "without tokens",
}
EMBEDDED: Final = (DONE, WITHOUT_TOKENS)
"""States of rows that hold an embedding."""
_PACKAGES: Final = (
    *("cxr-cache", "torch", "open-clip-torch", "timm", "h5py", "numpy"),
    *("Pillow", "kornia-rs"),  # what decoded the images
)
_MAX_READING_BYTES: Final = 60_000  # HDF5 keeps no attribute of more than 64 KiB
_BYTES_AT_ONCE: Final = 1 << 22  # of many rows that are checked or copied


@dataclass(frozen=True)
class Space:
    """Bytes on the disk that a store is about to take, and those that are free."""

    path: Path
    n_bytes: int
    n_token_bytes: int
    """How many of these are for tokens."""
    n_free: int | None
    """None where the file system does not say."""

    def to_text(self) -> str:
        """One line for a terminal."""
        tokens = f" (tokens {_in_words(self.n_token_bytes)})" if self.n_token_bytes else ""
        free = "" if self.n_free is None else f"; {_in_words(self.n_free)} are free"
        return f"{self.path} takes {_in_words(self.n_bytes)}{tokens}{free}."


@dataclass
class RowCounts:
    """How many rows of a store are in which state; done, failed and pending are all there are."""

    n_images: int = 0
    n_done: int = 0
    n_failed: int = 0
    n_pending: int = 0
    """Rows still to do, those without tokens among them."""
    n_without_tokens: int = 0
    """Pending rows that hold an embedding and lack only their tokens."""

    def describe(self, path: Path, of: str = "") -> list[str]:
        """Lines for a terminal: what the store at `path` holds, and how much lacks only tokens."""
        lines = [
            f"{path}: {count(self.n_images, 'image')}{of} = {self.n_done:,} done + "
            f"{self.n_failed:,} failed + {self.n_pending:,} pending"
        ]
        if self.n_without_tokens:
            lines.append(f"  {self.n_without_tokens:,} pending rows lack nothing but their tokens")
        return lines


class FeatureStore:
    """Rows of embeddings on disk, keyed by image id.

    Open one with :meth:`open`, make one with :meth:`create`. Reading needs no lock and survives
    forks and pickling: every process may read while one writes.

    Attributes
    ----------
    path
        The HDF5 file.
    header
        Encoder identity, findings, cohort source, versions.
    columns
        The datasets by name; feature columns have shape ``(V, ...)`` per row.

    Examples
    --------
    >>> with FeatureStore.open("features.h5") as store:  # doctest: +SKIP
    ...     rows = store.embedded_rows  # not those that failed
    ...     X, cohort = store.embeddings[rows, 0], store.cohort.take(rows)
    ...     store.to_frame().head()
    """

    def __init__(self, path: Path, fd: int, layout: Layout, lock: WriterLock | None = None) -> None:
        self.path = path
        self.header: Header = layout.header
        self.columns: dict[str, Column] = layout.columns
        self.n_images = layout.n_images
        self._fd = fd
        self._lock = lock
        self._disk_failed = False
        # One map for life: should the file be replaced under its name, this object goes on
        # reading the one it has checked.
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)

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
        tokens_dtype: str = "float16",
        part: Mapping[str, int] | None = None,
        fill: Callable[[FeatureStore], None] | None = None,
        on_space: Callable[[Space], None] | None = None,
        overwrite: bool = True,
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
            float32, except ``tokens``.
        canary
            Embeddings of the generated canary images, ``(C, D)``, if there are any.
        boundary_block, tokens_dtype
            First block that the tokens enter, and the number format that they are kept in.
        part
            Which part of a larger store this is: `number`, `of`, `first_row`, `n_rows_of_whole`.
        fill
            Called with the new store before it gets its name, to commit rows that are there
            already.
        on_space
            Called with the space that the store takes, before it is refused or written.
        overwrite
            Replace a file that is there already, also one that another process has just made.

        Raises
        ------
        ConfigError
            There is a file at `path`, and `overwrite` is off.
        StoreBusyError
            Another process is writing to `path`.
        DiskFullError, DiskError
            The file system has less space than the store takes, or failed.
        """
        path = Path(path)
        lock = WriterLock.acquire(path)
        header = _describe(cohort, encoder, boundary_block, tokens_dtype, part)
        try:
            require_absent(path, overwrite=overwrite)
            _remove_abandoned(path)
            table = _encode_table(cohort, header)
            _publish(path, lock, header, table, features, canary, fill, on_space)
            return cls._open_file(path, os.O_RDWR, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "r+"] = "r") -> FeatureStore:
        """Open an existing store and check that it can be trusted.

        The description, the layout and the image table are read and checked here; embeddings
        stay on disk until they are indexed.

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
        if not path.is_file():
            raise StoreNotFoundError(
                f"There is no feature store at {path}. Make one with `cxr-cache extract`, or check "
                "the path."
            )
        if mode == "r":
            return cls._open_file(path, os.O_RDONLY, None)
        lock = WriterLock.acquire(path)
        try:
            _remove_abandoned(path)
            return cls._open_file(path, os.O_RDWR, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _open_file(cls, path: Path, flags: int, lock: WriterLock | None) -> FeatureStore:
        fd = open_file(path, flags)
        try:
            return cls(path, fd, read_layout(fd, path), lock)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Release the file and the writer's lock; arrays that were read stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
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

    def __reduce__(self) -> tuple[Callable[..., FeatureStore], tuple[Path]]:
        """A copy in another process opens the file anew, for reading."""
        return FeatureStore.open, (self.path,)

    def __len__(self) -> int:
        return self.n_images

    def __repr__(self) -> str:
        shapes = (f"{name} {shape}" for name, shape in self.feature_shapes.items())
        return (
            f"FeatureStore {self.count_rows().describe(self.path)[0]}\n"
            f"  {count(len(self.findings), 'finding')}: {list_names(self.findings, 5)}\n"
            f"  encoder: {self.header.encoder['name']}\n"
            f"  one row: {', '.join(shapes)}"
        )

    # -- reading ------------------------------------------------------------------------

    def read_column(self, name: str) -> NDArray[Any]:
        """Memory map of one dataset, read-only, shape ``(N, ...)``."""
        column = self.columns[name]
        shape = (column.n_rows, *column.shape)
        values: NDArray[Any] = np.ndarray(shape, column.dtype, self._map, column.offset)
        return values

    def read_rows(self, name: str, rows: NDArray[np.intp]) -> NDArray[Any]:
        """Copy of some rows of a dataset, ``(B, ...)``.

        An unreadable sector raises an error here; a memory map would end the process.
        """
        column = self.columns[name]
        values = np.empty((len(rows), *column.shape), column.dtype)
        self._read_runs(column, column.row_bytes, rows, values)
        return values

    def read_views(
        self,
        name: str,
        rows: NDArray[np.intp],
        views: NDArray[np.intp],
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """One view of each of some rows of a feature column, ``(B, ...)``; nothing else is read.

        Parameters
        ----------
        name
            A feature column.
        rows
            Row numbers, ``(B,)``.
        views
            Which view of each row, ``(B,)``.
        out
            Filled and returned, where it is given: C-contiguous, of the column's type.

        Raises
        ------
        IndexError
            The store has no such row or view.
        StoreFormatError
            The file has been cut short since it was opened.
        """
        column = self.columns[name]
        n_views, *shape = column.shape
        for numbers, n_there in ((rows, column.n_rows), (views, n_views)):
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < n_there:
                raise IndexError(f"{self.path} has {column.n_rows:,} rows of {n_views} views")
        wanted = (len(rows), *shape)
        values = np.empty(wanted, column.dtype) if out is None else out
        if (values.shape, values.dtype) != (wanted, column.dtype) or not values.flags.c_contiguous:
            raise ValueError(
                f"out is {values.dtype} {values.shape}, not {column.dtype} {wanted} in one piece"
            )
        self._read_runs(column, column.row_bytes // n_views, rows * n_views + views, values)
        return values

    def _read_runs(
        self, column: Column, unit_bytes: int, units: NDArray[np.intp], values: NDArray[Any]
    ) -> None:
        """Fill `values` with units of a column (rows, or views of rows), neighbours in one call."""
        buffer = values.reshape(-1).view(np.uint8).data
        for start, end in _runs(units):
            wanted = buffer[start * unit_bytes : end * unit_bytes]
            n_read = read_at(self._fd, wanted, column.offset + int(units[start]) * unit_bytes)
            if n_read < len(wanted):
                raise StoreFormatError(
                    f"{self.path} was cut short while it was read: {n_read:,} bytes of "
                    f"{column.name} are there where {len(wanted):,} were wanted. Restore a copy, "
                    "or delete it and extract again."
                )

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """``(N, V, D)`` float32 in the encoder's own scale, not L2-normalised; a memory map."""
        return self.read_column("embeddings")

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the feature columns that this store has."""
        return tuple(name for name in FEATURES if name in self.columns)

    def features_of(self, state: int) -> tuple[str, ...]:
        """Names of the feature columns that rows of one state, done or without tokens, hold."""
        return tuple(name for name in self.features if name != "tokens" or state == DONE)

    @property
    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each feature column, ``(V, ...)``."""
        return {name: self.columns[name].shape for name in self.features}

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the F columns of the targets."""
        return self.header.findings

    @property
    def status(self) -> NDArray[np.uint8]:
        """State of each row now, ``(N,)``: 0 pending, 1 done, 2 failed, 3 without its tokens."""
        return np.array(self.read_column("status"))

    @property
    def states(self) -> tuple[int, ...]:
        """What a row's status may be here: only a store with tokens has rows without them."""
        return (PENDING, DONE, FAILED, *((WITHOUT_TOKENS,) if "tokens" in self.columns else ()))

    def count_rows(self) -> RowCounts:
        """Count the rows by their state now."""
        counts = np.bincount(self.status, minlength=WITHOUT_TOKENS + 1).tolist()
        n_without_tokens = counts[WITHOUT_TOKENS]
        return RowCounts(
            len(self),
            n_done=counts[DONE],
            n_failed=counts[FAILED],
            n_pending=counts[PENDING] + n_without_tokens,
            n_without_tokens=n_without_tokens,
        )

    @property
    def embedded_rows(self) -> NDArray[np.intp]:
        """Rows that hold an embedding now: the done ones, and those whose tokens are to come."""
        return np.flatnonzero(np.isin(self.status, EMBEDDED))

    @cached_property
    def image_ids(self) -> NDArray[np.str_]:
        """``(N,)`` text."""
        return self._read_text("image_id")

    @cached_property
    def cohort(self) -> Cohort:
        """The image table that the store was made from."""
        datasets = self.header.text_datasets
        images = {
            name: self.image_ids if name == "image_id" else self._read_text(dataset)
            for name, dataset in datasets.items()
        }
        return Cohort(
            pd.DataFrame(images),
            np.array(self.read_column("targets")),
            self.findings,
            self.header.cohort,
            None if self.header.reading is None else Reading.of_dict(self.header.reading),
        )

    def to_frame(self, features: Sequence[str] = ()) -> pd.DataFrame:
        """Give a row per image: the image table, the state of the row, the targets.

        Parameters
        ----------
        features
            Feature columns to add, such as ``("embeddings",)``, of the image as it is and not of
            its mirror image: one column per number, ``embeddings_0`` ..., NaN where the row holds
            none. All of them are read into memory.

        Returns
        -------
        pandas.DataFrame
            Columns of the image table (text), ``status`` (``"done"``, ``"failed"``, ``"pending"``,
            or ``"without tokens"``), ``error`` (why the row failed, else blank), the targets by
            finding (float32, NaN where unlabelled), then the features (float32).

        Raises
        ------
        KeyError
            The store has no such feature.

        Examples
        --------
        >>> with FeatureStore.open("features.h5") as store:  # doctest: +SKIP
        ...     images = store.to_frame()
        >>> images.groupby("projection")["Cardiomegaly"].mean()  # doctest: +SKIP
        """
        if unknown := [name for name in features if name not in self.features]:
            raise KeyError(
                f"{self.path} has no {unknown[0]!r}; its features are {', '.join(self.features)}"
            )
        status = self.status
        failed = np.flatnonzero(status == FAILED)
        errors = np.full(len(self), "", object)
        errors[failed] = self.read_errors(failed)
        known = [STATUS_NAMES.get(state, "damaged") for state in status.tolist()]
        parts = [
            self.cohort.images.assign(status=known, error=errors),
            pd.DataFrame(self.cohort.targets, columns=list(self.findings)),
        ]
        for name in features:
            states = [state for state in EMBEDDED if name in self.features_of(state)]
            rows = np.flatnonzero(np.isin(status, states))
            values = np.full((len(self), math.prod(self.columns[name].shape[1:])), np.nan, "f4")
            values[rows] = self.read_views(name, rows, np.zeros_like(rows)).reshape(len(rows), -1)
            columns = [f"{name}_{i}" for i in range(values.shape[1])]
            parts.append(pd.DataFrame(values, columns=columns))
        table: pd.DataFrame = pd.concat(parts, axis=1)
        return table

    @property
    def canary(self) -> NDArray[np.float32] | None:
        """Embeddings of the canary images as first computed, ``(C, D)``; None without them."""
        return np.array(self.read_column("canary")) if "canary" in self.columns else None

    def read_errors(self, rows: NDArray[np.intp]) -> list[str]:
        """Why each of the failed `rows` failed."""
        reasons = self.read_column("error")[rows]
        return [bytes(reason).decode("utf-8", "replace") for reason in reasons]

    def find_damaged(self, rows: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
        """Finished rows whose bytes do not match their digest, and rows of unknown status.

        Parameters
        ----------
        rows
            Rows to look at; None for every row.
        """
        status = self.status
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, np.intp)
        damaged = [chosen[~np.isin(status[chosen], self.states)]]
        for state in self.states[1:]:
            for chunk, _, intact in self.check_rows(chosen[status[chosen] == state], state):
                damaged.append(chunk[~intact])
        return np.sort(np.concatenate(damaged))

    def check_rows(
        self, rows: NDArray[np.intp], state: int = DONE
    ) -> Iterator[tuple[NDArray[np.intp], dict[str, NDArray[Any]], NDArray[np.bool_]]]:
        """Read rows of one state group by group, with whether their digests match.

        Yields
        ------
        rows
            The next B of `rows`.
        values
            What the digest covers, by column, ``(B, ...)`` each.
        intact
            Whether the bytes are those that were written, ``(B,)``.
        """
        sources = self._digest_sources(state)
        for chunk in self.split_rows(rows, sources):
            values = {name: self.read_rows(name, chunk) for name in sources}
            stored = self.read_rows("row_digest", chunk)
            intact = (_digest_rows(list(values.values())) == stored).all(axis=1)
            yield chunk, values, intact

    def split_rows(
        self, rows: NDArray[np.intp], names: Sequence[str]
    ) -> Iterator[NDArray[np.intp]]:
        """Groups of rows whose datasets `names` fit into memory together."""
        row_bytes = sum(self.columns[name].row_bytes for name in names)
        n_at_once = max(1, _BYTES_AT_ONCE // row_bytes)
        for start in range(0, len(rows), n_at_once):
            yield rows[start : start + n_at_once]

    def _digest_sources(self, state: int) -> tuple[str, ...]:
        """The datasets that the digest of a row covers, in this order."""
        if state == FAILED:
            return "image_id", "error"
        return "image_id", "image_sha256", *self.features_of(state)

    def _read_text(self, name: str) -> NDArray[np.str_]:
        encoded = np.array(self.read_column(name))
        try:
            return encoded.astype(np.str_)  # ASCII: twenty times as fast
        except UnicodeDecodeError:
            return np.char.decode(encoded, "utf-8")

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
            Every feature column of the store, ``(B, V, ...)`` each. Tokens may be left out: then
            the rows lack them, and nothing else.
        image_sha256
            SHA-256 of each image file's bytes, ``(B, 32)``.

        Raises
        ------
        DiskFullError, DiskError
            The disk did not take the rows: they count as pending, all earlier ones stay. Only
            opening the store again, after a look at the disk, allows another try.
        """
        state = DONE if set(features) == set(self.features) else WITHOUT_TOKENS
        if set(features) != set(self.features_of(state)):
            raise ValueError(f"the store has {self.features}, the batch {tuple(features)}")
        self._write(rows, state, {"image_sha256": image_sha256, **features})

    def record_failures(
        self, rows: Sequence[int] | NDArray[np.intp], reasons: Sequence[str]
    ) -> None:
        """Mark rows as failed, with the reason for each; as durable as :meth:`commit`."""
        encoded = [_cut_utf8(reason, ERROR_WIDTH) for reason in reasons]
        self._write(rows, FAILED, {"error": np.array(encoded, f"S{ERROR_WIDTH}")})

    def mark_pending(self, rows: NDArray[np.intp]) -> None:
        """Forget rows, so that the next extraction computes them again."""
        self._write(rows, PENDING, {})

    def replace(
        self,
        cohort: Cohort,
        rows: NDArray[np.intp],
        *,
        features: Mapping[str, tuple[int, ...]],
        boundary_block: int | None = None,
        tokens_dtype: str = "float16",
        part: Mapping[str, int] | None = None,
    ) -> FeatureStore:
        """Replace the file by one for another image table, and return it open for writing.

        Until the new file is whole, the old one stays in its place. This object is closed.

        Parameters
        ----------
        cohort
            The new image table, of M images.
        rows
            For each new image the row of this store to take over, or -1; shape ``(M,)``.
        features, boundary_block, tokens_dtype, part
            As in :meth:`create`, of the new table. Where this store has no tokens and the new one
            has, the rows taken over lack them, and nothing else.
        """
        lock, self._lock = self._lock, None
        assert lock is not None, "only a store opened for writing is replaced"
        header = _describe(cohort, self.header.encoder, boundary_block, tokens_dtype, part)
        taken = np.flatnonzero(rows >= 0)
        try:
            _publish(
                self.path,
                lock,
                header,
                _encode_table(cohort, header),
                features,
                self.canary,
                lambda new: new.copy_rows(self, rows[taken], taken),
            )
            new = self._open_file(self.path, os.O_RDWR, lock)
        except BaseException:
            self._lock = lock
            raise
        self.close()
        return new

    def require_space(
        self,
        cohort: Cohort,
        features: Mapping[str, tuple[int, ...]],
        on_space: Callable[[Space], None] | None = None,
        *,
        tokens_dtype: str = "float16",
    ) -> None:
        """Raise unless there is room for what :meth:`replace` would write beside this file.

        Parameters are those of :meth:`replace` and :meth:`create`.

        Raises
        ------
        DiskFullError
            With the bytes needed and those free.
        """
        table = _encode_table(cohort, _describe(cohort, self.header.encoder))
        columns = plan_columns(table, features, self.canary, tokens_dtype)
        _require_space(self.path, columns, on_space)

    def copy_rows(
        self, source: FeatureStore, from_rows: NDArray[np.intp], to_rows: NDArray[np.intp]
    ) -> None:
        """Commit embedded rows of another store of the same identity, B each.

        Those that have no tokens there have none here.
        """
        status = source.status[from_rows]
        for state in EMBEDDED:
            names = ("image_sha256", *source.features_of(state))
            for chunk in source.split_rows(np.flatnonzero(status == state), names):
                values = {name: source.read_rows(name, from_rows[chunk]) for name in names}
                sha256 = values.pop("image_sha256")
                self.commit(to_rows[chunk], values, sha256)

    def _write(
        self, rows: Sequence[int] | NDArray[np.intp], state: int, batch: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write the bytes of rows, their digests and, last, their status."""
        rows = np.asarray(rows, dtype=np.intp)
        if not len(rows):
            return
        values = {
            name: np.ascontiguousarray(given, self.columns[name].dtype)
            for name, given in batch.items()
        }
        for name, given in values.items():
            if given.shape != (len(rows), *self.columns[name].shape):
                raise ValueError(
                    f"{name} has shape {given.shape} for {len(rows)} rows of "
                    f"{self.columns[name].shape}"
                )
        covered = values | {"image_id": self.read_column("image_id")[rows]}
        values["row_digest"] = (
            np.zeros((len(rows), 16), np.uint8)  # old bytes must not come back to life
            if state == PENDING
            else _digest_rows([covered[name] for name in self._digest_sources(state)])
        )
        values["status"] = np.full(len(rows), state, np.uint8)
        with self._durably(rows, sum(given.nbytes for given in values.values())):
            for name, given in values.items():
                self._put(name, rows, given)

    @contextlib.contextmanager
    def _durably(self, rows: NDArray[np.intp], n_bytes: int) -> Iterator[None]:
        """Do writes, then fsync; whatever fails, the rows are pending and not half there.

        Those that lacked only tokens lack them still: their old digest tells whether the rest of
        their bytes is what it was.
        """
        if self._lock is None:
            raise ValueError(f"{self.path} was opened for reading; open it with mode 'r+'")
        if self._disk_failed:
            # After a failed fsync the system drops what it could not write, and says so once.
            raise DiskError(f"{self.path}: an earlier write failed; open the store again.")
        before = self.read_rows("status", rows)
        lacking = rows[before == WITHOUT_TOKENS]
        digests = self.read_rows("row_digest", lacking)
        try:
            with disk_errors_named(self.path, n_bytes):
                yield
                sync(self._fd)
        except BaseException as error:
            self._disk_failed = isinstance(error, OSError)
            with contextlib.suppress(OSError):
                self._put("row_digest", lacking, digests)
                before[before != WITHOUT_TOKENS] = PENDING
                self._put("status", rows, before)
            raise

    def _put(self, name: str, rows: NDArray[np.intp], values: NDArray[Any]) -> None:
        column = self.columns[name]
        data = values.reshape(-1).view(np.uint8).data
        for start, end in _runs(rows):
            write_at(
                self._fd,
                data[start * column.row_bytes : end * column.row_bytes],
                column.offset + int(rows[start]) * column.row_bytes,
            )


# -- the file ---------------------------------------------------------------------------


def _publish(
    path: Path,
    lock: WriterLock,
    header: Header,
    table: Mapping[str, NDArray[Any]],
    features: Mapping[str, tuple[int, ...]],
    canary: NDArray[np.float32] | None,
    fill: Callable[[FeatureStore], None] | None,
    on_space: Callable[[Space], None] | None = None,
) -> None:
    """Write the file under a temporary name and give it its own only when it is on disk."""
    target = Path(os.path.realpath(path))  # a link to a store stays a link
    columns = plan_columns(table, features, canary, header.tokens_dtype)
    needed = _require_space(path, columns, on_space)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    fixed = dict(table) if canary is None else {**table, "canary": canary}
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with disk_errors_named(path, needed), opened(temporary, flags) as fd:
            write_layout(fd, header, columns, fixed)
            reserve(fd)
            sync(fd)
            if fill is not None:
                _fill_unnamed(path, temporary, lock, fill)
            temporary.replace(target)
            sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):  # renamed already; or the disk failed, and says so above
            temporary.unlink()


def _fill_unnamed(
    path: Path, temporary: Path, lock: WriterLock, fill: Callable[[FeatureStore], None]
) -> None:
    with FeatureStore._open_file(temporary, os.O_RDWR, lock) as store:
        store.path = path  # what messages name
        try:
            fill(store)
        finally:
            store._lock = None  # of the file that is to come, so not to be released here


def require_absent(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError if there is a file at `path`, unless it may be replaced."""
    if path.exists() and not overwrite:
        raise ConfigError(
            f"{path} exists already. Choose another file, or replace it with --overwrite."
        )


def _require_space(
    path: Path, columns: Mapping[str, Column], on_space: Callable[[Space], None] | None
) -> int:
    """State what a new file takes, raise unless it is free, and return it in bytes."""
    n_bytes = {name: column.n_bytes for name, column in columns.items()}
    needed = sum(n_bytes.values())
    if on_space is not None:
        on_space(Space(path, needed, n_bytes.get("tokens", 0), free_bytes(path.parent)))
    require_space(path, needed)
    return needed


def _remove_abandoned(path: Path) -> None:
    """Delete what a killed writer left; the caller holds the lock, so nobody works on it."""
    target = Path(os.path.realpath(path))
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp*"):
        left.unlink()


def _describe(
    cohort: Cohort,
    encoder: Mapping[str, Any],
    boundary_block: int | None = None,
    tokens_dtype: str = "float16",
    part: Mapping[str, int] | None = None,
) -> Header:
    """What a new store says of itself."""
    return Header(
        encoder=dict(encoder),
        findings=cohort.findings,
        cohort=dict(cohort.source),
        boundary_block=boundary_block,
        tokens_dtype=tokens_dtype,
        part=None if part is None else dict(part),
        versions=package_versions(*_PACKAGES),
        image_columns=tuple(name for name in cohort.images.columns if name not in IMAGE_COLUMNS),
        reading=_describe_reading(cohort),
    )


def _describe_reading(cohort: Cohort) -> dict[str, Any] | None:
    """How the data set was read, without the longest lists where HDF5 has no place for them."""
    if cohort.reading is None:
        return None
    values = cohort.reading.to_dict()
    for name in ("codes", "columns"):
        if len(json.dumps(values)) > _MAX_READING_BYTES:
            values[name] = {}
    return values


def _encode_table(cohort: Cohort, header: Header) -> dict[str, NDArray[Any]]:
    """The datasets that are known before any image is read, as they lie in the file."""
    table = {}
    for name, dataset in header.text_datasets.items():
        encoded = np.array([cell.encode() for cell in cohort.images[name]], np.bytes_)
        if encoded.dtype.itemsize > MAX_TEXT_BYTES:
            row = int(np.char.str_len(encoded).argmax())
            raise TableError(
                f"{name} of image {row + 1:,} of {len(cohort):,} is a text of "
                f"{encoded.dtype.itemsize:,} bytes; a store keeps at most {MAX_TEXT_BYTES:,} in a "
                "cell of its image table. Shorten it, or leave the column out."
            )
        table[dataset] = encoded.astype(f"S{max(1, encoded.dtype.itemsize)}")
    return {**table, "targets": np.ascontiguousarray(cohort.targets, "<f4")}


# -- small things -----------------------------------------------------------------------


def _runs(rows: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Start and end, in `rows`, of each run of neighbouring rows."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return ((start, end) for start, end in itertools.pairwise(edges) if end > start)


def _digest_rows(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """xxh3-128 over the bytes of all `columns` of each row, ``(B, 16)``."""
    n_rows = len(columns[0])
    parts = [np.ascontiguousarray(c).reshape(n_rows, -1).view(np.uint8) for c in columns]
    packed = np.concatenate(parts, axis=1)  # (B, bytes of a row)
    width, data = packed.shape[1], packed.reshape(-1).data
    digests = (
        xxhash.xxh3_128_digest(data[start : start + width])
        for start in range(0, n_rows * width, width)
    )
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def _in_words(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def are_finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row is free of NaN and infinity, ``(B,)``; numpy's own is slow in float16."""
    kind, exponent = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000)}[values.itemsize]
    bits = values.reshape(len(values), -1).view(kind)
    return np.asarray(((bits & exponent) != exponent).all(axis=1))


def _cut_utf8(text: str, width: int) -> bytes:
    return text.encode("utf-8", "replace")[:width].decode("utf-8", "ignore").encode("utf-8")
