"""A table of one's own, or several that belong together -> the image table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import TABLE_SUFFIXES, hash_file, read_table
from cxr_cache.common.wording import count, list_names, normalise_name
from cxr_cache.config import ReadConfig
from cxr_cache.datasets import columns as cols
from cxr_cache.datasets.codes import (
    BLANK,
    CODE_NAMES,
    Policy,
    apply_policy,
    combine_rows,
    count_codes,
    pick_findings,
    read_codes,
    read_lists,
    try_codes,
)
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.flow import count_dropped
from cxr_cache.datasets.locate import (
    default_image_dir,
    find_by_id,
    list_images,
    locate_images,
)
from cxr_cache.errors import TableError

logger = logging.getLogger(__name__)

KEYS: Final = ("image", "study", "patient")
"""What rows of a table may be of, from the narrowest to the widest."""

ROLE_WORDS: Final = {
    "image": "image file",
    "projection": "projection",
    "view": "view",
    "split": "given split",
    "fold": "given fold",
    **{name: f"information ({name})" for name in cols.FACT_ROLES},
}
"""What a column of a role is used as, in words; others are called as their role."""

NO_CODES: Final = "ignored: not label codes"
"""The use of a column that holds something else. Its cells are not told: they may name people."""

_LONG_NAME: Final = 60  # characters; a longer one in a list is text and no finding


@dataclass(frozen=True)
class Sheet:
    """One table, understood: ids and facts as text, label codes by finding."""

    path: Path
    facts: pd.DataFrame
    """Columns ``image``, ``study``, ``patient``, ``projection``, ``view_position``,
    ``given_split``, ``given_fold``, ``sex``, ``age`` ... as far as the table has them; the index
    tells the lines of the file."""
    findings: tuple[str, ...]
    codes: NDArray[np.int8]
    """``(N, F)``, as :mod:`cxr_cache.datasets.codes` has them."""
    uses: dict[str, str]
    """What each column is used as."""
    notes: tuple[str, ...] = ()
    reader: NDArray[np.object_] | None = None
    """Who labelled each row, ``(N,)``."""
    roles: dict[str, str] = field(default_factory=dict)
    """Column by role."""
    files: tuple[Path, ...] = ()
    """The files, where it is of several."""
    split: str = ""
    """Where its given split is from, if from no column."""


def find_tables(path: Path) -> list[Path]:
    """The tables that a path names: itself, or those in a folder.

    Raises
    ------
    TableError
        The folder holds none.
    """
    if not path.is_dir():
        return [path]
    tables = sorted(p for p in path.iterdir() if p.name.lower().endswith(TABLE_SUFFIXES))
    if not tables:
        raise TableError(f"{path} holds no table ({', '.join(TABLE_SUFFIXES)}).")
    return tables


def read_own_table(path: Path, config: ReadConfig, image_dir: Path | None) -> Cohort:
    """Read a table of one's own, or a folder of tables that belong together.

    One of the tables has a column with the image files; others may have a row per image, study or
    patient. Where none names files, those in the image folder are matched with the studies or
    patients of the table by their names and folders.

    Parameters
    ----------
    path
        A table in any form that :func:`cxr_cache.common.tables.read_table` reads, or a folder.
    config
        Names columns that are not recognised, and says what is made of label codes.
    image_dir
        The image folder. Without one, files are looked for beside the table, and need not be
        there.

    Raises
    ------
    TableError
        A table is unreadable, contradicts itself or another, or names no image that is there.
    """
    tables = {table_path: read_table(table_path) for table_path in find_tables(path)}
    cols.require_named(config, tables)
    sheets = [
        _read_stack(stack, cols.restrict(config, next(iter(stack.values()))))
        for stack in _stack(tables, config)
    ]
    with_images = [sheet for sheet in sheets if "image" in sheet.facts]
    main = max(with_images, key=lambda sheet: len(sheet.facts), default=None)
    if main is None:
        main = _match_files(sheets, image_dir or default_image_dir(path), path)
        sheets.append(main)
    others = [sheet for sheet in sheets if sheet is not main]
    for sheet in others:
        _require_same_images(main, sheet)
    return join_sheets(main, others, config, image_dir, path)


# -- tables that continue each other ------------------------------------------------------


def _stack(tables: dict[Path, pd.DataFrame], config: ReadConfig) -> list[dict[Path, pd.DataFrame]]:
    """Put together the tables that have the same columns, and rows of other things."""
    stacks: dict[Any, dict[Path, pd.DataFrame]] = {}
    for path, table in tables.items():
        stacks.setdefault(frozenset(table.columns), {})[path] = table
    made = []
    for stack in stacks.values():
        first = next(iter(stack.values()))
        roles = cols.find_roles(first, next(iter(stack)), cols.restrict(config, first))
        key = next((roles[key] for key in KEYS if key in roles), None)
        ids = [] if key is None else [set(table[key]) for table in stack.values()]
        if key is not None and sum(map(len, ids)) == len(set().union(*ids)):
            made.append(stack)
        else:
            made += [{path: table} for path, table in stack.items()]
    return made


def _read_stack(stack: dict[Path, pd.DataFrame], config: ReadConfig) -> Sheet:
    """Understand tables of the same columns as one; files named train and test are a split."""
    first, *others = stack
    if not others:
        return read_sheet(stack[first], first, config)
    parts = [
        table.set_axis([f"{line} of {path.name}" for line in table.index])
        for path, table in stack.items()
    ]
    path = first.with_name(list_names([path.name for path in stack], 3))
    sheet = replace(read_sheet(pd.concat(parts), path, config), files=tuple(stack))
    words = [cols.find_split_word(path.name.split(".")[0]) for path in stack]
    if "given_split" not in sheet.facts and all(words):
        lengths = [len(table) for table in parts]
        facts = sheet.facts.assign(given_split=np.repeat(np.array(words, object), lengths))
        return replace(sheet, facts=facts, split=f"the file names {path.name}")
    return sheet


def _require_same_images(main: Sheet, other: Sheet) -> None:
    """Raise TableError for two tables of images that name others: some would be left out."""
    if "image" not in other.facts:
        return
    known, named = set(main.facts["image"]), set(other.facts["image"])
    same_columns = main.uses.keys() == other.uses.keys()
    if named <= known or (named & known and not same_columns):
        return
    which = "some of the same images" if named & known else "different images"
    why = "" if same_columns else ", and their columns differ"
    raise TableError(
        f"{main.path} and {other.path.name} name {which}{why}, so they are no parts of one table. "
        "Give one of them by its path, or give them the same columns and each image once."
    )


# -- one table ----------------------------------------------------------------------------


def read_sheet(
    table: pd.DataFrame,
    path: Path,
    config: ReadConfig,
    *,
    may_choose: tuple[str, ...] = (),
    findings: Sequence[str] | None = None,
) -> Sheet:
    """Understand every column of a table.

    Parameters
    ----------
    table
        Cells as text; the index tells the lines of the file.
    path
        Its file, for messages.
    config
        Names columns, and picks findings.
    may_choose
        As in :func:`cxr_cache.datasets.columns.find_roles`.
    findings
        Columns that are the findings, where they are known; None finds them.

    Raises
    ------
    TableError
        A column holds something that its role does not allow, or two columns have one role.
    """
    roles = cols.find_roles(table, path, config, may_choose=may_choose)
    uses = {column: ROLE_WORDS.get(role, role) for role, column in roles.items() if role != "names"}
    for column in table.columns:
        role = cols.ROLE_OF_NAME.get(cols.squeeze_name(column), "names")
        if role != "names" and column not in uses:
            uses[column] = f"ignored: the {role} is {roles.get(role, roles.get('view'))!r}"
    facts, notes = read_facts(table, roles, path)
    found, codes = _read_findings(table, roles, path, config, uses, findings)
    for column in table.columns:
        uses.setdefault(column, "ignored")
        if cols.is_split_flag(column) and uses[column] == "ignored":
            notes.append(
                f"{column!r} of {path.name} seems to tell a given split and is not used. Write it "
                "as a column 'split' with train, val or test."
            )
    reader = table[roles["reader"]].to_numpy(object) if "reader" in roles else None
    ordered = {column: uses[column] for column in table.columns}
    return Sheet(path, facts, found, codes, ordered, tuple(notes), reader, roles)


def read_facts(
    table: pd.DataFrame, roles: dict[str, str], path: Path
) -> tuple[pd.DataFrame, list[str]]:
    """Ids and facts as the image table has them, and what there is to say of them."""
    facts: dict[str, Any] = {}
    notes: list[str] = []
    if "image" in roles:
        facts["image"] = table[roles["image"]].to_numpy(object)
        blank = np.flatnonzero(facts["image"] == "")
        if len(blank):
            raise TableError(
                f"{path}, line {table.index[blank[0]]}: {roles['image']} is blank. Fill it in."
            )
    for role in ("study", "patient"):
        if role in roles:
            facts[role] = cols.read_ids(table[roles[role]])
    for role in ("projection", "view"):
        if role in roles:
            projections, positions = cols.read_views(table[roles[role]])
            if (projections != "").any() or "projection" not in facts:
                facts["projection"] = _first(facts.get("projection"), projections)
            if (positions != "").any():
                facts["view_position"] = _first(positions, facts.get("view_position"))
    if "split" in roles:
        facts["given_split"] = cols.read_splits(table[roles["split"]], path)
    if "fold" in roles:
        facts["given_fold"] = cols.read_folds(table[roles["fold"]], path)
    if "sex" in roles:
        facts["sex"] = cols.read_sexes(table[roles["sex"]])
        known = ~table[roles["sex"]].map(cols.is_unknown)
        if known.any() and not (facts["sex"] != "").any():
            notes.append(
                f"{roles['sex']!r} of {path.name} holds neither F and M nor female and male, so "
                "the sex is left blank."
            )
    if "age" in roles:
        facts["age"], n_impossible = cols.read_ages(table[roles["age"]])
        if n_impossible:
            notes.append(
                f"{count(n_impossible, 'age')} in {roles['age']!r} of {path.name} "
                f"{'is' if n_impossible == 1 else 'are'} impossible (below 0, above "
                f"{cols.OLDEST} or no number) and left blank."
            )
    for role in ("hospital", "race", "ethnicity"):
        if role in roles:
            facts[role] = cols.read_ids(table[roles[role]])
    series = {name: pd.Series(cells, table.index, object) for name, cells in facts.items()}
    return pd.DataFrame(series, index=table.index), notes


def _first(one: Any, other: Any) -> Any:
    """Cells of one column where they are filled, else of the other; either may be None."""
    if one is None or other is None:
        return one if other is None else other
    return np.where(one != "", one, other)


def _read_findings(
    table: pd.DataFrame,
    roles: dict[str, str],
    path: Path,
    config: ReadConfig,
    uses: dict[str, str],
    known: Sequence[str] | None,
) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Find the columns with findings, or the one that lists them; say so in `uses`."""
    free = [name for name in table.columns if name not in uses]
    wanted = known if known is not None else _name_columns(free, config)
    listing = [name for name in cols.candidates(table, "names") if name in free]
    findings: list[str] = []
    if wanted or known is not None:
        findings = list(wanted)
    else:
        for column in listing if config.findings is not None else free:
            uses[column] = use = _judge(table[column], column in listing)
            if use == "finding":
                findings.append(column)
    codes = read_codes(table, findings, path)
    for column in findings:
        uses[column] = "finding"
    lists = [name for name in listing if uses.get(name, "names") == "names"]
    if findings or not lists:
        for column in lists:
            uses[column] = "ignored: the findings have a column each"
        return tuple(findings), codes
    if len(lists) > 1:
        raise TableError(
            f"{path}: the columns {lists[0]!r} and {lists[1]!r} may both list the findings. Rename "
            "or remove one of them."
        )
    uses[lists[0]] = "list of findings"
    names, codes = read_lists(table[lists[0]], path)
    picked = pick_findings(names, config.findings)
    return tuple(names[i] for i in picked), codes[:, picked]


