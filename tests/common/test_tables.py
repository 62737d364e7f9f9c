"""Every way in which a CSV file can be written, and broken."""

from __future__ import annotations

import contextlib
import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_cache.common import tables
from cxr_cache.common.tables import read_csv, write_table
from cxr_cache.errors import DiskFullError, TableError


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


PLAIN = "id,text\n1,a\n2,b\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.replace(",", ";").encode(),
        PLAIN.replace(",", "\t").encode(),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.removesuffix("\n").encode(),
        ("\n" + PLAIN.replace("\n", "\n\n") + ",\n").encode(),
        b' id , "text"\n"1", a \n 2,"b"\n',
        b",id,text\n0,1,a\n1,2,b\n",  # DataFrame.to_csv with its row numbers
    ],
    ids=[
        "plain", "utf-8 with mark", "utf-16 le", "utf-16 be", "semicolons", "tabs", "crlf", "cr",
        "no final newline", "blank lines", "quotes and spaces", "row numbers",
    ],
)  # fmt: skip
def test_the_same_table_in_many_forms(tmp_path, content):
    table = read_csv(write(tmp_path, content))
    assert table.to_dict("list") == {"id": ["1", "2"], "text": ["a", "b"]}


def test_latin_1_is_read_and_mentioned(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        table = read_csv(write(tmp_path, "id,text\n1,épaisseur\n".encode("latin-1")))
    assert table["text"].tolist() == ["épaisseur"]
    assert "not UTF-8" in caplog.text


def test_quoted_cells_may_hold_separators_quotes_and_line_breaks(tmp_path):
    table = read_csv(write(tmp_path, 'id,text\n1,"a, ""b""\nc"\n2,d\n'))
    assert table["text"].tolist() == ['a, "b"\nc', "d"]
    assert table.index.tolist() == [2, 4]  # lines of the file


def test_the_separator_is_not_mistaken_for_one_in_a_name(tmp_path):
    table = read_csv(write(tmp_path, '"id; old";"Opacity, left";"Opacity, right"\n1;0;1\n'))
    assert table.columns.tolist() == ["id; old", "Opacity, left", "Opacity, right"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty"),
        (b"\n\n  \n", r"is empty"),
        (b"\xef\xbb\xbf", r"is empty"),
        (b"id,text\n", r"has a header \(id, text\) but no rows"),
        (b"id,text\n1,a,\n2,b,\n", r"line 2: 3 fields, but the header names 2 \(id, text\)"),
        (b"id,text\n1,a\n2,b,c\n", r"line 3: 3 fields, but the header names 2"),
        (b"id,text\n1,a\n2\n", r"line 3: 1 fields, but the header names 2"),
        (b'id,text\n1,a\n2,"b\n3,c\n', r"begins on line 3 is not closed"),
        (b'id,text\n1,"a\n2,"b"\n3,c\n', r"begins on line 2 is not closed, or closed too early"),
        (b'id,text\n1,"a"b\n', r"begins on line 2 .* Write a quote inside a quoted cell twice"),
        (b'id,"text\n1,a\n', r"begins on line 1 is not closed"),
        (b"id,text,id\n1,a,2\n", r"two columns are named 'id'"),
        (b"id,text,\n1,a,2\n", r"a column has no name; the header is 'id', 'text', ''"),
        (b"PK\x03\x04\0\0\0", r"is not a text file: it holds NUL bytes"),
        ("id,text\n1,a\n".encode("utf-16-le"), r"NUL bytes, as spreadsheets and UTF-16 without"),
        (b"id,text\n1,a\n2,\x81\n", r"line 3: byte 0x81 belongs to none of the encodings"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_the_place(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(TableError, match=message) as error:
        read_csv(path)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"nowhere\.csv cannot be read: No such file"):
        read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(TableError, match="cannot be read: Is a directory"):
        read_csv(tmp_path)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.text('",;\t\r\n ab1é\ufeff\0', max_size=60))
def test_any_bytes_give_a_table_or_a_message(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with contextlib.suppress(TableError):
        table = read_csv(path)
        assert all(isinstance(cell, str) for cell in table.to_numpy().ravel())
        assert table.index.is_unique


@pytest.mark.parametrize("n_at_once", [1 << 13, 3])
def test_tables_are_written_as_pandas_would(tmp_path, monkeypatch, n_at_once):
    """Byte for byte, with all that cells may hold, and however many rows are written at once."""
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", n_at_once)
    floats = np.array([0.1, 1e-12, 12345678.9, np.inf, 1, -0.0, 2**-20], np.float32)
    table = pd.DataFrame(
        {
            "plain": list("abcdefg"),
            'a "name", quoted': ["", "a,b", 'say "x"', "two\nlines", ",", " %s ", "äö"],
            "missing": ["x", None, "y", np.nan, "", "nan", "z"],
            "float": floats,
            "gaps": np.where(np.arange(7) % 2, floats, np.nan),
            "blank": np.full(7, np.nan),
            "int": range(7),
            "nullable": pd.Series(range(7), dtype="Int64").mask(np.arange(7) == 4),
            "nullable float": pd.Series(floats.astype(float), dtype="Float64").mask(floats == 1),
            "bool": np.arange(7) > 3,
            "category": pd.Categorical([*"abcabc", None]),
        },
        index=[3, 3, 1, 0, 9, 8, 7],
    )
    for n_rows in range(8):
        for digits in (9, 6):
            expected = table[:n_rows].to_csv(
                index=False, float_format=f"%.{digits}g", lineterminator="\n"
            )
            write_table(tmp_path / "t.csv", table[:n_rows], digits=digits)
            assert (tmp_path / "t.csv").read_bytes() == expected.encode()
    twice = pd.DataFrame([[1, "x"], [0.5, "y"]], columns=["a", "a"])
    write_table(tmp_path / "t.csv", twice)
    assert (tmp_path / "t.csv").read_text() == "a,a\n1,x\n0.5,y\n"


def test_a_long_table_is_not_in_memory_as_text(tmp_path):
    table = pd.DataFrame(np.random.default_rng(0).random((60_000, 8), np.float32))
    tracemalloc.start()
    write_table(tmp_path / "t.csv", table)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 15e6  # as text it would be 33 MB
    assert len((tmp_path / "t.csv").read_bytes().splitlines()) == 60_001


def test_carriage_returns_come_back(tmp_path, monkeypatch):
    """pandas alone writes them so that it reads two rows."""
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 2)
    table = pd.DataFrame({"a": ["x\ry", "\r\n", None], "b": [0.5, np.nan, 2]})
    write_table(tmp_path / "t.csv", table)
    assert b'"x\ry"' in (tmp_path / "t.csv").read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), table)


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    write_table(path, pd.DataFrame({"a": [1]}))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(DiskFullError, match=r"t\.csv could not be written"):
        write_table(path, pd.DataFrame({"a": [2]}))
    assert path.read_text() == "a\n1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]
