"""Packing: every row stands in its block, shared parts stand once, sizes hold, and little is
padding.
"""

import dataclasses

import jax
import numpy as np
import pytest

from spear_jax.packing import shape_buckets
from spear_jax.packing.arrays import spans
from spear_jax.packing.blocks import choose_block_shape, choose_small, pack_step, stack_blocks
from spear_jax.packing.prefix_tree import (
    fits,
    holds_prompts,
    pack_prompts,
    prompt_shape,
    real_tokens,
    shrink,
)
from spear_jax.packing.rows import TrainingRow, draw, groups_of

P, T = 24, 8


def make_row(rng, prompt=None, label=1):
    ids = lambda low, high: rng.integers(3, 200, rng.integers(low, high + 1)).tolist()
    completion = ids(1, T)
    return TrainingRow(
        prompt or ids(2, P),
        completion,
        rng.random(len(completion)) < 0.7,
        float(rng.random()),
        label,
        0.5,
    )


def make_steps(seed=0, steps=6, rows=12, prompts=5, shared_prefix=()):
    """Steps of single-row groups, drawn with repetition from few prompts with a shared prefix."""
    rng = np.random.default_rng(seed)
    asked = [[*shared_prefix, *make_row(rng).prompt] for _ in range(prompts)]
    pool = [
        make_row(rng, list(asked[rng.integers(prompts)]), int(rng.choice([1, -1])))
        for _ in range(rows)
    ]
    return [[[(pool[i],) for i in rng.integers(len(pool), size=rows)]] for _ in range(steps)]


def read_back(block, row, number=0):
    """(prompt, completion) of a row, walked over a pack as attention sees it."""
    pack, length = block.packs[number], int(block.rows.completion_mask[row].sum())
    start = int(block.start[row])
    source = block.source[number][start : start + length]
    seen = []
    for rows, begin, end in spans(pack.tiles):
        for index, branch in zip(
            pack.token_index[:rows, :end], pack.branch_ids[:rows, :end], strict=True
        ):
            where = [i for i in range(begin, end) if branch[i] >= 0 and index[i] == source[-1]]
            if where:
                last = where[0]
                own = [i for i in range(last + 1) if branch[i] in (0, branch[last])]
                seen = [int(index[i]) for i in own]
    tokens = [int(pack.tokens[i]) for i in seen]
    assert [int(pack.positions[i]) for i in seen] == list(range(len(seen)))
    assert seen[-length:] == list(source)
    return tokens[: len(tokens) - length + 1], block.target[start : start + length].tolist()


PREFIX = list(range(300, 317))


@pytest.fixture(params=[64, 8])
def tiles(request, monkeypatch):
    """Attention grids of one tile, and of several."""
    monkeypatch.setattr(shape_buckets, "TILE_WIDTH", request.param)


@pytest.mark.parametrize("shared_prefix", [[], PREFIX])
@pytest.mark.parametrize("limit", [1, 120, 10_000])
def test_every_row_stands_in_a_block_with_its_prompt_and_what_the_loss_needs(
    limit, shared_prefix, tiles
):
    steps = make_steps(shared_prefix=shared_prefix)
    shape = choose_block_shape(
        steps, 1, 1, P + len(shared_prefix), T, limit, shared_prefix=shared_prefix
    )
    for step in steps:
        packed = []
        for block in pack_step(step, shape):
            for slot in np.flatnonzero(block.rows.label):
                mask = block.rows.completion_mask[slot]
                packed.append(
                    (*read_back(block, slot), block.rows.loss_mask[slot][mask].tolist(), block.rows.weight[slot, 0],
                     int(block.rows.label[slot]), float(block.rows.advantage[slot]))
                )  # fmt: skip
        wanted = [
            (r.prompt, r.completion, r.loss_mask.tolist(), np.float32(r.weight), r.label, 0.5)
            for (r,) in step[0]
        ]
        assert sorted(map(repr, packed)) == sorted(map(repr, wanted))


def test_a_prompt_and_a_repeated_row_are_read_once():
    # 11 rows: one win drawn 6 times and five loses under its prompt: 10 + Σ (completion − 1)
    # tokens, by hand
    rng = np.random.default_rng(1)
    prompt = rng.integers(3, 200, 10).tolist()
    win, *loses = [make_row(rng, list(prompt)) for _ in range(6)]
    step = [[(row,) for row in [win] * 6 + loses]]
    (block,) = pack_step(step, choose_block_shape([step], 1, 1, P, T, 10_000))
    (pack,) = block.packs
    trees, real = int((pack.branch_ids[:, 0] == 0).sum()), real_tokens(pack)
    branches = sum(len(row.completion) - 1 for row in [win, *loses])
    assert (
        real == 10 * trees + branches and trees <= 3
    )  # a tree holds at least two completions of any length
    assert (block.rows.label != 0).sum() == 11 and len(
        set(block.start[block.rows.label != 0].tolist())
    ) == 6


