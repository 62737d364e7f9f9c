"""TAIX-Ray: severity in steps, of which one is doubtful, of bedside radiographs from Aachen."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from cxr_cache.common.tables import read_table, require_columns
from cxr_cache.datasets.codes import ABSENT, BLANK, PRESENT, UNCERTAIN
from cxr_cache.datasets.collections.listing import Listing, look_up, say_columns, take_columns
from cxr_cache.datasets.collections.places import find_beside
from cxr_cache.datasets.columns import read_splits
from cxr_cache.errors import TableError

FINDINGS: Final = (
    *("HeartSize", "PulmonaryCongestion", "PleuralEffusion_Right", "PleuralEffusion_Left"),
    *("PulmonaryOpacities_Right", "PulmonaryOpacities_Left", "Atelectasis_Right"),
    "Atelectasis_Left",
)
_STEPS: Final = {"": BLANK, "0": ABSENT, "1": UNCERTAIN, **dict.fromkeys("234", PRESENT)}
"""0 is none (a normal heart), 1 questionable (a borderline heart), and 2 to 4 are present."""
_COLUMNS: Final = {"UID": "study_uid", "PatientID": "patient_id", "Sex": "sex", "Age": "age"}


def list_taix_ray(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``annotation.csv``, and ``split.csv`` beside it; each image is a study of its own."""
    table = read_table(tables[0])
    require_columns(table, FINDINGS, tables[0])
    steps = table[list(FINDINGS)].apply(lambda cells: cells.str.removesuffix(".0"))
    strange = ~steps.isin(list(_STEPS)).to_numpy()
    if strange.any():
        row, column = np.argwhere(strange)[0]
        raise TableError(
            f"{tables[0]}, line {table.index[row]}: {FINDINGS[column]} is "
            f"{table[FINDINGS[column]].iloc[row]!r}, but its steps are 0 to 4."
        )
    images = take_columns(table, _COLUMNS)
    splits = [] if "Split" in table else find_beside(path, "*split.csv*")
    if "Split" in table:
        images["given_split"] = read_splits(table["Split"], tables[0])
    for file in splits[:1]:
        sides = look_up(read_table(file), "UID", "Split", file)
        images["given_split"] = read_splits(sides.reindex(table["UID"]).fillna(""), file)
    return Listing(
        images.assign(image_id=[f"data/{name}.png" for name in table["UID"]]),
        FINDINGS,
        np.column_stack([steps[name].map(_STEPS) for name in FINDINGS]).astype(np.int8),
        files=(tables[0], *splits[:1]),
        split="TAIX-Ray's official split" if "given_split" in images else "",
        columns=say_columns(table, _COLUMNS, {"UID": "image"}, dict.fromkeys(FINDINGS, "finding")),
        notes=(
            "Steps 2 to 4 are present; the step questionable (of the heart: borderline) is "
            "uncertain.",
        ),
    )
