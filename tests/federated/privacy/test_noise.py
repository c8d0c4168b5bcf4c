"""Clipping, noise and cohorts against the vectors and by their statistics, then the whole pipeline."""

import dataclasses

import jax
import numpy as np
import pytest

from spear_jax.algorithms.base import CohortData
from spear_jax.core.types import Cohort
from spear_jax.federated import round as round_module
from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.compression import uplink
from spear_jax.federated.aggregation.compression.blocks import Int8
from spear_jax.federated.aggregation.lora_rules import LORA_RULES
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.aggregation.server_optimizer import server_optimizer
from spear_jax.federated.client_sampling import sample_poisson
from spear_jax.federated.participation import Outcome
from spear_jax.federated.privacy import central
from spear_jax.federated.privacy.accounting import Account, local_epsilon
from spear_jax.federated.privacy.central import AdaptiveClip, CentralPrivacy
from spear_jax.federated.privacy.client_side import LocalPrivacy
from spear_jax.models.params import Adapter, LowRank

pytest.importorskip("dp_accounting")
close = lambda got, want, tol=1e-9: np.testing.assert_allclose(got, want, rtol=tol, atol=tol)
ACCOUNT = Account(0.8, 100, 5, "poisson", 0, 1e-3)


class Drawn:
    """A generator whose numbers are given, taken one after the other."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def standard_normal(self, shape=()):
        taken = [self.numbers.pop(0) for _ in range(int(np.prod(shape)))]
        return np.reshape(taken, shape)

    def random(self, size):
        return self.standard_normal(size)


def noisy(given, x, weights, denominator):
    total = vectors.weighted_sum(weights * central.clip_factors({"x": x}, given["bound"]), {"x": x})
    sigma = given["noise_multiplier"] * given["bound"]
    normal = Drawn(given["standard_normal"]).standard_normal
    return total["x"], central.noisy_mean(total, sigma, denominator, normal)["x"]


@pytest.mark.parametrize("name", ["dp_fedavg", "dp_empty_cohort"])
def test_a_clipped_sum_is_divided_by_the_expected_cohort(name, vector):
    given, want, tol = vector(name)
    x = np.array(given.get("x", np.zeros((0, 3))))
    expected = given["sampling_rate"] * given["population"]
    _, out = noisy(given, x, np.ones(len(x)), expected)
    close(out, want["out"], tol)
    clipped = x * central.clip_factors({"x": x}, given["bound"])[:, None]
    close(clipped, np.reshape(want.get("clipped", []), (-1, 3)), tol)
    assert CentralPrivacy(ACCOUNT, given["bound"]).denominator == pytest.approx(expected)


def test_weights_up_to_one_keep_what_a_client_changes(vector):
    given, want, tol = vector("dp_capped_weights")
    weights = np.minimum(np.array(given["examples"]) / given["cap"], 1.0)
    close(weights, want["w"], tol)
    denominator = given["sampling_rate"] * given["total_capped_weight"]
    close(noisy(given, np.array(given["x"]), weights, denominator)[1], want["out"], tol)
    some = tuple([1.0] * 50 + [0.2] * 50)
    capped = CentralPrivacy(ACCOUNT, 1.0, client_weights=some)
    assert capped.denominator == pytest.approx(3.0)
    close(capped.weights([0, 60]), [1.0, 0.2], 1e-6)


def test_the_clip_norm_moves_towards_the_quantile(vector):
    given, want, tol = vector("adaptive_clip")
    adaptive = AdaptiveClip(given["gamma"], given["rate"], given["sigma_b"])
    below = np.array(given["norms"]) <= given["bound"]
    assert list(below) == want["below"]
    expected = given["expected_cohort"]
    moved = adaptive.move(given["bound"], below, expected, given["standard_normal"])
    close(moved, want["bound"], tol)
    split, wanted, tol = vector("adaptive_noise_split")
    rest = AdaptiveClip(0.5, 0.2, split["sigma_b"]).rest(split["noise_multiplier"])
    close(rest, wanted["noise_multiplier_of_updates"], tol)
    # it settles where half of these norms lie below
    norms, bound = np.random.default_rng(0).lognormal(size=200), 0.01
    for _ in range(200):
        bound = AdaptiveClip(0.5, 0.2, 0.0).move(bound, norms <= bound, 200.0, 0.0)
    assert bound == pytest.approx(np.median(norms), rel=0.05)


def pair(x):
    """Three numbers as an adapter: a [1, 2, 1], b [1, 1, 1]; leading axes stay."""
    x = np.asarray(x, np.float32)
    lead = x.shape[:-1]
    return Adapter(
        q=LowRank(x[..., :2].reshape(*lead, 1, 2, 1), x[..., 2:].reshape(*lead, 1, 1, 1))
    )


def flat(adapter):
    return np.concatenate([np.ravel(adapter.q.a), np.ravel(adapter.q.b)])


def ended(aggregation, theta, delta, weight, ids=None, round=None):
    """A round of clients that start from theta; (its end, the numbers of the next adapter)."""
    state = round or init_server(aggregation, pair(theta), {}, jax.random.key(0), 100)
    theta = flat(jax.device_get(state.lora))
    sent = pair(theta + np.reshape(delta, (-1, 3))), np.float32(weight)
    done = end_round(aggregation, state, sent, range(len(weight)) if ids is None else ids)
    return done, flat(jax.device_get(done.state.lora))


def test_a_round_from_training_to_the_servers_step(vector, monkeypatch):
    """A NaN client, an attacker that does not clip itself, a client without wins; int8 on the way."""
    given, want, _ = vector("pipeline")
    rngs = lambda seed, purpose, round, client: Drawn(given["u"][client])
    monkeypatch.setattr(uplink, "path_rng", rngs)
    monkeypatch.setattr(central, "path_rng", lambda *path: Drawn(given["standard_normal"]))
    account = dataclasses.replace(ACCOUNT, noise_multiplier=given["noise_multiplier"])
    aggregation = Aggregation(
        optimizer=server_optimizer("fedavg", given["server_rate"]),
        attack=Attack("scale", (given["attacker"],)),
        privacy=CentralPrivacy(account, given["bound"]),
        uplink=uplink.Uplink(Int8(given["block"])),
    )
    done, theta = ended(aggregation, given["theta"], np.array(given["delta"], float), np.ones(5))
    close(theta, want["theta"], 1e-6)
    assert done.rejected == [1] and done.metrics["round/rejected"] == 1
    assert done.metrics["privacy/snr"] == pytest.approx(
        np.linalg.norm(np.sum(want["clipped"], 0)) / (0.5 * np.sqrt(3)), rel=1e-5
    )
    assert done.metrics["privacy/clipped"] == 0.75 and done.metrics["round/failed"] == 0


# what collects, as these tests hand updates over
PRIVATE = Aggregation(attack=Attack("none", ()), privacy=CentralPrivacy(ACCOUNT, 0.5, seed=3))


def test_every_round_counts_and_adds_noise_whoever_came():
    """An empty cohort, clients that are lost, and one whose update is not finite."""
    none, alone = ended(PRIVATE, np.zeros(3), np.zeros((0, 3)), np.zeros(0))
    assert (
        int(none.state.aggregation_state["noisy_rounds"]) == 1 and none.metrics["privacy/snr"] == 0
    )
    rejected, same = ended(PRIVATE, np.zeros(3), np.full((1, 3), np.nan), np.ones(1), [7])
    lost, also = ended(PRIVATE, np.zeros(3), np.ones((2, 3)), np.zeros(2), [7, 8])
    close(alone, same)
    close(alone, also)
    assert rejected.rejected == [7] and np.all(alone != 0)
    noise = central.path_rng(3, central.NOISE, 1).standard_normal(3)
    close(alone, 0.8 * 0.5 * noise / 5, 1e-6)
    again, _ = ended(PRIVATE, None, np.zeros((0, 3)), np.zeros(0), round=none.state)
    assert int(again.state.aggregation_state["noisy_rounds"]) == 2
    assert again.metrics["privacy/epsilon"] == ACCOUNT.epsilon(2) > none.metrics["privacy/epsilon"]


def test_one_client_moves_the_sum_by_the_clip_norm_at_most():
    delta = np.random.default_rng(0).normal(size=(6, 3)) * 30
    _, whole = ended(PRIVATE, np.zeros(3), delta, np.ones(6))
    _, less = ended(PRIVATE, np.zeros(3), delta[:5], np.ones(5))
    assert np.linalg.norm(whole - less) * 5 == pytest.approx(0.5, rel=1e-5)
    order = np.array([3, 5, 0, 1, 4, 2])  # noise does not depend on who comes first
    _, swapped = ended(PRIVATE, np.zeros(3), delta[order], np.ones(6), order)
    close(swapped, whole, 1e-6)


def test_the_noise_has_the_variance_that_is_accounted():
    draws = []
    for seed in range(400):
        one = CentralPrivacy(ACCOUNT, 0.5, seed=seed)
        total, _, _ = one.release(
            {"x": np.zeros((0, 50))}, np.zeros(0), np.zeros(0, bool), 50, one.init_kept()
        )
        draws.append(total["x"])
    assert np.var(draws) == pytest.approx((0.8 * 0.5 / 5) ** 2, rel=0.03)
    assert abs(np.corrcoef(np.array(draws)[:, :2].T)[0, 1]) < 0.15


def test_noise_stays_off_the_factor_that_is_not_sent():
    for name, sent in (("ffa", "b"), ("rolora", "b"), ("fedsa", "a")):
        ruled = dataclasses.replace(PRIVATE, rule=LORA_RULES[name]())
        delta = [[0.0, 0.0, 3.0]] if sent == "b" else [[3.0, 4.0, 100.0]]
        done, theta = ended(ruled, np.ones(3), delta, np.ones(1))
        held = theta[:2] if sent == "b" else theta[2:]
        close(held, 1.0)
        assert np.all((theta[2:] if sent == "b" else theta[:2]) != 1)
        size = 1 if sent == "b" else 2  # the norm, the noise and d are of what is sent alone
        assert done.metrics["privacy/snr"] == pytest.approx(0.5 / (0.4 * np.sqrt(size)), rel=1e-5)
    own = done.state.aggregation_state["b"]["q"][0]  # what stays at the client is not clipped
    close(own, 101.0, 1e-6)


def test_noise_stays_off_the_layers_of_single_clients():
    ruled = dataclasses.replace(PRIVATE, rule=LORA_RULES["fedper"](personal_layers=1))
    start = Adapter(q=LowRank(np.ones((2, 3, 1), np.float32), np.ones((2, 1, 1), np.float32)))
    sent = jax.tree.map(lambda x: 101 * x[None], start), np.ones(1)
    state = init_server(ruled, start, {}, jax.random.key(0), 9)
    done = end_round(ruled, state, sent, [4])
    shared, own = (done.state.lora.q.a[i] for i in (0, 1))
    assert np.all(np.asarray(shared) != 1) and np.all(np.asarray(own) == 1)
    assert done.metrics["privacy/snr"] == pytest.approx(0.5 / (0.4 * 2), rel=1e-5)  # d = 3 + 1
    close(done.state.aggregation_state["own"].q.a[4], 101.0, 1e-6)


def test_local_noise_is_the_clients_own():
    local = LocalPrivacy(2.0, 0.5, 1e-3, seed=4)
    aggregation = Aggregation(local_privacy=local)
    delta = np.array([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.1, 0.2, 0.2]])
    done, theta = ended(aggregation, np.zeros(3), delta, np.ones(3), [5, 2, 9])
    clipped = np.array([[0.3, 0.0, 0.4], [0.0, 0.0, 0.0], [0.1, 0.2, 0.2]])
    alone = [
        flat(local.add_noise(pair(row[None]), [client], 1))
        for row, client in zip(clipped, (5, 2, 9), strict=True)
    ]
    close(theta, np.mean(alone, 0), 1e-6)
    uploads = done.state.aggregation_state["uploads"]
    assert list(np.flatnonzero(uploads)) == [2, 5, 9] and uploads.max() == 1
    ruled = dataclasses.replace(aggregation, rule=LORA_RULES["fedsa"]())
    own, _ = ended(ruled, np.ones(3), delta, np.ones(3), [5, 2, 9])
    close(own.state.aggregation_state["b"]["q"][5], 5.0, 1e-6)  # what stays has no noise
    assert done.metrics["privacy/epsilon"] == local_epsilon(2.0, 1, 1e-3)
    more, _ = ended(aggregation, None, delta[:1], np.ones(1), [5], done.state)
    assert more.metrics["privacy/epsilon"] == local_epsilon(2.0, 2, 1e-3)
    many = local.add_noise({"x": np.zeros((1, 4000))}, [1], 3)["x"]
    assert np.std(many) == pytest.approx(1.0, rel=0.05)


def test_clients_without_anything_to_train_on_send_too():
    """But for those that the clock says are lost."""
    none, cohort = np.zeros(3), Cohort(1, [4, 5, 6], [], None)
    data = CohortData([], none, none > 0, [], {})
    weight = lambda aggregation, outcome: round_module._members(
        aggregation, cohort, data, jax.random.key(0), outcome
    )[1]
    lost = Outcome(np.array([True, False, True]), none, none, none, 0.0, 0.0)
    local = Aggregation(local_privacy=LocalPrivacy(1.0, 1.0, 1e-3))
    for private in (PRIVATE, local):
        assert list(weight(private, None)) == [1, 1, 1] and list(weight(private, lost)) == [1, 0, 1]
    assert list(weight(Aggregation(), None)) == [0, 0, 0]


def test_poisson_cohorts_are_of_independent_clients():
    rng, rate = np.random.default_rng(0), 0.1
    drawn = np.zeros((10_000, 40), bool)
    for row in drawn:
        row[sample_poisson(40, rate, 0, rng)] = True
    sizes = drawn.sum(1)
    assert sizes.mean() == pytest.approx(4.0, rel=0.02)
    assert sizes.var() == pytest.approx(40 * rate * (1 - rate), rel=0.05)
    both = (drawn[:, :20] & drawn[:, 20:]).mean()
    assert both == pytest.approx(rate**2, rel=0.05) and (sizes == 0).any()
    few = [sample_poisson(40, 0.5, 6, rng) for _ in range(300)]
    assert {len(cohort) for cohort in few} == {6}
    assert all(cohort == sorted(set(cohort)) for cohort in few)
    assert len(set(map(tuple, few))) > 290
