"""Sweeps over config fields, behind `sweep` and launch/sweep_clients.py: settings to cells, run here
or by a cluster.
"""

import argparse
import dataclasses
import itertools
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import pandas as pd

from spear_jax.analysis import comparison, runs, sweeps
from spear_jax.core.errors import UserError, shown
from spear_jax.experiment import command_line
from spear_jax.experiment.config import flatten, parse
from spear_jax.experiment.grid import (
    GridRow,
    cell_folder,
    check_folder,
    check_rows,
    machine,
    programs,
    run,
    unfinished,
)

# What makes a sweep: it has to stay as it is in a folder, but values and seeds may be added.
SAME = ("config", "overrides", "fields")


@dataclasses.dataclass(frozen=True)
class Setting(GridRow):
    """A row of a sweep: the arguments of `train` that make its configs, but for seed and
    workdir.
    """

    arguments: list[str]

    def command(self, folder: pathlib.Path, seed: int) -> list[str]:
        """The arguments of `train` for one of its cells."""
        workdir = cell_folder(folder, self.label, seed)
        return [*self.arguments, f"--config.seed={seed}", f"--workdir={workdir}"]


def add_flags(parser: argparse.ArgumentParser, seeds: str | None = None) -> None:
    """The flags that every sweep has. Args: seeds: the default; None makes --seeds required."""
    shown = f" (default: {seeds})" if seeds else ""
    parser.add_argument(
        "--seeds", required=seeds is None, default=seeds, help=f"for example 0,1,2{shown}"
    )
    parser.add_argument(
        "--workdir", required=True, help="the folder of all cells, the table and the figure"
    )
    parser.add_argument(
        "--jobs", type=int, help="cells at a time (default: 1; with --slurm no limit)"
    )
    parser.add_argument(
        "--print",
        "--dry-run",
        dest="dry_run",
        action="store_true",
        help="check all, print each cell's command",
    )
    parser.add_argument(
        "--slurm", metavar="FILE", help="write a job array of the unfinished cells; run nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")


def read_grid(texts: list[str]) -> dict[str, list[str]]:
    """{"a.b": ["1", "2"]} of ["a.b=1,2"]; a comma inside brackets separates nothing."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        found = re.split(r",(?![^(\[]*[)\]])", values)
        if not name or not all(found):
            raise UserError(
                f"--grid is {shown(text)}; write it as FIELD=VALUE,VALUE..., for example lora.rank=4,16."
            )
        if name in grid or name == "seed":
            raise UserError(
                f"--grid {name} is given twice; give all its values at once (seeds with --seeds)."
            )
        grid[name] = found
    return grid


def product(grid: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination of a grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def make_settings(
    source: str, points: Sequence[dict[str, str]], overrides: list[str], seeds: list[int]
) -> list[Setting]:
    """The rows of a sweep, with every config made and checked.

    Args:
        source: NAME[:ARG] or FILE[:ARG] of the config.
        points: values of the swept fields.
        overrides: --config.a.b=VALUE of all cells.
    Raises: UserError for an unknown field or a value that no run can have.
    """
    settings: list[Setting] = []
    for point in points:
        for name in ("seed", *point):
            if any(override.split("=")[0] == f"--config.{name}" for override in overrides):
                raise UserError(f"--config.{name} is what the sweep itself sets; leave it out.")
        arguments = [
            f"--config={source}",
            *overrides,
            *(f"--config.{name}={value}" for name, value in point.items()),
        ]
        made = {
            seed: command_line.read_config([*arguments, f"--config.seed={seed}"]) for seed in seeds
        }
        label = make_label(made[seeds[0]], list(point))
        for config in made.values():
            try:
                parse(config)
            except UserError as error:
                raise UserError(f"{label}: {error}") from None
        settings.append(Setting(label, made, arguments))
    return settings


def make_label(config: ml_collections.ConfigDict, fields: list[str]) -> str:
    """The folder name of a setting: its fields' values, as the config has them."""
    flat = flatten(config)
    return ",".join(re.sub(r"[^\w.+=-]+", "_", f"{name}={flat[name]}") for name in fields)


def sweep(
    args: argparse.Namespace,
    request: dict[str, Any],
    settings: list[Setting],
    x: str,
    split: Callable[[pd.DataFrame], list[sweeps.Line]],
) -> dict[str, Any]:
    """Prints the cells, writes a job array, or trains what is not finished, as the flags say;
    returns the command's result.

    Args:
        args: of `add_flags`.
        request: what makes this sweep: `SAME`, and "grid" with the values of each dimension.
        x: the field along the figure's horizontal axis.
        split: the table of settings -> the figure's lines.
    """
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; it must be at least 1.")
    labels = [setting.label for setting in settings]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"the sweep has {twice} twice; give each value once.")
    folder, seeds = pathlib.Path(args.workdir), sorted(settings[0].configs)
    request = merge_request(folder, request | {"seeds": seeds})
    check_folder(folder, settings)
    left = unfinished(folder, settings)
    count = {
        "workdir": args.workdir,
        "cells": len(settings) * len(seeds),
        "waiting": sum(map(len, left.values())),
    }
    commands = [
        setting.command(folder, seed)
        for setting in settings
        for seed in left.get(setting.label, ())
    ]
    if args.dry_run:
        for command in commands:
            print(shlex.join(["python", "-m", "spear_jax.train", *command]))
        return count
    if args.slurm and commands:
        comparison.write_request(folder, request, "sweep")
        write_array(pathlib.Path(args.slurm), folder, commands, args.jobs)
        return count | {"file": args.slurm}
    check_rows([setting for setting in settings if setting.label in left], args.jobs or 1)
    comparison.write_request(folder, request | machine(args.jobs or 1), "sweep")
    failed = run(folder, settings, args.jobs or 1, args.quiet)
    return count | conclude(folder, request["fields"], x, split, args.quiet) | {"failed": failed}


