"""Local training: one client's optimiser steps as a pure function, mapped over the cohort and summed as it goes.

Clients run `clients_at_once` at a time (vmap) inside a scan over chunks, on every device of the mesh's `clients` axis. The
weighted sum of their adapters is accumulated chunk by chunk, so memory does not grow with the cohort. The base is an argument
shared by all of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from spear_jax import losses, trees
from spear_jax.algorithms.base import Algorithm
from spear_jax.models.decoder import Decoder
from spear_jax.models.token_logprobs import completion_logprobs
from spear_jax.types import Batch, Mean

DROPOUT = trees.purpose("dropout")


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Static settings of a client's local training.

    Attributes:
        clients_at_once: clients that one device trains together.
        normalize: "global" divides by the counts of the whole optimiser step, "micro" averages micro-batch means.
        clip: gradients are scaled down to this global norm.
        weight_decay: AdamW's.
        anchor_weight: λ of L_anchor; anchor_gradient False repeats the published code's anchor, whose gradient is lost.
        prox: FedProx's μ.
        ema_decay: e; after training θ ← e θ_global + (1 − e) θ.
        head_chunk: positions per LM-head block.
    """

    clients_at_once: int
    normalize: str
    clip: float
    weight_decay: float
    anchor_weight: float
    anchor_gradient: bool
    prox: float
    ema_decay: float
    head_chunk: int


def local_update(
    algorithm: Algorithm,
    decoder: Decoder,
    config: LocalConfig,
    start: dict,
    base: dict,
    batches: Batch,
    key: jax.Array,
    rate: jax.Array,
) -> tuple[dict, dict[str, Mean]]:
    """A client's round: AdamW from zero moments over S steps of A micro-batches.

    Args:
        start: the global adapter.
        batches: leading axes [S, A].
        key: the client's key of this round.
        rate: float32[], the round's learning rate.
    Returns: the trained adapter; metrics summed over steps.
    Source: AdamW (arXiv 1711.05101), FedProx (arXiv 1812.06127), and the SPEAR code's shell (fresh optimiser per client
    and round, steps with a non-finite gradient norm skipped).
    """
    # The rate multiplies the finished update, decay included, so that it can change between rounds without compiling.
    optimiser = optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(1.0, weight_decay=config.weight_decay))
    dropout = decoder.lora.dropout > 0.0

    def logprobs(lora, batch, at):
        return completion_logprobs(decoder, lora, base, batch, config.head_chunk, at if dropout else None)

    def step(carry, xs):
        lora, opt_state = carry
        batch, index = xs
        keys = jax.vmap(lambda a: trees.path_key(key, DROPOUT, index, a))(jnp.arange(batch.label.shape[0]))
        counts = _counts(algorithm, config.normalize, batch, lambda b, k: logprobs(lora, b, k), keys)

        def micro(grads, xs):
            batch, at, count = xs
            objective = lambda lora: algorithm.loss(batch, logprobs(lora, batch, at), count)
            (loss, means), new = jax.value_and_grad(objective, has_aux=True)(lora)
            return jax.tree.map(jnp.add, grads, new), (loss, means)

        grads, (parts, means) = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, lora), (batch, keys, counts))
        extra, extra_grads = jax.value_and_grad(functools.partial(_regulariser, config))(lora, start)
        grads = jax.tree.map(jnp.add, grads, extra_grads)
        norm = trees.global_norm(grads)
        finite = jnp.isfinite(norm)
        updates, moved = optimiser.update(
            trees.where(finite, grads, jax.tree.map(jnp.zeros_like, grads)), opt_state, lora
        )
        stepped = optax.apply_updates(lora, jax.tree.map(lambda u: rate * u, updates))
        lora, opt_state = trees.where(finite, (stepped, moved), (lora, opt_state))
        one = jnp.float32(1)
        means = jax.tree.map(lambda x: x.sum(0), means)
        means |= {
            "loss": Mean(jnp.where(finite, parts.sum() + extra, 0.0), finite.astype(jnp.float32)),
            "grad_norm": Mean(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32)),
            "skipped_steps": Mean(1.0 - finite, one),
        }
        return (lora, opt_state), means

    steps = jnp.arange(batches.label.shape[0])
    (lora, _), means = jax.lax.scan(step, (start, optimiser.init(start)), (batches, steps))
    e = config.ema_decay
    lora = jax.tree.map(lambda old, new: e * old + (1.0 - e) * new, start, lora) if e else lora
    return lora, jax.tree.map(lambda x: x.sum(0), means)


