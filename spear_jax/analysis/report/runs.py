"""The runs of a report under their labels, their results, and their differing fields."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from spear_jax.analysis import comparison
from spear_jax.analysis import runs as run_files
from spear_jax.core.errors import UserError

Folder = str | pathlib.Path
MB = 1e6
PHASES = ("rollout", "train", "aggregate", "eval", "checkpoint")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run folder, finished or not.

    Attributes:
        name: unlike that of any other run of the report.
        label: the row of tables and the line of figures that it belongs to: a label of `compare`,
            else its name.
        folder: the run folder.
        table: its metrics, one row a round (`analysis.load_metrics`).
        config: its resolved config, flat; empty where config.json is missing.
        finished: whether it has ended.
        versions: of Python and packages, as `compare` or the run's newest start recorded them.
        gold: the gold text that its method trains on, as compare.json has it; None where there is
            none.
    """

    name: str
    label: str
    folder: pathlib.Path
    table: pd.DataFrame
    config: dict[str, Any]
    finished: bool
    versions: dict[str, str]
    gold: str | None

    @property
    def rounds(self) -> int:
        """Returns the rounds finished."""
        return int(self.table["round"].max())

    @property
    def graded(self) -> bool:
        """Returns whether answers of its task are right or wrong.

        Other tasks are evaluated by likelihood.
        """
        return "eval/nll" not in self.table

    def total(self, metric: str) -> float:
        """Returns a metric's sum over rounds; NaN where the run has none."""
        return float(self.table[metric].sum()) if metric in self.table else math.nan


def find_runs(workdirs: list[Folder]) -> tuple[list[Run], list[str]]:
    """Returns the runs of run folders and of `compare` folders, and the names of those begun.

    A begun run has no evaluated round so far.

    Raises: UserError for a folder that is neither, and where no run has been evaluated.
    """
    folders = list(dict.fromkeys(pathlib.Path(workdir).resolve() for workdir in workdirs))
    runs, begun = [], []
    for folder, name in zip(folders, _short_names(folders), strict=True):
        for label, run_name, cell, request in _cells(folder, name, alone=len(folders) == 1):
            lines = run_files.read_lines(cell / "metrics.jsonl")
            if any("eval/accuracy" in line for line in lines):
                runs.append(_read(label, run_name, cell, request))
            else:
                begun.append(run_name)
    if not runs:
        raise UserError(
            f"no run of {', '.join(map(str, workdirs))} has been evaluated; wait for the first "
            f"evaluation."
        )
    return runs, begun


def _cells(
    folder: pathlib.Path, name: str, alone: bool
) -> list[tuple[str, str, pathlib.Path, dict[str, Any]]]:
    if (folder / "metrics.jsonl").is_file():
        return [(name, name, folder, {})]
    if not any(folder.glob("*/seed*/metrics.jsonl")):
        raise UserError(
            f"{folder} holds no metrics.jsonl and no LABEL/seedK/metrics.jsonl; give the "
            f"--workdir of a `train` or `compare` "
            "command that has begun."
        )
    request = run_files.read_request(folder) if (folder / "compare.json").is_file() else {}
    before = "" if alone else f"{name}/"
    return [
        (f"{before}{label}", f"{before}{label}/seed{seed}", cell, request)
        for label, seed, cell in run_files.find_cells(folder)
    ]


def _read(label: str, name: str, folder: pathlib.Path, request: dict[str, Any]) -> Run:
    table = run_files.load_metrics(folder)
    for way in ("up", "down"):
        if f"round/bytes_{way}" in table:
            table[f"total/mb_{way}"] = table[f"round/bytes_{way}"].fillna(0.0).cumsum() / MB
    asked = (
        request["labels"][folder.parent.name]
        if folder.parent.name in request.get("labels", {})
        else {}
    )
    config = run_files.load_config(folder) if (folder / "config.json").is_file() else {}
    return Run(
        name,
        label,
        folder,
        table,
        config,
        run_files.is_finished(folder),
        request.get("versions") or _recorded_versions(folder),
        asked.get("gold"),
    )


