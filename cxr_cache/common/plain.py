"""Results of any kind as JSON that every reader of JSON takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any


def to_plain(value: Any) -> Any:
    """Give a value as text, numbers, lists and dictionaries alone.

    What is undefined is None: numbers that are NaN or infinite, which JSON does not have, and
    pandas' NA. Tables become a list of rows, arrays become lists, and paths become text.

    Raises
    ------
    TypeError
        The value, or a part of it, is of another kind.

    Examples
    --------
    >>> to_plain({"auroc": float("nan"), "folds": (1, 2), "run": Path("runs/first")})
    {'auroc': None, 'folds': [1, 2], 'run': 'runs/first'}
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_plain(part) for key, part in value.items()}
    if isinstance(value, Sequence | Set):
        return [to_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return _convert(value)


def _convert(value: Any) -> Any:
    """What numpy and pandas have, told by its methods: neither is imported for a line of text."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # a table
        return [to_plain(row) for row in value.to_dict("records")]
    if hasattr(value, "tolist"):  # an array, a series, or one number of numpy's
        return to_plain(value.tolist())
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def to_json(value: Any) -> str:
    """Write a value as :func:`to_plain` gives it, indented.

    Examples
    --------
    >>> print(to_json({"value": float("inf")}))
    {
      "value": null
    }
    """
    return json.dumps(to_plain(value), indent=2, allow_nan=False, ensure_ascii=False)