def _counts(algorithm, normalize, batch, logprobs, keys):
    """Denominators for each micro-batch [A]: the step's sums, or A times its own ("micro": a mean of means)."""
    if algorithm.two_pass:
        scored = jax.lax.map(lambda xs: logprobs(*xs), (batch, keys))
        counts = jax.vmap(algorithm.counts)(batch, jax.lax.stop_gradient(scored))
    else:
        counts = jax.vmap(lambda b: algorithm.counts(b, None))(batch)
    size = batch.label.shape[0]
    if normalize == "micro":
        return jax.tree.map(lambda c: size * c, counts)
    return jax.tree.map(lambda c: jnp.broadcast_to(c.sum(0), c.shape), counts)


def _regulariser(config: LocalConfig, lora: dict, start: dict) -> jax.Array:
    """λ_anchor L_anchor + (μ/2) ‖θ − θ_global‖²."""
    value = jnp.float32(0)
    if config.anchor_weight:
        held = lora if config.anchor_gradient else jax.lax.stop_gradient(lora)
        value += config.anchor_weight * losses.anchor(held, start)
    if config.prox:
        value += config.prox / 2 * trees.global_norm(jax.tree.map(jnp.subtract, lora, start)) ** 2
    return value


def train_cohort(
    algorithm: Algorithm,
    decoder: Decoder,
    config: LocalConfig,
    mesh: Mesh,
    start: dict,
    base: dict,
    batches: Batch,
    keys: jax.Array,
    weight: jax.Array,
    active: jax.Array,
    rate: jax.Array,
) -> tuple[dict, jax.Array, dict[str, Mean]]:
    """Trains a cohort in one program.

    Args:
        start: the global adapter; base: decoder parameters; both replicated.
        batches: leading axes [C, S, A]; C is a multiple of devices * clients_at_once (`padded_clients`).
        keys: uint32[C, 2] key data of each client's round.
        weight: float32[C]; active: bool[C], clients that train (the others contribute the global adapter).
        rate: float32[].
    Returns: Σ w_c θ_c; Σ w_c; per-client metrics, each (total, count) float32[C].
    """

    def device(rate, start, base, *per_client):
        def chunk(sums, xs):
            batch, keys, weight, active = xs
            update = functools.partial(local_update, algorithm, decoder, config, start, base)
            lora, means = jax.vmap(update, in_axes=(0, 0, None))(batch, jax.random.wrap_key_data(keys), rate)
            lora = jax.tree.map(lambda x, old: jnp.where(active.reshape(-1, *[1] * old.ndim), x, old), lora, start)
            total = jax.tree.map(lambda total, x: total + jnp.tensordot(weight, x, axes=1), sums[0], lora)
            means = jax.tree.map(lambda x: jnp.where(active, x, 0.0), means)
            return (total, sums[1] + weight.sum()), means

        split = lambda x: x.reshape(-1, config.clients_at_once, *x.shape[1:])
        zero = (jax.tree.map(jnp.zeros_like, start), jnp.float32(0))
        sums, means = jax.lax.scan(chunk, zero, jax.tree.map(split, per_client))
        return jax.lax.psum(sums, "clients"), jax.tree.map(lambda x: x.reshape(-1), means)

    clients = Spec("clients")
    run = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(Spec(), Spec(), Spec(), clients, clients, clients, clients),
        out_specs=((Spec(), Spec()), clients),
        check_vma=False,
    )
    (total, mass), means = run(rate, start, base, batches, keys, weight, active)
    return total, mass, means


def padded_clients(clients: int, at_once: int, devices: int) -> int:
    """C rounded up to whole chunks on every device."""
    block = at_once * devices
    return -(-clients // block) * block


def make_mesh(devices: list[Any] | None = None) -> Mesh:
    """A mesh with the one axis `clients` over the given devices (all by default)."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ("clients",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, Spec()))


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """The tree with its leading axis split over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, Spec("clients")))
