"""Where the tables and images of a published data set lie, on whatever disk they were unpacked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Final

import pandas as pd

from cxr_cache.errors import TableError

TABLE_FOLDERS: Final = ("", "annotations", "metadata", "CheXpert", "files", "CheXpert_Labels")
"""Folders inside a data set in which its authors put tables; the first is the data set's own."""
TABLE_ENDINGS: Final = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".zip", ".parquet", ".xlsx")
IMAGE_ENDINGS: Final = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".webp")
_N_TRIED: Final = 30


def list_tables(path: Path) -> list[Path]:
    """The tables at `path`: itself, or those of the folder and where authors put them in it."""
    if not path.is_dir():
        return [path]
    folders = (path / name for name in TABLE_FOLDERS)
    return sorted(
        file
        for folder in folders
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.lower().endswith(TABLE_ENDINGS) and file.is_file()
    )


def peek(path: Path) -> pd.DataFrame:
    """The header and first row of a table, as text; empty where it cannot be read."""
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".xlsx":
            table = pd.read_excel(path, nrows=1, dtype=str)
        else:
            table = pd.read_csv(
                path, nrows=1, dtype=str, encoding_errors="replace", keep_default_na=False
            )
    except (OSError, ValueError, ImportError):  # whoever reads it whole says what is wrong
        return pd.DataFrame()
    return table.rename(columns=lambda name: str(name).strip())


def find_beside(path: Path, *patterns: str) -> list[Path]:
    """Files of the data set at `path` (a folder, or one of its tables) whose names fit."""
    home = path if path.is_dir() else path.parent
    found = {
        file
        for name in TABLE_FOLDERS
        for pattern in patterns
        for file in (home / name).glob(pattern)
        if file.is_file()
    }
    return sorted(found)


def walk_images(folder: Path) -> Iterator[str]:
    """Yield the posix path below `folder` of every file that is named like an image, sorted."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        inside = PurePosixPath(Path(place).relative_to(folder).as_posix())
        for name in sorted(files):
            if name[0] != "." and name.lower().endswith(IMAGE_ENDINGS):
                yield str(inside / name)


def locate_images(written: Sequence[str], image_dir: Path | None) -> list[str]:
    """Paths below `image_dir` of the images that a table writes in its own way.

    A table may name a folder that the disk calls otherwise (``CheXpert-v1.0-small/train/...``),
    leave out the folders (NIH's ``00000001_000.png``) or the ending (VinDr's ids), or name a PNG
    where there is a JPEG. Where some thirty of the images show one rule, all follow it; else the
    folder is walked through.

    Parameters
    ----------
    written
        N names or paths; an image without a file keeps what is written.
    image_dir
        None looks for nothing, and gives back what is written.

    Raises
    ------
    TableError
        Two files could be the same image.
    """
    if image_dir is None or not len(written) or not image_dir.is_dir():
        return list(written)
    tried = written[:: max(1, len(written) // _N_TRIED)]
    with os.scandir(image_dir) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
    prefixes = ("", *(f"{name}/" for name in folders[:_N_TRIED]))
    depth = max(name.count("/") for name in tried) + 1
    for prefix, drop, ending in product(prefixes, range(depth), (None, *IMAGE_ENDINGS)):
        if all((image_dir / _respell(name, prefix, drop, ending)).is_file() for name in tried):
            return [_respell(name, prefix, drop, ending) for name in written]
    return _match_tails(written, list(walk_images(image_dir)), image_dir)


def _respell(name: str, prefix: str, drop: int, ending: str | None) -> str:
    """Drop leading folders and put others there, and `ending` unless it is None."""
    kept = name.split("/", drop)[-1]
    return prefix + (kept if ending is None else _stem(kept) + ending)


def _stem(name: str) -> str:
    """The name without an image's ending; an id that holds dots keeps them."""
    root, dot, ending = name.rpartition(".")
    return root if dot and f".{ending.lower()}" in IMAGE_ENDINGS else name


def _tail(name: str, n_parts: int) -> str:
    return "/".join(_stem(name).rsplit("/", n_parts)[-n_parts:])


def _match_tails(written: Sequence[str], paths: list[str], image_dir: Path) -> list[str]:
    """Give each name the file whose path ends like it, over as many folders as any does."""
    depth = max(name.count("/") for name in written) + 1
    for n_parts in range(depth, 0, -1):
        wanted = {_tail(name, n_parts) for name in written}
        places: dict[str, str] = {}
        for path in paths:
            tail = _tail(path, n_parts)
            if tail in wanted and places.setdefault(tail, path) != path:
                if n_parts < depth and n_parts == 1:  # names such as view1_frontal say too little
                    return list(written)
                raise TableError(
                    f"{image_dir} holds two files that could be image {tail!r}: {places[tail]} "
                    f"and {path}. Name the folder of those that are meant with --image-dir."
                )
        if places:
            return [places.get(_tail(name, n_parts), name) for name in written]
    return list(written)
