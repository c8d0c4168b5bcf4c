"""Rows of token ids -> static-shape blocks that hold each distinct row once and each prompt once.

A block is what goes through the model together. Its sizes (`Room`) are chosen once, from the first rows that are seen, so that
little of it is padding; how many blocks a step takes is a number on the device, so that a step costs what its tokens cost and
nothing compiles again.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from spear_jax.rooms import Room, size_bucket, split_grids
from spear_jax.types import Batch, Block, Pack

HEADROOM = 12  # a block's size is chosen as if 1 / HEADROOM of it were to stay free
BLOCK_COST = 48  # a block's pass over all weights, in tokens; decides between few blocks and many


@dataclasses.dataclass(frozen=True)
class Row:
    """One training row; host only.

    Attributes:
        prompt: token ids the completion is scored under.
        completion: the sampled token ids, EOS included when it was generated.
        loss_mask: bool[len(completion)], the positions that a loss may use.
        weight: the trace's confidence, or the example's weight.
        label: +1 win (or real), -1 lose (or synthetic); a method may use further kinds.
        advantage: of the completion.
    """

    prompt: list[int]
    completion: list[int]
    loss_mask: np.ndarray
    weight: float
    label: int
    advantage: float = 0.0


Item = tuple[Row, ...]  # rows that a loss needs together


class _Trunk:
    """One pack under construction."""

    def __init__(self, room: Room):
        self.free = [count for count, _ in room.grids]
        self.widths = [width for _, width in room.grids]
        self.left = room.tokens
        self.trees: dict[tuple[int, ...], list[_Tree]] = {}

    def place(self, prompt: tuple[int, ...], completion: Sequence[int]) -> "tuple[_Tree, int] | None":
        """The tree and branch that a completion joins; None where there is no room. Its last token is never read."""
        read = len(completion) - 1
        for tree in self.trees.get(prompt, ()):
            if read <= min(self.left, self.widths[tree.grid] - tree.length):
                self.left -= read
                return tree, tree.add(completion)
        need = len(prompt) + read
        fitting = [g for g, free in enumerate(self.free) if free and self.widths[g] >= need]
        if not fitting or need > self.left:
            return None
        self.free[fitting[0]] -= 1
        self.left -= need
        tree = _Tree(prompt, fitting[0])
        self.trees.setdefault(prompt, []).append(tree)
        return tree, tree.add(completion)


class _Tree:
    """A prompt with completions behind it."""

    def __init__(self, prompt: tuple[int, ...], grid: int):
        self.prompt, self.grid, self.length = prompt, grid, len(prompt)
        self.branches: list[Sequence[int]] = []
        self.starts: list[int] = []  # of each branch, relative to the tree

    def add(self, completion: Sequence[int]) -> int:
        self.branches.append(completion)
        self.starts.append(self.length)
        self.length += len(completion) - 1
        return len(self.branches) - 1


class _Open:
    """A block under construction."""

    def __init__(self, room: Room, micro: int):
        self.room, self.micro = room, micro
        self.trunks = [_Trunk(room) for _ in range(room.trunks)]
        self.scored = 0
        self.known: dict[tuple, list[int]] = {}  # item -> where its completions begin in `target`
        self.places: list[tuple[int, list[tuple[_Tree, int]]]] = []  # (start, a (tree, branch) in each trunk)
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
        packs, bases = zip(*(_fill(trunk, room) for trunk in self.trunks), strict=True)
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


def _fill(trunk: _Trunk, room: Room) -> tuple[Pack, dict[int, int]]:
    """A trunk's arrays, and the flat place where each tree (by id) begins."""
    tokens, positions, cell = (np.zeros(room.tokens, np.int32) for _ in range(3))
    grids = tuple(np.zeros(shape, np.int32) for shape in room.grids)
    branch = tuple(np.full(shape, -1, np.int32) for shape in room.grids)
    offsets = np.cumsum([0, *(rows * width for rows, width in room.grids)])
    used, base, at = [0] * len(grids), {}, 0
    for tree in (tree for trees in trunk.trees.values() for tree in trees):
        row, size = used[tree.grid], len(tree.prompt)
        used[tree.grid] += 1
        base[id(tree)] = at
        tokens[at : at + size] = tree.prompt
        positions[at : at + tree.length] = np.arange(tree.length)
        branch[tree.grid][row, :size] = 0
        for number, (completion, start) in enumerate(zip(tree.branches, tree.starts, strict=True), 1):
            read = len(completion) - 1
            tokens[at + start : at + start + read] = completion[:-1]
            positions[at + start : at + start + read] = size + np.arange(read)
            branch[tree.grid][row, start : start + read] = number
        places = np.arange(at, at + tree.length)
        grids[tree.grid][row, : tree.length] = places
        cell[places] = offsets[tree.grid] + row * room.grids[tree.grid][1] + np.arange(tree.length)
        at += tree.length
    return Pack(tokens, positions, grids, branch, cell), base


