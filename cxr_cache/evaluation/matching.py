"""Findings of a run and those of another data set -> which of them may be compared, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_csv, require_columns
from cxr_cache.common.wording import count, first_lines, list_names, suggest
from cxr_cache.config import RELATIONS, ExternalConfig
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.errors import TableError
from cxr_cache.metrics.scores import FloatArray

NAMES: Final = files("cxr_cache.datasets") / "finding_names.csv"
"""Names of findings in two data sets, and what the second holds beside the first."""
COLUMNS: Final = ("finding", "store_finding", "relation", "is_scored", "why")
NOT_LABELLED: Final = "not labelled"
_REVERSED: Final = {"broader": "narrower", "narrower": "broader"}
_SCHEMES: Final = {
    **dict.fromkeys(("", "table", "classes", "images"), ""),  # the user's own: nothing is known
    **dict.fromkeys(("openi", "phantoms"), "indiana"),
    **dict.fromkeys(("chexpert-plus", "mimic-cxr-jpg", "brax"), "chexpert"),
    "vinbigdata": "vindr",
}
"""Data sets whose findings mean what those of another do, by the names of their readers."""


@dataclass(frozen=True, eq=False)
class Matching:
    """Which finding of a data set stands for which of a run."""

    table: pd.DataFrame
    """As ``matching.csv``, with the columns :data:`COLUMNS`: a row for every pair that was looked
    at, and for every finding of the run that has no counterpart."""
    findings: tuple[str, ...]
    """All findings of the run."""
    unused: tuple[str, ...]
    """Findings of the data set that stand for none of the run's."""

    def __repr__(self) -> str:
        return first_lines(self.to_text())

    @property
    def scored(self) -> dict[str, tuple[str, ...]]:
        """Names in the data set by the run's finding, for those that are scored."""
        found: dict[str, tuple[str, ...]] = {}
        for row in self.table[self.table["is_scored"]].to_dict("records"):
            found[row["finding"]] = (*found.get(row["finding"], ()), row["store_finding"])
        return found

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """Findings of the run that nothing in the data set stands for."""
        return tuple(finding for finding in self.findings if finding not in self.scored)

    def relabel(self, targets: pd.DataFrame) -> FloatArray:
        """Give the run's findings the labels of the data set, ``(N, F)``; NaN where it has none.

        Where several of its findings stand for one of the run's, that is present where any of them
        is, and absent where all of them are.
        """
        relabelled = np.full((len(targets), len(self.findings)), np.nan)
        for finding, names in self.scored.items():
            values = targets[list(names)].to_numpy(np.float64)
            present, absent = (values == 1).any(axis=1), (values == 0).all(axis=1)
            column = np.where(present, 1.0, np.where(absent, 0.0, np.nan))
            relabelled[:, self.findings.index(finding)] = column
        return relabelled

    def to_text(self) -> str:
        """Write what is matched, what not and why as a short table."""
        n_scored = len(self.scored)
        lines = [f"{n_scored} of the run's {count(len(self.findings), 'finding')} can be scored:"]
        named = self.table[self.table["store_finding"] != ""]
        width = max([len(name) for name in named["finding"]], default=0)
        other = max([len(name) for name in named["store_finding"]], default=0)
        for is_scored in (True, False):
            rows = named[named["is_scored"] == is_scored]
            if not is_scored and len(rows):
                lines.append("Not scored:")
            lines += [
                f"  {row['finding']:<{width}}  {row['store_finding']:<{other}}  "
                f"{row['relation']:<8}  {row['why']}".rstrip()
                for row in rows.to_dict("records")
            ]
        if without := [f for f in self.findings if f not in set(named["finding"])]:
            lines.append(f"Not labelled there: {list_names(without)}")
        if self.unused:
            lines.append(f"Labelled there alone: {list_names(self.unused)}")
        return "\n".join(lines)


def match_findings(
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    our_data_set: str = "",
    their_data_set: str = "",
    own: str | Path | None = None,
    relations: Sequence[str] = (ExternalConfig.relations,),
) -> Matching:
    """Find what stands for each finding of a run in another data set.

    Names that differ only in case, blanks and underscores are the same, unless
    ``cxr_cache/datasets/finding_names.csv`` says otherwise of these data sets; it also knows other
    names for the same thing.

    Parameters
    ----------
    ours, theirs
        Findings of the run and of the data set.
    our_data_set, their_data_set
        Names of their readers, such as ``"nih"``; ``""`` where unknown.
    own
        CSV of the user's own with the columns ``finding`` (the run's), ``store_finding`` and, where
        it is not ``same``, ``relation``. It decides alone on the findings that it names; a blank
        ``store_finding`` leaves a finding unlabelled.
    relations
        Which relations are scored, of :data:`cxr_cache.config.RELATIONS`. Of several that a finding
        has, the first in the order of that list counts.

    Raises
    ------
    TableError
        `own` cannot be read, or names a finding that is not there.
    """
    stated = {} if own is None else _read_own(Path(own), ours, theirs)
    sets = [_SCHEMES.get(name, name) for name in (our_data_set, their_data_set)]
    rows: list[dict[str, Any]] = []
    for finding in ours:
        pairs = stated.get(finding)
        if pairs is None:
            pairs = _relate(finding, ours, theirs, *sets)
        pairs = sorted(pairs, key=lambda pair: RELATIONS.index(pair.relation))
        best = next((pair.relation for pair in pairs if pair.relation in relations), None)
        for pair in pairs:
            row = (finding, pair.name, pair.relation, pair.relation == best, pair.why)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
        if not pairs:
            why = "left out by the map" if finding in stated else NOT_LABELLED
            rows.append(dict(zip(COLUMNS, (finding, "", "", False, why), strict=True)))
    table: pd.DataFrame = pd.DataFrame(rows, columns=list(COLUMNS))
    used = set(table["store_finding"])
    return Matching(table, tuple(ours), tuple(name for name in theirs if name not in used))


