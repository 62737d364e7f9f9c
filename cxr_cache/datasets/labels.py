"""Label rules: what a report's tags or a user's label table say about each finding.

Targets are float32: 1 present, 0 absent, NaN unlabelled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import read_csv, require_columns, require_unique
from cxr_cache.common.wording import list_names, nearest_names, normalise_name
from cxr_cache.datasets.cohort import FACTS, IMAGE_COLUMNS, RESERVED_COLUMNS
from cxr_cache.errors import TableError

_DATA = files("cxr_cache.datasets") / "findings35.json"
_RULES = json.loads(_DATA.read_text("utf-8"))

FINDINGS: tuple[str, ...] = tuple(rule["finding"] for rule in _RULES["findings"])
"""The 35 findings of the Indiana collection, in the published order (by image count)."""

PUBLISHED_COUNTS: dict[str, int] = {rule["finding"]: rule["images"] for rule in _RULES["findings"]}
"""Images with each finding in the complete collection."""

PUBLISHED_IMAGES: int = _RULES["images"]
"""All images of the complete collection, 7,466."""

NORMAL = "Normal"

_COLUMNS_OF_TAG: dict[str, list[int]] = {}
for _column, _rule in enumerate(_RULES["findings"]):
    for _tag in _rule["tags"]:
        _COLUMNS_OF_TAG.setdefault(_tag, []).append(_column)

TABLE_VALUES: dict[str, float] = {
    **dict.fromkeys(("1", "1.0"), 1.0),
    **dict.fromkeys(("0", "0.0"), 0.0),
    **dict.fromkeys(("", "-1", "-1.0"), np.nan),  # CheXpert writes -1 where a report is uncertain
}
"""What a cell of a target table may hold, and the target that it stands for."""

DESCRIPTIVE_COLUMNS = frozenset({*IMAGE_COLUMNS, *FACTS, *RESERVED_COLUMNS, "filename", "uid"})
"""Columns of a target table that are never findings."""


def assign_targets(problems: Sequence[str]) -> NDArray[np.float32]:
    """Apply the 35-finding rule to cells of the ``Problems`` column.

    A cell is split on ``;``; each tag has its white space collapsed, is
    lower-cased and compared whole. A finding is present where one of its tags
    is; *Normal* where no other finding is, so it means "nothing mapped" and
    includes reports that were never indexed. A blank cell says nothing about
    the image and leaves it unlabelled.

    Parameters
    ----------
    problems
        N cells, as in ``"Cardiomegaly;Pulmonary Artery"``.

    Returns
    -------
    NDArray[np.float32]
        Targets, shape ``(N, 35)``, columns in the order of :data:`FINDINGS`.

    Examples
    --------
    >>> targets = assign_targets(["Cardiomegaly; Pulmonary  artery", "normal"])
    >>> [[FINDINGS[column] for column in row.nonzero()[0]] for row in targets]
    [['Cardiomegaly', 'Pulmonary Artery Enlargement'], ['Normal']]
    """
    targets = np.zeros((len(problems), len(FINDINGS)), np.float32)
    normal = FINDINGS.index(NORMAL)
    for row, cell in enumerate(problems):
        tags = _split_cell(cell)
        if tags:
            columns = [column for tag in tags for column in _COLUMNS_OF_TAG.get(tag, ())]
            targets[row, columns or [normal]] = 1
        else:
            targets[row] = np.nan
    return targets


def parse_labels(
    cells: Sequence[str],
    findings: Sequence[str] = FINDINGS,
    *,
    source: str = "the label column",
    lines: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Read cells that list the findings of an image, separated by ``;``.

    Case and white space do not matter. What a cell does not list is absent; a
    blank cell leaves its row unlabelled.

    Parameters
    ----------
    cells
        N cells, as in ``"Cardiomegaly; Edema"``.
    findings
        F names that may occur.
    source, lines
        File and line of each cell, for the error message; by default the cells
        are counted from 1.

    Returns
    -------
    NDArray[np.float32]
        Targets, shape ``(N, F)``.

    Raises
    ------
    TableError
        A cell names something that is not among `findings`.
    """
    column_of = {normalise_name(finding): column for column, finding in enumerate(findings)}
    targets = np.zeros((len(cells), len(findings)), np.float32)
    for row, cell in enumerate(cells):
        names = _split_cell(cell)
        unknown = [name for name in names if name not in column_of]
        if unknown:
            line = lines[row] if lines is not None else row + 1
            raise TableError(
                f"{source}, line {line}: unknown finding {unknown[0]!r}"
                f"{_suggest(unknown[0], findings)}. For findings of your own, give the table "
                "one column per finding (1, 0, or blank where unlabelled) instead of 'label'."
            )
        if names:
            targets[row, [column_of[name] for name in names]] = 1
        else:
            targets[row] = np.nan
    return targets


