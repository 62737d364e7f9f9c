"""Which published data sets are known, and by which files and columns one is recognised."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import pandas as pd

from cxr_cache.common.wording import list_names
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.collections import (
    chexpert,
    folders,
    kaggle,
    mimic,
    nih,
    openi,
    padchest,
    taix_ray,
    vindr,
)
from cxr_cache.datasets.collections.listing import Listing, make_cohort
from cxr_cache.datasets.collections.places import list_tables, peek
from cxr_cache.errors import TableError

List: TypeAlias = Callable[[list[Path], Path, Path | None], Listing]
"""Takes the tables that were recognised, the path that the user gave, and the image folder."""
Reader: TypeAlias = Callable[[Path, ReadConfig, Path | None], Cohort]


@dataclass(frozen=True)
class Form:
    """One form in which a data set is published."""

    format: str
    title: str
    columns: tuple[str, ...]
    """Columns that a table of it has, and tables of other data sets have not."""
    read: List
    n_tables: int = 1
    """How many such tables it may have."""
    first_cell: str = ""
    """Pattern of the first of those columns, where the columns alone are too common."""


FORMS: Final = (
    Form("nih", "NIH ChestX-ray14", ("Image Index", "Finding Labels"), nih.list_nih),
    Form(
        "chexpert",
        "CheXpert",
        ("Path", "Pleural Effusion", "No Finding"),
        chexpert.list_chexpert,
        n_tables=3,
        first_cell=chexpert.PATH,
    ),
    Form(
        "chexpert-plus",
        "CheXpert Plus",
        ("path_to_image", "deid_patient_id"),
        chexpert.list_chexpert_plus,
    ),
    Form(
        "mimic-cxr-jpg",
        "MIMIC-CXR-JPG",
        ("dicom_id", "subject_id", "study_id"),
        mimic.list_mimic,
        n_tables=2,
    ),
    Form("padchest", "PadChest", ("ImageID", "ImageDir", "Labels"), padchest.list_padchest),
    Form(
        "vindr",
        "VinDr-CXR",
        ("image_id", "Aortic enlargement", "Nodule/Mass"),
        vindr.list_vindr,
        n_tables=2,
    ),
    Form(
        "vindr",
        "VinDr-CXR as VinBigData",
        ("image_id", "class_name", "class_id", "rad_id"),
        vindr.list_vinbigdata,
    ),
    Form("brax", "BRAX", ("PngPath", "AccessionNumber", "No Finding"), chexpert.list_brax),
    Form("rsna", "RSNA Pneumonia", ("patientId", "Target"), kaggle.list_rsna),
    Form("siim", "SIIM-ACR Pneumothorax", ("ImageId", "EncodedPixels"), kaggle.list_siim),
    Form(
        "taix-ray", "TAIX-Ray", ("UID", "HeartSize", "PulmonaryCongestion"), taix_ray.list_taix_ray
    ),
)
"""Published data sets that have tables; a new one is a line here and a function."""


@dataclass(frozen=True)
class Found:
    """A form that a data set has, and the tables that show it."""

    form: Form
    tables: tuple[Path, ...]

    @property
    def why(self) -> str:
        """Why it is taken for that, in a sentence."""
        columns = list_names([repr(name) for name in self.form.columns])
        names = list_names([file.name for file in self.tables], 3)
        return f"{names}: the columns {columns} are those of {self.form.title}."


def find_forms(path: Path) -> list[Found]:
    """The forms of :data:`FORMS` that tables at `path` have."""
    heads = {file: peek(file) for file in list_tables(path)}
    found = [
        Found(form, tuple(file for file, head in heads.items() if _fits(form, head)))
        for form in FORMS
    ]
    return [each for each in found if each.tables]


def _fits(form: Form, head: pd.DataFrame) -> bool:
    if not set(form.columns) <= set(head.columns):
        return False
    first = "" if head.empty else str(head[form.columns[0]].iloc[0])
    return not form.first_cell or re.search(form.first_cell, first) is not None


def read_collection(
    path: Path,
    config: ReadConfig,
    image_dir: Path | None,
    *,
    format: str,  # noqa: A002
) -> Cohort:
    """Read a published data set in one of its forms.

    Raises
    ------
    TableError
        No table there is of that data set, or more of them than it has.
    """
    found = next((each for each in find_forms(path) if each.form.format == format), None)
    if found is None:
        forms = [form for form in FORMS if form.format == format]
        wanted = " or ".join(list_names(form.columns) for form in forms)
        names = [file.name for file in list_tables(path)]
        raise TableError(
            f"{path} holds no table of {forms[0].title}, which has the columns {wanted}; tables "
            f"there: {list_names(names, 5) if names else 'none'}."
        )
    if len(found.tables) > found.form.n_tables:
        listed = list_names([file.name for file in found.tables])
        raise TableError(
            f"{path} holds {len(found.tables)} tables of {found.form.title}: {listed}. They may "
            f"contradict each other; give the one that is meant, such as --data {found.tables[0]}."
        )
    listing = found.form.read(list(found.tables), path, image_dir)
    return make_cohort(listing, format, path, config, image_dir)


def _reader(name: str, read: List | None = None) -> Reader:
    """The reader of a format: by its tables, or by a function that looks for other files."""
    if read is None:
        return partial(read_collection, format=name)
    return lambda path, config, image_dir: make_cohort(
        read([], path, image_dir), name, path, config, image_dir
    )


READERS: Final[dict[str, Reader]] = {
    **{form.format: _reader(form.format) for form in FORMS},
    "openi": _reader("openi", openi.list_openi),
    "classes": _reader("classes", folders.list_classes),
    "images": _reader("images", folders.list_images),
}
"""Readers of published data sets and of folders of images, by the name of their format."""
