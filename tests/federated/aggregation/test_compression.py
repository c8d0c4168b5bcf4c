"""Compressors against the vectors, their bytes, and error feedback over rounds."""

import jax
import numpy as np
import pytest

from spear_jax.federated.aggregation import low_rank
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.compression import COMPRESSORS, qsgd
from spear_jax.federated.aggregation.compression import blocks as block_codes
from spear_jax.federated.aggregation.compression.blocks import Int4, Int8
from spear_jax.federated.aggregation.compression.qsgd import Qsgd
from spear_jax.federated.aggregation.compression.rank import RankUplink
from spear_jax.federated.aggregation.compression.sparse import RandomK, TopK
from spear_jax.federated.aggregation.compression.uplink import Uplink
from spear_jax.federated.aggregation.lora_rules.ffa import FFA
from spear_jax.federated.aggregation.lora_rules.flexlora import FlexLoRA
from spear_jax.federated.aggregation.lora_rules.flora import FLoRA
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.aggregation.robust.norm_clip import NormClip
from spear_jax.models.params import Adapter, LowRank

close = lambda got, want, tol=1e-9: np.testing.assert_allclose(got, want, rtol=tol, atol=tol)
SMALL = {
    "int8": Int8(4), "int4": Int4(4), "qsgd": Qsgd(5), "topk": TopK(0.3), "randk": RandomK(0.3),
}  # fmt: skip


class Fixed:
    """A generator whose uniforms are given."""

    def __init__(self, u):
        self.u = np.array(u)

    def random(self, size):
        assert size == len(self.u)
        return self.u


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_blocks_are_rounded_by_a_step_of_their_own(kind, vector):
    given, want, tol = vector(f"quantise_{kind.name}")
    x = np.array(given["x"])
    codes, steps = block_codes.quantise(x, np.array(given["u"]), given["bits"], given["block"])
    close(codes, want["codes"], tol)
    close(steps, want["steps"], tol)
    sent = kind(given["block"]).encode(x, Fixed(given["u"]))
    assert len(sent) == want["bytes"]
    close(kind(given["block"]).decode(sent, len(x)), want["decoded"], 1e-6)  # float32 steps


def test_qsgd_is_a_norm_and_levels(vector):
    given, want, tol = vector("qsgd")
    x = np.array(given["x"])
    norm, levels = qsgd.quantise(x, np.array(given["u"]), given["levels"])
    close(norm, want["norm"], tol)
    close(levels, want["levels"], tol)
    sent = Qsgd(given["levels"]).encode(x, Fixed(given["u"]))
    close(Qsgd(given["levels"]).decode(sent, len(x)), want["decoded"], 1e-6)


def test_top_k_with_error_feedback_telescopes(vector):
    given, want, _ = vector("topk_error_feedback")
    x = np.array(given["x"])
    uplink = Uplink(TopK(given["k"] / x.shape[1]), error_feedback=True)
    kept, everything = {"memory": np.zeros((3, x.shape[1]), np.float32)}, np.ones(x.shape[1], bool)
    total = 0.0
    for number, (update, sent, memory) in enumerate(
        zip(x, want["sent"], want["memory"], strict=True), 1
    ):
        got, _, kept = uplink.send({"x": update[None]}, [1], number, everything, kept)
        close(got["x"][0], sent, 1e-6)
        close(kept["memory"][1], memory, 1e-6)
        total = total + got["x"][0]
    close(total, x.sum(0) - kept["memory"][1], 1e-6)
    assert not np.any(kept["memory"][[0, 2]])  # of clients that were not there
    assert (
        uplink.compressor.bytes_of(6) == 2 * 4 + 1
    )  # two numbers and a bitmap of six bits, less than two places
    assert given["k"] * 8 == want["bytes_each"]  # what places would take


def test_random_numbers_are_scaled_and_a_seed_stands_for_their_places(vector, monkeypatch):
    given, want, tol = vector("random_k")
    x = np.array(given["x"])
    random = RandomK(given["k"] / len(x))
    monkeypatch.setattr(RandomK, "places", lambda self, seed, size: np.array(given["indices"]))
    sent = random.encode(x, np.random.default_rng(0))
    assert len(sent) == want["bytes"] == random.bytes_of(len(x))
    close(random.decode(sent, len(x)), want["sent"], 1e-6)
    unscaled = RandomK(given["k"] / len(x), error_feedback=True)
    sent = unscaled.encode(x, np.random.default_rng(0))
    close(unscaled.decode(sent, len(x))[given["indices"]], x[given["indices"]], 1e-6)


