"""Prefix trees: prompts with their completions behind them, and how they fill a pack's arrays.

`packing.arrays.PackedSequences` shows a pack. Training packs prompts with completions (`blocks`);
generation packs prompts alone (`pack_prompts`).
"""

import bisect
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.packing.arrays import Block, PackedSequences, spans
from spear_jax.packing.shape_buckets import BlockShape, split_tiles


class PackBuilder:
    """A pack under construction: its trees, and how much more it can hold.

    Attributes:
        left: tokens that are still free.
        free: for each tile, the trees that may still reach into it.
        trees: the trees of each prompt; several where one would have become longer than the tiles.
    """

    def __init__(self, shape: BlockShape):
        self.shared_prefix = shape.shared_prefix
        self.free = [rows for rows, _ in shape.tiles]
        self.ends = [end for *_, end in spans(shape.tiles)]
        self.left = shape.tokens - len(shape.shared_prefix)
        self.trees: dict[tuple[int, ...], list[PrefixTree]] = {}

    def place(
        self, prompt: tuple[int, ...], completion: Sequence[int]
    ) -> "tuple[PrefixTree, int] | None":
        """Adds a completion under its prompt, to the prompt's tree or as a new one.

        Its last token takes no place, since nothing is predicted from it.

        Returns: the tree and the number of the branch, from 0; None where the pack is too full.
        Raises: ValueError for a prompt that does not go on from the shared prefix.
        """
        read, shared = len(completion) - 1, len(self.shared_prefix)
        for tree in self.trees.get(prompt, ()):
            if self._take(tree.length, tree.length + read):
                return tree, tree.add(completion)
        if prompt[:shared] != self.shared_prefix or len(prompt) == shared:
            raise ValueError(
                f"the prompt {prompt} does not go on from the shared prefix {self.shared_prefix}"
            )
        tree = PrefixTree(prompt[shared:])
        if not self._take(0, tree.length + read):
            return None
        self.trees.setdefault(prompt, []).append(tree)
        return tree, tree.add(completion)

    def _take(self, length: int, longer: int) -> bool:
        """Takes tokens and tiles for a tree that grows; False, and nothing taken, where they lack.

        Args: length, longer: the tree's tokens before and after; a new tree has 0 before.
        """
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
    """A prompt without its shared prefix, with completions behind it.

    The prompt [5, 6, 7] with the completions [8, 9, EOS] and [4, EOS]:

        places    0 1 2 3 4 5      starts  [3, 5]
        tokens    5 6 7 8 9 4      length  6
    """

    def __init__(self, prompt: tuple[int, ...]):
        self.prompt, self.length = prompt, len(prompt)
        self.branches: list[Sequence[int]] = []
        self.starts: list[int] = []  # of each branch, from the tree's first token

    def add(self, completion: Sequence[int]) -> int:
        """Appends a completion; returns the number of its branch, from 0."""
        self.branches.append(completion)
        self.starts.append(self.length)
        self.length += len(completion) - 1
        return len(self.branches) - 1


def fill(builder: PackBuilder, shape: BlockShape) -> tuple[PackedSequences, dict[int, int]]:
    """Lays a builder's trees out as numpy arrays, the longest first.

    Returns: the pack; {id(tree): the index in `tokens` where the tree begins}.
    """
    shared = len(shape.shared_prefix)
    size = shape.tiles[0][0], shared + sum(width for _, width in shape.tiles)
    pack = PackedSequences(
        tokens=np.zeros(shape.tokens, np.int32),
        positions=np.zeros(shape.tokens, np.int32),
        token_index=np.zeros(size, np.int32),
        branch_ids=np.full(size, -1, np.int32),
        query_index=np.zeros(shape.tokens, np.int32),
        tiles=_tiles(shape),
    )
    trees = sorted(
        (tree for trees in builder.trees.values() for tree in trees), key=lambda tree: -tree.length
    )
    begins, at = {}, shared if trees else 0
    pack.tokens[:at] = shape.shared_prefix[:at]
    pack.positions[:at] = pack.query_index[:at] = np.arange(at)
    for row, tree in enumerate(trees):
        begins[id(tree)] = at
        _fill_tree(pack, row, tree, at, shared)
        at += tree.length
    before = 0
    for rows, begin, end in spans(pack.tiles):
        own = pack.branch_ids[:rows, begin:end] >= 0
        pack.query_index[pack.token_index[:rows, begin:end][own]] = before + np.flatnonzero(own)
        before += own.size
    return pack, begins


def _fill_tree(pack: PackedSequences, row: int, tree: PrefixTree, at: int, shared: int) -> None:
    """Writes a tree into a row of the grid and into the flat tokens from `at` on.

    Args: shared: h, the tokens of the shared prefix.
    """
    prompt, end = len(tree.prompt), at + tree.length
    pack.tokens[at : at + prompt] = tree.prompt
    pack.positions[at : at + prompt] = shared + np.arange(prompt)
    pack.branch_ids[row, : shared + prompt] = 0
    for number, (completion, start) in enumerate(zip(tree.branches, tree.starts, strict=True), 1):
        read = len(completion) - 1
        pack.tokens[at + start : at + start + read] = completion[:-1]
        pack.positions[at + start : at + start + read] = shared + prompt + np.arange(read)
        pack.branch_ids[row, shared + start : shared + start + read] = number
    pack.token_index[row, :shared] = np.arange(shared)
    pack.token_index[row, shared : shared + tree.length] = np.arange(at, end)


