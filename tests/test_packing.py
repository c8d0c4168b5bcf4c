"""Packing: every row is found again in its block, shared parts stand once, sizes hold, and little is padding."""

import dataclasses

import jax
import numpy as np
import pytest

from spear_jax.packing import shape_buckets
from spear_jax.packing.arrays import spans
from spear_jax.packing.blocks import choose_room, choose_small, fold, stack_blocks
from spear_jax.packing.prefix_tree import fits, holds_prompts, pack_prompts, prompt_room, real_tokens, shrink
from spear_jax.packing.rows import Row, draw, items_of

P, T = 24, 8


def make_row(rng, prompt=None, label=1):
    ids = lambda low, high: rng.integers(3, 200, rng.integers(low, high + 1)).tolist()
    completion = ids(1, T)
    return Row(prompt or ids(2, P), completion, rng.random(len(completion)) < 0.7, float(rng.random()), label, 0.5)


def make_steps(seed=0, steps=6, rows=12, prompts=5, opening=()):
    """Steps of single-row items, drawn with repetition from few prompts that open with the same tokens."""
    rng = np.random.default_rng(seed)
    asked = [[*opening, *make_row(rng).prompt] for _ in range(prompts)]
    pool = [make_row(rng, list(asked[rng.integers(prompts)]), int(rng.choice([1, -1]))) for _ in range(rows)]
    return [[[(pool[i],) for i in rng.integers(len(pool), size=rows)]] for _ in range(steps)]


def read_back(block, slot, trunk=0):
    """(prompt, completion) of a row, walked over the pack as attention sees it."""
    pack, length = block.packs[trunk], int(block.rows.completion_mask[slot].sum())
    first = int(block.start[slot])
    source = block.source[trunk][first : first + length]
    seen = []
    for rows, begin, end in spans(pack.columns):
        for places, kinds in zip(pack.grid[:rows, :end], pack.branch[:rows, :end], strict=True):
            where = [i for i in range(begin, end) if kinds[i] >= 0 and places[i] == source[-1]]
            if where:
                own = [i for i in range(where[0] + 1) if kinds[i] == 0 or kinds[i] == kinds[where[0]]]
                seen = [int(places[i]) for i in own]
    tokens = [int(pack.tokens[i]) for i in seen]
    assert [int(pack.positions[i]) for i in seen] == list(range(len(seen)))
    assert seen[-length:] == list(source)
    return tokens[: len(tokens) - length + 1], block.target[first : first + length].tolist()


OPENING = list(range(300, 317))


@pytest.fixture(params=[64, 8])
def columns(request, monkeypatch):
    """Attention grids of one column, and of several."""
    monkeypatch.setattr(shape_buckets, "COLUMN", request.param)


@pytest.mark.parametrize("opening", [[], OPENING])
@pytest.mark.parametrize("limit", [1, 120, 10_000])
def test_every_row_stands_in_a_block_with_its_prompt_and_what_the_loss_needs(limit, opening, columns):
    steps = make_steps(opening=opening)
    room = choose_room(steps, 1, 1, P + len(opening), T, limit, opening=opening)
    for step in steps:
        found = []
        for block in fold(step, room):
            for slot in np.flatnonzero(block.rows.label):
                mask = block.rows.completion_mask[slot]
                found.append(
                    (*read_back(block, slot), block.rows.loss_mask[slot][mask].tolist(), block.rows.weight[slot, 0],
                     int(block.rows.label[slot]), float(block.rows.advantage[slot]))
                )  # fmt: skip
        wanted = [
            (r.prompt, r.completion, r.loss_mask.tolist(), np.float32(r.weight), r.label, 0.5) for (r,) in step[0]
        ]
        assert sorted(map(repr, found)) == sorted(map(repr, wanted))


def test_a_prompt_and_a_repeated_row_are_read_once():
    # 11 rows: one win drawn 6 times and five loses under its prompt: 10 + Σ (completion − 1) tokens, by hand
    rng = np.random.default_rng(1)
    prompt = rng.integers(3, 200, 10).tolist()
    win, *loses = [make_row(rng, list(prompt)) for _ in range(6)]
    step = [[(row,) for row in [win] * 6 + loses]]
    (block,) = fold(step, choose_room([step], 1, 1, P, T, 10_000))
    (pack,) = block.packs
    trees, real = int((pack.branch[:, 0] == 0).sum()), real_tokens(pack)
    branches = sum(len(row.completion) - 1 for row in [win, *loses])
    assert real == 10 * trees + branches and trees <= 3  # a tree holds at least two completions of any length
    assert (block.rows.label != 0).sum() == 11 and len(set(block.start[block.rows.label != 0].tolist())) == 6


