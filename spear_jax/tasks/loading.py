"""Loading of rows: from the Hugging Face Hub by default, or from local files with the same columns."""

import functools
import math
import pathlib
import re
import zlib
from typing import Any

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.files import expanded
from spear_jax.core.types import Example
from spear_jax.tasks.base import Task
from spear_jax.tasks.files import (
    LONGEST_PATH,
    MAX_TEXT,
    SUFFIXES,
    Number,
    Table,
    listed,
    read_table,
)


def load_rows(task: Task, split: str, path: str = "") -> list[dict]:
    """Loads one split's rows, unfiltered and in file order.

    A folder holds a file per split, or its shards: `test.parquet`, `test-*.parquet` (.parquet,
    .jsonl, .json, .csv or .tsv), named as the Hub's split or ours. The rows of a single file are
    shared out. A row whose index hashes (CRC-32) to a multiple of five is in "test", the others
    (about 80 %) in "train". Local files are read anew each time, and nothing is written.

    Args:
        task: names the Hub dataset, its splits and the columns that must be there.
        split: "train" or "test".
        path: "" for the Hub, a folder, or a single file.
    Raises: UserError for an unknown split, a missing or unreadable path, a missing column, an empty
        split, or a Hub that cannot be reached.
    """
    return [row for _, row in _numbered_rows(task, _read(task, split, path), split, path)]


def load_examples(task: Task, split: str, path: str = "", limit: int = 0) -> list[Example]:
    """Loads one split as examples; the first `limit` of them (0: all).

    Raises: as `load_rows`, and UserError naming the row (counted from 0, in the file's order) whose
        content breaks the task's rules.
    """
    if limit < 0:
        raise UserError(f"example limit {limit} is negative; give 0 for all examples or a count.")
    generated = task.generate(split)
    if generated is not None:
        if path:
            raise UserError(
                f"task {task.name!r} makes its own examples, but data.path is {shown(path, LONGEST_PATH)}; leave "
                f"data.path empty."
            )
        return generated[: limit or None]
    table = _read(task, split, path)
    rows = _numbered_rows(task, table, split, path)[: limit or None]
    everything = functools.partial(_all_rows, task, table, split, path)
    return task.examples(rows, everything, f"split {split!r} of {_source(task, path)}")


def row_error(index: int, problem: str) -> UserError:
    """Returns the error for a row that breaks a rule."""
    return UserError(
        f"row {index}: {problem}. Correct or delete the row; rows are never skipped silently."
    )


def cell_text(value: Any, column: str, index: int) -> str:
    """Returns a cell as a stripped text, "" for None.

    A number of JSON keeps the text that it has in the file; true and false are "true" and "false".

    Raises: UserError for a list, an object, bytes, a number that is none, or a text of more than
        `files.MAX_TEXT` characters.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    none = isinstance(value, float) and not isinstance(value, Number) and not math.isfinite(value)
    if none or isinstance(value, (list, tuple, dict, bytes)):
        raise row_error(
            index, f"column {column!r} holds {shown(value)}, but a text is needed there"
        )
    text = str(value).strip()
    if len(text) > MAX_TEXT:
        raise row_error(
            index,
            f"column {column!r} holds {shown(text)}, but at most {MAX_TEXT:,} are read",
        )
    return text


def cell_lines(value: Any, column: str, index: int) -> list[str]:
    """Returns the stripped lines that a cell holds, as one text or as a list of texts; none empty.

    Raises: as `cell_text`.
    """
    if isinstance(value, (list, tuple)):
        lines = [cell_text(line, column, index) for line in value]
    else:
        lines = [line.strip() for line in cell_text(value, column, index).splitlines()]
    return [line for line in lines if line]


def cell_number(value: Any) -> int | None:
    """Returns the whole number that a cell holds, as a number or as its text ("2"); else None."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*(0|-?[1-9][0-9]{0,8})\s*", value) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def row_text(row: dict, column: str, index: int) -> str:
    """Returns the stripped text of a row's column; raises UserError where there is none."""
    text = cell_text(row[column], column, index)
    if not text:
        raise row_error(index, f"column {column!r} is empty, but a text is needed there")
    return text


def row_options(values: Any, index: int, column: str) -> tuple[str, ...]:
    """Returns the stripped option texts of a row.

    Raises: UserError unless they are a list of 2 to 26 texts, none empty.
    """
    if not isinstance(values, (list, tuple)):
        raise row_error(
            index, f"column {column!r} holds {shown(values)}, but a list of options is needed there"
        )
    options = tuple(cell_text(value, column, index) for value in values)
    if not 2 <= len(options) <= 26:
        raise row_error(
            index, f"{len(options)} options in column {column!r}, but 2 to 26 are needed"
        )
    if not all(options):
        raise row_error(index, f"option {options.index('') + 1} in column {column!r} is empty")
    return options


def _read(task: Task, split: str, path: str) -> Table:
    """Reads all rows of a split's files, or of the single file, and checks the columns."""
    if split not in task.splits:
        raise unknown("split", split, task.splits)
    table = _read_hub(task, split) if not path else _read_local(task, split, path)
    _check_columns(task, table, _source(task, path))
    return table


def _read_local(task: Task, split: str, path: str) -> Table:
    return read_table(_local_files(task, split, path), task.columns)


