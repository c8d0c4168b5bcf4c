"""`benchmark --compile-for`: one target, one config."""

import argparse
import contextlib
from typing import Any

import jax

from spear_jax.benchmark import machine
from spear_jax.benchmark import report as benchmark_report
from spear_jax.benchmark.aot import measure, programs, report, targets
from spear_jax.benchmark.progress import Progress
from spear_jax.experiment import command_line
from spear_jax.experiment.run_logger import on_terminal

DEFAULT = "spear:arc_challenge,qwen2.5-1.5b"


def compile_for(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Compiles the programs of a config's round for args.compile_for, and returns the result.

    Args: rest: the --config flags.
    Raises: UserError for an unknown target, config or program, and where the compiler is missing.
    """
    name, target = args.compile_for, targets.find_target(args.compile_for)
    out = args.out and benchmark_report.check_out(args.out)
    config = command_line.read_config(rest, DEFAULT)
    targets.check_wheels(name, target)
    devices = targets.devices(name, target)
    played = programs.play(config, target, devices, args.programs or "")
    wanted = programs.chosen(played.programs, args.programs)
    result: dict[str, Any] = {
        "target": name,
        "device": devices[0].device_kind,
        "mesh": dict(played.mesh.shape),
        "config": rest or [f"--config={DEFAULT}"],
        "clients_at_once": played.experiment.federation.local.clients_at_once,
        "generations": [
            {"stage": one.stage, "prompts": one.prompts, "slots": one.slots, "steps": one.steps}
            for one in played.generations
        ],
        "machine": {"cpu": machine.cpu_name(), "cores": machine.cores()},
        "versions": machine.versions(),
        "programs": {},
        "round": [],
        "done": [],
        "left": list(wanted),
    }
    progress = Progress(dict.fromkeys(wanted, 1.0), 1, on_terminal(args.quiet), args.quiet)
    with contextlib.closing(progress):
        for program, recorded in wanted.items():
            progress.call(program)
            facts = measure.measure(recorded, played)
            facts["memory_share"] = facts["memory"]["needs"] / target.memory
            result["programs"][program] = facts
            result["round"] = measure.round_phases(played, result["programs"], target)
            result["done"], result["left"] = [*result["done"], program], result["left"][1:]
            if out:
                report.write(result, out)
            progress.called()
            progress.ended(program)
            jax.clear_caches()  # a compiled program holds memory
    if not args.quiet:
        print(report.programs(result).to_string(index=False))
        print(report.phases(result).to_string(index=False))
        print(report.NOTE)
    return result
