"""Folders without a table: images in class folders, and images alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.datasets.collections.listing import Listing
from cxr_cache.datasets.columns import SPLIT_WORDS
from cxr_cache.datasets.locate import list_images as list_files
from cxr_cache.errors import TableError

_NORMAL: Final = frozenset({"normal", "healthy", "negative", "no finding", "nofinding", "normals"})
"""Class folders of images on which nothing was found; they are no finding of their own."""
_MOST_CLASSES: Final = 50
_BESIDE: Final = frozenset({"mask", "masks", "segmentation", "segmentations"})
_BETWEEN: Final = frozenset({"image", "images", "img", "png", "jpg", "jpeg", "dicom"})
_NO_CLASS: Final = re.compile(
    r"(images?|img|png|jpe?g|dicom|dcm|part|batch|p|patient|s|study|series|folder|[\d.]*)"
    r"[-_ ]?\d*"
)
"""Folders that only hold images, as images_001 or patient00001 do."""


@dataclass(frozen=True)
class NameRule:
    """What the names of a data set's files tell, as groups ``patient_id`` and ``present``."""

    title: str
    pattern: re.Pattern[str]
    finding: str = ""
    """What ``present`` (0 or 1) is about."""
    note: str = ""


NAME_RULES: Final = (
    NameRule(
        "the paediatric pneumonia set on Kaggle",
        re.compile(r"(?:NORMAL2-)?(?P<patient_id>person\d+|IM-\d+)[-_].*\d+"),
        note="The person in the name of a file is the patient; the set's own split has some "
        "patients on both sides.",
    ),
    NameRule(
        "the tuberculosis sets of Shenzhen and Montgomery",
        re.compile(r"(?P<patient_id>(?:CHN|MCU)CXR_\d+)_(?P<present>[01])"),
        finding="Tuberculosis",
    ),
    NameRule(
        "the COVID-19 Radiography Database",
        re.compile(r"(?:COVID|Lung_Opacity|Normal|Viral Pneumonia)-\d+"),
        note="Each class comes from other hospitals than the others, so a model may tell the "
        "source of an image instead of the disease.",
    ),
)


def parse_class_folders(paths: Sequence[str]) -> pd.DataFrame | None:
    """Side of a split and class of each image, where its folders tell; None where they do not.

    Folders are ``class/``, ``train/class/`` or ``class/images/``, below any that all images share.
    """
    parts = [
        [p for p in PurePosixPath(path).parts[:-1] if p.lower() not in _BETWEEN] for path in paths
    ]
    while all(parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    sides = [SPLIT_WORDS.get(p[0].lower(), "") if p else "" for p in parts]
    if all(sides):
        parts = [p[1:] for p in parts]
    if not all(len(p) == 1 for p in parts) or len({p[0] for p in parts}) < 2:
        return None
    given = sides if all(sides) else ""
    table: pd.DataFrame = pd.DataFrame(
        {"image_id": paths, "given_split": given, "class": [p[0] for p in parts]},
        dtype=object,  # text of Arrow cannot hold names that are not UTF-8
    )
    return table


def list_classes(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read a folder of class folders, with or without the folders of a split around them.

    An image has the finding that its folder is named after and none of the others; folders such as
    ``NORMAL`` are no finding.
    """
    paths = list_image_files(image_dir or path)
    images = parse_class_folders(paths)
    if images is None:
        raise TableError(
            f"{path} holds no class folders, which look like train/NORMAL/1.png and "
            "train/PNEUMONIA/2.png, or the same without train. Its first image is "
            f"{paths[0] if paths else 'nowhere'}."
        )
    of_class = images.pop("class")
    findings = [name for name in sorted(of_class.unique()) if not _is_normal(name)]
    given = images["given_split"].any()
    rule, named = match_names(paths)
    return Listing(
        images.assign(study_uid=images["image_id"], **named),
        tuple(findings),
        (of_class.to_numpy(object)[:, None] == np.array(findings, object)).astype(np.int8),
        split="the folders of the data set" if given else "",
        notes=(rule.note,) if rule and rule.note else (),
    )


def list_images(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read a folder of images alone; findings only where a rule for names tells them."""
    paths = list_image_files(image_dir or path)
    if not paths:
        raise TableError(f"{image_dir or path} holds no image.")
    rule, named = match_names(paths)
    findings = (rule.finding,) if rule and rule.finding else ()
    codes = np.array(named.pop("present", []), np.int8).reshape(len(paths), len(findings))
    return Listing(
        pd.DataFrame({"image_id": paths, "study_uid": paths, **named}, dtype=object),
        findings,
        codes,
        notes=(rule.note,) if rule and rule.note else (),
    )


def looks_like_classes(images: pd.DataFrame) -> bool:
    """Whether folders are named like classes, and not only like places for images."""
    names = images["class"].unique()
    named = [name for name in names if not _NO_CLASS.fullmatch(name.lower())]
    return len(named) == len(names) <= _MOST_CLASSES


def list_image_files(folder: Path) -> list[str]:
    """Images below a folder, without those in folders of masks."""
    if not folder.is_dir():
        raise TableError(f"{folder} is not a folder; give the one with the images.")
    return [
        path
        for path in list_files(folder)
        if _BESIDE.isdisjoint(part.lower() for part in PurePosixPath(path).parts[:-1])
    ]


def match_names(paths: Sequence[str]) -> tuple[NameRule | None, dict[str, list[str]]]:
    """The rule that all names of the files follow, and what it tells of each image."""
    stems = [PurePosixPath(path).stem for path in paths]
    for rule in NAME_RULES:
        found = [rule.pattern.fullmatch(stem) for stem in stems]
        if all(found):
            told = [match.groupdict() for match in found if match]
            named = {key: [of[key] for of in told] for key in rule.pattern.groupindex}
            return rule, named
    return None, {}


def _is_normal(name: str) -> bool:
    return name.lower().replace("_", " ") in _NORMAL
