"""The training loop: rounds, evaluation, checkpoints and logs."""

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

from spear_jax.core.compilation import Compiles, release_after_compiling
from spear_jax.core.mesh import barrier, is_main_process
from spear_jax.experiment import run_folder
from spear_jax.experiment.builder import Experiment
from spear_jax.experiment.checkpoint import Checkpoints
from spear_jax.experiment.dry_run import write_split
from spear_jax.experiment.run_logger import NullLogger, Progress, RunLogger
from spear_jax.experiment.wandb_logger import WandbLogger
from spear_jax.federated import round as rounds
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.state import ServerState


def open_folder(built: Experiment, workdir: str, resume: str) -> pathlib.Path:
    """The run folder: the first process makes or checks it and draws the split, the others come
    after.
    """
    if is_main_process():
        folder, _ = run_folder.open_workdir(workdir, built.config, resume)
        write_split(built, folder)
    barrier("run folder")
    return run_folder.open_workdir(workdir, built.config, "auto")[0]


def train(built: Experiment, workdir: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """The round loop. Returns the summary."""
    release_after_compiling()
    config = built.config
    checkpoints = Checkpoints(
        workdir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
    )
    state = built.initial_state()
    found = checkpoints.restore(state)
    line = None
    if found is not None:
        state, meta = found
        line = meta["line"]
        built.worker.sampler.shapes.load(meta["shapes"])
    first, done = is_main_process(), int(state.round)
    if found is not None and first:
        print(f"going on after round {done}", file=sys.stderr)
    # always placed alike, or the programs would compile again; a method's memory stays on the host
    state = built.on_devices(state.replace(algorithm_state={})).replace(
        algorithm_state=state.algorithm_state
    )
    tracking = WandbLogger(workdir, config) if first and config.wandb else None
    writer = (
        RunLogger(workdir, None if found is None else done, line, tracking)
        if first
        else NullLogger()
    )
    progress = Progress(quiet or not first, config.rounds, done)
    built.worker.report = progress.stage_rows
    questions = len(built.evaluator.prompts)
    built.evaluator.report = lambda rows: progress.stage_rows("evaluate", rows, questions)
    if found is None:
        line = {"round": 0, "time": time.time()} | evaluate(built, state)
        writer.write(line)
        checkpoints.save(state, line, built.worker.sampler.shapes.save())
    blocked, compiles = 0.0, Compiles()
    while not over(built, state, line):
        state, line, records = one_round(built, state, blocked, BudgetUsed.read(line))
        line |= compiles.take()
        if config.record_traces:
            writer.traces(line["round"], records, built.worker.renderer.pieces)
        writer.write(line)
        began = time.perf_counter()
        checkpoints.save(state, line, built.worker.sampler.shapes.save())
        blocked = time.perf_counter() - began
        progress.round_done(line)
    progress.close()
    writer.close()
    checkpoints.close()
    return (
        finish(workdir, quiet)
        if first
        else {"workdir": str(workdir), "process": jax.process_index()}
    )


def over(built: Experiment, state: ServerState, line: dict[str, Any]) -> bool:
    """Whether the run is done: all its rounds, or its budget (config.budget) reached by the last
    one.
    """
    budget, spent = built.config.budget, BudgetUsed.read(line)
    reached = (budget.tokens and spent.tokens >= budget.tokens) or (
        budget.seconds and spent.seconds >= budget.seconds
    )
    return bool(reached) or int(state.round) >= built.config.rounds


def one_round(
    built: Experiment, state: ServerState, blocked: float, spent: BudgetUsed
) -> tuple[ServerState, dict, list]:
    """One round and its evaluation.

    Args:
        blocked: seconds that the previous round's checkpoint held the loop up (saving itself is
            asynchronous).
        spent: what the run has used before this round.
    """
    began = time.perf_counter()
    state, metrics, records = rounds.run_round(built, state, spent)
    number = int(state.round)
    if number == 2:
        # from here on batches are padded into shapes that exist
        built.worker.sampler.shapes.freeze()
    if is_due(built.config, number) or over(built, state, metrics):
        metrics |= evaluate(built, state)
    metrics["time/checkpoint"] = blocked
    metrics["time/round"] = time.perf_counter() - began
    metrics["memory/peak_bytes"] = float(peak_bytes())
    return state, {"round": number, "time": time.time()} | metrics, records


def is_due(config: ml_collections.ConfigDict, number: int) -> bool:
    """Whether round `number` (from 1) is to be evaluated by its number; the last round is in any
    case.
    """
    return number <= max(1, config.eval.first_rounds) or number % config.eval.every == 0


def evaluate(built: Experiment, state: ServerState) -> dict[str, float]:
    """Held-out accuracy of the global adapter, by the contract's names; of local adapters the mean
    over clients.
    """
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
    from spear_jax.analysis import (
        runs,
    )  # here, not above: training does without the memory that pandas takes

    summary = runs.summarise(workdir)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    runs.plot_accuracy([workdir], workdir / "accuracy.png")
    if not quiet:
        print(runs.round_table(workdir))
        print(f"figure: {workdir / 'accuracy.png'}   summary: {workdir / 'summary.json'}")
    return {"workdir": str(workdir), **summary}


def peak_bytes() -> int:
    """Peak memory of the first device; on a CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
