"""What a compiled program says of itself, and what a round of such programs comes to.

Nothing here ran on the target. Counts and bytes are the compiler's or the program's; seconds of a
round are arithmetic.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from spear_jax.benchmark.aot.flops import count_flops, count_heads
from spear_jax.benchmark.aot.ghosts import Ghost, Program
from spear_jax.benchmark.aot.hlo import Buffer, Count, Module
from spear_jax.benchmark.aot.programs import Played
from spear_jax.benchmark.aot.targets import Target
from spear_jax.core.mesh import CLIENTS, MODEL
from spear_jax.federated.local_training import LocalBatches
from spear_jax.models.config import ModelConfig
from spear_jax.models.lora import projection_shapes

SHARE = 0.45  # of the peak that long products are taken to reach


def measure(program: Program, played: Played) -> dict[str, Any]:
    """Traces, lowers and compiles a program, and returns what is known of it.

    Counts of loops whose length is data are told for one pass ("loop"), beside the rest ("once").
    FLOPs, bytes, kernels and memory are those of one device.
    """
    compiled, traced = program.compiled, program.traced
    module = Module(compiled.as_text())
    share = lambda count: Count(count.once / played.mesh.size, count.loop / played.mesh.size)
    model = played.experiment.model.config
    together = played.experiment.federation.local.clients_at_once
    heads = count_heads(traced.jaxpr.jaxpr, model.vocab_size)
    logits = largest_logits(module, model.vocab_size, played.mesh.shape[MODEL])
    return {
        "function": program.name,
        "seconds": program.seconds,
        "memory": memory(compiled, program, played),
        "flops": dataclasses.asdict(share(count_flops(traced.jaxpr.jaxpr))),
        "bytes": dataclasses.asdict(module.bytes),
        "kernels": dataclasses.asdict(module.kernels),
        "tokens_a_pass": heads.loop,
        "collectives": module.collectives(),
        "logits": None if logits is None else str(logits),
        "logits_bytes": 0 if logits is None else logits.bytes,
        "scored_bytes": scored_bytes(program, played),
        **weights(module, model, played.experiment.settings.dtype, together),
    }


def memory(compiled: Any, program: Program, played: Played) -> dict[str, int]:
    """Returns the bytes of one device that a program needs.

    `needs` is arguments + results - aliased ones + temporary arrays. `beside` is the part of the
    base that lies there meanwhile and is no argument, as while a merged copy generates.
    """
    stats = compiled.memory_analysis()
    fields = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporary": "temp"}
    held = {ours: getattr(stats, f"{theirs}_size_in_bytes") for ours, theirs in fields.items()}
    given = {id(leaf) for leaf in jax.tree.leaves((program.args, program.kwargs))}
    base = jax.tree.leaves(played.experiment.model.base)
    beside = sum(leaf.held() for leaf in base if id(leaf) not in given)
    needs = held["arguments"] + held["outputs"] - held["aliased"] + held["temporary"]
    return {**held, "needs": needs, "beside": beside}


def largest_logits(module: Module, vocabulary: int, parts: int) -> Buffer | None:
    """Returns the largest float32 array with the vocabulary behind, whole or split in parts."""
    sizes = {vocabulary, vocabulary // parts}
    found = [
        buffer
        for buffer, _ in module.buffers()
        if buffer.dtype == "f32" and buffer.dims and buffer.dims[-1] in sizes
    ]
    return max(found, key=lambda buffer: buffer.bytes, default=None)


def scored_bytes(program: Program, played: Played) -> int:
    """Returns the bytes that the logits of all positions which a pass of local training scores would
    take; 0 for other programs.
    """
    batches = _batches(program)
    if batches is None:
        return 0
    together = played.experiment.federation.local.clients_at_once
    positions = together * batches.blocks.target.shape[-1]
    return 4 * positions * played.experiment.model.config.vocab_size


def weights(module: Module, model: ModelConfig, dtype: str, together: int) -> dict[str, list[str]]:
    """Returns arrays that stand for a base which is not left as it is.

    batched: shaped like a projection, with a leading size that clients which train together divide.
    gathered: results of all-gather as large as a projection of all layers or the embedding.

    Args:
        dtype: of the base, "float32" or "bfloat16".
        together: clients that train together on a device; of one nothing can be batched.
    """
    pairs = set(projection_shapes(model).values())
    whole = {(model.layers, *pair) for pair in pairs} | {(model.vocab_size, model.width)}

    def batched(buffer: Buffer) -> bool:
        lead = math.prod(buffer.dims[:-2])
        tails = {buffer.dims[-2:], buffer.dims[-2:][::-1]}
        alike = together > 1 and lead % together == 0 and lead != model.layers
        return len(buffer.dims) > 2 and bool(tails & pairs) and alike

    kind = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    own = [(buffer, one) for buffer, one in module.buffers() if buffer.dtype == kind]
    gathers = [buffer for buffer, one in own if one.operation.startswith("all-gather")]
    return {
        "batched": sorted({str(buffer) for buffer, _ in own if batched(buffer)}),
        "gathered": sorted({str(buffer) for buffer in gathers if buffer.dims in whole}),
    }


def _batches(program: Program) -> LocalBatches | None:
    return next((x for x in program.args if isinstance(x, LocalBatches)), None)


def passes(program: Program, played: Played) -> float:
    """Returns how many blocks a local step takes on the slowest device, on average over its steps.

    Clients that train together take as many passes as the one with most blocks. It is 1 where a
    program trains nobody.
    """
    batches = _batches(program)
    if batches is None:
        return 1.0
    count = batches.count
    assert isinstance(count, Ghost) and count.value is not None
    at_once = played.experiment.federation.local.clients_at_once
    clients, steps = count.shape
    together = count.value.reshape(played.mesh.shape[CLIENTS], -1, at_once, steps).max(axis=2)
    return float(np.max(together.mean(axis=(1, 2))))


def round_phases(
    played: Played, measured: dict[str, dict[str, Any]], target: Target
) -> list[dict[str, Any]]:
    """Returns the phases of a round, each with its work and the seconds that it takes by arithmetic;
    phases of programs that were not measured are left out.

    `compute`: FLOPs at SHARE of the peak. `memory`: bytes at the peak bandwidth. `launch`: kernels
    at `Target.launch`. `least` is the largest of the three. `most` takes memory and launches one
    after the other; what products wait for is in SHARE.
    """
    name_of = {id(program): name for name, program in played.programs.items()}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, program: Program, calls: float, loops: float) -> None:
        facts = measured.get(name_of[id(program)])
        if facts is None:
            return
        work = {
            kind: calls * Count(**facts[kind]).total(loops)
            for kind in ("flops", "bytes", "kernels")
        }
        row = rows.setdefault(name, {"phase": name, "flops": 0.0, "bytes": 0.0, "kernels": 0.0})
        for kind, value in work.items():
            row[kind] += value

    for generation in played.generations:
        if generation.stage == "evaluation":
            continue
        for program in generation.programs:
            facts = measured.get(name_of[id(program)], {})
            decodes = facts.get("tokens_a_pass", 0.0)
            kind = "decode" if decodes else "prefill"
            loops = generation.steps / decodes if decodes else 1.0
            calls = 1 if decodes or program.name != "_prefill" else generation.prefills
            add(f"{generation.stage} {kind}", program, calls, loops)
    for program in played.starts:
        if program.stage != "evaluation":
            add(name_of[id(program)], program, 1, passes(program, played))
    return [row | seconds(row, target) for row in rows.values()]


def seconds(work: dict[str, Any], target: Target) -> dict[str, float]:
    """Returns a phase's seconds by arithmetic, as `round_phases` says."""
    parts = {
        "compute": work["flops"] / (SHARE * target.flops),
        "memory": work["bytes"] / target.bandwidth,
        "launch": work["kernels"] * target.launch,
    }
    return {
        **parts,
        "least": max(parts.values()),
        "most": max(parts["compute"], parts["memory"] + parts["launch"]),
    }
