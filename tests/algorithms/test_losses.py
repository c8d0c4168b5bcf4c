"""Every vector of loss_vectors.json that belongs to SPEAR and SFT, through the functions that
training calls.
"""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.algorithms import losses
from spear_jax.algorithms.spear import cap_loses, lose_mask
from spear_jax.federated.schedule import round_rate

VECTORS = {
    v["name"]: v
    for v in json.loads((pathlib.Path(__file__).parents[1] / "loss_vectors.json").read_text())
}
UNLIKELIHOOD = [
    name for name in VECTORS if name.startswith("spear_ul_") and "logp" in VECTORS[name]["inputs"]
]
UNLIKELIHOOD += ["welleck_token_unlikelihood"]
SATURATED = [
    name
    for name in UNLIKELIHOOD
    if any(x == 0.0 for row in VECTORS[name]["inputs"]["logp"] for x in row)
]


def run_unlikelihood(logp, mask, conf, margin, eps, p_max, conf_weighting, denom):
    u, active = losses.unlikelihood(logp, margin, eps, p_max)
    confidence = jnp.broadcast_to(conf[:, None], logp.shape)
    rows = jnp.ones(len(conf), bool)
    weights, count = losses.unlikelihood_weights(
        mask, active, confidence, rows, conf_weighting, denom
    )
    return losses.ratio((weights * u).sum(), count)


def run_sft(logp, mask, reduction):
    mean = {"token_mean": losses.nll, "seq_mean": losses.sequence_nll}[reduction](logp, mask)
    return losses.ratio(mean.total, mean.count)


def run_spear(win_logp, win_mask, lose_logp, lose_mask, conf, lambda_win, lambda_lose):
    lose = run_unlikelihood(lose_logp, lose_mask, conf, 0.3, 1e-8, 1 - 1e-7, "batch_mean", "masked")
    return lambda_win * run_sft(win_logp, win_mask, "token_mean") + lambda_lose * lose


def check(name, function, dtype, tolerance):
    vector = VECTORS[name]
    inputs = {
        k: jnp.array(v, dtype) if isinstance(v, list) else v for k, v in vector["inputs"].items()
    }
    wanted = vector["expected"]["grad"]
    value, grads = jax.value_and_grad(lambda free: function(**{**inputs, **free}))(
        {k: inputs[k] for k in wanted}
    )
    assert float(value) == pytest.approx(vector["expected"]["loss"], abs=tolerance)
    for key, grad in wanted.items():
        np.testing.assert_allclose(grads[key], grad, rtol=0, atol=tolerance)


LOSSES = {
    "sft_token_mean": run_sft,
    "sft_seq_mean": run_sft,
    "spear_total_reference": run_spear,
    **dict.fromkeys(UNLIKELIHOOD, run_unlikelihood),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_vector_holds_in_float64(name):
    with jax.enable_x64(True):
        check(name, LOSSES[name], jnp.float64, 1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in SATURATED])
def test_loss_vector_holds_in_float32(name):
    check(name, LOSSES[name], jnp.float32, 1e-5)


def test_vectors_with_a_certain_token_are_the_ones_left_out_of_float32():
    assert len(UNLIKELIHOOD) == 6 and len(SATURATED) == 4


@pytest.mark.parametrize("x64, tolerance", [(True, 1e-9), (False, 1e-5)])
def test_anchor_vector_holds_and_its_gradient_flows(x64, tolerance):
    vector = VECTORS["spear_anchor"]
    with jax.enable_x64(x64):
        theta, reference = (
            {str(i): jnp.array(x) for i, x in enumerate(vector["inputs"][name])}
            for name in ("theta", "theta_ref")
        )
        value, grad = jax.value_and_grad(losses.anchor)(theta, reference)
    assert float(value) == pytest.approx(vector["expected"]["loss"], abs=tolerance)
    for i, want in enumerate(vector["expected"]["grad"]["theta"]["theta"]):
        np.testing.assert_allclose(grad[str(i)], want, atol=tolerance)


