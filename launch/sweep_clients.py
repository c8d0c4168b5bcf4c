"""Trains a grid over the number of clients, their cohort, and the split of examples.

The grid is clients x cohort x Dirichlet alpha x rank x method: one table and one figure, one
command. A cohort is a number (`10`: so many clients a round, all of them where there are fewer) or
a share (`10%`, rounded up). A fixed cohort keeps bytes, tokens and optimiser steps of a round
equal, so that only the population changes. A share keeps participation equal, and a round costs as
much as its clients.

All cells have one split, so that they can be compared: `federation.partition=resample`. Every
client, however many there are, draws its own 32 of the training examples (3,420 in `facts`), no
example twice, its labels (the gold options' letters) in Dirichlet(alpha) shares. Clients share
examples. A client of the cohort answers 8 of its examples a round and takes 2 optimiser steps on up
to 8 wins and 8 loses each. After 8 rounds come the held-out questions. --config.a.b=VALUE changes
any of this, for all cells.

WORKDIR gets a run folder a cell, cells.csv, table.csv, table.md, and sweep.png and .svg. The same
command goes on after a kill. Values and seeds may be added later. `seconds` depend on --jobs, which
share the cores: compare them within one command only.
"""

import math
from typing import Any

import pandas as pd

from spear_jax.algorithms import ALGORITHMS
from spear_jax.analysis import sweeps
from spear_jax.core.errors import UserError, unknown
from spear_jax.experiment import command_line, sweep
from spear_jax.experiment.grid import read_seeds

EXAMPLES = """
    python launch/sweep_clients.py --workdir=runs/clients --jobs=2
    python launch/sweep_clients.py --clients=10,100,1000 --cohort=10 --alpha=0.1,1,10 --rank=4,16 --method=spear,dpo \\
        --seeds=0,1,2 --workdir=runs/alpha --jobs=2
    python launch/sweep_clients.py --task=arc_challenge,qwen2.5-1.5b --clients=50,500 --workdir=runs/arc --slurm=arc.sbatch \\
        --config.federation.max_examples_per_client=100 --config.rollout.examples=32
"""
FIELDS = {
    "clients": "federation.num_clients",
    "cohort": "federation.clients_per_round",
    "alpha": "federation.dirichlet_alpha",
    "rank": "lora.rank",
    "method": "algorithm.name",
}
SETTING = {
    "federation.partition": "resample",
    "federation.max_examples_per_client": 32,
    "rollout.examples": 8,
    "train.steps": 2,
    "train.batch_size": 8,
    "rounds": 8,
    "eval.every": 8,
}


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("", __doc__, EXAMPLES)
    parser.prog = "python launch/sweep_clients.py"
    parser.add_argument(
        "--clients", default="5,10,50,100,500,1000,5000,10000", help="default: %(default)s"
    )
    parser.add_argument("--cohort", default="10,10%", help="numbers or shares (default: 10,10%%)")
    parser.add_argument(
        "--alpha", default="1.0", help="Dirichlet concentrations; small is uneven (default: 1.0)"
    )
    parser.add_argument("--rank", default="16", help="of the adapters (default: 16)")
    parser.add_argument(
        "--method",
        default="spear,feedback_sft",
        help="names of methods (default: %(default)s)",
    )
    parser.add_argument(
        "--task", default="facts,tiny,small", help="TASK,MODEL[,VARIANT...] (default: %(default)s)"
    )
    sweep.add_flags(parser, seeds="0")
    args, overrides = parser.parse_known_args(argv)
    grid = {name: getattr(args, name).split(",") for name in FIELDS}
    settings = make_settings(args, grid, overrides)
    fields = [FIELDS[name] for name in ("method", "clients", "cohort", "alpha", "rank")]
    request = {"config": args.task, "overrides": overrides, "fields": fields, "grid": grid}
    return sweep.sweep(
        args, request, settings, FIELDS["clients"], lambda table: split_lines(table, grid["cohort"])
    )


def make_settings(
    args: Any, grid: dict[str, list[str]], overrides: list[str]
) -> list[sweep.Setting]:
    """Returns every cell's setting, the most clients first, so that no long run comes last."""
    populations = sorted({read_count(text) for text in grid["clients"]}, reverse=True)
    seeds = read_seeds(args.seeds)
    fixed = [f"--config.{name}={value}" for name, value in SETTING.items()]
    command_line.import_named(overrides)
    settings: list[sweep.Setting] = []
    for count in populations:
        points = sweep.product(
            {
                FIELDS["clients"]: [str(count)],
                # a number and a share may be the same clients
                FIELDS["cohort"]: list(
                    dict.fromkeys(str(cohort_size(text, count)) for text in grid["cohort"])
                ),
                FIELDS["alpha"]: grid["alpha"],
                FIELDS["rank"]: grid["rank"],
            }
        )
        for method in grid["method"]:
            combined = [{FIELDS["method"]: method} | point for point in points]
            settings += sweep.make_settings(
                source(method, args.task), combined, fixed + overrides, seeds
            )
    return settings


def source(method: str, task: str) -> str:
    """Returns NAME:ARG of a method's preset."""
    if method not in ALGORITHMS:
        raise unknown("method", method, ALGORITHMS)
    return f"{method}:{task}"


def read_count(text: str) -> int:
    """Reads a number of clients."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"--clients has {text!r}; give whole numbers from 1, for example --clients=10,100,1000."
        )
    return int(text)


def cohort_size(text: str, clients: int) -> int:
    """Returns how many of `clients` are in a round's cohort of "10" or "10%".

    Shares are rounded up:

        >>> cohort_size("10", 5), cohort_size("10%", 50), cohort_size("10%", 51)
        (5, 5, 6)
    """
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not (0 < number <= 100 if share else number >= 1 and number.is_integer()):
        raise UserError(
            f"--cohort has {text!r}; give numbers from 1 or shares up to 100%, for example "
            f"--cohort=10,10%."
        )
    return math.ceil(number * clients / 100) if share else min(clients, int(number))


def split_lines(table: pd.DataFrame, cohorts: list[str]) -> list[sweeps.Line]:
    """Splits the table into a line for every cohort rule and setting of the other fields."""
    others = [FIELDS[name] for name in ("method", "alpha", "rank")]
    lines = []
    for text in cohorts:
        sizes = table[FIELDS["clients"]].map(lambda count, text=text: cohort_size(text, count))
        rows = table[table[FIELDS["cohort"]] == sizes]
        name = f"cohort {text}" if len(cohorts) > 1 else ""
        for line in sweeps.split_lines(rows, others) if len(rows) else []:
            lines.append(sweeps.Line(", ".join(filter(None, (line.label, name))), line.rows))
    return lines


if __name__ == "__main__":
    command_line.run(main)
