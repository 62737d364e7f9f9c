"""Label rules: what a report's tags or a user's label table say about each finding.

Targets are float32: 1 present, 0 absent, NaN unlabelled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import read_table, require_columns, require_unique
from cxr_cache.common.wording import count, list_names, nearest_names, normalise_name
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.codes import BLANK, NOT_SAID, Policy, count_codes, read_codes, try_codes
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.columns import (
    candidates,
    find_roles,
    is_unknown,
    note_patients,
    note_unread_patients,
)
from cxr_cache.datasets.dicom.pseudonyms import default_key_path, hash_id, load_key
from cxr_cache.datasets.flow import count_dropped
from cxr_cache.datasets.table import KEYS, NO_CODES, Sheet, collapse, read_sheet, whose_split
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

_TAGS_OF_NO_FINDING = frozenset(_RULES["tags_of_no_finding"])
"""Tags of the complete collection that the rule knows, and maps to nothing."""


def assign_targets(problems: Sequence[str]) -> NDArray[np.float32]:
    """Apply the 35-finding rule to cells of the ``Problems`` column.

    A cell is split on ``;``; each tag has its white space collapsed, is
    lower-cased and compared whole. A finding is present where one of its tags
    is; *Normal* where no other finding is, so it means "nothing mapped" and
    includes reports that were never indexed. A blank cell says nothing about
    the image and leaves it unlabelled; so does one in which nothing is mapped,
    ``normal`` is not said, and a tag is none of the collection's, see
    :func:`count_unknown_tags`.

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
        columns = [column for tag in tags for column in _COLUMNS_OF_TAG.get(tag, ())]
        is_normal = "normal" in tags or (tags and tags <= _TAGS_OF_NO_FINDING)
        if columns or is_normal:
            targets[row, columns or [normal]] = 1
        else:
            targets[row] = np.nan
    return targets


def count_unknown_tags(problems: Sequence[str]) -> Counter[str]:
    """Count the tags of the ``Problems`` column that the rule does not know, by cell.

    Examples
    --------
    >>> count_unknown_tags(["Cardiomegally; Scoliosis", "normal", "cardiomegally"])
    Counter({'cardiomegally': 2})
    """
    known = _COLUMNS_OF_TAG.keys() | _TAGS_OF_NO_FINDING
    return Counter(tag for cell in problems for tag in _split_cell(cell) if tag not in known)