def merge_request(folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """The request together with an earlier one of the folder; raises UserError where that was of
    another sweep.
    """
    if not (folder / "sweep.json").exists():
        if (folder / "compare.json").exists():
            raise UserError(f"{folder} holds a comparison; give a new --workdir.")
        return request
    old = runs.read_request(folder, "sweep")
    for name in SAME:
        if old[name] != request[name]:
            raise UserError(
                f"{folder} holds a sweep with {name} {old[name]}, now it is {request[name]}; "
                f"give a new --workdir."
            )
    for name, values in old["grid"].items():
        gone = [value for value in values if value not in request["grid"][name]]
        if gone:
            raise UserError(
                f"{folder} holds a sweep with {name}={','.join(values)}, now without "
                f"{', '.join(gone)}; values may be added, "
                "not taken away: give all of them, or a new --workdir."
            )
    return request | {"seeds": sorted({*old["seeds"], *request["seeds"]})}


ARRAY = """#!/usr/bin/env bash
# One cell a job of the array, each with what `sbatch` gives it: sbatch --partition=... {file}
# When all have ended, the sweep's own command, without --slurm, writes the table and the figure.
# The file needs nothing but this Python, which a job must see under the same path.
#SBATCH --job-name=sweep
#SBATCH --array=0-{last}{limit}
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
cd {here} || exit 2
programs={programs}
export JAX_COMPILATION_CACHE_DIR="${{JAX_COMPILATION_CACHE_DIR:-$programs}}"
case $SLURM_ARRAY_TASK_ID in
{cells}
  *) echo "error: the array has no cell $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
command=(srun --kill-on-bad-exit=1 {python} -m spear_jax.train "$@")
if [ "${{SLURM_NTASKS:-1}}" -gt 1 ]; then command+=(--distributed=auto); fi
# USR1 comes two minutes before the time is over: back to the queue, which ends this job
trap 'heard=yes; echo "requeueing job $SLURM_JOB_ID" >&2; scontrol requeue "$SLURM_JOB_ID"' USR1
"${{command[@]}}" &
child=$!
while true; do
  heard='' code=0
  wait "$child" || code=$?
  [ -n "$heard" ] || break # else it was the signal that ended the wait
done
exit "$code"
"""


def write_array(
    file: pathlib.Path, folder: pathlib.Path, commands: list[list[str]], limit: int | None
) -> None:
    """An sbatch file whose array index picks a cell. Args: limit: jobs at a time; None is no
    limit.
    """
    cases = "\n".join(
        f"  {index}) set -- {shlex.join(command)} ;;" for index, command in enumerate(commands)
    )
    filled = ARRAY.format(
        file=file,
        last=len(commands) - 1,
        limit=f"%{limit}" if limit else "",
        here=shlex.quote(str(pathlib.Path.cwd())),
        python=shlex.quote(sys.executable),
        programs=shlex.quote(str(programs(folder))),
        cells=cases,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(filled, encoding="utf-8")


def conclude(
    folder: pathlib.Path,
    fields: list[str],
    x: str,
    split: Callable[[pd.DataFrame], list[sweeps.Line]],
    quiet: bool,
) -> dict[str, Any]:
    """cells.csv, table.csv, table.md, sweep.png and sweep.svg from the finished cells, and the
    table on stdout.
    """
    if not any(folder.glob("*/seed*/summary.json")):
        return {"table": [], "files": []}
    found = runs.load_sweep(folder)
    table = sweeps.mean_table(found, fields)
    shown = sweeps.show_table(table, fields)
    found.to_csv(folder / "cells.csv", index=False)
    table.to_csv(folder / "table.csv", index=False)
    (folder / "table.md").write_text(comparison.to_markdown(shown), encoding="utf-8")
    over = "seeds" if found["seed"].nunique() > 1 else "questions"
    sweeps.plot_sweep(
        split(table),
        x,
        f"95 % intervals over {over}; points of a place stand a hair apart",
        folder / "sweep.png",
    )
    if not quiet:
        print(shown.to_string(index=False))
    return {
        "table": table.to_dict("records"),
        "files": ["cells.csv", "table.csv", "table.md", "sweep.png", "sweep.svg"],
    }
