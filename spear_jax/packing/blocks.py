"""Rows of token ids -> static-shape blocks that hold each distinct row once and each prompt once.

A block is what goes through the model together. Its sizes (`BlockShape`) are chosen once, from the
first rows that are seen, so that little of it is padding; how many blocks a step takes is a number
on the device, so that a step costs what its tokens cost and nothing compiles again.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from spear_jax.packing.arrays import Block
from spear_jax.packing.prefix_tree import PackBuilder, PrefixTree, fill, fits
from spear_jax.packing.rows import RowGroup, TrainingRow, batch
from spear_jax.packing.shape_buckets import BlockShape, size_bucket, split_tiles

HEADROOM = 12  # a block's size is chosen as if 1 / HEADROOM of it were to stay free
BLOCK_COST = 48  # a block's pass over all weights, in tokens; decides between few blocks and many


class BlockBuilder:
    """A block under construction: who stands where, but no arrays yet."""

    def __init__(self, shape: BlockShape, micro: int):
        self.shape, self.micro = shape, micro
        self.packs = [PackBuilder(shape) for _ in range(shape.num_packs)]
        self.scored = 0
        self.known: dict[tuple, list[int]] = {}  # item -> where its completions begin in `target`
        self.places: list[
            tuple[int, list[tuple[PrefixTree, int]]]
        ] = []  # (start, a (tree, branch) in each trunk)
        self.rows: list[tuple[RowGroup, list[int]]] = []

    def add(self, key: tuple, group: RowGroup) -> bool:
        """Adds an item, or leaves the block as it was apart from room that is lost."""
        if len(self.rows) == self.shape.groups:
            return False
        if key not in self.known:
            starts = self._enter(group)
            if starts is None:
                return False
            self.known[key] = starts
        self.rows.append((group, self.known[key]))
        return True

    def _enter(self, group: RowGroup) -> list[int] | None:
        starts, num_packs = [], self.shape.num_packs
        for first in range(0, len(group), num_packs):
            rows, start = group[first : first + num_packs], self.scored
            found = []
            if start + len(rows[0].completion) > self.shape.scored:
                return None
            for pack, row in zip(self.packs, rows, strict=True):
                at = pack.place(tuple(row.prompt), row.completion)
                if at is None:
                    return None
                found.append(at)
            self.places.append((start, found))
            self.scored += len(rows[0].completion)
            starts += [start] * num_packs
        return starts

    def build(self) -> Block:
        """The finished numpy arrays."""
        shape = self.shape
        packs, bases = zip(*(fill(pack, shape) for pack in self.packs), strict=True)
        source = [np.zeros(shape.scored, np.int32) for _ in packs]
        target = np.zeros(shape.scored, np.int32)
        for start, found in self.places:
            for places, base, (tree, branch_ids) in zip(source, bases, found, strict=True):
                completion, begin = tree.branches[branch_ids], base[id(tree)]
                end = start + len(completion)
                target[start:end] = completion
                places[start] = begin + len(tree.prompt) - 1
                places[start + 1 : end] = (
                    begin + tree.starts[branch_ids] + np.arange(len(completion) - 1)
                )
        starts = np.zeros(shape.groups * shape.rows_per_group, np.int32)
        rows: list[TrainingRow | None] = [None] * len(starts)
        for slot, (group, begins) in enumerate(self.rows):
            for kind, (row, begin) in enumerate(zip(group, begins, strict=True)):
                rows[slot + kind * shape.groups], starts[slot + kind * shape.groups] = row, begin
        return Block(
            packs, tuple(source), target, starts, batch(rows, shape.length), np.int32(self.micro)
        )


class Keys:
    """Numbers that are equal where token lists are; lists are compared once each."""

    def __init__(self):
        self._seen: dict[int, int] = {}
        self._known: dict[tuple[int, ...], int] = {}

    def __call__(self, ids: list[int]) -> int:
        """The number of a list that outlives this object."""
        found = self._seen.get(id(ids))
        if found is None:
            found = self._seen[id(ids)] = self._known.setdefault(tuple(ids), len(self._known))
        return found


def pack_step(
    micros: Sequence[Sequence[RowGroup]], shape: BlockShape, keys: Keys | None = None
) -> list[Block]:
    """The blocks of an optimiser step, as `pack_rows` deals its items."""
    return [block.build() for block in pack_rows(micros, shape, keys or Keys())]


def pack_rows(
    micros: Sequence[Sequence[RowGroup]], shape: BlockShape, keys: Keys
) -> list[BlockBuilder]:
    """An optimiser step's blocks before they are arrays; block by block, items of one micro-batch.

    Items with a common prompt are kept together, larger groups first; within a block an item that
    stands twice is read once.
    Raises: ValueError where an item alone is larger than a block.
    """
    found = []
    for number, groups in enumerate(micros):
        families = collections.defaultdict(list)
        for group in groups:
            key = tuple((keys(row.prompt), keys(row.completion)) for row in group)
            families[key[0][0]].append((key, group))
        sizes = {prompt: _tokens(family, shape) for prompt, family in families.items()}
        opened: list[BlockBuilder] = []
        for prompt in sorted(families, key=lambda p: -sizes[p]):
            fits = (b for b in opened if min(t.left for t in b.packs) >= sizes[prompt])
            block = next(fits, None)
            for key, group in sorted(families[prompt], key=lambda pair: pair[0]):
                if block is None or not block.add(key, group):
                    block = _next(opened, shape, number, key, group)
        found += opened
    return found


def _next(
    opened: list[BlockBuilder], shape: BlockShape, micro: int, key: tuple, group: RowGroup
) -> BlockBuilder:
    """The first open block that takes an item, or a new one."""
    for block in opened:
        if block.add(key, group):
            return block
    block = BlockBuilder(shape, micro)
    if not block.add(key, group):
        raise ValueError(
            f"an item of {[len(r.prompt) + len(r.completion) for r in group]} tokens exceeds "
            f"{shape}"
        )
    opened.append(block)
    return block


def _tokens(family: list, shape: BlockShape) -> int:
    """Tokens that a family adds to the fuller trunk: its prompts once, without the opening, and its
    distinct completions.
    """
    num_packs = shape.num_packs
    total = [0] * num_packs
    seen: set = set()
    for key, group in family:
        for kind, (row, (prompt, completion)) in enumerate(zip(group, key, strict=True)):
            pack = kind % num_packs
            if (pack, prompt) not in seen:
                seen.add((pack, prompt))
                total[pack] += len(row.prompt) - len(shape.shared_prefix)
            if (pack, prompt, completion) not in seen:
                seen.add((pack, prompt, completion))
                total[pack] += len(row.completion) - 1
    return max(total)


def choose_block_shape(
    steps: Sequence[Sequence[Sequence[RowGroup]]],
    rows_per_group: int,
    num_packs: int,
    prompt: int,
    length: int,
    limit: int,
    slots: int | None = None,
    shared_prefix: Sequence[int] = (),
) -> BlockShape:
    """The block size that wastes least on these steps.

    Args:
        steps: the micro-batches of some optimiser steps.
        kinds: rows of an item; trunks: packs.
        prompt: P, the longest prompt that will ever come; length: T, the longest completion.
        limit: tokens of a block, at most; more only where a single item needs them.
        slots: items that no step exceeds, where that is known.
        opening: token ids with which every prompt begins.
    Returns: a room into which every item fits that keeps to `prompt` and `length`.
    """
    shared = -(-rows_per_group // num_packs)  # rows of an item in one pack, under one prompt
    longest = prompt - len(shared_prefix) + max(2, shared) * (length - 1)
    least = size_bucket(prompt + shared * (length - 1))
    most = max(least, limit)
    wide = BlockShape(
        most,
        ((10**6, longest),),
        10**9,
        10**9,
        rows_per_group,
        num_packs,
        length,
        tuple(shared_prefix),
    )
    keys = Keys()
    total = max((_read(step, keys, wide) for step in steps), default=least)
    best, lowest = most, float("inf")
    sizes = np.geomspace(least, max(least, min(most, total * HEADROOM / (HEADROOM - 1))), 48)
    for size in sorted({int(-(-size // 16) * 16) for size in sizes}):
        # other steps will be a little longer than these
        shape = dataclasses.replace(wide, tokens=max(least, size - size // HEADROOM))
        cost = sum(len(pack_rows(step, shape, keys)) for step in steps) * (size + BLOCK_COST)
        if cost < lowest:
            best, lowest = size, cost
    tiles = tuple((10**6, width) for width in split_tiles(longest))
    found = [
        b
        for step in steps
        for b in pack_rows(step, dataclasses.replace(wide, tokens=best, tiles=tiles), keys)
    ]
    # tokens are what costs: a block should be full of them before it is full of anything else
    most_groups = 10**9 if slots is None else slots

    def spare(counts: Sequence[int], of_item: int = 1) -> int:
        return min(1 + max(counts, default=0) * 5 // 4, most_groups * of_item)

    reaching = [
        [10**6 - pack.free[c] for block in found for pack in block.packs] for c in range(len(tiles))
    ]
    return dataclasses.replace(
        wide,
        tokens=best,
        tiles=tuple(
            (spare(own, shared), width) for own, (_, width) in zip(reaching, tiles, strict=True)
        ),
        scored=max(size_bucket(spare([b.scored for b in found], shared * length)), shared * length),
        groups=spare([len(b.rows) for b in found]),
    )


def choose_small(steps: Sequence[Sequence[Sequence[RowGroup]]], shape: BlockShape) -> BlockShape:
    """A smaller room for the blocks of these steps that fit one: the size that saves most tokens;
    `shape` itself where none saves a twentieth.
    """
    keys = Keys()
    blocks = [block for step in steps for block in pack_rows(step, shape, keys)]
    tokens = [shape.tokens - min(t.left for t in block.packs) for block in blocks]
    sizes = sorted({-(-n // 16) * 16 for n in tokens})
    saved = [sum(n <= size for n in tokens) * (shape.tokens - size) for size in sizes]
    if not saved or max(saved) * 20 < shape.tokens * len(blocks):
        return shape
    size = sizes[int(np.argmax(saved))]
    fitting = [block for block, n in zip(blocks, tokens, strict=True) if n <= size]

    def rows(tile: int) -> int:
        most = shape.tiles[tile][0]
        return max(1, *(most - t.free[tile] for block in fitting for t in block.packs))

    scored = min(shape.scored, -(-max(block.scored for block in fitting) // 16) * 16)
    tiles = tuple((rows(tile), width) for tile, (_, width) in enumerate(shape.tiles))
    return dataclasses.replace(shape, tokens=size, tiles=tiles, scored=scored)


def _read(step, keys: Keys, shape: BlockShape) -> int:
    """Distinct tokens of a step."""
    plans = pack_rows(step, dataclasses.replace(shape, tokens=10**9), keys)
    return max((10**9 - min(t.left for t in b.packs) for b in plans), default=1)


def most_blocks(
    steps: Sequence[Sequence[Sequence[RowGroup]]], shape: BlockShape, slots: int
) -> int:
    """Blocks that a step may come to take, when all of its `slots` items are distinct and a quarter
    longer than these.
    """
    groups = [group for step in steps for micro in step for group in micro]
    shared = len(shape.shared_prefix)
    tokens = (
        sum(len(row.prompt) - shared + len(row.completion) for group in groups for row in group)
        / shape.num_packs
    )
    longer = 1.25 * tokens / max(1, len(groups))
    return 1 + -int(-max(slots * longer / (shape.tokens - shared), slots / shape.groups))


def stack_blocks(
    steps: list[list[Block]], shape: BlockShape, count: int, small: BlockShape | None = None
) -> tuple[Block, np.ndarray, np.ndarray]:
    """Blocks of steps -> arrays [S, K, ...] with K = count, empty blocks behind; int32[S], how many
    are in use; bool[S, K], which of them fit the small room.
    """
    empty = BlockBuilder(shape, 0).build()
    padded = [blocks + [empty] * (count - len(blocks)) for blocks in steps]
    inner = [jax.tree.map(lambda *parts: np.stack(parts), *blocks) for blocks in padded]
    fitting = np.array(
        [[small is not None and fits(block, small) for block in blocks] for blocks in padded]
    )
    used = np.array([len(blocks) for blocks in steps], np.int32)
    return jax.tree.map(lambda *parts: np.stack(parts), *inner), used, fitting


def pack_single_rows(
    rows: Sequence[TrainingRow], shape: BlockShape
) -> tuple[list[Block], list[tuple[int, int]]]:
    """Single rows as blocks, and for each the (block, row) where it stands."""
    groups: list[RowGroup] = [(row,) for row in rows]
    blocks = pack_rows([groups], shape, Keys())
    places = {
        id(group): (b, slot)
        for b, block in enumerate(blocks)
        for slot, (group, _) in enumerate(block.rows)
    }
    return [block.build() for block in blocks], [places[id(group)] for group in groups]
