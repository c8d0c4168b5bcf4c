"""Aggregation rules against numpy, client sampling, and what nobody's win does."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.core.errors import UserError
from spear_jax.federated.aggregation.reducers import client_weights
from spear_jax.federated.aggregation.server_optimizer import (
    RULES,
    ServerConfig,
    aggregate,
    check_server,
    init_server,
)
from spear_jax.federated.client_sampling import sample_cohort


def config(**changes):
    return ServerConfig(
        **({"rule": "fedavg", "rate": 1.0, "beta1": 0.9, "beta2": 0.99, "tau": 5e-3} | changes)
    )


def start(settings, theta):
    return init_server(settings, {"a": jnp.array(theta, jnp.float32)}, {}, jax.random.key(0))


def step(settings, state, thetas, weights):
    total = {"a": sum(w * jnp.array(t, jnp.float32) for t, w in zip(thetas, weights, strict=True))}
    return aggregate(settings, state, total, jnp.float32(sum(weights)))


def test_two_client_average_equals_the_one_by_hand():
    vectors = json.loads((pathlib.Path(__file__).parents[1] / "loss_vectors.json").read_text())
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
        if rule in (
            "fedavg",
            "last",
            "local",
        ):  # a local-only client is a federation of one: its average is its own
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
    weights = client_weights(
        config(rule="last"), np.array([5.0, 3.0, 9.0]), np.array([True, True, False])
    )
    np.testing.assert_array_equal(weights, [0, 1, 0])


def test_weighted_sampling_prefers_large_clients_and_never_repeats_one():
    sizes = np.array([1.0, 1.0, 1.0, 97.0])
    rng = np.random.default_rng(0)
    drawn = [sample_cohort(4, 2, sizes, "weighted", rng) for _ in range(300)]
    assert all(len(set(cohort)) == 2 for cohort in drawn)
    assert sum(3 in cohort for cohort in drawn) > 280
    uniform = [sample_cohort(4, 2, sizes, "uniform", rng) for _ in range(300)]
    assert 110 < sum(3 in cohort for cohort in uniform) < 190


@pytest.mark.parametrize(
    "bad", [{"rule": "fedadm"}, {"rate": 0.0}, {"tau": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}]
)
def test_server_settings_out_of_range_are_refused(bad):
    with pytest.raises(UserError):
        check_server(config(**bad))
