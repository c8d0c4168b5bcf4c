"""GRPO, OPSD, RLTF-SD, DPO, EAST and Feedback-SFT: their vectors and properties; and every method's
exactness in the core.

The vectors of SPEAR and SFT are in test_losses.py, those of the self-play methods in
test_self_play.py.
"""

import dataclasses
import functools
import json
import pathlib

import dense
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_cohort import close, local_config, make_decoder, make_lora

from spear_jax.algorithms import ALGORITHMS, dpo, east, grpo, losses, opsd, rltf_sd
from spear_jax.algorithms.base import CommonHyperparams
from spear_jax.core.mesh import make_mesh, replicate, shard_rows
from spear_jax.federated import local_training
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.models import token_logprobs
from spear_jax.models.token_logprobs import TokenLogprobs, unpack_rows
from spear_jax.packing.blocks import choose_block_shape, stack_blocks
from spear_jax.packing.rows import TrainingRow

VECTORS = {
    v["name"]: v
    for v in json.loads((pathlib.Path(__file__).parents[1] / "loss_vectors.json").read_text())
}


def run_grpo_sequence(logp, old_logp, ref_logp, mask, adv, clip, beta, fixed):
    return grpo.sequence_loss(logp, old_logp, ref_logp, mask, adv, clip, clip, beta, fixed).mean()


def run_grpo_token(
    logp, old_logp, ref_logp, mask, adv, eps_low, eps_high, beta, loss_type, max_completion_length
):
    cispo = loss_type == "cispo"
    each = grpo.token_loss(logp, old_logp, ref_logp, adv[:, None], eps_low, eps_high, beta, cispo)
    counts = {"tokens": mask.sum(), "rows": logp.shape[0]}
    return grpo.reduce_tokens(
        each, mask, counts, "dapo" if cispo else loss_type, max_completion_length
    )


def run_opsd(student_logits, teacher_logits, mask, T, **jsd):
    kind = {"divergence": "jsd", **jsd} if jsd else {"divergence": "forward_kl"}
    settings = opsd.OpsdSettings(temperature=T, **kind)
    each = opsd.divergence(student_logits, teacher_logits, None, settings)
    return losses.ratio((each * mask).sum(), mask.sum())


def run_rltf(lp_y1_x0, lp_y0_x0, lp_y1_x1, ref_y0, ref_y1, A_sd, A0, A1, sd_coeff, rl_coeff, beta):
    first = rltf_sd.policy_loss(lp_y0_x0, ref_y0, A0, beta, "published").mean()
    revised = rltf_sd.policy_loss(lp_y1_x1, ref_y1, A1, beta, "published").mean()
    return sd_coeff * (-A_sd * lp_y1_x0).mean() + rl_coeff * (first + revised)


def run_dpo(pol_w, pol_l, ref_w, ref_l, beta, kind, label_smoothing):
    settings = dpo.DpoSettings(kind=kind, beta=beta, smoothing=label_smoothing)
    return dpo.preference_loss((pol_w - ref_w) - (pol_l - ref_l), settings).mean()


LOSSES = {
    **dict.fromkeys(("grpo_reference_buggy", "grpo_sequence_fixed"), run_grpo_sequence),
    **dict.fromkeys([name for name in VECTORS if name.startswith("grpo_token_")], run_grpo_token),
    **dict.fromkeys([name for name in VECTORS if name.startswith("opsd_")], run_opsd),
    "rltf_sd": run_rltf,
    **dict.fromkeys(("dpo_sigmoid", "dpo_label_smoothing"), run_dpo),
}


