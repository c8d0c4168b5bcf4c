"""Local training and its mapping over clients: every execution path against one oracle."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spear_jax import losses, packing
from spear_jax.algorithms.base import Shell
from spear_jax.algorithms.spear import Spear, SpearSettings
from spear_jax.federated import clients
from spear_jax.federated.clients import LocalConfig
from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.load import load_model
from spear_jax.models.lora import LoraConfig, init_lora
from spear_jax.models.token_logprobs import Scorer
from spear_jax.packing import Row
from spear_jax.types import Batch

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
C, S, A, B, P, T = 6, 2, 2, 2, 9, 5


def spear(batch_size=B, accumulation=A, **changes):
    settings = SpearSettings(lose_weight=0.5, margin=0.001)
    shell = Shell(4, S, accumulation, batch_size, T, 1.0, (2,))
    return Spear(dataclasses.replace(settings, **changes), shell)


def local_config(**changes):
    defaults = dict(
        clients_at_once=1, normalize="global", clip=1.0, weight_decay=0.01, anchor_weight=0.0, anchor_gradient=True,
        prox=0.0, ema_decay=0.0, head_chunk=16,
    )  # fmt: skip
    return LocalConfig(**(defaults | changes))


@pytest.fixture(scope="module")
def model():
    return load_model(str(FIXTURES / "qwen2"), "float32")


def make_decoder(model, dropout=0.0, remat=False):
    return Decoder(model.config, LoraConfig(4, 8.0, dropout, ("q", "v", "down")), remat)


@pytest.fixture(scope="module")
def lora(model):
    tree = init_lora(jax.random.key(1), LoraConfig(4, 8.0, 0.0, ("q", "v", "down")), model.config)
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), tree)


@pytest.fixture(scope="module")
def batches(model):
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size

    def row(label):
        length = int(rng.integers(1, T + 1))
        prompt = rng.integers(3, vocab, rng.integers(2, P + 1)).tolist()
        mask = rng.random(length) < 0.8
        return Row(prompt, rng.integers(3, vocab, length).tolist(), mask, float(rng.choice([0.5, 1.0])), label)

    def micro():
        return packing.pack([row(1) for _ in range(B)] + [row(-1) for _ in range(B)], P, T, 0)

    return packing.stack([[[micro() for _ in range(A)] for _ in range(S)] for _ in range(C)], 3)


def run(
    model,
    lora,
    batches,
    decoder=None,
    algorithm=None,
    local=None,
    devices=1,
    active=None,
    weight=None,
    references=(),
    numbers=None,
):
    decoder = decoder or make_decoder(model)
    local = local or local_config()
    algorithm = algorithm or spear()
    mesh = clients.make_mesh(jax.devices()[:devices])
    size = clients.padded_clients(C, local.clients_at_once, devices)
    pad = lambda x: np.concatenate([np.asarray(x), np.zeros((size - C, *x.shape[1:]), x.dtype)])
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(9), C)))
    weight = np.arange(1, C + 1, dtype=np.float32) if weight is None else weight
    active = np.ones(C, bool) if active is None else active
    batches = jax.tree.map(pad, batches)
    train = jax.jit(clients.train_cohort, static_argnums=(0, 1, 2, 3, 4))
    arrays = clients.shard_rows((batches, pad(keys), pad(weight), pad(active)), mesh)
    shared = clients.replicate(clients.Shared(lora, model.base, references, numbers or {}, jnp.float32(1e-2)), mesh)
    return train(algorithm, decoder, local, mesh, False, shared, None, *arrays)[:3]


def plain_step_loss(model, decoder, lora, batch: Batch):
    """One optimiser step's loss in plain arithmetic over full logits; batch has a leading [A]."""
    win_total = win_count = lose_total = lose_count = 0.0
    for a in range(A):
        one = jax.tree.map(lambda x, a=a: x[a], batch)
        tokens = jnp.concatenate([one.prompt, one.completion], 1)
        mask = jnp.concatenate([one.prompt_mask, one.completion_mask], 1)
        all_logprobs = jax.nn.log_softmax(logits(decoder, lora, model.base, tokens, mask))[:, P - 1 : -1]
        lp = jnp.take_along_axis(all_logprobs, one.completion[..., None], -1)[..., 0]
        p = jnp.exp(lp)
        for i in range(2 * B):
            m = jnp.asarray(one.loss_mask[i], jnp.float32)
            if one.label[i] > 0:
                win_total -= (m * lp[i]).sum()
                win_count += m.sum()
            else:
                u = jnp.where(p[i] > 0.001, -jnp.log(1 - p[i] + 1e-8), 0.0)
                lose_total += one.weight[i, 0] * (m * u).sum()
                lose_count += m.sum()
    return win_total / win_count + 0.5 * lose_total / lose_count


