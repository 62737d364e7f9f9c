"""What differs between two things that should be equal, in words."""

from __future__ import annotations

from collections.abc import Mapping
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
