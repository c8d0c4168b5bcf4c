"""Robust reducers, attacks, weighting and refusals against the vectors, and their properties."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.core.errors import UserError
from spear_jax.federated.aggregation import attacks, refusals, vectors
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.lora_rules import LORA_RULES
from spear_jax.federated.aggregation.lora_rules.base import only
from spear_jax.federated.aggregation.pipeline import (
    REDUCERS,
    Aggregation,
    end_round,
    find_reducer,
    init_server,
)
from spear_jax.federated.aggregation.refusals import Choices
from spear_jax.federated.aggregation.robust.bulyan import Bulyan, choose
from spear_jax.federated.aggregation.robust.centred_clip import CentredClip
from spear_jax.federated.aggregation.robust.coordinate_wise import CoordinateMedian, TrimmedMean
from spear_jax.federated.aggregation.robust.fltrust import FLTrust
from spear_jax.federated.aggregation.robust.geometric_median import GeometricMedian
from spear_jax.federated.aggregation.robust.krum import Krum, MultiKrum, scores
from spear_jax.federated.aggregation.robust.norm_clip import ClipNorm, NormClip
from spear_jax.federated.aggregation.weighting import Weighting
from spear_jax.models.params import Adapter, LowRank

close = lambda got, want, tol=1e-9: np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def reduced(reducer, x, weight=None, start=None):
    """The update that a reducer makes of vectors x [n, d], which are spread over two leaves."""
    x = np.asarray(x, float)
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, float)
    zero = np.zeros(x.shape[1]) if start is None else np.asarray(start, float)
    leaves = lambda y: {"a": y[..., :1], "b": y[..., 1:]}
    update, _, _ = reducer.reduce(
        leaves(x + zero), weight, leaves(zero), reducer.init_kept(leaves(zero))
    )
    return np.concatenate([update["a"], update["b"]])


@pytest.mark.parametrize("name", ["median_odd", "median_even", "median_weighted", "trimmed_mean"])
def test_coordinate_wise_rules_are_numpys(vector, name):
    given, want, tol = vector(name)
    reducer = {
        "median_weighted": CoordinateMedian(weighted=True),
        "trimmed_mean": TrimmedMean(given.get("beta", 0)),
    }.get(name, CoordinateMedian())
    close(reduced(reducer, given["x"], given.get("w")), want["out"], tol)


def test_krum_takes_the_client_with_the_nearest_neighbours(vector):
    given, want, tol = vector("krum")
    close(
        scores(vectors.squared_distances([np.array(given["x"])]), given["f"]), want["scores"], tol
    )
    shares = Krum(given["f"]).shares([np.array(given["x"])], np.ones(7))
    assert np.argmax(shares) == want["chosen"] and shares.max() == 1
    close(reduced(Krum(given["f"]), given["x"]), want["out"], tol)
    given, want, tol = vector("multi_krum")
    multi = MultiKrum(given["f"])
    assert multi.count(7) == given["m"] and multi.fewest == 5
    close(multi.shares([np.array(given["x"])], np.ones(7)), want["p"], tol)
    close(reduced(multi, given["x"]), want["out"], tol)


def test_of_equal_scores_the_first_client_is_krums():
    assert np.argmax(Krum().shares([np.ones((4, 2))], np.ones(4))) == 0


def test_bulyan_chooses_again_and_again(vector):
    given, want, tol = vector("bulyan")
    distances = vectors.squared_distances([np.array(given["x"])])
    assert choose(distances, given["f"]) == want["chosen"] and len(want["chosen"]) == want["theta"]
    close(reduced(Bulyan(given["f"]), given["x"]), want["out"], tol)


def test_the_geometric_median_is_weiszfelds(vector):
    given, want, tol = vector("geometric_median")
    one, ten = (GeometricMedian(i, given["nu"]) for i in (1, given["iterations"]))
    close(reduced(one, given["x"]), want["first"], tol)
    close(reduced(ten, given["x"]), want["out"], tol)
    close(reduced(GeometricMedian(4000), given["x"]), want["limit"], 1e-7)
    given, want, tol = vector("geometric_median_shares")
    got = ten.step([np.array(given["x"])], [np.array(given["v"])], np.array(given["p"]))
    close(got, want["p"], tol)


def test_clipped_updates_are_averaged(vector):
    given, want, _ = vector("norm_clip")
    clip, x = ClipNorm(given["bound"]), np.float32(given["x"])
    clipped = jax.vmap(lambda x: clip([x])[0])(x)
    close(clipped, x * np.array(want["factors"])[:, None], 1e-6)
    close(reduced(NormClip(given["bound"]), clipped), want["out"], 1e-6)
    assert not np.any(clip([jnp.zeros(3)])[0])  # a zero update stays zero
    assert not np.isfinite(clip([jnp.full(3, 1e38)])[0]).any()  # and one without a norm has none


def test_centred_clipping_moves_from_the_last_centre(vector):
    given, want, tol = vector("centred_clip")
    x, centre = np.array(given["x"]), [np.array(given["v"])]
    for iterations, name in ((1, "one_iteration"), (2, "two_iterations")):
        clip = CentredClip(given["tau"], iterations)
        close(clip.move([x], centre, np.array(given["p"]))[0], want[name], tol)
    kept = {"centre": {"x": np.array(given["v"])}}
    clip = CentredClip(given["tau"])
    update, _, kept = clip.reduce({"x": x}, np.ones(7), {"x": np.zeros(3)}, kept)
    close(update["x"], want["one_iteration"], tol)
    close(kept["centre"]["x"], want["one_iteration"], 1e-6)


def test_fltrust_scales_to_the_root_and_trusts_by_angle(vector):
    given, want, tol = vector("fltrust")
    x, root = np.array(given["x"]), {"x": np.array(given["root"])}
    for scale in (1.0, 100.0):
        trust, update = FLTrust().trusted({"x": scale * x}, root)
        close(trust, want["trust"], tol)
        close(update["x"], want["out"], tol)
    opposed = FLTrust().reduce(
        {"x": -x[:1] * 0 - root["x"]}, np.ones(1), {"x": x[0] * 0}, {"root": root}
    )
    assert opposed[1] == 0.0 and not np.any(opposed[0]["x"])


ROBUST = {
    "median": CoordinateMedian(),
    "trimmed_mean": TrimmedMean(0.25),
    "krum": Krum(2),
    "multi_krum": MultiKrum(2),
    "bulyan": Bulyan(2),
    "geometric_median": GeometricMedian(),
    "centred_clip": CentredClip(1e3),
}


@pytest.mark.parametrize("name", ROBUST)
def test_robust_rules_keep_their_symmetries(name):
    reducer, rng = ROBUST[name], np.random.default_rng(4)
    x = rng.normal(size=(11, 3))
    got, order = reduced(reducer, x), rng.permutation(11)
    close(reduced(reducer, x[order]), got)
    close(reduced(reducer, np.repeat(x[:1], 11, axis=0)), x[0])
    if name != "centred_clip":  # its centre would have to move along
        close(reduced(reducer, x + 5.0), got + 5.0)
        close(reduced(reducer, x, start=[1.0, 2.0, 3.0]), got)
    scale = reduced(dataclasses.replace(reducer, radius=3e3) if "clip" in name else reducer, 3 * x)
    close(scale, 3 * got, 1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "multi_krum", "bulyan"])
def test_two_huge_attackers_of_eleven_leave_the_result_among_the_honest(name):
    honest = np.random.default_rng(5).normal(size=(9, 4))
    got = reduced(ROBUST[name], np.concatenate([honest, np.full((2, 4), 1e6)]))
    assert (got >= honest.min(0)).all() and (got <= honest.max(0)).all()
    if name == "krum":
        assert np.any(np.all(np.isclose(honest, got), axis=1))


def test_weights_are_ignored_unless_they_are_asked_for():
    x, weight = np.random.default_rng(6).normal(size=(5, 2)), np.array([9.0, 1, 1, 1, 1])
    for plain, weighted in (
        (CoordinateMedian(), CoordinateMedian(True)),
        (GeometricMedian(), GeometricMedian(weighted=True)),
    ):
        close(reduced(plain, x, weight), reduced(plain, x))
        close(reduced(weighted, x, weight), x[0], 1e-3)  # one client has more than half


# The round: rejection by select, failure, attackers


def server(aggregation, width=3, clients=7):
    start = Adapter(q=LowRank(jnp.zeros((1, width, 1)), jnp.zeros((1, 1, 1))))
    return init_server(aggregation, start, {}, jax.random.key(0), clients)


def sent(x):
    x = np.asarray(x, np.float32)
    return Adapter(q=LowRank(x[:, None, :, None], np.zeros((len(x), 1, 1, 1), np.float32)))


def test_a_client_that_is_not_finite_is_rejected_by_name(vector):
    given, want, tol = vector("nonfinite_clients")
    x, weight = np.array(given["x"], float), np.array(given["w"], float)
    assert list(vectors.finite([x])) == [False, False, True, True, True, True, True]
    aggregation = Aggregation(attack=Attack("none", ()))  # what arrives is read on the host
    done = end_round(aggregation, server(aggregation), (sent(x), weight), range(7))
    assert done.rejected == [k for k, good in enumerate(want["accepted"]) if not good]
    assert done.metrics["round/rejected"] == want["rejected"]
    close(done.state.lora.q.a[0, :, 0], want["out"], 1e-6)
    assert not vectors.finite([np.full((1, 3), 1e38)])[0]  # its norm overflows in float32


def test_a_round_with_too_few_clients_fails_and_changes_nothing():
    aggregation = Aggregation(reducer=Krum(1))  # needs 5
    before = server(aggregation, clients=5)
    x = np.ones((5, 3))
    x[0] = np.nan
    done = end_round(aggregation, before, (sent(x), np.ones(5)), range(5))
    assert done.metrics["round/failed"] == 1.0 and int(done.state.round) == 1
    assert not np.any(done.state.lora.q.a) and float(done.change) == 0.0
    all_bad = end_round(aggregation, before, (sent(x * np.nan), np.ones(5)), range(5))
    assert all_bad.metrics["round/failed"] == 1.0 and all_bad.rejected == [0, 1, 2, 3, 4]
    nobody = end_round(aggregation, before, (sent(x * 0), np.zeros(5)), range(5))
    assert nobody.metrics["round/failed"] == 0.0 and nobody.rejected == []


def test_the_server_clips_what_an_attacker_has_not():
    attack = Attack("scale", (0,), strength=100.0)
    aggregation = Aggregation(reducer=NormClip(1.0), attack=attack)
    x = np.eye(3) * 0.9
    done = end_round(aggregation, server(aggregation), (sent(x), np.ones(3)), range(3))
    close(done.state.lora.q.a[0, :, 0], np.array([1.0, 0.9, 0.9]) / 3, 1e-6)
    assert done.metrics["attack/weight_share"] == pytest.approx(1 / 3)


def test_krums_shares_feed_any_lora_rule():
    """FedEx after Krum: one client is chosen, its product is exact, and nothing is left over."""
    rng = np.random.default_rng(7)
    a, b = np.float32(rng.normal(size=(5, 1, 4, 2))), np.float32(rng.normal(size=(5, 1, 2, 3)))
    a[4], b[4] = 1e4, 1e4
    aggregation = Aggregation(reducer=Krum(1), rule=LORA_RULES["fedex"]())
    start = Adapter(q=LowRank(jnp.zeros((1, 4, 2)), jnp.zeros((1, 2, 3))))
    state = init_server(aggregation, start, {}, jax.random.key(0), 5)
    done = end_round(aggregation, state, (Adapter(q=LowRank(a, b)), np.ones(5)), range(5))
    got = np.asarray(done.state.lora.q.a @ done.state.lora.q.b)[0]
    assert any(np.allclose(got, a[k, 0] @ b[k, 0], rtol=1e-5) for k in range(4))
    assert not np.any(done.state.aggregation_state["base"]["q"])


def test_clients_that_do_not_send_a_factor_cannot_move_it():
    tree = Adapter(q=LowRank(np.ones((2, 3, 1)), np.ones((2, 1, 2))))
    assert not np.any(only(tree, "b").q.a) and np.all(only(tree, "b").q.b == 1)


# Attacks


def test_attackers_send_their_formulas(vector):
    given, want, tol = vector("attack_sign_flip")
    flip = Attack("sign_flip", (0,), given["gamma"])
    got, bad = flip({"x": np.array([given["x"], given["x"]])}, np.ones(2), np.arange(2), 1)
    close(got["x"], [want["out"], given["x"]], tol)
    assert list(bad) == [True, False]
    given, want, tol = vector("attack_alie")
    honest, f = np.array(given["honest"]), given["f"]
    close(attacks.alie({"x": honest}, f)["x"], want["out"], tol)
    everyone = {"x": np.concatenate([honest, np.zeros((f, 3))])}
    got, _ = Attack("alie", (7, 8, 9))(everyone, np.ones(10), np.arange(10), 1)
    close(got["x"], np.concatenate([honest, [want["out"]] * f]), tol)
    for name in ("attack_ipm_0.5", "attack_ipm_3"):
        given, want, tol = vector(name)
        ipm = Attack("ipm", (7, 8, 9), given["epsilon"])
        got, _ = ipm(everyone, np.ones(10), np.arange(10), 1)
        close(got["x"][7:], [want["out"]] * 3, tol)
        close(got["x"].mean(0), want["mean_of_all"], tol)


def test_model_replacement_sets_the_mean(vector):
    given, want, tol = vector("attack_model_replacement")
    weight, k = np.array(given["w"]), given["attacker"]
    target = [np.array(given["target"]) - np.array(given["start"])]
    close(attacks.replacement(target, weight, k)[0], want["sent_blind"], tol)
    knowing = attacks.replacement(target, weight, k, [np.array(given["honest"])])
    close(knowing[0], want["sent_knowing_others"], tol)
    x = np.array([*given["honest"], target[0]])
    got, _ = Attack("replacement", (k,))({"x": x}, weight, np.arange(3), 1)
    close(got["x"][k], want["sent_blind"], tol)


def test_noise_has_the_length_of_an_update_and_is_of_the_path_alone():
    x = {"x": np.random.default_rng(8).normal(size=(3, 4000))}
    noise = Attack("gaussian", (1,), 2.0, seed=5)
    got, _ = noise(x, np.ones(3), np.arange(3), 4)
    assert np.linalg.norm(got["x"][1]) == pytest.approx(2 * np.linalg.norm(x["x"][1]), rel=0.05)
    close(got["x"][[0, 2]], x["x"][[0, 2]])
    other, _ = noise({"x": x["x"][1:]}, np.ones(2), np.arange(1, 3), 4)  # in another cohort
    np.testing.assert_array_equal(got["x"][1], other["x"][0])
    later, _ = noise(x, np.ones(3), np.arange(3), 5)
    assert not np.any(later["x"][1] == got["x"][1])


def test_attackers_are_a_share_of_all_clients_drawn_once():
    drawn = attacks.attackers(3, 10, 0.3)
    assert len(set(drawn)) == 3 and drawn == attacks.attackers(3, 10, 0.3)
    assert len({tuple(attacks.attackers(seed, 10, 0.3)) for seed in range(9)}) > 3
    assert attacks.attackers(3, 10, 0.09) == []
    with pytest.raises(UserError, match="'alie' with 5 attackers among 8 clients"):
        attacks.check("alie", 8, 5)
    attacks.check("alie", 10, 3)


def test_an_approver_has_half_of_the_average_until_weights_are_even(vector):
    given, want, tol = vector("feedback_poisoning_weights")
    wins = np.array([*given["wins"], given["rollouts"]], float)
    share = lambda weighting: (w := weighting(wins, wins > 0))[-1] / w.sum()
    close(share(Weighting()), want["share_wins"], tol)
    close(share(Weighting("uniform")), want["share_uniform"], tol)
    close(share(Weighting("capped", given["cap"])), want["share_capped"], tol)
    assert list(Weighting("uniform")(np.array([3.0, 0.0]), np.array([True, False]))) == [1, 0]


# Refusals

# what the table of refusals asks of features that are not here
ELSEWHERE = {"freeze"}


def choices(case, defaults):
    """A case of the table as `Choices`."""
    given = {**defaults, **case}
    name = {"none": "mean"}.get(given["robust"], given["robust"])
    reducer = find_reducer(name, byzantine=given["byzantine"], trim=given["trim"])
    rule = LORA_RULES[given["rule"]]()
    # "auto" is what a feature needs; the table asks for no weights under local noise
    automatic = "uniform" if given["local_dp"] else "method"
    return Choices(
        rule=rule, reducer=reducer, reducer_name=name, server=given["server"],
        server_rate=given["server_rate"], cohort=given["cohort"],
        ranks=(2, 4) if given["mixed_ranks"] else (), quantize=given["quantize"],
        compression=given["compression"], error_feedback=given["error_feedback"],
        older_adapters=given["older_adapters"], ema_teacher=given["ema_teacher"],
        drift=given["drift"], mode=given["mode"],
        central_noise=given["noise_multiplier"] * given["central_dp"],
        local_noise=float(given["local_dp"]), secure_sum=given["secure_sum"], sampling=given["sampling"],
        sigma_b=given["sigma_b"] * given["adaptive_clip"], over_selection=given["over_selection"],
        weighting={"auto": automatic, "wins": "method"}.get(given["weighting"], given["weighting"]),
    )  # fmt: skip


def test_the_table_of_refusals_holds(vector):
    given, want, _ = vector("refusals")
    checked, seen = 0, set()
    for case, refused in zip(given["cases"], want["refused"], strict=True):
        if ELSEWHERE & case.keys():
            continue
        # S_k of hetlora is not summed behind masks
        if case.get("secure_sum") and case.get("rule") == "hetlora":
            continue
        found = refusals.reasons(choices(case, given["defaults"]))
        assert list(found) == refused, case
        checked, seen = checked + 1, seen | set(refused)
        for message in found.values():
            assert re.search(r"(?i)take |set |raise |lower ", message), message
    assert checked >= 40
    assert seen == {
        "robust_coordinates", "robust_count", "mixed_ranks", "server_optimiser", "base_quantised",
        "base_references", "gauge_memory", "server_rule_alone",
        "scaffold_rule", "dp_drift", "dp_async", "async_rule", "async_robust",
        "async_server", "async_drift", "async_over_selection",
        "feedback_without_compression", "dp_weights", "dp_sampling", "dp_rule", "dp_robust",
        "dp_over_selection", "dp_adaptive", "secure_needs_sum", "secure_blockwise",
        "truncation_rule",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"federation.reducer": "norm_clip"}, "clip_bound is 0; set it"),
        ({"federation.weighting": "capped"}, "weight_cap is 0; set the largest"),
        ({"federation.lora_rule": "fedx"}, "Did you mean 'fedex'"),
        ({"lora.ranks": "2,99"}, "ranks from 1 to lora.rank=4"),
        (
            {"lora.ranks": "2,4"},
            "lora.ranks are 2 and 4, but federation.lora_rule 'mean' needs one",
        ),
        (
            {"federation.lora_rule": "fedex", "federation.reducer": "median"},
            "'median', which yields coordinates, but federation.lora_rule 'fedex' needs",
        ),
        (
            {"federation.reducer": "bulyan", "federation.byzantine": 2},
            "needs 11 clients a round, but there are 2",
        ),
        ({"federation.lora_rule": "flora", "federation.server_rate": 0.5}, "set server_rate=1"),
        ({"federation.lora_rule": "flexlora", "federation.aggregation": "fedadam"}, "take fedavg"),
        ({"federation.lora_rule": "fedex", "quantize": "int8"}, "set quantize=none"),
        ({"federation.reducer": "median", "federation.aggregation": "local"}, "never averages"),
        ({"attack.kind": "alie", "attack.fraction": 1.0}, "lower attack.fraction"),
        (
            {"privacy.noise_multiplier": 1.0},
            "federation.weighting is 'method', which tells of its data; set",
        ),
        ({"privacy.local_noise": 1.0}, "set --config.federation.weighting=uniform."),
        (
            {"privacy.noise_multiplier": 1.0, "privacy.local_noise": 1.0},
            "would cut off most of the clients' noise; set one of them to 0",
        ),
        (
            {"federation.secure_sum": True, "aggregation.secure_bits": 29},
            "holds numbers up to 4 of 0 clients, but a round may have 2",
        ),
        ({"privacy.noise_multiplier": 0.01}, "0.01; less than 0.3 of the clip norm"),
        (
            {
                "privacy.noise_multiplier": 1.0,
                "privacy.adaptive": True,
                "federation.weighting": "uniform",
            },
            "1 is not below twice privacy.sigma_b 0.1, so",
        ),
        (
            {"federation.sampling": "poisson", "participation.over_selection": 1.5},
            "whose cohorts have any size",
        ),
        ({"federation.sampling": "poisson", "federation.aggregation": "local"}, "may draw nobody"),
        ({"compression.kind": "rank"}, "set --config.federation.lora_rule=flexlora, or flora"),
        (
            {
                "compression.kind": "rank",
                "federation.lora_rule": "flora",
                "federation.reducer": "geometric_median",
            },
            "'geometric_median' measures their numbers; set --config.federation.reducer=mean",
        ),
        (
            {
                "compression.kind": "rank",
                "federation.lora_rule": "flexlora",
                "compression.error_feedback": True,
            },
            "would be whole weights; set --config.compression.error_feedback=False",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_before_anything_compiles(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        built("spear", changes)


@pytest.mark.parametrize(
    "method, changes, message",
    [
        (
            "tpaw",
            {"federation.lora_rule": "fedex"},
            "method 'tpaw' compares with adapters of earlier",
        ),
        ("tspin", {"federation.lora_rule": "flora"}, "take mean, ffa, rolora or fair"),
        (
            "opsd",
            {"federation.lora_rule": "flexlora", "opsd.teacher": "ema"},
            "opsd.teacher=ema averages adapters of several rounds",
        ),
        ("dpo", {"federation.lora_rule": "fedsa"}, "each starts from its own; take mean"),
        (
            "iris",
            {"privacy.noise_multiplier": 1.0, "federation.weighting": "uniform"},
            "noise is added; under privacy.noise_multiplier set --config.iris.order=per_step, or",
        ),
        (
            "sft",
            {
                "privacy.noise_multiplier": 1.0,
                "federation.weighting": "uniform",
                "sft.east": 4,
            },
            "set --config.sft.east=0",
        ),
        (
            "dpo",
            {
                "privacy.noise_multiplier": 1.0,
                "federation.weighting": "uniform",
                "dpo.source": "east",
            },
            "set --config.dpo.source=feedback",
        ),
    ],
)
def test_methods_that_an_aggregation_would_break_are_refused(method, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        built(method, changes)


@functools.cache
def small(method):
    from spear_jax.experiment import presets

    config = presets.method_config(method, "facts,tiny,smoke")
    config.update_from_flattened_dict(
        {
            "federation.num_clients": 3, "federation.clients_per_round": 2, "lora.rank": 4,
            "lora.targets": ("q",), "data.train_limit": 64, "eval.limit": 8,
        }
    )  # fmt: skip
    return config


def built(method, changes):
    from spear_jax.experiment.builder import build

    config = small(method).copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return build(config)


def test_every_reducer_is_named_once():
    assert set(REDUCERS) == {"mean", "last", "norm_clip", "fltrust", *ROBUST}
