"""Local training and its mapping over clients: every execution path against one oracle."""

import dataclasses
import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_cohort import MARGIN, A, B, C, P, S, T, close, local_config, make_decoder, spear

from spear_jax.core.mesh import base_placer, make_mesh, replicate, shard_rows
from spear_jax.federated import local_training
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.models.decoder import REMAT
from spear_jax.models.token_logprobs import LOGITS, TokenLogprobs, token_logprobs
from spear_jax.packing import shape_buckets

TRAIN = jax.jit(local_training.train_cohort, static_argnums=(0, 1, 2, 3, 4, 5))


def merged(cohort):
    """Every step's micro-batches as one."""
    return [[[sum(step, [])] for step in client] for client in cohort]


def run(
    model,
    lora,
    cohort,
    decoder=None,
    algorithm=None,
    local=None,
    devices=1,
    split=1,
    active=None,
    weight=None,
    references=(),
    loss_scalars=None,
    limit=64,
    small=False,
    shared_prefix=(),
    transforms=(),
):
    decoder = decoder or make_decoder(model)
    local = local or local_config()
    algorithm = algorithm or spear()
    mesh = make_mesh(jax.devices()[:devices], split)
    size = local_training.padded_clients(C, local.clients_at_once, devices // split)
    pad = lambda x: np.concatenate([np.asarray(x), np.zeros((size - C, *x.shape[1:]), x.dtype)])
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(9), C)))
    weight = np.arange(1, C + 1, dtype=np.float32) if weight is None else weight
    active = np.ones(C, bool) if active is None else active
    longest = max(len(row.prompt) for client in cohort for row in sum(sum(client, []), []))
    work = dense.work(
        cohort, algorithm, longest, T, local.normalize, limit, size, small, shared_prefix
    )
    arrays = shard_rows((work, pad(keys), pad(weight), pad(active)), mesh)
    place = base_placer(mesh)
    base = jax.tree_util.tree_map_with_path(lambda path, x: place(path[-1].name, x), model.base)
    shared = replicate(
        local_training.Broadcast(lora, {}, references, loss_scalars or {}, jnp.float32(1e-2)), mesh
    ).replace(base=base)
    reduced, means, _ = TRAIN(
        algorithm,
        decoder,
        local,
        mesh,
        Aggregation(transforms=transforms),
        False,
        shared,
        None,
        *arrays,
    )
    return *reduced, means


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_gradient_is_scattered(model, lora, prefixed, at_once):
    """A GPU adds what is scattered by atomics, in another order each time."""
    prefix, cohort, _ = prefixed
    work = dense.work(cohort, spear(), P + 20, T, shared_prefix=prefix)
    shared = local_training.Broadcast(lora, model.base, (), {}, jnp.float32(1e-2))
    members = np.zeros((C, 2), np.uint32), np.ones(C, np.float32), np.ones(C, bool)
    decoder, local = make_decoder(model, dropout=0.1), local_config(clients_at_once=at_once)
    mesh = make_mesh(jax.devices()[:1])
    static = spear(), decoder, local, mesh, Aggregation(), False
    assert "scatter" not in TRAIN.lower(*static, shared, None, work, *members).as_text()


@pytest.fixture(scope="module")
def oracle(model, lora, cohort):
    """Clients one after the other on one device, several blocks a step, all of one shape."""
    return run(model, lora, cohort)


@pytest.fixture(scope="module")
def dropout_oracle(model, lora, cohort):
    return run(model, lora, cohort, decoder=make_decoder(model, dropout=0.1))


def same_numbers(left, right, bound=1e-5):
    """Adapters within `bound` of their norm, mass and metrics of the clients within rounding."""
    close(left[0], right[0], bound)
    assert float(left[1]) == float(right[1]) == sum(range(1, C + 1))
    for name, mean in right[2].items():
        one, other = (jax.tree.leaves(x) for x in (left[2][name], mean))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a[:C], b[:C], rtol=1e-4, atol=1e-5, err_msg=name)


