"""Trees of tokens -> flat packs, and prompts as packs that generation reads."""

import bisect
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.packing.arrays import Block, PackedSequences, spans
from spear_jax.packing.shape_buckets import BlockShape, split_tiles


class PackBuilder:
    """One pack under construction."""

    def __init__(self, shape: BlockShape):
        self.shared_prefix = shape.shared_prefix
        self.free = [rows for rows, _ in shape.tiles]  # trees that may yet reach each column
        self.ends = [end for *_, end in spans(shape.tiles)]
        self.left = shape.tokens - len(shape.shared_prefix)
        self.trees: dict[tuple[int, ...], list[PrefixTree]] = {}

    def place(
        self, prompt: tuple[int, ...], completion: Sequence[int]
    ) -> "tuple[PrefixTree, int] | None":
        """The tree and branch that a completion joins; None where there is no room. Its last token
        is never read.

        Raises: ValueError for a prompt that does not go on from the opening.
        """
        read, shared = len(completion) - 1, len(self.shared_prefix)
        for tree in self.trees.get(prompt, ()):
            if self._take(tree.length, tree.length + read):
                return tree, tree.add(completion)
        if prompt[:shared] != self.shared_prefix or len(prompt) == shared:
            raise ValueError(
                f"the prompt {prompt} does not go on from the opening {self.shared_prefix}"
            )
        tree = PrefixTree(prompt[shared:])
        if not self._take(0, tree.length + read):
            return None
        self.trees.setdefault(prompt, []).append(tree)
        return tree, tree.add(completion)

    def _take(self, length: int, longer: int) -> bool:
        """Takes the room for a tree (0: a new one) that grows; False where there is not as much."""
        reached = bisect.bisect_left(self.ends, length) + 1 if length else 0
        tiles = range(reached, bisect.bisect_left(self.ends, longer) + 1)
        if (
            longer > self.ends[-1]
            or longer - length > self.left
            or not all(self.free[c] for c in tiles)
        ):
            return False
        for tile in tiles:
            self.free[tile] -= 1
        self.left -= longer - length
        return True


class PrefixTree:
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


def fill(builder: PackBuilder, shape: BlockShape) -> tuple[PackedSequences, dict[int, int]]:
    """The arrays of a pack, and the flat place where each tree (by id) begins."""
    shared = len(shape.shared_prefix)
    tokens, positions, query_index = (np.zeros(shape.tokens, np.int32) for _ in range(3))
    size = shape.tiles[0][0], shared + sum(width for _, width in shape.tiles)
    pack = PackedSequences(
        tokens,
        positions,
        np.zeros(size, np.int32),
        np.full(size, -1, np.int32),
        query_index,
        _tiles(shape),
    )
    trees = sorted(
        (tree for trees in builder.trees.values() for tree in trees), key=lambda tree: -tree.length
    )
    base, at = {}, shared if trees else 0
    tokens[:at], positions[:at], query_index[:at] = (
        shape.shared_prefix[:at],
        np.arange(at),
        np.arange(at),
    )
    for row, tree in enumerate(trees):
        token_index, branch_ids = pack.token_index[row], pack.branch_ids[row]
        begin = len(tree.prompt)
        base[id(tree)] = at
        tokens[at : at + begin] = tree.prompt
        positions[at : at + tree.length] = shared + np.arange(tree.length)
        branch_ids[: shared + begin] = 0
        for number, (completion, start) in enumerate(
            zip(tree.branches, tree.starts, strict=True), 1
        ):
            read = len(completion) - 1
            tokens[at + start : at + start + read] = completion[:-1]
            positions[at + start : at + start + read] = shared + begin + np.arange(read)
            branch_ids[shared + start : shared + start + read] = number
        token_index[:shared] = np.arange(shared)
        token_index[shared : shared + tree.length] = np.arange(at, at + tree.length)
        at += tree.length
    before = 0
    for rows, begin, end in spans(pack.tiles):
        own = pack.branch_ids[:rows, begin:end] >= 0
        query_index[pack.token_index[:rows, begin:end][own]] = before + np.flatnonzero(own)
        before += own.size
    return pack, base


def _tiles(shape: BlockShape) -> tuple[tuple[int, int], ...]:
    """The shape's tiles, behind that of the shared prefix."""
    return ((1, len(shape.shared_prefix)),) * bool(shape.shared_prefix) + shape.tiles


def real_tokens(pack: PackedSequences) -> int:
    """How many of a pack's tokens (numpy arrays, any leading axes) are not padding."""
    return sum(
        int((pack.branch_ids[..., :rows, begin:end] >= 0).sum())
        for rows, begin, end in spans(pack.tiles)
    )


def fits(block: Block, shape: BlockShape) -> bool:
    """Whether `shrink` would lose nothing of a block (numpy arrays)."""
    for pack in block.packs:
        if real_tokens(pack) > shape.tokens:
            return False
        if any(
            (pack.branch_ids[rows:, begin] >= 0).any()
            for rows, begin, _ in spans(shape.tiles, len(shape.shared_prefix))
        ):
            return False
    ends = block.start + block.rows.completion_mask.sum(-1)
    return int(ends.max()) <= shape.scored


