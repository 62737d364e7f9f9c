"""What a data set is, by its files and columns."""

from __future__ import annotations

from pathlib import Path

from cxr_cache.common.tables import TABLE_SUFFIXES
from cxr_cache.common.wording import list_names
from cxr_cache.datasets.collections.catalogue import find_forms
from cxr_cache.datasets.collections.folders import (
    list_image_files,
    looks_like_classes,
    parse_class_folders,
)
from cxr_cache.datasets.collections.openi import find_reports
from cxr_cache.datasets.collections.places import list_tables, peek
from cxr_cache.datasets.dicom.folder import holds_dicom
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
    if not path.exists() and not path.name.lower().endswith(TABLE_SUFFIXES):
        raise TableError(
            f"{path} is not a folder, and no table either; give the folder of a data set, a table "
            f"({', '.join(TABLE_SUFFIXES)}) or a folder of images."
        )
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
    if tables := list_tables(path):
        names = list_names([file.name for file in tables], 3)
        return "table", f"{names} is of no published data set that is known here."
    images = list_image_files(path)
    if not images and holds_dicom(path):
        return "dicom", "the folder holds DICOM files, whose names have no ending."
    if not images:
        raise TableError(
            f"{path} holds neither a table ({', '.join(TABLE_SUFFIXES)}) nor an image. Give the "
            "folder of a data set, or name its form with --format."
        )
    if all(name.lower().endswith((".dcm", ".dicom")) for name in images):
        return "dicom", "the folder holds DICOM files and no table."
    folders = parse_class_folders(images)
    if folders is not None and looks_like_classes(folders):
        names = list_names(sorted(folders["class"].unique()), 5)
        return "classes", f"there is no table, and the images lie in folders named {names}."
    return "images", "there are images, and neither a table nor class folders."


def _recognise_published(path: Path) -> dict[str, str]:
    """Formats whose files are there, and why."""
    known = {found.form.format: found.why for found in find_forms(path)}
    if path.is_dir():
        names = [f for kind in ("reports", "projections") for f in path.glob(f"*{kind}*.csv")]
        indiana = [f for f in names if f.name.startswith("indiana_") or "uid" in peek(f)]
        if indiana:
            listed = list_names([file.name for file in sorted(indiana)])
            known["indiana"] = f"it holds {listed}."
        if reports := find_reports(path):
            known["openi"] = f"{reports[0].parent} holds reports in XML, as Open-i's original does."
    return known
