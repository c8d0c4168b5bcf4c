"""LoRA rules against the vectors, which come from plain numpy with materialised products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.core.errors import UserError
from spear_jax.experiment.export import whole_adapter
from spear_jax.federated.aggregation import exactness, low_rank, vectors
from spear_jax.federated.aggregation.lora_rules import LORA_RULES
from spear_jax.federated.aggregation.lora_rules.base import base_bytes, sliced
from spear_jax.federated.aggregation.lora_rules.hetlora import HetLoRA, tail_norm
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.aggregation.reducers import Mean
from spear_jax.federated.aggregation.robust.norm_clip import NormClip
from spear_jax.federated.aggregation.server_optimizer import server_optimizer
from spear_jax.models.lora import add_to_base
from spear_jax.models.params import Adapter, DecoderParams, LayerParams, LowRank

close = lambda got, want, tol=1e-9: np.testing.assert_allclose(got, want, rtol=tol, atol=tol)
near = lambda got, want: close(got, want, 1e-5)  # what is kept in float32


def rule(name, **changes):
    return dataclasses.replace(LORA_RULES[name](), **changes)


def cohort(adapter, a, b):
    """Clients' adapters, leaves [C, 1, ...]."""
    return Adapter(q=LowRank(np.float32(a)[:, None], np.float32(b)[:, None]))


def aggregated(aggregation, adapters, weight, start, round=0):
    """One round behind local training, whichever way the aggregation takes."""
    start = jax.tree.map(jnp.float32, start)
    state = init_server(aggregation, start, {}, jax.random.key(0), len(weight))
    state = dataclasses.replace(state, round=jnp.int32(round))
    weight = np.float32(weight)
    reduced = (adapters, weight)
    if not aggregation.collects:
        reduced = aggregation.reducer.add(aggregation.reducer.init(start), adapters, weight)
    return end_round(aggregation, state, reduced, range(len(weight)))


def test_the_mean_averages_factors_over_clients_with_a_weight(vector, adapter):
    given, want, _ = vector("mean_factors")
    start = adapter(0 * np.array(given["a"][0]), 0 * np.array(given["b"][0]))
    for attacked in (False, True):  # streaming, and on the host
        aggregation = Aggregation(rule=rule("mean"))
        if attacked:
            aggregation = dataclasses.replace(
                aggregation, attack=lambda x, *_: (x, np.zeros(2, bool))
            )
        done = aggregated(aggregation, cohort(adapter, given["a"], given["b"]), given["w"], start)
        near(done.state.lora.q.a[0], want["a"])
        near(done.state.lora.q.b[0], want["b"])
    close(Mean().shares(None, np.array(given["w"])), want["p"])


@pytest.mark.parametrize("name", LORA_RULES)
def test_nobody_trained_leaves_adapter_base_and_moments(name, vector, adapter):
    given, want, _ = vector("nobody_trained")
    start = adapter(given["start"]["a"], given["start"]["b"])
    aggregation = Aggregation(rule=rule(name))
    done = aggregated(aggregation, cohort(adapter, given["a"], given["b"]), given["w"], start)
    near(done.state.lora.q.a[0], want["a"])
    near(done.state.lora.q.b[0], want["b"])
    assert float(done.change) == 0.0 and int(done.state.round) == 1
    assert not np.any(done.state.aggregation_state.get("base", {"q": 0})["q"])


def test_ffa_moves_b_alone_and_its_product_is_exact(vector, adapter):
    given, want, _ = vector("ffa")
    a = [given["a"]] * len(given["b"])
    start = adapter(given["a"], np.zeros_like(given["b"][0]))
    for server in ("fedavg", "fedadam"):
        ruled = Aggregation(rule=rule("ffa"), optimizer=server_optimizer(server, rate=1.0))
        done = aggregated(ruled, cohort(adapter, a, given["b"]), given["w"], start)
        np.testing.assert_array_equal(done.state.lora.q.a[0], np.float32(given["a"]))
        if server == "fedavg":
            near(done.state.lora.q.b[0], want["b"])
            near(done.state.lora.q.a[0] @ done.state.lora.q.b[0], want["product"])
        else:  # the moments of a are those of round 1
            assert not np.any(done.state.opt_state["m"].q.a)
            assert np.all(done.state.opt_state["v"].q.a == np.float32(5e-3**2))
            assert np.any(done.state.opt_state["m"].q.b)


