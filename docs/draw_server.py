"""The tables and figures of results/server.md, from the raw files in results/server/.

    python docs/draw_server.py                      # makes all again
    python docs/draw_server.py attacks runs/attacks # packs a folder of `compare` into a raw file first

A raw file NAME.json (spear_jax.analysis.packed) becomes server-NAME.png, and the text between the
page's lines `<!-- NAME -->` and `<!-- /NAME -->`. A study need not have ended: runs that have are
shown, and how many seeds each row has.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import pandas as pd
from draw_evidence import insert
from matplotlib.figure import Figure

from spear_jax.analysis import comparison, runs
from spear_jax.analysis.comparison import half_width
from spear_jax.analysis.packed import pack, unpack

DOCS = pathlib.Path(__file__).resolve().parent
RAW = DOCS / "results" / "server"
PAGE = DOCS / "results" / "server.md"
# the label of the plain row `spear`
PLAIN = {
    "attacks": "wins",
    "lora_rules": "mean-10.0",
    "compression": "none",
    "asynchronous": "rounds",
    "privacy": "no noise",
}
TARGET = 0.45  # the accuracy whose simulated time is told


def read_runs(folder: pathlib.Path, plain: str) -> pd.DataFrame:
    """Returns one row a finished run.

    Returns: columns label, seed, those of `cell_result`, up and down (bytes), lost (by averaging
        factors) and distorted (by compression), means over rounds, failed (rounds), epsilon,
        clock (simulated seconds), and curve: [(clock, accuracy)] of the evaluations.
    """
    rows = []
    for label, seed, cell in runs.find_cells(folder):
        lines = runs.read_lines(cell / "metrics.jsonl")
        rows.append(
            {
                "label": plain if label == "spear" else label,
                "seed": seed,
                **runs.cell_result(cell),
                "up": sum(numbers(lines, "round/bytes_up")),
                "down": sum(numbers(lines, "round/bytes_down")),
                "lost": mean(numbers(lines, "round/aggregation_error")),
                "distorted": mean(numbers(lines, "round/compression_error")),
                "failed": sum(numbers(lines, "round/failed")),
                "epsilon": max(numbers(lines, "privacy/epsilon"), default=np.inf),
                "clock": max(numbers(lines, "sim/clock"), default=np.nan),
                "curve": [
                    (line.get("sim/clock", 0.0), line["eval/accuracy"])
                    for line in lines
                    if "eval/accuracy" in line
                ],
            }
        )
    return pd.DataFrame(rows)


def numbers(lines: list[dict], name: str) -> list[float]:
    """Returns a metric of the rounds that have it."""
    return [line[name] for line in lines if name in line]


def mean(values: list[float]) -> float:
    """Returns the mean; NaN of nothing."""
    return float(np.mean(values)) if values else np.nan


def told(values: list[float] | pd.Series, sign: str = "") -> str:
    """Returns "mean ± half of the 95 % t interval over seeds"; of one seed the value alone."""
    values = list(values)
    if not values:
        return "-"
    half = half_width(values)
    return f"{np.mean(values):{sign}.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def gaps(table: pd.DataFrame, label: str, plain: str, column: str = "accuracy") -> list[float]:
    """Returns how a row differs from another one, seed by seed."""
    own, other = (table[table["label"] == x].set_index("seed")[column] for x in (label, plain))
    return [own[seed] - other[seed] for seed in own.index.intersection(other.index)]


def rows_of(
    table: pd.DataFrame, plain: Callable[[str], str], columns: dict[str, tuple[str, str]]
) -> pd.DataFrame:
    """Returns a row a label as text: its seeds, accuracy, what it is less than the plain row, and
    means of more columns, {heading: (column, format)}.
    """
    rows = []
    for label, own in table.groupby("label", sort=False):
        base = plain(label)
        less = gaps(table, label, base)
        rows.append(
            {
                "row": label,
                "seeds": str(len(own)),
                "accuracy": told(own["accuracy"]),
                "less the plain row": "" if label == base else told(less, "+"),
                **{
                    heading: "-" if own[column].isna().all() else form.format(own[column].mean())
                    for heading, (column, form) in columns.items()
                },
            }
        )
    return pd.DataFrame(rows)


# The five studies: each returns its table as text, and draws


def attacks(table: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """A row a reducer and attack."""
    parts = table["label"].str.split("-", n=1, expand=True).reindex(columns=range(2))
    table = table.assign(reducer=parts[0], case=parts[1].fillna("nobody"))
    first = lambda name, *names: [*names, *sorted(set(table[name]) - set(names))]
    cases, reducers = first("case", "nobody"), first("reducer", "wins", "mean")
    axes, rows = figure.subplots(), []
    for number, case in enumerate(cases):
        for at, reducer in enumerate(reducers):
            of = lambda one, case=case: one if case == "nobody" else f"{one}-{case}"
            own = table[table["label"] == of(reducer)]
            place = at + 0.7 * (number / max(1, len(cases) - 1) - 0.5)
            bar(axes, place, own["accuracy"], number, None if at else case)
            if len(own):
                less_mean = gaps(table, of(reducer), of("mean"))
                less_plain = gaps(table, of(reducer), PLAIN["attacks"])
                plain = of(reducer) == PLAIN["attacks"]
                rows.append(
                    {
                        "reducer": reducer,
                        "attack and share": case,
                        "seeds": str(len(own)),
                        "accuracy": told(own["accuracy"]),
                        "less `mean` there": told(less_mean, "+") if reducer != "mean" else "",
                        "less `wins` without attack": "" if plain else told(less_plain, "+"),
                    }
                )
    axes.axhline(table["before"].mean(), color="black", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(reducers)), reducers, rotation=20, ha="right")
    axes.set(ylabel="held-out accuracy", title="Reducers under attack (dashed: before training)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return pd.DataFrame(rows)


def lora_rules(table: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """A row a rule and split; accuracy against bytes."""
    alphas = sorted(set(table["label"].str.rpartition("-")[2]))
    for axes, alpha in zip(
        np.ravel(figure.subplots(1, len(alphas), sharey=True)), alphas, strict=True
    ):
        own = table[table["label"].str.endswith(f"-{alpha}")]
        scatter(axes, own.assign(label=own["label"].str.rpartition("-")[0]), "up")
        axes.set(xlabel="bytes up", title=f"Dirichlet α = {alpha}")
    columns = {
        "lost by averaging": ("lost", "{:.3f}"),
        "bytes up": ("up", "{:,.0f}"),
        "bytes down": ("down", "{:,.0f}"),
    }
    return rows_of(table, lambda label: f"mean-{label.rpartition('-')[2]}", columns)


def compression(table: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """A row a compressor; accuracy against bytes."""
    axes = figure.subplots()
    scatter(axes, table, "up")
    axes.set(xlabel="bytes up", xscale="log", title="Compression")
    columns = {"distortion": ("distorted", "{:.3f}"), "bytes up": ("up", "{:,.0f}")}
    return rows_of(table, lambda label: PLAIN["compression"], columns)


def asynchronous(table: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """A row a mode; accuracy against simulated seconds."""
    ends = table.groupby("seed")["clock"].min()  # seconds that every mode has

    def at_equal_seconds(run: pd.Series) -> float:
        return [y for clock, y in run["curve"] if clock <= ends[run["seed"]]][-1]

    def seconds_to_target(run: pd.Series) -> float:
        return min((clock for clock, y in run["curve"] if y >= TARGET), default=np.nan)

    table = table.assign(
        equal=table.apply(at_equal_seconds, axis=1), reached=table.apply(seconds_to_target, axis=1)
    )
    axes = figure.subplots()
    for number, (label, own) in enumerate(table.groupby("label", sort=False)):
        colour = runs.COLOURS[number]
        for _, run in own.iterrows():
            x, y = zip(*run["curve"], strict=True)
            name = label if run["seed"] == own["seed"].min() else None
            axes.plot(x, y, "o-", color=colour, label=name, markersize=3, linewidth=1)
    axes.set(xlabel="simulated seconds", ylabel="held-out accuracy", title="A line a seed")
    axes.legend(frameon=False)
    shown = rows_of(
        table,
        lambda label: PLAIN["asynchronous"],
        {"simulated s": ("clock", "{:.0f}"), "versions": ("rounds", "{:.0f}")},
    )
    own = [table[table["label"] == label] for label in shown["row"]]
    shown["accuracy at equal simulated s"] = [told(x["equal"]) for x in own]
    shown[f"simulated s to {TARGET}"] = [
        f"{x['reached'].mean():.0f} ({x['reached'].count()} of {len(x)} seeds)" for x in own
    ]
    return shown


def privacy(table: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """A row a noise; accuracy against ε."""
    axes = figure.subplots()
    scatter(axes, table[np.isfinite(table["epsilon"])], "epsilon")
    plain = table[table["label"] == PLAIN["privacy"]]
    axes.axhline(plain["accuracy"].mean(), color="black", label="no noise", linewidth=0.8)
    axes.axhline(table["before"].mean(), color="black", linestyle="--", linewidth=0.8)
    axes.set(xlabel="ε", xscale="log", title="Noise (line: none; dashed: before training)")
    return rows_of(table, lambda label: PLAIN["privacy"], {"ε": ("epsilon", "{:.2f}")})


STUDIES = {
    "attacks": attacks,
    "lora_rules": lora_rules,
    "compression": compression,
    "asynchronous": asynchronous,
    "privacy": privacy,
}


def scatter(axes, table: pd.DataFrame, column: str) -> None:
    """Draws a point a label: mean accuracy with its interval at the mean of a column."""
    for number, (label, own) in enumerate(table.groupby("label", sort=False)):
        bar(axes, own[column].mean(), own["accuracy"], number, label)
    axes.set_ylabel("held-out accuracy")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def bar(axes, x: float, values: pd.Series, number: int, label: str | None) -> None:
    """Draws the mean of values with its 95 % t interval."""
    style = {"color": runs.COLOURS[number % 8], "marker": comparison.MARKERS[number % 13]}
    half = half_width(list(values)) if len(values) > 1 else 0.0
    middle = np.mean(values) if len(values) else np.nan
    axes.errorbar(x, middle, half, label=label, linestyle="", capsize=3, markersize=5, **style)


def names() -> list[str]:
    """Returns the studies that have a raw file."""
    return [name for name in STUDIES if (RAW / f"{name}.json").is_file()]


def render(name: str, folder: pathlib.Path) -> tuple[str, Figure]:
    """Returns a study's part of the page, and its figure; `folder` gets it unpacked."""
    packed = unpack(RAW / f"{name}.json", folder)
    table = read_runs(folder, PLAIN[name])
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    shown = comparison.to_markdown(STUDIES[name](table, figure))
    versions = packed["environment"]["versions"]
    failed = int(table["failed"].sum())
    head = (
        f"{len(table)} runs, seeds {', '.join(map(str, sorted(set(table['seed']))))}; "
        f"before training {table['before'].mean():.3f} of {int(table['count'].max())} questions; "
        f"{failed} failed rounds. jax {versions['jax']}, Python {versions['python']}, a CPU."
    )
    return f"![{name}](../server-{name}.png)\n\n{head}\n\n{shown}", figure


def main(arguments: list[str]) -> None:
    if arguments:
        name, folder = arguments
        RAW.mkdir(exist_ok=True)
        pack(folder, RAW / f"{name}.json")
    page = PAGE.read_text(encoding="utf-8")
    for name in names():
        with tempfile.TemporaryDirectory() as made:
            text, figure = render(name, pathlib.Path(made))
        page = insert(page, name, text)
        figure.savefig(DOCS / f"server-{name}.png", dpi=110)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
