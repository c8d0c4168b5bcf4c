"""Reducers and server optimisers against numpy, client sampling, and what nobody's win does."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spear_jax.core.errors import UserError
from spear_jax.federated.aggregation.pipeline import (
    Aggregation,
    aggregate,
    end_round,
    find_reducer,
    init_server,
)
from spear_jax.federated.aggregation.reducers import Last, Mean
from spear_jax.federated.aggregation.robust import CoordinateMedian
from spear_jax.federated.aggregation.server_optimizer import RULES, from_optax, server_optimizer
from spear_jax.federated.client_sampling import sample_cohort


def config(rule="fedavg", reducer="mean", rate=1.0, beta1=0.9, beta2=0.99, tau=5e-3):
    return Aggregation(
        find_reducer("last" if rule == "last" else reducer),
        server_optimizer(rule, rate, beta1, beta2, tau),
    )


def start(aggregation, theta):
    return init_server(aggregation, {"a": jnp.array(theta, jnp.float32)}, {}, jax.random.key(0))


def step(aggregation, state, thetas, weights):
    """One client a chunk, as the device program adds them."""
    reduced = aggregation.reducer.init(state.lora)
    for theta, weight in zip(thetas, weights, strict=True):
        adapters = {"a": jnp.array([theta], jnp.float32)}
        reduced = aggregation.reducer.add(reduced, adapters, jnp.array([weight], jnp.float32))
    return aggregate(aggregation, state, reduced)


def test_two_client_average_equals_the_one_by_hand():
    vectors = json.loads((pathlib.Path(__file__).parents[2] / "loss_vectors.json").read_text())
    vector = next(v for v in vectors if v["name"] == "fedavg_wins")
    inputs = vector["inputs"]
    state, change = step(config(), start(config(), [0.0, 0.0]), inputs["theta"], inputs["wins"])
    # (1, 2) with 30 wins, (3, 6) with 10, (9, 9) with none: (30 + 30) / 40 = 1.5 and (60 + 60) / 40
    # = 3
    np.testing.assert_allclose(state.lora["a"], [1.5, 3.0], rtol=1e-6)
    np.testing.assert_allclose(state.lora["a"], vector["expected"]["theta"], rtol=1e-6)
    assert float(change) == pytest.approx(np.hypot(1.5, 3.0))
    assert int(state.round) == 1


@pytest.mark.parametrize("rule", RULES)
def test_round_without_wins_leaves_adapter_and_moments_unchanged(rule):
    settings = config(rule=rule)
    before = start(settings, [1.0, -2.0])
    after, change = step(settings, before, [[5, 5]], [0])
    np.testing.assert_array_equal(after.lora["a"], before.lora["a"])
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert float(change) == 0.0 and int(after.round) == 1


def numpy_rule(rule, rate, beta1, beta2, tau, averages, theta):
    m, v = np.zeros_like(theta), np.full_like(theta, tau**2)
    for average in averages:
        g = average - theta
        # a local-only client is a federation of one: its average is its own
        if rule in ("fedavg", "last", "local"):
            theta = theta + (rate if rule == "fedavg" else 1.0) * g
        elif rule == "fedavgm":
            m = beta1 * m + g
            theta = theta + rate * m
        else:
            m = beta1 * m + (1 - beta1) * g
            square = g * g
            if rule == "fedadam":
                v = beta2 * v + (1 - beta2) * square
            elif rule == "fedyogi":
                v = v + (1 - beta2) * square * np.sign(square - v)
            else:
                v = v + square
            theta = theta + rate * m / (np.sqrt(v) + tau)
    return theta


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("numbers", [(0.5, 0.9, 0.99, 5e-3), (1.0, 0.5, 0.9, 1e-2)])
def test_rules_follow_their_formulas_over_three_rounds(rule, numbers):
    rate, beta1, beta2, tau = numbers
    settings = config(rule=rule, rate=rate, beta1=beta1, beta2=beta2, tau=tau)
    averages = np.random.default_rng(0).normal(size=(3, 4))
    state = start(settings, np.arange(4.0))
    for average in averages:
        state, _ = step(settings, state, [average], [2.0])
    want = numpy_rule(rule, rate, beta1, beta2, tau, averages, np.arange(4.0))
    np.testing.assert_allclose(state.lora["a"], want, rtol=2e-5, atol=1e-6)


def test_last_counts_only_the_last_client_that_trained():
    weights = Last().weights(np.array([5.0, 3.0, 9.0]), np.array([True, True, False]))
    np.testing.assert_array_equal(weights, [0, 1, 0])
    assert isinstance(config("last").reducer, Last) and type(config().reducer) is Mean


def test_states_of_the_mean_merge_in_any_grouping():
    rng, mean = np.random.default_rng(0), Mean()
    thetas, weights = rng.normal(size=(6, 3)).astype(np.float32), np.arange(6, dtype=np.float32)
    like = {"a": jnp.zeros(3)}
    add = lambda rows: mean.add(mean.init(like), {"a": thetas[rows]}, weights[rows])
    parts = jax.tree.map(lambda *x: jnp.stack(x), add([0, 1, 2]), add([3, 4, 5]))
    update, mass = mean.finish(mean.merge(parts), {"a": jnp.ones(3)})
    want = np.average(thetas, axis=0, weights=weights) - 1
    np.testing.assert_allclose(update["a"], want, rtol=1e-6)
    assert float(mass) == 15.0


@pytest.mark.parametrize("active", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
def test_the_median_is_numpys_over_the_clients_that_trained(active):
    rng = np.random.default_rng(1)
    thetas, weight = rng.normal(size=(5, 2, 3)).astype(np.float32), np.array(active, np.float32)
    old = rng.normal(size=(2, 3)).astype(np.float32)
    update, mass = CoordinateMedian().finish(({"a": thetas}, weight * 7), {"a": old})
    np.testing.assert_allclose(update["a"], np.median(thetas[weight > 0], axis=0) - old, rtol=1e-6)
    assert float(mass) == weight.sum()


def test_a_few_huge_updates_leave_the_median_in_the_others_range():
    honest = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    thetas = np.concatenate([honest, np.full((2, 4), 1e6, np.float32)])
    state = {"a": thetas}, np.ones(5, np.float32)
    update, _ = CoordinateMedian().finish(state, {"a": np.zeros(4, np.float32)})
    assert (update["a"] >= honest.min(0)).all() and (update["a"] <= honest.max(0)).all()


def test_nobody_trained_leaves_the_adapter_under_the_median():
    aggregation = config(reducer="median")
    before = start(aggregation, [1.0, -2.0])
    collected = {"a": np.full((3, 2), np.nan)}, np.zeros(3, np.float32)
    after, change, metrics, rejected = end_round(aggregation, before, collected)
    assert metrics["round/failed"] == 0.0 and not rejected
    np.testing.assert_array_equal(after.lora["a"], before.lora["a"])
    assert float(change) == 0.0


def test_optax_sgd_on_the_pseudo_gradient_is_fedavg():
    plain, sgd = config(rate=0.5), Aggregation(optimizer=from_optax(optax.sgd(0.5)))
    thetas, weights = [[1.0, 2.0], [3.0, -1.0]], [1.0, 3.0]
    states = [step(one, start(one, [0.5, 0.5]), thetas, weights)[0] for one in (plain, sgd)]
    np.testing.assert_allclose(states[0].lora["a"], states[1].lora["a"], rtol=1e-6)


def test_an_optax_optimiser_sees_one_tensor_a_layer():
    """LAMB divides by a norm of each tensor: as optax itself does it with a tensor a layer."""
    rng = np.random.default_rng(0)
    scales = np.array([1, 10, 100])[:, None, None]
    old, new = np.float32(rng.normal(size=(2, 3, 4, 2)) * scales)
    aggregation = Aggregation(optimizer=from_optax(optax.lamb(0.1)))
    state, _ = step(aggregation, start(aggregation, old), [new], [1.0])
    lamb, layers = optax.lamb(0.1), list(old)
    moves, _ = lamb.update(
        [a - b for a, b in zip(old, new, strict=True)], lamb.init(layers), layers
    )
    np.testing.assert_allclose(state.lora["a"], old + np.stack(moves), rtol=1e-5)


def test_transforms_act_on_the_update_one_after_the_other():
    double = lambda update: jax.tree.map(lambda x: 2 * x, update)
    plus = lambda update: jax.tree.map(lambda x: x + 1, update)
    aggregation = Aggregation(transforms=(double, plus))
    adapter = aggregation.transform({"a": jnp.array([10.0])}, {"a": jnp.array([13.0])})
    np.testing.assert_allclose(adapter["a"], [10 + 2 * 3 + 1])
    same = {"a": jnp.array([13.0])}
    assert Aggregation().transform({"a": jnp.array([10.0])}, same) is same


def test_weighted_sampling_prefers_large_clients_and_never_repeats_one():
    sizes = np.array([1.0, 1.0, 1.0, 97.0])
    rng = np.random.default_rng(0)
    drawn = [sample_cohort(4, 2, sizes, "weighted", rng) for _ in range(300)]
    assert all(len(set(cohort)) == 2 for cohort in drawn)
    assert sum(3 in cohort for cohort in drawn) > 280
    uniform = [sample_cohort(4, 2, sizes, "uniform", rng) for _ in range(300)]
    assert 110 < sum(3 in cohort for cohort in uniform) < 190


def test_an_unknown_reducer_is_refused():
    with pytest.raises(UserError, match="Did you mean 'median'"):
        find_reducer("medain")
