"""Which prompts are generated together: everybody once, within the rows and tokens allowed, in
shapes that are open.
"""

import dataclasses

import jax
import numpy as np
import pytest

from spear_jax.models import cost_model
from spear_jax.models.config import parse_config
from spear_jax.packing.prefix_tree import holds_prompts
from spear_jax.packing.shape_buckets import ShapeBuckets
from spear_jax.rollout import prefill
from spear_jax.rollout.token_sampling import SamplingConfig

CONFIG = SamplingConfig(
    max_new_tokens=16, temperature=1.0, top_k=0, top_p=1.0, eos_ids=(), pad_id=0, max_rows=64, max_tokens=1600,
    read_tokens=300,
)  # fmt: skip

SHAPE = {
    "model_type": "llama", "vocab_size": 10, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 6, "tie_word_embeddings": True,
}  # fmt: skip


def make_prompts(count, seed=0, low=20, high=81):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 999, rng.integers(low, high)).tolist() for _ in range(count)]


def plan(prompts, groups=None, shapes=None, devices=1, **changes):
    groups = [list(range(len(prompts)))] if groups is None else groups
    config = dataclasses.replace(CONFIG, **changes)
    return prefill.plan_prefill(
        config, groups, prompts, devices, ShapeBuckets() if shapes is None else shapes
    )


@pytest.mark.parametrize(
    "count, groups, devices", [(1, 1, 1), (7, 1, 1), (50, 1, 1), (51, 4, 4), (30, 3, 1), (2, 8, 8)]
)
def test_every_prompt_stands_in_one_part_of_its_own_group(count, groups, devices):
    prompts = make_prompts(count)
    own = [list(range(count))[group::groups] for group in range(groups)]
    found, dealt = plan(prompts, own, devices=devices)
    assert found.rows >= found.batch
    for group in range(groups):
        assert sorted(i for part in dealt for i in part[group]) == own[group]
    for part in dealt:
        assert max(map(len, part)) <= found.batch and any(part)
        assert holds_prompts(found.pack_shape, [[prompts[i] for i in rows] for rows in part])


def test_where_prompts_wait_a_part_takes_a_third_of_the_slots_at_most():
    prompts = make_prompts(60)
    assert plan(prompts, max_rows=12, max_tokens=100_000, read_tokens=10_000)[0].batch == 4
    assert plan(prompts, max_rows=60, max_tokens=100_000, read_tokens=10_000)[0].batch == 60


def test_what_prompts_open_with_is_left_out_of_their_parts():
    tails = make_prompts(30)
    whole = [[7] * 24 + tail for tail in tails]
    roomy = dataclasses.replace(CONFIG, max_tokens=100_000)
    found, dealt = prefill.plan_prefill(
        roomy, [list(range(30))], whole, 1, ShapeBuckets(), shared_prefix=24
    )
    bare, same = plan(tails, max_tokens=100_000)
    assert dealt == same and found.pack_shape.tokens == bare.pack_shape.tokens
    assert found.width >= max(map(len, whole))  # of the cache, which holds the opening too


@pytest.mark.parametrize("allowed", [200, 900, 1600, 100_000])
def test_a_batch_keeps_to_the_tokens_and_rows_allowed(allowed):
    prompts = make_prompts(50)
    found, _ = plan(prompts, max_tokens=allowed)
    assert found.rows <= 64
    # a batch of a single row is as small as batches get
    assert found.rows * (found.width + CONFIG.max_new_tokens) <= allowed or found.rows == 1
    fewer, _ = plan(prompts, max_rows=5)
    assert fewer.rows <= 5


def test_a_pass_reads_about_the_tokens_allowed_and_parts_are_even():
    prompts = make_prompts(64, low=40, high=61)
    found, dealt = plan(prompts, max_tokens=100_000, read_tokens=800)
    read = [sum(len(prompts[i]) for i in part[0]) for part in dealt]
    assert max(read) <= 800 and max(read) - min(read) <= 60 and sum(map(len, prompts)) == sum(read)
    assert found.pack_shape.tokens < 1.15 * max(read)


def test_equal_prompts_are_read_together():
    prompts = [prompt for prompt in make_prompts(6) for _ in range(4)]
    _, dealt = plan(prompts)
    parts = [part[0] for part in dealt]
    # each of the six is split at most where a part is full
    assert sum(len({tuple(prompts[i]) for i in part}) for part in parts) <= 6 + len(parts)


def test_once_frozen_any_number_of_prompts_goes_through_an_open_shape():
    shapes = ShapeBuckets()
    first, _ = plan(make_prompts(20), shapes=shapes)
    shapes.freeze()
    for count in (1, 3, 19, 45, 200):
        prompts = make_prompts(count, seed=count)
        found, dealt = plan(prompts, shapes=shapes)
        assert found == first
        assert sorted(i for part in dealt for i in part[0]) == list(range(count))
    longer, _ = plan([[5] * 400], shapes=shapes)  # which nothing open holds
    assert longer.width >= 400


def test_an_open_shape_that_wastes_little_is_taken_again():
    shapes = ShapeBuckets()
    first, _ = plan(make_prompts(20, low=50, high=60), shapes=shapes)
    again, _ = plan(make_prompts(20, seed=1, low=50, high=60), shapes=shapes)
    short, _ = plan(make_prompts(20, low=5, high=10), shapes=shapes)
    assert again == first and short.width < first.width


def limits(model, megabytes=0, rows=0, weights=0, devices=1):
    return cost_model.generation_limits(model, 4, megabytes, rows, weights, devices)


def test_the_cache_holds_the_megabytes_given():
    model = parse_config(SHAPE)
    each = 2 * model.layers * model.kv_heads * model.head_width * 4
    assert limits(model, megabytes=3).tokens == 3_000_000 // each
    assert limits(model).tokens == 272_000_000 // each  # the CPU's default
    assert limits(model).rows == 64 and limits(model, rows=7).rows == 7


@pytest.fixture
def card(monkeypatch):
    """A card of 64 GB, as far as JAX tells of it."""

    class Card:
        def memory_stats(self):
            return {"bytes_limit": 64_000_000_000}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Card()])


def test_a_card_completes_a_papers_round_at_once(card):
    model = parse_config(
        SHAPE | {"num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12}
    )
    allowed = limits(model, weights=3_000_000_000)
    each = 28 * 2 * 2 * 128 * 4
    assert allowed.tokens == 16_000_000_000 // each  # a quarter of the memory
    prompts = make_prompts(480, low=60, high=241)
    changes = dict(max_new_tokens=20, max_tokens=allowed.tokens, read_tokens=allowed.read_tokens)
    found, dealt = plan(prompts, max_rows=allowed.rows, **changes)
    assert found.rows >= 480 and sum(len(part[0]) for part in dealt) == 480
    assert plan(prompts, max_rows=limits(model, rows=64).rows, **changes)[0].rows == 64
    assert prefill.fewer_rows(found.rows) == [found.rows // 4, found.rows // 16]


def test_a_base_that_leaves_little_memory_leaves_little_to_the_cache(card):
    model = parse_config(SHAPE)
    each = 2 * model.layers * model.kv_heads * model.head_width * 4
    # the base and two copies, 17 GB of 64 each, and half of the rest
    assert limits(model, weights=17_000_000_000).tokens == 6_500_000_000 // each
    # rows are counted over all devices
    assert limits(model, devices=4).rows == 4 * limits(model).rows > 4 * 480