def _name_columns(free: Sequence[str], config: ReadConfig) -> list[str]:
    """The columns that --findings names; none where it names findings of a list, or nothing."""
    if config.findings is None:
        return []
    spelled = {normalise_name(column): column for column in free}
    names = map(normalise_name, config.findings)
    return [spelled[name] for name in names if name in spelled]


def _judge(column: pd.Series[Any], may_list: bool) -> str:
    """What a column without a role is: a finding, a list of names, or ignored, and why."""
    name = str(column.name)
    if cols.squeeze_name(name) in cols.NEVER_FINDINGS or cols.is_split_flag(name):
        return "ignored"
    codes, is_wrong = try_codes(column)
    n_filled, n_wrong = int((is_wrong | (codes != BLANK)).sum()), int(is_wrong.sum())
    if not n_filled:
        return "ignored: all cells are blank"
    if 2 * n_wrong <= n_filled:
        return "finding"  # a cell that is none is an error, with its line
    if may_list and column[is_wrong].str.len().median() <= _LONG_NAME:
        return "names"
    return NO_CODES


# -- rows of one table that are of one thing --------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """One row per image, study or patient, with the targets that its readers agree on."""

    keys: pd.Index[Any]
    facts: pd.DataFrame
    targets: NDArray[np.float32]
    is_coded: NDArray[np.bool_]
    """Whether some code of a row is not blank."""


