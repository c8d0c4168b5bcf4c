"""LoRA rules and reducers behind real local training: a small model, six clients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cohort import C, close, local_config, make_decoder, rows_of, spear

from spear_jax.core.mesh import make_mesh, replicate, to_host
from spear_jax.federated import cohort_training, local_training
from spear_jax.federated.aggregation import exactness
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.lora_rules import LORA_RULES
from spear_jax.federated.aggregation.lora_rules.base import sliced
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.aggregation.reducers import Mean
from spear_jax.federated.aggregation.robust.coordinate_wise import TrimmedMean
from spear_jax.federated.aggregation.robust.krum import MultiKrum
from spear_jax.federated.aggregation.robust.norm_clip import NormClip
from spear_jax.federated.privacy.accounting import Account
from spear_jax.federated.privacy.central import CentralPrivacy
from spear_jax.federated.state import ClientStart

COLLECTED = Aggregation(attack=Attack("none", ()))
ACTIVE = np.arange(C) != 1


def train(model, lora, cohort, aggregation, own=None, devices=1, order=None, **local):
    """The cohort behind local training. Args: order: of the clients."""
    order = np.arange(C) if order is None else order
    mesh = make_mesh(jax.devices()[:devices])
    rows = rows_of([cohort[k] for k in order])
    broadcast = local_training.Broadcast(lora, model.base, (), {}, jnp.float32(1e-2))
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(9), C)))[order]
    members = keys, np.arange(1, C + 1, dtype=np.float32)[order], ACTIVE[order]
    if own is not None:
        own = jax.tree.map(lambda x: x[order], own)
    static = spear(), make_decoder(model), local_config(**local), mesh
    done = cohort_training.train(
        *static, aggregation, replicate(broadcast, mesh), rows, members, own=own
    )
    return done.reduced


@pytest.fixture(scope="module")
def collected(model, lora, cohort):
    """(adapters [C, ...], weight [C]) of clients that train both factors."""
    return to_host(train(model, lora, cohort, COLLECTED))


def ended(aggregation, lora, reduced, round=0, starts=None):
    state = init_server(aggregation, lora, {}, jax.random.key(0), C)
    state = dataclasses.replace(state, round=jnp.int32(round))
    return end_round(aggregation, state, reduced, range(C), starts)


def test_the_mean_on_the_host_is_the_mean_that_streams(model, lora, cohort, collected):
    metered = Aggregation(reducer=exactness.Metered(Mean()))
    streamed = ended(metered, lora, train(model, lora, cohort, metered))
    whole = ended(COLLECTED, lora, collected)
    close(whole.state.lora, streamed.state.lora)
    error = whole.metrics["round/aggregation_error"]
    assert error > 0  # clients that moved apart lose something
    assert streamed.metrics["round/aggregation_error"] == pytest.approx(error, rel=0.3)


@pytest.mark.parametrize("factor", ["a", "b"])
def test_a_frozen_factor_keeps_every_bit_and_the_mean_is_exact(model, lora, cohort, factor):
    """With weight decay, and a norm that is clipped."""
    name, number = ("ffa", 1) if factor == "b" else ("rolora", 2)
    rule = LORA_RULES[name]()
    assert rule.trains(number) == factor
    ruled = dataclasses.replace(COLLECTED, rule=rule)
    adapters, weight = to_host(train(model, lora, cohort, ruled, trains=factor))
    frozen = "b" if factor == "a" else "a"
    for pair, old in zip(adapters.by_name().values(), lora.by_name().values(), strict=True):
        for client in range(C):
            np.testing.assert_array_equal(getattr(pair, frozen)[client], getattr(old, frozen))
        moved = np.abs(getattr(pair, factor) - np.asarray(getattr(old, factor))).max((1, 2, 3))
        assert list(moved > 1e-4) == list(ACTIVE)
    done = ended(ruled, lora, (adapters, weight), number - 1)
    assert done.metrics["round/aggregation_error"] < 1e-7
    for new, old in zip(done.state.lora.by_name().values(), lora.by_name().values(), strict=True):
        np.testing.assert_array_equal(getattr(new, frozen), getattr(old, frozen))


def test_starts_of_their_own_are_trained_from(model, lora, cohort, collected):
    """All ranks equal: bits as from the global adapter. Lower ranks: what is zero stays zero."""
    full = ClientStart(sliced(lora, np.full(C, 4)))
    jax.tree.map(
        np.testing.assert_array_equal,
        to_host(train(model, lora, cohort, COLLECTED, full)),
        collected,
    )
    ranks = np.array([4, 4, 2, 1, 4, 2])
    own = ClientStart(sliced(lora, ranks))
    adapters, weight = to_host(train(model, lora, cohort, COLLECTED, own))
    for client, rank in enumerate(ranks):
        for pair in adapters.by_name().values():
            assert not np.any(pair.a[client, ..., rank:]) and not np.any(pair.b[client, :, rank:])
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), adapters, own.lora)
    assert min(jax.tree.leaves(moved)) > 1e-4
    order = np.array([3, 0, 5, 4, 1, 2])  # in another order, on two devices
    others, _ = to_host(train(model, lora, cohort, COLLECTED, own, devices=2, order=order))
    close(others, jax.tree.map(lambda x: x[order], adapters), 1e-3)
    for name in ("flexlora", "hetlora"):
        ruled = Aggregation(rule=LORA_RULES[name](), ranks=tuple(ranks))
        done = ended(ruled, lora, (adapters, weight), starts=own.lora)
        swapped = end_round(
            ruled, init_server(ruled, lora, {}, jax.random.key(0), C),
            jax.tree.map(lambda x: x[order], (adapters, weight)), order,
            jax.tree.map(lambda x: x[order], own.lora),
        )  # fmt: skip
        product = lambda x: {n: np.asarray(p.a) @ np.asarray(p.b) for n, p in x.by_name().items()}
        close(product(swapped.state.lora), product(done.state.lora))
        change = jax.tree.map(
            lambda x, y: np.abs(x - y).max(), product(done.state.lora), product(lora)
        )
        assert min(jax.tree.leaves(change)) > 1e-4


def test_the_rank_penalty_shrinks_the_tail(model, lora, cohort, collected):
    tail = np.tile(np.float32([0, 0, 0, 1]), (C, 1))
    own = ClientStart(sliced(lora, np.full(C, 4)), tail)
    adapters, _ = to_host(train(model, lora, cohort, COLLECTED, own, rank_penalty=100.0))
    norm = lambda some: sum(np.linalg.norm(pair.b[0, :, 3]) for pair in some.by_name().values())
    assert norm(adapters) < norm(collected[0])


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_base_and_adapter_hold_the_mean_of_products(name, model, lora, cohort, collected):
    """W + ΔW + s a b afterwards is W + s Σ p a_k b_k, for every layer, with a scale of 2."""
    ruled = Aggregation(rule=LORA_RULES[name](), scale=2.0)
    done = ended(ruled, lora, collected)
    adapters, weight = collected
    p = weight / weight.sum()
    for target, pair in adapters.by_name().items():
        wanted = 2.0 * sum(q * a @ b for q, a, b in zip(p, pair.a, pair.b, strict=True))
        new = done.state.lora.by_name()[target]
        got = done.state.aggregation_state["base"][target] + 2.0 * np.asarray(new.a) @ np.asarray(
            new.b
        )
        np.testing.assert_allclose(got, wanted, atol=1e-6 * np.abs(wanted).max())
        assert (
            np.linalg.norm(
                wanted - 2.0 * np.asarray(lora.by_name()[target].a @ lora.by_name()[target].b)
            )
            > 1e-3
        )


def test_reducers_at_their_neutral_values_are_means(lora, collected):
    adapters, weight = collected
    even = ended(COLLECTED, lora, (adapters, (weight > 0).astype(np.float32)))
    for reducer in (MultiKrum(0, selected=C), TrimmedMean(0.0)):
        close(ended(Aggregation(reducer=reducer), lora, collected).state.lora, even.state.lora)
    wide = dataclasses.replace(COLLECTED, reducer=NormClip(1e9))
    whole = ended(COLLECTED, lora, collected)
    close(ended(wide, lora, collected).state.lora, whole.state.lora)
    # with equal ranks and one start the value form is the delta form, and a hetlora by the
    # method's weights is the mean
    value, delta = (
        ended(Aggregation(rule=LORA_RULES["flexlora"](form=form)), lora, collected).state.lora
        for form in ("value", "delta")
    )
    for pair, other in zip(value.by_name().values(), delta.by_name().values(), strict=True):
        close(pair.a @ pair.b, other.a @ other.b, 1e-4)
    het = Aggregation(rule=LORA_RULES["hetlora"](weights="method", gamma=1.0))
    close(ended(het, lora, collected).state.lora, whole.state.lora)


def test_norm_clipping_in_the_device_program_is_that_of_the_server(model, lora, cohort, collected):
    clipped = Aggregation(reducer=NormClip(0.05))
    streamed = ended(clipped, lora, train(model, lora, cohort, clipped))
    on_host = dataclasses.replace(clipped, attack=Attack("none", ()))
    close(ended(on_host, lora, collected).state.lora, streamed.state.lora)
    assert 0 < float(streamed.change) <= 0.05 + 1e-6


def test_a_private_sum_that_streams_is_the_one_of_the_server(model, lora, cohort, collected):
    """The noise is the same: it depends on seed and round. FFA has half of the numbers."""
    pytest.importorskip("dp_accounting")
    account = Account(1.0, 9, 3, "poisson", 0, 1e-2)
    for rule in ("mean", "ffa"):
        private = Aggregation(
            privacy=CentralPrivacy(account, 0.05, seed=1), rule=LORA_RULES[rule]()
        )
        factors = private.rule.trains(1)
        one = dataclasses.replace(private, attack=Attack("none", ()))
        streamed = ended(private, lora, train(model, lora, cohort, private, trains=factors))
        whole = ended(one, lora, to_host(train(model, lora, cohort, one, trains=factors)))
        close(streamed.state.lora, whole.state.lora)
        for name in ("privacy/snr", "privacy/epsilon", "privacy/clip"):
            assert streamed.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4)
        assert streamed.state.aggregation_state == whole.state.aggregation_state
    nobody = ended(private, lora, private.reducer.init(lora))
    assert int(nobody.state.aggregation_state["noisy_rounds"]) == 1
    assert float(nobody.change) > 0 and nobody.metrics["privacy/snr"] == 0
