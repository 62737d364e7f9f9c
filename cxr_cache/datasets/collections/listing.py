"""What the tables of a published data set say, in one form, and the choices that are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import hash_file, require_columns, require_unique
from cxr_cache.common.wording import count
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.codes import (
    BLANK,
    Policy,
    apply_policy,
    combine_rows,
    count_codes,
    pick_findings,
    read_codes,
)
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.collections.places import place_images
from cxr_cache.datasets.columns import OPTIONS, read_ages, read_sexes, read_views
from cxr_cache.datasets.flow import count_dropped
from cxr_cache.errors import ConfigError

CHEXPERT_FINDINGS: Final = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
"""The 14 observations of CheXpert's labeller, which MIMIC-CXR-JPG and BRAX took over."""
CHEXPERT_POLICY: Final = Policy(uncertain="ignore", blank="zeros")
"""Blank is negative in CheXpert's paper, which leaves the uncertain out or tries both (U-Ignore,
U-Zeros, U-Ones)."""
CHEXPERT_NOTE: Final = (
    "The labeller writes No Finding as 1 or leaves it blank, never 0; with --blank ignore it has "
    "positives only."
)
_OTHER_NAMES: Final = {"Airspace Opacity": "Lung Opacity"}
"""What radiologists' test labels of CheXpert and MIMIC-CXR-JPG call the same observation."""


@dataclass(frozen=True)
class Listing:
    """Rows of images with what is known of each, and each finding as it was coded.

    Attributes
    ----------
    images
        Columns of the image table, cells as written, index 0 to N - 1. An image that several
        readers labelled may have a row for each, where `several_readers` says so.
    findings, codes
        F names, and the codes of :mod:`cxr_cache.datasets.codes`, ``(N, F)``.
    files
        The files that were read.
    usual
        The findings that are taken unless others are named; None takes all.
    unlabelled
        Rows of which the tables say nothing, whatever is made of a blank cell; ``(N,)``.
    policy
        What the authors make of uncertain and blank cells.
    n_rows
        Rows of the table, where an image may have several that are one here, such as boxes.
    columns
        What columns of the tables were used as.
    split
        Whose split the column ``given_split`` has.
    notes
        Whole sentences for whoever uses the data set.
    """

    images: pd.DataFrame
    findings: tuple[str, ...]
    codes: NDArray[np.int8]
    files: tuple[Path, ...] = ()
    usual: tuple[str, ...] | None = None
    unlabelled: NDArray[np.bool_] | None = None
    policy: Policy = field(default_factory=Policy)
    several_readers: bool = False
    n_rows: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    notes: tuple[str, ...] = ()


def take_columns(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """The columns of a table that `names` knows and the table has, under their new names."""
    taken: pd.DataFrame = pd.DataFrame(
        {new: table[old].to_numpy(object) for old, new in names.items() if old in table}
    )
    return taken


def look_up(table: pd.DataFrame, key: str, column: str, file: Path) -> pd.Series[str]:
    """A column of a table by another that names each row once.

    Raises
    ------
    TableError
        One of the columns is missing, or a row is named twice.
    """
    require_columns(table, (key, column), file)
    require_unique(table, key, file)
    found: pd.Series[str] = table.set_index(key)[column]
    return found


def say_columns(table: pd.DataFrame, *uses: Mapping[str, str]) -> dict[str, str]:
    """What each column of a table is used as, in words; the others are ignored."""
    used = {
        column: use.removesuffix("_id").removesuffix("_uid").replace("_", " ")
        for each in uses
        for column, use in each.items()
    }
    return {column: used.get(column, "ignored") for column in table.columns}


def read_chexpert_codes(table: pd.DataFrame, path: Path) -> NDArray[np.int8]:
    """Codes of the columns of CheXpert's labeller, ``(N, 14)``."""
    table = table.rename(columns=_OTHER_NAMES)
    require_columns(table, CHEXPERT_FINDINGS, path)
    return read_codes(table, CHEXPERT_FINDINGS, path)


def make_cohort(
    listing: Listing, form: str, path: Path, config: ReadConfig, image_dir: Path | None
) -> Cohort:
    """Take the findings that are wanted, make targets of their codes, and find the image files.

    Raises
    ------
    ConfigError
        A finding is not there, or an option names a column.
    TableError
        None of the images is in the folder that the user names.
    """
    _require_no_column(config, form)
    picked = pick_findings(listing.findings, config.findings or listing.usual)
    findings, codes = tuple(listing.findings[i] for i in picked), listing.codes[:, picked]
    policy = listing.policy.with_config(config, findings)
    targets = apply_policy(codes, findings, policy)
    if listing.unlabelled is not None:
        targets[listing.unlabelled] = np.nan
    images, is_coded = listing.images, (codes != BLANK).any(axis=1)
    if listing.several_readers:
        image_of, names = pd.factorize(images["image_id"])
        targets = combine_rows(targets, image_of, len(names), config.readers)
        is_coded = np.bincount(image_of, is_coded) > 0
        images = images[~images["image_id"].duplicated()]
    images, fact_notes = _tidy_facts(images)
    if not listing.split:
        images = images.drop(columns="given_split", errors="ignore")
    image_ids, image_notes = place_images(images["image_id"].tolist(), path, image_dir)
    images["image_id"] = pd.Series(image_ids, images.index, object)
    return Cohort(
        images,
        targets,
        findings,
        source={file.name: hash_file(file) for file in listing.files},
        reading=Reading(
            form,
            columns=dict(listing.columns),
            codes=count_codes(codes, findings),
            counts={
                "rows": listing.n_rows or len(listing.images),
                **count_dropped(images, targets, is_coded),
            },
            policy=policy.to_text() if findings else "",
            split=listing.split,
            notes=(*listing.notes, *fact_notes, *image_notes),
        ),
    )


def _require_no_column(config: ReadConfig, form: str) -> None:
    """A published data set has its own columns; an option that names another would be lost."""
    named = [name for name in OPTIONS.values() if getattr(config, name) is not None]
    if named:
        problem = f"is for --format table; --format {form} knows the columns of its tables"
        raise ConfigError(problems=[(name, problem) for name in named])


def _tidy_facts(images: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Views, sexes and ages as every reader gives them, and what is to be said of them."""
    tidy, notes = images.reset_index(drop=True), []
    if "view_position" in tidy:
        projections, tidy["view_position"] = read_views(tidy["view_position"])
        if "projection" not in tidy:
            tidy["projection"] = projections
    if "sex" in tidy:
        tidy["sex"] = read_sexes(tidy["sex"])
    if "age" in tidy:
        tidy["age"], n_impossible = read_ages(tidy["age"])
        if n_impossible:
            notes.append(f"{count(n_impossible, 'impossible age')} left blank.")
    return tidy, notes
