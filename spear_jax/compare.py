"""Trains methods side by side on an equal budget: one table, one figure.

Each method takes its preset. A cell is a method and a seed, an ordinary run folder
WORKDIR/<label>/seed<k>. Nothing starts before every config has been checked. A stopped comparison
goes on where it was. --config.a.b=VALUE changes a field for all methods; a --variant is one more
row, a method with fields of its own. --config.imports=MODULE brings in a method of your own. Every
worker of --jobs has its own share of the cores; on an accelerator leave it at 1.

A run ends with the first round at whose end the budget is used up, or at config.rounds.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from typing import Any

import pandas as pd

from spear_jax.algorithms import ALGORITHMS
from spear_jax.analysis import comparison, runs
from spear_jax.core.errors import UserError, unknown
from spear_jax.experiment import command_line, presets
from spear_jax.experiment.grid import (
    GridRow,
    check_folder,
    check_rows,
    machine,
    read_seeds,
    run,
    unfinished,
)

EXAMPLES = """
    python -m spear_jax.compare --methods=spear,grpo,sft --task=facts --seeds=0,1,2 --budget=tokens:50000 --workdir=runs/facts
    python -m spear_jax.compare --methods=spear,grpo --task=arc_challenge,smollm2-135m,cpu --seeds=0 --budget=rounds:8 \\
        --workdir=runs/arc --config.data.path=PATH
    python -m spear_jax.compare --methods=spear --variant=short:spear:train.steps=2,rollout.examples=16 --task=facts \\
        --seeds=0,1,2,3,4 --budget=rounds:12 --workdir=runs/steps --jobs=2
