"""TAIX-Ray: severity in steps, of which one is doubtful, of bedside radiographs from Aachen."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_csv
from cxr_cache.datasets.collections.listing import Listing, take_columns
from cxr_cache.datasets.collections.places import find_beside, locate_images
from cxr_cache.errors import TableError

FINDINGS: Final = (
    *("HeartSize", "PulmonaryCongestion", "PleuralEffusion_Right", "PleuralEffusion_Left"),
    *("PulmonaryOpacities_Right", "PulmonaryOpacities_Left", "Atelectasis_Right"),
    "Atelectasis_Left",
)
_STEPS: Final = {"": np.nan, "0": 0, "1": -1, "2": 1, "3": 1, "4": 1}
"""0 is none (a normal heart), 1 questionable (a borderline heart), and 2 to 4 are present."""
_COLUMNS: Final = {"UID": "study_uid", "PatientID": "patient_id", "Sex": "sex", "Age": "age"}


def list_taix_ray(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``annotation.csv``, and ``split.csv`` beside it; each image is a study of its own."""
    table = read_csv(tables[0])
    codes = {}
    for finding in FINDINGS:
        steps = table[finding].str.removesuffix(".0")
        if not steps.isin(list(_STEPS)).all():
            row = int((~steps.isin(list(_STEPS))).to_numpy().argmax())
            raise TableError(
                f"{tables[0]}, line {table.index[row]}: {finding} is {steps.iloc[row]!r}, but its "
                "steps are 0 to 4."
            )
        codes[finding] = steps.map(_STEPS).to_numpy(np.float32)
    splits = find_beside(path, "*split.csv*")
    images = take_columns(table, _COLUMNS)
    if "Split" in table or splits:
        of_images = table if "Split" in table else read_csv(splits[0])
        split = of_images.set_index("UID")["Split"].str.lower()
        images["given_split"] = split.reindex(table["UID"]).fillna("").to_numpy(object)
    written = [f"data/{name}.png" for name in table["UID"]]
    return Listing(
        images.assign(image_id=locate_images(written, image_dir)),
        pd.DataFrame(codes),
        files=(tables[0], *(() if "Split" in table else splits[:1])),
        split="TAIX-Ray's official split" if "given_split" in images else "",
        notes=(
            "Steps 2 to 4 are present; the step questionable (of the heart: borderline) is "
            "uncertain.",
        ),
    )
