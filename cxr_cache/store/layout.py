"""Where the bytes of a feature store lie in its HDF5 file (only module that knows HDF5).

A store consists of two kinds of bytes. What is known when it is created (the description, the
image table, the canaries, HDF5's own structures) never changes and is covered by one digest.
The rows lie in contiguous datasets behind it and are covered by a digest each.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from cxr_cache.common.files import read_at, write_at
from cxr_cache.datasets.cohort import IMAGE_COLUMNS, Reading
from cxr_cache.datasets.preprocessing import number_decode_rule
from cxr_cache.errors import StoreFormatError

FORMAT_VERSIONS: Final = (1, 2, 3)
"""Those that are read. The first that will do is written: 1, which cxr-cache 0.1.0 reads too, has
no further columns of the image table, and 2 no tokens but those in float16."""
TOKENS_DTYPES: Final = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""Type of the dataset that holds the tokens, by their number format. NumPy and HDF5 know no
bfloat16, so that its bits are kept as whole numbers. The names are those of
:data:`cxr_cache.config.TOKENS_DTYPES`."""
FEATURES: Final = ("embeddings", "pooled", "tokens")
PART_FIELDS: Final = {"number", "of", "first_row", "n_rows_of_whole"}
ERROR_WIDTH: Final = 240
"""Bytes that are kept of the reason why a row failed."""
MAX_TEXT_BYTES: Final = 1 << 14
"""Bytes that a cell of the image table may have."""

_ROW_COLUMNS: Final = ("status", "error", "image_sha256", "row_digest")
_FIXED_DIGEST: Final = "fixed_digest"
_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n\0"  # with the version of the superblock, 0
_MAX_ATTRIBUTE_BYTES: Final = 1 << 20
_MAX_STRUCTURE_BYTES: Final = 1 << 22  # outside all datasets; a store has some kilobytes there
_MAX_IMAGE_COLUMNS: Final = 64  # besides those that every image table has
_MAX_CANARIES: Final = 64
_BYTES_AT_ONCE: Final = 1 << 20
_ALIGNMENT: Final = 64  # of every dataset, so that no number straddles cache lines


@dataclass(frozen=True)
class Header:
    """What describes a store besides its rows; kept as JSON attributes of the root group."""

    encoder: dict[str, Any]
    """Identity of what made the features; equal identities may be mixed."""
    findings: tuple[str, ...]
    cohort: dict[str, Any]
    """Where the image table came from (file names and digests)."""
    boundary_block: int | None = None
    """First block that `tokens` enter; None without tokens."""
    part: dict[str, int] | None = None
    """Which part of a larger store this is (see ``PART_FIELDS``); None where it is a whole."""
    versions: dict[str, str] = field(default_factory=dict)
    image_columns: tuple[str, ...] = ()
    """Further columns of the image table, in their order."""
    reading: dict[str, Any] | None = None
    """How the data set's tables were understood; stores of before have none, and none is
    written."""
    tokens_dtype: str = "float16"
    """Number format of the tokens, of :data:`TOKENS_DTYPES`."""

    @property
    def n_unfrozen(self) -> int | None:
        """Blocks of the encoder that the tokens have before them; None without tokens."""
        if self.boundary_block is None:
            return None
        return int(self.encoder["n_blocks"]) - self.boundary_block

    @property
    def format_version(self) -> int:
        """The first version that has a place for all this."""
        if self.tokens_dtype != "float16":
            return 3
        return 2 if self.image_columns else 1

    @property
    def text_datasets(self) -> dict[str, str]:
        """Dataset that holds each column of the image table, by the column's name.

        Further columns may have any name, of which HDF5 would make a path: they are numbered.
        """
        further = {name: f"image_column_{i}" for i, name in enumerate(self.image_columns)}
        return {**{name: name for name in IMAGE_COLUMNS}, **further}


