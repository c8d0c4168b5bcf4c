"""Times the phases of a round, and compares them with the machine's ceilings.

Phases: rollout, revision, evaluation, local_step, aggregation, checkpoint, round. Prompts and rows
are random tokens of real lengths. Every completion has exactly the preset's number of new tokens.

--against=hf runs the same work as a user would otherwise: transformers' generate, PEFT and torch's
AdamW, clients one after another, in the same dtype and with as many threads. Each side has a
process of its own for each phase. Repeats alternate between the sides. The first call of each
compiles, and is reported apart. A floor is the FLOPs and bytes that a phase needs (real tokens,
each once) at the machine's measured ceilings.

--clients=1,3,10 measures local training and aggregation by cohort size instead. --config takes an
experiment's sizes. Other jobs on the machine distort all of it.

--compile-for=h100-1 (h100-8, tpu-v5e-1, tpu-v5e-8, tpu-v5e-16) measures nothing. It compiles the
programs of a config's round for an accelerator that is not there, and tells what the compiler says:
memory, operations, bytes, kernels, collectives, and by arithmetic the seconds of a round. It needs
`pip install "spear-jax[aot]"`.

With --out the result is written after every phase or cohort size. Its "done" and "left" name the
parts. A benchmark that is stopped leaves what it had.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from spear_jax.benchmark import machine, rival, side, workload
from spear_jax.benchmark.progress import Progress
from spear_jax.benchmark.workload import PHASES, Preset, Workload
from spear_jax.core.errors import UserError, unknown
from spear_jax.experiment import processes
from spear_jax.experiment.processes import Peer

# Both sides' processes import this file, and JAX's memory must not count as the rival's. So modules
# that import JAX are imported inside functions.

EXAMPLES = """
    python -m spear_jax.benchmark --preset=tiny
    python -m spear_jax.benchmark --preset=smollm2-135m --against=hf --repeats=5 --out=runs/speed.json
    python -m spear_jax.benchmark --preset=smollm2-135m --phases=rollout,local_step --repeats=1
    python -m spear_jax.benchmark --preset=qwen2.5-1.5b --against=hf --phases=rollout,local_step
    python -m spear_jax.benchmark --preset=tiny --clients=1,3,10,30,100,300,1000 --out=runs/clients.json
    python -m spear_jax.benchmark --config=spear:arc_challenge,smollm2-135m,cpu
    python -m spear_jax.benchmark --compile-for=h100-1 --config=spear:arc_challenge,qwen2.5-1.5b
    python -m spear_jax.benchmark --compile-for=h100-8 --programs=train,decode --config.devices.model=2