def shrink(block: Block, shape: BlockShape) -> Block:
    """A block's arrays cut to a smaller room that it fits; what is behind is padding."""
    tiles, rows = _tiles(shape), shape.tiles[0][0]

    def cut(pack: PackedSequences) -> PackedSequences:
        query_index, gone, before = pack.query_index[: shape.tokens], 0, 0
        shift = jnp.zeros_like(query_index)
        for (most, width), (kept, _) in zip(pack.tiles, tiles, strict=True):
            shift = jnp.where(
                query_index >= before, gone, shift
            )  # queries of this column, and for now of those behind it
            before, gone = before + most * width, gone + (most - kept) * width
        return PackedSequences(
            tokens=pack.tokens[: shape.tokens],
            positions=pack.positions[: shape.tokens],
            token_index=pack.token_index[:rows],
            branch_ids=pack.branch_ids[:rows],
            query_index=query_index - shift,
            tiles=tiles,
        )

    return block.replace(
        packs=tuple(map(cut, block.packs)),
        source=tuple(places[: shape.scored] for places in block.source),
        target=block.target[: shape.scored],
    )


def one_sequence(tokens: Sequence[int]) -> PackedSequences:
    """A pack of nothing but one sequence."""
    places = np.arange(len(tokens), dtype=np.int32)
    token_index = places[None]
    return PackedSequences(
        np.array(tokens, np.int32),
        places,
        token_index,
        np.zeros_like(token_index),
        places,
        ((1, len(tokens)),),
    )


def pack_prompts(
    groups: Sequence[Sequence[list[int]]],
    rows: int,
    width: int,
    shape: BlockShape,
    shared_prefix: int = 0,
) -> tuple[PackedSequences, np.ndarray, np.ndarray]:
    """Prompts of groups that share nothing with one another; within a group equal prompts are read
    once.

    Args:
        groups: G lists of at most `rows` prompts.
        width: P; no prompt is longer.
        opening: h tokens that all prompts begin with and that are not in the pack.
    Returns: a pack with leading axis G; int32[G, rows, P], the flat place of each prompt's tokens
        behind h places for the opening, left-padded; bool[G, rows, P].
    """
    packs, index, mask = (
        [],
        np.zeros((len(groups), rows, width), np.int32),
        np.zeros((len(groups), rows, width), bool),
    )
    for group, prompts in enumerate(groups):
        builder = PackBuilder(shape)
        for prompt in sorted({tuple(p[shared_prefix:]) for p in prompts}, key=len, reverse=True):
            if builder.place(prompt, (0,)) is None:
                raise ValueError(f"a prompt of {len(prompt)} tokens exceeds {shape}")
        pack, base = fill(builder, shape)
        for row, prompt in enumerate(prompts):
            begin = base[id(builder.trees[tuple(prompt[shared_prefix:])][0])]
            index[group, row, width - len(prompt) :] = begin + np.arange(len(prompt))
            index[group, row, width - len(prompt) :][:shared_prefix] = np.arange(shared_prefix)
            mask[group, row, width - len(prompt) :] = True
        packs.append(pack)
    return jax.tree.map(lambda *parts: np.stack(parts), *packs), index, mask


def prompt_shape(groups: Sequence[Sequence[list[int]]], width: int, dealt: int = 1) -> BlockShape:
    """A room that holds every group's prompts, and as many others of their kind: the spread of a
    sum is added to the sum. It holds any single prompt of at most `width` tokens.

    Args: dealt: so many groups share what was drawn together, and with it the spread of its sum.
    """
    lengths = _distinct(groups)
    total, widths = max(1, *map(len, lengths)), split_tiles(width)
    begins = itertools.accumulate(widths[:-1], initial=0)
    reaching = [
        min(total, 1 + max(sum(n > begin for n in own) for own in lengths)) for begin in begins
    ]
    spread = lambda own: 1.5 * np.std(own or [0]) * (len(own) / dealt) ** 0.5
    return BlockShape(
        tokens=-(-int(max(width, *(sum(own) + spread(own) for own in lengths))) // 16) * 16,
        tiles=tuple(zip(reaching, widths, strict=True)),
        scored=1,
        groups=1,
        rows_per_group=1,
        num_packs=1,
        length=1,
    )


def holds_prompts(shape: BlockShape, groups: Sequence[Sequence[list[int]]]) -> bool:
    """Whether `pack_prompts` finds room for all of them."""
    tiles = spans(shape.tiles)
    longest = tiles[-1][-1]
    for own in _distinct(groups):
        if sum(own) > shape.tokens or max(own, default=0) > longest:
            return False
        if any(sum(n > begin for n in own) > rows for rows, begin, _ in tiles):
            return False
    return True


def _distinct(groups) -> list[list[int]]:
    """The lengths of each group's distinct prompts."""
    return [[len(prompt) for prompt in {tuple(p) for p in prompts}] for prompts in groups]