def _tiles(shape: BlockShape) -> tuple[tuple[int, int], ...]:
    """Lists the tiles of a pack: the shared prefix's, where there is one, and the shape's."""
    return ((1, len(shape.shared_prefix)),) * bool(shape.shared_prefix) + shape.tiles


def real_tokens(pack: PackedSequences) -> int:
    """Counts a pack's tokens that are no padding.

    Args: pack: numpy arrays with any leading axes.
    """
    return sum(
        int((pack.branch_ids[..., :rows, begin:end] >= 0).sum())
        for rows, begin, end in spans(pack.tiles)
    )


def fits(block: Block, shape: BlockShape) -> bool:
    """Says whether `shrink` to a shape would lose nothing of a block (numpy arrays)."""
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
    """Cuts a block's arrays to a smaller shape that it fits; only padding is lost.

    A tile that loses rows moves the queries of the tiles behind it forward: from tiles ((4, 8),
    (2, 8)) to ((2, 8), (1, 8)) query 32, the first of the second tile, becomes query 16.
    """
    tiles, rows = _tiles(shape), shape.tiles[0][0]

    def cut(pack: PackedSequences) -> PackedSequences:
        query_index, gone, before = pack.query_index[: shape.tokens], 0, 0
        shift = jnp.zeros_like(query_index)
        for (most, width), (kept, _) in zip(pack.tiles, tiles, strict=True):
            shift = jnp.where(
                query_index >= before, gone, shift
            )  # the queries of this tile, and for now of those behind it
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
    """Packs a single sequence without padding, as one tree without branches."""
    places = np.arange(len(tokens), dtype=np.int32)
    return PackedSequences(
        tokens=np.array(tokens, np.int32),
        positions=places,
        token_index=places[None],
        branch_ids=np.zeros_like(places[None]),
        query_index=places,
        tiles=((1, len(tokens)),),
    )


def pack_prompts(
    groups: Sequence[Sequence[list[int]]],
    rows: int,
    width: int,
    shape: BlockShape,
    shared_prefix: int = 0,
) -> tuple[PackedSequences, np.ndarray, np.ndarray]:
    """Packs the prompts that generation reads; within a group, equal prompts are read once.

    Groups share nothing with one another: each has a pack of its own. The group [[5, 6, 7], [9],
    [9]] with rows = 3 and P = 4 has the pack 5 6 7 9, and

        index  . 0 1 2    mask  0 1 1 1
               . . . 3          0 0 0 1
               . . . 3          0 0 0 1

    Args:
        groups: G lists of at most `rows` prompts.
        width: P; no prompt is longer.
        shape: the pack's sizes.
        shared_prefix: h, the number of tokens that all prompts begin with and that were read
            before. They are not in the pack, and `index` has 0, ..., h - 1 for them.
    Returns: a pack with leading axis G; int32[G, rows, P], the index in the pack of each prompt's
        tokens, left-padded, counted from h on; bool[G, rows, P].
    Raises: ValueError for prompts that the shape does not hold.
    """
    packs: list[PackedSequences] = []
    index = np.zeros((len(groups), rows, width), np.int32)
    mask = np.zeros((len(groups), rows, width), bool)
    for group, prompts in enumerate(groups):
        builder = PackBuilder(shape)
        for prompt in sorted({tuple(p[shared_prefix:]) for p in prompts}, key=len, reverse=True):
            if builder.place(prompt, (0,)) is None:
                raise ValueError(f"a prompt of {len(prompt)} tokens exceeds {shape}")
        pack, begins = fill(builder, shape)
        for row, prompt in enumerate(prompts):
            begin = begins[id(builder.trees[tuple(prompt[shared_prefix:])][0])]
            index[group, row, width - len(prompt) :] = begin + np.arange(len(prompt))
            index[group, row, width - len(prompt) :][:shared_prefix] = np.arange(shared_prefix)
            mask[group, row, width - len(prompt) :] = True
        packs.append(pack)
    return jax.tree.map(lambda *parts: np.stack(parts), *packs), index, mask


def prompt_shape(groups: Sequence[Sequence[list[int]]], width: int, dealt: int = 1) -> BlockShape:
    """Chooses the shape for packs of these prompts, and of others that are drawn as they were.

    The longest sum of lengths is taken, and 1.5 times the spread of such a sum is added. Any single
    prompt of at most `width` tokens fits.

    Args:
        groups: G lists of prompts.
        width: P; no prompt is longer.
        dealt: so many groups were dealt from prompts that were drawn together; they share the
            spread of the sum.
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
    """Says whether `pack_prompts` can pack all of these prompts into a shape."""
    tiles = spans(shape.tiles)
    longest = tiles[-1][-1]
    for own in _distinct(groups):
        if sum(own) > shape.tokens or max(own, default=0) > longest:
            return False
        if any(sum(n > begin for n in own) > rows for rows, begin, _ in tiles):
            return False
    return True


def _distinct(groups) -> list[list[int]]:
    """Lists the lengths of each group's distinct prompts."""
    return [[len(prompt) for prompt in {tuple(p) for p in prompts}] for prompts in groups]
