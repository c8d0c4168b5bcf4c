"""The figures of a report, one panel each.

A page can set them side by side or below one another.
"""

import dataclasses
import io
import pathlib
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spear_jax.analysis import comparison
from spear_jax.analysis import runs as run_files
from spear_jax.analysis.report import traces
from spear_jax.analysis.report.runs import PHASES, Run

WIDTH = 4.8  # inches; text of 9 points stays readable where a phone shows the figure at 3.7 inches
STYLE = {"font.size": 9, "svg.hashsalt": "spear_jax", "axes.titlesize": 10, "legend.fontsize": 8}


@dataclasses.dataclass(frozen=True)
class Line:
    """One label's curve; `low` and `high`, where given, are its 95 % interval."""

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def curve(label: str, runs: list[Run], metric: str, x: str = "round") -> Line | None:
    """Returns a metric against another, the mean over runs as far as all of them reach.

    It is None where a run has none of it, or all have only zeros. Where x stays 0 (a method that
    generates nothing) it is one point at 0, the mean last value. The interval is Student's over
    several runs. Of one run's fractions it is the score interval, where the number of answers is
    known.
    """
    tables = [run.table.dropna(subset=metric) for run in runs if metric in run.table]
    tables = [table for table in tables if len(table)]
    if len(tables) < len(runs) or not any(table[metric].any() for table in tables):
        return None
    at = [
        table[x].fillna(0.0).to_numpy(float) if x in table else np.zeros(len(table))
        for table in tables
    ]
    if x != "round" and not any(a.any() for a in at):
        return Line(
            label, np.zeros(1), np.mean([table[metric].to_numpy()[-1:] for table in tables], axis=0)
        )
    if len(runs) > 1:
        places, mean, half = comparison.mean_curve(
            [(a, table[metric].to_numpy()) for a, table in zip(at, tables, strict=True)]
        )
        return Line(label, places, mean, mean - half, mean + half)
    low = high = None
    counts = _counts(runs[0], metric)
    if counts is not None:
        pairs = zip(tables[0][metric], counts.reindex(tables[0]["round"]).fillna(0), strict=True)
        low, high = np.array(
            [run_files.wilson(p, n) if n else (np.nan, np.nan) for p, n in pairs]
        ).T
    return Line(label, at[0], tables[0][metric].to_numpy(), low, high)


def _counts(run: Run, metric: str) -> pd.Series | None:
    """Returns by round the number of answers of which a fraction was taken.

    It is None where this is not known.
    """
    if metric == "eval/accuracy":
        return run.table.set_index("round")["eval/count"]
    if metric not in ("rollout/first_accuracy", "rollout/fixed") or not traces.rounds_with_traces(
        run
    ):
        return None
    sums = traces.client_counts(run).groupby("round").sum()
    return (
        sums["answers"]
        if metric == "rollout/first_accuracy"
        else sums["answers"] - sums["first_right"]
    )


@mpl.rc_context(STYLE)
def save(figure: Figure, stem: pathlib.Path) -> bytes:
    """Writes STEM.png and STEM.svg, equal bytes for equal figures; returns the SVG."""
    figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=150)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    stem.with_name(f"{stem.name}.svg").write_bytes(drawn.getvalue())
    return drawn.getvalue()


