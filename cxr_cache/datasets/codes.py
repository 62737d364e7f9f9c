"""Label codes: what cells of findings say, and what is made of uncertain and blank ones.

Codes are int8: 1 present, 0 absent, -1 uncertain, 2 blank. Targets are float32: 1, 0, NaN.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.wording import list_names, nearest_names, normalise_name, suggest
from cxr_cache.config import BLANK_CHOICES, UNCERTAIN_CHOICES, ReadConfig, parse_policy
from cxr_cache.errors import ConfigError, TableError

PRESENT, ABSENT, UNCERTAIN, BLANK = 1, 0, -1, 2
CODE_NAMES: Final = {PRESENT: "present", ABSENT: "absent", UNCERTAIN: "uncertain", BLANK: "blank"}
"""Codes in words."""

NOT_SAID: Final = frozenset(
    ("nan", "na", "n/a", "<na>", "nat", "null", "unknown", "unk", "missing")
)
"""Words, in small letters, by which programs and people fill a cell that says nothing."""

_WORDS: Final = {
    **dict.fromkeys(("", "none", *NOT_SAID), BLANK),
    "true": PRESENT,
    "false": ABSENT,
}


def read_code(cell: str) -> int | None:
    """The code that a cell stands for; None where it is none.

    Examples
    --------
    >>> [read_code(cell) for cell in ("1", "0.0", "-1", "True", "", "nan", "maybe")]
    [1, 0, -1, 1, 2, 2, None]
    """
    cell = cell.strip()
    if (word := _WORDS.get(cell.lower())) is not None:
        return word
    if not cell.lstrip("+-")[:1].isdigit():
        return None
    try:
        number = float(cell)
    except ValueError:
        return None
    return int(number) if number in (PRESENT, ABSENT, UNCERTAIN) else None


def try_codes(column: pd.Series[Any]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """Codes of a column, and which cells are no code; both ``(N,)``."""
    places, known = pd.factorize(column.to_numpy(object))
    codes = [read_code(cell) for cell in known]
    is_wrong = np.array([code is None for code in codes], bool)
    return np.array([code or 0 for code in codes], np.int8)[places], is_wrong[places]


def read_codes(
    table: pd.DataFrame, findings: Sequence[str], source: str | Path
) -> NDArray[np.int8]:
    """Read a column per finding.

    Parameters
    ----------
    table
        Cells as text; the index tells the lines of the file.
    findings
        F columns of the table.
    source
        Name of the file, for the error message.

    Returns
    -------
    NDArray[np.int8]
        Shape ``(N, F)``.

    Raises
    ------
    TableError
        A cell holds another value, with line, column and value.
    """
    codes = np.empty((len(table), len(findings)), np.int8)
    for place, finding in enumerate(findings):
        codes[:, place], is_wrong = try_codes(table[finding])
        if is_wrong.any():
            row = int(is_wrong.argmax())
            raise TableError(
                f"{source}, line {table.index[row]}: column {finding!r} holds "
                f"{table[finding].iloc[row]!r}, but a finding is 1 or true (present), 0 or false "
                "(absent), -1 (uncertain) or blank."
            )
    return codes


def count_codes(codes: NDArray[np.int8], findings: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often each code occurs, by finding; codes that do not occur are left out."""
    counts: dict[str, dict[str, int]] = {}
    for place, finding in enumerate(findings):
        of_finding = {
            name: int((codes[:, place] == code).sum()) for code, name in CODE_NAMES.items()
        }
        counts[finding] = {name: n for name, n in of_finding.items() if n}
    return counts


# -- lists of names -------------------------------------------------------------------------

NO_FINDING: Final = frozenset({"no finding", "no findings", "no_finding", "none", "negative"})
"""Words of a list, in small letters, that say that nothing was found."""
_SEPARATORS: Final = ("|", ";", ",")


