"""A folder of `compare` as a tidy table, a table of methods and a figure.

The folder holds a run folder <label>/seed<k>/ for each run of the grid. Needs no JAX.
"""

import json
import math
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from spear_jax.analysis import runs as run_files
from spear_jax.analysis.runs import Folder, cell_result, find_cells, is_finished, read_request
from spear_jax.core.errors import UserError
from spear_jax.core.files import write_whole, writing

# column of `grid_table` -> (heading, format)
COLUMNS = {
    "method": ("method", "{}"),
    "seeds": ("seeds", "{:d}"),
    "gold": ("gold text", "{}"),
    "before": ("accuracy before", "{:.3f}"),
    "accuracy": ("accuracy after", "{:.3f}"),
    "half_width": ("± 95 %", "{:.3f}"),
    "tokens": ("generated tokens", "{:,.0f}"),
    "flops": ("FLOPs", "{:.2e}"),
    "seconds": ("training s", "{:.1f}"),
    "bytes": ("bytes up + down", "{:,.0f}"),
    "rounds": ("rounds", "{:.1f}"),
}
# budget kind -> (x axis, metric)
AXES = {
    "tokens": ("generated tokens", "budget/tokens"),
    "rounds": ("communication rounds", "round"),
    "seconds": ("seconds of rollout, training and aggregation", "budget/seconds"),
}
MARKERS = "osD^vP*X<>ph8"
LINES = ("-", "--", "-.")


def write_request(folder: Folder, request: dict[str, Any], command: str = "compare") -> None:
    """Writes compare.json or sweep.json: the request of a grid and its machine.

    The file is written whole or not at all.
    """
    file = pathlib.Path(folder) / f"{command}.json"
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(request, indent=1) + "\n")


def load_grid(folder: Folder) -> pd.DataFrame:
    """Loads all runs of a grid, finished or not, as one tidy table.

        label  seed  round  metric         value
        spear  0     8      eval/accuracy  0.61

    Returns: columns label, seed, round, metric, value.
    Raises: UserError where no run has been evaluated.
    """
    tables = []
    for label, seed, cell in find_cells(folder):
        rows = pd.DataFrame(run_files.read_lines(cell / "metrics.jsonl"))
        if len(rows):
            tidy = (
                rows.drop(columns="time")
                .melt(id_vars=["round"], var_name="metric")
                .dropna(subset="value")
            )
            tables.append(tidy.assign(label=label, seed=seed))
    if not tables:
        raise UserError(
            f"no cell of {folder} has been evaluated yet; wait for the first evaluation to finish."
        )
    return pd.concat(tables, ignore_index=True)[["label", "seed", "round", "metric", "value"]]


def grid_table(folder: Folder) -> pd.DataFrame:
    """Returns one row a label, means over the seeds of its finished runs.

    The best final accuracy comes first.

    Returns: the columns of `COLUMNS`. half_width is of the 95 % interval of the mean final accuracy
        over seeds, t(n - 1) * s / sqrt(n); NaN for one seed.
    """
    golds = {label: entry["gold"] for label, entry in read_request(folder)["labels"].items()}
    results: dict[str, list[dict[str, float]]] = {}
    for label, _, cell in find_cells(folder):
        if is_finished(cell):
            results.setdefault(label, []).append(cell_result(cell))
    rows = []
    for label, cells in results.items():
        means = {name: float(np.mean([cell[name] for cell in cells])) for name in cells[0]}
        half = half_width([cell["accuracy"] for cell in cells])
        rows.append(
            {"method": label, "seeds": len(cells), "gold": golds.get(label, ""), "half_width": half}
            | means
        )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["accuracy", "method"], ascending=[False, True], ignore_index=True)


def paired_table(folder: Folder) -> pd.DataFrame:
    """Returns how each method differs from the best one, seed by seed.

    Seeds share split, cohorts and test questions across methods, so a difference has less noise
    than two means have.

    Returns: one row for each other label with a seed in common: method, against, seeds (in common),
        difference (mean of its final accuracies less the other's), half_width (of the 95 % t
        interval of that mean; NaN for one seed).
    """
    finished = [x for x in find_cells(folder) if is_finished(x[2])]
    found: dict[str, dict[int, float]] = {}
    for label, seed, cell in finished:
        found.setdefault(label, {})[seed] = cell_result(cell)["accuracy"]
    order = list(grid_table(folder)["method"])
    rows = []
    for label in order[1:]:
        best, own = found[order[0]], found[label]
        gaps = [own[seed] - best[seed] for seed in sorted(own.keys() & best.keys())]
        if gaps:
            rows.append([label, order[0], len(gaps), float(np.mean(gaps)), half_width(gaps)])
    return pd.DataFrame(rows, columns=["method", "against", "seeds", "difference", "half_width"])