def test_a_change_of_product_is_cut_to_a_rank(vector):
    given, want, tol = vector("rank_truncation")
    start = given["start"]
    one = lambda pair: Adapter(q=LowRank(*(np.array(pair[x])[None, None] for x in "ab")))
    begun = one(start)
    update = jax.tree.map(np.subtract, one(given), begun)
    sent, lost, _ = RankUplink(given["rank"]).send(update, np.array([0]), 1, None, {}, begun)
    close((sent.q.a @ sent.q.b)[0, 0], want["product"], 1e-6)  # float32
    close(lost, want["relative_error"], tol)
    assert sum(x.nbytes for x in jax.tree.leaves(sent)) == want["bytes"]
    assert RankUplink(given["rank"]).bytes_up(FlexLoRA(), take_first(begun), 2, 1) == want["bytes"]
    x, y = low_rank.stack([1, -1], [given["a"], start["a"]], [given["b"], start["b"]])
    a, b, dropped = low_rank.truncate(x, y, given["rank"])
    close(a @ b, want["product"], tol)
    close(low_rank.factor_svd(x, y)[1][:4], want["singular_values"], tol)
    close(dropped / low_rank.product_norm(x, y), want["relative_error"], tol)


def take_first(cohort):
    return jax.tree.map(lambda x: x[0], cohort)


def drawn_cohort(rule):
    """A server and three clients' adapters of rank 2, with two layers and two projections."""
    rng = np.random.default_rng(11)
    pair = lambda *lead: LowRank(
        rng.normal(size=(*lead, 2, 6, 2)), rng.normal(size=(*lead, 2, 2, 5))
    )
    start = Adapter(q=pair(), up=pair())
    if rule.changes_base:  # flora's rounds begin with b = 0
        start = Adapter(**{n: LowRank(p.a, 0 * p.b) for n, p in start.by_name().items()})
    start = jax.tree.map(np.float32, start)
    ended = jax.tree.map(np.float32, Adapter(q=pair(3), up=pair(3)))
    return start, ended


def ended_round(rule, uplink, start, ended):
    aggregation = Aggregation(rule=rule, uplink=uplink)
    state = init_server(aggregation, start, {}, jax.random.key(0), 3)
    return aggregation, end_round(aggregation, state, (ended, np.array([1.0, 2.0, 3.0])), range(3))


@pytest.mark.parametrize("rule", [FlexLoRA(), FlexLoRA(form="value"), FLoRA()])
def test_products_of_twice_the_rank_lose_nothing(rule):
    start, ended = drawn_cohort(rule)
    _, whole = ended_round(rule, None, start, ended)
    aggregation, sent = ended_round(rule, RankUplink(4), start, ended)
    assert sent.metrics["round/compression_error"] < 1e-6
    for name, pair in whole.state.lora.by_name().items():
        got = getattr(sent.state.lora, name)
        close(got.a @ got.b, pair.a @ pair.b, 1e-4)
    for name, change in whole.state.aggregation_state.get("base", {}).items():
        assert np.any(change)
        close(sent.state.aggregation_state["base"][name], change, 1e-4)
    up, _ = aggregation.bytes_of_clients(start, sent.state.aggregation_state, range(3), 1)
    assert list(up) == [4 * 4 * (6 + 5) * 2 * 2] * 3  # rank, widths, layers, projections


def test_the_server_adds_products_that_clients_have_cut():
    """Against whole matrices and numpy's own SVD; a client with NaN is rejected by name."""
    start, ended = drawn_cohort(FlexLoRA())
    ended.q.a[1, 0, 0, 0] = np.nan
    _, done = ended_round(FlexLoRA(), RankUplink(1), start, ended)
    assert done.rejected == [1]

    def best(matrix, rank):
        u, sigma, v = np.linalg.svd(matrix)
        return (u[:, :rank] * sigma[:rank]) @ v[:rank]

    errors = {0: [0.0, 0.0], 2: [0.0, 0.0]}
    for name, pair in start.by_name().items():
        for layer in range(2):
            product = lambda p, *at: np.float64(p.a[at]) @ np.float64(p.b[at])
            total = product(pair, layer)
            for client, share in ((0, 0.25), (2, 0.75)):
                change = product(getattr(ended, name), client, layer) - product(pair, layer)
                total = total + share * best(change, 1)
                errors[client][0] += np.sum((change - best(change, 1)) ** 2)
                errors[client][1] += np.sum(change**2)
            close(product(getattr(done.state.lora, name), layer), best(total, 2), 1e-4)
    told = done.metrics["round/compression_error"]
    close(told, np.mean([np.sqrt(x / y) for x, y in errors.values()]), 1e-5)
    assert "round/aggregation_error" not in done.metrics  # no factors are seen