"""
# For both sides' processes. The rival needs room on the same GPU. Its threads are to sleep while
# they wait: where anything else runs on the cores, spinning made its steps up to fifty times
# slower. Large pages are for large arrays.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "OMP_WAIT_POLICY": "passive",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
RATIOS = ("rollout", "revision", "evaluation", "local_step", "round")


def main(argv: list[str]) -> dict[str, Any]:
    from spear_jax.benchmark import floors, report

    args, rest = read_flags(argv)
    if args.compile_for:
        from spear_jax.benchmark.aot import command

        return command.compile_for(args, rest)
    preset = read_sizes(args, rest)
    phases, cohorts = workload.read_phases(args.phases), workload.read_cohorts(args.clients)
    out = args.out and report.check_out(args.out)
    if args.against:
        rival.require()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    host = processes.ask(machine.measure, None)
    check_attention(preset, host["platform"])
    if host["platform"] == "gpu":  # its memory is its own: nothing has to be fetched back
        preset = dataclasses.replace(preset, settle=min(preset.settle, 1.0))
    work = workload.make_workload(preset, host["platform"])
    check_memory(preset.name, floors.memory_needed(work, bool(args.against)), host)
    result = describe(args, preset, host)
    parts: list[Any] = cohorts or phases
    result |= {"done": [], "left": parts, "cohorts" if cohorts else "phases": [] if cohorts else {}}
    if args.against:
        result["ratios"] = {}
    sides = ("ours", "rival") if args.against else ("ours",)
    try:
        if cohorts:
            for measured in run_cohorts(work, cohorts, args.repeats, args.quiet):
                result["cohorts"].append(measured)
                keep(result, out)
        else:
            for phase, answers in run_phases(work, phases, sides, args.repeats, args.quiet):
                entry = result["phases"][phase] = report.tell(phase, answers, work, host)
                if args.against and phase in RATIOS:
                    result["ratios"][phase] = entry["ratio"]
                keep(result, out)
    except KeyboardInterrupt as stop:
        done = ", ".join(map(str, result["done"])) or "nothing"
        where = f"{out} has {done}" if out else "nothing is kept without --out"
        stop.args = (f"stopped; {where}",)
        raise
    if not args.quiet:
        print(report.table(result).to_string(index=False))
    return result


def keep(result: dict[str, Any], out: pathlib.Path | None) -> None:
    """Counts the next of result["left"] as done, and writes the result so far."""
    from spear_jax.benchmark import report

    result["done"], result["left"] = [*result["done"], result["left"][0]], result["left"][1:]
    if out:
        report.write(result, out)


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the rest for --config; raises UserError for impossible values."""
    from spear_jax.experiment import command_line

    parser = command_line.parser("benchmark", __doc__, EXAMPLES)
    parser.add_argument(
        "--preset", help=f"the sizes: {', '.join(workload.PRESETS)} (default: tiny)"
    )
    parser.add_argument(
        "--model",
        help="a folder or Hub id with weights (default: random ones of the preset's shape)",
    )
    parser.add_argument("--dtype", help="of the base: float32 or bfloat16 (default: the preset's)")
    parser.add_argument("--against", help="hf: transformers, PEFT and torch, in the same run")
    parser.add_argument("--phases", help=f"separated by commas (default: {','.join(PHASES)})")
    parser.add_argument("--clients", help="cohort sizes, separated by commas")
    parser.add_argument(
        "--at-once", type=int, help="clients trained together, 0: all (default: the preset's)"
    )
    parser.add_argument("--attention", help="our kernel: xla or cudnn (default: xla)")
    parser.add_argument(
        "--compile-for", help="an accelerator that is not there: h100-1, tpu-v5e-8, ..."
    )
    parser.add_argument(
        "--programs", help="of --compile-for, separated by commas (default: all of a round)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed calls after the first one (default: 3)"
    )
    parser.add_argument(
        "--out", help="a .json file for the result; a table and, with --clients, a figure beside it"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")
    args, rest = parser.parse_known_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}; it must be at least 1.")
    if args.against not in (None, "hf"):
        raise unknown("rival (--against)", args.against, ["hf"])
    if args.clients and (args.against or args.phases):
        raise UserError(
            "--clients measures local training by cohort size alone; leave out --against and "
            "--phases."
        )
    if args.at_once is not None and args.at_once < 0:
        raise UserError(f"--at-once is {args.at_once}; give a number of clients, or 0 for all.")
    unused = ("preset", "model", "dtype", "against", "phases", "clients", "at_once", "attention")
    if args.compile_for and (given := [name for name in unused if getattr(args, name)]):
        raise UserError(
            f"--{given[0].replace('_', '-')} beside --compile-for, which compiles the programs of --config; leave it "
            "out."
        )
    if args.programs and not args.compile_for:
        raise UserError("--programs is for --compile-for; give a target, or take --phases.")
    return args, rest


def read_sizes(args: argparse.Namespace, rest: list[str]) -> Preset:
    """Returns the sizes of --preset or --config, with --model's model and --dtype's dtype.

    Args: rest: the --config flags.
    Raises: UserError where both give sizes, and for a model that both sides cannot read.
    """
    from spear_jax.experiment import command_line
    from spear_jax.models.config import read_config
    from spear_jax.models.io.huggingface import find_folder
    from spear_jax.models.io.tensor_map import check_dtype

    if rest and args.preset:
        raise UserError(
            f"{rest[0]!r} beside --preset: sizes come from one of the two; leave the other out."
        )
    config = command_line.read_config(rest) if rest else None
    preset = workload.read_preset(args.preset or "tiny")
    model = args.model or (config.model if config else "tiny" if preset.name == "tiny" else "")
    if model.endswith(".gguf"):
        raise UserError(
            f"--model is {model!r}; benchmark takes a model folder or a Hub id, which both sides "
            f"can read."
        )
    if model not in ("", "tiny"):
        folder = find_folder(model)
        preset = dataclasses.replace(preset, model=str(folder), shape=read_config(folder)[1])
    if config:
        preset = workload.config_preset(config, preset.shape, preset.model)
    if args.dtype:
        check_dtype(args.dtype)
        preset = dataclasses.replace(preset, dtype=args.dtype)
    if args.at_once is not None:
        preset = dataclasses.replace(preset, clients_at_once=args.at_once)
    return dataclasses.replace(preset, attention=args.attention or preset.attention)