def test_fedsa_averages_a_and_every_client_keeps_its_b(vector, adapter):
    given, want, _ = vector("fedsa")
    start = adapter(np.ones_like(given["a"][0]), np.zeros_like(given["b"][0]))
    weight = [*given["w"], 0.0]  # the last did not train
    adapters = cohort(adapter, [*given["a"], given["a"][0]], [*given["b"], given["b"][0]])
    done = aggregated(Aggregation(rule=rule("fedsa")), adapters, weight, start)
    near(done.state.lora.q.a[0], want["a"])
    kept = done.state.aggregation_state
    near(kept["b"]["q"][:3, 0], want["b_of_clients"])
    assert not np.any(done.state.lora.q.b) and not np.any(kept["b"]["q"][3])
    own = rule("fedsa").policies(done.state.lora, kept)
    near(own[1].q.a @ own[1].q.b, np.array(want["a"]) @ np.array(given["b"][1])[None])


def test_fedper_averages_the_first_layers_and_every_client_keeps_the_last():
    """Three layers, of which one stays; the last client did not train."""
    rng = np.random.default_rng(0)
    a, b = np.float32(rng.normal(size=(3, 3, 4, 2))), np.float32(rng.normal(size=(3, 3, 2, 5)))
    start = Adapter(q=LowRank(a[2] + 1, b[2] - 1))
    weight, ruled = np.array([1.0, 3.0, 0.0]), Aggregation(rule=rule("fedper"))
    done = aggregated(ruled, Adapter(q=LowRank(a, b)), weight, start)
    for new, own, first in (
        (done.state.lora.q.a, a, start.q.a),
        (done.state.lora.q.b, b, start.q.b),
    ):
        near(new[:2], (own[0, :2] + 3 * own[1, :2]) / 4)
        np.testing.assert_array_equal(new[2], first[2])
    kept = done.state.aggregation_state["own"]
    near(kept.q.a[:2, 0], a[:2, 2])
    np.testing.assert_array_equal(kept.q.b[2, 0], start.q.b[2])
    second = rule("fedper").policies(done.state.lora, {"own": kept})[1]
    near(second.q.a[2], a[1, 2])
    near(second.q.a[:2], done.state.lora.q.a[:2])
    sizes = rule("fedper", personal_layers=2)
    one = 4 * 2 * (4 + 5)  # of a layer
    assert sizes.bytes_up(start, 2, 1) == sizes.bytes_down(start, 2, 1, {}) == one
    assert sizes.own_bytes(start, 2) == 2 * one
    with pytest.raises(UserError, match="personal_layers is 3, but the adapter has 3 layers"):
        rule("fedper", personal_layers=3).own_bytes(start, 2)


@pytest.mark.parametrize("name", ["fedsa", "fedper"])
def test_what_stays_takes_no_part_in_norms(name):
    """A huge own part is not clipped, and does not shorten what is sent."""
    made = Aggregation(rule=rule(name), reducer=NormClip(1.0))
    rng = np.random.default_rng(1)
    update = Adapter(q=LowRank(*(np.float32(rng.normal(size=s)) for s in ((3, 4, 2), (3, 2, 5)))))
    sent = made.rule.sent(update, 1)
    larger = jax.tree.map(lambda x, s: s + 1e3 * (x - s), update, sent)
    zero = jax.tree.map(np.zeros_like, update)
    clipped = made.transform(zero, larger)
    near(vectors.squared_norms(vectors.add_axis(made.rule.sent(clipped, 1)))[0], 1.0)
    for x, big, s in zip(*map(jax.tree.leaves, (clipped, larger, sent)), strict=True):
        np.testing.assert_array_equal(np.where(s == 0, x, 0), np.where(s == 0, big, 0))


