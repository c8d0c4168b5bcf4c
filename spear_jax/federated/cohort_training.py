"""Trains a cohort in chunks of clients, so that device memory does not grow with the cohort.

While the device trains one chunk, the host packs the next. A trained chunk leaves the reducer's
state and its metrics behind. Where a method goes on with its clients, their states wait on the
host.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spear_jax.algorithms.base import Algorithm
from spear_jax.core.mesh import CLIENTS, shard_rows, to_host
from spear_jax.core.types import Mean
from spear_jax.federated import local_training
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.federated.aggregation.reducers import Reducer
from spear_jax.federated.state import ClientStart, ClientState
from spear_jax.models.decoder import Decoder
from spear_jax.models.params import Adapter
from spear_jax.packing.blocks import BlockBuilder, stack_blocks
from spear_jax.packing.prefix_tree import real_tokens
from spear_jax.packing.shape_buckets import BlockShape

# Bytes of rows that go to a device together, where more clients have rows than train at once.
CHUNK_BYTES = 1 << 24

_STATIC = (0, 1, 2, 3, 4, 5)
_train = jax.jit(local_training.train_cohort, static_argnums=_STATIC)
# clients go on, and their new states take the place of the old ones
_train_on = jax.jit(local_training.train_cohort, static_argnums=_STATIC, donate_argnums=7)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _merge(reducer: Reducer, left: Any, right: Any) -> Any:
    return reducer.merge(jax.tree.map(lambda *x: jnp.stack(x), left, right))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A cohort's training rows, packed and not yet arrays.

    Attributes:
        blocks: [C][S] lists of blocks; none for a client that does not train.
        depth: K, blocks of a step at most.
        shape: of a block.
        small: of the blocks that fit it; None: all go through the model in `shape`.
    """

    blocks: list[list[list[BlockBuilder]]]
    depth: int
    shape: BlockShape
    small: BlockShape | None

    def bytes_per_client(self) -> int:
        """Returns the bytes of one client's arrays."""
        block = BlockBuilder(self.shape, 0).build()
        return len(self.blocks[0]) * self.depth * sum(x.nbytes for x in jax.tree.leaves(block))

    def arrays(self, begin: int, size: int) -> local_training.LocalBatches:
        """Returns numpy arrays [size, S, ...] of the clients from `begin` on, empty behind the
        last.
        """
        steps = len(self.blocks[0])
        own = [step for client in self.blocks[begin : begin + size] for step in client]
        built = [[block.build() for block in step] for step in own]
        built += [[]] * (size * steps - len(own))
        stacked = stack_blocks(built, self.shape, self.depth, self.small)
        batches = local_training.LocalBatches(*stacked, self.small)
        return jax.tree.map(lambda x: x.reshape(size, steps, *x.shape[1:]), batches)

    def read(self, batches: local_training.LocalBatches) -> int:
        """Returns the tokens that go through the model for these arrays, padding included."""
        used = np.arange(self.depth) < batches.count[..., None]
        large, small = (int((used & fits).sum()) for fits in (~batches.fits, batches.fits))
        tokens = large * self.shape.tokens + small * (self.small or self.shape).tokens
        return self.shape.num_packs * tokens


@dataclasses.dataclass(frozen=True)
class TrainedCohort:
    """A cohort after training.

    Attributes:
        reduced: the reducer's state after all clients, or where the aggregation collects
            (adapters [C, ...], weight [C]).
        means: metrics, (total, count) float32[C] each, on the host.
        states: where they were to be kept, those of each chunk's clients [size, ...]: on the host,
            or on the devices where there is but one chunk.
        gathered: what drift correction makes of the gradients that clients send (`Drift.gather`).
        tokens: real tokens of all rows; read: the same with padding.
    """

    reduced: Any
    means: dict[str, Mean]
    states: list[ClientState] | None
    tokens: int
    read: int
    gathered: Any = None