"""
BUDGETS = {"tokens": "budget.tokens", "rounds": "rounds", "seconds": "budget.seconds"}


@dataclasses.dataclass(frozen=True)
class Entry(GridRow):
    """One row of the table: a method, and the fields that are its own."""

    method: str
    overrides: list[str]


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("compare", __doc__, EXAMPLES)
    parser.add_argument("--methods", required=True, help="names of methods, separated by commas")
    parser.add_argument(
        "--task", required=True, help="TASK[,MODEL[,VARIANT...]]; the model is tiny where not given"
    )
    parser.add_argument("--seeds", required=True, help="for example 0,1,2")
    parser.add_argument(
        "--budget", required=True, help="tokens:N (generated), rounds:N or seconds:N"
    )
    parser.add_argument(
        "--workdir", required=True, help="the folder of all cells, the table and the figure"
    )
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (default: 1)")
    parser.add_argument(
        "--variant", action="append", default=[], help="LABEL:METHOD:key=value[,key=value...]"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")
    command_line.add_offline(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    args, overrides = parser.parse_known_args(argv)
    command_line.go_offline(args.offline)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; it must be at least 1.")
    seeds, budget = read_seeds(args.seeds), read_budget(args.budget)
    entries = read_entries(args, seeds, budget, overrides)
    folder = pathlib.Path(args.workdir)
    same = {"task": args.task, "budget": budget, "overrides": overrides}
    known = check_request(folder, same)
    check_folder(folder, entries)
    left = unfinished(folder, entries)
    unchecked = [entry for entry in entries if entry.label not in known or entry.label in left]
    golds = check_rows(unchecked, args.jobs)
    if args.dry_run:
        count, waiting = len(entries) * len(seeds), sum(map(len, left.values()))
        return {"workdir": args.workdir, "budget": args.budget, "cells": count, "waiting": waiting}
    rows = {
        e.label: {"method": e.method, "overrides": e.overrides, "gold": golds[e.label]}
        for e in unchecked
    }
    comparison.write_request(
        folder, same | {"seeds": seeds, "labels": known | rows} | machine(args.jobs)
    )
    failed = run(folder, entries, args.jobs, args.quiet)
    return {
        "workdir": args.workdir,
        "budget": args.budget,
        **conclude(folder, args.quiet),
        "failed": failed,
    }


def read_budget(text: str) -> dict[str, Any]:
    """Reads the {"kind", "amount"} of "tokens:10000"."""
    kind, _, amount = text.partition(":")
    if kind not in BUDGETS:
        raise unknown("budget", kind, BUDGETS)
    if not amount.isdecimal() or int(amount) < 1:
        raise UserError(
            f"--budget is {text!r}; give a whole number from 1, for example --budget={kind}:100."
        )
    return {"kind": kind, "amount": int(amount)}


def read_entries(
    args: argparse.Namespace, seeds: list[int], budget: dict, overrides: list[str]
) -> list[Entry]:
    """Returns all rows with their configs.

    Raises: UserError for unknown methods and fields, and for labels that are no folder names.
    """
    rows: list[tuple[str, str, list[str]]] = [(name, name, []) for name in args.methods.split(",")]
    for text in args.variant:
        label, method, fields = (text.split(":", 2) + ["", ""])[:3]
        if not fields:
            raise UserError(
                f"--variant is {text!r}; write it as LABEL:METHOD:key=value[,key=value...]."
            )
        # a comma inside a value, as in targets=('q','v'), is followed by no key
        rows.append(
            (label, method, [f"--config.{field}" for field in re.split(r",(?=[\w.]+=)", fields)])
        )
    command_line.import_named(overrides)
    arg = args.task if "," in args.task else f"{args.task},tiny"
    fixed = ("seed", BUDGETS[budget["kind"]])
    entries: list[Entry] = []
    for label, method, fields_of_row in rows:
        if method not in ALGORITHMS:
            raise unknown("method", method, ALGORITHMS)
        if not re.fullmatch(r"\w[\w.+-]*", label) or any(entry.label == label for entry in entries):
            raise UserError(
                f"the label {label!r} is taken, or no folder name; give each row one of its own, "
                f"as in no_average."
            )
        for name in fixed:
            if any(text.split("=")[0] == f"--config.{name}" for text in overrides + fields_of_row):
                raise UserError(f"--config.{name} is what --seeds and --budget set; leave it out.")
        config = presets.method_config(method, arg)
        command_line.apply_overrides(config, overrides + fields_of_row)
        configs = {seed: config.copy_and_resolve_references() for seed in seeds}
        for seed in seeds:
            configs[seed].update_from_flattened_dict(
                {"seed": seed, BUDGETS[budget["kind"]]: budget["amount"]}
            )
        entries.append(Entry(label, configs, method, fields_of_row))
    return entries


def check_request(folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """Raises UserError where the folder holds another comparison.

    Args: request: the values that are equal for all runs of a folder; methods and seeds may be
        added later.
    Returns: the labels that compare.json has.
    """
    old = runs.read_request(folder) if (folder / "compare.json").exists() else {"labels": {}}
    for name, value in request.items():
        if name in old and old[name] != value:
            raise UserError(
                f"{folder} compares with {name} {old[name]}, now it is {value}; give a new "
                f"--workdir."
            )
    return old["labels"]


def conclude(folder: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """Writes table and figure from the finished runs, and prints the table.

    The files are table.csv, table.md, compare.png and compare.svg. table.md and the screen also have
    the paired differences.
    """
    if not any(folder.glob("*/seed*/summary.json")):
        return {"table": [], "paired": [], "files": []}
    table = comparison.grid_table(folder)
    shown = comparison.show_table(table)
    table.to_csv(folder / "table.csv", index=False)
    paired = comparison.paired_table(folder)
    told = comparison.show_paired(paired)
    markdown = comparison.to_markdown(shown)
    if len(paired):
        markdown += f"\nPaired differences, seed by seed:\n\n{comparison.to_markdown(told)}"
    (folder / "table.md").write_text(markdown, encoding="utf-8")
    comparison.plot_grid(folder, folder / "compare.png")
    short = comparison.short_of_budget(folder)
    if short:
        print(
            f"ended at config.rounds, short of the budget: {', '.join(short)}; raise "
            f"--config.rounds",
            file=sys.stderr,
        )
    if not quiet:
        print(shown.to_string(index=False))
        if len(paired):
            print(f"\npaired differences, seed by seed:\n{told.to_string(index=False)}")
    records = lambda x: x.astype(object).where(pd.notna(x), None).to_dict("records")
    return {
        "table": records(table),
        "paired": records(paired),
        "files": ["table.csv", "table.md", "compare.png", "compare.svg"],
    }


if __name__ == "__main__":
    command_line.run(main)