def test_what_a_client_keeps_is_not_clipped(adapter):
    """Under FedSA the norm is that of a alone, and b comes back as it was trained."""
    clipped = Aggregation(rule=rule("fedsa"), reducer=NormClip(1.0))
    start = adapter(np.zeros((3, 1)), np.zeros((1, 2)))
    a, b = np.full((2, 3, 1), 5.0), np.full((2, 1, 2), 7.0)
    one = jax.tree.map(lambda x: jnp.float32(x[0]), cohort(adapter, a, b))
    sent = clipped.transform(jax.tree.map(jnp.float32, start), one)
    near(np.linalg.norm(sent.q.a), 1.0)
    near(sent.q.b, b[:1])
    done = aggregated(clipped, cohort(adapter, a, b), [1, 1], start)
    near(np.linalg.norm(done.state.lora.q.a), 1.0)
    near(done.state.aggregation_state["b"]["q"][:, 0], b)


def test_rolora_trains_b_first_and_then_by_turns(vector, adapter):
    given, want, _ = vector("rolora")
    m, n, r = given["m"], given["n"], given["r"]
    like = adapter(np.zeros((m, r)), np.zeros((r, n)))
    rolora = rule("rolora")
    assert [rolora.trains(x) for x in given["rounds"]] == want["trains"]
    assert [rolora.bytes_up(like, r, x) for x in given["rounds"]] == want["bytes_up"]
    start = adapter(np.ones((m, r)), np.ones((r, n)))
    many = np.float32(np.random.default_rng(0).normal(size=(2, m, r)))
    adapters = cohort(adapter, many, np.ones((2, r, n)))
    done = aggregated(Aggregation(rule=rolora), adapters, [1, 3], start, round=1)
    near(done.state.lora.q.a[0], np.average(many, axis=0, weights=[1, 3]))
    np.testing.assert_array_equal(done.state.lora.q.b, start.q.b)


def test_flora_stacks_products_of_any_rank_and_scale(vector, adapter, uploads):
    given, want, tol = vector("flora_stack")
    p, s = np.array(given["w"]) / sum(given["w"]), given["scale"]
    scales = np.array(given["alpha"]) / [np.shape(a)[1] for a in given["a"]]
    x, y = low_rank.stack(p * scales / s, given["a"], given["b"])
    close(x, want["stack_a"], tol)
    close(y, want["stack_b"], tol)
    close(s * x @ y, want["delta_W"], tol)
    # the rule itself, with one scale: ranks 2 and 1
    sent = uploads(given["a"], given["b"], given["w"], scale=s)
    m, n = np.shape(x)[0], np.shape(y)[1]
    old = adapter(np.ones((m, 2)), np.ones((2, n)))
    flora = rule("flora", seed=3)
    new, kept = flora.combine(sent, old, flora.init(old, np.array([2, 1])))
    products = [
        q * np.array(a) @ np.array(b) for q, a, b in zip(p, given["a"], given["b"], strict=True)
    ]
    near(kept["base"]["q"][0], s * sum(products))
    assert int(kept["base_rank"]) == 3 and not np.any(new.q.b)
    assert np.abs(new.q.a).max() <= 1 / np.sqrt(m) and np.ptp(new.q.a) > 0
    again, _ = flora.combine(sent, old, kept)
    np.testing.assert_array_equal(new.q.a, again.q.a)  # of (seed, round) alone


