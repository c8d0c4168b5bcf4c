"""Reading of local data files: CSV, JSON and parquet, as rows of values that keep what was written.

CSV and JSON are read by Python's own `csv` and `json`, parquet by pyarrow. No value is guessed at:
a cell of a CSV is a text, and a string of JSON is that string. Nothing is kept between two reads,
and nothing is written.
"""

import codecs
import csv
import functools
import io
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from spear_jax.core.errors import UserError, shown

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MAX_TEXT = 1_000_000  # characters of one cell
MAX_COLUMNS = 10_000
LONGEST_PATH = 300  # characters of a path in a message

# Longer marks first: that of UTF-32 starts with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Table(NamedTuple):
    """The rows of a file.

    Attributes:
        columns: the names of all columns, in the file's order.
        rows: {column: value} of each.
    """

    columns: list[str]
    rows: list[dict]


class Number(float):
    """A fraction of JSON: a float whose text is the one in the file, such as "0.50" or "1e5"."""

    def __new__(cls, written: str) -> "Number":
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        return self.written


def read_table(files: Sequence[pathlib.Path], needed: Iterable[str]) -> Table:
    """Reads files of one kind, one behind another.

    Args:
        files: paths that end in one of `SUFFIXES`.
        needed: the columns that the caller reads. A row without one gets it, as None. They help to
            tell the separator of a CSV file.
    Raises: UserError naming the file, the line where there is one, and what to do.
    """
    nothing = dict.fromkeys(needed)
    tables = [_read_file(file, tuple(nothing)) for file in files]
    if not any(table.rows for table in tables):
        raise UserError(
            f"data file {shown(str(files[0]), LONGEST_PATH)} is empty; a split needs at least one row. Give a "
            f"file with rows."
        )
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    return Table(columns, [{**nothing, **row} for table in tables for row in table.rows])


def listed(names: Sequence[str]) -> str:
    """Returns names in a list for a message, cut where they are long or many."""
    some = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, names[:16])]
    return ", ".join(some + ["..."] * (len(names) > 16)) or "none"


def _read_file(file: pathlib.Path, needed: tuple[str, ...]) -> Table:
    read = {
        ".parquet": _read_parquet,
        ".json": _read_json,
        ".jsonl": _read_json,
        ".csv": functools.partial(_read_csv, needed=needed),
        ".tsv": functools.partial(_read_csv, needed=needed),
    }
    try:
        return read[file.suffix.lower()](file)
    except OSError as error:
        _refuse(file, f"{error.strerror or error}", "Check the file and the right to read it")


def _refuse(file: pathlib.Path, problem: str, remedy: str = "") -> NoReturn:
    """Raises the error of a file that cannot be read."""
    remedy = remedy or "Check the file, or save it as .parquet or .jsonl"
    kind = file.suffix.lower()
    raise UserError(
        f"data file {shown(str(file), LONGEST_PATH)} cannot be read as {kind}: {problem}. {remedy}."
    )


# --- characters ---