def test_what_all_prompts_open_with_is_read_once_a_block():
    steps = make_steps(opening=OPENING)
    rows = [row for (row,) in steps[0][0]]
    room, plain = (choose_room(steps, 1, 1, P + len(OPENING), T, 10_000, opening=own) for own in (OPENING, []))
    once, each = (real_tokens(fold(steps[0], size)[0].packs[0]) for size in (room, plain))
    # at least so many trees, all but one of them without it
    assert each - once >= len(OPENING) * (len({tuple(row.prompt) for row in rows}) - 1) > 0
    empty = stack_blocks([[]], room, 1)[0]
    assert real_tokens(empty.packs[0]) == 0
    for other in (OPENING, [5, *OPENING]):  # nothing behind it; something before it
        with pytest.raises(ValueError, match="does not go on from the opening"):
            fold([[(dataclasses.replace(rows[0], prompt=other),)]], room)


def test_an_items_rows_stay_together_each_kind_in_its_trunk():
    rng = np.random.default_rng(2)
    items = []
    for _ in range(7):
        student = make_row(rng)
        items.append((student, dataclasses.replace(student, prompt=make_row(rng).prompt, label=-1)))
    room = choose_room([[items]], 2, 2, P, T, 60)
    blocks = fold([items], room)
    assert len(blocks) > 1
    pairs = []
    for block in blocks:
        label = block.rows.label.reshape(2, -1)
        for item in np.flatnonzero(label[0]):
            assert label[1, item] == -1
            pairs.append((read_back(block, item, 0), read_back(block, item + room.items, 1)))
    wanted = [((a.prompt, a.completion), (b.prompt, b.completion)) for a, b in items]
    assert sorted(map(repr, pairs)) == sorted(map(repr, wanted))


def test_micro_batches_never_share_a_block_and_padding_rows_are_dropped():
    rng = np.random.default_rng(3)
    row = make_row(rng)
    micros = [items_of([row, None, row, None], 1), items_of([None] * 4, 1), items_of([row], 1)]
    blocks = fold(micros, choose_room([micros], 1, 1, P, T, 1000))
    assert [int(block.micro) for block in blocks] == [0, 2]
    assert [int((block.rows.label != 0).sum()) for block in blocks] == [2, 1]


@pytest.mark.parametrize("opening", [[], OPENING])
def test_a_block_cut_to_a_smaller_room_still_holds_every_row(opening, columns):
    steps = make_steps(opening=opening)
    room = choose_room(steps, 1, 1, P + len(opening), T, 120, opening=opening)
    small = choose_small(steps, room)
    assert small.tokens < room.tokens
    kept = 0
    for block in (block for step in steps for block in fold(step, room)):
        if not fits(block, small):
            continue
        cut = shrink(block, small)
        (pack,) = cut.packs
        cells = np.concatenate([pack.grid[:rows, begin:end].reshape(-1) for rows, begin, end in spans(pack.columns)])
        assert pack.tokens.shape == (small.tokens,) and cut.target.shape == (small.scored,)
        assert pack.columns == ((1, 17),) * bool(opening) + small.columns and len(pack.grid) == small.columns[0][0]
        real = real_tokens(pack)
        assert cells[np.asarray(pack.cell[:real])].tolist() == list(range(real))  # each token's cell holds that token
        for slot in np.flatnonzero(block.rows.label):
            assert read_back(cut, slot) == read_back(block, slot)
        kept += 1
    assert kept


def test_columns_cover_the_longest_tree_and_few_trees_reach_the_last():
    # 64 wide while six of them are enough: 130 = 64 + 64 + 2, up to 8; 1,000 / 6 = 166.7, up to 168, and 1,000 - 5 * 168 = 160
    assert (
        shape_buckets.split_columns(130) == [64, 64, 8]
        and shape_buckets.split_columns(64) == [64]
        and shape_buckets.split_columns(1) == [8]
    )
    assert shape_buckets.split_columns(1000) == [168] * 5 + [160]
    groups = [[[1] * 20, [2] * 70, [3] * 10, [4] * 129], [[5] * 30, [6] * 40]]
    # of four prompts two are longer than 64 and one is longer than 128; one more of each may come
    assert prompt_room(groups, 130).columns == ((4, 64), (3, 64), (2, 8))


