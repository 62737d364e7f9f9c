"""Read tables as people write them, or say in one sentence where they are broken; write them."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import logging
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.files import replacing
from cxr_cache.common.wording import list_names, nearest_names
from cxr_cache.errors import TableError

logger = logging.getLogger(__name__)

SEPARATORS = (",", ";", "\t")
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".zip", ".parquet", ".xlsx")
"""Endings of the names of files that :func:`read_table` takes."""
_LIBRARIES = {".parquet": "pyarrow", ".xlsx": "openpyxl"}
"""What pandas reads a kind of file with."""
_BYTES_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 1 << 13
_LONG_TEXT = 1 << 20  # characters of a CSV file from which on it is read by pandas


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table as text, whichever kind of file it is in; see :func:`read_csv`.

    ``.parquet`` is read where pyarrow is installed, and the first sheet of an ``.xlsx`` file where
    openpyxl is. Everything else is CSV, maybe compressed.

    Raises
    ------
    TableError
        As for CSV; or the library that reads this kind of file is missing.
    """
    path = Path(path)
    library = _LIBRARIES.get(path.suffix.lower())
    if library is None:
        return read_csv(path)
    try:
        table = pd.read_parquet(path) if library == "pyarrow" else pd.read_excel(path, dtype=str)
    except ImportError as error:
        raise TableError(
            f"{path} is read with {library}, which is not installed. Run `pip install {library}`, "
            "or save the table as CSV."
        ) from error
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # these libraries raise anything for a damaged file
        raise TableError(f"{path} cannot be read by {library}: {error}") from error
    table = table.reset_index(drop=True)
    header = [str(name).strip() for name in table.columns]
    _require_named_once(header, path)
    if not len(table):
        raise TableError(f"{path} has a header ({list_names(header)}) but no rows.")
    lines = pd.RangeIndex(2, len(table) + 2, name="line")
    cells = {name: _as_text(table.iloc[:, i]) for i, name in enumerate(header)}
    text: pd.DataFrame = pd.DataFrame({n: pd.Series(cells[n], lines, object) for n in header})
    return text


def _as_text(column: pd.Series[Any]) -> list[str]:
    """Cells as they would be typed; a whole number that pandas made a float is whole again."""
    cells = ["" if missing else cell for cell, missing in zip(column, column.isna(), strict=True)]
    return [(f"{cell:.15g}" if isinstance(cell, float) else str(cell)).strip() for cell in cells]


def read_csv(path: str | Path) -> pd.DataFrame:
    """Read a CSV file as text, or say in one sentence where it is broken.

    Compressed files (``.gz``, or ``.zip`` of one table) are read as what is in them.

    Encodings: UTF-8 with or without a byte-order mark, UTF-16 with one, else
    Windows-1252 (logged as a warning). The separator (comma, semicolon or tab)
    is the one that divides the header most. White space around cells and
    wholly blank lines are dropped, and blank columns without a name at the end;
    everything else stays as written, so that ids such as ``NA`` and ``00012``
    survive.

    Parameters
    ----------
    path
        File with a header and at least one row.

    Returns
    -------
    pd.DataFrame
        Strings. The index, named ``line``, tells the line of the file on which
        each row begins, counted from 1.

    Raises
    ------
    TableError
        The file cannot be read or is not text; it is empty or only a header; a
        column has no name or the name of another; a row has more or fewer
        fields than the header; a quote is not closed.

    Notes
    -----
    Own code instead of ``pandas.read_csv``, which shifts all columns when each
    row has one field more than the header, fills short rows up, and reads an
    unclosed quote to the end of the file.
    """
    path = Path(path)
    text = _decode(path)
    separator = detect_separator(text)
    quick = _parse_plain(text, separator, path) if len(text) >= _LONG_TEXT else None
    if quick is not None:
        return quick
    records = list(_parse_records(text, separator, path))
    if not records:
        raise TableError(f"{path} is empty; it should hold a header and one row per entry.")
    (_, header), *rows = records
    if not rows:
        raise TableError(f"{path} has a header ({list_names(header)}) but no rows.")
    for line, cells in rows:
        if len(cells) != len(header):
            raise TableError(
                f"{path}, line {line}: {len(cells)} fields, but the header names {len(header)} "
                f"({list_names(header)}). Name every column, and put cells that hold the separator "
                "or a line break in double quotes."
            )
    if header[0] == "":  # row numbers, as DataFrame.to_csv writes them
        header, rows = header[1:], [(line, cells[1:]) for line, cells in rows]
    while header and not header[-1] and not any(cells[-1] for _, cells in rows):  # NIH's table
        header, rows = header[:-1], [(line, cells[:-1]) for line, cells in rows]
    _require_named_once(header, path)
    table: pd.DataFrame = pd.DataFrame(
        [cells for _, cells in rows],
        index=pd.Index([line for line, _ in rows], name="line"),
        columns=header,
        dtype=object,
    )
    return table