def split_names(cell: str, separator: str) -> list[str]:
    """Names that a cell lists, as written but for white space; words of :data:`NOT_SAID` are none.

    Raises
    ------
    ValueError
        The cell begins as a list in brackets, and is none of text.

    Examples
    --------
    >>> split_names("['cardiomegaly', ' pneumonia']", ",")
    ['cardiomegaly', 'pneumonia']
    >>> split_names("Edema| Mass", "|")
    ['Edema', 'Mass']
    """
    cell = cell.strip()
    names: Any = cell.split(separator) if separator else [cell]
    if cell.startswith(("[", "(")):
        try:
            names = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{cell!r} is no list of names") from error
        names = [names] if isinstance(names, str) else names
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{cell!r} is no list of names")
    spaced = (" ".join(name.split()) for name in names)
    return [name for name in spaced if name and name.lower() not in NOT_SAID]


def find_separator(cells: Sequence[str]) -> str:
    """What stands between the names in the cells: ``|``, ``;`` or ``,``; blank if nothing does."""
    plain = [cell for cell in cells if not cell.strip().startswith(("[", "("))]
    found = (mark for mark in _SEPARATORS if any(mark in cell for cell in plain))
    return next(found, "")


def read_lists(
    column: pd.Series[Any],
    source: str | Path,
    *,
    findings: Sequence[str] | None = None,
    separator: str | None = None,
    aliases: Mapping[str, str] | None = None,
    no_finding: frozenset[str] = NO_FINDING,
) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Read a column whose cells list the findings of a row.

    Case and white space do not matter. What a cell does not list is absent; a blank cell, or one
    of a word such as ``nan``, is blank for every finding; words such as ``No Finding`` say that
    nothing was found.

    Parameters
    ----------
    column
        Cells as text; the index tells the lines of the file.
    source
        Name of the file, for the error message.
    findings
        Names in their order; None takes all that occur, in the order of the alphabet. Others are
        left out.
    separator
        What stands between names; None finds it.
    aliases
        Names, in small letters, that mean another one.

    Returns
    -------
    findings
        F names.
    codes
        Shape ``(N, F)``.

    Raises
    ------
    TableError
        A cell in brackets is no list of text.
    """
    places, known = pd.factorize(column.to_numpy(object))
    separator = find_separator(known.tolist()) if separator is None else separator
    listed: list[list[str]] = []
    for place, cell in enumerate(known):
        try:
            listed.append(split_names(cell, separator))
        except ValueError as error:
            line = column.index[int((places == place).argmax())]
            raise TableError(f"{source}, line {line}: column {column.name!r}: {error}.") from error
    aliases = aliases or {}
    spelled: dict[str, str] = {}
    for names in listed:
        for name in names:
            meant = aliases.get(normalise_name(name), name)
            spelled.setdefault(normalise_name(meant), meant)
    if findings is None:
        findings = sorted((spelled[name] for name in spelled if name not in no_finding), key=str)
    column_of = {normalise_name(name): place for place, name in enumerate(findings)}
    codes = np.zeros((len(known), len(findings)), np.int8)
    for row, names in enumerate(listed):
        if not names:
            codes[row] = BLANK
        for name in names:
            meant = normalise_name(aliases.get(normalise_name(name), name))
            if meant in column_of:
                codes[row, column_of[meant]] = PRESENT
    return tuple(findings), codes[places]


# -- what is made of codes ------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """What is made of uncertain and blank cells: ``"ignore"``, ``"zeros"`` or ``"ones"``."""

    uncertain: str = "ignore"
    blank: str = "ignore"
    uncertain_of: Mapping[str, str] = field(default_factory=dict)
    """By finding, where it differs."""
    blank_of: Mapping[str, str] = field(default_factory=dict)
    """By finding, where it differs."""

    def with_config(self, config: ReadConfig, findings: Sequence[str]) -> Policy:
        """Return the same with what the user asks for.

        Raises
        ------
        ConfigError
            The user names a finding that is not among `findings`.
        """
        made: dict[str, Any] = {}
        for name, choices in (("uncertain", UNCERTAIN_CHOICES), ("blank", BLANK_CHOICES)):
            for_all, for_some = getattr(self, name), dict(getattr(self, f"{name}_of"))
            if (text := getattr(config, name)) is not None:
                asked, asked_of = parse_policy(text, choices)
                if asked is not None:
                    for_all, for_some = asked, {}
                for_some |= {_match(finding, findings, name): c for finding, c in asked_of.items()}
            made |= {name: for_all, f"{name}_of": for_some}
        return Policy(**made)

    def to_text(self) -> str:
        """Say in words what is made of the codes."""
        parts = []
        for name in ("uncertain", "blank"):
            others = [f"{finding} {c}" for finding, c in getattr(self, f"{name}_of").items()]
            parts.append(f"{name}: {', '.join([getattr(self, name), *others])}")
        return "; ".join(parts)


def _match(finding: str, findings: Sequence[str], option: str) -> str:
    """The finding that is meant, whatever its case and spacing."""
    known = {normalise_name(name): name for name in findings}
    if (found := known.get(normalise_name(finding))) is None:
        problem = f"names {finding!r}, which is no finding here.{suggest(finding, findings)}"
        raise ConfigError(problems=[(option, problem)])
    return found


_CHOICE_VALUES: Final = {"ignore": np.nan, "zeros": 0.0, "ones": 1.0}


def apply_policy(
    codes: NDArray[np.int8], findings: Sequence[str], policy: Policy
) -> NDArray[np.float32]:
    """Make targets of codes, both ``(N, F)``."""
    targets = np.empty(codes.shape, np.float32)
    for place, finding in enumerate(findings):
        value_of = np.full(4, np.nan, np.float32)  # indexed by code; -1 is the last
        value_of[PRESENT], value_of[ABSENT] = 1, 0
        value_of[UNCERTAIN] = _CHOICE_VALUES[policy.uncertain_of.get(finding, policy.uncertain)]
        value_of[BLANK] = _CHOICE_VALUES[policy.blank_of.get(finding, policy.blank)]
        targets[:, place] = value_of[codes[:, place]]
    return targets


def pick_findings(
    findings: Sequence[str], wanted: Sequence[str] | None, columns: Sequence[str] = ()
) -> list[int]:
    """Places of the findings that the user wants, in the user's order; all, if none are named.

    Raises
    ------
    ConfigError
        One of them is not there; the message suggests one that is, or one of the `columns`.
    """
    if wanted is None:
        return list(range(len(findings)))
    place_of = {normalise_name(name): place for place, name in enumerate(findings)}
    for name in wanted:
        if normalise_name(name) not in place_of:
            near = nearest_names(name, [*findings, *columns])
            hint = f". Did you mean {near[0]}?" if near else f". It has: {list_names(findings, 10)}"
            problem = f"names {name!r}, which the data set does not have{hint}"
            raise ConfigError(problems=[("findings", problem)])
    return list(dict.fromkeys(place_of[normalise_name(name)] for name in wanted))


# -- several readers ------------------------------------------------------------------------


def combine_rows(
    targets: NDArray[np.float32], groups: NDArray[np.intp], n_groups: int, rule: str
) -> NDArray[np.float32]:
    """Make one label of the labels that several readers gave.

    Parameters
    ----------
    targets
        One row per reader and image, ``(N, F)``, NaN where a reader says nothing.
    groups
        Number of the image of each row, ``(N,)``.
    n_groups
        Number of images, M.
    rule
        ``"majority"`` (a tie is NaN), ``"any"``, ``"all"``, or ``"mean"`` (a tie is present).

    Returns
    -------
    NDArray[np.float32]
        Shape ``(M, F)``.
    """
    combined = np.full((n_groups, targets.shape[1]), np.nan, np.float32)
    for place in range(targets.shape[1]):
        labelled = ~np.isnan(targets[:, place])
        n_said = np.bincount(groups[labelled], minlength=n_groups)
        n_yes = np.bincount(
            groups[labelled], targets[labelled, place].astype(float), minlength=n_groups
        )
        rules = {
            "majority": np.where(2 * n_yes == n_said, np.nan, 2 * n_yes > n_said),
            "any": n_yes > 0,
            "all": n_yes == n_said,
            "mean": 2 * n_yes >= n_said,
        }
        combined[:, place] = np.where(n_said > 0, rules[rule], np.nan)
    return combined
