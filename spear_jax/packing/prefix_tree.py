"""Trees of tokens -> flat packs, and prompts as packs that generation reads."""

import bisect
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.packing.arrays import Block, Pack, spans
from spear_jax.packing.shape_buckets import Room, split_columns


class Trunk:
    """One pack under construction."""

    def __init__(self, room: Room):
        self.opening = room.opening
        self.free = [rows for rows, _ in room.columns]  # trees that may yet reach each column
        self.ends = [end for *_, end in spans(room.columns)]
        self.left = room.tokens - len(room.opening)
        self.trees: dict[tuple[int, ...], list[Tree]] = {}

    def place(self, prompt: tuple[int, ...], completion: Sequence[int]) -> "tuple[Tree, int] | None":
        """The tree and branch that a completion joins; None where there is no room. Its last token is never read.

        Raises: ValueError for a prompt that does not go on from the opening.
        """
        read, shared = len(completion) - 1, len(self.opening)
        for tree in self.trees.get(prompt, ()):
            if self._take(tree.length, tree.length + read):
                return tree, tree.add(completion)
        if prompt[:shared] != self.opening or len(prompt) == shared:
            raise ValueError(f"the prompt {prompt} does not go on from the opening {self.opening}")
        tree = Tree(prompt[shared:])
        if not self._take(0, tree.length + read):
            return None
        self.trees.setdefault(prompt, []).append(tree)
        return tree, tree.add(completion)

    def _take(self, length: int, longer: int) -> bool:
        """Takes the room for a tree (0: a new one) that grows; False where there is not as much."""
        reached = bisect.bisect_left(self.ends, length) + 1 if length else 0
        columns = range(reached, bisect.bisect_left(self.ends, longer) + 1)
        if longer > self.ends[-1] or longer - length > self.left or not all(self.free[c] for c in columns):
            return False
        for column in columns:
            self.free[column] -= 1
        self.left -= longer - length
        return True


class Tree:
    """A prompt without its opening, with completions behind it."""

    def __init__(self, prompt: tuple[int, ...]):
        self.prompt, self.length = prompt, len(prompt)
        self.branches: list[Sequence[int]] = []
        self.starts: list[int] = []  # of each branch, relative to the tree

    def add(self, completion: Sequence[int]) -> int:
        self.branches.append(completion)
        self.starts.append(self.length)
        self.length += len(completion) - 1
        return len(self.branches) - 1


def fill(trunk: Trunk, room: Room) -> tuple[Pack, dict[int, int]]:
    """A trunk's arrays, and the flat place where each tree (by id) begins."""
    shared = len(room.opening)
    tokens, positions, cell = (np.zeros(room.tokens, np.int32) for _ in range(3))
    size = room.columns[0][0], shared + sum(width for _, width in room.columns)
    pack = Pack(tokens, positions, np.zeros(size, np.int32), np.full(size, -1, np.int32), cell, _columns(room))
    trees = sorted((tree for trees in trunk.trees.values() for tree in trees), key=lambda tree: -tree.length)
    base, at = {}, shared if trees else 0
    tokens[:at], positions[:at], cell[:at] = room.opening[:at], np.arange(at), np.arange(at)
    for row, tree in enumerate(trees):
        grid, branch = pack.grid[row], pack.branch[row]
        begin = len(tree.prompt)
        base[id(tree)] = at
        tokens[at : at + begin] = tree.prompt
        positions[at : at + tree.length] = shared + np.arange(tree.length)
        branch[: shared + begin] = 0
        for number, (completion, start) in enumerate(zip(tree.branches, tree.starts, strict=True), 1):
            read = len(completion) - 1
            tokens[at + start : at + start + read] = completion[:-1]
            positions[at + start : at + start + read] = shared + begin + np.arange(read)
            branch[shared + start : shared + start + read] = number
        grid[:shared] = np.arange(shared)
        grid[shared : shared + tree.length] = np.arange(at, at + tree.length)
        at += tree.length
    before = 0
    for rows, begin, end in spans(pack.columns):
        own = pack.branch[:rows, begin:end] >= 0
        cell[pack.grid[:rows, begin:end][own]] = before + np.flatnonzero(own)
        before += own.size
    return pack, base


def _columns(room: Room) -> tuple[tuple[int, int], ...]:
    """Of a pack: the room's, behind the opening's."""
    return ((1, len(room.opening)),) * bool(room.opening) + room.columns


def real_tokens(pack: Pack) -> int:
    """How many of a pack's tokens (numpy arrays, any leading axes) are not padding."""
    return sum(int((pack.branch[..., :rows, begin:end] >= 0).sum()) for rows, begin, end in spans(pack.columns))