def batch(rows: Sequence[Row | None], length: int) -> Batch:
    """Rows as numpy arrays [B, T]; a None row is all padding (label 0). No completion is longer than `length`."""
    size = len(rows)
    found = Batch(
        completion_mask=np.zeros((size, length), bool),
        loss_mask=np.zeros((size, length), bool),
        weight=np.zeros((size, length), np.float32),
        advantage=np.zeros(size, np.float32),
        label=np.zeros(size, np.int32),
    )
    for index, row in enumerate(rows):
        if row is not None:
            end = len(row.completion)
            found.completion_mask[index, :end] = True
            found.loss_mask[index, :end] = row.loss_mask
            found.weight[index] = row.weight
            found.advantage[index] = row.advantage
            found.label[index] = row.label
    return found


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


def items_of(rows: Sequence[Row | None], kinds: int) -> list[Item]:
    """A micro-batch's items: row i of each of `kinds` equal blocks; None rows make none."""
    size = len(rows) // kinds
    parts = [rows[kind * size : (kind + 1) * size] for kind in range(kinds)]
    return [item for item in zip(*parts, strict=True) if None not in item]


def fold(micros: Sequence[Sequence[Item]], room: Room, keys: Keys | None = None) -> list[Block]:
    """The blocks of an optimiser step; block by block, items of one micro-batch.

    Items with a common prompt are kept together, larger groups first; within a block an item that stands twice is read once.
    Raises: ValueError where an item alone is larger than a block.
    """
    return [block.close() for block in _plan(micros, room, keys or Keys())]


def _plan(micros, room: Room, keys: Keys) -> list[_Open]:
    found = []
    for number, items in enumerate(micros):
        families = collections.defaultdict(list)
        for item in items:
            key = tuple((keys(row.prompt), keys(row.completion)) for row in item)
            families[key[0][0]].append((key, item))
        sizes = {prompt: _tokens(family, room.trunks) for prompt, family in families.items()}
        opened: list[_Open] = []
        for prompt in sorted(families, key=lambda p: -sizes[p]):
            fits = (b for b in opened if min(t.left for t in b.trunks) >= sizes[prompt])
            block = next(fits, None)
            for key, item in sorted(families[prompt], key=lambda pair: pair[0]):
                if block is None or not block.add(key, item):
                    block = _next(opened, room, number, key, item)
        found += opened
    return found


def _next(opened: list[_Open], room: Room, micro: int, key: tuple, item: Item) -> _Open:
    """The first open block that takes an item, or a new one."""
    for block in opened:
        if block.add(key, item):
            return block
    block = _Open(room, micro)
    if not block.add(key, item):
        raise ValueError(f"an item of {[len(r.prompt) + len(r.completion) for r in item]} tokens exceeds {room}")
    opened.append(block)
    return block


