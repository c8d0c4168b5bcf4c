"""The six self-play methods: their vectors, fixed points and invariances, accumulation, and the
memory that they share.
"""

import dataclasses
import functools
import json
import math
import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spear_jax.algorithms.base import CommonHyperparams
from spear_jax.algorithms.iris import Iris, adaptive_order, distribution_gap, iris_loss, iris_sums
from spear_jax.algorithms.self_play import log_ratio
from spear_jax.algorithms.space import Space, space_real, space_synthetic
from spear_jax.algorithms.spif import Spif, spif_real, spif_synthetic
from spear_jax.algorithms.spin import Spin, spin_loss
from spear_jax.algorithms.tpaw import Tpaw, tpaw_loss
from spear_jax.algorithms.tspin import Tspin, tspin_loss
from spear_jax.core import pytrees
from spear_jax.core.errors import UserError
from spear_jax.core.rng import path_rng, purpose
from spear_jax.core.types import Attempt, Cohort, Trace
from spear_jax.experiment import builder, presets
from spear_jax.federated import cohort_training
from spear_jax.federated import round as rounds
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.tokenized_data import TokenizedData

METHODS = (Spin, Tpaw, Iris, Space, Spif, Tspin)
COMMON = CommonHyperparams(
    examples=99, steps=2, accumulation=1, batch_size=16, max_new_tokens=4, temperature=1.0, eos_ids=(2,)
)  # fmt: skip


def build(method, common=COMMON, **settings):
    return method(method.Settings(**settings), common)


# Formulas: vectors


def run_pair(pol_w, pol_l, ref_w, ref_l, beta, kind, label_smoothing):
    kind = {"sigmoid": "logistic"}.get(kind, kind)
    return spin_loss(log_ratio(pol_w, ref_w, beta), log_ratio(pol_l, ref_l, beta), kind).mean()


def run_tpaw(pol_w, pol_l, ref_w, ref_l, lam, eta, gamma, stop_beta):
    real, synthetic = log_ratio(pol_w, ref_w, lam), log_ratio(pol_l, ref_l, lam)
    return tpaw_loss(real, synthetic, jnp.ones(len(ref_w)), eta, gamma, stop_beta).mean()


def run_iris(r_real, r_syn, alpha, clip=20.0):
    valid = jnp.ones(r_real.shape, bool), jnp.ones(r_syn.shape, bool)
    return iris_loss(
        r_real, r_syn, valid, alpha, iris_sums(r_real, r_syn, valid, alpha, clip), clip
    )[0]


def run_space(r_real, r_syn, mu):
    return space_real(r_real, mu).mean() + mu * space_synthetic(r_syn, mu).mean()


def run_spif(r_real, r_syn, c=1.0, form="mixture"):
    return spif_real(r_real, c, form).mean() + spif_synthetic(r_syn, c, form).mean()


def run_tspin(lp_y, lp_yp, lp_y0, alpha, beta):
    return tspin_loss(lp_y, lp_yp, lp_y0, alpha, beta).mean()


RUNS = {
    "spin_": run_pair,
    "dpo_sigmoid": run_pair,
    "tpaw_": run_tpaw,
    "iris_": run_iris,
    "space_": run_space,
}
RUNS |= {"spif_": run_spif, "tspin": run_tspin}
VECTORS = {
    v["name"]: v
    for v in json.loads((pathlib.Path(__file__).parents[1] / "loss_vectors.json").read_text())
}
LOSSES = {
    name: run
    for name, v in VECTORS.items()
    for start, run in RUNS.items()
    if name.startswith(start) and "function" in v
}


