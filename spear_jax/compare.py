"""Methods side by side on an equal budget: one table and one figure; stopped, it goes on where it was.

Each method takes its configs/<method>.py. A cell is a method and a seed, an ordinary run folder WORKDIR/<label>/seed<k>.
Nothing starts before every config has been checked. --config.a.b=VALUE changes a field for all methods; a --variant is one more
row, a method with fields of its own. Every worker of --jobs has its own share of the cores; on an accelerator leave it at 1.

A run ends with the first round at whose end the budget is used up, or at config.rounds.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import os
import pathlib
import pkgutil
import platform
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import ml_collections
import pandas as pd
import tqdm

import configs
from spear_jax import cli, experiment, grids, run_folder, train, workers
from spear_jax.doctor import PACKAGES
from spear_jax.dry_run import write_split
from spear_jax.errors import UserError, unknown
from spear_jax.federated.tracking import check_tracking
from spear_jax.federated.writer import on_terminal

EXAMPLES = """
    python -m spear_jax.compare --methods=spear,grpo,sft --task=facts --seeds=0,1,2 --budget=tokens:50000 --workdir=runs/facts
    python -m spear_jax.compare --methods=spear,grpo --task=arc_challenge,smollm2-135m,cpu --seeds=0 --budget=rounds:8 \\
        --workdir=runs/arc --config.data.path=PATH
    python -m spear_jax.compare --methods=spear --variant=short:spear:train.steps=2,rollout.examples=16 --task=facts \\
        --seeds=0,1,2,3,4 --budget=rounds:12 --workdir=runs/steps --jobs=2
"""
BUDGETS = {"tokens": "budget.tokens", "rounds": "rounds", "seconds": "budget.seconds"}
NO_METHODS = ("common", "from_yaml", "pretrain", "quickstart")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table: a method, the fields that are its own, and its config for every seed."""

    label: str
    method: str
    overrides: list[str]
    configs: dict[int, ml_collections.ConfigDict]


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.parser("compare", __doc__, EXAMPLES)
    parser.add_argument("--methods", required=True, help="names of configs/<method>.py, separated by commas")
    parser.add_argument("--task", required=True, help="TASK[,MODEL[,VARIANT...]]; the model is tiny where not given")
    parser.add_argument("--seeds", required=True, help="for example 0,1,2")
    parser.add_argument("--budget", required=True, help="tokens:N (generated), rounds:N or seconds:N")
    parser.add_argument("--workdir", required=True, help="the folder of all cells, the table and the figure")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (default: 1)")
    parser.add_argument("--variant", action="append", default=[], help="LABEL:METHOD:key=value[,key=value...]")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")
    cli.add_offline(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    args, overrides = parser.parse_known_args(argv)
    cli.go_offline(args.offline)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; it must be at least 1.")
    seeds, budget = read_seeds(args.seeds), read_budget(args.budget)
    entries = read_entries(args, seeds, budget, overrides)
    folder = pathlib.Path(args.workdir)
    # every label has a process of its own, and most of their programs are the same
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.resolve() / "compiled"))
    same = {"task": args.task, "budget": budget, "overrides": overrides}
    known = check_folder(folder, same, entries)
    cells = [(entry.label, seed, folder / entry.label / f"seed{seed}") for entry in entries for seed in seeds]
    waiting = [(label, seed) for label, seed, cell in cells if not grids.is_finished(cell)]
    unchecked = [e for e in entries if e.label not in known or any(label == e.label for label, _ in waiting)]
    golds = check_entries(unchecked)
    if args.dry_run:
        return {"workdir": args.workdir, "budget": args.budget, "cells": len(cells), "waiting": len(waiting)}
    rows = {e.label: {"method": e.method, "overrides": e.overrides, "gold": golds[e.label]} for e in unchecked}
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    machine = {"jobs": args.jobs, "cores": os.cpu_count(), "versions": versions}
    grids.write_request(folder, same | {"seeds": seeds, "labels": known | rows} | machine)
    report, failed = Report(folder, len(cells), len(waiting), args.quiet), []
    tasks = [(e.label, {seed: e.configs[seed] for seed in seeds if (e.label, seed) in waiting}) for e in entries]
    for label, seed, error in workers.run(functools.partial(train_cells, folder), tasks, args.jobs):
        report(label, seed, error)
        failed += [f"{label}/seed{seed}"] if error else []
    return {"workdir": args.workdir, "budget": args.budget, **conclude(folder, args.quiet), "failed": failed}


