"""Embeddings made elsewhere to store."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

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
        "embedding_width": embeddings.shape[1],
    }
    shapes = {"embeddings": (1, embeddings.shape[1])}
    present = np.flatnonzero(positions >= 0)
    absent = np.flatnonzero(positions < 0)

    def fill(store: FeatureStore) -> None:
        for start in range(0, len(present), _ROWS_AT_ONCE):
            rows = present[start : start + _ROWS_AT_ONCE]
            unknown = np.zeros((len(rows), 32), np.uint8)  # the images themselves are not at hand
            store.commit(rows, {"embeddings": embeddings[positions[rows], None]}, unknown)
        store.record_failures(absent, [f"no embedding in {npz_path.name}"] * len(absent))

    FeatureStore.create(
        store_path, cohort, encoder=encoder, features=shapes, fill=fill, overwrite=overwrite
    ).close()
    mark_written(store_path)
    n_known = len(np.unique(positions[present]))
    return ImportSummary(
        store_path,
        n_images=len(cohort),
        n_done=len(present),
        n_without_embedding=len(absent),
        n_not_in_cohort=len(image_ids) - n_known,
        embedding_width=int(embeddings.shape[1]),
    )


def _read_npz(path: Path) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
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
            image_ids, embeddings = file["image_id"].astype(str), file["embeddings"]
    except FileNotFoundError as error:
        raise TableError(f"There is no file {path}.") from error
    except TableError:
        raise
    except _DAMAGED as error:
        if "allow_pickle" in str(error):
            raise TableError(
                f"{path} holds Python objects, as columns of pandas are. They are not read: "
                "that can run any program. Save it with np.savez(path, "
                "image_id=np.array(ids, dtype=str), embeddings=np.array(matrix, dtype='float32'))."
            ) from error
        raise TableError(f"{path} cannot be read as an .npz file: {error}") from error
    if embeddings.ndim != 2 or image_ids.shape != embeddings.shape[:1] or not embeddings.size:
        raise TableError(
            f"{path}: embeddings have shape {embeddings.shape} and image_id {image_ids.shape}; "
            "expected (M, D) and (M,)."
        )
    if embeddings.dtype.kind != "f":
        raise TableError(f"{path}: embeddings are of type {embeddings.dtype}, not floats.")
    if len(np.unique(image_ids)) != len(image_ids):
        raise TableError(f"{path} lists an image_id twice.")
    with np.errstate(over="ignore"):  # too large a number becomes infinite, and is found
        embeddings = embeddings.astype(np.float32, copy=False)
    parts = range(0, len(embeddings), _ROWS_AT_ONCE)
    finite = np.concatenate([are_finite(embeddings[i : i + _ROWS_AT_ONCE]) for i in parts])
    if not finite.all():
        raise TableError(
            f"{path}: {(~finite).sum():,} embeddings hold NaN, infinity or a number too large for "
            f"float32; the first is that of {str(image_ids[~finite][0])!r}."
        )
    return image_ids, embeddings
