"""Results that commands print with --json, held against their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cxr_cache.cli

SCHEMAS = json.loads((Path(cxr_cache.cli.__file__).parent / "schemas.json").read_text())


def read_valid(command: str, stdout: str) -> Any:
    """Parse what a command printed, and raise unless it is JSON of the command's schema."""
    jsonschema = pytest.importorskip("jsonschema")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    printed = json.loads(stdout, parse_constant=refuse)
    schema = {"$defs": SCHEMAS["$defs"], **SCHEMAS["commands"][command]}
    jsonschema.Draft202012Validator(schema).validate(printed)
    return printed
