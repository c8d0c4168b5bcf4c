"""FedBuff and FedAsync: the clock by its vectors, then versions of a real run."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from quadratic_clients import adapter, numbers
from run_sizes import SMALL
from small_cohort import mostly_close

import spear_jax as sj
from spear_jax.core import pytrees
from spear_jax.core.mesh import make_mesh, replicate
from spear_jax.experiment.builder import build
from spear_jax.experiment.checkpoint import Checkpoints
from spear_jax.federated import asynchronous
from spear_jax.federated.aggregation.lora_rules import LORA_RULES
from spear_jax.federated.aggregation.pipeline import Aggregation, find_reducer, init_server
from spear_jax.federated.aggregation.refusals import Choices, reasons
from spear_jax.federated.aggregation.server_optimizer import server_optimizer
from spear_jax.federated.asynchronous import Flight, Queue, flush, play, run_round, waves
from spear_jax.federated.participation import Asynchronous
from spear_jax.federated.round import run_round as synchronous
from spear_jax.federated.round_metrics import BudgetUsed


def test_age_shortens_a_step(vector):
    given, want, tol = vector("staleness_weights")
    for kind, wanted in want.items():
        buff = Asynchronous(
            "fedbuff",
            staleness=kind,
            power=given["a"],
            slope=given["hinge_a"],
            flat=given["hinge_b"],
        )
        np.testing.assert_allclose(buff.shrink(given["tau"]), wanted, atol=tol)


def test_the_order_of_events_is_that_of_the_vector(vector):
    given, want, _ = vector("fedbuff_events")
    starts, durations = given["starts"], given["durations"]

    def start(version):
        return lambda dispatch, now, busy: Flight(
            starts[dispatch], version, dispatch, now + durations[starts[dispatch]]
        )

    queue = Queue(0.0, 0, given["concurrency"], ())
    for version, wanted in enumerate(want["flushes"]):
        played = play(queue, version, given["buffer"], 0, start(version))
        queue = played.queue
        updates = [[x.client, x.version, version - x.version] for x in played.buffer]
        assert updates == wanted["updates"] and queue.time == wanted["time"]
        assert all(flight.version == version for flight in played.started)


def test_lost_and_old_clients_free_their_places():
    def start(dispatch, now, busy):
        return Flight(dispatch % 5, 7, dispatch, now + 1.0 + dispatch, dispatch == 5)

    flights = (Flight(3, 1, 2, 4.0), Flight(4, 6, 3, 5.0), Flight(2, 6, 4, 5.5, True))
    played = play(Queue(3.0, 5, 1, flights), 7, 2, 3, start)
    assert [x.dispatch for x in played.late] == [2] and [x.dispatch for x in played.lost] == [4, 5]
    assert [x.dispatch for x in played.buffer] == [3, 6]  # dispatch 6 starts at 4.0, for 7 seconds
    assert played.queue.time == 11.0 and played.queue.owed == 1
    at_work = len(played.queue.flights) + played.queue.owed
    assert at_work == 4 and len({x.client for x in played.queue.flights}) <= 5


def test_a_client_that_starts_twice_trains_in_two_cohorts():
    flights = [Flight(c, 0, i, 1.0, i == 3) for i, c in enumerate([2, 0, 2, 1, 0, 4])]
    grouped = [[(x.client, x.dispatch) for x in one] for one in waves(flights, 3)]
    assert grouped == [[(0, 1), (2, 0), (4, 5)], [(0, 4), (2, 2)]]
    assert [len(one) for one in waves([Flight(c, 0, c, 1.0) for c in range(5)], 2)] == [2, 2, 1]


class OneProjection:
    """What `flush` reads of a federation."""

    def __init__(self, aggregation):
        self.aggregation = aggregation


def move(given, theta, sent, weight, age, rate=1.0):
    """θ behind a buffer. Args: sent: float[n, d]."""
    aggregation = Aggregation(optimizer=server_optimizer("fedavg", rate), waits=True)
    state = init_server(aggregation, adapter(theta), {}, jax.random.key(0))
    state = dataclasses.replace(replicate(state, make_mesh(jax.devices()[:1])), round=np.int32(9))
    buffer = [Flight(k, 9 - int(tau), k, 0.0) for k, tau in enumerate(age)]
    trees = {
        k: (jax.tree.map(lambda x, k=k: x[k], adapter(sent)), weight[k]) for k in range(len(age))
    }
    return numbers(flush(OneProjection(aggregation), given, state, buffer, trees).state.lora)


def test_a_buffer_is_emptied_as_in_the_vector(vector):
    given, want, _ = vector("fedbuff_flush")
    args = given["theta"], given["x"]
    buff = Asynchronous("fedbuff")
    np.testing.assert_allclose(buff.shrink(given["tau"]), want["s"])
    moved = lambda weight: move(buff, *args, weight, given["tau"], given["rate"])
    np.testing.assert_allclose(moved(given["w"]), want["weighted"], rtol=1e-5)
    np.testing.assert_allclose(moved([1.0, 1.0]), want["paper"], rtol=1e-5)


def test_adapters_are_mixed_as_in_the_vector(vector):
    given, want, _ = vector("fedasync")
    mix, theta = Asynchronous("fedasync", mix=given["alpha"], power=given["a"]), given["theta"]
    np.testing.assert_allclose(mix.shrink(given["tau"]), want["alpha"])
    for client, tau, wanted in zip(given["clients"], given["tau"], want["theta"], strict=True):
        theta = move(mix, theta, [client], [5.0], [tau])
        np.testing.assert_allclose(theta, wanted, rtol=1e-5)


# Versions of a run


def built(**changes):
    """A method without rollouts, which compile for longer than all the rest."""
    config = sj.preset("sft", task="facts", model="tiny", variants=["small"])
    few = {
        "federation.num_clients": 4, "federation.clients_per_round": 3, "eval.limit": 8,
        "lora.targets": ("q",), "federation.aggregation": "fedavg", "federation.server_rate": 1.0,
    }  # fmt: skip
    config.update_from_flattened_dict(SMALL | few | changes)
    return build(config, jax.devices()[:1])


def versions(experiment, count, state=None):
    """The results of so many versions."""
    results, state = [], experiment.initial_state() if state is None else state
    for _ in range(count):
        results.append(run_round(experiment.federation, state, BudgetUsed()))
        state = results[-1].state
    return results


@pytest.mark.parametrize("mode", ["fedbuff", "fedasync"])
def test_a_run_goes_on_in_the_middle_of_its_queue_with_the_same_bits(mode, tmp_path):
    experiment = built(**{
        "participation.mode": mode, "participation.buffer": 2, "participation.dropout": 0.2,
        "participation.spread": 1.0,
    })  # fmt: skip
    whole = versions(experiment, 5)
    middle = whole[2].state
    at_work = middle.aggregation_state["queue"]
    assert (at_work["client"] >= 0).any() and (at_work["weight"] > 0).any()
    assert (at_work["version"] < 2).any()  # somebody has begun on an older version
    saved = Checkpoints(tmp_path, 1, 0)
    saved.save(middle, {"round": 3}, experiment.shapes.save())
    saved.wait()
    restored, _ = saved.restore(experiment.initial_state())
    again = versions(experiment, 2, restored)
    digest = lambda result: pytrees.digest(pytrees.to_dicts(result.state))
    assert [digest(x) for x in again] == [digest(x) for x in whole[3:]]
    told = collections.ChainMap(*[x.metrics for x in reversed(whole)])
    assert max(x.metrics["participation/oldest"] for x in whole) > 0
    assert all(x.metrics["round/update_norm"] > 0 for x in whole) and told["sim/clock"] > 0
    clock = [x.metrics["sim/clock"] for x in whole]
    assert clock == sorted(clock)
    assert sum(x.metrics["sim/seconds"] for x in whole) == pytest.approx(clock[-1])


def test_equal_durations_and_full_buffers_are_synchronous_rounds():
    # work takes no time beside the network's latency
    even = {
        "federation.num_clients": 3, "participation.spread": 0.0, "participation.speed": 1e38
    }  # fmt: skip
    experiment = built(**even, **{"participation.mode": "fedbuff"})
    federation = experiment.federation
    results = versions(experiment, 2)
    plain = built(**even)
    state = plain.initial_state()
    for result in results:
        done = synchronous(plain.federation, state, BudgetUsed())
        state = done.state
        change = lambda new: jax.tree.map(
            lambda x, y: np.asarray(x) - np.asarray(y), new, plain.initial_state().lora
        )
        mostly_close(change(result.state.lora), change(state.lora), 1e-4)
        assert result.metrics["participation/oldest"] == 0
        for name in ("round/clients", "round/bytes_up", "round/bytes_down", "round/rate"):
            assert result.metrics[name] == done.metrics[name], name
        assert result.metrics["train/loss"] == pytest.approx(done.metrics["train/loss"], rel=1e-4)
    assert federation.clients_per_round == 3
    assert min(asynchronous.planned_flops(federation, client) for client in range(3)) > 0


def choices(case, defaults):
    given = {**defaults, **case}
    name = {"none": "mean"}.get(given["robust"], given["robust"])
    return Choices(
        rule=LORA_RULES[given["rule"]](), reducer=find_reducer(name), reducer_name=name,
        server=given["server"], server_rate=given["server_rate"], cohort=given["cohort"],
        mode=given["mode"], over_selection=given["over_selection"], drift=given["drift"],
    )  # fmt: skip


def test_what_needs_cohorts_is_refused(vector):
    given, want, _ = vector("refusals")
    seen = []
    for case, refused in zip(given["cases"], want["refused"], strict=True):
        if "mode" in case and "central_dp" not in case:
            assert list(reasons(choices(case, given["defaults"]))) == refused, case
            seen += refused
    assert sorted(seen) == [
        "async_drift", "async_over_selection", "async_robust", "async_rule", "async_server",
    ]  # fmt: skip
    for changes, message in (
        ({"participation.dropout": 1.0}, "nobody ever arrives"),
        ({"federation.sampling": "weighted"}, "set sampling to uniform"),
        ({"participation.deadline": 5.0}, "participation.deadline 5 is about a cohort"),
        (
            {"aggregation.state_gb": 1e-6},
            "participation.mode=fedbuff keeps .* for each of 3 clients",
        ),
    ):
        with pytest.raises(sj.UserError, match=message):
            built(**{"participation.mode": "fedbuff"}, **changes)
