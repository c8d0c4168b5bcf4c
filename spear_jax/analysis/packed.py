"""A comparison as one small file, so that its table and figure can be made without its runs.

pack("runs/methods", "methods.json")       # the numbers of every round, what was asked, the configs
unpack("methods.json", "again")            # a folder that `comparison` reads like runs/methods
comparison.grid_table("again")
"""

import json
import pathlib
from typing import Any

from spear_jax.analysis import runs
from spear_jax.analysis.runs import Folder
from spear_jax.core.errors import UserError
from spear_jax.core.files import read_json_object, write_whole
from spear_jax.core.records import read_lines

# What tables and figures read, and what a reader asks of a round.
METRICS = (
    "round",
    "eval/accuracy",
    "eval/count",
    "eval/stderr",
    "rollout/first_accuracy",
    "rollout/fixed",
    "rollout/wins",
    "rollout/loses",
    "train/loss",
    "train/win_nll",
    "train/unlikelihood",
    "round/rate",
    "round/bytes_up",
    "round/bytes_down",
    "round/aggregation_error",
    "round/compression_error",
    "round/failed",
    "attack/weight_share",
    "privacy/epsilon",
    "sim/clock",
    "budget/tokens",
    "budget/flops",
    "budget/seconds",
    "compile/seconds",
)


def pack(folder: Folder, file: Folder) -> dict[str, int]:
    """Writes the finished runs of a folder of `compare` into one JSON file.

    The file holds the request (task, budget, seeds, labels), versions and devices, the config of the
    first run, what every label has instead, and the metrics of every round, rounded to six digits.
    Of a path it keeps the last part.

    Returns: the number of runs and of rounds.
    Raises: UserError for a folder without a finished run.
    """
    cells = [cell for cell in runs.find_cells(folder) if runs.is_finished(cell[2])]
    if not cells:
        raise UserError(f"no run of {folder} has finished yet; the same compare command goes on.")
    configs = {label: _config(cell) for label, _, cell in reversed(cells)}
    common = configs[cells[0][0]]
    lines = [
        (label, seed, line)
        for label, seed, cell in cells
        for line in read_lines(cell / "metrics.jsonl")
    ]
    metrics = [name for name in METRICS if any(name in line for *_, line in lines)]
    rows = [
        [label, seed, *(_rounded(line.get(name)) for name in metrics)]
        for label, seed, line in lines
    ]
    request = runs.read_request(folder)
    request["overrides"] = [_without_folder(text) for text in request["overrides"]]
    packed = {
        "request": request,
        "environment": _environment(cells[0][2]),
        "config": common,
        "differences": {
            label: {name: value for name, value in config.items() if common.get(name) != value}
            for label, config in configs.items()
        },
        "columns": ["label", "seed", *metrics],
    }
    head = json.dumps(packed, indent=1).removesuffix("\n}")
    body = ",\n".join(json.dumps(row) for row in rows)
    write_whole(pathlib.Path(file), f'{head},\n "rows": [\n{body}\n ]\n}}\n')
    return {"runs": len(cells), "rounds": len(rows)}


def unpack(file: Folder, folder: Folder) -> dict[str, Any]:
    """Writes a packed comparison as the folder of one; returns what the file holds but for the rows.

    The file names its metrics: those of METRICS that its runs have.

    Raises: UserError for a file that is none.
    """
    packed = read_json_object(pathlib.Path(file))
    root = pathlib.Path(folder)
    lines: dict[pathlib.Path, list[str]] = {}
    metrics = packed["columns"][2:]
    for label, seed, *values in packed.pop("rows"):
        found = {
            name: value for name, value in zip(metrics, values, strict=True) if value is not None
        }
        lines.setdefault(root / label / f"seed{seed}", []).append(json.dumps({"time": 0.0} | found))
    for cell, told in lines.items():
        cell.mkdir(parents=True, exist_ok=True)
        write_whole(cell / "metrics.jsonl", "\n".join(told) + "\n")
        write_whole(cell / "summary.json", "{}\n")  # it has finished
    write_whole(root / "compare.json", json.dumps(packed["request"], indent=1))
    return packed


def _environment(cell: pathlib.Path) -> dict[str, Any]:
    """Returns the versions, the commit and the devices of a run's first process."""
    with open(cell / "environment.jsonl", encoding="utf-8") as lines:
        found = json.loads(next(lines))
    return {name: found[name] for name in ("versions", "commit", "devices")}


def _config(cell: Folder) -> dict[str, Any]:
    return {
        name: _without_folder(value) if isinstance(value, str) else value
        for name, value in runs.load_config(cell).items()
    }


def _without_folder(text: str) -> str:
    """Returns a path, or "--config.NAME=PATH", with the last part of an absolute path alone."""
    name, equals, value = text.rpartition("=")
    return f"{name}{equals}{pathlib.Path(value).name}" if value.startswith("/") else text


def _rounded(value: float | None) -> float | None:
    """Returns a number with six significant digits; a whole one as an int."""
    if value is None:
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() else short
