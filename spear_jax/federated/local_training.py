"""Trains clients: one client's optimiser steps as a pure function, mapped over a cohort.

Every device of the mesh's `clients` axis scans over its clients, `clients_at_once` at a time
(vmap). The reducer adds each chunk to its state, so memory does not grow with the cohort. It grows
where a method or a reducer needs every client's own adapter. All clients share the base, which is
an argument.
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

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import Algorithm
from spear_jax.core import pytrees
from spear_jax.core.mesh import CLIENTS, MODEL
from spear_jax.core.rng import path_key, purpose
from spear_jax.core.types import Mean
from spear_jax.federated.aggregation.lora_rules.base import only
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.federated.drift import Drift
from spear_jax.federated.state import ClientStart, ClientState
from spear_jax.models.decoder import Decoder
from spear_jax.models.params import Adapter, DecoderParams
from spear_jax.models.token_logprobs import TokenLogprobs, unpack_rows
from spear_jax.packing.arrays import Block
from spear_jax.packing.prefix_tree import shrink
from spear_jax.packing.shape_buckets import BlockShape

DROPOUT = purpose("dropout")
NOT_FINITE = "clients_not_finite"  # the metric of clients that are left out


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Static settings of a client's local training.

    Attributes:
        clients_at_once: clients that one device trains together.
        normalize: "global" divides by the counts of the whole optimiser step, "micro" averages
            micro-batch means.
        max_grad_norm: gradients are scaled down to this global norm.
        weight_decay: AdamW's.
        anchor_weight: λ of L_anchor; anchor_gradient False repeats the published code's anchor,
            whose gradient is lost.
        prox: FedProx's μ.
        ema_decay: e; after training θ ← e θ_global + (1 − e) θ.
        head_chunk: positions per LM-head block.
        trains: the factors that are trained, "ab", "a" or "b".
        rank_penalty: λ of Σ ‖a[:, tail]‖ ‖b[tail, :]‖ over layers and projections.
        drift: a correction of client drift.
    """

    clients_at_once: int
    normalize: str
    max_grad_norm: float
    weight_decay: float
    anchor_weight: float
    anchor_gradient: bool
    prox: float
    ema_decay: float
    head_chunk: int
    trains: str = "ab"
    rank_penalty: float = 0.0
    drift: Drift | None = None


@flax.struct.dataclass
class LocalBatches:
    """The packed sequences of local steps. Leading axes [C, S] for a round.

    A step takes as many blocks as its tokens need. Of K = 3 blocks and count = 2:

        blocks   [a, b, empty]      the loop runs over a and b
        fits     [False, True, ..]  b is cut to the small shape before it goes through the model

    Attributes:
        blocks: leading axis K; those behind `count` are empty.
        count: int32, blocks of the step.
        fits: bool, leading axis K: the blocks that the small shape holds.
        small: that shape; None: all blocks go through the model as they are.
    """

    blocks: Block
    count: jax.Array
    fits: jax.Array
    small: BlockShape | None = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Broadcast:
    """The part of a round that all clients share; replicated over devices.

    Attributes:
        start: the global adapter.
        base: decoder parameters.
        references: the method's J frozen adapters.
        loss_scalars: {name: array}, numbers that the loss needs besides the batch.
        rate: float32[], the round's learning rate.
        moments: the moments that clients begin with; None: zero ones.
    """

    start: Adapter
    base: DecoderParams
    references: tuple[Adapter, ...]
    loss_scalars: dict[str, jax.Array]
    rate: jax.typing.ArrayLike
    moments: Any = None