@dataclass(frozen=True)
class Column:
    """One contiguous dataset: `n_rows` rows of `shape` and `dtype`, from byte `offset` on."""

    name: str
    dtype: np.dtype[Any]
    n_rows: int
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.n_rows * self.row_bytes


@dataclass(frozen=True)
class Layout:
    """A store's description and its datasets by name, among them the image table's."""

    header: Header
    columns: dict[str, Column]

    @property
    def n_images(self) -> int:
        """Rows of every dataset but the canaries and the digest."""
        return self.columns["image_id"].n_rows


def plan_columns(
    table: Mapping[str, NDArray[Any]],
    features: Mapping[str, tuple[int, ...]],
    canary: NDArray[np.float32] | None,
    tokens_dtype: str = "float16",
) -> dict[str, Column]:
    """Type and shape of every dataset, in their order in the file; offsets are not known yet."""
    n_images = len(table["image_id"])
    types: dict[str, tuple[Any, tuple[int, ...]]] = {
        "status": ("u1", ()),
        "error": (f"S{ERROR_WIDTH}", ()),
        "image_sha256": ("u1", (32,)),
        "row_digest": ("u1", (16,)),
        **{
            name: (TOKENS_DTYPES[tokens_dtype] if name == "tokens" else "<f4", tuple(shape))
            for name, shape in features.items()
        },
    }
    fixed = {**table, _FIXED_DIGEST: np.zeros((1, 16), np.uint8)}
    if canary is not None:
        fixed["canary"] = np.ascontiguousarray(canary, "<f4")
    return {
        **{
            name: Column(name, values.dtype, len(values), values.shape[1:])
            for name, values in fixed.items()
        },
        **{
            name: Column(name, np.dtype(dtype), n_images, shape)
            for name, (dtype, shape) in types.items()
        },
    }


# -- writing ----------------------------------------------------------------------------


def write_layout(
    fd: int, header: Header, columns: Mapping[str, Column], fixed: Mapping[str, NDArray[Any]]
) -> None:
    """Write an HDF5 file that has a place for every row, as :func:`plan_columns` plans it.

    The header becomes attributes of the root group. `fixed` holds the values of the datasets that
    never change: the image table and the canaries. `fd` is an empty file, open for reading too.
    """
    view = _FileView(fd)
    with h5py.File(
        view, "w", libver="earliest", alignment_threshold=1, alignment_interval=_ALIGNMENT
    ) as file:
        described = {**vars(header), "format_version": header.format_version}
        for key in _keys_since(header.format_version):
            del described[key]
        if header.reading is None:
            del described["reading"]
        for key, value in described.items():
            file.attrs[key] = np.bytes_(json.dumps(value).encode())
        for name, column in columns.items():
            dataset = _create_contiguous(file, column)
            if name in fixed:
                dataset[...] = fixed[name]
    view.raise_error()
    layout = _parse(fd, Path())
    write_at(fd, _hash_fixed(fd, layout.columns), layout.columns[_FIXED_DIGEST].offset)


