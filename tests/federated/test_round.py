"""One client's round beside the whole cohort's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cohort import close

import spear_jax as sj
from spear_jax.core.types import Mean
from spear_jax.experiment.builder import build
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.single_client import client_round, join_updates

SMALL = {
    "federation.num_clients": 3,
    "federation.clients_per_round": 3,
    "rollout.examples": 6,
    "rollout.max_concurrent_sequences": 16,
    "train.steps": 2,
    "train.batch_size": 4,
    "eval.limit": 8,
    "lora.rank": 2,
    "lora.targets": ("q", "down"),  # each more is time to compile
}


def built(method, **changes):
    config = sj.preset(method, task="facts", model="tiny", variants=["small"])
    config.update_from_flattened_dict(SMALL | changes)
    experiment = build(config, jax.devices()[:1])
    return experiment.federation, experiment.initial_state()


@pytest.mark.parametrize("method", ["spear", "grpo", "space", "feedback_sft"])
def test_the_weighted_mean_of_single_clients_is_the_cohorts_round(method):
    federation, state = built(method)
    key = jax.random.wrap_key_data(jnp.asarray(state.key))
    updates = [
        client_round(federation, state.lora, state.algorithm_state, client, 1, key)
        for client in range(3)
    ]
    after, metrics, traces = run_round(federation, state, BudgetUsed())
    weights = [update.weight for update in updates]
    assert sum(weights) > 0 and len({id(update) for update in updates}) == 3
    mean = jax.tree.map(
        lambda *x: np.average(np.stack(x), axis=0, weights=weights), *(u.update for u in updates)
    )
    moved = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.lora, state.lora)
    close(moved, mean, 2e-3)  # Adam divides rounding by gradients near zero
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(moved)) > 1e-4
    counts = jax.tree.map(lambda *x: sum(x), *(u.counts for u in updates))
    assert counts["loss"].value() == pytest.approx(metrics["train/loss"], rel=1e-4)
    assert sum(len(update.traces) for update in updates) == len(traces)
    assert isinstance(counts["loss"], Mean)
    cohort = federation.cohort(1)
    joined, told, _ = join_updates(
        federation, state, BudgetUsed(), cohort, dict(enumerate(updates))
    )
    step = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), joined.lora, state.lora)
    close(step, mean, 1e-4)  # float32 of the adapter, not of its step
    assert int(joined.round) == 1 and told.keys() == metrics.keys()
    timed = ("time/", "budget/seconds")
    for name in (name for name in metrics if not name.startswith(timed)):
        assert told[name] == pytest.approx(metrics[name], rel=2e-3, abs=1e-6), name


def test_clients_texts_stay_in_their_part_of_the_state():
    federation, state = built("space")
    key = jax.random.wrap_key_data(jnp.asarray(state.key))
    update = client_round(federation, state.lora, state.algorithm_state, 1, 1, key)
    assert set(update.client_state) == {"tokens", "lengths", "correct", "iteration"}
    asked = {record.trace.example.id for record in update.traces}
    stored = np.flatnonzero((update.client_state["iteration"] >= 0).any(1))
    assert {federation.worker.examples[i].id for i in stored} == asked
    assert set(state.algorithm_state) - set(update.client_state) == {"opponents"}


def test_a_client_without_wins_sends_nothing(monkeypatch):
    federation, state = built("spear")
    monkeypatch.setattr(type(federation.worker.task), "grade", lambda self, text, example: False)
    key = jax.random.wrap_key_data(jnp.asarray(state.key))
    update = client_round(federation, state.lora, {}, 0, 1, key)
    assert update.weight == 0
    assert not any(np.any(x) for x in jax.tree.leaves(update.update))
