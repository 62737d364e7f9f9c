"""Where the tables and images of a published data set lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from cxr_cache.common.tables import TABLE_SUFFIXES, detect_separator
from cxr_cache.common.wording import count
from cxr_cache.datasets.locate import IMAGE_SUFFIXES, default_image_dir, locate_images

TABLE_FOLDERS: Final = ("", "annotations", "metadata", "CheXpert", "CheXpert_Labels")
"""Folders inside a data set in which its authors put tables; the first is the data set's own."""
_NO_TABLE: Final = ".metadata.xlsx"
"""COVID-19 Radiography has a list of file names beside each class."""


def list_tables(path: Path) -> list[Path]:
    """The tables at `path`: itself, or those of the folder and where authors put them in it."""
    if not path.is_dir():
        return [path]
    return [
        file
        for file in find_beside(path, "*")
        if file.name.lower().endswith(TABLE_SUFFIXES) and not file.name.endswith(_NO_TABLE)
    ]


def find_home(folder: Path) -> Path:
    """The folder itself, or the only one in it, which archives often unpack to."""
    inside = [entry for entry in folder.iterdir() if entry.name[0] != "."]
    while len(inside) == 1 and inside[0].is_dir():
        folder = inside[0]
        inside = [entry for entry in folder.iterdir() if entry.name[0] != "."]
    return folder


def find_beside(path: Path, *patterns: str) -> list[Path]:
    """Files of the data set at `path` (its folder, or one of its tables) whose names fit."""
    home = find_home(path) if path.is_dir() else path.parent
    found = {
        file
        for folder in TABLE_FOLDERS
        for pattern in patterns
        for file in (home / folder).glob(pattern)
        if file.is_file()
    }
    return sorted(found)


def peek(path: Path) -> pd.DataFrame:
    """The header and first row of a table, as text; empty where it cannot be read."""
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".xlsx":
            table = pd.read_excel(path, nrows=1, dtype=str)
        else:
            as_text: dict[str, Any] = {"nrows": 1, "dtype": str, "keep_default_na": False}
            as_text["encoding_errors"] = "replace"
            line = pd.read_csv(path, sep="\1", header=None, **as_text)
            table = pd.read_csv(path, sep=detect_separator(line.iloc[0, 0]), **as_text)
    except Exception:  # of any library; whoever reads the table whole says what is wrong
        table = pd.DataFrame()
    head: pd.DataFrame = table.rename(columns=lambda name: str(name).strip())
    return head


def place_images(
    written: Sequence[str], path: Path, image_dir: Path | None
) -> tuple[list[str], list[str]]:
    """Paths of the images below the image folder, and a note where some are not there.

    Copies of a data set keep names and lose endings: what is a DICOM file for its authors may be a
    PNG here. Where the user names no folder, the data set's own is looked into, and images need
    not be there; where nothing is found, names stay as written.
    """
    folder = image_dir or default_image_dir(path)
    if image_dir is None and not path.is_dir() and not (folder / written[0]).is_file():
        return list(written), []  # a table alone, as it is described
    source = f"{path} (images of the data set)"
    found, missing = locate_images(written, folder, source=source, must_exist=False)
    if len(missing) == len(written):
        bare = [_drop_ending(name) for name in written]
        must = image_dir is not None
        located, missing = locate_images(bare, folder, source=source, must_exist=must)
        found = found if len(missing) == len(written) else located
    if not missing or len(missing) == len(written):
        return found, []
    are = "is" if len(missing) == 1 else "are"
    return found, [
        f"{len(missing):,} of {count(len(written), 'image')} {are} not in {folder}; the first is "
        f"{missing[0]!r}."
    ]


def _drop_ending(name: str) -> str:
    root, dot, ending = name.rpartition(".")
    return root if f"{dot}{ending.lower()}" in IMAGE_SUFFIXES else name