def test_blocks_of_the_smaller_shape_give_the_same_adapter_and_metrics(model, lora, cohort, oracle):
    fits = dense.work(cohort, spear(), P, T, small=True).fits
    assert fits.any() and not fits.all()
    same_numbers(run(model, lora, cohort, small=True), oracle)


@pytest.fixture(scope="module")
def prefixed(model, lora, cohort):
    """A prefix, the cohort's prompts behind it, and what they give where each is read whole."""
    prefix = np.random.default_rng(3).integers(3, model.config.vocab_size, 20).tolist()
    behind = lambda rows: [dataclasses.replace(row, prompt=[*prefix, *row.prompt]) for row in rows]
    cohort = [[[behind(micro) for micro in step] for step in client] for client in cohort]
    return prefix, cohort, run(model, lora, cohort)


@pytest.mark.parametrize("at_once, small, limit", [(1, True, 64), (3, False, 1000)])
def test_what_all_prompts_open_with_is_read_once_a_block_and_changes_nothing(
    model, lora, prefixed, at_once, small, limit
):
    prefix, cohort, wanted = prefixed
    batches = dense.work(cohort, spear(), P + 20, T, limit=limit, small=small, shared_prefix=prefix)
    assert batches.fits.any() == small and (batches.count.max() > 1) == (limit == 64)
    local = local_config(clients_at_once=at_once)
    found = run(
        model, lora, cohort, None, spear(), local, limit=limit, small=small, shared_prefix=prefix
    )
    same_numbers(found, wanted)


@pytest.mark.parametrize("at_once, small", [(1, True), (3, False)])
def test_attention_by_many_tiles_gives_the_same_adapter_and_metrics(
    model, lora, cohort, oracle, monkeypatch, at_once, small
):
    """In one block a step, beside the oracle's several."""
    trees = P + 2 * (T - 1)
    assert len(shape_buckets.split_tiles(trees)) == 1
    monkeypatch.setattr(shape_buckets, "TILE_WIDTH", 8)
    assert len(shape_buckets.split_tiles(trees)) == 3
    batches = dense.work(cohort, spear(), P, T, limit=1000, small=small)
    assert batches.count.max() == 1 and batches.fits.any() == small
    local = local_config(clients_at_once=at_once)
    same_numbers(run(model, lora, cohort, local=local, limit=1000, small=small), oracle)


def plain_step_loss(model, decoder, lora, step):
    """One optimiser step's loss in plain arithmetic over full logits; `step` is a list of
    micro-batches.
    """
    rows = sum(step, [])
    masks = np.array([np.pad(row.loss_mask, (0, T - len(row.loss_mask))) for row in rows])
    signs = np.array([row.label * row.weight for row in rows], np.float32)
    tokens = dense.padded(rows, P, T)
    return _plain_loss(decoder, lora, model.base, *tokens, masks.astype(np.float32), signs)


@functools.partial(jax.jit, static_argnums=0)
def _plain_loss(decoder, lora, base, tokens, mask, m, signs):
    """Args: m: float32[B, T], tokens that the loss counts; signs: the weight, negative in a lose."""
    lp = dense.token_logprobs(decoder, lora, base, tokens, mask, T)
    p = jnp.where(m > 0, jnp.exp(lp), 0.0)
    u = jnp.where(p > MARGIN, -jnp.log(1 - p + 1e-8), 0.0)
    win, lose = (signs > 0)[:, None] * m, (signs < 0)[:, None] * m
    confidence = jnp.abs(signs)[:, None]
    wins, loses = -(win * lp).sum() / win.sum(), (confidence * lose * u).sum() / lose.sum()
    return wins + 0.5 * loses


plain_gradient = jax.grad(plain_step_loss, argnums=2)


def plain_adamw(model, lora, steps):
    """The adapter behind AdamW steps on the plainly written loss."""
    decoder = make_decoder(model)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.01))

    @jax.jit
    def apply(grads, state, theta):
        updates, state = optimiser.update(grads, state, theta)
        return optax.apply_updates(theta, updates), state

    theta, state = lora, optimiser.init(lora)
    for step in steps:
        theta, state = apply(plain_gradient(model, decoder, theta, step), state, theta)
    return theta