def _create_contiguous(file: h5py.File, column: Column) -> h5py.Dataset:
    """A dataset whose bytes get their place in the file now: no later write moves anything."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # new blocks of a file are zero anyway
    creation.set_obj_track_times(False)  # the same store has the same bytes
    space = h5py.h5s.create_simple((column.n_rows, *column.shape))
    file_type = h5py.h5t.py_create(column.dtype, logical=True)
    return h5py.Dataset(h5py.h5d.create(file.id, column.name.encode(), file_type, space, creation))


class _FileView:
    """An open file as h5py wants its file objects.

    It keeps the first error of the disk for later instead of raising it: an exception inside a
    callback of libhdf5 is lost, or comes out as another one.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0
        self._error: OSError | None = None

    def raise_error(self) -> None:
        """Raise what the disk answered while libhdf5 was at work."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (os.fstat(self._fd).st_size if start is None else start)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.readinto(memoryview(buffer))
        return bytes(buffer)

    def readinto(self, buffer: memoryview) -> int:
        n_read = 0
        try:
            n_read = read_at(self._fd, buffer, self._position)
        except OSError as error:
            self._error = self._error or error
        buffer[n_read:] = bytes(len(buffer) - n_read)  # libhdf5 must not see old memory
        self._position += len(buffer)
        return len(buffer)

    def write(self, data: memoryview) -> int:
        try:
            write_at(self._fd, data, self._position)
        except OSError as error:
            self._error = self._error or error
        self._position += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            self._error = self._error or error
        return size

    def flush(self) -> None:
        """Nothing waits in memory here."""


# -- reading, with distrust -------------------------------------------------------------


def read_layout(fd: int, path: Path) -> Layout:
    """Find the datasets of a store, each checked to be plain bytes inside this very file.

    The file may be anything, made by anybody: nothing is followed out of it, and no memory is
    taken on the word of a number in it. `path` is its name, for messages.

    Raises
    ------
    StoreFormatError
        The file is not a store, is damaged, or has another format version.
    """
    layout = _parse(fd, path)
    _require_columns(path, layout)
    _require_own_bytes(path, layout.columns, os.fstat(fd).st_size)
    stored = bytearray(16)
    read_at(fd, memoryview(stored), layout.columns[_FIXED_DIGEST].offset)
    if stored != _hash_fixed(fd, layout.columns):
        raise StoreFormatError(
            f"{path} is damaged: its description or image table (encoder, ids, studies, targets) "
            "has changed since it was written. Restore a copy, or delete it and extract again."
        )
    return layout


def _parse(fd: int, path: Path) -> Layout:
    start = bytearray(len(_SIGNATURE))
    read_at(fd, memoryview(start), 0)
    if start != _SIGNATURE:
        raise StoreFormatError(
            f"{path} is not a feature store: it does not begin as the HDF5 files that cxr-cache "
            "writes. Features made elsewhere come in with `cxr-cache import`."
        )
    view = _FileView(fd)
    try:
        with h5py.File(view, "r") as file:
            header = _read_header(file, path)
            names = _names(file, header, path)
            columns = {name: _read_column(file, name, path) for name in names}
    except StoreFormatError:
        raise
    except Exception as error:  # damaged bytes make libhdf5, h5py and numpy raise anything
        view.raise_error()
        raise StoreFormatError(
            f"{path} cannot be read as a feature store: {error}. If it was made by cxr-cache it is "
            "damaged: restore a copy, or delete it and run `cxr-cache extract` again."
        ) from error
    view.raise_error()
    return Layout(header, columns)


def _read_header(file: h5py.File, path: Path) -> Header:
    version = _read_attribute(file, "format_version", path)
    if version not in FORMAT_VERSIONS:
        raise StoreFormatError(
            f"{path} has another format:\n"
            f"  format_version: {version!r} in the store, "
            f"{' or '.join(map(str, FORMAT_VERSIONS))} in this cxr-cache\n"
            "Use the version of cxr-cache that wrote it."
        )
    absent = _keys_since(version)
    absent |= set() if h5py.h5a.exists(file.id, b"reading") else {"reading"}
    keys = [key for key in Header.__dataclass_fields__ if key not in absent]
    values = {
        "image_columns": [],
        "reading": None,
        "tokens_dtype": "float16",
        **{key: _read_attribute(file, key, path) for key in keys},
    }
    part = values["part"]
    sound = (
        all(isinstance(values[key], dict) for key in ("encoder", "cohort", "versions"))
        and isinstance(values["findings"], list)
        and isinstance(values["image_columns"], list)
        and len(values["image_columns"]) <= _MAX_IMAGE_COLUMNS
        and all(
            isinstance(text, str)
            for texts in (
                values["findings"],
                values["image_columns"],
                values["cohort"].values(),
                values["versions"].values(),
            )
            for text in texts
        )
        and isinstance(values["boundary_block"], int | None)
        and values["tokens_dtype"] in TOKENS_DTYPES
        and (part is None or (isinstance(part, dict) and part.keys() == PART_FIELDS))
        and all(isinstance(number, int) for number in (part or {}).values())
        and (values["reading"] is None or _is_reading(values["reading"]))
    )
    if not sound:
        raise StoreFormatError(f"{path}: its description is not that of a feature store; refused.")
    lists = {name: tuple(values[name]) for name in ("findings", "image_columns")}
    return Header(**{**values, **lists, "encoder": number_decode_rule(values["encoder"])})


def _keys_since(version: int) -> set[str]:
    """Attributes that the format got after a version."""
    first = {"image_columns": 2, "tokens_dtype": 3}
    return {key for key, since in first.items() if since > version}


def _is_reading(values: Any) -> bool:
    try:
        Reading.of_dict(values)
    except (TypeError, ValueError):
        return False
    return True


def _read_attribute(file: h5py.File, key: str, path: Path) -> Any:
    if not h5py.h5a.exists(file.id, key.encode()):
        raise StoreFormatError(
            f"{path} is an HDF5 file but not a feature store: it has no attribute '{key}'. "
            "Features made elsewhere come in with `cxr-cache import`."
        )
    attribute = h5py.h5a.open(file.id, key.encode())
    kind = attribute.get_type()
    plain = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
    if not plain or attribute.shape != () or kind.get_size() > _MAX_ATTRIBUTE_BYTES:
        raise StoreFormatError(
            f"{path}: attribute '{key}' is not a text of at most 1 MiB; refused."
        )
    return json.loads(bytes(file.attrs[key]))


def _names(file: h5py.File, header: Header, path: Path) -> list[str]:
    table = (*header.text_datasets.values(), "targets")
    known = {*table, *_ROW_COLUMNS, *FEATURES, "canary", _FIXED_DIGEST}
    names: list[str] = []

    def collect(name: bytes) -> bool | None:
        names.append(name.decode("utf-8", "replace"))
        return names[-1] not in known or None  # any answer but None ends the iteration

    file.id.links.iterate(collect)
    if unknown := sorted(set(names) - known):
        raise StoreFormatError(
            f"{path} holds '{unknown[0]}', which a store does not have; refused."
        )
    return names


def _read_column(file: h5py.File, name: str, path: Path) -> Column:
    if file.get(name, getclass=True, getlink=True) is not h5py.HardLink:
        raise StoreFormatError(f"{path}: '{name}' is a link; a store has plain datasets only.")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise StoreFormatError(f"{path}: '{name}' is a group; a store has plain datasets only.")
    creation = dataset.id.get_create_plist()
    plain = (
        creation.get_layout() == h5py.h5d.CONTIGUOUS
        and not creation.get_nfilters()
        and not creation.get_external_count()
        and dataset.dtype.kind in "Suf"
    )
    if not plain:
        raise StoreFormatError(
            f"{path}: dataset '{name}' is not plain contiguous numbers or text inside the file "
            "(chunked, compressed, external or virtual data); refused."
        )
    offset, shape = dataset.id.get_offset(), dataset.shape
    if name == "targets" and shape[1:] == (0,):  # images without labels: nothing, so nowhere
        offset = 0
    if not shape or offset is None:
        raise StoreFormatError(f"{path}: dataset '{name}' has no rows, or no place in the file.")
    return Column(name, dataset.dtype, shape[0], shape[1:], offset)


def _require_columns(path: Path, layout: Layout) -> None:
    """Raise unless every dataset has the type and the number of rows that a store gives it."""
    columns = layout.columns
    texts = layout.header.text_datasets.values()
    required = {*texts, "targets", *_ROW_COLUMNS, _FIXED_DIGEST, "embeddings"}
    if missing := sorted(required - columns.keys()):
        raise StoreFormatError(f"{path} is not a whole feature store: it lacks {missing}.")
    N, F = layout.n_images, len(layout.header.findings)
    V, D = columns["embeddings"].shape[:1] or (0,), columns["embeddings"].shape[-1:] or (0,)
    widths = {name: min(columns[name].dtype.itemsize, MAX_TEXT_BYTES) for name in texts}
    expected: dict[str, tuple[str, int | None, tuple[int | None, ...]]] = {
        **{name: (f"S{width}", N, ()) for name, width in widths.items()},
        "targets": ("<f4", N, (F,)),
        "status": ("u1", N, ()),
        "error": (f"S{ERROR_WIDTH}", N, ()),
        "image_sha256": ("u1", N, (32,)),
        "row_digest": ("u1", N, (16,)),
        "embeddings": ("<f4", N, (None, None)),
        "pooled": ("<f4", N, (*V, None)),
        "tokens": (TOKENS_DTYPES[layout.header.tokens_dtype], N, (*V, None, None)),
        "canary": ("<f4", None, D),
        _FIXED_DIGEST: ("u1", 1, (16,)),
    }
    for name, column in columns.items():
        dtype, n_rows, shape = expected[name]
        fits = (
            column.dtype == np.dtype(dtype)
            and column.n_rows == (column.n_rows if n_rows is None else n_rows)
            and len(column.shape) == len(shape)
            and all(
                n == m or (n is None and m > 0) for m, n in zip(column.shape, shape, strict=True)
            )
        )
        if not fits or column.n_rows < 1 or (name == "canary" and column.n_rows > _MAX_CANARIES):
            wanted = " x ".join("any" if n is None else str(n) for n in (n_rows, *shape))
            raise StoreFormatError(
                f"{path}: dataset '{name}' has type {column.dtype} and shape "
                f"{(column.n_rows, *column.shape)}; expected {dtype} and {wanted}."
            )


def _require_own_bytes(path: Path, columns: Mapping[str, Column], size: int) -> None:
    """Raise unless all datasets lie in the file, side by side, with little between them."""
    end = 0
    for column in sorted(columns.values(), key=lambda column: column.offset):
        if column.offset + column.n_bytes > size:
            raise StoreFormatError(
                f"{path} is cut short: dataset '{column.name}' needs {column.n_bytes:,} bytes from "
                f"byte {column.offset:,}, the file has {size:,}. Restore a copy, or delete it and "
                "extract again."
            )
        if column.offset < end:
            raise StoreFormatError(f"{path}: dataset '{column.name}' overlaps another; refused.")
        end = column.offset + column.n_bytes
    structure = size - sum(column.n_bytes for column in columns.values())
    if structure > _MAX_STRUCTURE_BYTES:
        raise StoreFormatError(
            f"{path} holds {structure:,} bytes that belong to no dataset, a store at most "
            f"{_MAX_STRUCTURE_BYTES:,}; refused."
        )


def _hash_fixed(fd: int, columns: Mapping[str, Column]) -> bytes:
    """xxh3-128 over all bytes of the file but the rows and this digest itself."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BYTES_AT_ONCE))
    for start, end in _fixed_spans(columns, os.fstat(fd).st_size):
        for position in range(start, end, _BYTES_AT_ONCE):
            n_read = read_at(fd, buffer[: min(_BYTES_AT_ONCE, end - position)], position)
            digest.update(buffer[:n_read])
    return digest.digest()


def _fixed_spans(columns: Mapping[str, Column], size: int) -> Iterator[tuple[int, int]]:
    """The parts of the file between the datasets that change."""
    changing = {*_ROW_COLUMNS, *FEATURES, _FIXED_DIGEST}
    start = 0
    for column in sorted(columns.values(), key=lambda column: column.offset):
        if column.name in changing:
            yield start, column.offset
            start = column.offset + column.n_bytes
    yield start, size
