"""A sweep as a table with one row a setting, and a figure against one of the fields.

Needs no JAX.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from spear_jax.analysis import comparison, runs
from spear_jax.analysis.runs import Folder

# column of `mean_table` -> (heading, format)
COLUMNS = {
    "seeds": ("seeds", "{:d}"),
    "before": ("accuracy before", "{:.3f}"),
    "accuracy": ("accuracy after", "{:.3f}"),
    "low": ("95 % from", "{:.3f}"),
    "high": ("to", "{:.3f}"),
    "rounds": ("rounds", "{:.1f}"),
    "tokens": ("generated tokens", "{:,.0f}"),
    "bytes": ("bytes up + down", "{:,.0f}"),
    "seconds": ("training s", "{:.1f}"),
    "compiling": ("of it compiling", "{:.1f}"),
}
# panels: column -> axis label, divisor
PANELS = {
    "accuracy": ("held-out accuracy (bar: 95 % interval)", 1),
    "bytes": ("megabytes, up and down", 1e6),
    "tokens": ("generated tokens", 1),
    "running": ("seconds of training, compiling left out", 1),
}
WIDE = 20  # an axis whose values span more than this ratio is logarithmic


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a figure: its label and its rows of `mean_table`."""

    label: str
    rows: pd.DataFrame


def mean_table(cells: pd.DataFrame, fields: list[str]) -> pd.DataFrame:
    """Returns one row a setting of the fields, means over its seeds.

    The columns are the fields and those of `COLUMNS`. low and high are the 95 % interval of the
    accuracy. It is over seeds (Student's t) where there are two or more, else of a single seed's
    questions (Wilson's score interval).

    Args: cells: one row a run, of `analysis.load_sweep`.
    """
    rows = []
    for values, group in cells.groupby(fields, sort=True, dropna=False):
        means = {name: float(group[name].mean()) for name in COLUMNS if name in group}
        accuracy, half = means["accuracy"], comparison.half_width(list(group["accuracy"]))
        low, high = accuracy - half, accuracy + half
        if len(group) == 1:
            low, high = runs.wilson(accuracy, group["count"].iloc[0])
        setting = dict(zip(fields, values, strict=True))
        rows.append(
            setting | {"seeds": len(group)} | means | {"low": max(0.0, low), "high": min(1.0, high)}
        )
    return pd.DataFrame(rows, columns=[*fields, *COLUMNS])


def show_table(table: pd.DataFrame, fields: list[str]) -> pd.DataFrame:
    """Returns the table of `mean_table` as text for readers."""
    shown = {name: [str(value) for value in table[name]] for name in fields}
    shown |= {
        heading: [form.format(x) for x in table[name]] for name, (heading, form) in COLUMNS.items()
    }
    return pd.DataFrame(shown)


def split_lines(table: pd.DataFrame, fields: list[str]) -> list[Line]:
    """Splits a table into a line for every setting of the fields.

    Only the fields that differ stand in a label. Where nothing differs there is one line.

        lora.rank  train.steps  accuracy
        4          2            0.50          line "rank 4"
        16         2            0.55          line "rank 16"
    """
    telling = [name for name in fields if table[name].nunique() > 1]
    if not telling:
        return [Line("", table)]
    return [
        Line(", ".join(f"{short_name(n)} {v}" for n, v in zip(telling, values, strict=True)), rows)
        for values, rows in table.groupby(telling, sort=True)
    ]


def short_name(field: str) -> str:
    """Returns the last part of a field's name; algorithm.name is the method."""
    return "method" if field == "algorithm.name" else field.rsplit(".", 1)[-1]


def plot_sweep(lines: list[Line], x: str, title: str, path: Folder) -> None:
    """Draws accuracy, bytes, tokens and seconds against field `x`.

    There is one line for each setting of the other fields.

    Args:
        x: a column of the lines' rows; numbers, or names at equal distances.
        path: the figure; saved with the suffixes .png and .svg.
    """
    from matplotlib.figure import Figure  # not pyplot, whose backend is the notebook's

    # the first run compiles programs that the others read from the cache
    lines = [
        Line(line.label, line.rows.assign(running=line.rows["seconds"] - line.rows["compiling"]))
        for line in lines
    ]
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    grid = figure.subplots(2, 2)
    for axes, column in zip(grid.flat, PANELS, strict=True):
        _draw_panel(axes, lines, x, column)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(3, len(names)),
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(title, fontsize=10)
    for suffix in (".png", ".svg"):
        figure.savefig(pathlib.Path(path).with_suffix(suffix), dpi=150)


def _draw_panel(axes: Any, lines: list[Line], x: str, column: str) -> None:
    unit, divisor = PANELS[column]
    whole = pd.concat([line.rows for line in lines])
    places, ticks = _places(whole[x])
    log = pd.api.types.is_numeric_dtype(whole[x]) and _wide(whole[x])
    for index, line in enumerate(lines):
        at = np.array([places[value] for value in line.rows[x]])
        # lines stand a little aside, so that intervals at one place do not cover each other
        aside = (index - (len(lines) - 1) / 2) * 0.012
        at = (
            at * (max(ticks) / min(ticks)) ** aside
            if log
            else at + aside * (max(ticks) - min(ticks))
        )
        rows = line.rows.assign(place=at).sort_values("place")
        _draw(axes, rows, column, divisor, comparison.line_style(index) | {"label": line.label})
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=0 if len(ticks) < 6 else 30)
    if column == "accuracy":
        before = whole["before"].mean()
        axes.axhline(
            before, color="black", linestyle=(0, (6, 4)), linewidth=0.8, label="before training"
        )
    elif _wide(whole[column]):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * whole[column].max() / divisor or 1)
    axes.set(xlabel=x, ylabel=unit)
    axes.grid(alpha=0.3)


def _places(values: pd.Series) -> tuple[dict[Any, float], dict[float, str]]:
    """Returns where each value lies on the axis, and the text at each place."""
    distinct = sorted(values.unique())
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    places = {x: float(x) if numeric else float(index) for index, x in enumerate(distinct)}
    return places, {place: f"{x:,}" if numeric else str(x) for x, place in places.items()}


def _wide(values: pd.Series) -> bool:
    """Returns whether an axis of these values is better logarithmic."""
    return bool(values.min() > 0 and values.max() / values.min() > WIDE)


def _draw(
    axes: Any, rows: pd.DataFrame, column: str, divisor: float, style: dict[str, Any]
) -> None:
    style = style | {"markersize": 5, "linewidth": 1.4}
    if column != "accuracy":
        axes.plot(rows["place"], rows[column] / divisor, **style)
        return
    ends = np.array([rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]).clip(0)
    axes.errorbar(rows["place"], rows["accuracy"], yerr=ends, capsize=3, elinewidth=0.8, **style)