def test_a_clients_round_equals_adamw_on_the_plainly_written_loss(model, lora, cohort):
    weight = np.zeros(C, np.float32)
    weight[2] = 1.0
    total, mass, _ = run(model, lora, cohort, weight=weight)
    assert float(mass) == 1.0
    theta = plain_adamw(model, lora, cohort[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), total, theta)


def test_rows_that_repeat_or_share_a_prompt_count_as_if_each_stood_alone(model, lora, cohort):
    # the same win four times, its prompt under two loses, one of them twice: 8 rows, 3 distinct, 1
    # prompt
    win, lose = cohort[0][0][0][0], cohort[0][0][0][B]
    loses = [
        dataclasses.replace(lose, prompt=list(win.prompt), weight=0.5),
        dataclasses.replace(lose, prompt=win.prompt),
    ]
    other = dataclasses.replace(cohort[0][0][1][B], prompt=list(win.prompt))
    step = [[win, win, loses[0], loses[1]], [win, win, other, other]]
    found, mass, _ = run(model, lora, [[step] * S] * C)
    theta = plain_adamw(model, lora, [step] * S)
    near = lambda a, b: np.testing.assert_allclose(a / float(mass), b, rtol=1e-4, atol=2e-6)
    jax.tree.map(near, found, theta)
    assert [int(x) for x in dense.work([[step]], spear(), P, T).count[0]] == [1]


def test_any_block_size_gives_the_same_adapters(model, lora, cohort, oracle):
    # blocks of 1,000 tokens: test_attention_by_many_tiles
    work = [dense.work(cohort, spear(), P, T, limit=limit) for limit in (1000, 64, 1)]
    blocks = [int(x.count.max()) for x in work]
    assert blocks[0] == 1 < blocks[1] < blocks[2]
    same_numbers(run(model, lora, cohort, limit=1), oracle)


@pytest.mark.parametrize(
    "at_once, devices, split", [(3, 1, 1), (1, 8, 1), (3, 8, 1), (1, 4, 2), (3, 8, 4)]
)
def test_any_clients_at_once_on_any_mesh_gives_the_same_adapters(
    model, lora, cohort, dropout_oracle, at_once, devices, split
):
    found = run(
        model,
        lora,
        cohort,
        decoder=make_decoder(model, dropout=0.1),
        local=local_config(clients_at_once=at_once),
        devices=devices,
        split=split,
    )
    # A split base sums in another order. Adam divides a gradient by its size, so where that is near
    # zero its rounding is seen: 4e-6 to 1e-5, the machine decides.
    same_numbers(found, dropout_oracle, 1e-5 if split == 1 else 1e-4)


def test_dropout_changes_the_adapters(oracle, dropout_oracle):
    differ = jax.tree.map(
        lambda a, b: not np.allclose(a, b, atol=1e-4), oracle[0], dropout_oracle[0]
    )
    assert all(jax.tree.leaves(differ))


def test_active_denominator_is_exact_under_accumulation(model, lora, cohort, oracle):
    once = run(
        model,
        lora,
        merged(cohort),
        algorithm=spear(batch_size=A * B, accumulation=1, ul_denominator="active"),
    )
    twice = run(model, lora, cohort, algorithm=spear(ul_denominator="active"), limit=1)
    close(twice[0], once[0])
    assert not np.allclose(oracle[0].q.b, twice[0].q.b, atol=1e-7)  # whose denominator is masked