def test_what_all_prompts_open_with_is_read_once_a_block():
    steps = make_steps(shared_prefix=PREFIX)
    rows = [row for (row,) in steps[0][0]]
    shape, plain = (
        choose_block_shape(steps, 1, 1, P + len(PREFIX), T, 10_000, shared_prefix=own)
        for own in (PREFIX, [])
    )
    once, each = (real_tokens(pack_step(steps[0], size)[0].packs[0]) for size in (shape, plain))
    # at least so many trees, all but one of them without it
    assert each - once >= len(PREFIX) * (len({tuple(row.prompt) for row in rows}) - 1) > 0
    empty = stack_blocks([[]], shape, 1)[0]
    assert real_tokens(empty.packs[0]) == 0
    for other in (PREFIX, [5, *PREFIX]):  # nothing behind it; something before it
        with pytest.raises(ValueError, match="does not go on from the shared prefix"):
            pack_step([[(dataclasses.replace(rows[0], prompt=other),)]], shape)


def test_a_groups_rows_stay_together_each_in_its_pack():
    rng = np.random.default_rng(2)
    pairs = []
    for _ in range(7):
        student = make_row(rng)
        pairs.append((student, dataclasses.replace(student, prompt=make_row(rng).prompt, label=-1)))
    shape = choose_block_shape([[pairs]], 2, 2, P, T, 60)
    blocks = pack_step([pairs], shape)
    assert len(blocks) > 1
    packed = []
    for block in blocks:
        label = block.rows.label.reshape(2, -1)
        for slot in np.flatnonzero(label[0]):
            assert label[1, slot] == -1
            packed.append((read_back(block, slot, 0), read_back(block, slot + shape.groups, 1)))
    wanted = [((a.prompt, a.completion), (b.prompt, b.completion)) for a, b in pairs]
    assert sorted(map(repr, packed)) == sorted(map(repr, wanted))


def test_micro_batches_never_share_a_block_and_padding_rows_are_dropped():
    rng = np.random.default_rng(3)
    row = make_row(rng)
    micros = [groups_of([row, None, row, None], 1), groups_of([None] * 4, 1), groups_of([row], 1)]
    blocks = pack_step(micros, choose_block_shape([micros], 1, 1, P, T, 1000))
    assert [int(block.micro) for block in blocks] == [0, 2]
    assert [int((block.rows.label != 0).sum()) for block in blocks] == [2, 1]


@pytest.mark.parametrize("shared_prefix", [[], PREFIX])
def test_a_block_cut_to_a_smaller_shape_still_holds_every_row(shared_prefix, tiles):
    steps = make_steps(shared_prefix=shared_prefix)
    shape = choose_block_shape(
        steps, 1, 1, P + len(shared_prefix), T, 120, shared_prefix=shared_prefix
    )
    small = choose_small(steps, shape)
    assert small.tokens < shape.tokens
    kept = 0
    for block in (block for step in steps for block in pack_step(step, shape)):
        if not fits(block, small):
            continue
        cut = shrink(block, small)
        (pack,) = cut.packs
        index = np.concatenate(
            [
                pack.token_index[:rows, begin:end].reshape(-1)
                for rows, begin, end in spans(pack.tiles)
            ]
        )
        assert pack.tokens.shape == (small.tokens,) and cut.target.shape == (small.scored,)
        assert (
            pack.tiles == ((1, 17),) * bool(shared_prefix) + small.tiles
            and len(pack.token_index) == small.tiles[0][0]
        )
        real = real_tokens(pack)
        assert index[np.asarray(pack.query_index[:real])].tolist() == list(
            range(real)
        )  # each token's query is that token's
        for slot in np.flatnonzero(block.rows.label):
            assert read_back(cut, slot) == read_back(block, slot)
        kept += 1
    assert kept


def test_tiles_cover_the_longest_tree_and_few_trees_reach_the_last():
    # 64 wide while six of them are enough: 130 = 64 + 64 + 2, up to 8; 1,000 / 6 = 166.7, up to
    # 168, and 1,000 - 5 * 168 = 160
    assert (
        shape_buckets.split_tiles(130) == [64, 64, 8]
        and shape_buckets.split_tiles(64) == [64]
        and shape_buckets.split_tiles(1) == [8]
    )
    assert shape_buckets.split_tiles(1000) == [168] * 5 + [160]
    groups = [[[1] * 20, [2] * 70, [3] * 10, [4] * 129], [[5] * 30, [6] * 40]]
    # of four prompts two are longer than 64 and one is longer than 128; one more of each may come
    assert prompt_shape(groups, 130).tiles == ((4, 64), (3, 64), (2, 8))