@pytest.mark.parametrize("x64, tolerance", [(True, 1e-9), (False, 1e-5)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_vector_holds(name, x64, tolerance):
    vector = VECTORS[name]
    with jax.enable_x64(x64):
        kind = jnp.float64 if x64 else jnp.float32
        inputs = {
            k: jnp.array(v, kind) if isinstance(v, list) else v for k, v in vector["inputs"].items()
        }
        wanted = vector["expected"]["grad"]
        function = lambda free: LOSSES[name](**{**inputs, **free})
        value, grads = jax.value_and_grad(function)({k: inputs[k] for k in wanted})
    assert float(value) == pytest.approx(vector["expected"]["loss"], abs=tolerance)
    for key, grad in wanted.items():
        np.testing.assert_allclose(grads[key], grad, rtol=0, atol=tolerance)


def test_every_vector_is_checked_somewhere():
    elsewhere = (
        "sft_",
        "spear_",
        "welleck_",
        "round_lr",
        "lose_cap",
        "fedavg_wins",
    )  # test_losses.py, test_server.py
    self_play = ("spin_", "tpaw_", "iris_", "space_", "spif_", "tspin")  # test_self_play.py
    here = {
        *LOSSES,
        "rltf_advantages",
        "east_weights",
        *(n for n in VECTORS if n.startswith("group_advantage_")),
    }
    assert len(VECTORS) == 50
    assert not [
        name for name in VECTORS if name not in here and not name.startswith(elsewhere + self_play)
    ]


@pytest.mark.parametrize(
    "mode, scaling", [("reference", "std"), ("trl", "group"), ("none", "none")]
)
def test_group_advantage_vector_holds(mode, scaling):
    vector = VECTORS[f"group_advantage_{mode}"]
    found = grpo.advantages(np.array(vector["inputs"]["rewards"]), scaling)
    np.testing.assert_allclose(found, vector["expected"]["adv"], atol=1e-9)


def test_batch_scaling_divides_by_the_deviation_of_all_rewards():
    rewards = np.array([[[1.0, 0.0], [0.0, 0.0]]])
    # mean of groups 0.5 and 0; sample deviation of (1, 0, 0, 0): sqrt(3 * (1/4)^2 + (3/4)^2) /
    # sqrt(3) = 0.5
    np.testing.assert_allclose(
        grpo.advantages(rewards, "batch"), [[[0.5 / 0.5001, -0.5 / 0.5001], [0, 0]]]
    )


def test_rltf_advantage_vector_holds():
    vector = VECTORS["rltf_advantages"]
    r0, r1 = (np.array(vector["inputs"][name]) for name in ("r0", "r1"))
    found = rltf_sd.advantages(r0, r1, vector["inputs"]["gamma"])
    for have, name in zip(found, ("A_sd", "A_RL0", "A_RL1"), strict=True):
        np.testing.assert_allclose(have, vector["expected"][name], atol=1e-9)


def test_east_vector_holds_and_decided_questions_do_not_divide_by_zero():
    vector = VECTORS["east_weights"]
    entropy, weight = east.entropy_weights(
        vector["inputs"]["counts"], vector["inputs"]["a"], vector["inputs"]["base"]
    )
    np.testing.assert_allclose(entropy, vector["expected"]["entropy"], atol=1e-9)
    np.testing.assert_allclose(weight, vector["expected"]["weight"], atol=1e-9)
    np.testing.assert_array_equal(east.entropy_weights([[4], [8]], 1.0)[1], [1.0, 1.0])


# Properties


def arrays(seed=0, rows=6, length=5):
    rng = np.random.default_rng(seed)
    lp = jnp.array(np.log(rng.uniform(0.05, 0.95, (rows, length))), jnp.float32)
    return (
        lp,
        jnp.array(rng.integers(0, 2, (rows, length)).astype(bool)),
        jnp.array(rng.normal(size=rows), jnp.float32),
    )


@pytest.mark.parametrize("cispo", [False, True])
def test_no_gradient_reaches_old_or_reference_policies(cispo):
    lp, _, adv = arrays()
    token = lambda old, ref: grpo.token_loss(lp, old, ref, adv[:, None], 0.2, 5.0, 0.1, cispo).sum()
    whole = lambda old, ref: grpo.sequence_loss(
        lp, old, ref, jnp.ones(lp.shape), adv, 0.2, 0.2, 0.1
    ).sum()
    for function in (token, whole):
        for grad in jax.grad(function, argnums=(0, 1))(lp - 0.1, lp - 0.2):
            np.testing.assert_array_equal(grad, 0.0)


def test_cispo_weights_carry_no_gradient():
    lp, _, adv = arrays()
    grad = jax.grad(
        lambda x: grpo.token_loss(x, lp - 0.3, x, adv[:, None], 0.2, 1.2, 0.0, True).sum()
    )(lp)
    np.testing.assert_allclose(
        grad, -np.minimum(np.exp(0.3), 1.2) * np.broadcast_to(adv[:, None], lp.shape), rtol=1e-5
    )


def test_the_opsd_teacher_carries_no_gradient_and_agreement_costs_nothing():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.array(rng.normal(size=(4, 9)), jnp.float32) for _ in range(2))
    target = jnp.array([0, 3, 8, 2])
    for kind in ("jsd", "forward_kl", "sampled"):
        for top_k in (0, 3):
            settings = opsd.OpsdSettings(divergence=kind, top_k=top_k, temperature=1.3)
            value = lambda s, t, settings=settings: opsd.divergence(s, t, target, settings).sum()
            np.testing.assert_array_equal(jax.grad(value, argnums=1)(student, teacher), 0.0)
            assert np.isfinite(jax.grad(value)(student, teacher)).all()
            np.testing.assert_allclose(jax.grad(value)(teacher, teacher), 0.0, atol=1e-6)


def test_opsd_on_the_teachers_top_k_equals_numpy_on_the_renormalised_support():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    settings = opsd.OpsdSettings(divergence="forward_kl", top_k=3)
    found = opsd.divergence(jnp.array(student), jnp.array(teacher), None, settings)
    for row in range(3):
        keep = np.argsort(-teacher[row])[:3]
        t, s = (np.exp(x[row, keep]) / np.exp(x[row, keep]).sum() for x in (teacher, student))
        assert float(found[row]) == pytest.approx((t * np.log(t / s)).sum(), rel=1e-5)


def test_the_published_grpo_cuts_the_gradient_where_a_bad_answer_becomes_likelier_and_ours_does_not():
    old, mask, adv = jnp.full((1, 1), -1.0), jnp.ones((1, 1)), jnp.array([-1.0])
    for fixed, wanted in ((True, np.exp(0.5)), (False, 0.0)):
        run = lambda x, fixed=fixed: grpo.sequence_loss(
            x, old, old, mask, adv, 0.2, 0.2, 0.0, fixed
        ).sum()
        assert float(jax.grad(run)(old + 0.5)[0, 0]) == pytest.approx(wanted, rel=1e-5)


# Every method in the core

SIZE, P, T = 16, 9, 5
KINDS = {
    "spear": (1, -1), "feedback_sft": (1,), "grpo": (1, -1), "opsd": (1, -1), "rltf_sd": (1, 2, 3), "sft": (1,),
    "dpo": (1, -1), "spin": (1, -1), "tpaw": (1, -1), "iris": (1, -1), "space": (1, -1, -1), "spif": (1, -1),
    "tspin": (1, -1, -2),
}  # fmt: skip
# Options whose denominators span the whole optimiser step.
OPTIONS = [
    ("spear", {"ul_denominator": "active", "margin": 0.004}),
    ("spear", {"confidence_weighting": "normalised"}),
    ("sft", {"reduction": "seq_mean"}),
    ("grpo", {"reduction": "grpo"}),
    ("grpo", {"ratio": "sequence"}),
    ("opsd", {"divergence": "forward_kl", "temperature": 2.0, "teacher": "fixed"}),
    ("iris", {"order": "per_step"}),
]
# Every method is some programs here, and each target more is time to compile.
TARGETS = ("down",)
NUMBERS = {"tpaw": {"players": np.array([1, 1, 0], np.float32)}, "iris": {"alpha": np.float32(1.5)}}


@pytest.fixture(scope="module")
def lora(model):
    """An adapter of TARGETS, B not zero."""
    return make_lora(model, TARGETS)


def make(name, batch_size, accumulation, settings):
    common = CommonHyperparams(4, 1, accumulation, batch_size, T, 1.0, (2,))
    kind = ALGORITHMS[name]
    return kind(
        kind.Settings(
            **settings
            | ({"mu": 2} if name == "space" else {})
            | ({"group": 2} if name == "grpo" else {})
        ),
        common,
    )


def units(name, vocab):
    """16 items of a step, each a tuple of rows, one of them padding."""
    rng = np.random.default_rng(7)

    def row(kind):
        length = int(rng.integers(1, T + 1))
        ids = lambda count: rng.integers(3, vocab, count).tolist()
        prompt, mask = ids(rng.integers(2, P + 1)), rng.random(length) < 0.8
        mask[0] = True
        return TrainingRow(
            prompt, ids(length), mask, float(rng.choice([0.5, 1.0])), kind, float(rng.normal())
        )

    found = [tuple(row(kind) for kind in KINDS[name]) for _ in range(SIZE)]
    if name in ("dpo", "opsd"):
        found = [(a, dataclasses.replace(b, weight=a.weight)) for a, b in found]
    if name == "opsd":  # the same completion under two prompts
        found = [(a, dataclasses.replace(a, prompt=b.prompt, label=-1)) for a, b in found]
    found[5] = (None,) * len(KINDS[name])
    return found


def trained(model, lora, name, shape, settings, at_once=1, devices=1, limit=10_000, chunk=16):
    """Three clients, one optimiser step of `shape` = (micro-batches, items in each).

    Returns: AdamW's first moments afterwards, 0.1 times the clipped gradient that the step was made
    of (the step itself divides near-zero gradients by their own size, so that it shows their last
    bits); metrics.
    """
    accumulation, size = shape
    algorithm = make(name, size, accumulation, settings)
    items = units(name, model.config.vocab_size)
    micros = [items[i : i + size] for i in range(0, SIZE, size)]
    step = [[item[kind] for kind in range(len(KINDS[name])) for item in micro] for micro in micros]
    count = local_training.padded_clients(3, at_once, devices)
    lighter = lambda row, by: row and dataclasses.replace(row, weight=row.weight * by)
    cohort = [[[[lighter(row, by) for row in micro] for micro in step]] for by in (1.0, 0.75, 0.5)]
    work = dense.work(cohort, algorithm, P, T, limit=limit, padded=count)
    others = tuple(jax.tree.map(lambda x, k=k: x + 0.01 * k, lora) for k in (1, 2, 3))
    number = len(algorithm.references(algorithm.init_state(lora, 4, T), lora))
    numbers = (
        {"gap": np.float32(0.3)} if settings.get("order") == "per_step" else NUMBERS.get(name, {})
    )
    mesh = make_mesh(jax.devices()[:devices])
    shared = local_training.Broadcast(lora, model.base, others[:number], numbers, jnp.float32(1e-2))
    weight = np.where(np.arange(count) < 3, np.arange(1, count + 1), 0).astype(np.float32)
    arrays = shard_rows((work, np.zeros((count, 2), np.uint32), weight, np.ones(count, bool)), mesh)
    run = jax.jit(local_training.train_cohort, static_argnums=(0, 1, 2, 3, 4, 5))
    local = local_config(clients_at_once=at_once, head_chunk=chunk)
    decoder = make_decoder(model, remat="nothing", targets=TARGETS)
    static = (algorithm, decoder, local, mesh, Aggregation(), True)
    _, means, states = run(*static, replicate(shared, mesh), None, *arrays)
    moments = optax.tree_utils.tree_get(states.opt_state, "mu")
    return jax.tree.map(lambda x: x[:3], moments), means


@pytest.fixture(scope="module")
def in_one_block(model, lora):
    """`trained` of a method, all items in one block; one program for both tests that ask."""
    return functools.cache(lambda name: trained(model, lora, name, (1, 16), {}, chunk=5))


# The others are scored as one of these: by one forward with no, one, or several references.
@pytest.mark.parametrize("name", ["spear", "spin", "tpaw", "opsd"])
def test_the_fused_head_gives_what_full_logits_give(model, lora, name, in_one_block, monkeypatch):
    """The loss, and its gradient by JAX's own rules through all logits at once."""
    fused, means = in_one_block(name)
    used = []

    def plain(block, hidden, fixed, head, chunk):
        used.append(chunk)
        return block(hidden, *jax.lax.stop_gradient((fixed, head)))

    def full_logprobs(hidden, head, targets, chunk):
        used.append(chunk)
        every = jax.nn.log_softmax(hidden @ jax.lax.stop_gradient(head).T)
        return every[jnp.arange(len(targets)), targets]

    monkeypatch.setattr(token_logprobs, "token_logprobs", full_logprobs)
    monkeypatch.setattr(opsd, "map_positions", plain)
    # a chunk that no program was made with, so that this one is traced with what stands in for the
    # fused head
    whole, expected = trained(model, lora, name, (1, 16), {}, chunk=9_999)
    assert used and set(used) == {9_999}
    close(fused, whole)
    for metric in ("loss", "grad_norm"):
        found, wanted = (tree[metric].total / tree[metric].count for tree in (means, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_accumulation_and_chunking_change_nothing(model, lora, name, in_one_block):
    """Micro-batches of one item, one of them empty; blocks of a few items; clients under vmap."""
    whole, means = in_one_block(name)
    assert np.isfinite(means["loss"].total).all() and float(means["grad_norm"].total.sum()) > 0
    close(trained(model, lora, name, (16, 1), {}, at_once=3, limit=60)[0], whole)


@pytest.mark.parametrize(
    "name, settings",
    OPTIONS,
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
)
def test_accumulation_changes_nothing_with_denominators_of_the_whole_step(
    model, lora, name, settings
):
    whole, _ = trained(model, lora, name, (1, 16), settings)
    close(trained(model, lora, name, (4, 4), settings, limit=1)[0], whole)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_without_rows_trains_nothing(model, lora, name):
    algorithm = make(name, 2, 1, {})
    shape = choose_block_shape(
        [], algorithm.layout.rows_per_group, algorithm.layout.num_packs, P, T, 64
    )
    shape = dataclasses.replace(shape, groups=2)
    block = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), stack_blocks([[]], shape, 1)[0])
    number = len(algorithm.references(algorithm.init_state(lora, 4, T), lora))
    batch = block.rows.replace(
        ref_logprobs=jnp.zeros((2 * algorithm.layout.rows_per_group, number, T))
    )
    numbers = NUMBERS.get(name, {})
    scorer = TokenLogprobs(make_decoder(model, targets=TARGETS), model.base, 64)

    def value(tree):
        lp = unpack_rows(block, algorithm.forward(scorer, tree, block, (lora,) * number))
        counts = algorithm.denominators(batch, jax.lax.stop_gradient(lp), numbers)
        return algorithm.loss(batch, lp, counts, numbers)[0]

    found, grads = jax.jit(jax.value_and_grad(value))(lora)
    assert float(found) == 0.0
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_grpos_ratio_is_exactly_one_at_the_first_update(model, lora):
    _, means = trained(
        model, lora, "grpo", (1, 16), {"kl_weight": 0.0, "clip_low": 0.0, "clip_high": 0.0}
    )
    assert (
        float(means["clip_fraction"].total.sum()) == 0.0
        and float(means["clip_fraction"].count.sum()) > 0
    )
