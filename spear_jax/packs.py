"""Trees of tokens -> flat packs, and prompts as packs that generation reads."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.rooms import Room, split_grids
from spear_jax.types import Block, Pack


class Trunk:
    """One pack under construction."""

    def __init__(self, room: Room):
        self.opening = room.opening
        self.free = [count for count, _ in room.grids]
        self.widths = [width for _, width in room.grids]
        self.left = room.tokens - len(room.opening)
        self.trees: dict[tuple[int, ...], list[Tree]] = {}

    def place(self, prompt: tuple[int, ...], completion: Sequence[int]) -> "tuple[Tree, int] | None":
        """The tree and branch that a completion joins; None where there is no room. Its last token is never read.

        Raises: ValueError for a prompt that does not go on from the opening.
        """
        read, shared = len(completion) - 1, len(self.opening)
        for tree in self.trees.get(prompt, ()):
            if read <= min(self.left, self.widths[tree.grid] - tree.length):
                self.left -= read
                return tree, tree.add(completion)
        if prompt[:shared] != self.opening or len(prompt) == shared:
            raise ValueError(f"the prompt {prompt} does not go on from the opening {self.opening}")
        need = len(prompt) - shared + read
        fitting = [g for g, free in enumerate(self.free) if free and self.widths[g] >= need]
        if not fitting or need > self.left:
            return None
        self.free[fitting[0]] -= 1
        self.left -= need
        tree = Tree(prompt[shared:], fitting[0])
        self.trees.setdefault(prompt, []).append(tree)
        return tree, tree.add(completion)


class Tree:
    """A prompt without its opening, with completions behind it."""

    def __init__(self, prompt: tuple[int, ...], grid: int):
        self.prompt, self.grid, self.length = prompt, grid, len(prompt)
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
    grids = tuple(np.zeros(shape, np.int32) for shape in room.grids)
    branch = tuple(np.full((rows, shared + width), -1, np.int32) for rows, width in room.grids)
    offsets = np.cumsum([shared, *(rows * width for rows, width in room.grids)])
    used, base, at = [0] * len(grids), {}, shared
    tokens[:shared] = room.opening
    positions[:shared] = cell[:shared] = np.arange(shared)
    for tree in (tree for trees in trunk.trees.values() for tree in trees):
        row, size = used[tree.grid], len(tree.prompt)
        used[tree.grid] += 1
        base[id(tree)] = at
        tokens[at : at + size] = tree.prompt
        positions[at : at + tree.length] = shared + np.arange(tree.length)
        branch[tree.grid][row, : shared + size] = 0
        for number, (completion, start) in enumerate(zip(tree.branches, tree.starts, strict=True), 1):
            read = len(completion) - 1
            tokens[at + start : at + start + read] = completion[:-1]
            positions[at + start : at + start + read] = shared + size + np.arange(read)
            branch[tree.grid][row, shared + start : shared + start + read] = number
        places = np.arange(at, at + tree.length)
        grids[tree.grid][row, : tree.length] = places
        cell[places] = offsets[tree.grid] + row * room.grids[tree.grid][1] + np.arange(tree.length)
        at += tree.length
    if shared:
        own = np.arange(shared, dtype=np.int32)[None]
        grids, branch = (own, *grids), (np.full_like(own, 0 if at > shared else -1), *branch)
    return Pack(tokens, positions, grids, branch, cell), base


def real_tokens(pack: Pack) -> int:
    """How many of a pack's tokens (numpy arrays, any leading axes) are not padding."""
    own = (branch[..., -grid.shape[-1] :] for grid, branch in zip(pack.grids, pack.branches, strict=True))
    return sum(int((branch >= 0).sum()) for branch in own)


def fits(block: Block, room: Room) -> bool:
    """Whether `shrink` would lose nothing of a block (numpy arrays)."""
    for pack in block.packs:
        if real_tokens(pack) > room.tokens:
            return False
        used = [int((branch[:, 0] >= 0).sum()) for branch in pack.branches]
        if any(rows > most for rows, most in zip(used, _grid_rows(room), strict=True)):
            return False
    ends = block.start + block.rows.completion_mask.sum(-1)
    return int(ends.max()) <= room.scored


def shrink(block: Block, room: Room) -> Block:
    """A block's arrays cut to a smaller room that it fits; what is behind is padding."""
    rows = _grid_rows(room)

    def cut(pack: Pack) -> Pack:
        cell, gone, offset = pack.cell[: room.tokens], 0, 0
        shift = jnp.zeros_like(cell)
        for grid, kept in zip(pack.grids, rows, strict=True):
            shift = jnp.where(cell >= offset, gone, shift)  # cells of this grid, and for now of those behind it
            offset, gone = offset + grid.size, gone + grid[kept:].size
        return Pack(
            tokens=pack.tokens[: room.tokens],
            positions=pack.positions[: room.tokens],
            grids=tuple(grid[:n] for grid, n in zip(pack.grids, rows, strict=True)),
            branches=tuple(branch[:n] for branch, n in zip(pack.branches, rows, strict=True)),
            cell=cell - shift,
        )

    return block.replace(
        packs=tuple(map(cut, block.packs)),
        source=tuple(places[: room.scored] for places in block.source),
        target=block.target[: room.scored],
    )


def _grid_rows(room: Room) -> list[int]:
    """Rows of each of a pack's grids, the opening's among them."""
    return [1] * bool(room.opening) + [rows for rows, _ in room.grids]


def one_sequence(tokens: Sequence[int]) -> Pack:
    """A pack of nothing but one sequence."""
    places = np.arange(len(tokens), dtype=np.int32)
    return Pack(np.array(tokens, np.int32), places, (places[None],), (np.zeros_like(places)[None],), places)


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
    short, *rest = split_grids(sum(lengths, []), width, cell=32)
    total = max(1, *map(len, lengths))
    long = min(total, 1 + max(sum(n > short for n in own) for own in lengths))
    # a short prompt may stand in a long one's row
    grids = ((total - long, short), (long, width)) if rest and long < total else ((total, width),)
    spread = lambda own: 2.5 * np.std(own or [0]) * (len(own) / dealt) ** 0.5
    return Room(
        tokens=-(-int(max(width, *(sum(own) + spread(own) for own in lengths))) // 32) * 32,
        grids=grids,
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