def collapse(sheet: Sheet, key: str, policy: Policy, rule: str) -> Rows:
    """Make one row of the rows of each image, study or patient."""
    targets = apply_policy(sheet.codes, sheet.findings, policy)
    places, keys = pd.factorize(sheet.facts[key].to_numpy(object))
    is_coded = np.bincount(places, (sheet.codes != BLANK).any(axis=1), len(keys)) > 0
    if len(keys) == len(sheet.facts):
        return Rows(pd.Index(keys, dtype=object), sheet.facts, targets, is_coded)
    first = np.full(len(keys), len(places), np.intp)
    np.minimum.at(first, places, np.arange(len(places)))
    lines = sheet.facts.index
    again = np.flatnonzero(first[places] != np.arange(len(places)))
    column = sheet.roles.get(key, key)
    if sheet.reader is None:
        row = again[0]
        raise TableError(
            f"{sheet.path}: {column} {keys[places[row]]!r} is on line {lines[first[places[row]]]} "
            f"and on line {lines[row]}. Keep one of the rows; if each is another reader's, name "
            "them in a column 'reader'."
        )
    of_reader = pd.DataFrame({"key": places, "reader": sheet.reader}).duplicated().to_numpy()
    if of_reader.any():
        row = int(of_reader.argmax())
        raise TableError(
            f"{sheet.path}: reader {sheet.reader[row]!r} labels {column} {keys[places[row]]!r} "
            f"twice; the second time is on line {lines[row]}. Keep one of the rows."
        )
    for name in sheet.facts.columns:
        cells = sheet.facts[name].to_numpy(object)
        differs = np.flatnonzero(cells != cells[first[places]])
        if len(differs):
            row, before = differs[0], first[places[differs[0]]]
            raise TableError(
                f"{sheet.path}: {column} {keys[places[row]]!r} has {name} {cells[before]!r} on "
                f"line {lines[before]} and {cells[row]!r} on line {lines[row]}. Make them equal."
            )
    combined = combine_rows(targets, places, len(keys), rule)
    return Rows(pd.Index(keys, dtype=object), sheet.facts.iloc[first], combined, is_coded)


