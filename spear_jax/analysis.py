"""Run folders -> tidy tables and figures. Reads files only; needs no JAX and works while a run is going."""

import gzip
import json
import math
import pathlib
from typing import Any

import pandas as pd

from spear_jax.errors import UserError

# Okabe-Ito: told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a last line that is still being written, or was cut short, is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def load_metrics(workdir: str | pathlib.Path) -> pd.DataFrame:
    """metrics.jsonl as a table with one row a round and the metric names as columns; a round in writing is left out.

    Raises: UserError where the folder holds no metrics.
    """
    file = pathlib.Path(workdir) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{workdir} holds no metrics.jsonl; give the --workdir of a `train` command.")
    rows = read_lines(file)
    if not rows:
        raise UserError(f"{file} is empty so far; wait for the first evaluation to finish.")
    return pd.DataFrame(rows)


def load_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """The resolved config as flat {"a.b": value}."""
    nested = json.loads((pathlib.Path(workdir) / "config.json").read_text())
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
    """Several runs in one tidy table: columns run, round, metric, value."""
    tables = []
    for workdir in workdirs:
        table = load_metrics(workdir).melt(id_vars=["round"], var_name="metric").dropna(subset="value")
        tables.append(table.assign(run=pathlib.Path(workdir).name))
    return pd.concat(tables, ignore_index=True)[["run", "round", "metric", "value"]]


def load_traces(workdir: str | pathlib.Path, round: int) -> list[dict[str, Any]]:
    """The recorded traces of a round; raises UserError where there are none."""
    file = pathlib.Path(workdir) / "traces" / f"round_{round:05d}.jsonl.gz"
    if not file.is_file():
        raise UserError(f"{file} does not exist; traces are written with config.record_traces=True.")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_tokens(workdir: str | pathlib.Path, round: int) -> pd.DataFrame:
    """The first answers of a round's traces by token, one row a token.

    Returns: columns trace (its number in the round), client, example, role, confidence, position (from 0), id, token (its own
        text), probability (under the rollout policy, untempered) and touched: whether unlikelihood may touch it; <NA> where
        unlikelihood reads none of the sampled ids.
    """
    tables = []
    for number, trace in enumerate(load_traces(workdir, round)):
        about = {name: trace[name] for name in ("client", "example", "role", "confidence")}
        table = pd.DataFrame({"trace": number, **about, **trace["tokens"]})
        tables.append(table.assign(position=range(len(table)), touched=table["touched"].astype("boolean")))
    if not tables:
        raise UserError(f"nothing was asked in round {round} of {workdir}; its method generates no answers.")
    found = pd.concat(tables, ignore_index=True).rename(columns={"text": "token"})
    found["probability"] = found.pop("logprob").map(math.exp)
    return found[
        ["trace", "client", "example", "role", "confidence", "position", "id", "token", "probability", "touched"]
    ]


def load_scores(workdir: str | pathlib.Path, round: int) -> pd.DataFrame:
    """What `score --traces=ROUND` wrote: the same tokens under other rounds' adapters, one row a token and adapter.

    Returns: columns adapter (the round whose adapter scored), trace, position, probability; joins `load_tokens` on trace and
        position.
    """
    file = pathlib.Path(workdir) / "scores" / f"round_{round:05d}.jsonl.gz"
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; `python -m spear_jax.score --workdir={workdir} --traces={round}` makes it."
        )
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        table = pd.DataFrame(map(json.loads, lines))
    table["position"] = table["logprob"].map(lambda values: list(range(len(values))))
    table = table.explode(["logprob", "position"], ignore_index=True)
    table["probability"] = table.pop("logprob").map(math.exp)
    return table.astype({"position": int})


def summarise(workdir: str | pathlib.Path) -> dict[str, Any]:
    """The content of summary.json."""
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

    seconds = {name: total(f"time/{name}") for name in ("rollout", "train", "aggregate", "eval", "checkpoint", "round")}
    return {
        "rounds": int(table["round"].max()),
        "eval": {"first": at(accuracy.iloc[0]), "best": at(best), "last": at(accuracy.iloc[-1])},
        "seconds": seconds,
        "tokens": {"rollout": total("rollout/tokens")},
        "bytes": {"up": total("round/bytes_up"), "down": total("round/bytes_down")},
    }


def round_table(workdir: str | pathlib.Path) -> str:
    """The evaluated rounds as a table for a terminal."""
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
    }
    shown = rows[[name for name in wanted if name in rows]].rename(columns=wanted)
    return shown.to_string(index=False, float_format=lambda x: f"{x:.3f}", na_rep="-")


def plot_accuracy(workdirs: list[str | pathlib.Path], path: str | pathlib.Path) -> None:
    """Held-out accuracy against the round, with 95 % intervals, and the rollouts' first-answer accuracy as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for index, workdir in enumerate(workdirs):
        colour = COLOURS[index % len(COLOURS)]
        table = load_metrics(workdir)
        held = table.dropna(subset="eval/accuracy")
        low, high = zip(
            *(wilson(p, n) for p, n in zip(held["eval/accuracy"], held["eval/count"], strict=True)), strict=True
        )
        label = pathlib.Path(workdir).name if len(workdirs) > 1 else "held-out"
        axes.plot(held["round"], held["eval/accuracy"], color=colour, marker="o", markersize=4, label=label)
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
    axes.set(xlabel="round", ylabel="accuracy (band: 95 % interval)", ylim=(0, 1), title="Accuracy against round")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def wilson(p: float, n: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % score interval of a fraction p of n."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


# (title, y label, {metric: label}) of the panels of `plot_run`
_PANELS = (
    ("Rollouts", "count", {"rollout/wins": "wins", "rollout/loses": "loses kept"}),
    ("Feedback", "fraction", {"rollout/first_accuracy": "first answer right", "rollout/fixed": "wrong ones fixed"}),
    ("Losses", "nats per token", {"train/win_nll": "win NLL", "train/unlikelihood": "unlikelihood"}),
    (
        "Time",
        "seconds",
        {f"time/{name}": name for name in ("rollout", "train", "aggregate", "eval", "checkpoint")},
    ),
)


def plot_run(workdir: str | pathlib.Path, path: str | pathlib.Path) -> None:
    """Four panels of one run against the round: wins and loses, what feedback fixed, losses, time by phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = load_metrics(workdir)
    figure, grid = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for axes, (title, unit, metrics) in zip(grid.flat, _PANELS, strict=True):
        for index, (metric, label) in enumerate(metrics.items()):
            if metric in table:
                rows = table.dropna(subset=metric)
                axes.plot(rows["round"], rows[metric], color=COLOURS[index], marker=".", label=label)
        axes.set(title=title, xlabel="round", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
