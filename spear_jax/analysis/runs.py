"""Run folders as tidy tables and figures.

It reads files only, needs no JAX, and works while a run is going.
"""

import gzip
import json
import pathlib
import zlib
from typing import Any

import pandas as pd

from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import damaged, read_json_object
from spear_jax.core.records import (
    read_lines,  # offered from here, too, as is wilson
    wilson,
)

Folder = str | pathlib.Path

# Okabe-Ito: distinct for readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def load_metrics(workdir: str | pathlib.Path) -> pd.DataFrame:
    """Loads metrics.jsonl as a table with one row a round and the metric names as columns.

    A round that is still being written is left out.

    Raises: UserError where the folder holds no metrics.
    """
    file = pathlib.Path(workdir) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(
            f"{workdir} holds no metrics.jsonl; give the --workdir of a `train` command."
        )
    rows = read_lines(file)
    if not rows:
        raise UserError(f"{file} is empty so far; wait for the first evaluation to finish.")
    return pd.DataFrame(rows)


def load_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Loads the resolved config as flat {"a.b": value}.

    Groups become parts of the name:

        {"lora": {"rank": 16}}  ->  {"lora.rank": 16}
    """
    nested = read_json_object(pathlib.Path(workdir) / "config.json")
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{name}.", value)
            else:
                flat[f"{prefix}{name}"] = value

    walk("", nested)
    return flat


def load_runs(workdirs: list[str | pathlib.Path]) -> pd.DataFrame:
    """Loads several runs as one tidy table: columns run, round, metric, value."""
    tables = []
    for workdir in workdirs:
        table = (
            load_metrics(workdir).melt(id_vars=["round"], var_name="metric").dropna(subset="value")
        )
        tables.append(table.assign(run=pathlib.Path(workdir).name))
    return pd.concat(tables, ignore_index=True)[["run", "round", "metric", "value"]]


def load_traces(workdir: str | pathlib.Path, round: int) -> list[dict[str, Any]]:
    """Loads the recorded traces of a round; raises UserError where there are none."""
    file = pathlib.Path(workdir) / "traces" / f"round_{round:05d}.jsonl.gz"
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; traces are written with config.record_traces=True."
        )
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise damaged(file, f"cannot be read ({shown(str(error))})") from error


def find_cells(folder: Folder) -> list[tuple[str, int, pathlib.Path]]:
    """Finds the runs of a grid that were started: (label, seed, run folder), by label and seed.

    Raises: UserError where there is none.
    """
    cells = []
    for file in pathlib.Path(folder).glob("*/seed*/metrics.jsonl"):
        number = file.parent.name.removeprefix("seed")
        if number.isdecimal():
            cells.append((file.parent.parent.name, int(number), file.parent))
    if not cells:
        raise UserError(
            f"{folder} holds no LABEL/seedK/metrics.jsonl; give the --workdir of a `compare` or "
            f"sweep command that has begun."
        )
    return sorted(cells)


def is_finished(cell: Folder) -> bool:
    """Returns whether the run of a folder has ended."""
    return (pathlib.Path(cell) / "summary.json").is_file()


def read_request(folder: Folder, command: str = "compare") -> dict[str, Any]:
    """Reads the request of a grid from its compare.json or sweep.json.

    Raises: UserError where there is none.
    """
    file = pathlib.Path(folder) / f"{command}.json"
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {file.name}; give the --workdir of a `{command}` command."
        )
    return read_json_object(file)


def cell_result(cell: Folder) -> dict[str, float]:
    """Returns the accuracy that one run of a grid reached, and the budget that it used.

    Returns: before, accuracy (first and last held-out accuracy); stderr and count (questions) of
        the last; tokens (generated), flops, seconds (rollout, training, aggregation), compiling (of
        those seconds), bytes (up and down), rounds: totals.
    """
    lines = read_lines(pathlib.Path(cell) / "metrics.jsonl")
    held = [line for line in lines if "eval/accuracy" in line]
    rounds, last = lines[1:], lines[-1]  # round 0 is an evaluation alone
    return {
        "before": held[0]["eval/accuracy"],
        **{name: held[-1][f"eval/{name}"] for name in ("accuracy", "stderr", "count")},
        **{
            name: last[f"budget/{name}"] if rounds else 0.0
            for name in ("tokens", "flops", "seconds")
        },
        "bytes": sum(line["round/bytes_up"] + line["round/bytes_down"] for line in rounds),
        "rounds": last["round"],
        "compiling": sum(line["compile/seconds"] for line in rounds if "compile/seconds" in line),
    }


def load_sweep(folder: Folder) -> pd.DataFrame:
    """Loads the finished runs of launch/sweep.py or launch/sweep_clients.py, one row each.

    Returns: a column for every swept field by its full name (federation.num_clients), seed, and
        those of `cell_result`.
    Raises: UserError for a folder of something else, or without a finished run.
    """
    fields = read_request(folder, "sweep")["fields"]
    rows = []
    for _, seed, cell in find_cells(folder):
        if is_finished(cell):
            config = load_config(cell)
            values = {name: config[name] for name in fields}
            values = {
                name: ",".join(map(str, x)) if isinstance(x, list) else x
                for name, x in values.items()
            }
            rows.append(values | {"seed": seed} | cell_result(cell))
    if not rows:
        raise UserError(f"no cell of {folder} has finished yet; the same sweep command goes on.")
    return pd.DataFrame(rows).sort_values([*fields, "seed"], ignore_index=True)


def summarise(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Returns the content of summary.json."""
    table = load_metrics(workdir)
    accuracy = table.dropna(subset="eval/accuracy")
    best = accuracy.loc[accuracy["eval/accuracy"].idxmax()]

    def at(row: pd.Series) -> dict[str, float]:
        return {
            "round": int(row["round"]),
            "accuracy": float(row["eval/accuracy"]),
            "stderr": float(row["eval/stderr"]),
            "count": int(row["eval/count"]),
        }

    def total(name: str) -> float:
        return float(table[name].sum()) if name in table else 0.0

    seconds = {
        name: total(f"time/{name}")
        for name in ("rollout", "train", "aggregate", "eval", "checkpoint", "round")
    }
    seconds["compile"] = total("compile/seconds")  # a part of the others
    personal = pathlib.Path(workdir) / "personal.json"  # of clients that trained on by themselves
    return {
        **({"personal": read_json_object(personal)} if personal.is_file() else {}),
        "rounds": int(table["round"].max()),
        "eval": {"first": at(accuracy.iloc[0]), "best": at(best), "last": at(accuracy.iloc[-1])},
        "seconds": seconds,
        "tokens": {"rollout": total("rollout/tokens")},
        "bytes": {"up": total("round/bytes_up"), "down": total("round/bytes_down")},
    }


