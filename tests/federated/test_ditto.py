"""Ditto: its vector through real local training, then whole rounds."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from quadratic_clients import adapter, numbers, train
from run_sizes import SMALL
from small_cohort import close

import spear_jax as sj
from spear_jax.core import pytrees
from spear_jax.experiment.builder import build
from spear_jax.experiment.checkpoint import Checkpoints
from spear_jax.experiment.export import chosen_adapter
from spear_jax.federated import local_training
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.state import ClientState


def test_a_step_of_the_own_adapter_is_that_of_the_vector(vector, model, monkeypatch):
    given, want, _ = vector("ditto")
    monkeypatch.setattr(local_training, "optimiser", lambda config: optax.sgd(1.0))
    begun = adapter([given["v"], given["theta"]])
    done = train(
        model, given["theta"], np.zeros(2), np.array([given["gradient"], np.zeros(3)]), 1,
        given["eta"], carried=[ClientState(begun, optax.sgd(1.0).init(begun))],
        prox=given["lambda"],
    )  # fmt: skip
    np.testing.assert_allclose(numbers(done.states[0].lora)[0], want["v"], rtol=1e-5)
    np.testing.assert_allclose(numbers(done.states[0].lora)[1], given["theta"], rtol=1e-6)


def built(**changes):
    """A method without rollouts, which compile for longer than all the rest."""
    config = sj.preset("sft", task="facts", model="tiny", variants=["small"])
    few = {
        "federation.num_clients": 3, "eval.limit": 8, "lora.targets": ("q",),
        "federation.aggregation": "fedavg", "federation.server_rate": 1.0,
    }  # fmt: skip
    config.update_from_flattened_dict(SMALL | few | changes)
    return build(config, jax.devices()[:1])


def test_own_adapters_go_their_way_and_the_global_one_keeps_its_bits(tmp_path):
    one = {"personal.ditto": True, "personal.pull": 0.0, "federation.clients_per_round": 1}
    experiment = built(**one)
    federation, state = experiment.federation, experiment.initial_state()
    first = run_round(federation, state, BudgetUsed())
    without = dataclasses.replace(federation, ditto=None)
    bare = dataclasses.replace(state, aggregation_state={})
    plain = run_round(without, bare, BudgetUsed())
    jax.tree.map(np.testing.assert_array_equal, first.state.lora, plain.state.lora)
    assert first.metrics["round/flops"] > plain.metrics["round/flops"]
    same = [name for name in plain.metrics if name.startswith(("train/", "round/b", "rollout/"))]
    assert [first.metrics[name] for name in same] == [plain.metrics[name] for name in same]
    (chosen,) = federation.cohort(1).clients
    own, change = experiment.adapters(first.state), lambda x: jax.tree.map(np.subtract, x, start)
    start = jax.tree.map(np.asarray, state.lora)
    for client in {0, 1, 2} - {chosen}:  # it keeps what it had
        jax.tree.map(np.testing.assert_array_equal, own[client], start)
    # without a pull it is what the client has sent, which is here the mean
    close(change(own[chosen]), change(first.state.lora), 1e-4)
    assert first.metrics["personal/loss"] > 0
    # round 2 starts from their own, and after a stop it has the same bits
    second = run_round(federation, first.state, BudgetUsed())
    saved = Checkpoints(tmp_path, 1, 0)
    saved.save(first.state, {"round": 1}, experiment.shapes.save())
    saved.wait()
    restored, _ = saved.restore(state)
    again = run_round(federation, restored, BudgetUsed())
    digest = lambda done: pytrees.digest(pytrees.to_dicts(done.state))
    assert digest(again) == digest(second) != digest(first)
    assert len(experiment.policies(second.state)) == 3
    with pytest.raises(sj.UserError, match="an adapter of its own; give --client=0 to 2"):
        chosen_adapter(experiment, second.state, None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"federation.lora_rule": "fedex"}, "'fedex', where the two do not match"),
        ({"federation.aggregation": "local"}, "'local' never averages"),
        ({"aggregation.state_gb": 1e-6}, "personal.ditto keeps .* for each of 3 clients"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(sj.UserError, match=message):
        built(**{"personal.ditto": True}, **changes)
