"""What a data set is, by its files and columns."""

from __future__ import annotations

from pathlib import Path

from cxr_cache.common.wording import list_names
from cxr_cache.datasets.collections.catalogue import find_forms
from cxr_cache.datasets.collections.folders import (
    list_image_files,
    looks_like_classes,
    parse_class_folders,
)
from cxr_cache.datasets.collections.openi import find_reports
from cxr_cache.datasets.collections.places import list_tables
from cxr_cache.errors import ConfigError, TableError


def recognise(path: Path) -> tuple[str, str]:
    """The format of the data set at `path`, and why it is taken for that, in a sentence.

    Published data sets come first, then a single table, then folders of images.

    Raises
    ------
    ConfigError
        The files are those of two data sets.
    TableError
        They are of none.
    """
    if not path.exists():
        raise TableError(f"{path} is not there; give a folder of a data set or a table.")
    known = _recognise_published(path)
    if len(known) > 1:
        (one, why), (other, why_other), *_ = known.items()
        raise ConfigError(
            f"{path} holds files of two data sets: {one} ({why.rstrip('.')}) and {other} "
            f"({why_other.rstrip('.')}). Say which is meant with --format {one} or --format "
            f"{other}, or give its table as --data."
        )
    if known:
        return next(iter(known.items()))
    tables = list_tables(path)
    if len(tables) == 1:
        return "table", f"{tables[0].name} is the only table, and of no published data set."
    if path.is_dir() and (images := list_image_files(path)):
        if all(name.lower().endswith((".dcm", ".dicom")) for name in images):
            return "dicom", f"{path} holds DICOM files and no table of a known form."
        folders = parse_class_folders(images)
        if folders is not None and looks_like_classes(folders):
            names = list_names(sorted(folders["class"].unique()), 5)
            return "classes", f"the images lie in folders named {names}."
        if not tables:
            return "images", f"{path} holds images, and neither a table nor class folders."
    names = list_names([file.name for file in tables], 5) or "neither a table nor an image"
    raise TableError(
        f"{path} is of no known form; it holds {names}. Give the table that is meant as --data, "
        "or name the form with --format."
    )


def _recognise_published(path: Path) -> dict[str, str]:
    """Formats whose files are there, and why."""
    known = {found.form.format: found.why for found in find_forms(path)}
    if path.is_dir():
        indiana = [f for kind in ("reports", "projections") for f in path.glob(f"*{kind}*.csv")]
        if indiana:
            names = list_names([file.name for file in sorted(indiana)])
            known["indiana"] = f"{names}: files of these names are those of the Indiana collection."
        if reports := find_reports(path):
            known["openi"] = f"{reports[0].parent} holds reports in XML, as Open-i's original does."
    return known
