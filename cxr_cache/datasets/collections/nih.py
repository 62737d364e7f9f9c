"""NIH ChestX-ray14: one table with a list of findings per image, and the official split lists."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_table, read_words, require_columns
from cxr_cache.common.wording import list_names
from cxr_cache.datasets.codes import read_lists
from cxr_cache.datasets.collections.listing import Listing, say_columns, take_columns
from cxr_cache.datasets.collections.places import find_beside
from cxr_cache.errors import TableError

FINDINGS: Final = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)
"""The 14 findings, in the order of the paper (Wang et al. 2017)."""
NO_FINDING: Final = "No Finding"
_COLUMNS: Final = {
    "Image Index": "image_id",
    "Patient ID": "patient_id",
    "View Position": "view_position",
    "Patient Gender": "sex",
    "Patient Age": "age",
}
_FURTHER: Final = {"Finding Labels": "findings", "Follow-up #": "study"}
_LISTS: Final = {"train": "*train_val_list.txt*", "test": "*test_list.txt*"}


def list_nih(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``Data_Entry_2017.csv``, or its edition of 2020, and the split lists that lie beside it.

    Two of the headers hold a comma, and so make two columns each; nothing needs those. The
    follow-up number counts a patient's images.
    """
    table = read_table(tables[0])
    require_columns(table, (*_COLUMNS, *_FURTHER), tables[0])
    known = (*FINDINGS, NO_FINDING)
    findings, codes = read_lists(table["Finding Labels"], tables[0], findings=known, separator="|")
    listed = {name for cell in table["Finding Labels"].unique() for name in cell.split("|")}
    unknown = sorted(listed - {*known, ""})
    images = take_columns(table, _COLUMNS)
    lists = {side: find_beside(path, pattern) for side, pattern in _LISTS.items()}
    return Listing(
        images.assign(
            study_uid=(table["Patient ID"] + "_" + table["Follow-up #"]).to_numpy(object),
            given_split=_read_split(images["image_id"], lists),
        ),
        findings,
        codes,
        files=(tables[0], *(file for files in lists.values() for file in files)),
        usual=FINDINGS,
        split="the official lists of NIH ChestX-ray14" if any(lists.values()) else "",
        columns=say_columns(
            table, _COLUMNS, {"Finding Labels": "findings", "Follow-up #": "study"}
        ),
        notes=(f"Labels that are no finding here: {list_names(unknown)}.",) if unknown else (),
    )


def _read_split(names: pd.Series[str], lists: dict[str, list[Path]]) -> list[str]:
    """Side of each image by the list that has it; with one list, the others are the other side."""
    sides = {}
    for side, files in lists.items():
        for file in files:
            named = [PurePosixPath(word).name for word in read_words(file)]
            sides[side] = names.isin(named).to_numpy()
    if not sides:
        return [""] * len(names)
    if not any(listed.any() for listed in sides.values()):
        file = next(file for files in lists.values() for file in files)
        raise TableError(
            f"{file} lists none of the table's images, of which the first is {names.iloc[0]!r}. "
            "Put the lists of these images beside the table, or take the lists away."
        )
    train = sides["train"] if "train" in sides else ~sides["test"]
    test = sides["test"] if "test" in sides else ~sides["train"]
    if (train & test).any():
        twice = names.iloc[int((train & test).argmax())]
        raise TableError(
            f"{lists['train'][0]} and {lists['test'][0]} both list image {twice!r}; take the "
            "official lists, which share none."
        )
    return [str(side) for side in np.select([train, test], ["train", "test"], "")]