def show_paired(table: pd.DataFrame) -> pd.DataFrame:
    """Returns `paired_table` as text for readers; "-" where there is no number."""
    interval = ["-" if pd.isna(half) else f"{half:.3f}" for half in table["half_width"]]
    return pd.DataFrame(
        {
            "method": table["method"],
            "less": table["against"],
            "seeds in common": table["seeds"].astype(str),
            "difference": [f"{value:+.3f}" for value in table["difference"]],
            "± 95 %": interval,
        }
    )


def short_of_budget(folder: Folder) -> list[str]:
    """Returns the finished runs, as label/seedK, that ended before the budget was used up.

    Runs that generate no tokens, or take no seconds, are left out.
    """
    budget = read_request(folder)["budget"]
    used = {
        f"{x}/seed{k}": cell_result(cell)[budget["kind"]]
        for x, k, cell in find_cells(folder)
        if is_finished(cell)
    }
    return [name for name, amount in used.items() if 0 < amount < budget["amount"]]


def half_width(values: list[float]) -> float:
    """Returns half the 95 % Student-t interval of the mean of independent values.

    A single value gives NaN.

        >>> round(half_width([0.5, 0.6, 0.7]), 3)
        0.248
    """
    n = len(values)
    if n < 2:
        return math.nan
    return t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """Returns the t with P(-t <= T <= t) = level, for Student's T of `freedom` degrees of freedom.

    The classic value of 2 degrees of freedom:

        >>> round(t_quantile(2), 3)
        4.303

    Source: the finite series of P for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and
        26.7.4), in the angle theta = arctan(t / sqrt(freedom)), which is then bisected.
    """

    def probability(theta: float) -> float:
        # odd:  2/pi (theta + sin (cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...)); even: sin (1 + 1/2
        # cos^2 + 1*3/(2*4) cos^4 + ...)
        odd = freedom % 2
        term, total = (math.cos(theta) if odd else 1.0), 0.0
        for power in range(odd, freedom - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * math.cos(theta) ** 2
        total *= math.sin(theta)
        return 2 / math.pi * (theta + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def show_table(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table as text for readers; "-" where there is no number."""
    shown = {
        heading: ["-" if pd.isna(value) else form.format(value) or "none" for value in table[name]]
        for name, (heading, form) in COLUMNS.items()
    }
    return pd.DataFrame(shown)


def to_markdown(table: pd.DataFrame) -> str:
    """Returns a table of texts as a Markdown table."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def mean_curve(
    runs: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the mean of curves that are given at different places.

    They are interpolated linearly, as far as all of them reach. Two seeds, one evaluated at 0 and
    4, one at 0, 2 and 6:

        >>> first = np.array([0.0, 4.0]), np.array([0.0, 0.8])
        >>> second = np.array([0.0, 2.0, 6.0]), np.array([0.2, 0.4, 0.8])
        >>> x, mean, _ = mean_curve([first, second])
        >>> x.tolist(), mean.round(2).tolist()
        ([0.0, 2.0, 4.0], [0.1, 0.4, 0.7])

    Args: runs: (x, y) of each seed, x ascending.
    Returns: x, mean, and half the width of its 95 % t interval (NaN for one run).
    """
    end = min(x[-1] for x, _ in runs)
    places = np.unique(np.concatenate([x for x, _ in runs] + [[end]]))
    places = places[places <= end]
    heights = np.stack([np.interp(places, x, y) for x, y in runs])
    return places, heights.mean(0), np.array([half_width(list(column)) for column in heights.T])


def plot_grid(folder: Folder, path: Folder) -> None:
    """Draws held-out accuracy against the budget's own unit, and the final accuracies.

    Only finished runs are drawn.

    Args: path: the figure; saved with the suffixes .png and .svg.
    """
    from matplotlib.figure import Figure  # not pyplot, whose backend is the notebook's

    table, kind = grid_table(folder), read_request(folder)["budget"]["kind"]
    styles = {label: line_style(index) for index, label in enumerate(sorted(table["method"]))}
    figure = Figure(figsize=(11, 3.6 + 0.3 * len(table)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_curves(left, folder, table, kind, styles)
    _plot_final(right, folder, table, styles)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for suffix in (".png", ".svg"):
        figure.savefig(pathlib.Path(path).with_suffix(suffix), dpi=150)


def line_style(index: int) -> dict[str, Any]:
    """Returns colour, marker and dashes of a figure's line by its number; distinct for 42 lines."""
    colours = run_files.COLOURS[:7]  # yellow is too light for a line
    return {
        "color": colours[index % len(colours)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(colours) % len(LINES)],
    }


def _plot_curves(axes: Any, folder: Folder, table: pd.DataFrame, kind: str, styles: dict) -> None:
    unit, metric = AXES[kind]
    done = {(label, seed) for label, seed, cell in find_cells(folder) if is_finished(cell)}
    wide = (
        load_grid(folder)
        .pivot(index=["label", "seed", "round"], columns="metric", values="value")
        .reset_index()
    )
    held = wide.dropna(subset="eval/accuracy").fillna({"budget/tokens": 0.0, "budget/seconds": 0.0})
    for _, row in table.iterrows():
        label, style = row["method"], styles[row["method"]]
        if row[kind] == 0:  # it generates nothing: no curve in this unit
            axes.axhline(
                row["accuracy"],
                color=style["color"],
                linestyle=":",
                label=f"{label} (no generation)",
            )
            continue
        runs = [
            (cell[metric].to_numpy(), cell["eval/accuracy"].to_numpy())
            for key, cell in held[held["label"] == label].groupby(["label", "seed"])
            if key in done
        ]
        x, mean, half = mean_curve(runs)
        axes.plot(
            x,
            mean,
            label=label,
            markersize=4,
            markevery=max(1, len(x) // 6),
            linewidth=1.4,
            **style,
        )
        axes.fill_between(
            x, mean - half, mean + half, color=style["color"], alpha=0.12, linewidth=0
        )
    axes.axhline(
        table["before"].mean(),
        color="black",
        linestyle=(0, (6, 4)),
        linewidth=0.8,
        label="before training",
    )
    axes.set(xlabel=unit, ylabel="held-out accuracy")
    axes.set_title("Mean over seeds (band: 95 % t interval)", fontsize=10)
    axes.set_xlim(left=0)
    axes.set_ylim(*_limits(table))
    axes.grid(alpha=0.3)


def _plot_final(axes: Any, folder: Folder, table: pd.DataFrame, styles: dict) -> None:
    places = {label: len(table) - index for index, label in enumerate(table["method"])}
    for label, _, cell in find_cells(folder):
        if is_finished(cell):
            accuracy = cell_result(cell)["accuracy"]
            axes.plot(
                accuracy,
                places[label] - 0.25,
                ".",
                color=styles[label]["color"],
                alpha=0.6,
                markersize=4,
            )
    for _, row in table.iterrows():
        style = styles[row["method"]] | {"linestyle": "-"}
        half = 0.0 if pd.isna(row["half_width"]) else row["half_width"]
        axes.errorbar(
            row["accuracy"],
            places[row["method"]],
            xerr=half,
            markersize=6,
            capsize=3,
            linewidth=1.2,
            **style,
        )
    axes.axvline(table["before"].mean(), color="black", linestyle=(0, (6, 4)), linewidth=0.8)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_ylim(0.4, len(table) + 0.6)
    axes.set_xlim(*_limits(table))
    axes.set(xlabel="held-out accuracy after training")
    axes.set_title("Final mean (bar: 95 % t interval; small: seeds)", fontsize=10)
    axes.grid(alpha=0.3, axis="x")


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    """Returns the limits of the accuracies' axis: all intervals and a margin, inside [0, 1]."""
    half = table["half_width"].fillna(0.0)
    low = min((table["accuracy"] - half).min(), table["before"].min())
    high = max((table["accuracy"] + half).max(), table["before"].max())
    return max(0.0, low - 0.05), min(1.0, high + 0.05)
