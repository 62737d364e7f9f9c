"""Files of prompts as people save them: read, or refused in one sentence that names the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cxr_cache.encoders.text import load_prompts
from cxr_cache.errors import ConfigError

ENTRIES = {"Cardiomegaly": {"present": ["c\N{LATIN SMALL LIGATURE OE}ur élargi"], "absent": ["x"]}}
TEXT = json.dumps(ENTRIES, ensure_ascii=False, indent=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompts_in_utf_8_are_read(tmp_path, encoding):
    (tmp_path / "prompts.json").write_text(TEXT, encoding=encoding)
    pair = load_prompts(tmp_path / "prompts.json")["Cardiomegaly"]
    assert pair.present == tuple(ENTRIES["Cardiomegaly"]["present"])


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_another_encoding_is_named_with_its_line_and_byte(tmp_path, encoding):
    """It ended in a traceback, although a UnicodeDecodeError is a ValueError."""
    (tmp_path / "prompts.json").write_text(TEXT, encoding=encoding)
    line, byte = {"cp1252": (4, "0x9c"), "utf-16": (1, "0xff")}[encoding]
    with pytest.raises(
        ConfigError, match=rf"prompts\.json, line {line}: byte {byte} is not UTF-8.* as UTF-8\."
    ):
        load_prompts(tmp_path / "prompts.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file"):
        load_prompts(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ('{"Mass": {"present": ["a"]}}', r"the entry of 'Mass': 'absent' is missing"),
        ('{"Mass": {"present": "a", "absent": ["b"]}}', r"the entry of 'Mass': present and absent"),
        ('{"Mass": ["a"]}', r"the entry of 'Mass': it is nested in another way"),
        ("[]", r"\(it is nested in another way\)"),
        ("{", r"line 1 column 2"),
        ("[" * 100_000, r"nested"),
    ],
)
def test_what_is_wrong_is_said_in_words(tmp_path: Path, content, shown):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(ConfigError, match=shown):
        load_prompts(tmp_path / "prompts.json")
