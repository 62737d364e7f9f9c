"""PadChest: a list of findings per image, as Python writes lists, in one table."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pandas as pd

from cxr_cache.common.tables import read_csv
from cxr_cache.datasets.collections.listing import Listing, code_lists, take_columns
from cxr_cache.datasets.collections.places import locate_images
from cxr_cache.errors import TableError

REMARKS: Final = ("exclude", "suboptimal study")
"""Labels that tell of an image that it is no basis for findings."""
_COLUMNS: Final = {
    "PatientID": "patient_id",
    "StudyID": "study_uid",
    "PatientSex_DICOM": "sex",
    "Projection": "view_position",
}


def list_padchest(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read PadChest's table; its findings are all labels that occur, the most frequent first.

    Blanks around a label are no part of it. An image with one of :data:`REMARKS` is unlabelled.
    """
    table = read_csv(tables[0])
    cells = table["Labels"].replace("nan", "")
    lists = {cell: _parse_list(cell, tables[0]) for cell in cells.unique()}
    counts = cells.map(lists).explode().value_counts()
    findings = [name for name in counts.index if name not in REMARKS]
    codes, remarks = code_lists(cells, findings, lists.__getitem__)
    unusable = cells.map(lambda cell: not lists[cell].isdisjoint(REMARKS)).to_numpy()
    birth = pd.to_numeric(table["PatientBirth"], errors="coerce")
    age = pd.to_numeric(table["StudyDate_DICOM"].str[:4], errors="coerce") - birth
    written = (table["ImageDir"] + "/" + table["ImageID"]).tolist()
    of_remarks = " and ".join(f"{name} ({n:,})" for name, n in remarks.items())
    return Listing(
        take_columns(table, _COLUMNS).assign(
            image_id=locate_images(written, image_dir), age=age.to_numpy()
        ),
        codes,
        files=(tables[0],),
        unlabelled=unusable,
        notes=(f"Images are unlabelled that are marked {of_remarks}.",) if remarks else (),
    )


def _parse_list(cell: str, source: Path) -> frozenset[str]:
    if not cell:
        return frozenset()
    try:
        names = ast.literal_eval(cell)
    except (SyntaxError, ValueError) as error:
        raise TableError(
            f"{source}: the cell {cell[:60]!r} of Labels is no list of names, such as "
            "['cardiomegaly', 'pneumonia']."
        ) from error
    return frozenset(str(name).strip().lower() for name in names) - {""}