def parse_target_table(
    table: pd.DataFrame, *, source: str = "the target table"
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read a table with one column per finding.

    Every column is a finding unless its name is in :data:`DESCRIPTIVE_COLUMNS`.
    A cell holds 1 (present), 0 (absent), nothing (unlabelled) or -1
    (uncertain, read as unlabelled).

    Parameters
    ----------
    table
        Strings, one row per image; the index tells the lines of the file.
    source
        Name of the file, for the error message.

    Returns
    -------
    findings
        Names of the F finding columns, in the table's order.
    targets
        Shape ``(N, F)``, float32.

    Raises
    ------
    TableError
        There is no finding column, or a cell holds another value.
    """
    findings = tuple(column for column in table.columns if column not in DESCRIPTIVE_COLUMNS)
    if not findings:
        raise TableError(
            f"{source} has no finding: its columns are {list_names(list(table.columns))}. "
            "Add one column per finding (1, 0, or blank where unlabelled)."
        )
    targets = np.empty((len(table), len(findings)), np.float32)
    for column, finding in enumerate(findings):
        cells = table[finding].str.strip()
        unreadable = np.flatnonzero(~cells.isin(list(TABLE_VALUES)))
        if len(unreadable):
            row = unreadable[0]
            raise TableError(
                f"{source}, line {table.index[row]}: column {finding!r} holds {cells.iloc[row]!r}, "
                "but a finding is 1 (present), 0 (absent), -1 (uncertain) or blank (unlabelled)."
            )
        targets[:, column] = cells.map(TABLE_VALUES).to_numpy(np.float32)
    return findings, targets


def _split_cell(cell: str) -> set[str]:
    return {normalise_name(name) for name in cell.split(";")} - {""}


def _suggest(name: str, findings: Sequence[str]) -> str:
    nearest = nearest_names(name, findings)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def load_labels(
    path: str | Path, image_ids: NDArray[np.str_]
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read the targets of given images from a CSV file of the user's own.

    The file names images in a column ``image_id`` (or ``filename``). Findings
    are either listed in a column ``label``, separated by ``;``, or have a
    column each: 1 present, 0 absent, blank unlabelled, -1 uncertain (read as
    unlabelled). Images that the file does not name are unlabelled; rows for
    other images are ignored.

    Parameters
    ----------
    path
        CSV file, read by :func:`read_csv`.
    image_ids
        The images wanted, shape ``(N,)``.

    Returns
    -------
    findings
        F names.
    targets
        Shape ``(N, F)``, float32, rows in the order of `image_ids`.

    Raises
    ------
    TableError
        The file cannot be read so, or names none of the images.
    """
    path = Path(path)
    table = read_csv(path)
    key = "filename" if "filename" in table and "image_id" not in table else "image_id"
    require_columns(table, (key,), path)
    require_unique(table, key, path)
    if "label" in table:
        findings = FINDINGS
        targets = parse_labels(
            table["label"].tolist(), source=str(path), lines=table.index.tolist()
        )
    else:
        findings, targets = parse_target_table(table, source=str(path))
    rows = pd.Index(table[key]).get_indexer(pd.Index(image_ids))  # (N,), -1 where not named
    if (rows < 0).all():
        raise TableError(
            f"{path} names none of the {len(image_ids)} images: its first {key} is "
            f"{table[key].iloc[0]!r}, theirs {str(image_ids[0])!r}. "
            "Image ids are paths relative to the image folder."
        )
    return findings, take_or_nan(targets, rows)


def take_or_nan(targets: NDArray[np.float32], rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of `targets`, unlabelled where the row is -1."""
    unlabelled = np.full((1, targets.shape[1]), np.nan, np.float32)
    return np.asarray(np.concatenate([targets, unlabelled])[rows])  # -1 takes the last