@pytest.mark.parametrize("weighting, limit", [("per_token", 10_000), ("batch_mean", 1)])
def test_micro_normalisation_is_the_mean_of_micro_batch_means(
    model, lora, cohort, weighting, limit
):
    decoder, algorithm = make_decoder(model), spear(confidence_weighting=weighting)
    local = local_config(normalize="micro", max_grad_norm=1e9)
    # as `Spear.pools` gives them: under batch_mean all loses of a micro-batch have their mean
    # confidence
    cohort = [
        [[m[:B] + algorithm._alike(m[B:]) for m in step] for step in client] for client in cohort
    ]
    wanted = np.mean([plain_step_loss(model, decoder, lora, [micro]) for micro in cohort[0][0]])
    first = [[client[0]] for client in cohort]  # one step, so that the loss is that of `lora`
    _, _, means = run(model, lora, first, algorithm=algorithm, local=local, limit=limit)
    assert float(means["loss"].total[0]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(means["loss"].count[0]) == 1


def test_metrics_are_summed_over_steps(oracle):
    np.testing.assert_array_equal(oracle[2]["loss"].count, S)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "attention"])
def test_rematerialisation_changes_nothing(model, lora, cohort, oracle, remat):
    same_numbers(run(model, lora, cohort, decoder=make_decoder(model, remat=remat)), oracle)


def test_clients_that_do_not_train_contribute_the_global_adapter(model, lora, cohort):
    active = np.zeros(C, bool)
    total, mass, means = run(model, lora, cohort, active=active)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / float(mass), b, rtol=1e-6), total, lora
    )
    assert float(means["loss"].count.sum()) == 0.0


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(model, lora, cohort):
    broken = model.base.replace(norm=model.base.norm * jnp.nan)
    weight = np.zeros(C, np.float32)
    weight[0] = 1.0
    total, _, means = run(dataclasses.replace(model, base=broken), lora, cohort, weight=weight)
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


def test_prox_and_anchor_hold_clients_near_the_global_adapter(model, lora, cohort, oracle):
    free = distance(oracle[0], lora)
    for name, value in (("prox", 100.0), ("anchor_weight", 1e4)):
        held = run(model, lora, cohort, local=local_config(**{name: value}))
        assert distance(held[0], lora) < 0.95 * free