def parse_labels(
    cells: Sequence[str],
    findings: Sequence[str] = FINDINGS,
    *,
    source: str = "the label column",
    lines: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Read cells that list the findings of an image, separated by ``;``.

    Case and white space do not matter. What a cell does not list is absent; a
    blank cell, or one of a word such as ``nan``, leaves its row unlabelled.

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
    distinct = {cell: place for place, cell in enumerate(dict.fromkeys(cells))}  # of few kinds
    targets = np.zeros((len(distinct), len(findings)), np.float32)
    for place, cell in enumerate(distinct):
        names = _split_cell(cell) - NOT_SAID
        unknown = [name for name in names if name not in column_of]
        if unknown:
            row = list(cells).index(cell)
            line = lines[row] if lines is not None else row + 1
            raise TableError(
                f"{source}, line {line}: unknown finding {unknown[0]!r}"
                f"{_suggest(unknown[0], findings)}. For findings of your own, give the table "
                "one column per finding (1, 0, or blank where unlabelled) instead of 'label'."
            )
        if names:
            targets[place, [column_of[name] for name in names]] = 1
        else:
            targets[place] = np.nan
    return targets[np.fromiter(map(distinct.__getitem__, cells), np.intp, len(cells))]


def _split_cell(cell: str) -> set[str]:
    return {normalise_name(name) for name in cell.split(";")} - {""}


def _suggest(name: str, findings: Sequence[str]) -> str:
    nearest = nearest_names(name, findings)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def load_labels(
    path: str | Path, image_ids: NDArray[np.str_], findings: Sequence[str] = FINDINGS
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read the targets of given images from a table of the user's own.

    Parameters
    ----------
    path
        Table, read as :func:`read_labels` does.
    image_ids
        The images wanted, shape ``(N,)``.
    findings
        What a column ``label`` may list.

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
    images = pd.DataFrame({"image_id": image_ids, "study_uid": image_ids})
    blank = np.full((len(images), len(findings)), np.nan, np.float32)
    labelled = read_labels(path, Cohort(images, blank, tuple(findings)))
    return labelled.findings, labelled.targets


def read_labels(path: str | Path, cohort: Cohort) -> Cohort:
    """Give images the labels of a table of the user's own, and what else it says of them.

    The table has a row per image, study or patient, and its columns are recognised as those of a
    data set: see :mod:`cxr_cache.datasets.columns`. Findings have a column each, or one lists
    them; a column ``label`` lists those of the cohort, or of the 35, separated by ``;``. Images
    that the table does not name are unlabelled; rows for other images are ignored. Patients, given
    splits and folds, and facts such as sex count where the cohort has none.

    Parameters
    ----------
    path
        Table, read by :func:`cxr_cache.common.tables.read_table`.
    cohort
        The images.

    Returns
    -------
    Cohort
        The same images; its ``reading`` tells how the table was understood.

    Raises
    ------
    TableError
        The file cannot be read so, names none of the images, or contradicts the cohort.
    """
    path = Path(path)
    images = cohort.images
    table, hash_notes = _hash_as_store(read_table(path), cohort, path)
    if hash_notes and not any(candidates(table, key) for key in KEYS):
        raise TableError(f"{path}: {hash_notes[0]} Name the images, or use the store's key.")
    key, column = _find_key(table, images, path)
    if "reader" not in find_roles(table, path, ReadConfig(), may_choose=("image",)):
        require_unique(table, column, path)
    named: dict[str, Any] = {f"{key}_column": column}
    config = ReadConfig(**named)
    if "label" in table and not _holds_codes(table["label"]):
        findings, targets = _read_listed(table["label"], cohort.findings, path)
        sheet = read_sheet(table.drop(columns="label"), path, config, findings=())
        codes = np.where(np.isnan(targets), BLANK, targets).astype(np.int8)
        uses = {**sheet.uses, "label": "list of findings"}
        sheet = replace(sheet, findings=findings, codes=codes, uses=uses)
    else:
        sheet = read_sheet(table, path, config)
    if not sheet.findings:
        _explain_no_finding(table, sheet, path)
    policy = Policy()
    rows = collapse(sheet, key, policy, config.readers)
    places = rows.keys.get_indexer(pd.Index(images[COLUMN_OF_KEY[key]], dtype=object))
    if (places < 0).all():
        raise TableError(
            f"{path} names none of the {len(images)} images: its first {column} is "
            f"{table[column].iloc[0]!r}, theirs {images[COLUMN_OF_KEY[key]].iloc[0]!r}. "
            "Image ids are paths relative to the image folder."
        )
    facts: dict[str, NDArray[np.object_]] = {
        str(name): np.append(rows.facts[name].to_numpy(object), "")[places]
        for name in rows.facts
        if name != key
    }
    changed, fact_notes = _add_facts(images, facts, path)
    notes = [*hash_notes, *fact_notes]
    ignored = [name for name, use in sheet.uses.items() if use.startswith("ignored")]
    if (changed["patient_id"] == "").all():
        notes += note_unread_patients(sheet.uses, path.name, "call it 'patient_id'")
    if ignored:
        notes.append(f"Not used of {path.name}: {list_names(ignored, 5)}.")
    targets = take_or_nan(rows.targets, places)
    reading = Reading(
        format="" if cohort.reading is None else cohort.reading.format,
        columns=sheet.uses,
        codes=count_codes(sheet.codes, sheet.findings),
        counts=count_dropped(images, targets, np.append(rows.is_coded, False)[places]),
        policy=policy.to_text(),
        split=whose_split([sheet]) or ("" if cohort.reading is None else cohort.reading.split),
        notes=(*sheet.notes, *notes, *note_patients(changed)),
    )
    return Cohort(changed, targets, sheet.findings, cohort.source, reading)


def _hash_as_store(
    table: pd.DataFrame, cohort: Cohort, path: Path
) -> tuple[pd.DataFrame, list[str]]:
    """Hash the patients and studies of a table as those of DICOM headers are in the store.

    Ids that are in the store already stay; those that the user's key does not link are left out,
    as they would reveal who is who.
    """
    reading, notes = cohort.reading, []
    key_path = default_key_path()
    for kind in ("patient", "study"):
        use = f"{kind}, as a keyed hash"
        if reading is None or use not in reading.columns.values():
            continue
        known = set(cohort.images[COLUMN_OF_KEY[kind]]) - {""}
        for column in candidates(table, kind):
            ids = table[column].map(lambda cell: "" if is_unknown(cell) else cell)
            if set(ids) - {""} <= known:
                continue
            if key_path.is_file():
                key = load_key(key_path)
                name = {i: hash_id(key, kind, i) for i in ids.unique() if i and i not in known}
                ids = ids.map(lambda cell, name=name: name.get(cell, cell))
            if set(ids) & known:
                table = table.assign(**{column: ids})
                continue
            table = table.drop(columns=column)
            notes.append(
                f"{column!r} of {path.name} is not used: the store has hashes of the {kind} ids, "
                f"and with the key {key_path} none of the table's is among them."
            )
    return table, notes


COLUMN_OF_KEY = {"image": "image_id", "study": "study_uid", "patient": "patient_id"}
"""Columns of the image table by what rows of a table are of."""


def _find_key(table: pd.DataFrame, images: pd.DataFrame, path: Path) -> tuple[str, str]:
    """What the rows of a table of labels are of, and the column that says of which."""
    for key in KEYS:
        known = set(images[COLUMN_OF_KEY[key]]) - {""}
        found = candidates(table, key)
        n_known = {name: int(table[name].isin(known).sum()) for name in found}
        best = max(found, key=lambda name: n_known[name], default=None)
        if best is not None and (n_known[best] or key == "image"):
            return key, best
    require_columns(table, ("image_id",), path)
    raise AssertionError("image_id is the name of an image column")


def _holds_codes(column: pd.Series[Any]) -> bool:
    """Whether a column is a finding itself: 1, 0, -1 and blank, but not blank alone."""
    codes, is_wrong = try_codes(column)
    return not is_wrong.any() and bool((codes != BLANK).any())


def _read_listed(
    column: pd.Series[Any], own: tuple[str, ...], path: Path
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read a column ``label``: of the cohort's findings if it has no other, else of the 35."""
    listed = set[str]().union(*(_split_cell(cell) - NOT_SAID for cell in column.unique()))
    findings = own if listed <= {normalise_name(name) for name in own} else FINDINGS
    lines = column.index.tolist()
    return findings, parse_labels(column.tolist(), findings, source=str(path), lines=lines)


def _explain_no_finding(table: pd.DataFrame, sheet: Sheet, path: Path) -> None:
    """Raise for a table without findings: for the first cell that is none, if a column has one."""
    no_role = [name for name, use in sheet.uses.items() if use == NO_CODES]
    if no_role:
        read_codes(table, no_role[:1], path)
    raise TableError(
        f"{path} has no finding: its columns are {list_names(list(table.columns))}. "
        "Add one column per finding (1, 0, or blank where unlabelled)."
    )


_STATED = {"patient_id": "patient", "given_split": "given split", "given_fold": "given fold"}
"""What a table of labels and the store must not contradict each other in, in words."""


def _add_facts(
    images: pd.DataFrame, facts: dict[str, NDArray[np.object_]], path: Path
) -> tuple[pd.DataFrame, list[str]]:
    """Fill what the image table does not know, and say what was filled and what was not."""
    changed, notes, used = images.copy(), [], []
    for name, new in facts.items():
        if name == "study":
            continue  # studies stay what they are
        column = COLUMN_OF_KEY.get(name, name)
        old = changed[column].to_numpy(object) if column in changed else np.full(len(new), "")
        differs = (old != "") & (new != "") & (old != new)
        if differs.any() and column in _STATED:
            row = int(differs.argmax())
            raise TableError(
                f"{path} and the store contradict each other: the {_STATED[column]} of image "
                f"{images['image_id'].iloc[row]!r} is {new[row]!r} in the table and {old[row]!r} "
                "in the store. Correct one of them, or leave the column out of the table."
            )
        if differs.any():
            notes.append(
                f"{column} of {count(int(differs.sum()), 'image')} differs between {path.name} and "
                "the store, and stays as the store has it."
            )
        if ((old == "") & (new != "")).any():
            changed[column] = np.where(old == "", new, old)
            used.append(_STATED.get(column, column))
    if used:
        notes.insert(0, f"{path.name} also tells {', '.join(used)} of the images: it is used.")
    return changed, notes


def take_or_nan(targets: NDArray[np.float32], rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of `targets`, unlabelled where the row is -1."""
    unlabelled = np.full((1, targets.shape[1]), np.nan, np.float32)
    return np.asarray(np.concatenate([targets, unlabelled])[rows])  # -1 takes the last