def test_items_of_any_later_step_find_room():
    room = choose_room(make_steps(4, rows=3), 1, 1, P, T, 40)
    rng = np.random.default_rng(5)
    longest = Row(rng.integers(3, 200, P).tolist(), rng.integers(3, 200, T).tolist(), np.ones(T, bool), 1.0, 1)
    others = [longest] + [make_row(rng) for _ in range(30)]
    blocks = fold([[(row,) for row in others]], room)
    assert sum(int((block.rows.label != 0).sum()) for block in blocks) == 31
    shapes = {jax.tree.map(np.shape, block) == jax.tree.map(np.shape, blocks[0]) for block in blocks}
    assert shapes == {True}


def test_an_item_larger_than_promised_is_refused():
    room = choose_room(make_steps(), 1, 1, P, T, 40)
    with pytest.raises(ValueError, match="exceeds"):
        fold([[(Row([5] * 500, [1, 2], np.ones(2, bool), 1.0, 1),)]], room)


def test_padding_of_training_stays_under_fifteen_percent_of_the_tokens():
    # rows as ARC's: prompts of 60 to 232 tokens, completions of up to 32, drawn from pools of 10 wins and 12 loses; block
    # sizes are chosen from 8 steps and used for 16 more, in 8 such runs
    shares = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(3, 999, int(np.clip(rng.lognormal(4.75, 0.22), 60, 232))).tolist() for _ in range(16)]

        def answers(prompts, label, rng=rng):
            found = [(p, rng.integers(3, 999, rng.integers(8, 33)).tolist()) for p in prompts]
            return [Row(p, c, np.ones(len(c), bool), 1.0, label) for p, c in found]

        wins, loses = answers(prompts[:10], 1), answers(prompts[4:], -1)
        steps = [[[(row,) for row in draw(wins, 8, rng) + draw(loses, 8, rng)]] for _ in range(24)]
        room = choose_room(steps[:8], 1, 1, 232, 32, 4096)
        blocks = [block for step in steps for block in fold(step, room)]
        real = sum(real_tokens(block.packs[0]) for block in blocks)
        shares.append(1 - real / (room.tokens * len(blocks)))
    assert np.mean(shares) < 0.15 and max(shares) < 0.25


def test_prompts_are_packed_once_each_and_found_from_the_right():
    rng = np.random.default_rng(6)
    prompts = [make_row(rng).prompt for _ in range(5)]
    groups = [[prompts[0], prompts[1], prompts[0]], [prompts[2], prompts[3], prompts[4]]]
    room = prompt_room(groups, 32)
    assert holds_prompts(room, groups)
    pack, index, mask = pack_prompts(groups, 4, 32, room)
    for group, own in enumerate(groups):
        for row, prompt in enumerate(own):
            assert pack.tokens[group][index[group, row][mask[group, row]]].tolist() == prompt
        assert not mask[group, 3].any()
    assert (index[0, 0] == index[0, 2]).all()
    smaller = dataclasses.replace(room, tokens=room.tokens // 4)
    assert not holds_prompts(smaller, groups)


def test_shapes_are_reused_where_they_hold_and_come_back_from_a_checkpoint():
    shapes = shape_buckets.Shapes()
    assert shapes.fit("a", (8, 100)) == (8, 100)
    assert shapes.fit("a", (8, 95)) == (8, 100)  # 5 % more than needed
    assert shapes.fit("a", (4, 50)) == (4, 50)  # four times more would have been wasted
    shapes.open("b", (3,))
    steps = make_steps(opening=OPENING)
    room = shapes.room("r", lambda: choose_room(steps, 1, 1, P + 17, T, 100, opening=OPENING))
    shapes.freeze()
    again = shape_buckets.Shapes()
    again.load(shapes.save())
    for one in (shapes, again):
        assert one.fit("a", (2, 20)) == (4, 50)
        assert one.fit("a", (9, 9)) == (9, 9)  # nothing holds it
        assert one.room("r", lambda: None) == room
        assert one.opened("b") == [(3,)]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 1000, 5000])
def test_a_size_is_rounded_up_by_an_eighth_at_most(size):
    found = shape_buckets.size_bucket(size)
    assert size <= found and (found < size + 16 or found - size <= found / 8) and found % 16 == 0
