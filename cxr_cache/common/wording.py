"""Words of messages: differences, counts, lists, versions, and names that may have been meant."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any


def find_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Field -> (ours, theirs), for the fields that are not equal."""
    fields = dict.fromkeys([*ours, *theirs])
    return {
        field: (ours.get(field), theirs.get(field))
        for field in fields
        if ours.get(field) != theirs.get(field)
    }


def describe_differences(differences: Mapping[str, tuple[Any, Any]], ours: str, theirs: str) -> str:
    """One indented line per field, with both values and where each was found.

    Examples
    --------
    >>> print(describe_differences({"precision": ("bf16", "fp32")}, "in the store", "in this run"))
      precision: 'bf16' in the store, 'fp32' in this run
    """
    return "\n".join(
        f"  {field}: {mine!r} {ours}, {other!r} {theirs}"
        for field, (mine, other) in differences.items()
    )


def nearest_names(name: str, known: Iterable[str], n: int = 1) -> list[str]:
    """Up to `n` of the known names that `name` may be meant for, best first.

    Case and white space do not matter.

    Examples
    --------
    >>> nearest_names("cardiomegly", ["Edema", "Cardiomegaly"])
    ['Cardiomegaly']
    """
    spelled = {normalise_name(other): other for other in known}
    return [spelled[match] for match in difflib.get_close_matches(normalise_name(name), spelled, n)]


def suggest(name: str, known: Iterable[str]) -> str:
    """A question with the names nearest to `name`; empty where none is near."""
    close = nearest_names(name, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def normalise_name(name: str) -> str:
    """A name in small letters, with single spaces."""
    return " ".join(name.split()).lower()


def list_names(names: Sequence[str], n_shown: int | None = None) -> str:
    """List the first `n_shown` names (None: all of them), and say how many more there are.

    Commas separate them, or semicolons where one of the names holds a comma itself.

    Examples
    --------
    >>> list_names(["Mass", "Edema", "Hernia"], 2)
    'Mass, Edema and 1 more'
    >>> list_names(["Nodule, calcified", "Mass"])
    'Nodule, calcified; Mass'
    """
    shown = list(names[:n_shown])
    separator = "; " if any("," in name for name in shown) else ", "
    more = len(names) - len(shown)
    return separator.join(shown) + (f" and {more:,} more" if more else "")


def first_line(error: Exception) -> str:
    """What an exception says, without the rest."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def first_lines(text: str, n_lines: int = 10) -> str:
    r"""The beginning of a long text, and how many more lines there are: what a result prints.

    Examples
    --------
    >>> print(first_lines("one\ntwo\nthree", 2))
    one
    ... and 2 more lines of to_text()
    """
    lines = text.splitlines()
    if len(lines) <= n_lines:
        return text
    shown = lines[: n_lines - 1]
    return "\n".join([*shown, f"... and {len(lines) - len(shown):,} more lines of to_text()"])


_IRREGULAR = {"study": "studies", "entry": "entries", "batch": "batches"}


def count(n: int, noun: str) -> str:
    """A number with its noun, in the singular or the plural.

    Examples
    --------
    >>> count(1, "study"), count(2000, "study"), count(0, "test image")
    ('1 study', '2,000 studies', '0 test images')
    """
    return f"{n:,} {noun if n == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Several of a noun: ``"test images"``, ``"studies"``."""
    *before, last = noun.split()
    return " ".join([*before, _IRREGULAR.get(last, f"{last}s")])


@cache
def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of those of the packages that are installed."""
    import importlib.metadata  # a tenth of what `--help` takes

    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # used from its folder
            found[package] = importlib.metadata.version(package)
    return found