def describe(args: argparse.Namespace, preset: Preset, host: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a result about the run and its machine."""
    default = "embedded" if preset.model == str(workload.TINY) else preset.model or "random weights"
    named = ("name", "shape", "model", "dtype")
    return {
        "preset": preset.name,
        "model": args.model or default,
        "dtype": preset.dtype,
        "sizes": {name: value for name, value in vars(preset).items() if name not in named},
        "repeats": args.repeats,
        "peak_memory": machine.peak_source(host["platform"]),
        "machine": host,
        "versions": machine.versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT},
        "compilation_cache": "JAX_COMPILATION_CACHE_DIR" in os.environ,
    }


def check_memory(name: str, needed: int, host: dict[str, Any]) -> None:
    """Raises UserError where the machine has less memory than the preset needs.

    Args:
        needed: bytes, of `floors.memory_needed`.
        host: of `machine.measure`.
    """
    free = host["free_bytes"]
    if free is not None and needed > free:
        raise UserError(
            f"preset {name!r} needs about {needed / 1e9:.1f} GB on this machine's "
            f"{host['device']!r}, and "
            f"{free / 1e9:.1f} GB are free; take a smaller --preset, leave out --against, or use "
            f"a device with more memory."
        )


def check_attention(preset: Preset, platform: str) -> None:
    """Raises UserError for a kernel that there is not, or that this machine cannot run."""
    from spear_jax.models import attention, config

    if preset.attention not in attention.KERNELS:
        raise unknown("kernel (--attention)", preset.attention, attention.KERNELS)
    width = config.parse_config(preset.shape).head_width
    attention.check_kernel(preset.attention, platform, preset.dtype, width)


def run_phases(
    work: Workload, phases: list[str], sides: tuple[str, ...], repeats: int, quiet: bool
) -> Iterator[tuple[str, dict[str, list]]]:
    """Yields each phase with {side: its answers, the first call's first}; the sides take turns.

    A phase has processes of its own: programs that other phases compiled are not its memory, and a
    GPU's high-water mark cannot be reset.
    """
    from spear_jax.experiment.run_logger import on_terminal

    calls = len(sides) * (repeats + 1)
    # every call of a phase settles first, so that phases take about as long as one another
    progress = Progress(dict.fromkeys(phases, 1.0), calls, on_terminal(quiet), quiet)
    with contextlib.closing(progress):
        for phase in phases:
            answers: dict[str, list] = {name: [] for name in sides}
            with contextlib.ExitStack() as stack:
                peers = {name: stack.enter_context(Peer(side.serve, name, work)) for name in sides}
                for _ in range(repeats + 1):
                    for name, peer in peers.items():
                        progress.call(f"{phase}, {name}")
                        answers[name].append(peer.ask((phase,)))
                        progress.called()
            progress.ended(phase)
            yield phase, answers


def run_cohorts(
    work: Workload, cohorts: list[int], repeats: int, quiet: bool
) -> Iterator[dict[str, Any]]:
    """Yields local training and aggregation by cohort size, all in one process."""
    from spear_jax.benchmark import report
    from spear_jax.experiment.run_logger import on_terminal

    sizes = {f"{size} clients": float(size) for size in cohorts}
    progress = Progress(sizes, repeats + 1, on_terminal(quiet), quiet)
    with contextlib.closing(progress), Peer(side.serve, "ours", work) as peer:
        for size, name in zip(cohorts, sizes, strict=True):
            progress.call(name)
            answers = []
            for _ in range(repeats + 1):
                answers.append(peer.ask(("cohort", size)))
                progress.called()
            progress.ended(name)
            measured = report.summarise(answers)
            per_client = measured["seconds"]["median"] / size
            yield {"clients": size, "seconds_per_client": per_client, **measured}


if __name__ == "__main__":
    from spear_jax.experiment import command_line

    command_line.run(main)