@pytest.mark.parametrize("rule", [FlexLoRA(), FLoRA()])
def test_a_round_without_a_finite_product_changes_nothing(rule):
    start, ended = drawn_cohort(rule)
    ended = jax.tree.map(lambda x: x * np.float32(np.nan), ended)
    _, done = ended_round(rule, RankUplink(1), start, ended)
    assert done.rejected == [0, 1, 2] and done.metrics["round/failed"] == 1
    for got, old in zip(jax.tree.leaves(done.state.lora), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(got, old)


def test_flora_counts_the_rank_that_was_sent():
    start, ended = drawn_cohort(FLoRA())
    ranks = [
        int(ended_round(FLoRA(), uplink, start, ended)[1].state.aggregation_state["base_rank"])
        for uplink in (None, RankUplink(1), RankUplink(4))
    ]
    assert ranks == [6, 3, 6]


def test_bytes_are_those_of_the_table(vector):
    given, want, _ = vector("bytes_compressed")
    share = given["k"] / given["d"]
    made = {
        "int8": Int8(given["block"]), "int4": Int4(given["block"]), "topk": TopK(share),
        "random_k": RandomK(share),
    }  # fmt: skip
    assert {name: one.bytes_of(given["d"]) for name, one in made.items()} == {
        name: want[name] for name in made
    }


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_is_sent_has_the_bytes_that_are_counted(name):
    one, rng = SMALL[name], np.random.default_rng(1)
    for size in (1, 5, 8, 31):
        x = rng.normal(size=size)
        sent = one.encode(x, np.random.default_rng(2))
        assert isinstance(sent, bytes) and len(sent) == one.bytes_of(size)
        np.testing.assert_array_equal(one.decode(sent, size), one.decode(sent, size))
        assert sent == one.encode(x, np.random.default_rng(2))
    assert not np.any(one.decode(one.encode(np.zeros(9), np.random.default_rng(3)), 9))


@pytest.mark.parametrize("name", ["int8", "int4", "qsgd", "randk"])
def test_unbiased_kinds_have_the_vector_as_their_mean(name):
    x, rng = np.array([0.3, -1.1, 0.02, 0.7, -0.4]), np.random.default_rng(4)
    one = SMALL[name]
    mean = np.mean([one.decode(one.encode(x, rng), 5) for _ in range(4000)], 0)
    close(mean, x, 0.06)


def cohort(x):
    x = np.asarray(x, np.float32)
    return Adapter(q=LowRank(x[:, None, :, None], np.tile(x[:, :1, None, None], (1, 1, 1, 2))))


def server(aggregation, clients, width):
    start = Adapter(q=LowRank(np.zeros((1, width, 1), np.float32), np.zeros((1, 1, 2), np.float32)))
    return init_server(aggregation, start, {}, jax.random.key(0), clients)


def test_a_client_is_compressed_alike_in_every_cohort():
    uplink = Uplink(Int8(4), seed=7)
    x = {"x": np.float32(np.random.default_rng(5).normal(size=(3, 9)))}
    whole, *_ = uplink.send(x, np.arange(3), 2, np.ones(9, bool), {})
    part, *_ = uplink.send({"x": x["x"][2:]}, np.array([2]), 2, np.ones(9, bool), {})
    np.testing.assert_array_equal(part["x"][0], whole["x"][2])
    later, *_ = uplink.send(x, np.arange(3), 3, np.ones(9, bool), {})
    assert np.any(later["x"] != whole["x"])


def test_only_what_travels_is_compressed_and_counted():
    x = np.random.default_rng(6).normal(size=(3, 7))
    plain, ffa = (
        Aggregation(uplink=Uplink(TopK(1.0)), rule=rule) for rule in (Aggregation().rule, FFA())
    )
    for aggregation, size in ((plain, 7 + 2), (ffa, 2)):
        done = end_round(aggregation, server(aggregation, 3, 7), (cohort(x), np.ones(3)), range(3))
        up, _ = aggregation.bytes_of_clients(
            done.state.lora, done.state.aggregation_state, range(3), 1
        )
        assert list(up) == [4 * size + min(4 * size, -(-size // 8))] * 3
        assert done.metrics["round/compression_error"] < 1e-7  # all of it, in float32
    np.testing.assert_array_equal(done.state.lora.q.a, 0 * done.state.lora.q.a)


def test_the_server_clips_again_and_the_memory_outlives_a_round():
    uplink = Uplink(TopK(0.25), error_feedback=True)
    aggregation = Aggregation(
        reducer=NormClip(1.0), uplink=uplink, attack=Attack("scale", (0,), 9.0)
    )
    x = np.eye(3) * 0.9
    x[1] = np.nan
    state = server(aggregation, 3, 3)
    done = end_round(aggregation, state, (cohort(x), np.array([1.0, 1.0, 0.0])), range(3))
    assert done.rejected == [1]
    assert float(done.change) == pytest.approx(1.0)  # of 8.1 or more, one client alone
    memory = done.state.aggregation_state["memory"]
    assert np.any(memory[0]) and not np.any(memory[1:])  # rejected, and not active
