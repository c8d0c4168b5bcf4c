"""Runs or continues an experiment.

A round is rollout, local training and aggregation; it is evaluated and checkpointed. The experiment
is a preset, --config=NAME[:ARG], or a file of your own, --config=FILE.py[:ARG];
--config.a.b=VALUE changes one of its fields.

The run folder holds config.json, metrics.jsonl, checkpoints/, traces/, tensorboard/, split.json
and, at the end, summary.json and figures.
"""

import pathlib
from typing import Any

import jax

from spear_jax.core.compilation import enable_compilation_cache
from spear_jax.core.mesh import init_distributed, is_main_process
from spear_jax.experiment import command_line, run_folder
from spear_jax.experiment.builder import build
from spear_jax.experiment.dry_run import dry_run
from spear_jax.experiment.run import Run
from spear_jax.experiment.wandb_logger import check_wandb

EXAMPLES = """
    python -m spear_jax.train --config=quickstart --workdir=runs/quickstart
    python -m spear_jax.train --config=spear:arc_challenge,qwen2.5-1.5b --workdir=runs/arc --config.seed=43
    python -m spear_jax.train --config=experiments/mine.py --workdir=runs/mine
    python -m spear_jax.train --config=quickstart --workdir=runs/try --dry-run
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("train", __doc__, EXAMPLES)
    parser.add_argument("--workdir", required=True, help="the run folder")
    parser.add_argument(
        "--resume", default="auto", help="auto (go on with a run of the same config), never, must"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no table")
    command_line.add_offline(parser)
    command_line.add_fields(parser)
    parser.add_argument(
        "--distributed",
        default="",
        help="several processes: auto (SLURM, TPU pods, Open MPI), or HOST:PORT,COUNT,NUMBER; "
        "the workdir is shared by all",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything; show config, split, sizes, memory, bytes and prompts; train "
        "nothing",
    )
    args, rest = parser.parse_known_args(argv)
    command_line.go_offline(args.offline)
    config = command_line.read_config(rest)
    run_folder.check_names(args.workdir, args.resume)
    check_wandb(config)
    enable_compilation_cache()
    init_distributed(args.distributed)
    if args.dry_run:
        return dry_run(build(config), config, args.workdir)
    if is_main_process():
        run_folder.FolderLock(pathlib.Path(args.workdir)).check_free()
    run = Run(config, args.workdir, args.resume, quiet=args.quiet)
    summary = run.train()
    return summary if is_main_process() else worker_result(args.workdir)


def worker_result(workdir: str) -> dict[str, Any]:
    """Returns the result of a process that does not write files."""
    return {"workdir": workdir, "process": jax.process_index()}


if __name__ == "__main__":
    command_line.run(main)