def read_words(path: Path) -> list[str]:
    """Words of a text file, as lists of images are; it may be compressed.

    Raises
    ------
    TableError
        The file cannot be read or is not text.
    """
    return _decode(path).split()


def _decode(path: Path) -> str:
    content = _read_bytes(path)
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in content and not is_utf16:
        raise TableError(
            f"{path} is not a text file: it holds NUL bytes, as spreadsheets and UTF-16 without "
            "a byte-order mark do. Save it as CSV in UTF-8."
        )
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = _decode_windows_1252(content, path)
    if "\0" in text:
        raise TableError(f"{path} is not a text file: it holds NUL characters. Save it in UTF-8.")
    return text


def _read_bytes(path: Path) -> bytes:
    """What is in a file; of a compressed one, what is in that."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if path.suffix.lower() == ".zip":
            return _read_zip(path)
        return path.read_bytes()
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or error
        other = path.with_suffix("") if path.suffix == ".gz" else Path(f"{path}.gz")
        hint = f" {other} is there." if not path.exists() and other.is_file() else ""
        raise TableError(f"{path} cannot be read: {why}.{hint}") from error


def _read_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".csv", ".tsv"))]
        names = [name for name in names if not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise TableError(
                f"{path} holds {len(names)} tables ({list_names(names, 3)}); it should hold one "
                ".csv file. Unpack it, and give the folder or one of the files."
            )
        return archive.read(names[0])


def _decode_windows_1252(content: bytes, path: Path) -> str:
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise TableError(
            f"{path}, line {line}: byte 0x{byte:02x} belongs to none of the encodings UTF-8, "
            "UTF-16 with a byte-order mark and Windows-1252. Save the file as UTF-8."
        ) from error
    logger.warning("%s is not UTF-8; read as Windows-1252 (Latin-1)", path)
    return text


def detect_separator(text: str) -> str:
    """The separator that divides the first line of a text most."""
    header = next(iter(text.lstrip().splitlines()), "")
    unquoted = re.sub(r'"[^"]*("|$)', "", header)
    return max(SEPARATORS, key=unquoted.count)


def _parse_plain(text: str, separator: str, path: Path) -> pd.DataFrame | None:
    """Read a table without quotes, blank lines and rows of another length, quickly.

    None where it has some: :func:`_parse_records` then reads it, or says what is wrong. The cells
    are the same in both, and equal ones of a column are one object.
    """
    text = text.replace("\r\n", "\n").rstrip("\n")
    if '"' in text or "\r" in text or "\n\n" in text or text.startswith("\n"):
        return None
    header_text, _, body = text.partition("\n")
    header = [name.strip() for name in header_text.split(separator)]
    content = np.frombuffer(text.encode(), np.uint8)
    ends = np.append(np.flatnonzero(content == ord("\n")), len(content))
    before = np.searchsorted(np.flatnonzero(content == ord(separator)), ends)
    n_separators = np.diff(before, prepend=0)
    if not body or len(header) < 2 or (n_separators != len(header) - 1).any():
        return None
    parsed = pd.read_csv(
        io.StringIO(body),
        sep=separator,
        header=None,
        names=range(len(header)),
        dtype=object,
        na_filter=False,
        quoting=csv.QUOTE_NONE,
        index_col=False,
        skip_blank_lines=False,
        low_memory=False,
    )
    lines = pd.RangeIndex(2, len(parsed) + 2, name="line")
    columns = [parsed[place].to_numpy(object) for place in range(len(header))]
    if _has_white_space(content, separator):
        columns = [np.array([cell.strip() for cell in cells], object) for cells in columns]
    if header[0] == "":  # row numbers
        header, columns = header[1:], columns[1:]
    while header and not header[-1] and not columns[-1].any():
        header, columns = header[:-1], columns[:-1]
    _require_named_once(header, path)
    series = [pd.Series(cells, lines, object) for cells in columns]
    table: pd.DataFrame = pd.DataFrame(dict(zip(header, series, strict=True)))
    if (table.iloc[:, 0] == "").any():
        table = table[~(table == "").all(axis=1)]
    return table


def _has_white_space(content: NDArray[np.uint8], separator: str) -> bool:
    """Whether there may be some around cells; bytes outside ASCII may be some."""
    kind = np.zeros(256, np.uint8)
    kind[[9, 11, 12, 28, 29, 30, 31, 32, *range(128, 256)]] = 1
    kind[[ord(separator), ord("\n")]] = 2
    kinds = kind[content]
    at_ends = kinds[0] == 1 or kinds[-1] == 1
    return bool(at_ends or (kinds[:-1] + kinds[1:] == 3).any())


def _parse_records(text: str, separator: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each record begins, and its cells."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    line = 1
    try:
        for record in reader:
            cells = [cell.strip() for cell in record]
            if any(cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise TableError(
            f"{path}: a double quote in the row that begins on line {line} is not closed, or "
            f"closed too early ({error}). Write a quote inside a quoted cell twice."
        ) from error


def _require_named_once(header: list[str], path: Path) -> None:
    if "" in header:
        raise TableError(
            f"{path}: a column has no name; the header is {', '.join(map(repr, header))}. Name it."
        )
    duplicates = find_duplicates(header)
    if duplicates:
        raise TableError(
            f"{path}: two columns are named {duplicates[0]!r}. Rename or remove one of them."
        )


def require_columns(table: pd.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Raise TableError unless the table has all `columns`; suggests the nearest name."""
    for column in columns:
        if column not in table:
            present = table.columns.tolist()
            nearest = nearest_names(column, present)
            hint = f" Should {nearest[0]!r} be renamed?" if nearest else ""
            raise TableError(
                f"{path} has no column {column!r}; its columns are {list_names(present)}.{hint}"
            )


