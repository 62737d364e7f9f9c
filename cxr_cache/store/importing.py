"""Embeddings made elsewhere to store."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.manifest import mark_written
from cxr_cache.common.tables import hash_file
from cxr_cache.common.wording import count
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.errors import TableError
from cxr_cache.store.feature_store import FeatureStore, are_finite, require_absent

_ROWS_AT_ONCE = 16_384
_DAMAGED = (  # what zipfile and numpy raise on damaged or dishonest files
    ArithmeticError,
    AttributeError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,  # encrypted
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class ImportSummary:
    """What an import did."""

    store_path: Path
    n_images: int
    n_done: int
    n_without_embedding: int
    n_not_in_cohort: int
    embedding_width: int

    def to_text(self) -> str:
        """Closing lines for a terminal."""
        lines = [
            f"{self.store_path}: {count(self.n_images, 'image')} = {self.n_done:,} done + "
            f"{self.n_without_embedding:,} failed + 0 pending; "
            f"embeddings are {self.embedding_width} wide"
        ]
        if self.n_without_embedding:
            lines.append(f"  table images without an embedding: {self.n_without_embedding:,}")
        if self.n_not_in_cohort:
            lines.append(f"  embeddings of no table image: {self.n_not_in_cohort:,}")
        return "\n".join(lines)


def import_embeddings(
    npz_path: str | Path, cohort: Cohort, store_path: str | Path, *, overwrite: bool = False
) -> ImportSummary:
    """Make a store from an ``.npz`` file with the keys ``image_id`` and ``embeddings``.

    The file's digest takes the place of the encoder's identity: features of two files are never
    mixed. Images without an embedding become failed rows.

    Parameters
    ----------
    npz_path
        ``image_id`` ``(M,)`` text, ``embeddings`` ``(M, D)`` of any float type and width.
    cohort
        The image table.
    store_path
        The HDF5 file to write.
    overwrite
        Replace a store that is there already.

    Raises
    ------
    TableError
        The file lacks a key, its shapes do not fit, or a value is not finite.
    ConfigError
        There is a file at `store_path` and `overwrite` is off.

    Examples
    --------
    >>> np.savez("mine.npz", image_id=names, embeddings=embeddings)  # doctest: +SKIP
    >>> import_embeddings("mine.npz", load_cohort("DATA"), "features.h5")  # doctest: +SKIP
    """
    npz_path, store_path = Path(npz_path), Path(store_path)
    require_absent(store_path, overwrite=overwrite)
    image_ids, embeddings = _read_npz(npz_path)
    positions = pd.Index(image_ids).get_indexer(pd.Index(cohort.image_ids))  # (N,), -1 if absent
    if (positions < 0).all():
        raise TableError(
            f"{npz_path} names none of the {len(cohort):,} images: its first image_id is "
            f"{str(image_ids[0])!r}, the table's {str(cohort.image_ids[0])!r}."
        )
    encoder = {
        "name": f"imported:{npz_path.name}",
        "imported": True,
        "is_random": False,
        "weights_sha256": hash_file(npz_path),
        "embedding_width": embeddings.width,
    }
    shapes = {"embeddings": (1, embeddings.width)}
    present = np.flatnonzero(positions >= 0)
    absent = np.flatnonzero(positions < 0)
    row_of = np.full(len(image_ids), -1)
    row_of[positions[present]] = present

    def fill(store: FeatureStore) -> None:
        for start, values in embeddings.parts():
            rows = row_of[start : start + len(values)]
            order = np.argsort(rows)[(rows < 0).sum() :]  # of the table, what it has
            unknown = np.zeros((len(order), 32), np.uint8)  # the images themselves are not at hand
            store.commit(rows[order], {"embeddings": values[order, None]}, unknown)
        store.record_failures(absent, [f"no embedding in {npz_path.name}"] * len(absent))

    FeatureStore.create(
        store_path, cohort, encoder=encoder, features=shapes, fill=fill, overwrite=overwrite
    ).close()
    mark_written(store_path)
    return ImportSummary(
        store_path,
        n_images=len(cohort),
        n_done=len(present),
        n_without_embedding=len(absent),
        n_not_in_cohort=len(image_ids) - len(present),
        embedding_width=embeddings.width,
    )


@dataclass(frozen=True)
class _StoredMatrix:
    """The array ``embeddings`` of an ``.npz`` file, ``(M, D)``, which is read part by part."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_columns: bool
    """Whether it lies in memory column by column, so that no row can be read alone."""

    @classmethod
    def open(cls, path: Path) -> _StoredMatrix:
        with _open_member(path) as file:
            return cls(path, *_read_header(file))

    @property
    def width(self) -> int:
        """D."""
        return self.shape[1]

    def parts(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The first row of each part, and its values, ``(n, D)``; too large ones are infinite.

        Raises
        ------
        TableError
            The file is damaged.
        """
        n_rows, width = self.shape
        try:
            with _open_member(self.path) as file, np.errstate(over="ignore"):
                if self.by_columns:
                    whole = np.lib.format.read_array(file, allow_pickle=False)
                    for start in range(0, n_rows, _ROWS_AT_ONCE):
                        part = whole[start : start + _ROWS_AT_ONCE]
                        yield start, np.ascontiguousarray(part, np.float32)
                    return
                _read_header(file)
                for start in range(0, n_rows, _ROWS_AT_ONCE):
                    shape = min(_ROWS_AT_ONCE, n_rows - start), width
                    content = file.read(shape[0] * width * self.dtype.itemsize)
                    part = np.frombuffer(content, self.dtype).reshape(shape)
                    yield start, part.astype(np.float32, copy=False)
                file.read(1)  # at the end, the checksum is compared
        except _DAMAGED as error:
            raise _not_readable(self.path, error) from error


@contextlib.contextmanager
def _open_member(path: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        name = "embeddings.npy" if "embeddings.npy" in archive.namelist() else "embeddings"
        with archive.open(name) as file:
            yield file


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, type and order of an array in numpy's own format."""
    if np.lib.format.read_magic(file) == (1, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, by_columns, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("objects are read with allow_pickle only")
    return shape, dtype, by_columns


def _not_readable(path: Path, error: Exception) -> TableError:
    if "allow_pickle" in str(error):
        return TableError(
            f"{path} holds Python objects, as columns of pandas are. They are not read: "
            "that can run any program. Save it with np.savez(path, "
            "image_id=np.array(ids, dtype=str), embeddings=np.array(matrix, dtype='float32'))."
        )
    return TableError(f"{path} cannot be read as an .npz file: {error}")


def _read_npz(path: Path) -> tuple[NDArray[np.str_], _StoredMatrix]:
    """Names and embeddings, of which all is checked and nothing is kept in memory."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise TableError(
            f"{path} is not an .npz file. Save one with "
            "np.savez(path, image_id=ids, embeddings=matrix)."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("image_id", "embeddings") if key not in file]
            if missing:
                raise TableError(
                    f"{path} lacks the key(s) {missing}; it has {sorted(file)}. Save it with "
                    "np.savez(path, image_id=ids, embeddings=matrix)."
                )
            image_ids = file["image_id"].astype(str, copy=False)
        embeddings = _StoredMatrix.open(path)
    except FileNotFoundError as error:
        raise TableError(f"There is no file {path}.") from error
    except TableError:
        raise
    except _DAMAGED as error:
        raise _not_readable(path, error) from error
    shape = embeddings.shape
    if len(shape) != 2 or image_ids.shape != shape[:1] or min(shape) < 1:
        raise TableError(
            f"{path}: embeddings have shape {shape} and image_id {image_ids.shape}; "
            "expected (M, D) and (M,)."
        )
    if embeddings.dtype.kind != "f":
        raise TableError(f"{path}: embeddings are of type {embeddings.dtype}, not floats.")
    if not pd.Index(image_ids).is_unique:
        raise TableError(f"{path} lists an image_id twice.")
    finite = np.concatenate([are_finite(part) for _, part in embeddings.parts()])
    if not finite.all():
        raise TableError(
            f"{path}: {(~finite).sum():,} embeddings hold NaN, infinity or a number too large for "
            f"float32; the first is that of {str(image_ids[~finite][0])!r}."
        )
    return image_ids, embeddings
