"""Central privacy where clients train by themselves: the round is that of simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spear_jax as sj
from spear_jax.core.rng import path_rng
from spear_jax.core.types import Mean
from spear_jax.experiment.builder import build
from spear_jax.federated.local_training import NOT_FINITE
from spear_jax.federated.privacy.central import BIT_NOISE, NOISE
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.single_client import (
    ClientUpdate,
    client_round,
    hide,
    join_sum,
    join_updates,
)

pytest.importorskip("dp_accounting")
NUMBERS = ("privacy/epsilon", "privacy/delta", "privacy/clip", "privacy/snr", "round/failed")
SMALL = {
    "federation.num_clients": 3,
    "federation.clients_per_round": 3,
    "federation.weighting": "uniform",
    "privacy.noise_multiplier": 0.5,
    "privacy.clip": 0.02,
    "rollout.examples": 4,
    "rollout.max_concurrent_sequences": 16,
    "train.steps": 2,
    "train.batch_size": 4,
    "lora.rank": 2,
    "lora.targets": ("down",),  # each more is time to compile
}


def built(**changes):
    config = sj.preset("spear", task="facts", model="tiny", variants=["small"])
    config.update_from_flattened_dict(SMALL | changes)
    experiment = build(config, jax.devices()[:1])
    return experiment.federation, experiment.initial_state()


@pytest.fixture(scope="module")
def plain():
    return built()


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def made(state, seed, size, **numbers):
    """An update of that norm, as a client sends it."""
    draw = np.random.default_rng(seed)
    update = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), state.lora)
    norm = np.linalg.norm(flat(update))
    update = jax.tree.map(lambda x: x * np.float32(size / norm), update)
    counts = {"loss": Mean(1.0, 1.0), NOT_FINITE: Mean(0.0, 1.0)}
    spent = {"rollout/tokens": 1.0, "round/flops": 1.0, "time/rollout": 1.0, "time/train": 1.0}
    given = ClientUpdate(update, 5.0, True, counts, spent, (4, 2), 1e-3, {}, [])
    return dataclasses.replace(given, **numbers)


def joined(plain, updates):
    federation, state = plain
    after = join_updates(federation, state, BudgetUsed(), federation.cohort(1), updates)
    return flat(after.state.lora) - flat(state.lora), after


def released(plain, *sums, z=0.5):
    """(the sum + z S ξ) / 3, with the numbers of the stream that simulation draws from."""
    federation, state = plain
    normal = path_rng(federation.aggregation.privacy.seed, NOISE, 1).standard_normal
    noise = flat([normal(x.shape) for x in jax.tree.leaves(state.lora)])
    return (sum(sums) + z * 0.02 * noise) / 3


def test_joined_clients_are_the_private_round(plain):
    federation, state = plain
    key = jax.random.wrap_key_data(jnp.asarray(state.key))
    updates = {
        client: client_round(federation, state.lora, state.algorithm_state, client, 1, key)
        for client in range(3)
    }
    norms = [np.linalg.norm(flat(one.update)) for one in updates.values()]
    assert max(norms) == pytest.approx(0.02, rel=1e-4)  # nodes clip, the server again
    moved, (after, told, _) = joined(plain, updates)
    whole, metrics, _ = run_round(federation, state, BudgetUsed())
    wanted = flat(whole.lora) - flat(state.lora)
    assert np.linalg.norm(moved - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert told.keys() == metrics.keys()
    for name in NUMBERS:
        assert told[name] == pytest.approx(metrics[name], rel=1e-3), name
    assert told["privacy/epsilon"] == metrics["privacy/epsilon"] > 0
    kept, same = after.aggregation_state, whole.aggregation_state
    assert kept["noisy_rounds"] == same["noisy_rounds"] == 1 and kept["bound"] == same["bound"]


def test_an_adaptive_clip_follows_what_arrives():
    adaptive = built(**{"privacy.adaptive": True, "privacy.sigma_b": 0.5})
    privacy = adaptive[0].aggregation.privacy
    short, long = made(adaptive[1], 1, 0.01), made(adaptive[1], 2, 5.0)
    moved, end = joined(adaptive, {0: short, 1: long})
    one = path_rng(privacy.seed, BIT_NOISE, 1).standard_normal()
    bound = privacy.adaptive.move(0.02, np.array([True, False]), 3.0, one)
    assert end.state.aggregation_state["bound"] == pytest.approx(bound) != 0.02
    wanted = released(
        adaptive, flat(short.update), flat(long.update) * 0.02 / 5.0, z=privacy.noise_multiplier
    )
    np.testing.assert_allclose(moved, wanted, atol=2e-7)


def test_the_denominator_stays_where_clients_are_lost(plain):
    short, long = made(plain[1], 1, 0.01), made(plain[1], 2, 5.0)
    moved, end = joined(plain, {0: short, 2: long})
    wanted = released(plain, flat(short.update), flat(long.update) * 0.02 / 5.0)
    np.testing.assert_allclose(moved, wanted, atol=2e-7)
    assert end.metrics["round/clients"] == 2
    alone, _ = joined(plain, {0: short})
    np.testing.assert_allclose(alone, released(plain, flat(short.update)), atol=2e-7)


def test_weights_and_wins_do_not_count(plain):
    one = made(plain[1], 1, 0.01)
    claims = dataclasses.replace(one, weight=1e6, active=False)
    moved, other = (joined(plain, {1: update})[0] for update in (one, claims))
    np.testing.assert_array_equal(moved, other)


def test_a_round_without_any_update_is_noise_and_counts(plain):
    moved, end = joined(plain, {})
    np.testing.assert_allclose(moved, released(plain, 0.0), atol=2e-7)
    state, told, _ = end
    assert state.aggregation_state["noisy_rounds"] == int(state.round) == 1
    epsilon = plain[0].aggregation.privacy.account.epsilon
    assert told["privacy/epsilon"] == epsilon(1) and told["privacy/snr"] == 0
    again = join_updates(plain[0], state, BudgetUsed(), plain[0].cohort(2), {})
    assert again.metrics["privacy/epsilon"] == epsilon(2) > epsilon(1)


def test_an_update_without_a_norm_is_left_out(plain):
    huge = made(plain[1], 1, 0.01)
    huge = dataclasses.replace(huge, update=jax.tree.map(lambda x: x * 0 + 1e30, huge.update))
    good = made(plain[1], 2, 0.01)
    moved, end = joined(plain, {0: huge, 1: good})
    np.testing.assert_allclose(moved, released(plain, flat(good.update)), atol=2e-7)
    assert end.metrics["round/clients_not_finite"] == 1


def summed(plain, updates):
    """A round of which the server knows sums alone."""
    federation, state = plain
    kept = state.aggregation_state
    hidden = [hide(federation, client, one, kept) for client, one in updates.items()]
    total = jax.tree.map(lambda *x: sum(x), *(update for update, _ in hidden))
    told = {}
    for _, numbers in hidden:
        for name, x in numbers.items():
            told[name] = told.get(name, Mean(0.0, 0.0)) + x
    cohort = federation.cohort_of(list(updates), 1)
    after = join_sum(federation, state, BudgetUsed(), cohort, total, told)
    return flat(after.state.lora) - flat(state.lora), after


def test_clients_that_hide_clip_themselves_and_leave_room_for_rounding():
    hiding = built(**{"federation.secure_sum": True, "aggregation.secure_bits": 12})
    short, long = made(hiding[1], 1, 0.001), made(hiding[1], 2, 5.0)
    moved, end = summed(hiding, {0: short, 2: long})
    bound = 0.02 - np.sqrt(flat(hiding[1].lora).size) / 2**13
    assert 0.001 < bound < 0.019
    wanted = released(hiding, flat(short.update), flat(long.update) * bound / 5.0)
    np.testing.assert_allclose(moved, wanted, atol=2e-7)
    assert end.metrics["privacy/epsilon"] == hiding[0].aggregation.privacy.account.epsilon(1)


def test_sums_alone_end_a_round_as_updates_do():
    hiding = built(**{"privacy.noise_multiplier": 0.0, "federation.weighting": "method"}
                   | {"federation.secure_sum": True})  # fmt: skip
    seen = hiding[0]
    seen = dataclasses.replace(
        seen, aggregation=dataclasses.replace(seen.aggregation, secure_sum=None)
    )
    numbers = [("rollout/wins", 3.0), ("rollout/first_accuracy", 0.25), ("rollout/fixed", 0.5)]
    one, two = made(hiding[1], 1, 0.5), made(hiding[1], 2, 2.0, weight=2.0, answers=(8, 3))
    broken = made(hiding[1], 3, 1.0, weight=0.0)
    broken = dataclasses.replace(
        broken,
        update=jax.tree.map(lambda x: 0 * x, broken.update),
        counts=broken.counts | {NOT_FINITE: Mean(1.0, 1.0)},
    )
    for update, times in ((one, 1), (two, 2), (broken, 0)):
        update.metrics.update((name, x * times) for name, x in numbers)
    idle = made(hiding[1], 4, 0.0, weight=0.0, active=False)
    updates = {0: one, 1: two, 2: broken}
    moved, end = summed(hiding, updates)
    plain, known = joined((seen, hiding[1]), updates)
    np.testing.assert_allclose(moved, plain, atol=2e-7)
    np.testing.assert_allclose(moved, (5 * flat(one.update) + 2 * flat(two.update)) / 7, atol=2e-7)
    for name in known.metrics.keys() - {"time/aggregate", "budget/seconds", "round/rate"}:
        if not name.startswith("exactness/"):
            assert end.metrics[name] == pytest.approx(known.metrics[name], rel=1e-6), name
    assert end.metrics["rollout/first_accuracy"] == pytest.approx((0.25 * 4 + 0.5 * 8) / 16)
    assert end.metrics["round/clients_not_finite"] == 1
    assert end.metrics["secure/clipped"] == 0
    far = made(hiding[1], 5, 4.0 * np.sqrt(flat(hiding[1].lora).size))
    _, end = summed(hiding, {0: far, 1: one})
    outside = np.sum(np.abs(5 * flat(far.update)) > 4) / (2 * flat(far.update).size)
    assert 0.3 < outside == pytest.approx(end.metrics["secure/clipped"])
    _, end = summed(hiding, {0: one, 1: idle})
    assert end.metrics["round/clients_without_wins"] == 1


def test_without_privacy_a_clipping_server_clips_and_an_empty_round_changes_nothing():
    bounded = built(
        **{
            "privacy.noise_multiplier": 0.0,
            "federation.reducer": "norm_clip",
            "federation.clip_bound": 0.5,
            "federation.sampling": "poisson",
        }
    )
    far = made(bounded[1], 1, 50.0)
    np.testing.assert_allclose(joined(bounded, {1: far})[0], flat(far.update) / 100, atol=1e-6)
    moved, end = joined(bounded, {})
    assert not moved.any() and int(end.state.round) == 1