def test_a_clients_round_equals_adamw_on_the_plainly_written_loss(model, lora, batches):
    decoder = make_decoder(model)
    weight = np.zeros(C, np.float32)
    weight[2] = 1.0
    total, mass, _ = run(model, lora, batches, weight=weight)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.01))
    theta, state = lora, optimiser.init(lora)
    for s in range(S):
        step = jax.tree.map(lambda x, s=s: x[2, s], batches)
        grads = jax.grad(lambda t, step=step: plain_step_loss(model, decoder, t, step))(theta)
        updates, state = optimiser.update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
    assert float(mass) == 1.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), total, theta)


def close(left, right):
    """Every tensor within 1e-5 of its norm."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-5 * np.linalg.norm(np.asarray(b))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("at_once", [1, 3, C])
def test_any_clients_at_once_on_any_device_count_gives_the_same_adapters(model, lora, batches, at_once, devices):
    oracle = run(model, lora, batches, decoder=make_decoder(model, dropout=0.1))
    found = run(
        model,
        lora,
        batches,
        decoder=make_decoder(model, dropout=0.1),
        local=local_config(clients_at_once=at_once),
        devices=devices,
    )
    close(found[0], oracle[0])
    assert float(found[1]) == float(oracle[1]) == sum(range(1, C + 1))
    for name, mean in oracle[2].items():
        np.testing.assert_allclose(found[2][name].total[:C], mean.total[:C], rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_step_of_four_rows_equals_two_micro_batches_of_two(model, lora, batches):
    merged = jax.tree.map(lambda x: x.reshape(C, S, 1, A * x.shape[3], *x.shape[4:]), batches)
    once = run(model, lora, merged, algorithm=spear(batch_size=A * B, accumulation=1))
    twice = run(model, lora, batches)
    close(twice[0], once[0])


def test_active_denominator_is_exact_under_accumulation(model, lora, batches):
    settings = dict(ul_denominator="active", margin=0.004)
    merged = jax.tree.map(lambda x: x.reshape(C, S, 1, A * x.shape[3], *x.shape[4:]), batches)
    once = run(model, lora, merged, algorithm=spear(batch_size=A * B, accumulation=1, **settings))
    twice = run(model, lora, batches, algorithm=spear(**settings))
    close(twice[0], once[0])
    masked = run(model, lora, batches, algorithm=spear(margin=0.004))
    assert not np.allclose(masked[0]["q"]["b"], twice[0]["q"]["b"], atol=1e-7)


def test_micro_normalisation_is_the_mean_of_micro_batch_means(model, lora, batches):
    decoder, algorithm = make_decoder(model), spear()
    step = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), batches)
    counts = clients._counts(algorithm, "micro", step, None, None, {})
    each = []
    for a in range(A):
        one = jax.tree.map(lambda x, a=a: x[a], step)
        lp = Scorer(decoder, model.base, 16).logprobs(lora, one)
        own = algorithm.loss(one, lp, algorithm.counts(one, None, {}), {})[0]
        shared = algorithm.loss(one, lp, jax.tree.map(lambda c, a=a: c[a], counts), {})[0]
        each.append((float(own), float(shared)))
    assert sum(shared for _, shared in each) == pytest.approx(sum(own for own, _ in each) / A, rel=1e-6)


def test_rematerialisation_changes_nothing(model, lora, batches):
    close(run(model, lora, batches, decoder=make_decoder(model, remat=True))[0], run(model, lora, batches)[0])


def test_clients_that_do_not_train_contribute_the_global_adapter(model, lora, batches):
    active = np.zeros(C, bool)
    total, mass, means = run(model, lora, batches, active=active)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / float(mass), b, rtol=1e-6), total, lora)
    assert float(means["loss"].count.sum()) == 0.0


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(model, lora, batches):
    broken = {**model.base, "norm": model.base["norm"] * jnp.nan}
    weight = np.zeros(C, np.float32)
    weight[0] = 1.0
    total, _, means = run(dataclasses.replace(model, base=broken), lora, batches, weight=weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), total, lora)
    assert float(means["skipped_steps"].total.sum()) == C * S


def distance(tree, lora):
    return float(
        jnp.sqrt(
            sum(
                ((x / sum(range(1, C + 1)) - y) ** 2).sum()
                for x, y in zip(*map(jax.tree.leaves, (tree, lora)), strict=True)
            )
        )
    )


def test_prox_and_anchor_hold_clients_near_the_global_adapter_and_the_published_anchor_does_not(model, lora, batches):
    free = distance(run(model, lora, batches)[0], lora)
    held = distance(run(model, lora, batches, local=local_config(prox=100.0))[0], lora)
    anchored = distance(run(model, lora, batches, local=local_config(anchor_weight=1e4))[0], lora)
    published = distance(
        run(model, lora, batches, local=local_config(anchor_weight=1e4, anchor_gradient=False))[0], lora
    )
    assert held < 0.95 * free and anchored < 0.95 * free
    assert published == pytest.approx(free, rel=1e-5)


def test_prox_gradient_is_mu_times_the_distance(lora):
    moved = jax.tree.map(lambda x: x + 0.5, lora)
    grads = jax.grad(lambda t: clients._regulariser(local_config(prox=3.0), t, lora))(moved)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 1.5, rtol=1e-4), grads)


def test_ema_returns_the_blend_of_old_and_new(model, lora, batches):
    whole = run(model, lora, batches)[0]
    half = run(model, lora, batches, local=local_config(ema_decay=0.25))[0]
    mass = sum(range(1, C + 1))
    jax.tree.map(
        lambda h, w, old: np.testing.assert_allclose(h, 0.25 * mass * old + 0.75 * w, rtol=1e-4, atol=1e-5),
        half,
        whole,
        lora,
    )


def test_head_chunks_change_nothing_and_its_gradient_matches_full_logits(model, lora, batches):
    decoder = make_decoder(model)
    one = jax.tree.map(lambda x: jnp.asarray(x[0, 0, 0]), batches)

    def objective(lora, chunk):
        return losses.nll(Scorer(decoder, model.base, chunk).logprobs(lora, one), one.loss_mask).total

    oracle = jax.grad(objective)(lora, 10_000)
    for chunk in (1, 7, 20):
        close(jax.grad(objective)(lora, chunk), oracle)


def test_the_base_enters_every_product_unbatched_however_many_clients_run(model, lora, batches):
    decoder = make_decoder(model)
    shared = clients.Shared(lora, model.base, (), {}, jnp.float32(1e-2))
    text = jax.jit(clients.train_cohort, static_argnums=(0, 1, 2, 3, 4)).lower(
        spear(), decoder, local_config(clients_at_once=C), clients.make_mesh(jax.devices()[:1]), False, shared, None,
        batches, np.zeros((C, 2), np.uint32), np.ones(C, np.float32), np.ones(C, bool),
    ).as_text()  # fmt: skip
    layers, width, vocab = model.config.layers, model.config.width, model.config.vocab_size
    assert f"tensor<{vocab}x{width}xf32>" in text
    mlp = model.config.mlp_width
    for copies in (f"{C}x{vocab}x{width}", f"{C}x{layers}x{width}x{mlp}", f"{C}x{width}x{mlp}"):
        assert f"tensor<{copies}xf32>" not in text