@pytest.mark.parametrize("x64, tolerance", [(True, 1e-9), (False, 1e-5)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_vector_holds(name, x64, tolerance):
    expected = VECTORS[name]["expected"]
    with jax.enable_x64(x64):
        inputs = {
            k: jnp.array(v, float) if isinstance(v, list) else v
            for k, v in VECTORS[name]["inputs"].items()
        }
        run = lambda free: LOSSES[name](**{**inputs, **free})
        value, grads = jax.value_and_grad(run)({k: inputs[k] for k in expected["grad"]})
        assert value.dtype == (jnp.float64 if x64 else jnp.float32)
    assert float(value) == pytest.approx(expected["loss"], abs=tolerance)
    for key, grad in expected["grad"].items():
        np.testing.assert_allclose(grads[key], grad, rtol=0, atol=tolerance)


def test_every_self_play_vector_is_checked():
    assert len(LOSSES) == 17  # and iris_adaptive_alpha below


def test_adaptive_order_vector_holds():
    inputs, expected = (
        VECTORS["iris_adaptive_alpha"]["inputs"],
        VECTORS["iris_adaptive_alpha"]["expected"],
    )
    gap = distribution_gap(np.array(inputs["nll_real"]), np.array(inputs["nll_syn"]))
    with jax.enable_x64(True):
        alpha = adaptive_order(gap, inputs["alpha_min"], inputs["alpha_max"], inputs["tau"])
    assert gap == pytest.approx(expected["gap"], abs=1e-9)
    assert float(alpha) == pytest.approx(expected["alpha"], abs=1e-9)
    assert distribution_gap(np.array([1.0]), np.array([3.0])) == 0.0


# Formulas: fixed points on a categorical policy over six responses.
# Whole numbers of samples hold the distributions exactly: P is the data's, Q the opponent's.

P, Q = np.array([7, 1, 4, 3, 2, 3]), np.array([2, 6, 1, 5, 4, 2])
p, q = P / P.sum(), Q / Q.sum()
ORDERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
REAL, SYNTHETIC = np.repeat(np.arange(6), P), np.repeat(np.arange(6), Q)


def population(run, logits, opponent=q, synthetic=SYNTHETIC):
    """The loss of a policy (float[6] logits) on all real and all synthetic responses, λ = 1."""
    r = log_ratio(jax.nn.log_softmax(logits), np.log(opponent), 1.0)
    return run(r[REAL], r[synthetic])


def at(distribution):
    return jnp.log(jnp.array(distribution)) + 0.7  # a policy does not know its logits' offset


def gradient(run, distribution, **where):
    return np.abs(jax.grad(functools.partial(population, run, **where))(at(distribution))).max()


def spin_population(real, synthetic):
    """Independent pairs: every real response against every synthetic one."""
    return spin_loss(real[:, None], synthetic[None], "logistic").mean()


FIXED = {f"iris at order {alpha}": functools.partial(run_iris, alpha=alpha) for alpha in ORDERS}
FIXED |= {f"space with mu {mu}": functools.partial(run_space, mu=mu) for mu in (1.0, 3.0, 7.0)}
FIXED |= {"spin": spin_population}
OTHERS = [np.array(x) / sum(x) for x in ([1, 1, 1, 1, 1, 1], [1, 9, 2, 2, 3, 3], list(Q))]


@pytest.mark.parametrize("name", FIXED)
def test_the_datas_distribution_is_at_rest_whatever_the_opponent_and_no_other_is(name):
    with jax.enable_x64(True):
        assert gradient(FIXED[name], p) <= 1e-12
        assert gradient(FIXED[name], p, opponent=p, synthetic=REAL) <= 1e-12
        assert all(gradient(FIXED[name], other) > 1e-3 for other in OTHERS)


@pytest.mark.parametrize("form", ["mixture", "pearson"])
def test_spif_is_at_rest_at_the_data_only_where_the_opponent_is_the_data_too(form):
    run = functools.partial(run_spif, form=form)
    with jax.enable_x64(True):
        assert gradient(run, p, opponent=p, synthetic=REAL) <= 1e-12
        assert gradient(run, p) > 1e-3


def test_tspin_has_no_rest_at_the_data():
    # y' ~ p and y0 ~ p independently: early stopping is part of the method
    def run(logits):
        s = jax.nn.log_softmax(logits)[REAL]
        return tspin_loss(s[:, None, None], s[None, :, None], s[None, None], 1.0, 1.0).mean()

    with jax.enable_x64(True):
        assert np.abs(jax.grad(run)(at(p))).max() > 1e-3


@pytest.mark.parametrize("alpha", ORDERS)
def test_iris_descends_from_anywhere_to_the_data_and_its_minimum_is_a_renyi_divergence(alpha):
    with jax.enable_x64(True):
        run = functools.partial(population, functools.partial(run_iris, alpha=alpha))
        starts = jnp.array(np.random.default_rng(0).normal(0, 1.0, (3, 6)))
        optimiser = optax.adam(
            optax.cosine_decay_schedule(0.1, 5000)
        )  # the curvature at p varies by thousands

        def descend(_, carry):
            updates, state = optimiser.update(jax.grad(run)(carry[0]), carry[1])
            return optax.apply_updates(carry[0], updates), state

        end = lambda start: jax.lax.fori_loop(0, 5000, descend, (start, optimiser.init(start)))[0]
        ends = np.asarray(jax.jit(jax.vmap(end))(starts))
        for end in ends:
            np.testing.assert_allclose(jax.nn.softmax(end), p, rtol=0, atol=1e-5)
        found = float(run(at(p)))
    divergence = lambda a, b: float((a * np.log(a / b)).sum())
    if alpha in (0.0, 1.0):
        wanted = -divergence(q, p) if alpha == 0.0 else -divergence(p, q)
    else:
        wanted = -math.log((p**alpha * q ** (1 - alpha)).sum()) / (alpha * (alpha - 1))
    assert found == pytest.approx(wanted, abs=1e-12)


def test_space_with_mu_1_has_the_jensen_shannon_divergence_as_its_minimum():
    mean = (p + q) / 2
    js = 0.5 * (p * np.log(p / mean)).sum() + 0.5 * (q * np.log(q / mean)).sum()
    with jax.enable_x64(True):
        found = float(population(functools.partial(run_space, mu=1.0), at(p)))
    assert found == pytest.approx(math.log(4) - 2 * js, abs=1e-12)


def test_orders_near_zero_and_one_join_their_limits():
    with jax.enable_x64(True):
        real, synthetic = jnp.array([0.8, -0.3, 1.5]), jnp.array([-0.6, 0.4])
        for limit in (0.0, 1.0):
            value, grad = jax.value_and_grad(run_iris)(real, synthetic, limit)
            for side in (
                -1.001e-3,
                -0.999e-3,
                0.999e-3,
                1.001e-3,
            ):  # on either side of the switch to the expansion
                near, slope = jax.value_and_grad(run_iris)(real, synthetic, limit + side)
                assert float(near) == pytest.approx(float(value), abs=1e-3)
                np.testing.assert_allclose(slope, grad, atol=1e-3)
        across = [float(run_iris(real, synthetic, x)) for x in (1 + 0.9999e-3, 1 + 1.0001e-3)]
    assert across[0] == pytest.approx(across[1], abs=1e-6)


# Formulas: stopped gradients and invariances

rng = np.random.default_rng(5)
R, R_ = jnp.array(rng.normal(0, 1, 6)), jnp.array(rng.normal(0, 1, 6))


def test_the_opponents_scores_have_no_gradient():
    run = lambda reference: spin_loss(
        log_ratio(R, reference, 0.1), log_ratio(R_, reference, 0.1), "logistic"
    ).sum()
    np.testing.assert_array_equal(jax.grad(run)(R_), np.zeros(6))


def test_tpaws_weights_have_a_gradient_only_where_asked():
    with jax.enable_x64(True):
        real, synthetic = (jnp.array(rng.normal(0, 2, (3, 2))) for _ in range(2))
        run = lambda stop: lambda x: tpaw_loss(x, synthetic, jnp.ones(3), 6.0, 0.5, stop).sum()
        stopped, flowing = (np.asarray(jax.grad(run(stop))(real)) for stop in (True, False))
        h = 1e-6 * np.eye(6).reshape(6, 3, 2)
        numeric = np.array(
            [float(run(False)(real + d) - run(False)(real - d)) / 2e-6 for d in h]
        ).reshape(3, 2)
    # b σ(−(a P − P')) (−a), b = softmax(−γ (P − P'))
    x, y = np.asarray(real), np.asarray(synthetic)
    scale, weight = np.where(x <= 0, 6.0, 1.0), np.exp(-0.5 * (x - y))
    weight /= weight.sum(0)
    np.testing.assert_allclose(stopped, -weight * scale / (1 + np.exp(scale * x - y)), atol=1e-12)
    np.testing.assert_allclose(flowing, numeric, atol=1e-7)
    assert np.abs(flowing - stopped).max() > 1e-2


def test_players_that_are_missing_change_nothing():
    real, synthetic = (jnp.array(rng.normal(0, 1, (3, 4))) for _ in range(2))
    one = lambda x: tpaw_loss(x, synthetic, jnp.array([1.0, 1.0, 0.0]), 6.0, 0.5, False)
    two = lambda x: tpaw_loss(x, synthetic[:2], jnp.ones(2), 6.0, 0.5, False)
    np.testing.assert_allclose(one(real), two(real[:2]), rtol=1e-6)
    grad = jax.grad(lambda x: one(x).sum())(real)
    np.testing.assert_allclose(
        grad[:2], jax.grad(lambda x: two(x).sum())(real[:2]), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(grad[2], np.zeros(4))


def test_a_reward_within_rounding_of_zero_counts_as_fallen():
    # at the start of an iteration P = 0 but for rounding: dL/dP = −a σ(0) = −η/2
    grad = jax.grad(lambda x: tpaw_loss(x, jnp.zeros((1, 2)), jnp.ones(1), 6.0, 0.5, True).sum())
    np.testing.assert_allclose(grad(jnp.array([[1e-6, -1e-6]])), [[-3.0, -3.0]], rtol=1e-4)
    np.testing.assert_allclose(grad(jnp.array([[0.01, -0.01]])), [[-0.5, -3.0]], rtol=0.05)


def test_one_player_of_weight_one_is_spin():
    tpaw = lambda x: tpaw_loss(x[None], R_[None], jnp.ones(1), 1.0, 0.5, True).mean()
    spin = lambda x: spin_loss(x, R_, "logistic").mean()
    for left, right in zip(jax.value_and_grad(tpaw)(R), jax.value_and_grad(spin)(R), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_clipped_responses_keep_their_gradient():
    # 30 and 25 are clipped to 20, so they share the weight; -20 has e^{-40} of theirs
    grad = jax.grad(lambda x: run_iris(jnp.zeros(2), x, 1.0))(jnp.array([30.0, 25.0, -20.0]))
    np.testing.assert_allclose(grad, [0.5, 0.5, 0.0], atol=1e-6)


def test_spin_and_iris_do_not_see_a_shift_of_all_rewards_and_space_does():
    for run in (
        lambda x, y: spin_loss(x, y, "logistic").mean(),
        functools.partial(run_iris, alpha=1.5),
    ):
        for left, right in zip(
            jax.value_and_grad(run)(R, R_), jax.value_and_grad(run)(R + 2.5, R_ + 2.5), strict=True
        ):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)
    assert abs(float(run_space(R, R_, 1.0) - run_space(R + 2.5, R_ + 2.5, 1.0))) > 0.1


# Batches: what training calls

N, T, J = 16, 5, 3
SETTINGS = {Space: {"mu": 2}, Iris: {"order": "fixed", "alpha": 1.5}}
NUMBERS = {Tpaw: {"players": jnp.array([1.0, 1.0, 0.0])}, Iris: {"alpha": jnp.float32(1.5)}}


@flax.struct.dataclass
class Items:
    """Rows by item: logprobs float[N, K, T], ref_logprobs float[N, K, J, T], mask bool[N, K, T],
    valid bool[N].
    """

    logprobs: np.ndarray
    ref_logprobs: np.ndarray
    mask: np.ndarray
    valid: np.ndarray


def groups_of(algorithm, seed=0, pad=(3, 7, 8)):
    rng, rows_per_group = np.random.default_rng(seed), algorithm.layout.rows_per_group
    valid = ~np.isin(np.arange(N), pad)
    mask = (np.arange(T) < rng.integers(1, T + 1, (N, rows_per_group, 1))) & valid[:, None, None]
    mask[0, 0] = False  # an empty response that is not padding
    return Items(
        -rng.exponential(1.0, (N, rows_per_group, T)).astype(np.float32),
        -rng.exponential(1.0, (N, rows_per_group, J, T)).astype(np.float32),
        mask,
        valid,
    )


def rows(x, chosen):
    """Items -> micro-batch order: all of kind 0, then all of kind 1, ..."""
    return jnp.swapaxes(x[chosen], 0, 1).reshape(-1, *x.shape[2:])


def batch_of(algorithm, items, chosen):
    mask = rows(items.mask, chosen)
    label = jnp.where(jnp.arange(algorithm.layout.rows_per_group) > 0, -1, 1) * items.valid[:, None]
    players = len(algorithm.references(algorithm.init_state({"a": np.zeros(1)}, 1, 1), {}))
    return Batch(
        completion_mask=mask,
        loss_mask=mask,
        weight=mask.astype(jnp.float32),
        advantage=jnp.zeros(len(mask)),
        label=rows(label, chosen),
        ref_logprobs=rows(items.ref_logprobs, chosen)[:, :players] if players else None,
    )


def step(algorithm, batch_size, normalize, items, loss_scalars):
    """The core's optimiser step: counts summed over the micro-batches, then the shares added."""
    parts = np.arange(N).reshape(-1, batch_size)
    batches = jax.tree.map(
        lambda *x: jnp.stack(x), *[batch_of(algorithm, items, part) for part in parts]
    )
    logprobs = jnp.stack([rows(items.logprobs, part) for part in parts])
    scored = jax.lax.stop_gradient(logprobs) if algorithm.scoring.two_pass else None
    counts = jax.vmap(lambda b, x: algorithm.denominators(b, x, loss_scalars))(batches, scored)
    if normalize == "global":
        counts = jax.tree.map(lambda x: jnp.broadcast_to(x.sum(0), x.shape), counts)
    else:
        counts = jax.tree.map(lambda x: len(parts) * x, counts)
    loss, metrics = jax.lax.map(
        lambda xs: algorithm.loss(*xs, loss_scalars), (batches, logprobs, counts)
    )
    return loss.sum(), jax.tree.map(lambda x: x.sum(0), metrics)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def step_and_gradients(algorithm, batch_size, normalize, items, loss_scalars):
    def run(logprobs, ref_logprobs):
        return step(
            algorithm,
            batch_size,
            normalize,
            items.replace(logprobs=logprobs, ref_logprobs=ref_logprobs),
            loss_scalars,
        )

    return jax.value_and_grad(run, (0, 1), has_aux=True)(items.logprobs, items.ref_logprobs)


def stepped(algorithm, items, batch_size, loss_scalars=None, normalize="global"):
    """The step's loss, its metrics, and the gradient with respect to `items.logprobs`; that of the
    references is 0.
    """
    loss_scalars = NUMBERS.get(type(algorithm), {}) if loss_scalars is None else loss_scalars
    (value, metrics), (grad, stopped) = step_and_gradients(
        algorithm, batch_size, normalize, items, loss_scalars
    )
    np.testing.assert_array_equal(stopped, np.zeros_like(items.ref_logprobs))
    return float(value), {name: mean.value() for name, mean in metrics.items()}, np.asarray(grad)


def method_of(method, **settings):
    return build(method, **(SETTINGS.get(method, {}) | settings))


softplus = lambda z: np.logaddexp(0.0, z)


def expected(algorithm, items):
    """The loss of all valid items by numpy, from the paper's formulas."""
    config, valid = algorithm.settings, items.valid
    s = np.where(items.mask, items.logprobs.astype(float), 0).sum(-1)[valid]
    if isinstance(algorithm, Tspin):
        y, latest, first = s.T
        return (softplus(-0.1 * (y - latest)) + softplus(-0.1 * (latest - first))).mean()
    reference = np.where(items.mask[:, :, None], items.ref_logprobs.astype(float), 0).sum(-1)[valid]
    r = config.lam * (s[..., None] - reference)  # [n, K, J]
    real, synthetic = r[:, 0, 0], r[:, 1:, 0]
    if isinstance(algorithm, Spin):
        return softplus(-(real - synthetic[:, 0])).mean()
    if isinstance(algorithm, Space):
        k = math.log(2)
        return softplus(k - real).mean() + 2 * softplus(synthetic - k).mean()
    if isinstance(algorithm, Spif):
        return 0.5 * ((real - 1) ** 2).mean() + 0.5 * ((synthetic + 1) ** 2).mean()
    if isinstance(algorithm, Iris):
        return (
            np.log(np.exp(1.5 * synthetic).mean()) / 1.5 - np.log(np.exp(0.5 * real).mean()) / 0.5
        )
    wins, loses = r[:, 0, :2], r[:, 1, :2]  # the third player is masked
    weight = np.exp(-0.5 * (wins - loses))
    weight /= weight.sum(1, keepdims=True)
    return (weight * softplus(-(np.where(wins <= 0, 6.0, 1.0) * wins - loses))).sum(1).mean()


@pytest.mark.parametrize("method", METHODS)
def test_loss_of_a_batch_with_padding_is_the_formula_on_its_responses(method):
    algorithm = method_of(method)
    items = groups_of(algorithm)
    value, metrics, grad = stepped(algorithm, items, N)
    assert value == pytest.approx(expected(algorithm, items), abs=1e-5)
    assert np.isfinite(list(metrics.values())).all()
    assert (grad[~items.mask] == 0).all() and (np.abs(grad[items.mask]).sum() > 0)


@pytest.mark.parametrize("method", METHODS)
def test_16_micro_batches_of_one_equal_4_of_4_and_one_of_16(method):
    algorithm = method_of(method)
    items = groups_of(algorithm)
    whole, metrics, grad = stepped(algorithm, items, 16)
    for size in (1, 4):
        value, other, slope = stepped(algorithm, items, size)
        assert value == pytest.approx(whole, abs=1e-5)
        np.testing.assert_allclose(slope, grad, rtol=0, atol=1e-5)
        assert other == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_micro_normalisation_is_the_mean_of_the_micro_batches_own_losses(method):
    algorithm = method_of(method)
    items = groups_of(algorithm, pad=())
    value, _, _ = stepped(algorithm, items, 4, normalize="micro")
    parts = [np.arange(N)[i : i + 4] for i in range(0, N, 4)]
    own = [expected(algorithm, jax.tree.map(lambda x, part=part: x[part], items)) for part in parts]
    assert value == pytest.approx(np.mean(own), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_items_does_not_matter(method):
    algorithm = method_of(method)
    items = groups_of(algorithm)
    order = np.random.default_rng(1).permutation(N)
    value, metrics, grad = stepped(algorithm, items, 4)
    other, again, slope = stepped(algorithm, jax.tree.map(lambda x: x[order], items), 4)
    assert other == pytest.approx(value, abs=1e-5) and again == pytest.approx(metrics, abs=1e-5)
    np.testing.assert_allclose(slope, grad[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [Iris, Space, Spif])
def test_unpaired_methods_do_not_see_which_synthetic_response_stands_beside_which_real_one(method):
    algorithm = method_of(method)
    items, order = groups_of(algorithm, pad=()), np.random.default_rng(2).permutation(N)
    mixed = jax.tree.map(np.copy, items)
    for name in ("logprobs", "ref_logprobs", "mask"):
        getattr(mixed, name)[:, 1:] = getattr(items, name)[order, 1:]
    assert stepped(algorithm, mixed, 4)[0] == pytest.approx(
        stepped(algorithm, items, 4)[0], abs=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_padding_has_zero_loss_and_zero_gradient(method):
    algorithm = method_of(method)
    value, metrics, grad = stepped(algorithm, groups_of(algorithm, pad=range(N)), 4)
    assert value == 0.0
    assert np.isfinite(list(metrics.values())).all()
    np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize("method", METHODS)
def test_empty_responses_have_a_finite_loss_and_no_gradient(method):
    algorithm = method_of(method)
    items = groups_of(algorithm)
    items.mask[:] = False
    value, _, grad = stepped(algorithm, items, 4)
    assert np.isfinite(value)
    np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_iriss_gradient_is_minus_the_real_and_plus_the_synthetic_softmax_of_the_whole_step():
    algorithm = method_of(Iris)
    items = groups_of(algorithm)
    grad = stepped(algorithm, items, 4)[2]
    total = lambda x, mask: np.where(mask, x, 0).sum(-1)
    r = 0.1 * (total(items.logprobs, items.mask) - total(items.ref_logprobs[:, :, 0], items.mask))
    weight = np.exp(r * [0.5, 1.5]) * items.valid[:, None]
    weight /= weight.sum(0)
    np.testing.assert_allclose(grad, (0.1 * weight * [-1, 1])[..., None] * items.mask, atol=1e-6)


def test_iriss_effective_share_is_1_over_n_sum_of_squared_weights():
    algorithm = method_of(Iris, lam=1.0)
    items = groups_of(algorithm)
    total = lambda x, mask: np.where(mask, x, 0).sum(-1)
    r = (total(items.logprobs, items.mask) - total(items.ref_logprobs[:, :, 0], items.mask))[
        items.valid
    ]
    for name, z in (("real_ess", 0.5 * r[:, 0]), ("synthetic_ess", 1.5 * r[:, 1])):
        w = np.exp(z) / np.exp(z).sum()
        assert stepped(algorithm, items, 4)[1][name] == pytest.approx(
            1 / (len(w) * (w**2).sum()), rel=1e-4
        )


def test_iriss_scale_alpha_multiplies_the_loss_by_its_order():
    items = groups_of(method_of(Iris))
    plain, scaled = (stepped(method_of(Iris, scale=scale), items, 4) for scale in ("one", "alpha"))
    assert scaled[0] == pytest.approx(1.5 * plain[0], rel=1e-5)
    np.testing.assert_allclose(scaled[2], 1.5 * plain[2], atol=1e-6)


def test_a_new_order_compiles_nothing():
    algorithm = method_of(Iris)
    items, sizes, values = groups_of(algorithm), [], []
    for alpha in (0.0, 0.5, 1.0, 2.0):
        values.append(stepped(algorithm, items, 4, loss_scalars={"alpha": jnp.float32(alpha)})[0])
        sizes.append(step_and_gradients._cache_size())
    assert sizes[0] == sizes[-1] and len(set(values)) == 4


def test_per_step_order_follows_the_running_difference_of_mean_rewards():
    algorithm = method_of(Iris, order="per_step")
    loss_scalars = {"gap": jnp.float32(0.4)}
    counts = {"real": {"total": 6.0, "count": 3.0}, "synthetic": {"total": -2.0, "count": 4.0}}
    after = algorithm.update_loss_scalars(loss_scalars, counts)
    assert float(after["gap"]) == pytest.approx(0.9 * 0.4 + 0.1 * (2.0 + 0.5))
    items = groups_of(algorithm)
    alpha = 0.5 + 1.5 * (1 - math.exp(-0.4))
    assert stepped(algorithm, items, 4, loss_scalars=loss_scalars)[1]["alpha"] == pytest.approx(
        alpha, rel=1e-6
    )
    # a policy that prefers synthetic responses has the order of no gap
    assert stepped(algorithm, items, 4, loss_scalars={"gap": jnp.float32(-3.0)})[1][
        "alpha"
    ] == pytest.approx(0.5)


# Memory: a world where an adapter is a number, and a response names its author, its question and
# its sample.


class FakeWorker:
    """Answers with [author, example, sample], right for even examples; two clients own six examples
    each.
    """

    def __init__(self):
        self.data = TokenizedData(
            prompts=[[100 + i] for i in range(12)],
            responses=[[50, i] for i in range(12)],
            rejected=[[] for _ in range(12)],
            prompt_length=8,
            completion_length=4,
        )
        self.asked = []

    def policy(self, adapter):
        return Policy({"author": int(adapter["a"][0])})

    def answer(self, policy, asks, key):
        self.asked += asks
        author = policy.base["author"]
        attempt = lambda i, sample: Attempt(
            [100 + i], [author, i, sample], [-0.5 - i] * 3, "", i % 2 == 0
        )
        return [Trace(client, None, [attempt(i, sample)]) for client, i, sample in asks]

    def score(self, policy, rows):
        return [np.full(len(row.completion), -2.0 * row.completion[1], np.float32) for row in rows]


PARTS = {4: np.arange(6), 9: np.arange(6, 12)}


def play(method, rounds, examples=99, **settings):
    """Rounds whose adapter is the number of rounds finished; returns each round's (CohortData,
    asks), and the last memory.
    """
    common = dataclasses.replace(COMMON, examples=examples, batch_size=4, accumulation=4)
    algorithm, worker, told = build(method, common, **settings), FakeWorker(), []
    algorithm_state = algorithm.init_state({"a": np.array([0.0])}, 12, 4)
    for round in range(1, rounds + 1):
        rngs = lambda slot, name, round=round: path_rng(0, purpose(name), round, list(PARTS)[slot])
        cohort = Cohort(round, list(PARTS), list(PARTS.values()), rngs)
        before, worker.asked = pytrees.digest(algorithm_state), []
        got = algorithm.collect(
            worker, Policy({"author": round - 1}), cohort, algorithm_state, None, 0
        )
        assert pytrees.digest(algorithm_state) == before  # a checkpoint may still be writing it
        after = pytrees.digest(got.algorithm_state)
        told.append((got, worker.asked))
        metrics = {"iris/real_ess": 1.0, "iris/synthetic_ess": 1.0}
        algorithm_state = algorithm.end_round(
            got.algorithm_state, {"a": jnp.array([float(round)])}, metrics, round
        )
        assert pytrees.digest(got.algorithm_state) == after
    return algorithm, told, algorithm_state


def drawn(got):
    return [row for client in got.rows for step in client for micro in step for row in micro]


def authors(got, label=-1):
    return {row.completion[0] for row in drawn(got) if row.label == label}


@pytest.mark.parametrize("method", METHODS)
def test_a_micro_batch_is_blocks_of_gold_then_synthetic_responses_to_the_same_prompts(method):
    algorithm, told, _ = play(method, 2, **({"mu": 3} if method is Space else {}))
    for got, _ in told:
        assert len(got.rows) == 2 and all(
            len(client) == 2 and len(client[0]) == 4 for client in got.rows
        )
        for micro in (micro for client in got.rows for step in client for micro in step):
            assert len(micro) == 4 * algorithm.layout.rows_per_group
            for i, row in enumerate(micro):
                index = micro[i % 4].completion[1]
                assert (
                    row.prompt == [100 + index]
                    and row.completion[1] == index
                    and row.loss_mask.all()
                )
                assert (row.label > 0) == (row.completion[0] == 50) == (i < 4)


@pytest.mark.parametrize("method", METHODS)
def test_each_rounds_opponent_is_the_adapter_that_the_round_started_from(method):
    algorithm, told, algorithm_state = play(method, 4)
    for round, (got, asked) in enumerate(told, 1):
        assert {(client, i) for client, i, _ in asked} == {
            (c, i) for c, part in PARTS.items() for i in part
        }
        assert round - 1 in authors(got)
        np.testing.assert_array_equal(got.weight, [6, 6])
        assert got.active.all()
    for player, lora in enumerate(algorithm.references(algorithm_state, {})):
        assert lora["a"].tolist() == [4.0 - player]


def test_spin_has_one_synthetic_set_in_iteration_0_and_two_afterwards():
    _, told, algorithm_state = play(Spin, 4)
    assert [authors(got) for got, _ in told] == [{0}, {1, 0}, {2, 1}, {3, 2}]
    assert [got.metrics["rollout/wins"] for got, _ in told] == [12, 24, 24, 24]
    assert [got.metrics["rollout/loses"] for got, _ in told] == [12, 24, 24, 24]
    assert all(got.metrics["rollout/first_accuracy"] == 0.5 for got, _ in told)
    assert algorithm_state["tokens"].shape == (12, 2, 1, 4)


def test_tpaw_adds_a_player_and_a_synthetic_set_an_iteration_up_to_three():
    algorithm, told, algorithm_state = play(Tpaw, 5)
    assert [got.loss_scalars["players"].tolist() for got, _ in told] == [
        [1, 0, 0],
        [1, 1, 0],
        *[[1, 1, 1]] * 3,
    ]
    assert [authors(got) for got, _ in told] == [{0}, {1, 0}, {2, 1, 0}, {3, 2, 1}, {4, 3, 2}]
    assert algorithm_state["opponents"]["a"].tolist() == [[5.0], [4.0], [3.0]]
    assert len(algorithm.references(algorithm_state, {})) == 3


@pytest.mark.parametrize("method", [Iris, Space, Spif])
def test_the_other_methods_train_on_the_current_opponents_responses_only(method):
    _, told, _ = play(method, 3)
    assert [authors(got) for got, _ in told] == [{0}, {1}, {2}]


def test_sets_of_prompts_that_were_not_drawn_for_long_are_not_trained_on():
    _, told, algorithm_state = play(Spin, 6, examples=2)
    for round, (got, _) in enumerate(told, 1):
        assert authors(got) <= {round - 1, round - 2}
        np.testing.assert_array_equal(got.weight, [2, 2])
    assert (algorithm_state["iteration"] < 4).any()  # some were left behind


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_keeps_its_shape_and_no_more_than_its_iterations(method):
    algorithm, told, algorithm_state = play(method, 5)
    start = algorithm.init_state({"a": np.array([0.0])}, 12, 4)
    shapes = lambda tree: jax.tree.map(lambda x: (np.asarray(x).shape, np.asarray(x).dtype), tree)
    assert all(shapes(got.algorithm_state) == shapes(told[0][0].algorithm_state) for got, _ in told)
    assert jax.tree.structure(algorithm_state) == jax.tree.structure(start)
    assert {k: v for k, v in shapes(algorithm_state).items() if k != "opponents"} == {
        k: v for k, v in shapes(start).items() if k != "opponents"
    }
    kept = {0, 4} if method is Tspin else set(range(5 - algorithm.kept, 5))
    assert set(algorithm_state["iteration"].ravel().tolist()) == kept


def test_two_rounds_of_an_iteration_share_the_opponent_and_its_stored_responses():
    _, told, algorithm_state = play(Spin, 4, refresh_rounds=2, history=1)
    assert [authors(got) for got, _ in told] == [{0}, {0}, {2}, {2}]
    assert [len(asked) for _, asked in told] == [12, 0, 12, 0]
    assert all(got.metrics["rollout/first_accuracy"] == 0.5 for got, _ in told)
    assert algorithm_state["opponents"]["a"].tolist() == [[4.0]]


def test_new_prompts_in_an_iterations_second_round_are_answered_by_its_opponent():
    _, told, _ = play(Spin, 4, examples=3, refresh_rounds=2, history=1)
    assert [authors(got) for got, _ in told] == [{0}, {0}, {2}, {2}]
    first, second = ({(client, i) for client, i, _ in asked} for _, asked in told[:2])
    assert len(first) == 6 and second and not first & second


def test_tspins_first_response_is_the_initial_policys_and_never_changes():
    algorithm, told, algorithm_state = play(Tspin, 5)
    assert [authors(got, -2) for got, _ in told] == [{0}] * 5
    assert [authors(got, -1) for got, _ in told] == [{0}, {1}, {2}, {3}, {4}]
    first = [got.algorithm_state["tokens"][:, 0] for got, _ in told]
    assert all((tokens == first[0]).all() for tokens in first)
    assert algorithm.references(algorithm_state, {}) == () and algorithm_state["initial"][
        "a"
    ].tolist() == [0.0]


def test_tspins_first_response_to_a_prompt_drawn_late_is_still_the_initial_policys():
    _, told, _ = play(Tspin, 6, examples=2)
    late = [ask for _, asked in told[1:] for ask in asked]
    assert len({ask[2] for ask in late}) == 2  # y0 and y' of a prompt have keys of their own
    for round, (got, _) in enumerate(told, 1):
        assert authors(got, -2) == {0} and authors(got, -1) == {round - 1}


def test_tspin_reuses_its_first_response_in_iteration_0():
    _, told, _ = play(Tspin, 1)
    got, asked = told[0]
    assert len(asked) == 12
    for micro in (micro for client in got.rows for step in client for micro in step):
        assert [row.completion for row in micro[4:8]] == [row.completion for row in micro[8:]]


def test_space_trains_on_mu_different_samples_of_a_prompt():
    _, told, _ = play(Space, 2, mu=3)
    got, asked = told[1]
    assert len(asked) == 36 and got.metrics["rollout/loses"] == 36
    for micro in (micro for client in got.rows for step in client for micro in step):
        assert [row.completion[2] for row in micro[4:]] == [0] * 4 + [1] * 4 + [2] * 4


def test_irises_gap_is_the_clients_mean_gap_on_the_opponents_responses():
    _, told, algorithm_state = play(Iris, 1)
    # example i: real 2 i nats a token, synthetic 0.5 + i; gaps of the clients: 2.5 - 0.5 and 8.5 -
    # 0.5
    gap = (2.0 + 8.0) / 2
    assert float(algorithm_state["gap"]) == pytest.approx(gap)
    assert float(told[0][0].loss_scalars["alpha"]) == pytest.approx(
        0.5 + 1.5 * (1 - math.exp(-gap))
    )


def test_irises_gap_lasts_through_an_iteration_without_new_responses():
    _, told, _ = play(Iris, 2, refresh_rounds=2)
    assert told[1][1] == [] and float(told[1][0].algorithm_state["gap"]) == pytest.approx(5.0)


def test_fixed_and_per_step_orders_do_not_measure_the_gap():
    _, fixed, algorithm_state = play(Iris, 1, order="fixed", alpha=0.7)
    assert (
        float(fixed[0][0].loss_scalars["alpha"]) == pytest.approx(0.7)
        and float(algorithm_state["gap"]) == 0.0
    )
    _, running, _ = play(Iris, 1, order="per_step")
    assert float(running[0][0].loss_scalars["gap"]) == 0.0


def test_a_client_without_examples_trains_nothing():
    algorithm, worker = build(Spin), FakeWorker()
    algorithm_state = algorithm.init_state({"a": np.array([0.0])}, 12, 4)
    cohort = Cohort(
        1, [4, 5], [PARTS[4], np.array([], int)], lambda slot, name: np.random.default_rng(slot)
    )
    got = algorithm.collect(worker, Policy({"author": 0}), cohort, algorithm_state, None, 0)
    assert got.active.tolist() == [True, False] and got.weight.tolist() == [6, 0]
    assert all(row is None for step in got.rows[1] for micro in step for row in micro)


# Checks


class FakeTask:
    name = "fake"

    def response(self, example):
        return example.response


@dataclasses.dataclass
class FakeExample:
    id: str
    response: str


GOOD = [FakeExample("a", "yes")]


@pytest.mark.parametrize("method", METHODS)
def test_examples_without_a_gold_response_are_refused_by_name(method):
    algorithm = build(method)
    assert algorithm.gold == "responses" and not algorithm.scoring.dropout
    algorithm.check(FakeTask(), GOOD, "none")
    with pytest.raises(
        UserError, match="trains on gold responses, but task 'fake' has none for example 'b'"
    ):
        algorithm.check(FakeTask(), [*GOOD, FakeExample("b", " ")], "none")


def test_iris_refuses_steps_of_one_response_and_warns_below_16(capsys):
    common = dataclasses.replace(COMMON, batch_size=1)
    with pytest.raises(UserError, match="at least 2"):
        build(Iris, common).check(FakeTask(), GOOD, "none")
    build(Iris, dataclasses.replace(common, accumulation=15)).check(FakeTask(), GOOD, "none")
    assert "below about 16" in capsys.readouterr().err
    build(Iris, dataclasses.replace(common, accumulation=16)).check(FakeTask(), GOOD, "none")
    assert capsys.readouterr().err == ""


def test_iris_refuses_orders_that_overflow_cross_or_vanish():
    for settings, words in (
        ({"clip": 50.0}, "overflow"),
        ({"alpha_min": 3.0}, "above iris.alpha_max"),
        ({"scale": "alpha", "order": "fixed", "alpha": 0.0}, "vanishes"),
    ):
        with pytest.raises(UserError, match=words):
            build(Iris, **settings).check(FakeTask(), GOOD, "none")


def test_iris_warns_when_its_weights_rest_on_few_responses(capsys):
    algorithm = build(Iris)
    algorithm_state = algorithm.init_state({"a": np.array([0.0])}, 1, 4)
    algorithm.end_round(
        algorithm_state, {"a": np.ones(1)}, {"iris/real_ess": 0.05, "iris/synthetic_ess": 0.5}, 3
    )
    assert "real weights of round 3 rest on 5%" in capsys.readouterr().err


def test_space_refuses_several_greedy_samples():
    common = dataclasses.replace(COMMON, temperature=0.0)
    with pytest.raises(UserError, match="same response 3 times"):
        build(Space, common, mu=3).check(FakeTask(), GOOD, "none")
    build(Space, common, mu=1).check(FakeTask(), GOOD, "none")


# Whole rounds on the embedded model


def experiment_of(method, **changes):
    config = presets.method_config(method, "facts,tiny")
    small = {
        "federation.clients_per_round": 2,
        "rollout.examples": 6,
        "rollout.max_concurrent_sequences": 16,
        "train.steps": 1,
        "train.batch_size": 4,
        "train.accumulation": 4,
        "data.train_limit": 200,
        "eval.limit": 8,
        "lora.rank": 2,
    }
    config.update_from_flattened_dict(small | changes)
    return builder.build(config, jax.devices()[:1])


def assert_latest_opponent(state):
    latest = jax.tree.map(lambda x: x[0], state.algorithm_state["opponents"])
    assert pytrees.digest(latest) == pytrees.digest(jax.tree.map(np.asarray, state.lora))


def round_after(built, state):
    return rounds.run_round(built.federation, state, BudgetUsed())


# r = 0 everywhere at the start of an iteration: SPIN and TPAW have log(1 + 1); IRIS 0 - 0; SPACE
# twice log(1 + 1); SPIF (1/2)(1 + 1)
STARTS = {
    "spin": math.log(2),
    "tpaw": math.log(2),
    "iris": 0.0,
    "space": 2 * math.log(2),
    "spif": 1.0,
}


@pytest.mark.parametrize("name", STARTS)
def test_the_first_step_of_an_iteration_has_the_loss_of_equal_policies_and_moves_the_adapter(name):
    built = experiment_of(name)
    state, metrics, traces = round_after(built, built.initial_state())
    assert metrics["train/loss"] == pytest.approx(STARTS[name], abs=1e-5)
    assert metrics["train/grad_norm"] > 0 and metrics["round/update_norm"] > 0
    assert [metrics[f"{name}/{side}_reward"] for side in ("real", "synthetic")] == pytest.approx(
        [0, 0], abs=1e-5
    )
    assert len(traces) == 12 and metrics["round/clients_without_wins"] == 0
    assert_latest_opponent(state)
    if name == "iris":
        gap = float(state.algorithm_state["gap"])
        assert metrics["iris/alpha"] == pytest.approx(0.5 + 1.5 * (1 - math.exp(-gap)), abs=1e-5)
        assert metrics["iris/real_ess"] == pytest.approx(
            1.0, abs=1e-5
        )  # equal rewards, equal weights


def test_a_tspin_round_scores_no_reference_and_its_next_one_still_knows_the_first_responses():
    built = experiment_of("tspin")
    state = built.initial_state()
    assert built.federation.algorithm.references(state.algorithm_state, state.lora) == ()
    state, first, _ = round_after(built, state)
    proto = state.algorithm_state["tokens"][state.algorithm_state["iteration"][:, 0] == 0, 0]
    assert len(proto) == 12 and first["tspin/real_length"] > 0 and first["train/grad_norm"] > 0
    known = state.algorithm_state["iteration"][:, 0] == 0
    state, second, _ = round_after(built, state)
    np.testing.assert_array_equal(state.algorithm_state["tokens"][known, 0], proto)
    assert np.isfinite(second["train/loss"])


def test_a_second_round_of_an_iteration_is_answered_by_the_stored_opponent():
    built = experiment_of(
        "spin", **{"spin.refresh_rounds": 2, "train.learning_rate": 0.1, "train.warmup": False}
    )
    start = built.initial_state()
    state, _, _ = round_after(built, start)
    assert pytrees.digest(state.algorithm_state["opponents"]) == pytrees.digest(
        start.algorithm_state["opponents"]
    )
    state, _, traces = round_after(built, state)
    assert traces
    rows = [
        TrainingRow(
            t.first.prompt, t.first.completion, np.ones(len(t.first.completion), bool), 1.0, -1
        )
        for t, _, _ in traces
    ]
    scored = {
        name: built.federation.worker.score(built.federation.worker.policy(lora), rows)
        for name, lora in (("old", start.lora), ("new", state.lora))
    }
    told = np.concatenate([trace.first.logprobs for trace, _, _ in traces])
    np.testing.assert_allclose(np.concatenate(scored["old"]), told, atol=1e-3)
    assert np.abs(np.concatenate(scored["new"]) - told).max() > 1e-2
    assert_latest_opponent(state)


def test_tpaws_growing_team_compiles_nothing_after_the_first_rounds():
    built = experiment_of("tpaw")
    state, sizes = built.initial_state(), []
    for _ in range(3):
        state, _, _ = round_after(built, state)
        sizes.append(cohort_training._train._cache_size())
    assert sizes[1] == sizes[2]
