"""PadChest: a list of findings per image, as Python writes lists, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_table, require_columns
from cxr_cache.datasets.codes import PRESENT, read_lists
from cxr_cache.datasets.collections.listing import Listing, say_columns, take_columns

REMARKS: Final = ("exclude", "suboptimal study")
"""Labels that tell of an image that it is no basis for findings."""
_COLUMNS: Final = {
    "PatientID": "patient_id",
    "StudyID": "study_uid",
    "PatientSex_DICOM": "sex",
    "Projection": "view_position",
}


def list_padchest(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read PadChest's table; its findings are all labels that occur.

    Blanks around a label are no part of it. An image with one of :data:`REMARKS` is unlabelled.
    """
    table = read_table(tables[0])
    require_columns(table, (*_COLUMNS, "PatientBirth", "StudyDate_DICOM"), tables[0])
    cells = table["Labels"].replace("nan", "")
    names, codes = read_lists(cells, tables[0], separator=",")
    unusable = {name: codes[:, names.index(name)] == PRESENT for name in REMARKS if name in names}
    birth = pd.to_numeric(table["PatientBirth"], errors="coerce")
    age = pd.to_numeric(table["StudyDate_DICOM"].str[:4], errors="coerce") - birth
    remarks = " or ".join(f"{name!r} ({int(rows.sum()):,})" for name, rows in unusable.items())
    return Listing(
        take_columns(table, _COLUMNS).assign(
            image_id=(table["ImageDir"] + "/" + table["ImageID"]).to_numpy(object),
            age=["" if np.isnan(years) else f"{years:.0f}" for years in age],
        ),
        names,
        codes,
        files=(tables[0],),
        usual=tuple(name for name in names if name not in REMARKS),
        unlabelled=np.any([*unusable.values()], axis=0) if unusable else None,
        columns=say_columns(
            table,
            {"ImageDir": "folder of the image", "ImageID": "image", "Labels": "findings"},
            {"PatientBirth": "age", "StudyDate_DICOM": "age"},
            _COLUMNS,
        ),
        notes=(f"Images that are marked {remarks} are unlabelled.",) if unusable else (),
    )