def require_filled(table: pd.DataFrame, column: str, path: Path) -> None:
    """Raise TableError, with the line, where a cell of `column` is blank."""
    blank = table[column] == ""
    if blank.any():
        raise TableError(f"{path}, line {blank.idxmax()}: {column} is blank. Fill it in.")


def require_unique(table: pd.DataFrame, column: str, path: Path) -> None:
    """Raise TableError, with the line, where `column` is blank or repeats itself."""
    require_filled(table, column, path)
    duplicates = find_duplicates(table[column])
    if duplicates:
        lines = table.index[table[column] == duplicates[0]]
        raise TableError(
            f"{path}: {column} {duplicates[0]!r} is on line {lines[0]} and on line {lines[1]}. "
            "Keep one of the rows."
        )


def find_duplicates(values: Any) -> list[str]:
    """Values that came before, in order."""
    index = pd.Index(values)
    return [str(value) for value in index[index.duplicated()]]


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_BYTES_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def write_table(path: str | Path, table: pd.DataFrame, *, digits: int = 9) -> None:
    """Write a table as CSV in UTF-8, so that readers see the old file or the whole new one.

    The bytes are those of :meth:`pandas.DataFrame.to_csv` without the index, in half the time, and
    text that holds carriage returns comes back, too. What is missing is left blank. Floats keep so
    many significant digits; nine are all of float32. Errors are those of
    :func:`cxr_cache.common.files.replacing`.
    """
    text = [table.iloc[:, i] for i, kind in enumerate(table.dtypes) if kind.kind not in "fiub"]
    returns = any("\r" in cell for column in text for cell in column if isinstance(cell, str))
    with replacing(Path(path)) as file:
        # A number takes eight times as much memory as text.
        for start in range(0, max(1, len(table)), _ROWS_AT_ONCE):
            part = table.iloc[start : start + _ROWS_AT_ONCE]
            cells = {i: _cells(part.iloc[:, i], digits) for i in range(table.shape[1])}
            pd.DataFrame(cells).to_csv(
                file,
                index=False,
                header=table.columns.tolist() if start == 0 else False,
                lineterminator="\n",
                quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL,
            )


def _cells(column: pd.Series[Any], digits: int) -> NDArray[Any]:
    """Values of a column, floats as text."""
    if column.dtype.kind != "f":
        return column.to_numpy(object)
    form, missing = f"%.{digits}g", column.isna().to_numpy()
    text = np.array([form % value for value in column.to_numpy(float, na_value=np.nan)], object)
    text[missing] = ""
    return text