def name_data_set(findings: Sequence[str], reading: Mapping[str, Any] | None = None) -> str:
    """Tell which published data set findings come from: the name of its reader, or ``""``.

    What was read before readers were recorded is known by its findings, if they are Indiana's.
    """
    if reading:
        return str(reading.get("format", ""))
    return "indiana" if tuple(findings) == FINDINGS else ""


def name_data_set_of_run(config: Mapping[str, Any]) -> str:
    """The same of a run's recorded configuration; ``""`` where it was given a table of labels."""
    if config.get("labels"):
        return ""
    return name_data_set(config["findings"], config.get("reading"))


def require_scored(matching: Matching, run: Path, labelled_by: str | Path) -> None:
    """Raise TableError where no finding of the run can be scored."""
    if not matching.scored:
        raise TableError(
            f"{labelled_by} labels none of the findings of {run}.\n{matching.to_text()}\n"
            "Give labels with --labels, say with --map which names belong together, or take more "
            "than the same with --relations."
        )


class _Pair(NamedTuple):
    name: str
    relation: str
    """What it holds, compared with the run's finding."""
    why: str


class _Entry(NamedTuple):
    """A line of the table of names, read in one direction; no data sets are any."""

    data_sets: frozenset[str]
    other_data_sets: frozenset[str]
    relation: str
    note: str

    def applies(self, data_set: str, other: str) -> bool:
        sets = ((self.data_sets, data_set), (self.other_data_sets, other))
        if data_set and data_set == other:  # within a data set a name means itself
            return all(name in known for known, name in sets)
        return all(not known or name in known for known, name in sets)

    @property
    def n_named(self) -> int:
        return bool(self.data_sets) + bool(self.other_data_sets)


def _relate(
    finding: str, ours: Sequence[str], theirs: Sequence[str], our_set: str, their_set: str
) -> list[_Pair]:
    """All of their findings that have to do with one of ours."""
    entries, pairs = _read_names(), []
    known = [set(map(_plain, names)) for names in (ours, theirs)]
    for name in theirs:
        key = _plain(finding), _plain(name)
        applying = [entry for entry in entries.get(key, ()) if entry.applies(our_set, their_set)]
        entry = max(applying, key=lambda entry: entry.n_named, default=None)
        if entry is None and key[0] == key[1]:
            return [_Pair(name, "same", "")]
        # Whoever has both names means two things by them, unless the table knows better.
        if entry is not None and (entry.n_named or not any({*key} <= names for names in known)):
            pairs.append(_Pair(name, entry.relation, entry.note))
    return pairs


def _plain(name: str) -> str:
    """A name without case, and with single blanks for blanks and underscores."""
    return " ".join(name.replace("_", " ").split()).lower()


@cache
def _read_names() -> dict[tuple[str, str], list[_Entry]]:
    """The table of names by both names, each line in both directions."""
    entries: dict[tuple[str, str], list[_Entry]] = {}
    for row in read_csv(Path(str(NAMES))).to_dict("records"):
        names = _plain(row["name"]), _plain(row["other_name"])
        sets = [
            frozenset(row[column].split("|")) - {""} for column in ("data_set", "other_data_set")
        ]
        relation, note = row["relation"], row["note"]
        forth = _Entry(sets[0], sets[1], relation, note)
        back = _Entry(sets[1], sets[0], _REVERSED.get(relation, relation), note)
        entries.setdefault(names, []).append(forth)
        entries.setdefault(names[::-1], []).append(back)
    return entries


def _read_own(path: Path, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, list[_Pair]]:
    """The user's own pairs, by the run's finding."""
    table = read_csv(path)
    require_columns(table, ("finding", "store_finding"), path)
    known = [{_plain(name): name for name in names} for names in (ours, theirs)]
    pairs: dict[str, list[_Pair]] = {}
    for line, row in zip(table.index, table.to_dict("records"), strict=True):
        finding = _require_known(row["finding"], known[0], f"{path}, line {line}: the run")
        relation = row.get("relation", "") or "same"
        if relation not in RELATIONS:
            raise TableError(
                f"{path}, line {line}: relation {relation!r} is none of {', '.join(RELATIONS)}."
            )
        of_finding = pairs.setdefault(finding, [])
        if row["store_finding"]:
            name = _require_known(
                row["store_finding"], known[1], f"{path}, line {line}: the other data set"
            )
            of_finding.append(_Pair(name, relation, "by the map"))
    return pairs


def _require_known(name: str, known: Mapping[str, str], where: str) -> str:
    if _plain(name) not in known:
        raise TableError(
            f"{where} has no finding {name!r}.{suggest(name, known.values())} It has "
            f"{list_names(list(known.values()), 10)}."
        )
    return known[_plain(name)]
