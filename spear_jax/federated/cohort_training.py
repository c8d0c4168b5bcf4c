"""A cohort's local training, portion by portion, so that what a device holds does not grow with the
cohort.

A portion is the rows of some clients: made into arrays while the device trains the portion before
it, forgotten when it is trained. What stays of it is its share of the weighted sum, its metrics,
and where a method goes on with them its clients' states, which then wait on the host.
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
from spear_jax.federated.state import ClientState
from spear_jax.models.decoder import Decoder
from spear_jax.packing.blocks import BlockBuilder, stack_blocks
from spear_jax.packing.prefix_tree import real_tokens
from spear_jax.packing.shape_buckets import BlockShape

CHUNK_BYTES = (
    1 << 24
)  # bytes of rows that go to a device together, where more clients have rows than train at once

_train = jax.jit(local_training.train_cohort, static_argnums=(0, 1, 2, 3, 4, 5))


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
        """Of one client's arrays."""
        block = BlockBuilder(self.shape, 0).build()
        return len(self.blocks[0]) * self.depth * sum(x.nbytes for x in jax.tree.leaves(block))

    def arrays(self, begin: int, size: int) -> local_training.LocalBatches:
        """Numpy arrays [size, S, ...] of the clients from `begin` on, empty behind the last."""
        steps = len(self.blocks[0])
        own = [step for client in self.blocks[begin : begin + size] for step in client]
        closed = [[block.build() for block in step] for step in own] + [[]] * (
            size * steps - len(own)
        )
        batches = local_training.LocalBatches(
            *stack_blocks(closed, self.shape, self.depth, self.small), self.small
        )
        return jax.tree.map(lambda x: x.reshape(size, steps, *x.shape[1:]), batches)

    def read(self, batches: local_training.LocalBatches) -> int:
        """Tokens that go through the model for these arrays, padding included."""
        used = np.arange(self.depth) < batches.count[..., None]
        large = int((used & ~batches.fits).sum()) * self.shape.tokens
        return self.shape.num_packs * (
            large + int((used & batches.fits).sum()) * (self.small or self.shape).tokens
        )


@dataclasses.dataclass(frozen=True)
class TrainedCohort:
    """A cohort after training.

    Attributes:
        reduced: the reducer's state after all clients, or where it collects (adapters [C, ...],
            weight [C]).
        means: metrics, (total, count) float32[C] each, on the host.
        states: where they were to be kept, those of each chunk's clients [size, ...]: on the host,
            or on the devices where there is but one chunk.
        tokens: real tokens of all rows; read: the same with padding.
    """

    reduced: Any
    means: dict[str, Mean]
    states: list[ClientState] | None
    tokens: int
    read: int


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
    report: Callable[[int], None] = lambda clients: None,
) -> TrainedCohort:
    """Trains a cohort of C clients, chunk by chunk.

    Args:
        members: as `local_training.train_cohort` takes them: keys uint32[C, 2], weight float32[C],
            active bool[C].
        keep: whether the clients' states come back, for a next phase.
        carried: those of the phase before; None: each client starts from the global adapter.
        report: called with 0, and then with the clients of each chunk when it is trained.
    """
    cohort, devices = len(rows.blocks), mesh.shape[CLIENTS]
    size = chunk_size(cohort, rows.bytes_per_client(), local.clients_at_once, devices)
    if carried is not None:
        size = jax.tree.leaves(carried[0])[0].shape[0]
    begins = range(0, cohort, size)
    collects = aggregation.reducer.collects and not keep
    rest = to_host if len(begins) > 1 else lambda states: states
    running, reduced, means, states, tokens, read = None, [], [], [], 0, 0

    def finish(chunk_means, chunk_states):
        means.append(to_host(chunk_means))  # waits for the chunk
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
        arrays = shard_rows((before, *per_client), mesh)
        part, *running = _train(
            algorithm, decoder, local, mesh, aggregation, keep, broadcast, *arrays
        )
        if collects:
            reduced.append(rest(part))
        else:
            reduced = [part if not reduced else _merge(aggregation.reducer, reduced[0], part)]
    finish(*running)
    join = lambda *x: np.concatenate(x)[:cohort]
    whole = jax.tree.map(join, *reduced) if collects else reduced[0]
    means = jax.tree.map(join, *means)
    return TrainedCohort(whole, means, states if keep else None, tokens, read)


def chunk_size(cohort: int, each: int, at_once: int, devices: int) -> int:
    """Clients of a portion: whole chunks of those that train together on every device, and equal
    portions, of at most PORTION bytes where that is more than one chunk. Args: each: bytes of a
    client's rows.
    """
    chunk = at_once * devices
    most = max(1, CHUNK_BYTES // (each * chunk)) * chunk
    cohort_chunks = -(-cohort // most)
    return local_training.padded_clients(-(-cohort // cohort_chunks), at_once, devices)


def stacked(states: list[ClientState], cohort: int) -> dict:
    """The clients' adapters as generation takes them, leaves [L, C, ...]; on the host where the
    states are.
    """
    if len(states) == 1:
        return _layers_first(states[0].lora)
    return jax.tree.map(
        lambda *x: np.swapaxes(np.concatenate(x)[:cohort], 0, 1), *(one.lora for one in states)
    )


@jax.jit
def _layers_first(lora: dict) -> dict:
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), lora)


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
