"""One round, as the paper has it: roll out with the global adapter, train the cohort, aggregate."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax import packing, trees
from spear_jax.algorithms.base import Collected
from spear_jax.experiment import Experiment
from spear_jax.federated import clients, server
from spear_jax.models.lora import merge_lora
from spear_jax.types import Batch, ServerState, Trace

ROUND = trees.purpose("round")
LOCAL = trees.purpose("local")

merge = jax.jit(merge_lora, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(algorithm, decoder, local, mesh, start, base, batches, keys, weight, active, rate):
    total, mass, means = clients.train_cohort(
        algorithm, decoder, local, mesh, start, base, batches, keys, weight, active, rate
    )
    return total, mass, jax.tree.map(jnp.sum, means)


_aggregate = jax.jit(server.aggregate, static_argnums=0)


def run_round(
    experiment: Experiment, state: ServerState
) -> tuple[ServerState, dict[str, float], list[tuple[Trace, str, float]]]:
    """Runs the next round.

    Returns: the new state; the round's metrics by the contract's names; the recorded traces.
    """
    number = int(state.round) + 1
    cohort = experiment.cohort(number)
    root = jax.random.wrap_key_data(jnp.asarray(state.key))
    key = trees.path_key(root, ROUND, number)

    began = time.perf_counter()
    policy = merge(experiment.model.base, state.lora, experiment.decoder.lora)
    got = experiment.algorithm.collect(experiment.actor, policy, cohort, key)
    del policy
    rolled = time.perf_counter()

    batches = pack_cohort(experiment, got)
    size = batches.label.shape[0]
    keys = np.zeros((size, 2), np.uint32)
    client_keys = jax.vmap(lambda c: jax.random.key_data(trees.path_key(key, LOCAL, c)))
    keys[: len(cohort.clients)] = client_keys(jnp.asarray(cohort.clients))
    weight = np.zeros(size, np.float32)
    weight[: len(got.weight)] = server.client_weights(experiment.server, got.weight, got.active)
    active = np.zeros(size, bool)
    active[: len(got.active)] = got.active
    sharded = clients.shard_rows((batches, keys, weight, active), experiment.mesh)
    rate = np.float32(experiment.rate(number))
    total, mass, means = _train(
        experiment.algorithm,
        experiment.decoder,
        experiment.local,
        experiment.mesh,
        state.lora,
        experiment.model.base,
        *sharded,
        rate,
    )
    means = jax.device_get(means)
    trained = time.perf_counter()
    state, change = _aggregate(experiment.server, state, total, mass)
    change = float(change)
    aggregated = time.perf_counter()

    adapter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.lora))
    metrics = {
        **got.metrics,
        **{f"train/{name}": mean.value() for name, mean in means.items()},
        "round/clients": float(len(cohort.clients)),
        "round/clients_without_wins": float((~got.active).sum()),
        "round/bytes_up": float(adapter_bytes * int(got.active.sum())),
        "round/bytes_down": float(adapter_bytes * len(cohort.clients)),
        "round/update_norm": change,
        "round/rate": float(rate),
        "time/rollout": rolled - began,
        "time/train": trained - rolled,
        "time/aggregate": aggregated - trained,
    }
    return state, metrics, got.traces


def pack_cohort(experiment: Experiment, got: Collected) -> Batch:
    """[C, S, A, B', ...] numpy arrays, C padded to whole chunks on every device."""
    train = experiment.config.train
    count = clients.padded_clients(len(got.rows), experiment.local.clients_at_once, experiment.mesh.size)
    empty = [[[None] * experiment.algorithm.rows_per_step()] * train.accumulation] * train.steps
    rows = got.rows + [empty] * (count - len(got.rows))
    pad = experiment.model.pad_id

    def one(micro):
        return packing.pack(micro, experiment.prompt_length, experiment.completion_length, pad)

    return packing.stack([[[one(micro) for micro in step] for step in client] for client in rows], 3)