def _recorded_versions(folder: pathlib.Path) -> dict[str, str]:
    """Returns the versions of a run's newest start; {} where none is recorded, or not whole."""
    try:
        lines = (folder / "environment.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["versions"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _short_names(folders: list[pathlib.Path]) -> list[str]:
    """Returns the last part of each path, or as many parts as tell all of them apart."""
    deepest = max(len(folder.parts) for folder in folders)
    for parts in range(1, deepest + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the folders are different")


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    """Returns the runs that count for each label: the finished ones, or all where none is."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return {
        label: [run for run in group if run.finished] or group for label, group in groups.items()
    }


def results(runs: list[Run]) -> pd.DataFrame:
    """Returns one row a label, best last accuracy first: means over the runs that count.

    Columns: label, finished and runs (numbers of runs), gold, before, after, low, high (95 %
        interval of `after`: of one run the score interval over the test questions, of several the t
        interval over seeds, cut to [0, 1]), best, rounds, tokens (generated), wins, loses, seconds
        (rollout, training, aggregation), mb_up, mb_down, wall (seconds from the first to the last
        line of metrics.jsonl).
    """
    rows = []
    for label, group in by_label(runs).items():
        every = [run for run in runs if run.label == label]
        cells = [_result(run) for run in group]
        means = {name: float(np.mean([cell[name] for cell in cells])) for name in cells[0]}
        low, high = _interval(group, means["after"])
        counts = {
            "finished": sum(run.finished for run in every),
            "runs": len(every),
            "gold": group[0].gold,
        }
        rows.append({"label": label} | counts | {"low": low, "high": high} | means)
    order = "label finished runs gold before after low high best rounds tokens wins loses seconds mb_up mb_down wall"
    table = pd.DataFrame(rows, columns=order.split())
    return table.sort_values(["after", "label"], ascending=[False, True], ignore_index=True)


def _result(run: Run) -> dict[str, float]:
    held = run.table["eval/accuracy"].dropna()
    return {
        "before": held.iloc[0],
        "after": held.iloc[-1],
        "best": held.max(),
        "rounds": run.rounds,
        "tokens": run.total("rollout/tokens"),
        "wins": run.total("rollout/wins"),
        "loses": run.total("rollout/loses"),
        "seconds": sum(run.total(f"time/{phase}") for phase in PHASES[:3]),
        "mb_up": run.total("round/bytes_up") / MB,
        "mb_down": run.total("round/bytes_down") / MB,
        "wall": run.table["time"].max() - run.table["time"].min(),
    }


def _interval(group: list[Run], after: float) -> tuple[float, float]:
    if len(group) == 1:
        return run_files.wilson(after, group[0].table["eval/count"].dropna().iloc[-1])
    half = comparison.half_width([_result(run)["after"] for run in group])
    return max(0.0, after - half), min(1.0, after + half)


def label_configs(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Returns the config of each label, as text.

    A field that differs between its seeds has all their values.
    """
    by_label: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(run.label for run in runs):
        configs = [run.config for run in runs if run.label == label and run.config]
        names = dict.fromkeys(name for config in configs for name in config)
        by_label[label] = {
            name: ", ".join(
                dict.fromkeys(_as_text(config[name]) for config in configs if name in config)
            )
            for name in names
        }
    return {label: config for label, config in by_label.items() if config}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def differences(runs: list[Run], default: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the fields whose values differ between labels, and those that all share.

    Of the latter only those unlike the default are listed.

    Args: default: the flat default config; fields that it lacks, and a label lacks, are "-".
    Returns: (field, default, one column a label), (field, default, value).
    """
    configs = label_configs(runs)
    usual = {name: _as_text(value) for name, value in default.items()}
    between, common = [], []
    for name in dict.fromkeys(name for config in configs.values() for name in config):
        values = [config.get(name, "-") for config in configs.values()]
        row = [name, usual.get(name, "-")]
        if len(set(values)) > 1:
            between.append(row + values)
        elif values[0] != row[1]:
            common.append([*row, values[0]])
    return (
        pd.DataFrame(between, columns=["field", "default", *configs]),
        pd.DataFrame(common, columns=["field", "default", "value"]),
    )