def round_table(workdir: str | pathlib.Path) -> str:
    """Returns the evaluated rounds as a table for a terminal."""
    table = load_metrics(workdir)
    rows = table[table["eval/accuracy"].notna()]
    wanted = {
        "round": "round",
        "eval/accuracy": "accuracy",
        "eval/stderr": "± se",
        "rollout/first_accuracy": "first right",
        "rollout/fixed": "fixed",
        "rollout/wins": "wins",
        "rollout/loses": "loses",
        "train/loss": "loss",
        "time/round": "seconds",
        "compile/seconds": "compiling",
    }
    shown = rows[[name for name in wanted if name in rows]].rename(columns=wanted)
    return shown.to_string(index=False, float_format=lambda x: f"{x:.3f}", na_rep="-")


def plot_accuracy(workdirs: list[str | pathlib.Path], path: str | pathlib.Path) -> None:
    """Draws held-out accuracy against the round, with 95 % intervals.

    A single run also gets its rollouts' first-answer accuracy as a thin line.
    """
    from matplotlib.figure import Figure  # not pyplot, whose backend is the notebook's

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for index, workdir in enumerate(workdirs):
        colour = COLOURS[index % len(COLOURS)]
        table = load_metrics(workdir)
        held = table.dropna(subset="eval/accuracy")
        low, high = zip(
            *(wilson(p, n) for p, n in zip(held["eval/accuracy"], held["eval/count"], strict=True)),
            strict=True,
        )
        label = pathlib.Path(workdir).name if len(workdirs) > 1 else "held-out"
        axes.plot(
            held["round"],
            held["eval/accuracy"],
            color=colour,
            marker="o",
            markersize=4,
            label=label,
        )
        axes.fill_between(held["round"], low, high, color=colour, alpha=0.2, linewidth=0)
        if len(workdirs) == 1 and "rollout/first_accuracy" in table:
            rolled = table.dropna(subset="rollout/first_accuracy")
            axes.plot(
                rolled["round"],
                rolled["rollout/first_accuracy"],
                color=COLOURS[1],
                linewidth=1,
                label="first answers, sampled",
            )
    axes.set(
        xlabel="round",
        ylabel="accuracy (band: 95 % interval)",
        ylim=(0, 1),
        title="Accuracy against round",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