def _blank(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Any, columns: int = 3) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _rows(names: Iterable[str], columns: int = 3) -> int:
    return -(-len(list(names)) // columns)


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns each label's colour, marker and line, the same in all figures."""
    return {label: comparison.line_style(index) for index, label in enumerate(sorted(labels))}


@mpl.rc_context(STYLE)
def draw_lines(
    lines: list[Line], look: dict[str, dict[str, Any]], x: str, y: str, fraction: bool
) -> Figure:
    """Draws curves with their bands.

    A curve whose x stays 0 (it generates nothing) is a dotted line at its last value.

    Args:
        x, y: the names of the axes, with units.
        fraction: whether values are in [0, 1].
    """
    figure, axes = _blank(3.1 + 0.2 * _rows(lines))
    alpha = min(0.2, max(0.06, 0.4 / len(lines)))  # bands lie over each other
    for line in lines:
        style = look[line.label]
        if x != "round" and not line.x.any():
            axes.axhline(
                line.y[-1],
                color=style["color"],
                linestyle=":",
                label=f"{line.label} (no generation)",
            )
            continue
        axes.plot(
            line.x,
            line.y,
            label=line.label,
            markersize=4,
            markevery=max(1, len(line.x) // 8),
            linewidth=1.4,
            **style,
        )
        if line.low is not None:
            axes.fill_between(
                line.x, line.low, line.high, color=style["color"], alpha=alpha, linewidth=0
            )
    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(*_limits(lines, fraction))
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        _legend(figure, axes)
    return figure


def _limits(lines: list[Line], fraction: bool) -> tuple[float, float]:
    """Returns the limits of the y axis: all curves, and as much of their bands as keeps them tall."""
    low, high = min(line.y.min() for line in lines), max(line.y.max() for line in lines)
    low, high = (low - 0.05, high + 0.05) if fraction else (low, high)
    if low == high:
        low, high = low - 0.05 * abs(low), high + 0.05 * abs(high)
    height = high - low
    bands = [
        band
        for line in lines
        for band in (line.low, line.high)
        if band is not None and np.isfinite(band).any()
    ]
    down = min([np.nanmin(band) for band in bands] + [low])
    up = max([np.nanmax(band) for band in bands] + [high])
    bottom, top = max(down, low - height) - 0.05 * height, min(up, high + height) + 0.05 * height
    return (max(-0.01, bottom), min(1.01, top)) if fraction else (bottom, top)


@mpl.rc_context(STYLE)
def draw_final(table: pd.DataFrame, look: dict[str, dict[str, Any]]) -> Figure:
    """Draws the last accuracy of each label with its 95 % interval, and the one before training.

    Args: table: of `results`.
    """
    figure, axes = _blank(1.5 + 0.28 * len(table))
    for place, row in enumerate(table.itertuples()):
        style = look[row.label] | {"linestyle": "-"}
        axes.plot(row.after, -place, markersize=6, **style)
        if np.isfinite(row.low):
            axes.plot([row.low, row.high], [-place, -place], color=style["color"], linewidth=1.4)
    axes.axvline(
        table["before"].mean(),
        color="black",
        linestyle=(0, (6, 4)),
        linewidth=0.8,
        label="mean before training",
    )
    axes.set_yticks([-place for place in range(len(table))], list(table["label"]))
    axes.set_ylim(0.6 - len(table), 0.6)
    axes.set(xlabel="held-out accuracy after training (bar: 95 % interval)")
    axes.grid(alpha=0.3, axis="x")
    _legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def draw_round_time(run: Run) -> Figure:
    """Draws the seconds of each round, stacked by phase."""
    figure, axes = _blank(3.3)
    bottom = np.zeros(len(run.table))
    for phase in [phase for phase in PHASES if f"time/{phase}" in run.table]:
        seconds = run.table[f"time/{phase}"].fillna(0.0).to_numpy()
        colour = run_files.COLOURS[PHASES.index(phase)]
        axes.bar(run.table["round"], seconds, bottom=bottom, width=0.9, color=colour, label=phase)
        bottom += seconds
    axes.set(xlabel="round", ylabel="seconds")
    axes.set_ylim(0, 1.05 * max(bottom.max(), 1e-3))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, axis="y")
    _legend(figure, axes)
    return figure


def phase_seconds(groups: dict[str, list[Run]]) -> pd.DataFrame:
    """Returns the seconds of a whole run by phase, the mean over a label's runs.

    Returns: columns label, the PHASES, total, half_width (95 %, t).
    """
    rows = []
    for label, runs in groups.items():
        cells = [[run.total(f"time/{phase}") for phase in PHASES] for run in runs]
        half = comparison.half_width(np.nansum(cells, axis=1))
        means = np.nan_to_num(np.array(cells)).mean(0)
        rows.append([label, *means, means.sum(), half])
    return pd.DataFrame(rows, columns=["label", *PHASES, "total", "half_width"])


@mpl.rc_context(STYLE)
def draw_run_time(table: pd.DataFrame) -> Figure:
    """Draws the seconds of whole runs, a stacked bar a label, with the total's interval.

    Args: table: of `phase_seconds`.
    """
    figure, axes = _blank(1.7 + 0.28 * len(table))
    places = -np.arange(len(table))
    left = np.zeros(len(table))
    for index, phase in enumerate(PHASES):
        axes.barh(
            places, table[phase], left=left, height=0.7, color=run_files.COLOURS[index], label=phase
        )
        left += table[phase]
    half = np.minimum(table["half_width"].fillna(0.0), table["total"])
    axes.errorbar(
        table["total"], places, xerr=half, fmt="none", ecolor="black", elinewidth=1, capsize=2
    )
    axes.set_yticks(places, list(table["label"]))
    axes.set_xlim(0, 1.05 * min((table["total"] + half).max(), 1.6 * table["total"].max()))
    axes.set(xlabel="seconds a run")
    axes.grid(alpha=0.3, axis="x")
    _legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def draw_heat(clients: np.ndarray, rounds: np.ndarray, values: np.ndarray) -> Figure:
    """Draws the fraction of first answers right by round and client.

    A client without answers in a round is white.

    Args: values: float[n, R] of `traces.client_grid`.
    """
    height = 1.5 + 0.13 * max(8, len(clients))
    figure, axes = _blank(height)
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=1,
        cmap="viridis",
        extent=(0.5, len(rounds) + 0.5, len(clients) - 0.5, -0.5),
    )
    every = max(1, len(clients) // 20)
    axes.set_yticks(range(0, len(clients), every), [str(client) for client in clients[::every]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="round", ylabel="client")
    figure.colorbar(
        image, ax=axes, label="fraction of first answers right", pad=0.02, aspect=8 * height
    )
    return figure


@mpl.rc_context(STYLE)
def draw_split(sizes: dict[str, list[int]]) -> Figure:
    """Draws the number of examples of each client, clients by size, a line for each split."""
    figure, axes = _blank(2.6 + 0.2 * _rows(sizes, 2))
    most = max(map(len, sizes.values()))
    for index, (name, counts) in enumerate(sizes.items()):
        colour, marker = (
            run_files.COLOURS[index % 7],
            comparison.MARKERS[index % len(comparison.MARKERS)],
        )
        ranks = np.arange(1, len(counts) + 1)
        axes.plot(
            ranks,
            sorted(counts, reverse=True),
            color=colour,
            marker=marker,
            markersize=3 if most < 60 else 0,
            label=name,
        )
    axes.set(xlabel="clients, the largest first", ylabel="training examples")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(sizes) > 1:
        _legend(figure, axes, 2)
    return figure