def test_fedex_leaves_the_mean_of_products_in_base_and_adapter(vector, adapter, uploads):
    given, want, tol = vector("fedex")
    p, s = np.array(given["w"]) / sum(given["w"]), given["scale"]
    x, y = low_rank.residual(p, np.array(given["a"]), np.array(given["b"]))
    close(x, want["residual_a"], tol)
    close(y, want["residual_b"], tol)
    assert x.shape[1] == want["factor_rank"]
    old, fedex = adapter(0 * np.array(given["a"][0]), 0 * np.array(given["b"][0])), rule("fedex")
    new, kept = fedex.combine(
        uploads(given["a"], given["b"], given["w"], scale=s), old, fedex.init(old, np.array([2]))
    )
    near(new.q.a[0], want["a"])
    near(kept["base"]["q"][0], s * np.array(want["residual"]))
    near(given["W"] + kept["base"]["q"][0], want["W"])
    whole = sum(
        q * np.array(a) @ np.array(b) for q, a, b in zip(p, given["a"], given["b"], strict=True)
    )
    near(kept["base"]["q"][0] + s * new.q.a[0] @ new.q.b[0], s * whole)
    assert int(kept["base_rank"]) == want["factor_rank"]


def test_fedex_truncated_keeps_the_best_part_of_the_residual(vector, adapter, uploads):
    given, want, tol = vector("fedex_truncated")
    p = np.array(given["w"]) / sum(given["w"])
    x, y = low_rank.residual(p, np.array(given["a"]), np.array(given["b"]))
    close(low_rank.factor_svd(x, y)[1][:3], want["singular_values"], tol)
    a, b, error = low_rank.truncate(x, y, given["rank"])
    close(a @ b, want["residual"], tol)
    close(error, want["error"], tol)
    old, cut = adapter(x[:, :2] * 0, y[:2] * 0), rule("fedex_truncated", rank=given["rank"])
    _, kept = cut.combine(
        uploads(given["a"], given["b"], given["w"]), old, cut.init(old, np.array([2]))
    )
    near(kept["base"]["q"][0], want["residual"])
    assert int(kept["base_rank"]) == given["rank"]


def test_products_are_decomposed_without_being_made(vector):
    given, want, tol = vector("factor_svd")
    u, sigma, v = low_rank.factor_svd(np.array(given["X"]), np.array(given["Y"]))
    kept = given["rank"]
    close(sigma[:kept], want["singular_values"], tol)
    close(u[:, :kept], want["u"], tol)
    close(v[:, :kept], want["v"], tol)
    a, b = low_rank.best_adapter(np.array(given["X"]), np.array(given["Y"]), kept)
    close(a @ b, want["product"], tol)
    close(a.T @ a, np.eye(kept), tol)
    # more rank than the matrix has, and layers at once
    wide = (
        np.random.default_rng(0).normal(size=(5, 3, 9)),
        np.random.default_rng(1).normal(size=(5, 9, 4)),
    )
    a, b = low_rank.best_adapter(*wide, 6)
    close(a @ b, wide[0] @ wide[1])


@pytest.mark.parametrize("form", ["value", "delta"])
def test_flexlora_averages_products_and_serves_slices(form, vector, adapter, uploads):
    given, want, _ = vector("flexlora")
    old = adapter(given["start"]["a"], given["start"]["b"])
    ranks, want = np.array(given["ranks"]), want[f"{form}_form"]
    received = sliced(old, ranks)
    starts = [(received.q.a[k, 0], received.q.b[k, 0]) for k in range(3)]
    sent = uploads(given["a"], given["b"], given["w"], starts=starts)
    new, _ = rule("flexlora", form=form).combine(sent, old, {})
    near(new.q.a[0] @ new.q.b[0], want["product"])
    near(new.q.a[0], want["a"])
    near(new.q.b[0], want["b"])
    served = sliced(new, ranks)
    near(served.q.a[:, 0] @ served.q.b[:, 0], want["clients"])