# -- several tables -----------------------------------------------------------------------


def join_sheets(
    main: Sheet,
    others: Sequence[Sheet],
    config: ReadConfig,
    image_dir: Path | None,
    path: Path,
    *,
    name: str = "table",
    policy: Policy | None = None,
) -> Cohort:
    """Make the image table of the table that names the images, and those that say more of them.

    Parameters
    ----------
    main
        The table with the column ``image``.
    others
        Tables with a row per image, study or patient.
    config
        What is made of label codes and of several readers.
    image_dir, path
        The image folder, if the user names one, and the data set's path.
    name
        Name of the format.
    policy
        What the data set's authors make of label codes; the user's options come first.

    Raises
    ------
    TableError
        Two tables contradict each other, or no image is found.
    """
    names = list(dict.fromkeys(name for sheet in (main, *others) for name in sheet.findings))
    policy = (policy or Policy()).with_config(config, names)
    rows = collapse(main, "image", policy, config.readers)
    facts = {column: rows.facts[column].to_numpy(object) for column in rows.facts.columns}
    targets = {f: rows.targets[:, i] for i, f in enumerate(main.findings)}
    origins = dict.fromkeys([*facts, *targets], main.path)
    notes, is_coded = list(main.notes), rows.is_coded
    for sheet in others:
        notes += [*sheet.notes, *_join(sheet, facts, targets, origins, is_coded, policy, config)]
    if "patient" not in facts:
        remedy = "name it with --patient-column"
        for sheet in (main, *others):
            notes += cols.note_unread_patients(sheet.uses, sheet.path.name, remedy)
    facts, missing_notes = _place_images(facts, main, image_dir, path)
    notes += missing_notes
    images, study_notes = _to_images(facts)
    notes += study_notes
    columns = [column for sheet in (main, *others) for column in sheet.uses]
    picked = [names[i] for i in pick_findings(names, config.findings, columns)]
    matrix = np.column_stack([targets[f] for f in picked]) if picked else np.empty((len(images), 0))
    sheets = (main, *others)
    prefix = len({sheet.path for sheet in sheets}) > 1
    reading = Reading(
        format=name,
        columns={
            (f"{sheet.path.name}: {column}" if prefix else column): use
            for sheet in sheets
            for column, use in sheet.uses.items()
        },
        codes=_count_of_all(sheets, picked),
        counts={
            "rows": len(main.facts),
            **count_dropped(images, matrix.astype(np.float32), is_coded),
        },
        policy=policy.to_text() if picked else "",
        split=whose_split(sheets),
        notes=tuple(notes),
    )
    files = [file for sheet in sheets for file in sheet.files or (sheet.path,)]
    source = {file.name: hash_file(file) for file in files if file.is_file()}
    return Cohort(images, matrix.astype(np.float32), tuple(picked), source, reading)


