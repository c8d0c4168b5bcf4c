"""The sum behind masks against the vector and exact sums, then whole rounds with it."""

import jax
import numpy as np
import pytest

from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.compression.sparse import RandomK
from spear_jax.federated.aggregation.compression.uplink import Uplink
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.aggregation.robust.norm_clip import NormClip
from spear_jax.federated.aggregation.secure_sum import SecureSum
from spear_jax.federated.privacy.accounting import Account
from spear_jax.federated.privacy.central import CentralPrivacy
from spear_jax.models.params import Adapter, LowRank


def test_masks_cancel_and_the_sum_of_codes_is_exact(vector):
    given, want, _ = vector("secure_sum")
    secure, x = SecureSum(given["bound"], given["fraction_bits"]), np.array(given["x"])
    codes = [secure.encode(row, given["bound"]).view(np.int32) for row in x]
    np.testing.assert_array_equal(codes, want["codes"])
    np.testing.assert_array_equal(secure.total(np.ones(3), {"x": x}, 1)["x"], want["sum"])
    assert secure.most_clients * given["bound"] < 2**15 <= (secure.most_clients + 1) * 4.0


def test_the_sum_is_right_to_its_rounding_up_to_the_largest_cohort():
    secure = SecureSum(4.0, 24)  # n c < 2^7
    assert secure.most_clients == 31
    x = np.random.default_rng(0).uniform(-4, 4, (31, 50))
    x[:, 0] = 4.0  # the largest sum there is
    got = secure.total(np.ones(31), {"x": x}, 1)["x"]
    np.testing.assert_allclose(got, x.sum(0), atol=31 / 2**25)
    assert secure.mass(np.array([3.0, 0.5]), 1) == 3.5
    # one masked update alone is noise: the server's view of the first client is uniform
    seen = secure.encode(x[0], 4.0) + np.random.default_rng(1).integers(0, 2**32, 50, np.uint32)
    assert abs(np.corrcoef(seen.astype(float), x[0])[0, 1]) < 0.4


def pair(x):
    """d numbers as an adapter: all but the last in a; leading axes stay."""
    x = np.asarray(x, np.float32)
    return Adapter(q=LowRank(x[..., None, :-1, None], x[..., None, -1:, None]))


def ended(aggregation, delta, weight):
    start = pair(np.zeros(delta.shape[1]))
    state = init_server(aggregation, start, {}, jax.random.key(0), 9)
    sent = pair(delta), np.float32(weight)
    done = end_round(aggregation, state, sent, range(len(weight)))
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(done.state.lora)])


def test_a_round_behind_masks_is_a_round():
    delta, weight = np.random.default_rng(0).normal(size=(4, 30)) * 0.1, [3.0, 1.0, 0.0, 7.0]
    plain = ended(Aggregation(attack=Attack("none", ())), delta, weight)
    np.testing.assert_allclose(
        ended(Aggregation(secure_sum=SecureSum()), delta, weight), plain, atol=4 / 2**17 / 11
    )
    # 7 times the update reaches beyond 1 somewhere, and that is told
    tight = Aggregation(secure_sum=SecureSum(0.9))
    start = init_server(tight, pair(np.zeros(30)), {}, jax.random.key(0), 9)
    done = end_round(tight, start, (pair(delta), np.float32(weight)), range(4))
    beyond = np.abs(np.float32(delta) * np.float32(weight)[:, None]) > 0.9
    assert 0 < done.metrics["secure/clipped"] == beyond.sum() / (3 * 30)
    # an attacker is not clipped: nobody sees its update
    clipped = Aggregation(
        reducer=NormClip(0.1), attack=Attack("scale", (0,), 5.0), secure_sum=SecureSum()
    )
    assert np.linalg.norm(ended(clipped, delta, np.ones(4))) > 0.1


def test_random_numbers_under_a_mask_of_all_clients_are_summed():
    secure, part = SecureSum(), RandomK(0.2)
    uplink = Uplink(part, together=True, seed=2)
    delta = np.random.default_rng(0).normal(size=(4, 30)) * 0.1
    got = ended(Aggregation(secure_sum=secure, uplink=uplink), delta, np.ones(4))
    places = np.flatnonzero(got)
    assert len(places) == part.count(30)
    np.testing.assert_allclose(got[places], 5 * delta.mean(0)[places], atol=1e-5)


def test_rounding_does_not_outgrow_the_clip_norm():
    """One client's update of a sum, with d large and few bits, is S long at most."""
    secure = SecureSum(4.0, 6)
    account = Account(1.0, 9, 9, "poisson", 0, 1e-3)
    private = CentralPrivacy(account, 0.5)
    aggregation = Aggregation(privacy=private, secure_sum=secure)
    delta = np.random.default_rng(0).normal(size=(1, 900))
    none = ended(aggregation, np.zeros((0, 900)), np.zeros(0))
    moved = np.linalg.norm(ended(aggregation, delta, np.ones(1)) - none) * private.denominator
    assert secure.rounding(900) == pytest.approx(30 / 2**7)
    assert 0 < moved <= 0.5 + 1e-5