def test_without_training_the_delta_form_keeps_what_the_value_form_loses(vector, adapter, uploads):
    given, want, _ = vector("rank_collapse")
    for form in ("value", "delta"):
        now, ranks = adapter(given["a"], given["b"]), np.array(given["ranks"])
        for wanted in want[f"singular_values_{form}_form"]:
            got = sliced(now, ranks)
            starts = [(got.q.a[k, 0], got.q.b[k, 0]) for k in range(2)]
            sent = uploads(*zip(*starts, strict=True), given["w"], starts=starts)
            now, _ = rule("flexlora", form=form).combine(sent, now, {})
            near(np.linalg.svd(now.q.a[0] @ now.q.b[0])[1][:2], wanted)


def test_hetlora_weighs_by_the_norms_of_products(vector, adapter, uploads):
    given, want, tol = vector("hetlora")
    old = adapter(np.zeros((4, 3)), np.zeros((3, 3)))
    ranks = np.array([np.shape(a)[1] for a in given["a"]])
    sent, kept = uploads(given["a"], given["b"], [1, 1, 1]), {"rank": ranks}
    norms = np.sqrt(sum(low_rank.product_norm(a, b)[:, 0] ** 2 for _, a, b in sent.pairs()))
    close(norms, want["norms"], tol)
    close(HetLoRA().shares(sent), want["p"], tol)
    # both forms are one from a start of zeros
    for form in ("value", "delta"):
        new, _ = HetLoRA(form=form, gamma=1.0).combine(sent, old, kept)
        near(new.q.a[0], want["a"])
        near(new.q.b[0], want["b"])
    new, _ = HetLoRA(normalise="per_rank", gamma=1.0).combine(sent, old, kept)
    near(new.q.a[0], want["per_rank"]["a"])
    near(new.q.b[0], want["per_rank"]["b"])
    # nobody's product has a norm, as in round 1: all weigh the same
    zero = dataclasses.replace(sent, updates=jax.tree.map(np.zeros_like, sent.updates))
    close(HetLoRA().shares(zero), np.ones(3) / 3)


def test_hetlora_prunes_a_rank_whose_tail_has_shrunk(vector, uploads):
    given, want, tol = vector("hetlora_prune")
    before, after = given["before"], given["after"]
    sent = uploads([after["a"]], [after["b"]], [1], starts=[(before["a"], before["b"])])
    hetlora = HetLoRA(gamma=given["gamma"], min_rank=given["rank_min"])
    assert hetlora.smaller(np.array([3]))[0] == want["keep"]
    tail = hetlora.tails({"rank": np.array([3])}, [0], 3)
    close(tail_norm(sent.starts, tail), [want["tail_before"]], tol)
    close(tail_norm(sent.ended, tail), [want["tail_after"]], tol)
    assert want["prune"] and list(hetlora._pruned(sent, np.array([3, 3]))) == [want["keep"], 3]
    grown = dataclasses.replace(sent, starts=sent.ended, updates=sent.starts)  # 0.45 -> more
    assert list(hetlora._pruned(grown, np.array([3]))) == [3]


def test_the_local_penalty_is_the_tails_product_of_norms(vector):
    from spear_jax.federated.local_training import _tail_norm

    given, want, _ = vector("hetlora_prune")
    tail = jnp.array([0.0, 0.0, 1.0])
    pair = LowRank(jnp.float32(given["after"]["a"])[None], jnp.float32(given["after"]["b"])[None])
    value, slope = jax.value_and_grad(lambda x: _tail_norm(x, tail))(Adapter(q=pair))
    near(value, want["regulariser"])
    assert not np.any(slope.q.a[..., :2]) and np.any(slope.q.a[..., 2])
    empty = jax.grad(lambda x: _tail_norm(x, tail))(jax.tree.map(jnp.zeros_like, Adapter(q=pair)))
    assert np.isfinite(empty.q.a).all()


