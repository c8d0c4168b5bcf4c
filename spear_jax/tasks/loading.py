"""Loading of rows: from the Hugging Face Hub by default, or from local files with the same columns."""

import pathlib
import zlib
from typing import Any

from spear_jax.core.errors import UserError, unknown
from spear_jax.core.types import Example
from spear_jax.tasks.base import Task

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


def load_rows(task: Task, split: str, path: str = "") -> list[dict]:
    """Loads one split's rows, unfiltered and in file order.

    A folder holds a file per split, or its shards: `test.parquet`, `test-*.parquet` (.parquet,
    .jsonl, .json or .csv), named as the Hub's split or ours. The rows of a single file are shared
    out. A row whose index hashes (CRC-32) to a multiple of five is in "test", the others (about 80
    %) in "train".

    Args:
        task: names the Hub dataset, its splits and the columns that must be there.
        split: "train" or "test".
        path: "" for the Hub, a folder, or a single file.
    Raises: UserError for an unknown split, a missing or unreadable path, a missing column, an empty
        split, or a Hub that cannot be reached.
    """
    return [row for _, row in _numbered_rows(task, split, path)]


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
                f"task {task.name!r} makes its own examples, but data.path is {path!r}; leave "
                f"data.path empty."
            )
        return generated[: limit or None]
    rows = _numbered_rows(task, split, path)
    return [task.example(row, index) for index, row in rows[: limit or None]]


def row_error(index: int, problem: str) -> UserError:
    """Returns the error for a row that breaks a rule."""
    return UserError(
        f"row {index}: {problem}. Correct or delete the row; rows are never skipped silently."
    )


def row_text(row: dict, column: str, index: int) -> str:
    """Returns the stripped text of a row's column; raises UserError where there is none."""
    value = row[column]
    if value is None or not str(value).strip():
        raise row_error(index, f"column {column!r} is empty, but a text is needed there")
    return str(value).strip()


def row_options(values: Any, index: int, column: str) -> tuple[str, ...]:
    """Returns the stripped option texts of a row.

    Raises: UserError unless they are a list of 2 to 26 texts, none empty.
    """
    if not isinstance(values, (list, tuple)):
        raise row_error(
            index, f"column {column!r} holds {values!r}, but a list of options is needed there"
        )
    options = tuple("" if value is None else str(value).strip() for value in values)
    if not 2 <= len(options) <= 26:
        raise row_error(
            index, f"{len(options)} options in column {column!r}, but 2 to 26 are needed"
        )
    if not all(options):
        raise row_error(index, f"option {options.index('') + 1} in column {column!r} is empty")
    return options


def _numbered_rows(task: Task, split: str, path: str) -> list[tuple[int, dict]]:
    """Returns rows with their index in the source, checked for columns and emptiness."""
    if split not in task.splits:
        raise unknown("split", split, task.splits)
    shared = bool(path) and pathlib.Path(path).expanduser().is_file()
    table = _read_files(_local_files(task, split, path)) if path else _read_hub(task, split)
    where = repr(path) if path else f"Hub dataset {task.hub[0]!r}"
    _check_columns(task, table.column_names, where)
    rows = list(enumerate(table))
    if shared:
        rows = [
            (i, row)
            for i, row in rows
            if (zlib.crc32(str(i).encode()) % 5 == 0) == (split == "test")
        ]
    if not rows:
        remedy = (
            "Give a larger file, or a folder with one file per split."
            if shared
            else "Give a file with rows."
        )
        raise UserError(
            f"split {split!r} of {where} is empty; a split needs at least one row. {remedy}"
        )
    return rows


def _check_columns(task: Task, there: list[str], where: str) -> None:
    """Raises UserError for the first column that the task needs and the table lacks."""
    for column in task.columns:
        if column not in there:
            raise UserError(
                f"column {column!r} is missing in {where}; task {task.name!r} needs "
                f"{', '.join(task.columns)}. Columns there: {', '.join(there) or 'none'}. Rename "
                f"it, or "
                "name your own columns in config.data.columns with task mcqa, pairs or preferences."
            )


def _local_files(task: Task, split: str, path: str) -> list[pathlib.Path]:
    """Returns the files that hold a split under a local path."""
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise UserError(
            f"data path {path!r} does not exist. Give a folder with one file per split, a single "
            f"file, "
            'or "" for the Hub in config.data.path.'
        )
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise UserError(
                f"data file {path!r} has no known ending; known: {', '.join(SUFFIXES)}."
            )
        return [root]
    names = list(dict.fromkeys((task.splits[split], split)))
    for name in names:
        for suffix in SUFFIXES:
            files = [root / f"{name}{suffix}"] if (root / f"{name}{suffix}").is_file() else []
            files = files or sorted(root.glob(f"{name}-*{suffix}"))
            if files:
                return files
    there = ", ".join(sorted(file.name for file in root.iterdir())) or "nothing"
    raise UserError(
        f"data folder {path!r} has no file for split {split!r}; expected {' or '.join(names)} "
        f"with one of "
        f"{', '.join(SUFFIXES)}. There: {there}. Rename the file or change config.data.path."
    )


def _is_empty(file: pathlib.Path) -> bool:
    """Returns whether a file has no bytes, or is a parquet file without rows.

    The reader refuses the latter with an error of its own.
    """
    if file.stat().st_size == 0:
        return True
    if file.suffix != ".parquet":
        return False
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file).num_rows == 0
    except pyarrow.ArrowInvalid:
        return False  # not a parquet file: the reader says so


def _read_files(files: list[pathlib.Path]):
    """Reads files of one kind into a `datasets.Dataset`."""
    import datasets  # here, not above: it takes seconds to import, and embedded tasks do without it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our own error says it once
    suffix = files[0].suffix
    table = datasets.Dataset
    read = {
        ".parquet": table.from_parquet,
        ".csv": table.from_csv,
        ".jsonl": table.from_json,
        ".json": table.from_json,
    }
    if all(_is_empty(file) for file in files):
        raise UserError(
            f"data file '{files[0]}' is empty; a split needs at least one row. Give a file with "
            f"rows."
        )
    try:
        return read[suffix]([str(file) for file in files])
    except Exception as error:  # the reader's errors have no common type
        raise UserError(
            f"data file '{files[0]}' cannot be read as {suffix}: {_first_line(error)}. "
            "Check the file, or save it as .parquet or .jsonl."
        ) from error


def _read_hub(task: Task, split: str):
    """Loads a split from the Hub (or its cache) as a `datasets.Dataset`."""
    if task.hub is None:
        raise UserError(
            f"task {task.name!r} has no Hub dataset; give a local file or folder in "
            f"config.data.path."
        )
    import datasets  # here, not above: it takes seconds to import, and embedded tasks do without it

    try:
        return datasets.load_dataset(*task.hub, split=task.splits[split])
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


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(".: ")