def train(
    algorithm: Algorithm,
    decoder: Decoder,
    local: local_training.LocalConfig,
    mesh: Mesh,
    aggregation: Aggregation,
    broadcast: local_training.Broadcast,
    rows: Rows,
    members: tuple[np.ndarray, np.ndarray, np.ndarray],
    keep: bool = False,
    carried: list[ClientState] | None = None,
    own: ClientStart | None = None,
    report: Callable[[int], None] = lambda clients: None,
    usual: int = 0,
) -> TrainedCohort:
    """Trains a cohort of C clients, chunk by chunk.

    Args:
        members: as `local_training.train_cohort` takes them: keys uint32[C, 2], weight float32[C],
            active bool[C].
        keep: whether the clients' states come back, for a next phase.
        carried: those of the phase before; None: each client starts the round. Where `keep`, the
            states that come back take the memory of these.
        own: what clients have to themselves, on the host; None: nothing.
        report: called with 0, and then with the clients of each chunk when it is trained.
        usual: the cohort size that chunks are made for, where cohorts differ from round to round;
            0: this one's.
    """
    cohort, devices = len(rows.blocks), mesh.shape[CLIENTS]
    size = chunk_size(usual or cohort, rows.bytes_per_client(), local.clients_at_once, devices)
    if carried is not None:
        size = jax.tree.leaves(carried[0])[0].shape[0]
    begins = range(0, cohort, size)
    collects, drift = aggregation.collects and not keep, local.drift
    gathers = drift is not None and drift.gradients
    rest = to_host if len(begins) > 1 else lambda states: states
    run = _train_on if keep and carried is not None else _train
    running, reduced, means, states, tokens, read, gathered = None, [], [], [], 0, 0, None

    def finish(chunk_means, chunk_states):
        nonlocal gathered
        means.append(to_host(chunk_means))  # waits for the chunk
        if gathers:
            finite = 1 - means[-1][local_training.NOT_FINITE].total
            weight = _padded(members[1][begins[len(means) - 1] :][:size], size) * finite
            gathered = drift.gather(gathered, to_host(chunk_states.gradient), weight)
        else:
            states.append(rest(chunk_states))
        report(min(size, cohort - begins[len(means) - 1]))

    report(0)
    for number, begin in enumerate(begins):
        batches = rows.arrays(begin, size)
        tokens += sum(map(real_tokens, batches.blocks.packs))
        read += rows.read(batches)
        per_client = batches, *(_padded(x[begin : begin + size], size) for x in members)
        if running is not None:
            finish(*running)
        before = None if carried is None else carried[number]
        begun = jax.tree.map(lambda x, at=begin: _padded(x[at : at + size], size), own)
        arrays = shard_rows((before, *per_client, begun), mesh)
        part, *running = run(algorithm, decoder, local, mesh, aggregation, keep, broadcast, *arrays)
        if collects:
            reduced.append(rest(part))
        else:
            reduced = [part if not reduced else _merge(aggregation.reducer, reduced[0], part)]
    finish(*running)
    join = lambda *x: np.concatenate(x)[:cohort]
    whole = jax.tree.map(join, *reduced) if collects else reduced[0]
    means = jax.tree.map(join, *means)
    return TrainedCohort(whole, means, states if keep else None, tokens, read, gathered)


def chunk_size(cohort: int, each: int, at_once: int, devices: int) -> int:
    """Returns the clients of a cohort chunk.

    Chunks are equal, whole multiples of the clients that train together on all devices, and of at
    most CHUNK_BYTES where that is more than one multiple. For example, 10 clients of 6 MB, one at a
    time on one device: 16 MB hold 2, so 5 chunks of 2.

    Args: each: bytes of a client's rows.
    """
    together = at_once * devices
    most = max(1, CHUNK_BYTES // (each * together)) * together
    chunks = -(-cohort // most)
    return local_training.padded_clients(-(-cohort // chunks), at_once, devices)


def stacked(states: list[ClientState], cohort: int) -> Adapter:
    """Returns the clients' adapters as generation takes them, leaves [L', C, ...]; on the host
    where the states are.
    """
    if len(states) == 1:
        return layers_first(states[0].lora)
    join = lambda *x: np.swapaxes(np.concatenate(x)[:cohort], 0, 1)
    return jax.tree.map(join, *(one.lora for one in states))


@jax.jit
def layers_first(lora: Adapter) -> Adapter:
    """Returns clients' adapters, leaves [C, L', ...], as generation takes them, [L', C, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), lora)


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