def optimiser(config: LocalConfig) -> optax.GradientTransformation:
    """Returns clipped AdamW of learning rate 1.

    The round's rate multiplies the finished update, decay included, so that it can change between
    rounds without compiling.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(1.0, weight_decay=config.weight_decay),
    )


def local_update(
    algorithm: Algorithm,
    decoder: Decoder,
    config: LocalConfig,
    broadcast: Broadcast,
    client: ClientState,
    batches: LocalBatches,
    key: jax.Array,
    own: ClientStart | None = None,
) -> tuple[ClientState, dict[str, Mean]]:
    """Trains one client for a phase: S AdamW steps, each over as many blocks as it takes.

    A step loops over its blocks three times. It scores the frozen policies (and the policy itself
    where the denominators need that), sums the denominators, and adds up gradients.

    Args:
        client: its adapter and moments at the phase's start.
        batches: leading axes [S].
        key: the client's key of this phase.
        own: what it has to itself; None: nothing.
    Returns: adapter and moments afterwards; metrics summed over steps, `grad_norm` with the number of
        steps that were taken.
    Source: AdamW (arXiv 1711.05101), FedProx (arXiv 1812.06127), and the SPEAR code's shell (steps
    with a non-finite gradient norm skipped).
    """
    plain = TokenLogprobs(decoder, broadcast.base, config.head_chunk)
    dropout = decoder.lora.dropout > 0.0 and algorithm.scoring.dropout
    own = ClientStart(None) if own is None else own
    start, tail = broadcast.start if own.lora is None else own.lora, own.tail
    drift = config.drift

    def forward(lora, block, at):
        scorer = dataclasses.replace(plain, dropout_key=at) if dropout else plain
        return algorithm.forward(scorer, lora, block, broadcast.references)

    def step(carry, xs):
        lora, opt_state, loss_scalars, seen = carry
        batches, index = xs
        keys = jax.vmap(lambda k: path_key(key, DROPOUT, index, k))(
            jnp.arange(batches.blocks.micro.shape[0])
        )
        blocks, held = score_frozen(
            algorithm, plain, forward, broadcast.references, client.lora, lora, batches, keys
        )
        sums, denominators = loss_denominators(
            algorithm, config.normalize, blocks, held, loss_scalars
        )
        (loss, means), grads = _sum_gradients(
            algorithm, forward, lora, batches, (blocks, keys, denominators), loss_scalars
        )
        extra, extra_grads = jax.value_and_grad(functools.partial(_regulariser, config))(
            lora, start, tail
        )
        grads = jax.tree.map(jnp.add, grads, extra_grads)
        raw, runs = grads, None if own.steps is None else index < own.steps
        if own.correction is not None:
            grads = jax.tree.map(jnp.add, grads, own.correction)
        (lora, moved), norm, finite = _apply(config, broadcast.rate, lora, opt_state, grads, runs)
        if drift is None or not drift.freezes:
            opt_state = moved
        if drift is not None and drift.gradients:
            raw = raw if config.trains == "ab" else only(raw, config.trains)
            seen = drift.remember(seen, raw, finite, index)
        means |= {
            "loss": Mean(jnp.where(finite, loss + extra, 0.0), finite.astype(jnp.float32)),
            "grad_norm": Mean(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32)),
            "skipped_steps": Mean(1.0 - finite, jnp.float32(1)),
        }
        if runs is not None:
            means = jax.tree.map(lambda x: jnp.where(runs, x, 0.0), means)
        scalars = dict(algorithm.update_loss_scalars(loss_scalars, sums))
        return (lora, opt_state, scalars, seen), means

    steps = jnp.arange(batches.count.shape[0])
    sends = drift is not None and drift.gradients
    seen = jax.tree.map(jnp.zeros_like, client.lora) if sends else None
    begin = client.lora, client.opt_state, broadcast.loss_scalars, seen
    (lora, opt_state, _, seen), means = jax.lax.scan(step, begin, (batches, steps))
    means = jax.tree.map(lambda x: x.sum(0), means)
    if drift is not None and drift.gradients:
        seen = drift.sends(seen, means["grad_norm"].count)
    return ClientState(lora, opt_state, seen), means


def _sum_gradients(algorithm, forward, lora, batches, per_block, loss_scalars):
    """A step's (loss, metrics) and gradient, summed over its blocks.

    Args: per_block: blocks, dropout keys and denominators, each with a leading axis K.
    """

    def gradient(k):
        block, at, count, fits = jax.tree.map(lambda x: x[k], (*per_block, batches.fits))

        def of(block):
            loss = lambda lora: algorithm.loss(
                block.rows, unpack_rows(block, forward(lora, block, at)), count, loss_scalars
            )
            return jax.value_and_grad(loss, has_aux=True)(lora)

        if batches.small is None:
            return of(block)
        return jax.lax.cond(fits, lambda: of(shrink(block, batches.small)), lambda: of(block))

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, 0))
    add = lambda k, summed: jax.tree.map(jnp.add, summed, gradient(k))
    return jax.lax.fori_loop(0, batches.count, add, zero)


def _apply(config, rate, lora, opt_state, grads, runs=None):
    """One AdamW step, left out where the gradient is not finite, and where it does not run.

    Returns: (adapter, moments); the gradient's norm; whether the step was taken.
    """
    if config.trains != "ab":
        grads = only(grads, config.trains)
    norm = pytrees.global_norm(grads)
    finite = jnp.isfinite(norm)
    if runs is not None:
        finite = finite & runs
    safe = pytrees.where(finite, grads, jax.tree.map(jnp.zeros_like, grads))
    updates, moved = optimiser(config).update(safe, opt_state, lora)
    if config.trains != "ab":  # weight decay moves the other factor, too
        updates = only(updates, config.trains)
    stepped = optax.apply_updates(lora, jax.tree.map(lambda u: rate * u, updates))
    return pytrees.where(finite, (stepped, moved), (lora, opt_state)), norm, finite


def score_frozen(
    algorithm, scorer, forward, references, start, lora, batches, keys
) -> tuple[Block, jax.Array | None]:
    """Fills in the log-probabilities of frozen policies: references and the phase's start.

    Returns: the blocks; where `Scoring.two_pass` the policy's own log-probabilities [K, B, T].
    """
    scoring = algorithm.scoring
    score = lambda adapter: lambda block, at: scorer.logprobs(adapter, block, scoring.temperature)
    passes = [score(reference) for reference in references if scoring.ref_logprobs]
    passes += [score(start)] * scoring.old_logprobs
    passes += [lambda block, at: jax.lax.stop_gradient(forward(lora, block, at))] * scoring.two_pass
    if not passes:
        return batches.blocks, None

    def fill(k, kept):
        block, at = jax.tree.map(lambda x: x[k], (batches.blocks, keys))
        return kept.at[k].set(
            jnp.stack([unpack_rows(block, one(block, at)) for one in passes], axis=1)
        )

    blocks, rows = batches.blocks, batches.blocks.rows
    size, length = rows.completion_mask.shape[1:]
    empty = jnp.zeros((keys.shape[0], size, len(passes), length), jnp.float32)
    scores = jax.lax.fori_loop(0, batches.count, fill, empty)  # [K, B, passes, T]
    held = scores[:, :, -1] if scoring.two_pass else None
    if scoring.old_logprobs:
        rows = rows.replace(old_logprobs=scores[:, :, len(passes) - 1 - scoring.two_pass])
    if references and scoring.ref_logprobs:
        rows = rows.replace(ref_logprobs=scores[:, :, : len(references)])
    return blocks.replace(rows=rows), held


def loss_denominators(algorithm, normalize, blocks, held, loss_scalars):
    """Sums the step's denominators.

    Returns: their sums; and for each block [K] the number that it divides by. That is the sum, or
    under "micro" (a mean of means) the sum of its micro-batch times the number of micro-batches.
    """
    if held is None:
        denominators = jax.vmap(lambda rows: algorithm.denominators(rows, None, loss_scalars))(
            blocks.rows
        )
    else:
        denominators = jax.vmap(lambda rows, x: algorithm.denominators(rows, x, loss_scalars))(
            blocks.rows, held
        )
    sums = jax.tree.map(lambda c: c.sum(0), denominators)
    if normalize == "global" and not algorithm.scoring.per_micro_batch:
        return sums, jax.tree.map(lambda c: jnp.broadcast_to(c.sum(0), c.shape), denominators)
    same = blocks.micro[:, None] == blocks.micro[None, :]
    return sums, jax.tree.map(
        lambda c: algorithm.common.accumulation * jnp.tensordot(same.astype(c.dtype), c, axes=1),
        denominators,
    )


def _regulariser(
    config: LocalConfig, lora: Adapter, start: Adapter, tail: jax.Array | None = None
) -> jax.Array:
    """λ_anchor L_anchor + (μ/2) ‖θ − θ_start‖² + λ_rank Σ ‖a[:, tail]‖ ‖b[tail, :]‖."""
    value = jnp.float32(0)
    if config.anchor_weight:
        held = lora if config.anchor_gradient else jax.lax.stop_gradient(lora)
        value += config.anchor_weight * losses.anchor(held, start)
    if config.prox:
        # not the norm's square: the root has no gradient at 0, where every client begins
        square = lambda x, y: jnp.sum(jnp.square(x - y))
        value += config.prox / 2 * sum(jax.tree.leaves(jax.tree.map(square, lora, start)))
    if config.rank_penalty and tail is not None:
        value += config.rank_penalty * _tail_norm(lora, tail)
    return value


def _tail_norm(lora: Adapter, tail: jax.Array) -> jax.Array:
    """Σ ‖a[:, tail]‖ ‖b[tail, :]‖ over layers and projections. Args: tail: bool[R]."""

    def norm(x: jax.Array) -> jax.Array:  # of each layer; with a finite gradient at 0
        square = jnp.sum(x * x, (1, 2))
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    pairs = lora.by_name().values()
    return sum(jnp.sum(norm(x.a * tail) * norm(x.b * tail[:, None])) for x in pairs)


def train_cohort(
    algorithm: Algorithm,
    decoder: Decoder,
    config: LocalConfig,
    mesh: Mesh,
    aggregation: Aggregation,
    keep: bool,
    broadcast: Broadcast,
    carried: ClientState | None,
    batches: LocalBatches,
    keys: jax.Array,
    weight: jax.Array,
    active: jax.Array,
    own: ClientStart | None = None,
) -> tuple[Any, dict[str, Mean], ClientState | None]:
    """Trains a cohort in one program.

    Args:
        aggregation: its transforms and its reducer run here, client by client.
        keep: whether every client's own state comes back, for a next phase (memory then grows with
            the cohort).
        carried: the clients' states, leaves [C, ...]; None: each starts from the global adapter
            with zero moments.
        batches: leading axes [C, S]; C is a multiple of devices * clients_at_once
            (`padded_clients`).
        keys: uint32[C, 2] key data of each client's phase.
        weight: float32[C]; active: bool[C], clients that train (the others contribute the adapter
            they had).
        own: what each client has to itself; None: nothing.
    Returns: the reducer's state, or where it collects (adapters [C, ...], weight [C]); per-client
        metrics, each (total, count) float32[C], the clients left out under NOT_FINITE; the clients'
        states where kept, or of them the gradients that drift correction sends.
    """
    collects = aggregation.collects and not keep
    device = functools.partial(
        _train_on_device, algorithm, decoder, config, aggregation, keep, collects
    )
    if mesh.shape[MODEL] > 1:
        # the loop over blocks then holds collectives, which all devices must come to equally often
        count = jnp.broadcast_to(batches.count.max(0), batches.count.shape)
        batches = batches.replace(count=count)
    clients = Spec(CLIENTS)
    run = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(Spec(), clients, clients, clients, clients, clients, clients),
        out_specs=clients,
        axis_names={CLIENTS},  # the other axis, over which the base may be split, is the compiler's
        check_vma=False,
    )
    reduced, means, states, adapters = run(broadcast, carried, batches, keys, weight, active, own)
    if collects:
        return adapters, means, states
    whole = NamedSharding(mesh, Spec())
    constrain = lambda x: jax.lax.with_sharding_constraint(x, whole)
    return jax.tree.map(constrain, aggregation.reducer.merge(reduced)), means, states


def _train_on_device(
    algorithm, decoder, config, aggregation, keep, collects, broadcast, carried, *per_client
):
    """One device's clients, `clients_at_once` at a time; arguments as for `train_cohort`.

    Returns: the reducer's state with a leading axis of 1, metrics, kept states, adapters.
    """
    reducer = aggregation.reducer

    def one(client, own, batches, key):
        if client is None:
            start = broadcast.start if own is None or own.lora is None else own.lora
            moments = broadcast.moments
            if moments is None:
                moments = optimiser(config).init(start)
            client = ClientState(start, moments)
        key = jax.random.wrap_key_data(key)
        new, means = local_update(algorithm, decoder, config, broadcast, client, batches, key, own)
        return client, new, means

    def chunk(reduced, xs):
        carried, (batches, keys, weight, active, own) = xs
        start, shared = broadcast.start, None
        if own is not None and own.lora is not None:
            start, shared = own.lora, 0
        in_axes = (None if carried is None else 0, None if own is None else 0, 0, 0)
        old, new, means = pytrees.vmap_or_single(one, in_axes)(carried, own, batches, keys)
        where = lambda flag: lambda a, b: jnp.where(flag.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        e = 0.0 if keep else config.ema_decay  # once a round, after the last phase
        blend = lambda a, b: e * a + (1.0 - e) * b
        ended = jax.tree.map(blend, start, new.lora) if e else new.lora
        if config.drift is not None and not keep:
            upload = functools.partial(config.drift.upload, steps=batches.count.shape[-1])
            ended = jax.vmap(upload, (shared, 0, 0))(start, ended, means["grad_norm"].count)
        if aggregation.client_transforms and not keep:
            ended = jax.vmap(aggregation.transform, (shared, 0))(start, ended)
        finite = jax.vmap(_has_norm, (shared, 0))(start, ended)
        if new.gradient is not None:
            finite &= jax.vmap(lambda g: jnp.isfinite(pytrees.global_norm(g)))(new.gradient)
        taken, left_out = active & finite, active & ~finite & (not keep)
        lora = jax.tree.map(where(taken), ended, old.lora)
        weight = jnp.where(finite, weight, 0.0)
        if not aggregation.collects:
            reduced = reducer.add(reduced, lora, weight)
        means = jax.tree.map(lambda x: jnp.where(taken, x, 0.0), means)
        means |= {NOT_FINITE: Mean(left_out.astype(jnp.float32), active.astype(jnp.float32))}
        # a client that goes back to the adapter it had goes back to that one's moments
        moments = jax.tree.map(where(finite), new.opt_state, old.opt_state)
        states = ClientState(lora, moments) if keep else None
        if new.gradient is not None:
            gradient = jax.tree.map(lambda x: where(taken)(x, jnp.zeros_like(x)), new.gradient)
            states = ClientState(None, None, gradient)
        return reduced, (means, states, (lora, weight) if collects else None)

    split = lambda x: x.reshape(-1, config.clients_at_once, *x.shape[1:])
    zero = () if aggregation.collects else reducer.init(broadcast.start)
    reduced, ended = jax.lax.scan(chunk, zero, jax.tree.map(split, (carried, per_client)))
    means, states, adapters = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), ended)
    return jax.tree.map(lambda x: x[None], reduced), means, states, adapters


def _has_norm(start: Adapter, lora: Adapter) -> jax.Array:
    """Whether a client's update has a finite norm in float32, bool[]."""
    return jnp.isfinite(pytrees.global_norm(jax.tree.map(jnp.subtract, lora, start)))


def padded_clients(clients: int, at_once: int, devices: int) -> int:
    """Returns C rounded up to whole chunks on every device."""
    block = at_once * devices
    return -(-clients // block) * block