def test_fair_solves_for_the_b_that_takes_up_the_residual(vector, adapter, uploads):
    given, want, tol = vector("fair_least_squares")
    p, a, b = np.array(given["w"]) / sum(given["w"]), np.array(given["a"]), np.array(given["b"])
    for ridge in given["rho"]:
        got = rule("fair", ridge=ridge).corrected(p, a, b)
        wanted = want[str(ridge)]
        close(got.b - low_rank.mean(p, b), wanted["delta_b"], tol)
        lost = low_rank.mean(p, a @ b) - got.a @ got.b
        close(np.linalg.norm(lost), wanted["error_after"], tol)
    old = adapter(0 * a[0], 0 * b[0])
    new, _ = rule("fair", ridge=0.01).combine(uploads(a, b, given["w"], rate=0.5), old, {})
    near(new.q.b[0], 0.5 * (low_rank.mean(p, b) + np.array(want["0.01"]["delta_b"])))


# The meter


def test_the_meter_is_the_norm_of_what_averaging_loses(vector, uploads):
    given, want, tol = vector("exactness_meter")
    total = {}
    for i, layer in enumerate(given["layers"]):
        (pair,) = exactness.squares(uploads(layer["a"], layer["b"], given["w"])).values()
        close(np.sqrt([x[0] for x in pair]), [want["numerator"][i], want["denominator"][i]], tol)
        name = "qk"[i]
        total[name] = pair
        assert exactness.metrics({name: pair})[f"round/aggregation_error_{name}"] == pytest.approx(
            want["ratio"][i]
        )
    assert exactness.metrics(total)["round/aggregation_error"] == pytest.approx(want["overall"])


def test_the_meter_holds_in_float32_where_clients_moved_little(vector, adapter, uploads):
    given, want, _ = vector("exactness_small_drift")
    a0, b0 = np.array(given["start"]["a"]), np.array(given["start"]["b"])
    a, b = a0 + np.array(given["delta_a"]), b0 + np.array(given["delta_b"])
    (pair,) = exactness.squares(uploads(np.float32(a), np.float32(b), given["w"])).values()
    assert np.sqrt(pair[0][0]) == pytest.approx(want["numerator"], rel=1e-3)
    # as clients are added, in float32: an output width of 6 is measured without probes' noise
    start = jax.tree.map(jnp.float32, adapter(a0, b0))
    metered = exactness.Metered(Mean())
    adapters, weight = cohort(adapter, a, b), jnp.float32(given["w"])
    take = lambda at: jax.tree.map(lambda x: x[at], (adapters, weight))
    parts = [metered.add(metered.init(start), *take(at)) for at in (slice(0, 2), slice(2, 3))]
    state = metered.merge(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    (pair,) = metered.squares(state, start).values()
    assert np.sqrt(pair[0][0]) == pytest.approx(want["numerator"], rel=2e-3)
    assert np.sqrt(pair[1][0]) == pytest.approx(want["denominator"], rel=1e-5)


def test_the_meters_sketch_is_near_the_norms_of_a_wide_projection(uploads, adapter):
    rng, (k, m, r, n) = np.random.default_rng(0), (3, 20, 2, 400)
    a, b = rng.normal(size=(k, m, r)), rng.normal(size=(k, r, n))
    start = jax.tree.map(jnp.float32, adapter(a[0] * 0, b[0] * 0))
    metered = exactness.Metered(Mean())
    state = metered.add(metered.init(start), cohort(adapter, a, b), jnp.float32([1, 2, 3]))
    sketched = exactness.metrics(metered.squares(state, start))["round/aggregation_error"]
    exact = exactness.metrics(exactness.squares(uploads(a, b, [1, 2, 3])))
    assert sketched == pytest.approx(exact["round/aggregation_error"], rel=2 * np.sqrt(2 / 32))


def test_the_meter_is_zero_for_one_client_and_for_a_common_factor(uploads):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 2, 4))
    error = lambda *x: exactness.metrics(exactness.squares(uploads(*x)))["round/aggregation_error"]
    assert error(a[:1], b[:1], [2.0]) == 0.0
    assert error([a[0]] * 3, b, [1, 2, 3]) < 1e-12 and error(a, [b[0]] * 3, [1, 2, 3]) < 1e-12
    assert error(a, b, [1, 2, 3]) == pytest.approx(error(a, b, [10, 20, 30]))
    turn = rng.normal(size=(2, 2))
    turned = error(a @ turn, np.linalg.inv(turn) @ b, [1, 2, 3])
    assert turned == pytest.approx(error(a, b, [1, 2, 3])) and turned > 0.1


