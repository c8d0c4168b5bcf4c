"""Runs or continues an experiment: rounds of rollout, local training and aggregation, evaluated and checkpointed.

The experiment is --config=FILE[:ARG]; --config.a.b=VALUE changes one of its fields.

The run folder holds config.json, metrics.jsonl, checkpoints/, traces/, tensorboard/, split.json and, at the end,
summary.json and figures.
"""

import json
import math
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from spear_jax import cli, devices, experiment, run_folder
from spear_jax.compiles import Compiles, keep_programs, trim_after_compiling
from spear_jax.dry_run import dry_run, write_split
from spear_jax.experiment import Experiment
from spear_jax.federated import round as rounds
from spear_jax.federated.checkpoint import Checkpoints
from spear_jax.federated.tracking import Tracking, check_tracking
from spear_jax.federated.writer import Nowhere, Progress, Writer
from spear_jax.types import ServerState

EXAMPLES = """
    python -m spear_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m spear_jax.train --config=configs/spear.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc --config.seed=43
    python -m spear_jax.train --config=configs/quickstart.py --workdir=runs/try --dry-run
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.parser("train", __doc__, EXAMPLES)
    parser.add_argument("--workdir", required=True, help="the run folder")
    parser.add_argument("--resume", default="auto", help="auto (go on with a run of the same config), never, must")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no table")
    cli.add_offline(parser)
    parser.add_argument(
        "--distributed",
        default="",
        help="several processes: auto (SLURM, TPU pods, Open MPI), or HOST:PORT,COUNT,NUMBER; the workdir is shared by all",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything; show config, split, sizes, memory, bytes and prompts; train nothing",
    )
    args, rest = parser.parse_known_args(argv)
    cli.go_offline(args.offline)
    config = cli.read_config(rest)
    check_tracking(config)
    keep_programs()
    devices.join(args.distributed)
    built = experiment.build(config)
    if args.dry_run:
        return dry_run(built, args.workdir)
    workdir = open_folder(built, args.workdir, args.resume)
    return train(built, workdir, args.quiet)


def open_folder(built: Experiment, workdir: str, resume: str) -> pathlib.Path:
    """The run folder: the first process makes or checks it and draws the split, the others come after."""
    if devices.writes():
        folder, _ = run_folder.open_workdir(workdir, built.config, resume)
        write_split(built, folder)
    devices.wait_for_all("run folder")
    return run_folder.open_workdir(workdir, built.config, "auto")[0]


def train(built: Experiment, workdir: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """The round loop. Returns the summary."""
    trim_after_compiling()
    config = built.config
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best)
    state = built.initial_state()
    found = checkpoints.restore(state)
    line = None
    if found is not None:
        state, meta = found
        line = meta["line"]
        built.actor.sampler.shapes.load(meta["shapes"])
    first, done = devices.writes(), int(state.round)
    if found is not None and first:
        print(f"going on after round {done}", file=sys.stderr)
    # always placed alike, or the programs would compile again; a method's memory stays on the host
    state = built.on_devices(state.replace(memory={})).replace(memory=state.memory)
    tracking = Tracking(workdir, config) if first and config.wandb else None
    writer = Writer(workdir, None if found is None else done, line, tracking) if first else Nowhere()
    progress = Progress(quiet or not first, config.rounds, done)
    built.actor.report = progress.stage_rows
    questions = len(built.evaluator.prompts)
    built.evaluator.report = lambda rows: progress.stage_rows("evaluate", rows, questions)
    if found is None:
        line = {"round": 0, "time": time.time()} | evaluate(built, state)
        writer.write(line)
        checkpoints.save(state, line, built.actor.sampler.shapes.save())
    blocked, compiles = 0.0, Compiles()
    while not over(built, state, line):
        state, line, told = one_round(built, state, blocked, rounds.Spent.read(line))
        line |= compiles.take()
        if config.record_traces:
            writer.traces(line["round"], told, built.actor.renderer.pieces)
        writer.write(line)
        began = time.perf_counter()
        checkpoints.save(state, line, built.actor.sampler.shapes.save())
        blocked = time.perf_counter() - began
        progress.round_done(line)
    progress.close()
    writer.close()
    checkpoints.close()
    return finish(workdir, quiet) if first else {"workdir": str(workdir), "process": jax.process_index()}


def over(built: Experiment, state: ServerState, line: dict[str, Any]) -> bool:
    """Whether the run is done: all its rounds, or its budget (config.budget) reached by the last one."""
    budget, spent = built.config.budget, rounds.Spent.read(line)
    reached = (budget.tokens and spent.tokens >= budget.tokens) or (budget.seconds and spent.seconds >= budget.seconds)
    return bool(reached) or int(state.round) >= built.config.rounds


def one_round(
    built: Experiment, state: ServerState, blocked: float, spent: rounds.Spent
) -> tuple[ServerState, dict, list]:
    """One round and its evaluation.

    Args:
        blocked: seconds that the previous round's checkpoint held the loop up (saving itself is asynchronous).
        spent: what the run has used before this round.
    """
    began = time.perf_counter()
    state, metrics, told = rounds.run_round(built, state, spent)
    number = int(state.round)
    if number == 2:
        built.actor.sampler.shapes.freeze()  # from here on batches are padded into shapes that exist
    if is_due(built.config, number) or over(built, state, metrics):
        metrics |= evaluate(built, state)
    metrics["time/checkpoint"] = blocked
    metrics["time/round"] = time.perf_counter() - began
    metrics["memory/peak_bytes"] = float(peak_bytes())
    return state, {"round": number, "time": time.time()} | metrics, told


def is_due(config: ml_collections.ConfigDict, number: int) -> bool:
    """Whether round `number` (from 1) is to be evaluated by its number; the last round is in any case."""
    return number <= max(1, config.eval.first_rounds) or number % config.eval.every == 0


def evaluate(built: Experiment, state: ServerState) -> dict[str, float]:
    """Held-out accuracy of the global adapter, by the contract's names; of local adapters the mean over clients."""
    began = time.perf_counter()
    found = [built.evaluator(policy.base, policy.lora) for policy in built.policies(state.lora)]
    accuracy, count = float(np.mean([one.value for one in found])), found[0].count
    metrics = {
        "eval/accuracy": accuracy,
        "eval/count": float(count),
        "eval/stderr": math.sqrt(accuracy * (1 - accuracy) / count),
        "time/eval": time.perf_counter() - began,
    }
    if found[0].nll is not None:
        metrics["eval/nll"] = float(np.mean([one.nll for one in found]))
    return metrics


def finish(workdir: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """summary.json, accuracy.png and, unless quiet, a table."""
    from spear_jax import analysis  # here, not above: training does without the memory that pandas takes

    summary = analysis.summarise(workdir)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    analysis.plot_accuracy([workdir], workdir / "accuracy.png")
    if not quiet:
        print(analysis.round_table(workdir))
        print(f"figure: {workdir / 'accuracy.png'}   summary: {workdir / 'summary.json'}")
    return {"workdir": str(workdir), **summary}


def peak_bytes() -> int:
    """Peak memory of the first device; on a CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    cli.run(main)
