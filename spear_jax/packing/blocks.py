"""Rows of token ids -> static-shape blocks that hold each distinct row once and each prompt once.

A block is what goes through the model together. Its sizes (`Room`) are chosen once, from the first rows that are seen, so that
little of it is padding; how many blocks a step takes is a number on the device, so that a step costs what its tokens cost and
nothing compiles again.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from spear_jax.packing.arrays import Block
from spear_jax.packing.prefix_tree import Tree, Trunk, fill, fits
from spear_jax.packing.rows import Item, Row, batch
from spear_jax.packing.shape_buckets import Room, size_bucket, split_columns

HEADROOM = 12  # a block's size is chosen as if 1 / HEADROOM of it were to stay free
BLOCK_COST = 48  # a block's pass over all weights, in tokens; decides between few blocks and many


class OpenBlock:
    """A block under construction: who stands where, but no arrays yet."""

    def __init__(self, room: Room, micro: int):
        self.room, self.micro = room, micro
        self.trunks = [Trunk(room) for _ in range(room.trunks)]
        self.scored = 0
        self.known: dict[tuple, list[int]] = {}  # item -> where its completions begin in `target`
        self.places: list[tuple[int, list[tuple[Tree, int]]]] = []  # (start, a (tree, branch) in each trunk)
        self.rows: list[tuple[Item, list[int]]] = []

    def add(self, key: tuple, item: Item) -> bool:
        """Adds an item, or leaves the block as it was apart from room that is lost."""
        if len(self.rows) == self.room.items:
            return False
        if key not in self.known:
            starts = self._enter(item)
            if starts is None:
                return False
            self.known[key] = starts
        self.rows.append((item, self.known[key]))
        return True

    def _enter(self, item: Item) -> list[int] | None:
        starts, trunks = [], self.room.trunks
        for first in range(0, len(item), trunks):
            rows, start = item[first : first + trunks], self.scored
            found = []
            if start + len(rows[0].completion) > self.room.scored:
                return None
            for trunk, row in zip(self.trunks, rows, strict=True):
                at = trunk.place(tuple(row.prompt), row.completion)
                if at is None:
                    return None
                found.append(at)
            self.places.append((start, found))
            self.scored += len(rows[0].completion)
            starts += [start] * trunks
        return starts

    def close(self) -> Block:
        """The finished numpy arrays."""
        room = self.room
        packs, bases = zip(*(fill(trunk, room) for trunk in self.trunks), strict=True)
        source = [np.zeros(room.scored, np.int32) for _ in packs]
        target = np.zeros(room.scored, np.int32)
        for start, found in self.places:
            for places, base, (tree, branch) in zip(source, bases, found, strict=True):
                completion, begin = tree.branches[branch], base[id(tree)]
                end = start + len(completion)
                target[start:end] = completion
                places[start] = begin + len(tree.prompt) - 1
                places[start + 1 : end] = begin + tree.starts[branch] + np.arange(len(completion) - 1)
        starts = np.zeros(room.items * room.kinds, np.int32)
        rows: list[Row | None] = [None] * len(starts)
        for slot, (item, begins) in enumerate(self.rows):
            for kind, (row, begin) in enumerate(zip(item, begins, strict=True)):
                rows[slot + kind * room.items], starts[slot + kind * room.items] = row, begin
        return Block(packs, tuple(source), target, starts, batch(rows, room.length), np.int32(self.micro))


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


def fold(micros: Sequence[Sequence[Item]], room: Room, keys: Keys | None = None) -> list[Block]:
    """The blocks of an optimiser step, as `plan` deals its items."""
    return [block.close() for block in plan(micros, room, keys or Keys())]


def plan(micros: Sequence[Sequence[Item]], room: Room, keys: Keys) -> list[OpenBlock]:
    """An optimiser step's blocks before they are arrays; block by block, items of one micro-batch.

    Items with a common prompt are kept together, larger groups first; within a block an item that stands twice is read once.
    Raises: ValueError where an item alone is larger than a block.
    """
    found = []
    for number, items in enumerate(micros):
        families = collections.defaultdict(list)
        for item in items:
            key = tuple((keys(row.prompt), keys(row.completion)) for row in item)
            families[key[0][0]].append((key, item))
        sizes = {prompt: _tokens(family, room) for prompt, family in families.items()}
        opened: list[OpenBlock] = []
        for prompt in sorted(families, key=lambda p: -sizes[p]):
            fits = (b for b in opened if min(t.left for t in b.trunks) >= sizes[prompt])
            block = next(fits, None)
            for key, item in sorted(families[prompt], key=lambda pair: pair[0]):
                if block is None or not block.add(key, item):
                    block = _next(opened, room, number, key, item)
        found += opened
    return found


def _next(opened: list[OpenBlock], room: Room, micro: int, key: tuple, item: Item) -> OpenBlock:
    """The first open block that takes an item, or a new one."""
    for block in opened:
        if block.add(key, item):
            return block
    block = OpenBlock(room, micro)
    if not block.add(key, item):
        raise ValueError(f"an item of {[len(r.prompt) + len(r.completion) for r in item]} tokens exceeds {room}")
    opened.append(block)
    return block


def _tokens(family: list, room: Room) -> int:
    """Tokens that a family adds to the fuller trunk: its prompts once, without the opening, and its distinct completions."""
    trunks = room.trunks
    total = [0] * trunks
    seen: set = set()
    for key, item in family:
        for kind, (row, (prompt, completion)) in enumerate(zip(item, key, strict=True)):
            trunk = kind % trunks
            if (trunk, prompt) not in seen:
                seen.add((trunk, prompt))
                total[trunk] += len(row.prompt) - len(room.opening)
            if (trunk, prompt, completion) not in seen:
                seen.add((trunk, prompt, completion))
                total[trunk] += len(row.completion) - 1
    return max(total)


def choose_room(
    steps: Sequence[Sequence[Sequence[Item]]],
    kinds: int,
    trunks: int,
    prompt: int,
    length: int,
    limit: int,
    slots: int | None = None,
    opening: Sequence[int] = (),
) -> Room:
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
    shared = -(-kinds // trunks)  # rows of an item in one pack, under one prompt
    longest = prompt - len(opening) + max(2, shared) * (length - 1)
    least = size_bucket(prompt + shared * (length - 1))
    most = max(least, limit)
    wide = Room(most, ((10**6, longest),), 10**9, 10**9, kinds, trunks, length, tuple(opening))
    keys = Keys()
    total = max((_read(step, keys, wide) for step in steps), default=least)
    best, lowest = most, float("inf")
    sizes = np.geomspace(least, max(least, min(most, total * HEADROOM / (HEADROOM - 1))), 48)
    for size in sorted({int(-(-size // 16) * 16) for size in sizes}):
        # other steps will be a little longer than these
        room = dataclasses.replace(wide, tokens=max(least, size - size // HEADROOM))
        cost = sum(len(plan(step, room, keys)) for step in steps) * (size + BLOCK_COST)
        if cost < lowest:
            best, lowest = size, cost
    columns = tuple((10**6, width) for width in split_columns(longest))
    found = [b for step in steps for b in plan(step, dataclasses.replace(wide, tokens=best, columns=columns), keys)]
    # tokens are what costs: a block should be full of them before it is full of anything else
    most_items = 10**9 if slots is None else slots

    def spare(counts: Sequence[int], of_item: int = 1) -> int:
        return min(1 + max(counts, default=0) * 5 // 4, most_items * of_item)

    reaching = [[10**6 - trunk.free[c] for block in found for trunk in block.trunks] for c in range(len(columns))]
    return dataclasses.replace(
        wide,
        tokens=best,
        columns=tuple((spare(own, shared), width) for own, (_, width) in zip(reaching, columns, strict=True)),
        scored=max(size_bucket(spare([b.scored for b in found], shared * length)), shared * length),
        items=spare([len(b.rows) for b in found]),
    )


def choose_small(steps: Sequence[Sequence[Sequence[Item]]], room: Room) -> Room:
    """A smaller room for the blocks of these steps that fit one: the size that saves most tokens; `room` itself where none
    saves a twentieth."""
    keys = Keys()
    blocks = [block for step in steps for block in plan(step, room, keys)]
    tokens = [room.tokens - min(t.left for t in block.trunks) for block in blocks]
    sizes = sorted({-(-n // 16) * 16 for n in tokens})
    saved = [sum(n <= size for n in tokens) * (room.tokens - size) for size in sizes]
    if not saved or max(saved) * 20 < room.tokens * len(blocks):
        return room
    size = sizes[int(np.argmax(saved))]
    fitting = [block for block, n in zip(blocks, tokens, strict=True) if n <= size]

    def rows(column: int) -> int:
        most = room.columns[column][0]
        return max(1, *(most - t.free[column] for block in fitting for t in block.trunks))

    scored = min(room.scored, -(-max(block.scored for block in fitting) // 16) * 16)
    columns = tuple((rows(column), width) for column, (_, width) in enumerate(room.columns))
    return dataclasses.replace(room, tokens=size, columns=columns, scored=scored)


def _read(step, keys: Keys, room: Room) -> int:
    """Distinct tokens of a step."""
    plans = plan(step, dataclasses.replace(room, tokens=10**9), keys)
    return max((10**9 - min(t.left for t in b.trunks) for b in plans), default=1)


def most_blocks(steps: Sequence[Sequence[Sequence[Item]]], room: Room, slots: int) -> int:
    """Blocks that a step may come to take, when all of its `slots` items are distinct and a quarter longer than these."""
    items = [item for step in steps for micro in step for item in micro]
    shared = len(room.opening)
    tokens = sum(len(row.prompt) - shared + len(row.completion) for item in items for row in item) / room.trunks
    longer = 1.25 * tokens / max(1, len(items))
    return 1 + -int(-max(slots * longer / (room.tokens - shared), slots / room.items))


def stack_blocks(
    steps: list[list[Block]], room: Room, count: int, small: Room | None = None
) -> tuple[Block, np.ndarray, np.ndarray]:
    """Blocks of steps -> arrays [S, K, ...] with K = count, empty blocks behind; int32[S], how many are in use; bool[S, K],
    which of them fit the small room."""
    empty = OpenBlock(room, 0).close()
    padded = [blocks + [empty] * (count - len(blocks)) for blocks in steps]
    inner = [jax.tree.map(lambda *parts: np.stack(parts), *blocks) for blocks in padded]
    fitting = np.array([[small is not None and fits(block, small) for block in blocks] for blocks in padded])
    used = np.array([len(blocks) for blocks in steps], np.int32)
    return jax.tree.map(lambda *parts: np.stack(parts), *inner), used, fitting


def fold_rows(rows: Sequence[Row], room: Room) -> tuple[list[Block], list[tuple[int, int]]]:
    """Single rows as blocks, and for each the (block, row) where it stands."""
    items: list[Item] = [(row,) for row in rows]
    blocks = plan([items], room, Keys())
    places = {id(item): (b, slot) for b, block in enumerate(blocks) for slot, (item, _) in enumerate(block.rows)}
    return [block.close() for block in blocks], [places[id(item)] for item in items]
