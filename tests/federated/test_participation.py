"""The simulated clock: times, losses, deadlines; then a round in which clients are lost."""

import dataclasses

import jax
import numpy as np
import pytest
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.experiment.builder import build
from spear_jax.federated.participation import (
    MOMENTS,
    Device,
    Loss,
    Participation,
    accept,
    round_time,
)
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed


def test_a_clients_seconds_are_travel_and_work(vector):
    given, want, tol = vector("round_time")
    device = Device(given["speed"], given["up"], given["down"])
    seconds = round_time(
        given["bytes_down"], given["bytes_up"], given["flops"], device, given["latency"]
    )
    assert seconds == pytest.approx(want["seconds"], abs=tol)


def test_the_first_arrivals_end_a_round_or_its_deadline_does(vector):
    given, want, _ = vector("over_selection")
    for deadline in given["deadline"]:
        accepted, seconds = accept(np.array(given["arrivals"]), given["wanted"], deadline)
        wanted = want[str(deadline)]
        assert list(np.flatnonzero(accepted)) == wanted["accepted"]
        assert list(np.flatnonzero(~accepted)) == wanted["late"]
        assert seconds == wanted["seconds"]
    assert Participation(over_selection=1.3).asked(10) == 13


def play(participation, clients=(0,), steps=5, up=60.0, **more):
    size = len(clients)
    full = lambda x: np.full(size, float(x))
    settings = dict(wanted=size, rollout=full(0), training=full(1e12)) | more
    return participation.play(
        round=1, clients=clients, steps=steps, bytes_down=full(100), bytes_up=full(up), **settings
    )


@pytest.mark.parametrize("moment", [*MOMENTS, "none"])
def test_what_a_lost_client_has_spent_counts_and_its_update_does_not(vector, moment, monkeypatch):
    given, want, _ = vector("dropout_accounting")
    at = {"after_download": 0, "mid_training": given["dropped_at_step"], "before_upload": 5}
    loss = None if moment == "none" else Loss(moment, at[moment])
    monkeypatch.setattr(Participation, "loss", lambda *_: loss)
    outcome, wanted = play(Participation()), want[moment]
    assert given["bytes_up"] * int(outcome.sent[0]) == wanted["up"]
    assert int(outcome.steps[0]) == wanted["steps"] and outcome.accepted[0] == wanted["weight"]
    wasted = 0.0 if moment == "none" else 1e12 * wanted["steps"] / given["steps"]
    assert outcome.unrun == pytest.approx(wasted)


def test_losses_are_of_the_path_and_of_the_chance():
    half = Participation(dropout=0.3, seed=3)
    found = [half.loss(round, client, 4) for round in range(60) for client in range(60)]
    lost = [loss for loss in found if loss is not None]
    assert len(lost) / len(found) == pytest.approx(0.3, abs=0.03)
    for moment in MOMENTS:
        share = sum(loss.moment == moment for loss in lost) / len(lost)
        assert share == pytest.approx(1 / 3, abs=0.06)
    steps = {loss.steps for loss in lost if loss.moment == "mid_training"}
    assert steps == {0, 1, 2, 3}
    assert half.loss(5, 7, 4) == half.loss(5, 7, 4) and Participation().loss(5, 7, 4) is None
    assert half.device(4) == Participation(dropout=0.9, seed=3).device(4)
    speeds = [half.device(client).speed for client in range(2000)]
    assert np.median(speeds) == pytest.approx(5e11, rel=0.1)
    assert np.std(np.log(speeds)) == pytest.approx(0.5, rel=0.1)


def test_without_a_deadline_the_server_waits_for_the_lost():
    everybody = tuple(range(20))
    some = Participation(dropout=0.4, seed=1)
    outcome = play(some, everybody)
    assert 0 < outcome.lost.sum() < 20 and np.array_equal(outcome.accepted, ~outcome.lost)
    alone = [
        play(dataclasses.replace(some, dropout=0.0), (client,)).seconds for client in everybody
    ]
    assert outcome.seconds == pytest.approx(max(alone))
    short = play(dataclasses.replace(some, deadline=float(np.median(alone))), everybody)
    assert short.seconds == np.median(alone) and short.accepted.sum() < outcome.accepted.sum()
    assert short.sent.sum() == outcome.sent.sum()  # too late, but sent
    few = play(dataclasses.replace(some, min_reports=20), everybody)
    assert not few.accepted.any()


