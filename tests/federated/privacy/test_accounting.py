"""ε against the vectors and against dp-accounting's own accountants, called another way."""

import math
import sys

import numpy as np
import pytest

from spear_jax.core.errors import UserError
from spear_jax.federated.privacy.accounting import Account, local_epsilon

dp_accounting = pytest.importorskip("dp_accounting")


def account(row, sampling="poisson", limit=0):
    rate = row.get("sampling_rate", row.get("cohort", 0) / row.get("population", 1))
    clients = row.get("population", 1000)
    return Account(
        row["noise_multiplier"], clients, round(rate * clients), sampling, limit, row["delta"]
    )


def test_epsilon_of_poisson_cohorts_is_the_accountants(vector):
    """Four settings: the vectors, which PLDAccountant has made; it again, on events; and above it
    RdpAccountant.
    """
    given, want, tol = vector("epsilon_poisson")
    orders = [1.6, 1.8, 2.0, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16, 20, 32, 64]
    for i in (0, 2, 4, 5):
        row, rate = given["rows"][i], given["rows"][i]["sampling_rate"]
        ours = account(row).epsilon(row["rounds"])
        assert ours == pytest.approx(want["pld"][i], rel=tol)
        noise = dp_accounting.GaussianDpEvent(row["noise_multiplier"])
        one = noise if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, noise)
        event = dp_accounting.SelfComposedDpEvent(one, row["rounds"])
        above = dp_accounting.rdp.RdpAccountant(orders).compose(event).get_epsilon(row["delta"])
        assert ours < above < 1.4 * ours
        if i in (2, 5):
            books = dp_accounting.pld.PLDAccountant().compose(event)
            assert ours == pytest.approx(books.get_epsilon(row["delta"]), rel=1e-6)


def test_epsilon_of_fixed_cohorts_is_of_clients_replaced(vector):
    given, want, tol = vector("epsilon_fixed_size")
    for i, row in enumerate(given["rows"]):
        ours = account(row, "uniform").epsilon(row["rounds"])
        assert ours == pytest.approx(want["rdp"][i], rel=tol)
        for wrong in ("wrong_if_not_halved", "wrong_if_called_poisson"):
            assert ours > 1.5 * want[wrong][i]
    # where all take part nothing is sampled, however it is called
    both = [Account(2.0, 8, 8, how, 0, 1e-3).epsilon(5) for how in ("uniform", "poisson")]
    assert (
        both[0]
        == both[1]
        == pytest.approx(dp_accounting.get_epsilon_gaussian(2.0 / math.sqrt(5), 1e-3), rel=1e-3)
    )


@pytest.mark.slow
def test_a_ceiling_costs_little_at_five_standard_deviations(vector):
    given, want, tol = vector("epsilon_truncated")
    limit = given["ceiling"][1]
    ours = account(given, limit=limit).epsilon(given["rounds"])
    assert ours == pytest.approx(want["pld"][1], rel=tol)
    # where all would come and some are left out, others take their place
    cut, whole = (Account(1.0, 20, 20, "poisson", most, 1e-3).epsilon(1) for most in (5, 0))
    assert cut > 1.5 * whole == 1.5 * Account(1.0, 20, 20, "poisson", 20, 1e-3).epsilon(1)


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    one = Account(1.0, 100, 10, "poisson", 0, 1e-3)
    grown = [one.epsilon(rounds) for rounds in (0, 1, 5, 20)]
    assert grown[0] == 0 and np.all(np.diff(grown) > 0)
    assert Account(2.0, 100, 10, "poisson", 0, 1e-3).epsilon(20) < grown[-1]


def test_local_epsilon_is_the_gaussian_trade_off(vector):
    given, want, tol = vector("epsilon_local")
    for uploads, epsilon in zip(given["participations"], want["epsilon"], strict=True):
        ours = local_epsilon(given["noise_multiplier"], uploads, given["delta"])
        assert ours == pytest.approx(epsilon, rel=tol)
        # δ at that ε, by the closed form of arXiv 1805.06530
        sigma = given["noise_multiplier"] / 2 / math.sqrt(uploads)
        below = lambda x: math.erfc(-x / math.sqrt(2)) / 2
        delta = below(1 / (2 * sigma) - ours * sigma) - math.exp(ours) * below(
            -1 / (2 * sigma) - ours * sigma
        )
        assert delta == pytest.approx(given["delta"], rel=1e-3)
    assert local_epsilon(6.0, 0, 1e-5) == 0.0


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'spear-jax\[privacy\]', or set"):
        local_epsilon(1.0, 1, 1e-3)