# Bytes, and the base


def test_bytes_of_every_rule_are_those_of_the_table(vector, adapter):
    given, want, _ = vector("bytes_per_client")
    m, n, r, active = (given[name] for name in ("m", "n", "rank", "active"))
    like = adapter(np.zeros((m, r)), np.zeros((r, n)))
    for name, kind in LORA_RULES.items():
        if name == "fedper":  # by hand, above
            continue
        made = rule(name, rank=given["residual_rank"]) if name == "fedex_truncated" else kind()
        kept = made.init(like, np.full(active, r))
        if made.changes_base:  # of one round with all of them
            total = {"flora": active * r, "fedex": (active - 1) * r}.get(
                name, made.__dict__.get("rank")
            )
            kept["base_rank"] = np.int32(total)
        for number, row in ((1, "rolora_odd"), (2, "rolora_even")):
            row = want[row if name == "rolora" else name]
            assert made.bytes_up(like, r, number) == row["up"], name
            assert made.bytes_down(like, r, number, kept) == row["down"], name


def test_a_change_of_the_base_costs_no_more_than_the_whole(vector, adapter):
    given, want, _ = vector("catch_up_bytes")
    like = adapter(np.zeros((given["m"], 1)), np.zeros((1, given["n"])))
    ranks, last = given["factor_ranks"], given["last_round_seen"]
    assert base_bytes(like, sum(ranks)) == want["not_cached"]
    assert base_bytes(like, sum(ranks[last:])) == want["cached"]


def test_small_changes_of_a_bfloat16_base_add_up(vector):
    given, want, _ = vector("bf16_base_delta")
    weights = jnp.full((1, 1, 1), given["W"], jnp.bfloat16)
    one = jnp.ones(1, jnp.bfloat16)
    layers = LayerParams(
        attn_norm=one, mlp_norm=one, **{x: weights for x in "q k v o gate up down".split()}
    )
    base = DecoderParams(embed=one, layers=layers, norm=one)
    change = np.zeros((1, 1, 1), np.float32)
    for _ in range(given["rounds"]):
        change = change + np.float32(given["residual"])
        base_now = add_to_base(base, {"q": change})
    assert float(base_now.layers.q[0, 0, 0]) == want["delta_kept_in_float32"]
    assert float(base_now.layers.k[0, 0, 0]) == want["added_in_bfloat16"] == given["W"]


def test_a_changed_base_is_exported_as_an_adapter_of_a_given_rank(vector, adapter):
    given, want, _ = vector("export_after_base_change")
    s, own = given["scale"], adapter(given["a"], given["b"])
    change = {"q": s * (np.array(given["delta"]["a"]) @ np.array(given["delta"]["b"]))[None]}
    whole = np.array(want["exact"]["a"]) @ np.array(want["exact"]["b"])
    exact, error = whole_adapter(change, own, s, want["exact"]["rank"])
    near(exact.q.a[0] @ exact.q.b[0], whole)
    assert error < 1e-12 and want["exact"]["alpha"] == s * want["exact"]["rank"]
    cut, error = whole_adapter(change, own, s, given["rank"])
    near(cut.q.a[0] @ cut.q.b[0], want["truncated_product"])
    assert error == pytest.approx(want["relative_error"])