def config_of(**changes):
    config = sj.preset("spear", task="facts", model="tiny", variants=["small"])
    few = {
        "federation.num_clients": 4, "federation.clients_per_round": 3, "rollout.examples": 6,
        "train.steps": 2, "train.batch_size": 4, "eval.limit": 8, "lora.rank": 2,
        "lora.targets": ("q",), "federation.aggregation": "fedavg", "federation.server_rate": 1.0,
    }  # fmt: skip
    config.update_from_flattened_dict(SMALL | few | changes)
    return config


def built(**changes):
    experiment = build(config_of(**changes), jax.devices()[:1])
    return experiment.federation, experiment.initial_state()


@pytest.fixture(scope="module")
def plain():
    """(state, metrics) of a round without a clock."""
    return run_round(*built(), BudgetUsed())[:2]


def test_a_clock_changes_no_bit(plain):
    after, metrics, _ = run_round(*built(**{"participation.clock": True}), BudgetUsed())
    jax.tree.map(np.testing.assert_array_equal, after.lora, plain[0].lora)
    assert metrics["sim/clock"] == metrics["sim/seconds"] > 0 and metrics["participation/lost"] == 0
    assert plain[0].aggregation_state == {} and not any("sim" in name for name in plain[1])
    same = [name for name in plain[1] if name.startswith(("round/", "train/", "rollout/"))]
    assert {name: metrics[name] for name in same} == {name: plain[1][name] for name in same}
    federation, _ = built(**{"participation.clock": True})
    later, again, _ = run_round(federation, after, BudgetUsed())
    assert again["sim/clock"] == pytest.approx(metrics["sim/clock"] + again["sim/seconds"])
    assert float(later.aggregation_state["clock"]) == again["sim/clock"]


def test_a_round_goes_on_without_the_clients_that_are_lost(plain):
    federation, state = built(**{"participation.dropout": 0.5})
    lost = [
        client
        for client in federation.cohort(1).clients
        if federation.participation.loss(1, client, 2)
    ]
    assert 0 < len(lost) < 3
    after, metrics, traces = run_round(federation, state, BudgetUsed())
    assert metrics["participation/lost"] == len(lost)
    assert {record.trace.client for record in traces if record.role == "lost"} == set(lost)
    assert metrics["round/bytes_up"] == plain[1]["round/bytes_up"] * (3 - len(lost)) / 3
    assert metrics["round/bytes_down"] == plain[1]["round/bytes_down"]
    assert metrics["round/update_norm"] > 0 and metrics["round/failed"] == 0
    changed = jax.tree.map(lambda x, y: np.any(np.asarray(x) != y), after.lora, plain[0].lora)
    assert any(jax.tree.leaves(changed))


def test_a_round_without_a_report_changes_nothing():
    federation, state = built(**{"participation.dropout": 1.0})
    after, metrics, _ = run_round(federation, state, BudgetUsed())
    jax.tree.map(np.testing.assert_array_equal, after.lora, state.lora)
    assert metrics["round/failed"] == 1 and metrics["round/bytes_up"] == 0
    assert metrics["participation/lost"] == 3 and int(after.round) == 1


def test_more_clients_are_asked_than_are_wanted():
    federation, _ = built(**{"participation.over_selection": 1.3})
    assert len(federation.cohort(1).clients) == 4
    with pytest.raises(sj.UserError, match="asks 6 clients a round, but there are 4"):
        built(**{"participation.over_selection": 2.0})
    with pytest.raises(sj.UserError, match="never averages; neither goes"):
        built(**{"participation.clock": True, "federation.aggregation": "local"})