def test_prox_gradient_is_mu_times_the_distance_and_the_published_anchor_has_none(lora):
    moved = jax.tree.map(lambda x: x + 0.5, lora)

    def regulariser(**changes):
        value = lambda t: local_training._regulariser(local_config(**changes), t, lora)
        return jax.jit(jax.value_and_grad(value))(moved)

    jax.tree.map(lambda g: np.testing.assert_allclose(g, 1.5, rtol=1e-4), regulariser(prox=3.0)[1])
    value, grads = regulariser(anchor_weight=1e4, anchor_gradient=False)
    # every tensor of every layer has a mean of 0.25
    assert float(value) == pytest.approx(2500 * sum(len(x) for x in jax.tree.leaves(lora)))
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    same, grads = regulariser(anchor_weight=1e4)
    assert float(same) == float(value) and all(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_a_client_without_a_finite_update_is_left_out_and_counted(model, lora, cohort, bad):
    """NaN, and numbers whose squares float32 does not hold; against a cohort without them."""

    def spoil(update):
        return jax.tree.map(lambda x: jnp.where(update.q.a.sum() > 0, bad, x), update)

    found = run(model, lora, cohort, transforms=(spoil,))
    counts = found[2].pop(local_training.NOT_FINITE)
    left_out = np.asarray(counts.total) > 0
    assert 0 < left_out.sum() < C and np.array_equal(counts.count, np.ones(C))
    weight = np.where(left_out, 0, np.arange(1, C + 1)).astype(np.float32)
    wanted = run(model, lora, cohort, active=~left_out, weight=weight)
    assert float(found[1]) == float(wanted[1]) == weight.sum()
    close(found[0], wanted[0])
    for name, mean in found[2].items():
        np.testing.assert_allclose(mean.total, wanted[2][name].total, rtol=1e-4, err_msg=name)


def test_ema_returns_the_blend_of_old_and_new(model, lora, cohort, oracle):
    whole = oracle[0]
    half = run(model, lora, cohort, local=local_config(ema_decay=0.25))[0]
    mass = sum(range(1, C + 1))
    jax.tree.map(
        lambda h, w, old: np.testing.assert_allclose(
            h, 0.25 * mass * old + 0.75 * w, rtol=1e-4, atol=1e-5
        ),
        half,
        whole,
        lora,
    )


def test_head_chunks_change_nothing_and_its_gradient_matches_full_logits(model, lora, cohort):
    decoder, rows = make_decoder(model), cohort[0][0][0]
    work = dense.work([[[rows]]], spear(), P, T, limit=1000)
    block = jax.tree.map(lambda x: jnp.asarray(x[0, 0, 0]), work.blocks)
    slopes = jax.random.normal(jax.random.key(3), block.target.shape)

    @functools.partial(jax.jit, static_argnums=1)
    def objective(lora, chunk):
        lp = TokenLogprobs(decoder, model.base, chunk).logprobs(lora, block)
        return (slopes * jnp.where(used, lp, 0.0)).sum()

    places = np.zeros((len(block.start), T), int)
    for slot, start in enumerate(block.start):
        places[slot] = start + np.arange(T)
    real = np.asarray(block.rows.completion_mask)
    used = np.zeros(block.target.shape, bool)
    used[places[real]] = True

    # packing reorders rows: each is found again by its completion
    order = [
        next(i for i, row in enumerate(rows) if matches(block, slot, row))
        for slot in np.flatnonzero(real.any(1))
    ]
    tokens = dense.padded([rows[i] for i in order], P, T)

    @jax.jit
    def plain(lora):
        lp = dense.token_logprobs(decoder, lora, model.base, *tokens, T)
        where = jnp.asarray(places[real.any(1)])
        return (
            jnp.where(real[real.any(1)], lp * slopes[jnp.minimum(where, len(slopes) - 1)], 0.0)
        ).sum()

    oracle = jax.value_and_grad(plain)(lora)
    for chunk in (0, 1, 7, 10_000):
        value, grads = jax.value_and_grad(objective)(lora, chunk)
        assert float(value) == pytest.approx(float(oracle[0]), rel=1e-5)
        close(grads, oracle[1])


def test_the_heads_memory_does_not_grow_with_the_vocabulary():
    positions, width = 4096, 16
    shapes = lambda vocab: (
        jax.ShapeDtypeStruct((positions, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((positions,), jnp.int32),
    )

    def plain(hidden, head, target):
        return jnp.take_along_axis(
            jax.nn.log_softmax(hidden @ head.T), target[:, None], axis=-1
        ).sum()

    def held(loss, vocab):
        """Bytes of everything but arguments and results, out of the compiler."""
        return (
            jax.jit(jax.grad(loss))
            .lower(*shapes(vocab))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    fused = [
        held(lambda *x: token_logprobs(*x, 0).sum(), vocab) for vocab in (16_384, 65_536, 152_064)
    ]
    assert max(fused) <= 1.1 * min(fused) <= 4 * 4.4 * LOGITS
    assert held(plain, 152_064) >= 4 * positions * 152_064 > 2 * max(fused)


def matches(block, slot, row):
    start, length = int(block.start[slot]), int(block.rows.completion_mask[slot].sum())
    return block.target[start : start + length].tolist() == row.completion


def test_the_base_enters_every_product_unbatched_however_many_clients_run(model, lora, cohort):
    decoder = make_decoder(model)
    shared = local_training.Broadcast(lora, model.base, (), {}, jnp.float32(1e-2))
    text = TRAIN.lower(
        spear(), decoder, local_config(clients_at_once=C), make_mesh(jax.devices()[:1]), Aggregation(), False, shared, None,
        dense.work(cohort, spear(), P, T), np.zeros((C, 2), np.uint32), np.ones(C, np.float32), np.ones(C, bool),
    ).as_text()  # fmt: skip
    layers, width, vocab = model.config.layers, model.config.width, model.config.vocab_size
    assert f"tensor<{vocab}x{width}xf32>" in text
    mlp = model.config.mlp_width
    for copies in (f"{C}x{vocab}x{width}", f"{C}x{layers}x{width}x{mlp}", f"{C}x{width}x{mlp}"):
        assert f"tensor<{copies}xf32>" not in text
