"""Trains a grid over any fields of a config: one table, one figure.

Every combination and seed is a cell, an ordinary run folder WORKDIR/<setting>/seed<k>. --grid
FIELD=VALUE,VALUE... is one dimension. --config.a.b=VALUE changes a field of all cells. The cells
run here, --jobs at a time, each on its own share of the cores (on an accelerator leave it at 1), or
as a SLURM job array. The same command goes on after a kill. Finished cells are left alone, begun
ones go on, and one that fails does not stop the others. Values and seeds may be added later. All
configs are checked first.

WORKDIR gets cells.csv (one row a cell; `spear_jax.analysis.runs.load_sweep` reads the same),
table.csv and table.md (means over seeds), and the figure sweep.png and .svg against the first field
(or --x).
"""

from typing import Any

from spear_jax.analysis import sweeps
from spear_jax.core.errors import UserError, unknown
from spear_jax.experiment import command_line, sweep
from spear_jax.experiment.grid import read_seeds

EXAMPLES = """
    python -m spear_jax.sweep --config=spear:facts,tiny,small --grid federation.num_clients=5,10,50 \\
        --grid lora.rank=4,16 --seeds=0,1 --workdir=runs/sweep --jobs=2
    python -m spear_jax.sweep --config=spear:arc_challenge,qwen2.5-1.5b --grid train.learning_rate=5e-5,1e-4 --seeds=0,1,2 \\
        --workdir=runs/rates --slurm=runs/rates.sbatch --jobs=8 && sbatch --gpus-per-node=1 runs/rates.sbatch
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("sweep", __doc__, EXAMPLES)
    parser.add_argument("--config", required=True, help="NAME[:ARG] or FILE[:ARG], as for train")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="FIELD=VALUE,...", help="one dimension"
    )
    parser.add_argument(
        "--x", metavar="FIELD", help="along the figure's horizontal axis (default: the first)"
    )
    sweep.add_flags(parser)
    args, overrides = parser.parse_known_args(argv)
    grid = sweep.read_grid(args.grid)
    if not grid:
        raise UserError(
            "no dimension: give --grid FIELD=VALUE,VALUE..., for example --grid lora.rank=4,16."
        )
    x = args.x or next(iter(grid))
    if x not in grid:
        raise unknown("field of --x", x, grid)
    settings = sweep.make_settings(
        args.config, sweep.product(grid), overrides, read_seeds(args.seeds)
    )
    request = {"config": args.config, "overrides": overrides, "fields": list(grid), "grid": grid}
    others = [name for name in grid if name != x]
    return sweep.sweep(args, request, settings, x, lambda table: sweeps.split_lines(table, others))


if __name__ == "__main__":
    command_line.run(main)