def read_seeds(text: str) -> list[int]:
    """The numbers of "0,1,2"."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(f"--seeds is {text!r}; give different whole numbers from 0, for example --seeds=0,1,2.")
    return [int(part) for part in parts]


def read_budget(text: str) -> dict[str, Any]:
    """The {"kind", "amount"} of "tokens:10000"."""
    kind, _, amount = text.partition(":")
    if kind not in BUDGETS:
        raise unknown("budget", kind, BUDGETS)
    if not amount.isdecimal() or int(amount) < 1:
        raise UserError(f"--budget is {text!r}; give a whole number from 1, for example --budget={kind}:100.")
    return {"kind": kind, "amount": int(amount)}


def read_entries(args: argparse.Namespace, seeds: list[int], budget: dict, overrides: list[str]) -> list[Entry]:
    """All rows with their configs; raises UserError for unknown methods and fields, and for labels that are no folder names."""
    rows: list[tuple[str, str, list[str]]] = [(name, name, []) for name in args.methods.split(",")]
    for text in args.variant:
        label, method, fields = (text.split(":", 2) + ["", ""])[:3]
        if not fields:
            raise UserError(f"--variant is {text!r}; write it as LABEL:METHOD:key=value[,key=value...].")
        # a comma inside a value, as in targets=('q','v'), is followed by no key
        rows.append((label, method, [f"--config.{field}" for field in re.split(r",(?=[\w.]+=)", fields)]))
    known = [name for _, name, _ in pkgutil.iter_modules(configs.__path__) if name not in NO_METHODS]
    arg, fixed = args.task if "," in args.task else f"{args.task},tiny", ("seed", BUDGETS[budget["kind"]])
    entries: list[Entry] = []
    for label, method, own in rows:
        if method not in known:
            raise unknown("method", method, known)
        if not re.fullmatch(r"\w[\w.+-]*", label) or any(entry.label == label for entry in entries):
            raise UserError(
                f"the label {label!r} is taken, or no folder name; give each row one of its own, as in no_average."
            )
        for name in fixed:
            if any(override.split("=")[0] == f"--config.{name}" for override in overrides + own):
                raise UserError(f"--config.{name} is what --seeds and --budget set; leave it out.")
        made = {}
        for seed in seeds:
            config = importlib.import_module(f"configs.{method}").get_config(arg)
            made[seed] = cli.apply_overrides(config, overrides + own)
            made[seed].update_from_flattened_dict({"seed": seed, BUDGETS[budget["kind"]]: budget["amount"]})
            check_tracking(made[seed])
        entries.append(Entry(label, method, own, made))
    return entries


def check_folder(folder: pathlib.Path, request: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """Raises UserError where the folder holds something else; returns the labels that compare.json has.

    Args: request: what has to be equal for all cells of a folder; methods and seeds may be added later.
    """
    if (folder / "config.json").exists():
        raise UserError(f"{folder} is the run folder of a `train` command; give a new --workdir.")
    old = grids.read_request(folder) if (folder / "compare.json").exists() else {"labels": {}}
    for name, value in request.items():
        if name in old and old[name] != value:
            raise UserError(f"{folder} compares with {name} {old[name]}, now it is {value}; give a new --workdir.")
    for entry in entries:
        for seed, config in entry.configs.items():
            cell = folder / entry.label / f"seed{seed}"
            if (cell / "config.json").exists():
                run_folder.open_workdir(str(cell), config, "must")
    return old["labels"]


def check_entries(entries: list[Entry]) -> dict[str, str]:
    """Builds each row's experiment for the first seed, in a process of its own, so that this one never holds a device.

    Returns: the gold text that each label's method sees. Raises: UserError for the first config that cannot run.
    """
    if not entries:
        return {}
    found = workers.ask(_check, [(entry.label, next(iter(entry.configs.values()))) for entry in entries])
    if isinstance(found, UserError):
        raise found
    return found


def _check(entries: list[tuple[str, ml_collections.ConfigDict]]) -> dict[str, str] | UserError:
    golds = {}
    for label, config in entries:
        try:
            golds[label] = experiment.build(config).algorithm.sees_gold
        except UserError as error:
            return UserError(f"{label}: {error}")
    return golds


def train_cells(
    folder: pathlib.Path, label: str, cells: dict[int, ml_collections.ConfigDict]
) -> Iterator[tuple[int, str]]:
    """Trains a label's cells one after the other; yields each seed with "" or its error."""
    for seed, config in cells.items():
        cell = folder / label / f"seed{seed}"
        try:
            _train_cell(cell, config)
            yield seed, ""
        except UserError as error:
            yield seed, str(error)
        except Exception as error:  # whatever it is, the other cells go on
            cell.mkdir(parents=True, exist_ok=True)
            (cell / "error.txt").write_text(traceback.format_exc())
            line = (str(error).splitlines() or [""])[0]
            yield seed, f"{type(error).__name__}: {line} ({cell / 'error.txt'})"