def fits(block: Block, room: Room) -> bool:
    """Whether `shrink` would lose nothing of a block (numpy arrays)."""
    for pack in block.packs:
        if real_tokens(pack) > room.tokens:
            return False
        if any((pack.branch[rows:, begin] >= 0).any() for rows, begin, _ in spans(room.columns, len(room.opening))):
            return False
    ends = block.start + block.rows.completion_mask.sum(-1)
    return int(ends.max()) <= room.scored


def shrink(block: Block, room: Room) -> Block:
    """A block's arrays cut to a smaller room that it fits; what is behind is padding."""
    columns, rows = _columns(room), room.columns[0][0]

    def cut(pack: Pack) -> Pack:
        cell, gone, before = pack.cell[: room.tokens], 0, 0
        shift = jnp.zeros_like(cell)
        for (most, width), (kept, _) in zip(pack.columns, columns, strict=True):
            shift = jnp.where(cell >= before, gone, shift)  # queries of this column, and for now of those behind it
            before, gone = before + most * width, gone + (most - kept) * width
        return Pack(
            tokens=pack.tokens[: room.tokens],
            positions=pack.positions[: room.tokens],
            grid=pack.grid[:rows],
            branch=pack.branch[:rows],
            cell=cell - shift,
            columns=columns,
        )

    return block.replace(
        packs=tuple(map(cut, block.packs)),
        source=tuple(places[: room.scored] for places in block.source),
        target=block.target[: room.scored],
    )


def one_sequence(tokens: Sequence[int]) -> Pack:
    """A pack of nothing but one sequence."""
    places = np.arange(len(tokens), dtype=np.int32)
    grid = places[None]
    return Pack(np.array(tokens, np.int32), places, grid, np.zeros_like(grid), places, ((1, len(tokens)),))


def pack_prompts(
    groups: Sequence[Sequence[list[int]]], rows: int, width: int, room: Room, opening: int = 0
) -> tuple[Pack, np.ndarray, np.ndarray]:
    """Prompts of groups that share nothing with one another; within a group equal prompts are read once.

    Args:
        groups: G lists of at most `rows` prompts.
        width: P; no prompt is longer.
        opening: h tokens that all prompts begin with and that are not in the pack.
    Returns: a pack with leading axis G; int32[G, rows, P], the flat place of each prompt's tokens behind h places for the
        opening, left-padded; bool[G, rows, P].
    """
    packs, index, mask = [], np.zeros((len(groups), rows, width), np.int32), np.zeros((len(groups), rows, width), bool)
    for group, prompts in enumerate(groups):
        trunk = Trunk(room)
        for prompt in sorted({tuple(p[opening:]) for p in prompts}, key=len, reverse=True):
            if trunk.place(prompt, (0,)) is None:
                raise ValueError(f"a prompt of {len(prompt)} tokens exceeds {room}")
        pack, base = fill(trunk, room)
        for row, prompt in enumerate(prompts):
            begin = base[id(trunk.trees[tuple(prompt[opening:])][0])]
            index[group, row, width - len(prompt) :] = begin + np.arange(len(prompt))
            index[group, row, width - len(prompt) :][:opening] = np.arange(opening)
            mask[group, row, width - len(prompt) :] = True
        packs.append(pack)
    return jax.tree.map(lambda *parts: np.stack(parts), *packs), index, mask


def prompt_room(groups: Sequence[Sequence[list[int]]], width: int, dealt: int = 1) -> Room:
    """A room that holds every group's prompts, and as many others of their kind: the spread of a sum is added to the sum. It
    holds any single prompt of at most `width` tokens.

    Args: dealt: so many groups share what was drawn together, and with it the spread of its sum.
    """
    lengths = _distinct(groups)
    total, widths = max(1, *map(len, lengths)), split_columns(width)
    begins = itertools.accumulate(widths[:-1], initial=0)
    reaching = [min(total, 1 + max(sum(n > begin for n in own) for own in lengths)) for begin in begins]
    spread = lambda own: 1.5 * np.std(own or [0]) * (len(own) / dealt) ** 0.5
    return Room(
        tokens=-(-int(max(width, *(sum(own) + spread(own) for own in lengths))) // 16) * 16,
        columns=tuple(zip(reaching, widths, strict=True)),
        scored=1,
        items=1,
        kinds=1,
        trunks=1,
        length=1,
    )


def holds_prompts(room: Room, groups: Sequence[Sequence[list[int]]]) -> bool:
    """Whether `pack_prompts` finds room for all of them."""
    columns = spans(room.columns)
    longest = columns[-1][-1]
    for own in _distinct(groups):
        if sum(own) > room.tokens or max(own, default=0) > longest:
            return False
        if any(sum(n > begin for n in own) > rows for rows, begin, _ in columns):
            return False
    return True


def _distinct(groups) -> list[list[int]]:
    """The lengths of each group's distinct prompts."""
    return [[len(prompt) for prompt in {tuple(p) for p in prompts}] for prompts in groups]