def _tokens(family: list, trunks: int) -> int:
    """Tokens that a family adds to the fuller trunk: its prompts once, its distinct completions."""
    total = [0] * trunks
    seen: set = set()
    for key, item in family:
        for kind, (row, (prompt, completion)) in enumerate(zip(item, key, strict=True)):
            trunk = kind % trunks
            if (trunk, prompt) not in seen:
                seen.add((trunk, prompt))
                total[trunk] += len(row.prompt)
            if (trunk, prompt, completion) not in seen:
                seen.add((trunk, prompt, completion))
                total[trunk] += len(row.completion) - 1
    return max(total)


def choose_room(
    steps: Sequence[Sequence[Sequence[Item]]], kinds: int, trunks: int, prompt: int, length: int, limit: int
) -> Room:
    """The block size that wastes least on these steps.

    Args:
        steps: the micro-batches of some optimiser steps.
        kinds: rows of an item; trunks: packs.
        prompt: P, the longest prompt that will ever come; length: T, the longest completion.
        limit: tokens of a block, at most; more only where a single item needs them.
    Returns: a room into which every item fits that keeps to `prompt` and `length`.
    """
    shared = -(-kinds // trunks)  # rows of an item in one pack, under one prompt
    longest = prompt + max(2, shared) * (length - 1)
    least = size_bucket(prompt + shared * (length - 1))
    most = max(least, limit)
    wide = Room(most, ((10**6, longest),), 10**9, 10**9, kinds, trunks, length)
    keys = Keys()
    trees = [tree.length for tree in _trees(_plan([sum(map(list, step), [])], wide, keys) for step in steps)]
    widths = split_grids(trees, longest)
    total = max((_read(step, keys, wide) for step in steps), default=least)
    best, lowest = most, float("inf")
    sizes = np.geomspace(least, max(least, min(most, total * HEADROOM / (HEADROOM - 1))), 48)
    for size in sorted({int(-(-size // 16) * 16) for size in sizes}):
        # other steps will be a little longer than these
        room = dataclasses.replace(wide, tokens=max(least, size - size // HEADROOM))
        cost = sum(len(_plan(step, room, keys)) for step in steps) * (size + BLOCK_COST)
        if cost < lowest:
            best, lowest = size, cost
    grids = tuple((10**6, width) for width in widths)
    found = [b for step in steps for b in _plan(step, dataclasses.replace(wide, tokens=best, grids=grids), keys)]
    # tokens are what costs: a block should be full of them before it is full of anything else
    spare = lambda counts: 1 + max(counts, default=0) * 5 // 4
    used = [[10**6 - min(t.free[g] for t in b.trunks) for b in found] for g in range(len(widths))]
    return Room(
        tokens=best,
        grids=tuple((spare(counts), width) for counts, width in zip(used, widths, strict=True)),
        scored=max(size_bucket(spare([b.scored for b in found])), shared * length),
        items=spare([len(b.rows) for b in found]),
        kinds=kinds,
        trunks=trunks,
        length=length,
    )


def _trees(plans: Iterable[list[_Open]]) -> Iterable[_Tree]:
    return (t for plan in plans for b in plan for trunk in b.trunks for trees in trunk.trees.values() for t in trees)


def _read(step, keys: Keys, room: Room) -> int:
    """Distinct tokens of a step."""
    plans = _plan(step, dataclasses.replace(room, tokens=10**9), keys)
    return max((10**9 - min(t.left for t in b.trunks) for b in plans), default=1)


def most_blocks(steps: Sequence[Sequence[Sequence[Item]]], room: Room, slots: int) -> int:
    """Blocks that a step may come to take, when all of its `slots` items are distinct and a quarter longer than these."""
    items = [item for step in steps for micro in step for item in micro]
    tokens = sum(len(row.prompt) + len(row.completion) for item in items for row in item) / room.trunks
    longer = 1.25 * tokens / max(1, len(items))
    return 1 + -int(-max(slots * longer / room.tokens, slots / room.items))


def stack_blocks(steps: list[list[Block]], room: Room, count: int) -> tuple[Block, np.ndarray]:
    """Blocks of steps -> arrays [S, K, ...] with K = count, empty blocks behind; and int32[S], how many are in use."""
    empty = _Open(room, 0).close()
    padded = [blocks + [empty] * (count - len(blocks)) for blocks in steps]
    inner = [jax.tree.map(lambda *parts: np.stack(parts), *blocks) for blocks in padded]
    return jax.tree.map(lambda *parts: np.stack(parts), *inner), np.array([len(blocks) for blocks in steps], np.int32)


def draw(pool: list, count: int, rng: np.random.Generator) -> list:
    """`count` members of a pool: without replacement where it is large enough, else with. An empty pool gives Nones.

    Source: the shared federated shell of the published SPEAR code (independent for every micro-step).
    """
    if not pool:
        return [None] * count
    chosen = rng.choice(len(pool), size=count, replace=len(pool) < count)
    return [pool[i] for i in chosen]


def fold_rows(rows: Sequence[Row], room: Room) -> tuple[list[Block], list[tuple[int, int]]]:
    """Single rows as blocks, and for each the (block, row) where it stands."""
    items: list[Item] = [(row,) for row in rows]
    plan = _plan([items], room, Keys())
    places = {id(item): (b, slot) for b, block in enumerate(plan) for slot, (item, _) in enumerate(block.rows)}
    return [block.close() for block in plan], [places[id(item)] for item in items]


def pack_prompts(
    groups: Sequence[Sequence[list[int]]], rows: int, width: int, room: Room
) -> tuple[Pack, np.ndarray, np.ndarray]:
    """Prompts of groups that share nothing with one another; within a group equal prompts are read once.

    Args:
        groups: G lists of at most `rows` prompts.
        width: P; no prompt is longer.
    Returns: a pack with leading axis G; int32[G, rows, P], the flat place of each prompt's tokens, left-padded; bool[G, rows, P].
    """
    packs, index, mask = [], np.zeros((len(groups), rows, width), np.int32), np.zeros((len(groups), rows, width), bool)
    for group, prompts in enumerate(groups):
        trunk = _Trunk(room)
        for prompt in sorted({tuple(p) for p in prompts}, key=len, reverse=True):
            if trunk.place(prompt, (0,)) is None:
                raise ValueError(f"a prompt of {len(prompt)} tokens exceeds {room}")
        pack, base = _fill(trunk, room)
        for row, prompt in enumerate(prompts):
            begin = base[id(trunk.trees[tuple(prompt)][0])]
            index[group, row, width - len(prompt) :] = begin + np.arange(len(prompt))
            mask[group, row, width - len(prompt) :] = True
        packs.append(pack)
    return jax.tree.map(lambda *parts: np.stack(parts), *packs), index, mask


def prompt_room(groups: Sequence[Sequence[list[int]]], width: int) -> Room:
    """A room that holds every group's prompts, and as many others of their kind: the spread of a sum is added to the sum."""
    lengths = _distinct(groups)
    short, *rest = split_grids(sum(lengths, []), width, cell=32)
    counts = [max(sum((n <= short) == low for n in own) for own in lengths) for low in (True, False)]
    grids = ((short, counts[0]), *((width, counts[1]) for width in rest))
    return Room(
        tokens=size_bucket(int(max(sum(own) + 2.5 * np.std(own or [0]) * len(own) ** 0.5 for own in lengths)), 32),
        grids=tuple((size_bucket(max(1, count), 2), width) for width, count in grids),
        scored=1,
        items=1,
        kinds=1,
        trunks=1,
        length=1,
    )


def holds_prompts(room: Room, groups: Sequence[Sequence[list[int]]]) -> bool:
    """Whether `pack_prompts` finds room for all of them."""
    for own in _distinct(groups):
        places = sum(rows for rows, _ in room.grids)
        long = sum(n > room.grids[0][1] for n in own)
        if sum(own) > room.tokens or len(own) > places or long > sum(rows for rows, _ in room.grids[1:]):
            return False
        if max(own, default=0) > room.grids[-1][1]:
            return False
    return True


def _distinct(groups) -> list[list[int]]:
    """The lengths of each group's distinct prompts."""
    return [[len(prompt) for prompt in {tuple(p) for p in prompts}] for prompts in groups]
