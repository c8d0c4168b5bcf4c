"""Packed sequences, batches and blocks as arrays."""

import itertools
from collections.abc import Sequence

import flax.struct
import jax


def spans(tiles: Sequence[tuple[int, int]], first: int = 0) -> list[tuple[int, int, int]]:
    """(rows, begin, end) of each (rows, width), the first of which begins at `first`."""
    *begins, _ = itertools.accumulate((width for _, width in tiles), initial=first)
    return [
        (rows, begin, begin + width) for (rows, width), begin in zip(tiles, begins, strict=True)
    ]


@flax.struct.dataclass
class PackedSequences:
    """Token sequences as trees: a prompt once, followed by each of its completions, all trees flat
    behind one another. What all prompts open with may stand once before them.

    Products with weights see the flat tokens; attention sees a grid of one tree a row, the longest
    first. Its queries are taken column by column, each from as many rows as trees reach it. Unused
    places of any array hold 0, but for `branch_ids`.

    Attributes:
        tokens: int32[..., N], an opening's h tokens the first.
        positions: int32[..., N], rotary positions; prompts go on from the opening's, every branch
            from its prompt's.
        grid: int32[..., R, L], the flat place of each cell's token; the opening's stand before
            every tree's.
        branch: int32[..., R, L], 0 in a prompt and its opening, 1, 2, ... in its completions, -1
            where a cell is empty.
        cell: int32[..., N], the place of each token among the queries: column after column, each in
            row-major order.
        columns: (rows, width) of each; an opening is one of its own, (1, h).
    """

    tokens: jax.Array
    positions: jax.Array
    token_index: jax.Array
    branch_ids: jax.Array
    query_index: jax.Array
    tiles: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Batch:
    """Rows as a loss sees them; a row may repeat another.

    Attributes:
        completion_mask: bool[..., B, T], every completion token (EOS included when it was
            generated), right-padded.
        loss_mask: bool[..., B, T], the positions that a loss may use; a subset of
            `completion_mask`.
        weight: float32[..., B, T], token-level confidence, or an example's weight.
        advantage: float32[..., B], of the completion.
        label: int32[..., B], +1 win (or real), -1 lose (or synthetic), 0 padding row; a method may
            use further kinds.
        ref_logprobs: float32[..., B, J, T], log-probabilities under each reference adapter; filled
            in by local training.
        old_logprobs: float32[..., B, T], under the adapter that the phase started from; filled in
            by local training.
    """

    completion_mask: jax.Array
    loss_mask: jax.Array
    weight: jax.Array
    advantage: jax.Array
    label: jax.Array
    ref_logprobs: jax.Array | None = None
    old_logprobs: jax.Array | None = None


@flax.struct.dataclass
class Block:
    """Rows that go through the model together, each distinct one once. Leading axes [C, S, K] for a
    round's local training.

    Attributes:
        packs: the tokens; one pack, or one for each of a method's `num_packs`.
        source: for each pack int32[..., M], the flat places whose states predict the scored
            completion tokens.
        target: int32[..., M], those completion tokens.
        start: int32[..., B], where each row's completion begins in `target`.
        rows: the rows.
        micro: int32[...], the micro-batch that the rows belong to.
    """

    packs: tuple[PackedSequences, ...]
    source: tuple[jax.Array, ...]
    target: jax.Array
    start: jax.Array
    rows: Batch
    micro: jax.Array
