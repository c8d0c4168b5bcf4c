"""One round, as the paper has it: roll out with the global adapter, train the cohort, aggregate."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms.base import CohortData
from spear_jax.core.mesh import broadcast_from_main, to_host
from spear_jax.core.rng import path_key, purpose
from spear_jax.core.types import Cohort, Trace
from spear_jax.experiment.builder import Experiment
from spear_jax.federated import cohort_training, local_training
from spear_jax.federated.aggregation.reducers import client_weights
from spear_jax.federated.aggregation.server_optimizer import aggregate
from spear_jax.federated.round_metrics import BudgetUsed, _metric
from spear_jax.federated.state import ServerState
from spear_jax.models import cost_model
from spear_jax.packing.blocks import Keys, most_blocks, pack_rows
from spear_jax.packing.rows import groups_of
from spear_jax.rollout.policy import Policy

ROUND = purpose("round")
LOCAL = purpose("local")
PHASE = purpose("phase")
Records = list[tuple[Trace, str, float]]
_aggregate = jax.jit(aggregate, static_argnums=0)


def run_round(
    experiment: Experiment, state: ServerState, spent: BudgetUsed
) -> tuple[ServerState, dict[str, float], Records]:
    """Runs the next round.

    Args: spent: what the run has used before it.
    Returns: the new state; the round's metrics by the contract's names; the recorded traces.
    """
    cohort = experiment.cohort(int(state.round) + 1)
    run = _alone if experiment.server.rule == "local" else _together
    state, metrics, records = run(experiment, state, spent, cohort)
    metrics["budget/tokens"] = spent.tokens + metrics["rollout/tokens"]
    metrics["budget/flops"] = spent.flops + metrics["round/flops"]
    seconds = sum(metrics[f"time/{name}"] for name in ("rollout", "train", "aggregate"))
    metrics["budget/seconds"] = broadcast_from_main(spent.seconds + seconds)
    return state, metrics, records


def _alone(experiment: Experiment, state: ServerState, spent: BudgetUsed, cohort: Cohort):
    """Local-only training: every client is a federation of one, with an adapter and a memory of its
    own.

    State: `lora` and `algorithm_state` have a leading axis over all clients of the population.
    """
    lines, records, updates = [], [], []
    for slot, client in enumerate(cohort.clients):
        rngs = lambda _, name, slot=slot: cohort.rngs(slot, name)
        alone = Cohort(cohort.round, [client], [cohort.indices[slot]], rngs)
        own = state.replace(
            lora=jax.tree.map(lambda x, client=client: x[client], state.lora),
            algorithm_state=jax.tree.map(lambda x, client=client: x[client], state.algorithm_state),
        )
        own, line, traces = _together(experiment, own, spent, alone)
        lines.append(line)
        records += traces
        updates.append((client, own))
    # one copy: a checkpoint may still be writing the old arrays
    lora, kept = jax.tree.map(np.array, (state.lora, state.algorithm_state))
    for client, own in updates:
        jax.tree.map(
            lambda stack, new, c=client: stack.__setitem__(c, new),
            (lora, kept),
            (own.lora, own.algorithm_state),
        )
    metrics = {}
    for name in lines[0]:
        values = [line[name] for line in lines if name in line]
        metrics[name] = float(np.sum(values) if name.startswith(_SUMMED) else np.mean(values))
    return state.replace(lora=lora, algorithm_state=kept, round=state.round + 1), metrics, records


_SUMMED = (
    "time/",
    "rollout/tokens",
    "rollout/wins",
    "rollout/loses",
    "round/clients",
    "round/bytes",
    "round/flops",
)


def _together(experiment: Experiment, state: ServerState, spent: BudgetUsed, cohort: Cohort):
    """A round of the whole cohort: phases of collecting and training, then one aggregation."""
    algorithm, worker = experiment.algorithm, experiment.worker
    root = jax.random.wrap_key_data(jnp.asarray(to_host(state.key)))
    key = path_key(root, ROUND, cohort.round)
    seconds = {"rollout": 0.0, "train": 0.0}
    worker.tally.clear()
    start = experiment.on_devices(
        state.lora
    )  # always placed alike, or the programs would compile again
    policy, carried, kept, means, phases = (
        worker.merge(start),
        None,
        state.algorithm_state,
        None,
        [],
    )
    rate, work = 0.0, 0.0
    report = lambda count: worker.report("train", count, len(cohort.clients))
    for phase in range(algorithm.phases):
        began = time.perf_counter()
        phase_key = path_key(key, PHASE, phase) if phase else key
        got = algorithm.collect(worker, policy, cohort, kept, phase_key, phase)
        kept = kept if got.algorithm_state is None else got.algorithm_state
        phases.append(got)
        policy = None  # the merged weights are not needed while training
        if not phase:
            rate = experiment.rate(
                cohort.round,
                spent.tokens + worker.tally.generated * algorithm.phases,
                spent.seconds,
            )
        rolled = time.perf_counter()
        broadcast = local_training.Broadcast(
            start=start,
            base=experiment.model.base,
            references=experiment.on_devices(algorithm.references(kept, start)),
            loss_scalars=experiment.on_devices(jax.tree.map(np.float32, got.loss_scalars)),
            rate=np.float32(rate),
        )
        keep = phase + 1 < algorithm.phases
        static = algorithm, experiment.decoder, experiment.local, experiment.mesh
        rows, members = rows_of(experiment, got), _members(experiment, cohort, got, phase_key)
        trained = cohort_training.train(*static, broadcast, rows, members, keep, carried, report)
        found = jax.tree.map(lambda x: np.sum(x, dtype=np.float64), trained.means)
        means = found if means is None else jax.tree.map(np.add, means, found)
        carried = trained.states
        passes = 4 + 2 * (
            (experiment.decoder.remat == "layers") + algorithm.two_pass + algorithm.scores_old
        )
        work += trained.tokens * (passes + 2 * len(broadcast.references))
        if keep:
            slots = {client: slot for slot, client in enumerate(cohort.clients)}
            policy = Policy(
                experiment.model.base, cohort_training.stacked(carried, len(slots)), slots
            )
        seconds["rollout"] += rolled - began
        seconds["train"] += time.perf_counter() - rolled

    began = time.perf_counter()
    state, change = _aggregate(
        experiment.server,
        state.replace(lora=start, algorithm_state={}),
        trained.total,
        trained.mass,
    )
    change = float(change)
    adapter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.lora))
    active = phases[-1].active
    metrics = {
        **{
            name: float(np.mean([got.metrics[name] for got in phases]))
            for name in phases[0].metrics
        },
        **{
            name: float(sum(got.metrics[name] for got in phases))
            for name in ("rollout/wins", "rollout/loses")
        },
        **{_metric(algorithm.name, name): mean.value() for name, mean in means.items()},
        "rollout/tokens": float(worker.tally.generated),
        "round/clients": float(len(cohort.clients)),
        "round/clients_without_wins": float((~active).sum()),
        "round/bytes_up": float(adapter_bytes * int(active.sum())),
        "round/bytes_down": float(adapter_bytes * len(cohort.clients)),
        "round/update_norm": change,
        "round/rate": rate,
        "round/flops": cost_model.flops(experiment.model.config, worker.tally, work),
        **{f"time/{name}": value for name, value in seconds.items()},
    }
    kept = algorithm.end_round(kept, state.lora, metrics, cohort.round)
    metrics["time/aggregate"] = time.perf_counter() - began
    return (
        state.replace(algorithm_state=kept),
        metrics,
        [entry for got in phases for entry in got.traces],
    )


def _members(
    experiment: Experiment, cohort: Cohort, got: CohortData, key: jax.Array
) -> tuple[np.ndarray, ...]:
    """Of each client: the data of its key in this phase, its weight, and whether it trains."""
    client_keys = jax.vmap(lambda c: jax.random.key_data(path_key(key, LOCAL, c)))
    weight = client_weights(experiment.server, got.weight, got.active)
    return (
        np.asarray(client_keys(jnp.asarray(cohort.clients))),
        np.asarray(weight, np.float32),
        got.active,
    )


def rows_of(experiment: Experiment, got: CohortData) -> cohort_training.Rows:
    """The rows in blocks; a client that does not train has none."""
    algorithm, shapes = experiment.algorithm, experiment.worker.sampler.shapes
    apart = algorithm.micro or experiment.local.normalize == "micro"

    def micros(step, active: bool):
        own = [groups_of(micro, algorithm.rows_per_group) if active else [] for micro in step]
        return own if apart else [sum(own, [])]

    steps = [
        [micros(step, active) for step in own]
        for own, active in zip(got.rows, got.active, strict=True)
    ]
    slots = (
        max(len(micro) for client in got.rows for step in client for micro in step)
        // algorithm.rows_per_group
    )
    slots *= algorithm.common.accumulation
    flat = sum(steps, [])
    shape, small = experiment.training_shapes(flat, slots)
    keys = Keys()
    blocks = [[pack_rows(step, shape, keys) for step in own] for own in steps]
    deepest = max(len(step) for own in blocks for step in own)
    (depth,) = shapes.fit("train blocks", (max(most_blocks(flat, shape, slots), deepest),))
    return cohort_training.Rows(blocks, depth, shape, small)
