"""Local training: one client's optimiser steps as a pure function, mapped over the cohort and summed as it goes.

Clients run `clients_at_once` at a time (vmap) inside a scan over chunks, on every device of the mesh's `clients` axis. The
weighted sum of their adapters is accumulated chunk by chunk, so memory does not grow with the cohort unless a method asks for
every client's own adapter between its phases. The base is an argument shared by all of them.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from spear_jax import losses, trees
from spear_jax.algorithms.base import Algorithm
from spear_jax.models.decoder import Decoder
from spear_jax.models.token_logprobs import Scorer
from spear_jax.types import Batch, ClientState, Mean

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


@flax.struct.dataclass
class Shared:
    """What all clients of a round have in common; replicated over devices.

    Attributes:
        start: the global adapter.
        base: decoder parameters.
        references: the method's J frozen adapters.
        numbers: {name: array}, what its loss needs besides the batch.
        rate: float32[], the round's learning rate.
    """

    start: dict
    base: dict
    references: tuple[dict, ...]
    numbers: dict
    rate: jax.Array


def optimiser(config: LocalConfig) -> optax.GradientTransformation:
    """Clipped AdamW of rate 1: the round's rate multiplies the finished update, decay included, so that it can change
    between rounds without compiling."""
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(1.0, weight_decay=config.weight_decay))


def local_update(
    algorithm: Algorithm,
    decoder: Decoder,
    config: LocalConfig,
    shared: Shared,
    client: ClientState,
    batches: Batch,
    key: jax.Array,
) -> tuple[ClientState, dict[str, Mean]]:
    """A client's phase: S AdamW steps of A micro-batches.

    Args:
        client: its adapter and moments at the phase's start.
        batches: leading axes [S, A].
        key: the client's key of this phase.
    Returns: adapter and moments afterwards; metrics summed over steps.
    Source: AdamW (arXiv 1711.05101), FedProx (arXiv 1812.06127), and the SPEAR code's shell (steps with a non-finite
    gradient norm skipped).
    """
    plain = Scorer(decoder, shared.base, config.head_chunk)
    dropout = decoder.lora.dropout > 0.0 and algorithm.dropout
    batches = _with_references(algorithm, plain, shared.references, client.lora, batches)

    def forward(lora, batch, at):
        scorer = dataclasses.replace(plain, dropout_key=at) if dropout else plain
        return algorithm.forward(scorer, lora, batch, shared.references)

    def step(carry, xs):
        lora, opt_state, numbers = carry
        batch, index = xs
        keys = jax.vmap(lambda a: trees.path_key(key, DROPOUT, index, a))(jnp.arange(batch.label.shape[0]))
        counts = _counts(algorithm, config.normalize, batch, lambda b, k: forward(lora, b, k), keys, numbers)

        def micro(grads, xs):
            batch, at, count = xs
            objective = lambda lora: algorithm.loss(batch, forward(lora, batch, at), count, numbers)
            (loss, means), new = jax.value_and_grad(objective, has_aux=True)(lora)
            return jax.tree.map(jnp.add, grads, new), (loss, means)

        grads, (parts, means) = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, lora), (batch, keys, counts))
        extra, extra_grads = jax.value_and_grad(functools.partial(_regulariser, config))(lora, shared.start)
        grads = jax.tree.map(jnp.add, grads, extra_grads)
        norm = trees.global_norm(grads)
        finite = jnp.isfinite(norm)
        updates, moved = optimiser(config).update(
            trees.where(finite, grads, jax.tree.map(jnp.zeros_like, grads)), opt_state, lora
        )
        stepped = optax.apply_updates(lora, jax.tree.map(lambda u: shared.rate * u, updates))
        lora, opt_state = trees.where(finite, (stepped, moved), (lora, opt_state))
        one = jnp.float32(1)
        means = jax.tree.map(lambda x: x.sum(0), means)
        means |= {
            "loss": Mean(jnp.where(finite, parts.sum() + extra, 0.0), finite.astype(jnp.float32)),
            "grad_norm": Mean(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32)),
            "skipped_steps": Mean(1.0 - finite, one),
        }
        first = jax.tree.map(lambda c: c[0], counts)  # the step's sums stand at every micro-batch
        return (lora, opt_state, dict(algorithm.advance(numbers, first))), means

    steps = jnp.arange(batches.label.shape[0])
    (lora, opt_state, _), means = jax.lax.scan(step, (client.lora, client.opt_state, shared.numbers), (batches, steps))
    return ClientState(lora, opt_state), jax.tree.map(lambda x: x.sum(0), means)


def _with_references(algorithm, scorer, references, start, batches) -> Batch:
    """The batches with the log-probabilities that stay fixed while the client trains, scored once."""

    def score(lora):
        return jax.lax.map(lambda b: scorer.logprobs(lora, b, algorithm.scored_temperature), flat)

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    lead = batches.label.shape[:2]
    if references and algorithm.cached:
        scored = jnp.stack([score(lora) for lora in references], axis=-2)
        batches = batches.replace(reference=scored.reshape(*lead, *scored.shape[1:]))
    if algorithm.scores_old:
        scored = score(start)
        batches = batches.replace(old=scored.reshape(*lead, *scored.shape[1:]))
    return batches


def _counts(algorithm, normalize, batch, forward, keys, numbers):
    """Denominators for each micro-batch [A]: the step's sums, or A times its own ("micro": a mean of means)."""
    if algorithm.two_pass:
        scored = jax.lax.stop_gradient(jax.lax.map(lambda xs: forward(*xs), (batch, keys)))
        counts = jax.vmap(lambda b, x: algorithm.counts(b, x, numbers))(batch, scored)
    else:
        counts = jax.vmap(lambda b: algorithm.counts(b, None, numbers))(batch)
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
    keep: bool,
    shared: Shared,
    carried: ClientState | None,
    batches: Batch,
    keys: jax.Array,
    weight: jax.Array,
    active: jax.Array,
) -> tuple[dict, jax.Array, dict[str, Mean], ClientState | None]:
    """Trains a cohort in one program.

    Args:
        keep: whether every client's own state comes back, for a next phase (memory then grows with the cohort).
        carried: the clients' states, leaves [C, ...]; None: each starts from the global adapter with zero moments.
        batches: leading axes [C, S, A]; C is a multiple of devices * clients_at_once (`padded_clients`).
        keys: uint32[C, 2] key data of each client's phase.
        weight: float32[C]; active: bool[C], clients that train (the others contribute the adapter they had).
    Returns: Σ w_c θ_c; Σ w_c; per-client metrics, each (total, count) float32[C]; the clients' states where kept.
    """

    def device(shared, carried, *per_client):
        def one(client, batch, key):
            if client is None:
                client = ClientState(shared.start, optimiser(config).init(shared.start))
            new, means = local_update(algorithm, decoder, config, shared, client, batch, jax.random.wrap_key_data(key))
            return client.lora, new, means

        def chunk(sums, xs):
            carried, (batch, keys, weight, active) = xs
            mapped = jax.vmap(one, in_axes=(None if carried is None else 0, 0, 0))
            old, new, means = mapped(carried, batch, keys)
            shape = lambda x: active.reshape(-1, *[1] * (x.ndim - 1))
            e = 0.0 if keep else config.ema_decay  # once a round, after the last phase
            ended = jax.tree.map(lambda a, b: e * a + (1.0 - e) * b, shared.start, new.lora) if e else new.lora
            lora = jax.tree.map(lambda a, b: jnp.where(shape(a), a, b), ended, old)
            total = jax.tree.map(lambda total, x: total + jnp.tensordot(weight, x, axes=1), sums[0], lora)
            means = jax.tree.map(lambda x: jnp.where(active, x, 0.0), means)
            return (total, sums[1] + weight.sum()), (means, new.replace(lora=lora) if keep else None)

        split = lambda x: x.reshape(-1, config.clients_at_once, *x.shape[1:])
        zero = (jax.tree.map(jnp.zeros_like, shared.start), jnp.float32(0))
        sums, ended = jax.lax.scan(chunk, zero, jax.tree.map(split, (carried, per_client)))
        means, states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), ended)
        return jax.lax.psum(sums, "clients"), means, states

    clients = Spec("clients")
    run = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(Spec(), clients, clients, clients, clients, clients),
        out_specs=((Spec(), Spec()), clients, clients),
        check_vma=False,
    )
    (total, mass), means, states = run(shared, carried, batches, keys, weight, active)
    return total, mass, means, states


def score_rows(decoder: Decoder, chunk: int, lora: dict | None, base: dict, batch: Batch) -> jax.Array:
    """float32[B, T]: log-probabilities of rows under a frozen policy."""
    return Scorer(decoder, base, chunk).logprobs(lora, batch)


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
