"""Generation: filters against numpy, batching invariances, stopping, and buckets."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.core import compilation
from spear_jax.core.mesh import base_placer, make_mesh, replicate, shard_rows
from spear_jax.core.rng import path_key
from spear_jax.models import decoder as decoder_module
from spear_jax.models.decoder import Decoder, logits, merge, unstack
from spear_jax.models.io.huggingface import load_model
from spear_jax.models.lora import LoraConfig, init_lora, merge_lora
from spear_jax.packing import shape_buckets
from spear_jax.rollout import prefill, token_sampling
from spear_jax.rollout import sampler as sampler_module
from spear_jax.rollout.sampler import Sampler
from spear_jax.rollout.token_sampling import SamplingConfig

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q", "v"))


@pytest.fixture(scope="module")
def model():
    return load_model(str(FIXTURES / "llama"), "float32")


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model.config, LORA)


def settings(**changes):
    defaults = dict(
        max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0, eos_ids=(-1,), pad_id=0, max_rows=16
    )
    return SamplingConfig(**(defaults | changes))


def make_prompts(model, count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(3, model.config.vocab_size, rng.integers(2, 40)).tolist() for _ in range(count)
    ]


def make_keys(count):
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(5), count)))


def numpy_keep(row, top_k, top_p):
    """Top-k and nucleus by sorting, in float64."""
    p = np.exp(row - row.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or len(p)]
    q = p[kept] / p[kept].sum()
    enough = int(np.searchsorted(np.cumsum(q), top_p)) + 1 if top_p < 1 else len(kept)
    return set(kept[:enough].tolist())


@pytest.mark.parametrize(
    "top_k, top_p", [(0, 0.9), (5, 1.0), (7, 0.6), (1, 1.0), (0, 0.01), (50, 0.999)]
)
def test_filters_keep_what_sorting_keeps(top_k, top_p):
    rows = np.random.default_rng(1).normal(size=(20, 600)).astype(np.float32) * 3
    share = np.exp(rows - rows.max(-1, keepdims=True))
    kept = np.asarray(token_sampling.nucleus_mask(jnp.asarray(share), top_k, top_p))
    for row, mask in zip(rows.astype(np.float64), kept, strict=True):
        assert set(np.flatnonzero(mask).tolist()) == numpy_keep(row, top_k, top_p)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_threshold_is_the_least_share_of_the_nucleus_by_digits_of_any_size(bits):
    share = np.random.default_rng(2).exponential(size=(20, 600)).astype(np.float32) ** 3
    share /= share.max(-1, keepdims=True)
    runs = token_sampling._in_runs(jnp.asarray(share))
    found = token_sampling._search_digits(runs, lambda x: x, 0.9 * share.sum(-1), bits)
    for row, threshold in zip(share, np.asarray(found), strict=True):
        falling = np.sort(row)[::-1]
        enough = np.searchsorted(np.cumsum(falling, dtype=float), 0.9 * row.sum(dtype=float))
        assert threshold == falling[enough]


def test_on_an_accelerator_a_filter_passes_ten_times_over_the_vocabulary():
    mask = functools.partial(token_sampling.nucleus_mask, top_k=0, top_p=0.9)
    rows = jax.ShapeDtypeStruct((4, 1000), jnp.float32)
    for platform, passes, sums in (("cuda", "10", 7), ("cpu", "30", 1)):
        text = jax.jit(mask).trace(rows).lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"dense<(\d+)> : tensor<i32>\s+%\d+ = \S+compare\s+LT", text) == [passes]
        # sums of runs of 256; they are added up for all thresholds at once
        assert text.count("(tensor<4x4x256xf32>, tensor<f32>) -> tensor<4x4xf32>") == sums


def test_tokens_outside_the_filter_are_never_drawn_and_frequencies_follow_the_tempered_distribution():
    row = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    config = settings(temperature=0.5, top_k=3)
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens, logprobs = token_sampling.sample_token(
        jnp.repeat(row, 4000, 0), keys, jnp.zeros(4000, jnp.int32), config
    )
    # p^2 over the three kept: 0.25, 0.09, 0.0225 of 0.3625
    want = np.array([0.25, 0.09, 0.0225, 0]) / 0.3625
    found = np.bincount(np.asarray(tokens), minlength=4) / 4000
    np.testing.assert_allclose(found, want, atol=4 * np.sqrt(0.25 / 4000))
    np.testing.assert_allclose(
        logprobs, np.asarray(row)[0][np.asarray(tokens)], atol=1e-5
    )  # untempered


def test_a_token_is_where_the_distribution_function_passes_the_random_number():
    rng = np.random.default_rng(3)
    share = np.where(
        rng.random((400, 1000)) < 0.3, rng.exponential(size=(400, 1000)) ** 4, 0.0
    ).astype(np.float32)
    share[:, 0] = share[:, -1] = 0.0
    uniform = rng.random(400, np.float32)
    uniform[:2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    found = np.asarray(token_sampling.inverse_cdf_sample(jnp.asarray(share), jnp.asarray(uniform)))
    ends = np.cumsum(share.astype(np.float64), axis=1) / share.sum(
        1, dtype=np.float64, keepdims=True
    )
    rows = np.arange(400)
    assert (share[rows, found] > 0).all()
    # the token's own stretch of the distribution function holds the number, but for float32's
    # rounding of the sums
    assert (ends[rows, found] > uniform - 1e-5).all()
    assert (ends[rows, found] - share[rows, found] / share.sum(1) <= uniform + 1e-5).all()


def test_rows_batched_together_equal_rows_one_by_one(model, decoder):
    prompts, keys = make_prompts(model, 11), make_keys(11)
    together = Sampler(decoder).generate(None, model.base, prompts, keys, settings())
    for i in range(11):
        alone = Sampler(decoder).generate(
            None, model.base, prompts[i : i + 1], keys[i : i + 1], settings()
        )[0]
        assert alone.tokens == together[i].tokens
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=1e-4)


def test_prompts_prefilled_by_many_tiles_give_the_same_completions(model, decoder, monkeypatch):
    prompts, keys, found = make_prompts(model, 11), make_keys(11), []
    for width, count in ((64, 1), (8, 5)):
        monkeypatch.setattr(shape_buckets, "TILE_WIDTH", width)
        assert len(shape_buckets.split_tiles(max(map(len, prompts)))) == count
        found.append(Sampler(decoder).generate(None, model.base, prompts, keys, settings()))
    for one, other in zip(*found, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_greedy_equals_the_argmax_of_full_forwards(model, decoder):
    prompt = make_prompts(model, 1)[0]
    found = Sampler(decoder).generate(
        None, model.base, [prompt], make_keys(1), settings(temperature=0.0, max_new_tokens=6)
    )[0]
    ids = list(prompt)
    for token, logprob in zip(found.tokens, found.logprobs, strict=True):
        row = logits(decoder, None, model.base, jnp.array([ids]), jnp.ones((1, len(ids)), bool))[
            0, -1
        ]
        assert token == int(jnp.argmax(row))
        assert logprob == pytest.approx(float(jax.nn.log_softmax(row)[token]), abs=1e-4)
        ids.append(token)


def test_generation_stops_at_any_eos_and_keeps_it(model, decoder):
    prompts, keys = make_prompts(model, 8), make_keys(8)
    free = Sampler(decoder).generate(None, model.base, prompts, keys, settings())
    stops = (free[0].tokens[3], free[1].tokens[5])
    stopped = Sampler(decoder).generate(None, model.base, prompts, keys, settings(eos_ids=stops))
    for long, short in zip(free, stopped, strict=True):
        first = next(
            (i for i, token in enumerate(long.tokens) if token in stops), len(long.tokens) - 1
        )
        assert short.tokens == long.tokens[: first + 1]


def watch(monkeypatch, name, note):
    """Calls note(*arguments) before every call of a jitted function of `sampler`."""
    original = getattr(sampler_module, name)

    class Watched:
        lower = original.lower

        def __call__(self, *args):
            note(*args)
            return original(*args)

    monkeypatch.setattr(sampler_module, name, Watched())


def test_finished_rows_leave_the_batch(model, decoder, monkeypatch):
    prompts, keys = make_prompts(model, 16), make_keys(16)
    config = settings(max_new_tokens=24)
    free = Sampler(decoder).generate(None, model.base, prompts, keys, config)
    stops = tuple({c.tokens[1] for c in free[:14]})  # most rows stop at once
    rows = []
    watch(monkeypatch, "_decode_until", lambda *a: rows.append(a[4].completions.live.shape[0]))
    Sampler(decoder).generate(
        None, model.base, prompts, keys, settings(max_new_tokens=24, eos_ids=stops)
    )
    assert rows[0] == 16 and rows[-1] == 4


def some_stops(model, decoder, prompts, keys, config):
    """EOS ids that end completions at many different lengths."""
    free = Sampler(decoder).generate(None, model.base, prompts, keys, config)
    return tuple({c.tokens[3 * i % config.max_new_tokens] for i, c in enumerate(free)})


def test_a_slot_that_falls_free_takes_the_next_prompt_while_others_go_on(
    model, decoder, monkeypatch
):
    prompts, keys, config = make_prompts(model, 23), make_keys(23), settings(max_new_tokens=24)
    config = dataclasses.replace(
        config, eos_ids=some_stops(model, decoder, prompts[:8], keys[:8], config)
    )
    together = Sampler(decoder).generate(
        None, model.base, prompts, keys, dataclasses.replace(config, max_rows=32)
    )
    assert len({len(c.tokens) for c in together}) > 5
    going, rows = [], []

    def read(*args):
        going.append(int(args[4].completions.live.sum()))
        rows.append(args[4].completions.live.shape[0])

    watch(monkeypatch, "_prefill", read)
    few = Sampler(decoder).generate(
        None, model.base, prompts, keys, dataclasses.replace(config, max_rows=6)
    )
    assert set(rows) == {6} and len(rows) >= 11  # parts of two
    # every read but the first three finds others in the middle of their completions
    assert min(going[3:]) > 0
    for one, other in zip(few, together, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_looking_seldom_at_which_sequences_go_on_changes_no_completion(model, decoder, monkeypatch):
    prompts, keys, config = make_prompts(model, 16), make_keys(16), settings(max_new_tokens=24)
    stops = some_stops(model, decoder, prompts[:8], keys[:8], config)
    config = dataclasses.replace(config, eos_ids=stops, max_rows=6)
    often = Sampler(decoder).generate(None, model.base, prompts, keys, config)
    begun, seldom = [], dataclasses.replace(config, steps_per_check=8)
    watch(monkeypatch, "_decode_until", lambda *a: begun.append(int(a[5])))
    found = Sampler(decoder).generate(None, model.base, prompts, keys, seldom)
    assert len(begun) > 3 and all(column % 8 == 0 for column in begun)  # of a ring of 72
    for one, other in zip(found, often, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert repr(seldom) == repr(config)  # which names the shapes in a checkpoint


@pytest.mark.parametrize("own", [False, True])
def test_what_prompts_open_with_is_read_once_and_changes_nothing(model, decoder, monkeypatch, own):
    shared_prefix = np.random.default_rng(8).integers(3, 60, 20).tolist()
    prompts, keys = [shared_prefix + p for p in make_prompts(model, 12)], make_keys(12)
    lora = init_lora(jax.random.key(1), LORA, model.config)
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    owners = None
    if own:
        lora = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 0 * x], axis=1), lora)
        owners = np.arange(12, dtype=np.int32) % 3
    read = []
    watch(monkeypatch, "_prefill", lambda *a: read.append(a[6].tokens.size))
    config = settings()
    without = Sampler(decoder).generate(lora, model.base, prompts, keys, config, owners=owners)
    whole, read[:] = sum(read), []
    sampler = Sampler(
        decoder, shared_prefixes=[shared_prefix[:16], shared_prefix, [*shared_prefix, 1]]
    )
    found = sampler.generate(lora, model.base, prompts, keys, config, owners=owners)
    assert sum(read) <= whole - 8 * 20  # of twelve prompts; rooms are rounded up
    for one, other in zip(found, without, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    if not own:  # where not all prompts open so, all are read whole
        bare = sampler.generate(
            lora, model.base, [[5, 6], *prompts], np.insert(keys, 0, 0, axis=0), config
        )[1:]
        assert [c.tokens for c in bare] == [c.tokens for c in without]
        unrolled = sampler.generate(lora, unstack(model.base), prompts, keys, config)
        assert [c.tokens for c in unrolled] == [c.tokens for c in without]


@pytest.mark.parametrize("devices, split", [(1, 1), (4, 1), (2, 2), (4, 2)])
def test_slots_on_a_mesh_give_what_slots_on_one_device_give_and_compile_once(
    model, decoder, devices, split
):
    prompts, keys, config = make_prompts(model, 30), make_keys(30), settings(max_rows=8)
    shared_prefix = prompts[0][:1]
    prompts = [shared_prefix + p for p in prompts]
    config = dataclasses.replace(
        config, eos_ids=some_stops(model, decoder, prompts[:6], keys[:6], config)
    )
    one = Sampler(decoder).generate(None, model.base, prompts, keys, config)
    mesh = make_mesh(jax.devices()[:devices], split)
    base = load_model(str(FIXTURES / "llama"), "float32", base_placer(mesh)).base
    place, spread = (
        functools.partial(shard_rows, mesh=mesh),
        functools.partial(replicate, mesh=mesh),
    )
    groups = devices // split
    sampler = Sampler(decoder, place, groups, spread=spread, shared_prefixes=[shared_prefix])
    before, compiled = (
        (sampler_module._prefill._cache_size(), sampler_module._decode_until._cache_size()),
        [],
    )
    named = lambda event, _, fun_name="", **__: (
        compiled.append(fun_name) if event == compilation._EVENT else None
    )
    jax.monitoring.register_event_duration_secs_listener(named)
    found = sampler.generate(None, base, prompts, keys, config)
    assert [c.tokens for c in found] == [c.tokens for c in one]
    # reads into a blank state, one that was read into, and one that was decoded
    assert (sampler_module._prefill._cache_size(), sampler_module._decode_until._cache_size()) == (
        before[0] + 1,
        before[1] + 1,
    )
    # what is compiled before there is a state is what then runs
    assert [compiled.count(name) for name in ("jit(_prefill)", "jit(_decode_until)")] == [1, 1], (
        compiled
    )


def test_a_read_never_holds_what_it_writes_for_all_rows_of_all_layers(model, decoder, monkeypatch):
    held, read = [], sampler_module._prefill
    note = lambda *args: held.append(
        read.lower(*args).compile().memory_analysis().temp_size_in_bytes
    )
    watch(monkeypatch, "_prefill", note)
    # rows 2,016 places wide for prompts of one token, whose first answer ends them
    config = settings(
        max_rows=32, max_new_tokens=2000, eos_ids=tuple(range(model.config.vocab_size))
    )
    Sampler(decoder).generate(None, model.base, [[3 + i] for i in range(32)], make_keys(32), config)
    shape = model.config
    written = 32 * 2016 * 2 * shape.layers * shape.kv_heads * shape.head_width * 4
    assert held[0] < written / 2


def test_what_was_freed_is_given_back_before_keys_and_values_are_there(model, decoder, monkeypatch):
    order, init = [], sampler_module.decode.init_decode_state

    def noted(decoder, config, width, live, dtype):
        if not isinstance(live, jax.core.Tracer):
            order.append("keys and values")
        return init(decoder, config, width, live, dtype)

    monkeypatch.setattr(sampler_module, "release_free_memory", lambda: order.append("given back"))
    monkeypatch.setattr(sampler_module.decode, "init_decode_state", noted)
    Sampler(decoder).generate(None, model.base, make_prompts(model, 3), make_keys(3), settings())
    assert order[-2:] == ["given back", "keys and values"]


def test_each_completion_is_told_once_as_it_finishes(model, decoder, monkeypatch):
    prompts, keys, config = make_prompts(model, 12), make_keys(12), settings(max_rows=4)
    config = dataclasses.replace(config, eos_ids=some_stops(model, decoder, prompts, keys, config))
    told, reads = {}, []
    watch(monkeypatch, "_prefill", lambda *a: reads.append(len(told)))

    def finished(number, completion):
        assert number not in told
        told[number] = completion

    done = Sampler(decoder).generate(None, model.base, prompts, keys, config, finished)
    assert [told[i] for i in range(12)] == done
    assert 0 < reads[-1] < 12  # some before the last prompts were read


def test_an_adapter_beside_the_base_generates_what_the_merged_weights_generate(model, decoder):
    lora = init_lora(jax.random.key(1), LORA, model.config)
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    prompts, keys = make_prompts(model, 5), make_keys(5)
    beside = Sampler(decoder).generate(lora, model.base, prompts, keys, settings())
    merged = Sampler(decoder).generate(
        None, merge_lora(model.base, lora, LORA), prompts, keys, settings()
    )
    assert [c.tokens for c in beside] == [c.tokens for c in merged]


def test_few_adapters_of_clients_are_on_the_devices_at_one_time(model, decoder):
    lora = init_lora(jax.random.key(1), LORA, model.config)
    lora = jax.tree.map(lambda x: np.repeat(np.asarray(x)[:, None], 100, axis=1), lora)
    prompts, owners = [[5, 6]] * 100, np.arange(100)
    found = list(Sampler(decoder)._groups(prompts, 1024, lora, owners))
    assert [jax.tree.leaves(adapters)[0].shape[1] for adapters, _ in found] == [64, 64]
    assert [sum(groups, []) for _, groups in found] == [list(range(64)), list(range(64, 100))]


def test_merging_copies_the_layers_alone(model):
    lora = init_lora(jax.random.key(1), LORA, model.config)
    merged = merge(model.base, lora, LORA)
    assert merged.embed is model.base.embed and merged.head is model.base.head
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert size(merged.layers) == size(model.base.layers) < 0.8 * size(model.base)
    assert merged.layers.gate is model.base.layers.gate  # LORA has none there
    views = unstack(model.base).layers
    copies = decoder_module._copied_layers(model.base.layers, False)
    assert jax.tree.all(jax.tree.map(np.array_equal, views, copies))


@pytest.mark.parametrize("last_layers", [0, 1])
def test_merging_layer_by_layer_adds_what_merging_at_once_does(model, last_layers):
    settings = dataclasses.replace(LORA, last_layers=last_layers)
    lora = init_lora(jax.random.key(1), settings, model.config)
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    one, other = merge(model.base, lora, settings), merge_lora(model.base, lora, settings)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, other)


@pytest.mark.parametrize("own", [False, True])
def test_projections_that_are_joined_for_decoding_give_the_same_completions(
    model, decoder, monkeypatch, own
):
    lora = jax.tree.map(lambda x: x + 0.05, init_lora(jax.random.key(1), LORA, model.config))
    prompts, keys = make_prompts(model, 5), make_keys(5)
    apart = Sampler(decoder).generate(lora, model.base, prompts, keys, settings())
    join = lambda base: base.replace(layers=decoder_module._copied_layers(base.layers, True))
    monkeypatch.setattr(sampler_module, "unstack", join)
    policy = (lora, model.base) if own else (None, merge(model.base, lora, LORA))
    joined = Sampler(decoder).generate(*policy, prompts, keys, settings())
    for one, other in zip(apart, joined, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_frozen_sampler_reuses_compiled_shapes(model, decoder):
    sampler = Sampler(decoder)
    sampler.generate(None, model.base, make_prompts(model, 16), make_keys(16), settings())
    sampler.shapes.freeze()
    before = sampler_module._prefill._cache_size(), sampler_module._decode_until._cache_size()
    for seed in (1, 2, 3):
        short = [p[:20] for p in make_prompts(model, 5 + seed, seed)]
        sampler.generate(None, model.base, short, make_keys(len(short)), settings())
    assert (
        sampler_module._prefill._cache_size(),
        sampler_module._decode_until._cache_size(),
    ) == before


def test_buckets_hold_what_they_are_asked_to_hold():
    for length in range(1, 3000, 7):
        bucket = prefill.length_bucket(length)
        assert bucket >= length and (length <= 16 or bucket < 1.5 * length)
    assert len({prefill.length_bucket(n) for n in range(1, 2048)}) < 30
    assert (
        prefill.fewer_rows(64) == [16, 4]
        and prefill.fewer_rows(19) == [4]
        and prefill.fewer_rows(15) == []
    )


def test_paths_of_keys_do_not_collide_where_the_published_sum_does():
    key = jax.random.key(0)
    data = {
        tuple(np.asarray(jax.random.key_data(path_key(key, r, c))).tolist())
        for r in range(12)
        for c in range(12)
    }
    assert len(data) == 144
