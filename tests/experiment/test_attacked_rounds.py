"""A round under each attack: what it changes, what it leaves, and what a robust reducer makes of it."""

import dataclasses

import jax
import numpy as np
import pytest
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.experiment.builder import build
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.federated.aggregation.reducers import Mean
from spear_jax.federated.aggregation.robust.krum import MultiKrum
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.feedback.attacks import with_attackers

FEW = {
    "federation.num_clients": 5, "federation.clients_per_round": 5, "rollout.examples": 6,
    "train.steps": 1, "train.batch_size": 4, "eval.limit": 8, "federation.aggregation": "fedavg",
    "federation.server_rate": 1.0, "federation.weighting": "uniform", "lora.dropout": 0.0,
    "train.learning_rate": 1e-2, "train.learning_rate_min": 1e-2, "train.warmup": False,
    "lora.targets": ("q",), "rollout.num_revisions": 1,
}  # fmt: skip
BAD, TARGET, STRENGTH = 3, 1, 50.0


@pytest.fixture(scope="module")
def honest():
    """(federation, state before, adapter, metrics and traces after) where nobody attacks.

    Updates are collected, as under an attack on the model, so that all tests share one program.
    """
    config = sj.preset("spear", task="facts", model="tiny", variants=["small"])
    config.update_from_flattened_dict(SMALL | FEW)
    experiment = build(config, jax.devices()[:1])
    federation = aggregated_by(experiment.federation, Mean(), Attack("none", ()))
    state = experiment.initial_state()
    after, metrics, traces = run_round(federation, state, BudgetUsed())
    return federation, state, after.lora, metrics, traces


def aggregated_by(federation, reducer, attack):
    return dataclasses.replace(federation, aggregation=Aggregation(reducer=reducer, attack=attack))


def attempts(traces, own):
    """What was said to and by some clients, and how it was called."""
    chosen = [x.trace for x in traces if x.trace.client in own]
    return [(one.text, one.feedback, one.correct) for trace in chosen for one in trace.attempts]


@pytest.mark.parametrize("kind", ["gaussian", "scale"])
def test_a_forged_update_moves_the_mean_and_multi_krum_leaves_it_out(honest, kind):
    federation, state, _, unattacked, told = honest
    usual = unattacked["round/update_norm"]

    def attacked(reducer):
        forged = aggregated_by(federation, reducer, Attack(kind, (BAD,), STRENGTH))
        _, metrics, traces = run_round(forged, state, BudgetUsed())
        assert attempts(traces, range(5)) == attempts(told, range(5))  # nothing else is forged
        assert metrics["attack/weight_share"] > 0
        return metrics["round/update_norm"]

    assert attacked(Mean()) > 10 * usual
    assert attacked(MultiKrum(1)) < 3 * usual


@pytest.mark.parametrize("kind", ["invert", "push_target", "mislead"])
def test_a_lying_user_changes_what_the_own_client_learns(honest, kind):
    federation, state, lora, _, told = honest
    worker, task = federation.worker, federation.worker.task
    feedback = with_attackers(worker.feedback, kind, [BAD], TARGET, worker.examples)
    lied_to = dataclasses.replace(federation, worker=dataclasses.replace(worker, feedback=feedback))
    after, metrics, traces = run_round(lied_to, state, BudgetUsed())
    others = set(range(5)) - {BAD}
    assert attempts(traces, others) == attempts(told, others)
    own = [x.trace for x in traces if x.trace.client == BAD]
    right = [task.grade(x.first.text, x.example) for x in own]
    called = [x.first.correct for x in own]
    if kind == "mislead":
        assert called == right
    elif kind == "invert":
        assert called == [not one for one in right]
    else:
        chosen = [task.extract(x.first.text, x.example) for x in own]
        assert called == [one is not None and one.option == TARGET for one in chosen]
    hints = {text for _, text, _ in attempts(traces, {BAD}) if text}
    assert hints and not hints & {text for _, text, _ in attempts(told, {BAD})}
    if kind != "invert":  # which names no option
        wanted = {
            x.example.labels[2 if kind == "mislead" and x.example.gold == 1 else 1] for x in own
        }
        assert all(text.endswith(tuple(f"Choose {label}." for label in wanted)) for text in hints)
    assert metrics["attack/weight_share"] == 0  # no update is forged
    moved = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), after.lora, lora)
    assert max(jax.tree.leaves(moved)) > 1e-4