def _numbered_rows(task: Task, table: Table, split: str, path: str) -> list[tuple[int, dict]]:
    """Returns a split's rows with their index in the source."""
    rows = list(enumerate(table.rows))
    if not _is_shared(path):
        return rows
    rows = [
        (i, row) for i, row in rows if (zlib.crc32(str(i).encode()) % 5 == 0) == (split == "test")
    ]
    if not rows:
        raise UserError(
            f"split {split!r} of {_source(task, path)} is empty; a split needs at least one row. "
            f"Give a larger file, or a folder with one file per split."
        )
    return rows


def _all_rows(task: Task, table: Table, split: str, path: str) -> list[dict]:
    """Returns the rows of both splits, of which `table` holds one, or both where they share a file.

    A folder need not have both.
    """
    rows = list(table.rows)
    if not path or _is_shared(path):
        return rows
    for other in task.splits:
        files = _split_files(task, other, expanded(path))
        if other != split and files:
            rows += read_table(files, task.columns).rows
    return rows


def _source(task: Task, path: str) -> str:
    """Returns where rows come from, for messages."""
    if path or not task.hub:
        return shown(path, LONGEST_PATH)
    return f"Hub dataset {task.hub[0]!r}"


def _is_shared(path: str) -> bool:
    return bool(path) and expanded(path).is_file()


def _check_columns(task: Task, table: Table, where: str) -> None:
    """Raises UserError for the first column that the task needs and the table lacks."""
    needed = task.needed(table.columns)
    for column in needed:
        if column not in table.columns:
            raise UserError(
                f"column {shown(column)} is missing in {where}; task {task.name!r} needs "
                f"{listed(needed)}. Columns there: {listed(table.columns)}. "
                f"{_column_remedy(task, table, column)}"
            )


def _column_remedy(task: Task, table: Table, column: str) -> str:
    """Returns what to do about a column that is not there."""
    first = table.rows[0] if len(table.rows) == 1 else {}
    for name, value in first.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return (
                f"The file is one object whose {shown(name)} holds a list of {len(value)} objects: "
                f"save that list alone."
            )
    keys = [
        key for key, named in task.mapping.items() if column in map(str.strip, named.split(","))
    ]
    remedy = (
        f"Name the file's own by --config.data.columns.{keys[0]}=COLUMN."
        if keys
        else "Rename it, or take task qa, mcqa, pairs or preferences, whose columns are named by "
        "--config.data.columns."
    )
    if len(table.columns) == 1:
        remedy += " The cells of a CSV file are parted by commas, semicolons or tabs."
    return remedy


def _local_files(task: Task, split: str, path: str) -> list[pathlib.Path]:
    """Returns the files that hold a split under a local path."""
    try:
        root = expanded(path)
        if root.is_file():
            if root.suffix.lower() not in SUFFIXES:
                raise UserError(
                    f"data file {shown(path, LONGEST_PATH)} has no known ending; known: {', '.join(SUFFIXES)}."
                )
            return [root]
        files = _split_files(task, split, root) if root.is_dir() else []
        there = sorted(file.name for file in root.iterdir()) if root.is_dir() else []
    except (OSError, RuntimeError) as error:  # no right to look, a name too long, no such home
        raise UserError(
            f"data path {shown(path, LONGEST_PATH)} cannot be opened: {shown(str(error), LONGEST_PATH)}. Give a folder with "
            f"one file per split, or a single file, in config.data.path."
        ) from error
    if not root.is_dir():
        problem = "is neither a file nor a folder" if root.exists() else "does not exist"
        raise UserError(
            f"data path {shown(path, LONGEST_PATH)} {problem}. Give a folder with one file per split, a single "
            'file, or "" for the Hub in config.data.path.'
        )
    if not files:
        names = dict.fromkeys((task.splits[split], split))
        raise UserError(
            f"data folder {shown(path, LONGEST_PATH)} has no file for split {split!r}; expected "
            f"{' or '.join(names)} with one of {', '.join(SUFFIXES)}. There: "
            f"{listed(there) if there else 'nothing'}. Rename the file or change config.data.path."
        )
    return files


def _split_files(task: Task, split: str, root: pathlib.Path) -> list[pathlib.Path]:
    """Returns a folder's files of a split: one, or its shards; none where there are none."""
    for name in dict.fromkeys((task.splits[split], split)):
        for suffix in SUFFIXES:
            whole = root / f"{name}{suffix}"
            files = [whole] if whole.is_file() else sorted(root.glob(f"{name}-*{suffix}"))
            if files:
                return files
    return []


def _read_hub(task: Task, split: str) -> Table:
    """Loads a split from the Hub (or its cache)."""
    if task.hub is None:
        raise UserError(
            f"task {task.name!r} has no Hub dataset; give a local file or folder in "
            f"config.data.path."
        )
    import datasets  # here, not above: it takes seconds to import, and local files do without it

    try:
        rows = datasets.load_dataset(*task.hub, split=task.splits[split])
    except Exception as error:  # offline, unreachable, moved and gated all differ in type
        why = f"could not be loaded: {_first_line(error)}. Check the network"
        if datasets.config.HF_HUB_OFFLINE:
            why = (
                f"is not in the datasets cache ({datasets.config.HF_DATASETS_CACHE}), and asking "
                f"the Hub is off (--offline or "
                "HF_HUB_OFFLINE). Load it once with the network"
            )
        raise UserError(
            f"Hub dataset {task.hub[0]!r} {why}, or set config.data.path to a local folder with "
            f"{task.splits['train']}.parquet and {task.splits['test']}.parquet (or .jsonl, "
            f".json, .csv) in the Hub's columns."
        ) from error
    return Table(rows.column_names, list(rows))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(".: ")