def _count_of_all(sheets: Sequence[Sheet], findings: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often each code occurs, by finding: in the table that says most, if several have it."""
    most: dict[str, dict[str, int]] = {}
    for sheet in sheets:
        for finding, counts in count_codes(sheet.codes, sheet.findings).items():
            before = most.get(finding, {})
            if finding in findings and (not before or _n_filled(counts) > _n_filled(before)):
                most[finding] = counts
    return most


def _n_filled(counts: dict[str, int]) -> int:
    return sum(counts.values()) - counts.get(CODE_NAMES[BLANK], 0)


def whose_split(sheets: Sequence[Sheet]) -> str:
    """Name the columns that tables have a split in; blank if none has one."""
    parts = [
        f"the column {sheet.roles[role]!r} of {sheet.path.name}"
        for sheet in sheets
        for role in ("split", "fold")
        if role in sheet.roles
    ]
    return " and ".join([*parts, *(sheet.split for sheet in sheets if sheet.split)])


def _join(
    sheet: Sheet,
    facts: dict[str, NDArray[np.object_]],
    targets: dict[str, NDArray[np.float32]],
    origins: dict[str, Path],
    is_coded: NDArray[np.bool_],
    policy: Policy,
    config: ReadConfig,
) -> list[str]:
    """Add what another table says to the images; return what there is to say of it."""
    key = next((k for k in KEYS if k in sheet.facts and k in facts), None)
    if key is None:
        return [
            f"{sheet.path.name} has no column in common with {origins['image'].name} (image, study "
            "or patient) and is not used."
        ]
    rows = collapse(sheet, key, policy, config.readers)
    place = rows.keys.get_indexer(pd.Index(facts[key], dtype=object))
    place[facts[key] == ""] = -1
    found = place >= 0
    is_coded |= np.append(rows.is_coded, False)[place]
    where = f"{key} {{}} of {sheet.path.name}"
    for column in rows.facts.columns:
        if column == key:
            continue
        new = np.append(rows.facts[column].to_numpy(object), "")[place]
        old = facts.get(column)
        if old is not None:
            both = (new != "") & (old != "") & found
            paths = (origins[column], sheet.path)
            _require_agreement(old, new, both, column, where, facts[key], paths)
        facts[column] = _first(old, new)
        origins.setdefault(column, sheet.path)
    for number, finding in enumerate(sheet.findings):
        values = np.append(rows.targets[:, number], np.float32(np.nan))[place]
        known = targets.get(finding)
        if known is not None:
            both = ~np.isnan(values) & ~np.isnan(known)
            paths = (origins[finding], sheet.path)
            _require_agreement(known, values, both, finding, where, facts[key], paths)
            values = np.where(np.isnan(known), values, known)
        targets[finding] = values
        origins.setdefault(finding, sheet.path)
    notes = []
    if without := int((~found).sum()):
        notes.append(
            f"{count(without, 'image')} of {len(found):,} {'has' if without == 1 else 'have'} no "
            f"row in {sheet.path.name}."
        )
    unused = len(set(rows.keys) - set(facts[key]) - {""})
    if unused and key == "image":
        notes.append(
            f"{count(unused, 'image')} of {sheet.path.name} {'is' if unused == 1 else 'are'} not "
            f"in {origins['image'].name} and not used."
        )
    return notes


def _require_agreement(
    old: NDArray[Any],
    new: NDArray[Any],
    both: NDArray[np.bool_],
    what: str,
    where: str,
    keys: NDArray[np.object_],
    paths: tuple[Path, Path],
) -> None:
    """Raise TableError for an image of which two tables say something else."""
    (first, second), differs = paths, both & (old != new)
    if differs.any():
        row = int(differs.argmax())
        raise TableError(
            f"{first.name} and {second.name} contradict each other: {where.format(repr(keys[row]))}"
            f" has {what} {old[row]!r} in {first.name} and {new[row]!r} in {second.name}. Correct "
            "one of them."
        )


def _match_files(sheets: Sequence[Sheet], image_dir: Path, path: Path) -> Sheet:
    """Make a table of the image files that belong to the studies or patients of the tables."""
    files = list_images(image_dir) if image_dir.is_dir() else []
    for key in KEYS[1:]:
        for sheet in sheets:
            if key not in sheet.facts:
                continue
            ids = sheet.facts[key].drop_duplicates()
            image_ids, rows = find_by_id(ids.tolist(), files)
            if image_ids:
                facts = pd.DataFrame({"image": image_ids, key: ids.to_numpy(object)[rows]})
                codes = np.empty((len(image_ids), 0), np.int8)
                return Sheet(image_dir, facts, (), codes, {})
    columns = {column: None for sheet in sheets for column in sheet.uses}
    raise TableError(
        f"{path} has no column with the image files, and no file in {image_dir} is named after a "
        f"study or patient; the columns are {list_names([*columns])}. Name the column with "
        "--image-column."
    )


def _place_images(
    facts: dict[str, NDArray[np.object_]], main: Sheet, image_dir: Path | None, path: Path
) -> tuple[dict[str, NDArray[np.object_]], list[str]]:
    """Paths of the images relative to the image folder; a note where some are missing."""
    names = facts["image"].tolist()
    folder = image_dir or default_image_dir(path)
    if image_dir is None and not path.is_dir() and not (folder / names[0]).is_file():
        return facts, []  # a table alone, as it is described
    source = f"{main.path} ({main.roles.get('image', 'files')})"
    ids, missing = locate_images(names, folder, source=source, must_exist=image_dir is not None)
    notes = []
    if missing and len(missing) < len(names):
        notes.append(
            f"{len(missing):,} of {count(len(names), 'image')} ({len(missing) / len(names):.0%}) "
            f"{'is' if len(missing) == 1 else 'are'} not in {folder}; the first is {missing[0]!r}."
        )
    return {**facts, "image": np.array(ids, object)}, notes


_NUMBERED: Final = 0.1  # of studies that two patients share, from which on ids count per patient


def _to_images(facts: dict[str, NDArray[np.object_]]) -> tuple[pd.DataFrame, list[str]]:
    """The columns of the image table; studies that are only numbered get their patient's id.

    An image without a patient is of the patient of its study; of a numbered study it is unknown
    which, so that the image counts as a study itself.
    """
    notes: list[str] = []
    images = pd.DataFrame({name: pd.Series(cells, dtype=object) for name, cells in facts.items()})
    images = images.rename(
        columns={"image": "image_id", "study": "study_uid", "patient": "patient_id"}
    )
    if "study_uid" not in images:
        images["study_uid"] = images["image_id"]
    elif (blank := images["study_uid"] == "").any():
        images.loc[blank, "study_uid"] = images.loc[blank, "image_id"]
    if "patient_id" in images:
        known = images["patient_id"] != ""
        pairs = images.loc[known, ["study_uid", "patient_id"]].drop_duplicates()
        shared = pairs["study_uid"].duplicated(keep=False)
        n_shared = pairs.loc[shared, "study_uid"].nunique()
        if n_shared > max(1, _NUMBERED * pairs["study_uid"].nunique()):
            of_patient = images["patient_id"] + "/" + images["study_uid"]
            images["study_uid"] = of_patient.where(known, images["image_id"])
            notes.append(
                "The same study ids occur with several patients, so they count as numbers of each "
                "patient's studies."
            )
        else:
            patient_of = dict(pairs[~shared].to_numpy(object))
            of_study = images["study_uid"].map(lambda study: patient_of.get(study, ""))
            images["patient_id"] = images["patient_id"].where(known, of_study)
    return images, notes