def _read_text(file: pathlib.Path) -> str:
    """Returns a file's characters: UTF-8, or UTF-16 or UTF-32 that can be told for sure.

    Other encodings cannot be told from one another, so they are refused.
    """
    data = file.read_bytes()
    encoding, mark = "utf-8", b""
    for known, name in _MARKS.items():
        if data.startswith(known):
            encoding, mark = name, known
            break
    else:
        encoding = _unmarked(data)
    body = data[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            _refuse(file, f"it is no valid {encoding.upper()} text", "Save it as UTF-8")
        line = body.count(b"\n", 0, error.start) + 1
        start = max(body.rfind(b"\n", 0, error.start) + 1, error.start - 20)
        near = body[start : error.start + 20].splitlines()[0].decode("cp1252", "replace")
        _refuse(
            file,
            f"byte 0x{body[error.start]:02X} in line {line} is not UTF-8 (as Windows-1252 it would "
            f"read {shown(near)})",
            "Save the file as UTF-8, such as 'CSV UTF-8' in a spreadsheet, or by iconv -f cp1252 "
            "-t utf-8 with the encoding that it has",
        )
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        _refuse(
            file,
            f"line {line} holds a NUL character, so it is no text, or one in UTF-16 without a mark",
            "Save the file as UTF-8",
        )
    return text


def _unmarked(data: bytes) -> str:
    """Returns the encoding of bytes without a mark: UTF-16 where one half of most pairs is NUL."""
    if len(data) % 2 or b"\0" not in data:
        return "utf-8"
    first, second = data[::2].count(0), data[1::2].count(0)
    if max(first, second) <= len(data) // 4 or min(first, second) > max(first, second) // 10:
        return "utf-8"
    return "utf-16-le" if second > first else "utf-16-be"


# --- CSV ---


def _read_csv(file: pathlib.Path, needed: tuple[str, ...]) -> Table:
    """Reads a CSV file as Python's `csv` does, strictly; every value is a text."""
    text = _read_text(file)
    limit = csv.field_size_limit(MAX_TEXT)
    try:
        separator = "\t" if file.suffix.lower() == ".tsv" else _separator(text, needed)
        records = _records(file, text, separator)
        line, header = next(records, (1, []))
        columns = _columns(file, line, header)
        rows = []
        for line, cells in records:
            if len(cells) != len(header):
                _refuse(
                    file,
                    f"the row in line {line} has {len(cells)} cells, but the header has "
                    f"{len(header)}, parted by {SEPARATORS[separator]}",
                    "Correct the row: a cell that holds the separator or a line break stands in "
                    "double quotes",
                )
            rows.append({name: cells[i] for name, i in columns.items()})
    finally:
        csv.field_size_limit(limit)
    return Table(list(columns), rows)


def _columns(file: pathlib.Path, line: int, header: list[str]) -> dict[str, int]:
    """Returns {name: position} of a header's columns; those without a name are left out."""
    if len(header) > MAX_COLUMNS:
        _refuse(file, f"line {line} names {len(header):,} columns, more than {MAX_COLUMNS:,}")
    columns: dict[str, int] = {}
    for i, name in enumerate(map(str.strip, header)):
        if name in columns:
            _refuse(
                file,
                f"line {line} names column {shown(name)} twice (cells {columns[name] + 1} and "
                f"{i + 1})",
                "Rename one of them",
            )
        if name:
            columns[name] = i
    return columns


def _separator(text: str, needed: tuple[str, ...]) -> str:
    """Returns the separator by which a header names most of the needed columns, then most cells."""

    def found(separator: str) -> tuple[int, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        try:
            header = next((cells for cells in reader if cells), [])
        except csv.Error:  # the strict reading says where
            return 0, 0
        names = {name.strip() for name in header}
        return sum(name in names for name in needed), len(header)

    return max(SEPARATORS, key=found)


def _records(file: pathlib.Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line where it starts, cells) of each record; empty lines are none."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger" in str(error):
                problem = f"has a cell of more than {MAX_TEXT:,} characters"
            elif "end of data" in str(error):
                problem = "opens a quote that is never closed"
            else:
                problem = "has a quoted cell with more text behind its closing quote"
            _refuse(
                file,
                f"the row in line {line} {problem}",
                "Close every quoted cell, and write a double quote inside one twice",
            )
        if cells:
            yield line, cells


# --- JSON ---


def _read_json(file: pathlib.Path) -> Table:
    """Reads a list of objects, or objects one behind another, such as one a line."""
    text = _read_text(file)
    values = list(_values(file, text))
    if len(values) == 1 and isinstance(values[0][1], list):
        line, items = values[0]
        rows = [(f"item {i} (from 0)", item) for i, item in enumerate(items)]
    else:
        rows = [(f"line {line}", value) for line, value in values]
    for where, row in rows:
        if not isinstance(row, dict):
            _refuse(
                file,
                f"{where} holds {shown(row)}, but an object is needed there",
                "Write a list of objects, or one object a line",
            )
    if _SURROGATE.search(text):
        for where, row in rows:
            _check_surrogates(file, where, row)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    return Table(columns, [row for _, row in rows])


def _values(file: pathlib.Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yields (line where it starts, value) of each JSON value of a text."""
    decoder = json.JSONDecoder(
        object_pairs_hook=_object, parse_float=Number, parse_constant=_constant
    )
    line, counted, position = 1, 0, _space_end(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            _refuse(
                file,
                f"what starts in line {line} is no JSON: {error.msg} (line {error.lineno}, column "
                f"{error.colno})",
                "Correct the line",
            )
        except RecursionError:
            _refuse(file, f"what starts in line {line} is nested too deeply", "Write it flat")
        except _BadValue as error:
            _refuse(file, f"what starts in line {line} holds {error}", "Correct the line")
        except ValueError:  # of `int`: more digits than Python reads
            _refuse(
                file,
                f"what starts in line {line} holds a number of thousands of digits",
                "Write it as a text in quotes",
            )
        yield line, value
        position = _space_end(text, end)


class _BadValue(ValueError):
    """A value that `json` reads and we do not."""


def _space_end(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it matches nothing, too
    return match.end()


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """Builds an object; refuses a name that stands twice, of which `json` would drop the first."""
    built = dict(pairs)
    if len(built) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _BadValue(f"an object that names {shown(twice)} twice")
    return built


def _constant(name: str) -> NoReturn:
    raise _BadValue(f"{name}, which JSON does not have: write null, or a text in quotes")


def _check_surrogates(file: pathlib.Path, where: str, row: dict) -> None:
    """Refuses half of a character: no tokenizer can read it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        _refuse(file, f"{where} holds {half}, which is half a character", "Correct the text")


# --- parquet ---


def _read_parquet(file: pathlib.Path) -> Table:
    """Reads a parquet file; values have the file's types."""
    import pyarrow.parquet  # here, not above: other kinds and embedded tasks do without it

    try:
        table = pyarrow.parquet.ParquetFile(file).read()
        rows = table.to_pylist() if len(set(table.column_names)) == table.num_columns else None
    except Exception as error:  # the reader's errors have no common type
        line = (str(error).splitlines() or [""])[0].rstrip(". ")
        _refuse(file, f"{type(error).__name__}: {line[:200]}")
    if rows is None:
        _refuse(file, f"a column stands twice in {listed(table.column_names)}", "Rename one")
    return Table(table.column_names, rows)
