"""NIH ChestX-ray14: one table with a list of findings per image, and the official split lists."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_csv
from cxr_cache.datasets.collections.listing import Listing, code_lists, take_columns
from cxr_cache.datasets.collections.places import find_beside, locate_images
from cxr_cache.errors import TableError

FINDINGS: Final = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)
"""The 14 findings, in the order of the paper (Wang et al. 2017)."""
_COLUMNS: Final = {
    "Image Index": "image_id",
    "Patient ID": "patient_id",
    "View Position": "view_position",
    "Patient Gender": "sex",
    "Patient Age": "age",
}
_LISTS: Final = {"train": "*train_val_list.txt*", "test": "*test_list.txt*"}


def list_nih(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``Data_Entry_2017.csv``, or its edition of 2020, and the split lists that lie beside it.

    Two of the headers hold a comma, and so make two columns each; nothing needs those. The
    follow-up number counts a patient's images.
    """
    table = read_csv(tables[0])
    codes, unknown = code_lists(
        table["Finding Labels"], (*FINDINGS, "No Finding"), lambda cell: cell.split("|")
    )
    images = take_columns(table, _COLUMNS)
    lists = {side: find_beside(path, pattern) for side, pattern in _LISTS.items()}
    return Listing(
        images.assign(
            image_id=locate_images(images["image_id"].tolist(), image_dir),
            study_uid=(table["Patient ID"] + "_" + table["Follow-up #"]).to_numpy(object),
            given_split=_read_split(images["image_id"], lists),
        ),
        codes,
        files=(tables[0], *(file for files in lists.values() for file in files)),
        usual=FINDINGS,
        split="the official lists of NIH ChestX-ray14" if any(lists.values()) else "",
        notes=(),
    )


def _read_split(names: pd.Series[str], lists: dict[str, list[Path]]) -> list[str]:
    """Side of each image by the list that has it; with one list, the others are the other side."""
    sides = {}
    for side, files in lists.items():
        for file in files:
            opened = gzip.open(file, "rt") if file.suffix == ".gz" else file.open()
            with opened as lines:
                sides[side] = names.isin({line.strip() for line in lines}).to_numpy()
    if not sides:
        return [""] * len(names)
    train = sides["train"] if "train" in sides else ~sides["test"]
    test = sides["test"] if "test" in sides else ~sides["train"]
    if (train & test).any():
        twice = names.iloc[int((train & test).argmax())]
        raise TableError(
            f"{lists['train'][0]} and {lists['test'][0]} both list image {twice!r}; take the "
            "official lists, which share none."
        )
    return np.select([train, test], ["train", "test"], "").tolist()
