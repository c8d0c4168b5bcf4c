"""Packs training rows into blocks of one static shape, each distinct row and each prompt once.

A block goes through the model together. Its sizes (`BlockShape`) are chosen once, from the first
rows that are seen, so that little of it is padding. How many blocks a step takes is a number on the
device, so that a step costs what its tokens cost and nothing compiles again.

Groups are dealt to blocks (`pack_rows`), then blocks become arrays (`BlockBuilder.build`).
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
UNBOUNDED = 10**9  # more than any count; a size that is not chosen yet


class BlockBuilder:
    """A block under construction: which row stands where, but no arrays yet.

    Attributes:
        packs: a builder for each pack.
        scored: completion tokens so far.
        known: {key of a group: where its rows' completions begin in `Block.target`}.
        places: for each distinct completion its start, and its (tree, branch) in every pack.
        rows: the groups, and their rows' starts.
    """

    def __init__(self, shape: BlockShape, micro: int):
        self.shape, self.micro = shape, micro
        self.packs = [PackBuilder(shape) for _ in range(shape.num_packs)]
        self.scored = 0
        self.known: dict[tuple, list[int]] = {}
        self.places: list[tuple[int, list[tuple[PrefixTree, int]]]] = []
        self.rows: list[tuple[RowGroup, list[int]]] = []

    def add(self, key: tuple, group: RowGroup) -> bool:
        """Adds a group; returns False where it does not fit.

        A group that fits half is refused, and what its first rows have taken stays taken.

        Args: key: equal for groups of equal tokens, which are read once.
        """
        if len(self.rows) == self.shape.groups:
            return False
        if key not in self.known:
            starts = self._place(group)
            if starts is None:
                return False
            self.known[key] = starts
        self.rows.append((group, self.known[key]))
        return True

    def _place(self, group: RowGroup) -> list[int] | None:
        """Finds places for a group's tokens; returns its rows' starts, or None."""
        starts, num_packs = [], self.shape.num_packs
        for first in range(0, len(group), num_packs):
            rows, start = group[first : first + num_packs], self.scored
            branches = []
            if start + len(rows[0].completion) > self.shape.scored:
                return None
            for pack, row in zip(self.packs, rows, strict=True):
                branch = pack.place(tuple(row.prompt), row.completion)
                if branch is None:
                    return None
                branches.append(branch)
            self.places.append((start, branches))
            self.scored += len(rows[0].completion)
            starts += [start] * num_packs
        return starts

    def build(self) -> Block:
        """Lays everything out as numpy arrays."""
        shape = self.shape
        packs, begins = zip(*(fill(pack, shape) for pack in self.packs), strict=True)
        source = [np.zeros(shape.scored, np.int32) for _ in packs]
        target = np.zeros(shape.scored, np.int32)
        for start, branches in self.places:
            for indices, trees, (tree, branch) in zip(source, begins, branches, strict=True):
                completion, begin = tree.branches[branch], trees[id(tree)]
                end = start + len(completion)
                target[start:end] = completion
                # the prompt's last token predicts the completion's first, and so on
                indices[start] = begin + len(tree.prompt) - 1
                own = begin + tree.starts[branch]
                indices[start + 1 : end] = own + np.arange(len(completion) - 1)
        starts = np.zeros(shape.groups * shape.rows_per_group, np.int32)
        rows: list[TrainingRow | None] = [None] * len(starts)
        for slot, (group, own_starts) in enumerate(self.rows):
            for part, (row, start) in enumerate(zip(group, own_starts, strict=True)):
                rows[slot + part * shape.groups] = row
                starts[slot + part * shape.groups] = start
        return Block(
            packs, tuple(source), target, starts, batch(rows, shape.length), np.int32(self.micro)
        )


class Keys:
    """Numbers token lists so that equal lists have equal numbers; each list is read once."""

    def __init__(self):
        self._seen: dict[int, int] = {}
        self._known: dict[tuple[int, ...], int] = {}

    def __call__(self, ids: list[int]) -> int:
        """Returns the number of a list, which must outlive this object."""
        number = self._seen.get(id(ids))
        if number is None:
            number = self._seen[id(ids)] = self._known.setdefault(tuple(ids), len(self._known))
        return number


def pack_step(
    micros: Sequence[Sequence[RowGroup]], shape: BlockShape, keys: Keys | None = None
) -> list[Block]:
    """Packs an optimiser step's micro-batches into blocks of numpy arrays."""
    return [block.build() for block in pack_rows(micros, shape, keys or Keys())]


def pack_rows(
    micros: Sequence[Sequence[RowGroup]], shape: BlockShape, keys: Keys
) -> list[BlockBuilder]:
    """Deals an optimiser step's groups to blocks; a block holds groups of one micro-batch.

    Groups under one prompt are a family and are kept together, so that the prompt is read once. The
    largest families come first. A group that is drawn twice is read once:

        prompts  a a b a    blocks of three rows    [a a a] [b]

    Args:
        micros: the micro-batches, each its groups.
        shape: the sizes of a block.
        keys: numbers for token lists, kept from call to call where the same lists come again.
    Raises: ValueError where a group alone is larger than a block.
    """
    blocks: list[BlockBuilder] = []
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
                    block = _add_to_any(opened, shape, number, key, group)
        blocks += opened
    return blocks


def _add_to_any(
    opened: list[BlockBuilder], shape: BlockShape, micro: int, key: tuple, group: RowGroup
) -> BlockBuilder:
    """Adds a group to the first open block that takes it, or to a new one; returns the block."""
    for block in opened:
        if block.add(key, group):
            return block
    block = BlockBuilder(shape, micro)
    if not block.add(key, group):
        raise ValueError(
            f"a group of {[len(r.prompt) + len(r.completion) for r in group]} tokens exceeds "
            f"{shape}"
        )
    opened.append(block)
    return block


def _tokens(family: list, shape: BlockShape) -> int:
    """Counts the tokens that a family adds to the fullest pack: its prompts once, without the
    shared prefix, and its distinct completions without their last tokens.
    """
    num_packs = shape.num_packs
    total = [0] * num_packs
    seen: set = set()
    for key, group in family:
        for part, (row, (prompt, completion)) in enumerate(zip(group, key, strict=True)):
            pack = part % num_packs
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
    """Chooses the block shape that wastes least on these steps.

    Args:
        steps: some optimiser steps, each its micro-batches.
        rows_per_group: rows of a group; num_packs: packs of a block.
        prompt: P, the longest prompt that will ever come; length: T, the longest completion.
        limit: tokens of a block, at most; more only where a single group needs them.
        slots: groups that no step exceeds, where that is known.
        shared_prefix: token ids with which every prompt begins.
    Returns: a shape that holds every group within `prompt` and `length`.
    """
    shared = -(-rows_per_group // num_packs)  # rows of a group in one pack, under one prompt
    longest = prompt - len(shared_prefix) + max(2, shared) * (length - 1)
    least = size_bucket(prompt + shared * (length - 1))
    wide = BlockShape(  # bounded by its tokens alone
        tokens=max(least, limit),
        tiles=((UNBOUNDED, longest),),
        scored=UNBOUNDED,
        groups=UNBOUNDED,
        rows_per_group=rows_per_group,
        num_packs=num_packs,
        length=length,
        shared_prefix=tuple(shared_prefix),
    )
    keys = Keys()
    tokens = _choose_tokens(steps, keys, wide, least)
    tiles = tuple((UNBOUNDED, width) for width in split_tiles(longest))
    full = dataclasses.replace(wide, tokens=tokens, tiles=tiles)
    blocks = [block for step in steps for block in pack_rows(step, full, keys)]
    # tokens are what costs: a block should be full of them before it is full of anything else
    most_groups = UNBOUNDED if slots is None else slots

    def spare(counts: Sequence[int], of_group: int = 1) -> int:
        return min(1 + max(counts, default=0) * 5 // 4, most_groups * of_group)

    reaching = [
        [UNBOUNDED - pack.free[tile] for block in blocks for pack in block.packs]
        for tile in range(len(tiles))
    ]
    scored = spare([block.scored for block in blocks], shared * length)
    return dataclasses.replace(
        full,
        tiles=tuple(
            (spare(own, shared), width) for own, (_, width) in zip(reaching, tiles, strict=True)
        ),
        scored=max(size_bucket(scored), shared * length),
        groups=spare([len(block.rows) for block in blocks]),
    )


def _choose_tokens(
    steps: Sequence[Sequence[Sequence[RowGroup]]], keys: Keys, wide: BlockShape, least: int
) -> int:
    """Chooses the tokens of a block, from `least` to those of `wide`: the cheapest for these steps.

    Many small blocks have little padding, but each reads all weights (BLOCK_COST).
    """
    total = max((_read(step, keys, wide) for step in steps), default=least)
    most = max(least, min(wide.tokens, total * HEADROOM / (HEADROOM - 1)))
    best, lowest = wide.tokens, float("inf")
    # a GPU splits long sums over tokens into up to 128 parts, and would pad every array to fit
    step = lambda size: 16 if size <= 4096 else 128
    sizes = {int(-(-size // step(size)) * step(size)) for size in np.geomspace(least, most, 48)}
    for size in sorted(sizes):
        # other steps will be a little longer than these
        shape = dataclasses.replace(wide, tokens=max(least, size - size // HEADROOM))
        cost = sum(len(pack_rows(step, shape, keys)) for step in steps) * (size + BLOCK_COST)
        if cost < lowest:
            best, lowest = size, cost
    return best


def choose_small(steps: Sequence[Sequence[Sequence[RowGroup]]], shape: BlockShape) -> BlockShape:
    """Chooses a second, smaller shape for the blocks of these steps that fit one.

    Returns: the shape that saves most tokens; `shape` itself where none saves a twentieth of them.
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
    """Counts a step's distinct tokens."""
    plans = pack_rows(step, dataclasses.replace(shape, tokens=UNBOUNDED), keys)
    return max((UNBOUNDED - min(t.left for t in b.packs) for b in plans), default=1)


def most_blocks(
    steps: Sequence[Sequence[Sequence[RowGroup]]], shape: BlockShape, slots: int
) -> int:
    """Bounds the blocks of a step: all of its groups distinct, and a quarter longer than these.

    Args: slots: the groups that a step has at most.
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
    """Stacks the blocks of optimiser steps; steps with fewer blocks are filled up with empty ones.

    Args:
        steps: S lists of blocks.
        count: K.
        small: the second, smaller shape, where there is one.
    Returns: a block with leading axes [S, K]; int32[S], how many are in use; bool[S, K], which of
        them fit the small shape.
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
    """Packs rows that are scored alone; returns the blocks, and each row's (block, row)."""
    groups: list[RowGroup] = [(row,) for row in rows]
    blocks = pack_rows([groups], shape, Keys())
    places = {
        id(group): (b, slot)
        for b, block in enumerate(blocks)
        for slot, (group, _) in enumerate(block.rows)
    }
    return [block.build() for block in blocks], [places[id(group)] for group in groups]
