"""Where the image files of a table lie below the image folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.wording import count
from cxr_cache.datasets.dicom.folder import find_instances
from cxr_cache.errors import TableError

_SUFFIXES = ".png .jpg .jpeg .jpe .tif .tiff .bmp .webp .jp2 .j2k .dcm .dicom"
IMAGE_SUFFIXES: Final = frozenset(_SUFFIXES.split())
"""Endings, in small letters, of the names of image files; DICOM files may have none."""

_UID: Final = re.compile(r"\d+(\.\d+){3,}")
_N_TRIED: Final = 50  # names that are looked up before the whole folder is


def default_image_dir(data: Path) -> Path:
    """Return where images lie if nobody says: in ``images`` beside the table, else beside it."""
    folder = data if data.is_dir() else data.parent
    return folder / "images" if (folder / "images").is_dir() else folder


def list_images(image_dir: Path) -> list[str]:
    """Paths of all image files below a folder, relative to it, in order; hidden ones left out."""
    found: list[str] = []
    for where, folders, names in os.walk(image_dir):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(where).relative_to(image_dir).as_posix()
        start = "" if inside == "." else f"{inside}/"
        found += [
            start + name
            for name in sorted(names)
            if not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def locate_images(
    names: Sequence[str], image_dir: Path, *, source: str, must_exist: bool
) -> tuple[list[str], list[str]]:
    """Find the files that a table names, however it names them.

    A name may be the path below the image folder, begin with further folders, or be the bare name
    of a file in some sub-folder, with or without its ending, or the SOP instance UID in a DICOM
    header. What is not found stays as written.

    Parameters
    ----------
    names
        N names.
    image_dir
        The image folder.
    source
        The table and its column, for messages.
    must_exist
        Whether it is an error if none is found.

    Returns
    -------
    image_ids
        Paths relative to the folder, with ``/`` between folders.
    missing
        Names that were not found.

    Raises
    ------
    TableError
        None is found, though some must be; or a name fits two files.
    """
    plain = [_to_posix(name, image_dir) for name in names]
    sample = plain[:: max(1, len(plain) // _N_TRIED)]
    if all((image_dir / name).is_file() for name in sample):
        return plain, []
    if not image_dir.is_dir():
        raise TableError(f"{image_dir} is not a folder; give the one with the images.")
    files = list_images(image_dir)
    found = match_paths(plain, files, source)
    if None in found and all(_UID.fullmatch(name) for name in plain[:_N_TRIED]):
        instances = find_instances(image_dir)
        found = [file or instances.get(name) for name, file in zip(plain, found, strict=True)]
    missing = [name for name, file in zip(plain, found, strict=True) if file is None]
    if len(missing) == len(plain):
        if not must_exist:
            return plain, missing
        tried = ", ".join(str(image_dir / name) for name in plain[:3])
        raise TableError(
            f"{source}: no image was found under any recognised column; {image_dir} holds "
            f"{count(len(files), 'image file')}, and the first paths tried are {tried}. Name the "
            "column with --image-column, or the folder with --image-dir."
        )
    return [
        name if file is None else file for name, file in zip(plain, found, strict=True)
    ], missing


def _to_posix(name: str, image_dir: Path) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() and path.is_relative_to(image_dir.absolute().as_posix()):
        path = path.relative_to(image_dir.absolute().as_posix())
    return path.as_posix()


def match_paths(names: Sequence[str], files: Sequence[str], source: str) -> list[str | None]:
    """The file of each name: of that path, else of a path that ends as it does, or the other way.

    Two paths that only end alike are two images: ``patient1/a.png`` is not ``patient2/a.png``.
    """
    known = set(files)
    by_tail: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        for tail in {path.name, path.stem}:
            by_tail.setdefault(tail, []).append(file)
    found: list[str | None] = []
    for name in names:
        path = PurePosixPath(name)
        choice = name if name in known else None
        if choice is None:
            ranked = [
                (_n_shared(path, PurePosixPath(file)), file) for file in by_tail.get(path.name, ())
            ]
            best = max((n for n, _ in ranked), default=0)
            fits = [file for n, file in ranked if n and n == best]
            if len(fits) > 1:
                raise TableError(
                    f"{source}: {name!r} may be {fits[0]!r} or {fits[1]!r}. Write the path into "
                    "the table, or give a folder that holds one of them."
                )
            choice = fits[0] if fits else None
        found.append(choice)
    return found


def _n_shared(name: PurePosixPath, file: PurePosixPath) -> int:
    """Parts of the shorter path if the longer one ends with it, else 0; names are known to fit."""
    n_parts = min(len(name.parts), len(file.parts))
    return n_parts if name.parts[-n_parts:-1] == file.parts[-n_parts:-1] else 0


def find_by_id(ids: Sequence[str], files: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """Find the files that belong to studies or patients: one of a path's parts is the id.

    Returns
    -------
    image_ids
        The files that belong to one.
    rows
        The place of its id, for each of them.
    """
    place_of = {id_: place for place, id_ in enumerate(ids) if id_}
    image_ids: list[str] = []
    rows: list[Any] = []
    for file in files:
        path = PurePosixPath(file)
        for part in (path.stem, path.name, *reversed(path.parts[:-1])):
            if part in place_of:
                image_ids.append(file)
                rows.append(place_of[part])
                break
    return image_ids, np.array(rows, np.intp)