def test_groups_of_any_later_step_fit():
    shape = choose_block_shape(make_steps(4, rows=3), 1, 1, P, T, 40)
    rng = np.random.default_rng(5)
    longest = TrainingRow(
        rng.integers(3, 200, P).tolist(), rng.integers(3, 200, T).tolist(), np.ones(T, bool), 1.0, 1
    )
    others = [longest] + [make_row(rng) for _ in range(30)]
    blocks = pack_step([[(row,) for row in others]], shape)
    assert sum(int((block.rows.label != 0).sum()) for block in blocks) == 31
    shapes = {
        jax.tree.map(np.shape, block) == jax.tree.map(np.shape, blocks[0]) for block in blocks
    }
    assert shapes == {True}


def test_a_group_larger_than_promised_is_refused():
    shape = choose_block_shape(make_steps(), 1, 1, P, T, 40)
    with pytest.raises(ValueError, match="exceeds"):
        pack_step([[(TrainingRow([5] * 500, [1, 2], np.ones(2, bool), 1.0, 1),)]], shape)


def test_padding_of_training_stays_under_fifteen_percent_of_the_tokens():
    # rows as ARC's: prompts of 60 to 232 tokens, completions of up to 32, drawn from pools of 10
    # wins and 12 loses; block sizes are chosen from 8 steps and used for 16 more, in 8 such runs
    shares = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        prompts = [
            rng.integers(3, 999, int(np.clip(rng.lognormal(4.75, 0.22), 60, 232))).tolist()
            for _ in range(16)
        ]

        def answers(prompts, label, rng=rng):
            rows = [(p, rng.integers(3, 999, rng.integers(8, 33)).tolist()) for p in prompts]
            return [TrainingRow(p, c, np.ones(len(c), bool), 1.0, label) for p, c in rows]

        wins, loses = answers(prompts[:10], 1), answers(prompts[4:], -1)
        steps = [[[(row,) for row in draw(wins, 8, rng) + draw(loses, 8, rng)]] for _ in range(24)]
        shape = choose_block_shape(steps[:8], 1, 1, 232, 32, 4096)
        blocks = [block for step in steps for block in pack_step(step, shape)]
        real = sum(real_tokens(block.packs[0]) for block in blocks)
        shares.append(1 - real / (shape.tokens * len(blocks)))
    assert np.mean(shares) < 0.15 and max(shares) < 0.25


def test_prompts_are_packed_once_each_and_indexed_from_the_right():
    rng = np.random.default_rng(6)
    prompts = [make_row(rng).prompt for _ in range(5)]
    groups = [[prompts[0], prompts[1], prompts[0]], [prompts[2], prompts[3], prompts[4]]]
    shape = prompt_shape(groups, 32)
    assert holds_prompts(shape, groups)
    pack, index, mask = pack_prompts(groups, 4, 32, shape)
    for group, own in enumerate(groups):
        for row, prompt in enumerate(own):
            assert pack.tokens[group][index[group, row][mask[group, row]]].tolist() == prompt
        assert not mask[group, 3].any()
    assert (index[0, 0] == index[0, 2]).all()
    smaller = dataclasses.replace(shape, tokens=shape.tokens // 4)
    assert not holds_prompts(smaller, groups)


def test_shapes_are_reused_where_they_hold_and_come_back_from_a_checkpoint():
    shapes = shape_buckets.ShapeBuckets()
    assert shapes.fit("a", (8, 100)) == (8, 100)
    assert shapes.fit("a", (8, 95)) == (8, 100)  # 5 % more than needed
    assert shapes.fit("a", (4, 50)) == (4, 50)  # four times more would have been wasted
    shapes.open("b", (3,))
    steps = make_steps(shared_prefix=PREFIX)
    shape = shapes.shape(
        "r", lambda: choose_block_shape(steps, 1, 1, P + 17, T, 100, shared_prefix=PREFIX)
    )
    shapes.freeze()
    again = shape_buckets.ShapeBuckets()
    again.load(shapes.save())
    for one in (shapes, again):
        assert one.fit("a", (2, 20)) == (4, 50)
        assert one.fit("a", (9, 9)) == (9, 9)  # nothing holds it
        assert one.shape("r", lambda: None) == shape
        assert one.opened("b") == [(3,)]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 1000, 5000])
def test_a_size_is_rounded_up_by_an_eighth_at_most(size):
    rounded = shape_buckets.size_bucket(size)
    assert size <= rounded and rounded % 16 == 0
    assert rounded < size + 16 or rounded - size <= rounded / 8