def test_the_anchor_is_the_same_however_layers_are_stored():
    """numpy's sum over the tensors of PEFT's file, one a layer, against leaves that stack layers."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5, 2), "b": (3, 2, 7)}
    theta, start = ({n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(2))
    want = sum(((theta[n][i] - start[n][i]) ** 2).mean() for n in shapes for i in range(3))
    theta, start = (jax.tree.map(jnp.float32, tree) for tree in (theta, start))
    np.testing.assert_allclose(losses.anchor(theta, start), want, rtol=1e-6)
    layers = jax.tree.map(list, theta), jax.tree.map(list, start)
    np.testing.assert_allclose(losses.anchor(*layers), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["spear_ul_mask", "spear_ul_mask_full"])
def test_lose_mask_removes_eos_before_the_tail_window_and_protected_ids_after(name):
    inputs = VECTORS[name]["inputs"]
    tokens, mask = np.array(inputs["tokens"]), np.array(inputs["completion_mask"])
    found = lose_mask(tokens, mask, (inputs["eos_id"],), inputs["tail"], tuple(inputs["protected"]))
    np.testing.assert_array_equal(found, np.array(VECTORS[name]["expected"]["mask"], bool))


def test_protection_shrinks_the_window_instead_of_moving_it():
    tokens = np.array([[11, 12, 13, 14, 2]])
    mask = lose_mask(tokens, np.ones((1, 5), bool), (2,), 2, (14,))
    np.testing.assert_array_equal(mask, [[False, False, True, False, False]])


def test_answer_only_mode_keeps_the_answer_wherever_it_stands_and_the_tail_caps_it():
    tokens, ones = np.array([[5, 6, 7, 8, 2]]), np.ones((1, 5), bool)
    np.testing.assert_array_equal(
        lose_mask(tokens, ones, (2,), 0, (), range(1, 3)), [[0, 1, 1, 0, 0]]
    )
    np.testing.assert_array_equal(
        lose_mask(tokens, ones, (2,), 1, (), range(1, 3)), [[0, 0, 1, 0, 0]]
    )
    np.testing.assert_array_equal(lose_mask(tokens, ones, (2,), 0, (), 1), [[0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(lose_mask(tokens, ones, (2,), 0, (), None), [[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(lose_mask(tokens, ones, (2,), 2, (), None), [[0, 0, 1, 1, 0]])


def test_round_rate_vector_holds():
    inputs = VECTORS["round_lr"]["inputs"]
    rate = functools.partial(
        round_rate, rounds=inputs["rounds"], peak=inputs["peak"], low=inputs["lr_min"]
    )
    found = [rate(r, warmup_ratio=inputs["warmup_ratio"], warmup=True) for r in inputs["round"]]
    np.testing.assert_allclose(found, VECTORS["round_lr"]["expected"]["lr"], atol=1e-15)
    assert rate(7, warmup_ratio=0.1, warmup=False) == inputs["peak"]


@pytest.mark.parametrize("how", ["ceil", "floor"])
def test_lose_cap_vector_holds_for_whole_ratios(how):
    inputs = VECTORS["lose_cap"]["inputs"]
    for wins, loses, kept in zip(
        inputs["wins"], inputs["loses"], VECTORS["lose_cap"]["expected"]["kept"], strict=True
    ):
        rng = np.random.default_rng(0)
        found = cap_loses(list(range(loses)), wins, inputs["max_lose_ratio"], how, rng)
        assert len(found) == kept and len(set(found)) == kept


def test_one_win_at_half_a_lose_keeps_one_lose_and_the_published_cap_none():
    rng = np.random.default_rng(0)
    assert len(cap_loses([1, 2, 3], 1, 0.5, "ceil", rng)) == 1
    assert cap_loses([1, 2, 3], 1, 0.5, "floor", rng) == []


def test_empty_masks_give_zero_loss_and_zero_gradient():
    zeros = jnp.zeros((2, 3))
    for function in (
        lambda lp: run_sft(lp, zeros, "token_mean"),
        *(
            functools.partial(
                run_unlikelihood,
                mask=zeros,
                conf=jnp.ones(2),
                margin=0.3,
                eps=1e-8,
                p_max=1 - 1e-7,
                conf_weighting=w,
                denom=d,
            )
            for w in losses.WEIGHTINGS
            for d in losses.DENOMINATORS
        ),
    ):
        value, grad = jax.value_and_grad(function)(jnp.full((2, 3), -0.1))
        assert float(value) == 0.0
        np.testing.assert_array_equal(grad, np.zeros((2, 3)))


def test_certain_tokens_have_no_unlikelihood_gradient_and_a_finite_value():
    value, grad = jax.value_and_grad(lambda lp: losses.unlikelihood(lp, 0.3)[0].sum())(
        jnp.zeros((1, 2))
    )
    # −log(1e-7 + 1e-8) for each of the two tokens
    assert float(value) == pytest.approx(2 * -math.log(1.1e-7), rel=1e-3)
    np.testing.assert_array_equal(grad, np.zeros((1, 2)))


def test_tokens_at_or_below_the_margin_are_left_alone():
    lp = jnp.log(jnp.array([[0.29, 0.31]]))
    grad = jax.grad(lambda x: losses.unlikelihood(x, 0.3)[0].sum())(lp)[0]
    assert grad[0] == 0.0
    assert float(grad[1]) == pytest.approx(0.31 / 0.69, rel=1e-5)  # du/dlp = p / (1 − p)


def test_losses_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(3)
    lp, mask = (
        jnp.log(jnp.array(rng.uniform(0.1, 0.95, (4, 5)))),
        jnp.array(rng.integers(0, 2, (4, 5))),
    )
    conf, order = jnp.array(rng.uniform(0.5, 1, 4)), np.array([2, 0, 3, 1])
    for weighting in losses.WEIGHTINGS:
        run = functools.partial(
            run_unlikelihood,
            margin=0.3,
            eps=1e-8,
            p_max=1 - 1e-7,
            conf_weighting=weighting,
            denom="masked",
        )
        assert float(run(lp, mask, conf)) == pytest.approx(
            float(run(lp[order], mask[order], conf[order])), rel=1e-6
        )
    assert float(run_sft(lp, mask, "token_mean")) == pytest.approx(
        float(run_sft(lp[order], mask[order], "token_mean"))
    )