def _train_cell(cell: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    workdir, _ = run_folder.open_workdir(str(cell), config, "auto")
    (workdir / "error.txt").unlink(missing_ok=True)
    built = experiment.build(config)
    write_split(built, workdir)
    train.train(built, workdir, quiet=True)


class Report:
    """A bar over the cells on a terminal, a line on stderr for each that ends; failures are told even when quiet."""

    def __init__(self, folder: pathlib.Path, cells: int, waiting: int, quiet: bool):
        self.folder, self.cells, self.ended, self.quiet = folder, cells, cells - waiting, quiet
        self.bar = tqdm.tqdm(total=cells, initial=self.ended, desc="cells", disable=not on_terminal(quiet))

    def __call__(self, label: str, seed: int, error: str) -> None:
        self.ended += 1
        text = f"{label} seed {seed} failed: {error}"
        if not error:
            found = grids.cell_result(self.folder / label / f"seed{seed}")
            text = (
                f"{label} seed {seed}: {found['accuracy']:.3f} after {found['rounds']} rounds, {found['tokens']:.0f} tokens, "
                f"{found['seconds']:.0f} s ({self.ended} of {self.cells})"
            )
        if error or not self.quiet:
            self.bar.write(text, file=sys.stderr)
        self.bar.update(1)


def conclude(folder: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """table.csv, table.md, compare.png and compare.svg from the finished cells, and the table on stdout."""
    if not any(folder.glob("*/seed*/summary.json")):
        return {"table": [], "files": []}
    table = grids.grid_table(folder)
    shown = grids.show_table(table)
    table.to_csv(folder / "table.csv", index=False)
    (folder / "table.md").write_text(grids.to_markdown(shown))
    grids.plot_grid(folder, folder / "compare.png")
    short = grids.short_of_budget(folder)
    if short:
        print(
            f"ended at config.rounds, short of the budget: {', '.join(short)}; raise --config.rounds", file=sys.stderr
        )
    if not quiet:
        print(shown.to_string(index=False))
    rows = table.astype(object).where(pd.notna(table), None).to_dict("records")
    return {"table": rows, "files": ["table.csv", "table.md", "compare.png", "compare.svg"]}


if __name__ == "__main__":
    cli.run(main)
