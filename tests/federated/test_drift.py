"""Corrections of client drift: the vectors through real local training, then whole rounds."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from quadratic_clients import adapter, numbers, train
from run_sizes import SMALL
from small_cohort import local_config

import spear_jax as sj
from spear_jax.core import pytrees
from spear_jax.experiment.builder import build
from spear_jax.experiment.checkpoint import Checkpoints
from spear_jax.federated import local_training
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.drift import DRIFTS, FedNova, MimeLite, Scaffold
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.state import ClientStart

close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture
def descent(monkeypatch):
    """Plain gradient descent in place of clipped AdamW."""
    monkeypatch.setattr(local_training, "optimiser", lambda config: optax.sgd(1.0))


def server_of(drift, x):
    state = init_server(Aggregation(drift=drift), adapter(x), {}, jax.random.key(0))
    return dataclasses.replace(state, aggregation_state={})


def test_scaffold_takes_the_steps_of_its_vector(vector, model, descent):
    given, want, _ = vector("scaffold")
    drift, h = Scaffold(), np.array(given["h"])
    g = -(h * given["u"])[:, None]
    state = server_of(drift, [given["x"]])
    kept = drift.init(state.lora, given["population"], optax.sgd(1.0))
    for round in want["rounds"]:
        own = ClientStart(None, correction=drift.corrections(kept, [0, 1]))
        x = numbers(state.lora)
        done = train(model, x, h, g, given["steps"], given["eta"], drift, own=own)
        state = end_round(Aggregation(drift=drift), state, done.reduced).state
        accepted = np.ones(2, bool)
        kept = drift.end(kept, np.arange(2), accepted, done.gathered, state.lora, None)
        close(numbers(state.lora), round["x"])
        close(numbers(kept["control"]), round["c"])
        close(numbers(kept["controls"])[:, 0], round["c_clients"])


def test_scaffold_ends_at_the_optimum_where_the_mean_does_not(vector, model, descent):
    given, want, _ = vector("scaffold")
    h, drift = np.array(given["h"]), Scaffold()
    g = -(h * given["u"])[:, None]
    state = server_of(drift, [want["limit"] - 0.01])
    kept = drift.init(state.lora, 2, optax.sgd(1.0))
    close_to = adapter(h[:, None] * (want["limit"] - np.array(given["u"]))[:, None])
    kept |= {"controls": close_to}  # the gradients at the optimum, in sum 0
    for _ in range(40):
        own = ClientStart(None, correction=drift.corrections(kept, [0, 1]))
        done = train(model, numbers(state.lora), h, g, given["steps"], 0.1, drift, own=own)
        state = end_round(Aggregation(drift=drift), state, done.reduced).state
        kept = drift.end(kept, np.arange(2), np.ones(2, bool), done.gathered, state.lora, None)
    assert float(numbers(state.lora)[0]) == pytest.approx(want["limit"], abs=1e-4)
    assert abs(want["limit"] - want["limit_fedavg"]) > 0.05


def test_a_client_that_did_not_arrive_keeps_its_control():
    drift, like = Scaffold(), adapter([0.0, 0.0])
    kept = drift.init(like, 4, None)
    before = jax.tree.map(np.copy, kept)
    sent = [adapter([[1.0, 2.0], [3.0, 4.0]]), adapter([[5.0, 6.0], [0.0, 0.0]])]  # padded
    clients, accepted = np.array([0, 2, 3]), np.array([True, False, True])
    after = drift.end(kept, clients, accepted, sent, like, None)
    close(numbers(after["controls"]), [[1, 2], [0, 0], [0, 0], [5, 6]])
    close(numbers(after["control"]), [6 / 4, 8 / 4])
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    correction = drift.corrections(after, [3, 1])
    close(numbers(correction), [[1.5 - 5, 2 - 6], [1.5, 2]])


@pytest.mark.parametrize("collects", [False, True])
def test_fednova_weighs_steps_as_its_vector(vector, model, descent, collects):
    given, want, _ = vector("fednova")
    x, p, tau = (np.array(given[name]) for name in ("x", "p", "steps"))
    rate, drift = 0.1, FedNova()
    own = ClientStart(None, steps=np.int32(tau))
    done = train(
        model, np.zeros(3), np.zeros(2), -x / (rate * tau)[:, None], 3, rate, drift, p, own=own
    )
    assert list(done.means["grad_norm"].count) == list(tau)
    factor = drift.factor(p, done.means["grad_norm"].count, 3)
    assert 3 * factor == pytest.approx(want["tau_eff"])
    if collects:  # the server multiplies on the host
        rule = Aggregation(attack=Attack("none", ()), drift=drift)
        sent = adapter(3 * x / tau[:, None]), np.float32(p)
        state = init_server(rule, adapter(np.zeros(3)), {}, jax.random.key(0), 2)
        after = end_round(rule, state, sent, range(2), None, factor).state
    else:
        after = end_round(
            Aggregation(drift=drift), server_of(drift, np.zeros(3)), done.reduced, factor=factor
        ).state
    close(numbers(after.lora), want["out"])


def test_fednova_of_equal_steps_is_the_mean_bit_for_bit(model, descent):
    g = np.random.default_rng(0).normal(size=(2, 3))
    sizes = np.zeros(3), np.ones(2), g, 3, 0.1
    plain = train(model, *sizes)
    nova = train(model, *sizes, drift=FedNova())
    jax.tree.map(np.testing.assert_array_equal, nova.reduced, plain.reduced)
    assert FedNova().factor(np.ones(2), np.array([3.0, 3.0]), 3) == 1.0


def test_scaffold_is_the_mean_where_no_client_has_a_control(model, descent):
    """Bit for bit; and in another order of chunks and devices the same numbers."""
    g = np.random.default_rng(1).normal(size=(3, 2))
    sizes, zero = (np.ones(2), np.ones(3), g, 2, 0.1), ClientStart(None, correction=adapter(0 * g))
    plain = train(model, *sizes)
    alone = train(model, *sizes, Scaffold(), own=zero)
    jax.tree.map(np.testing.assert_array_equal, alone.reduced, plain.reduced)
    drift, like = Scaffold(), adapter(np.ones(2))
    spread = train(model, *sizes, drift, own=zero, devices=2, clients_at_once=2)
    ends = [
        drift.end(
            drift.init(like, 5, None),
            np.array([0, 2, 4]),
            np.ones(3, bool),
            done.gathered,
            like,
            None,
        )
        for done in (alone, spread)
    ]
    close(numbers(ends[0]["controls"]), numbers(ends[1]["controls"]))
    close(numbers(ends[0]["control"]), numbers(ends[1]["control"]))
    # x = 1 and then 1 − 0.1 (1 + g): the mean gradient of both steps, of h = 1
    want = (1 + g + (1 - 0.1 * (1 + g)) + g) / 2
    close(numbers(ends[0]["controls"])[[0, 2, 4]], want)
    close(numbers(ends[0]["control"]), want.sum(0) / 5)


def test_mime_freezes_the_servers_momentum_as_its_vector(vector, model, monkeypatch):
    given, want, _ = vector("mime_lite")
    momentum = optax.chain(optax.ema(given["beta"], debias=False), optax.scale(-1.0))
    monkeypatch.setattr(local_training, "optimiser", lambda config: momentum)
    drift, g = MimeLite(), np.array(given["gradients"])
    state = server_of(drift, given["theta"])
    kept = drift.init(state.lora, 2, momentum)
    ema = kept["moments"][0]._replace(ema=adapter(given["m"]))
    kept = {"moments": (ema, kept["moments"][1])}
    done = train(
        model, given["theta"], np.zeros(2), g, given["steps"], given["eta"], drift,
        moments=kept["moments"],
    )  # fmt: skip
    state = end_round(Aggregation(drift=drift), state, done.reduced).state
    accepted = np.ones(2, bool)
    after = drift.end(kept, np.arange(2), accepted, done.gathered, state.lora, momentum)
    close(numbers(state.lora), want["theta"])
    close(numbers(after["moments"][0].ema), want["m"])


def test_the_first_adamw_step_of_mime_is_adams(model):
    """From zero moments each of its steps is the first step of Adam: g / |g| where g is large."""
    drift = MimeLite()
    optimiser = local_training.optimiser(local_config(max_grad_norm=1e9, weight_decay=0.0))
    moments = drift.init(adapter(np.zeros(3)), 2, optimiser)["moments"]
    g = np.array([[5.0, -3.0, 2.0], [1.0, 1.0, -4.0]])
    done = train(
        model, np.zeros(3), np.zeros(2), g, 2, 0.1, drift, moments=moments, max_grad_norm=1e9
    )
    total, mass = done.reduced
    close(numbers(total) / float(mass), -0.2 * np.sign(g).mean(0))
    close(numbers(done.gathered[0]) / done.gathered[1], g.mean(0))


def test_fedprox_pulls_from_the_second_step_on(model, descent):
    theta, g, mu, rate = np.array([1.0, -2.0]), np.array([0.5, 3.0]), 2.0, 0.1
    total, mass = train(model, theta, np.zeros(1), g[None], 2, rate, prox=mu).reduced
    first = theta - rate * g  # the pull is 0 at the start, and so is its gradient
    close(numbers(total) / float(mass), first - rate * (g + mu * (first - theta)))


# Whole rounds


def config_of(**changes):
    """A method without rollouts, which compile for longer than all the rest."""
    config = sj.preset("sft", task="facts", model="tiny", variants=["small"])
    few = {
        "federation.num_clients": 3, "rollout.examples": 6, "eval.limit": 8, "lora.targets": ("q",),
        "federation.aggregation": "fedavg", "federation.server_rate": 1.0,
    }  # fmt: skip
    config.update_from_flattened_dict(SMALL | few | changes)
    return config


def built(**changes):
    return build(config_of(**changes), jax.devices()[:1])


@pytest.mark.parametrize("name", ["scaffold", "mime_lite"])
def test_a_run_that_was_killed_goes_on_with_the_same_bits(name, tmp_path):
    experiment = built(**{"federation.drift": name})
    federation, state = experiment.federation, experiment.initial_state()
    first = run_round(federation, state, BudgetUsed())
    second = run_round(federation, first.state, BudgetUsed())
    saved = Checkpoints(tmp_path, 1, 0)
    saved.save(first.state, {"round": 1}, experiment.shapes.save())
    saved.wait()
    restored, _ = saved.restore(state)
    again = run_round(federation, restored, BudgetUsed())
    digest = lambda done: pytrees.digest(pytrees.to_dicts(done.state))
    assert digest(again) == digest(second) != digest(first)
    plain = dataclasses.replace(federation.aggregation, drift=None)
    up, down = plain.bytes_of_clients(state.lora, {}, federation.cohort(1).clients, 1)
    assert first.metrics["round/bytes_up"] == 2 * up.sum()
    assert first.metrics["round/bytes_down"] == DRIFTS[name].down * down.sum()
    if name == "scaffold":  # no client has a control in round 1
        chosen = federation.cohort(1).clients
        moved = np.any(np.asarray(first.state.aggregation_state["controls"].q.b), (1, 2, 3))
        assert 0 < moved.sum() <= len(chosen) < 3
        assert set(np.flatnonzero(moved)) <= set(chosen)


def test_partial_work_enters_and_fednova_weighs_it():
    lossy = {"participation.dropout": 0.9, "participation.partial": True, "train.steps": 3}
    federation = (
        experiment := built(**lossy, **{"federation.drift": "fednova", "seed": 5})
    ).federation
    losses = [
        federation.participation.loss(1, client, 3) for client in federation.cohort(1).clients
    ]
    done = [3 if loss is None else loss.steps for loss in losses]
    some = [0 < steps < 3 for steps in done]
    assert any(some)  # of this seed
    result = run_round(federation, experiment.initial_state(), BudgetUsed())
    lost = sum(loss is not None and not own for loss, own in zip(losses, some, strict=True))
    assert result.metrics["participation/lost"] == lost
    assert result.metrics["round/update_norm"] > 0 and result.metrics["round/failed"] == 0


def test_what_does_not_go_together_is_refused():
    for changes, message in (
        (
            {"federation.drift": "scaffold", "federation.lora_rule": "rolora"},
            "does not; take mean or ffa",
        ),
        ({"federation.drift": "fednova", "federation.lora_rule": "fedex"}, "lengthens updates"),
        ({"federation.drift": "scaffold", "federation.aggregation": "local"}, "Take fedavg"),
        (
            {"federation.drift": "scaffold", "aggregation.state_gb": 1e-6},
            "federation.drift=scaffold keeps .* for each of 3 clients",
        ),
    ):
        with pytest.raises(sj.UserError, match=message):
            built(**changes)
    grpo = sj.preset("grpo", task="facts", model="tiny", variants=["small"])
    grpo.federation.drift = "scaffold"
    with pytest.raises(
        sj.UserError, match="trains in .* phases a round; set --config.grpo.updates"
    ):
        build(grpo, jax.devices()[:1])
