"""Packed sequences, batches and blocks as arrays: what the model and the losses see.

Leading axes are left out here: a round's local training has [C, S, K] before every shape (clients,
local steps, blocks of a step). `packing.debug.describe` prints a block.
"""

import itertools
from collections.abc import Sequence

import flax.struct
import jax


def spans(tiles: Sequence[tuple[int, int]], first: int = 0) -> list[tuple[int, int, int]]:
    """Places tiles side by side: (2, 4) and (1, 3) become (2, 0, 4) and (1, 4, 7).

    Args:
        tiles: (rows, width) of each.
        first: where the first tile begins.
    Returns: (rows, begin, end) of each.
    """
    *begins, _ = itertools.accumulate((width for _, width in tiles), initial=first)
    return [
        (rows, begin, begin + width) for (rows, width), begin in zip(tiles, begins, strict=True)
    ]


@flax.struct.dataclass
class PackedSequences:
    """Packed training sequences in which completions of one prompt share the prompt's tokens.

    A prompt and its completions are a tree, and each completion is a branch of it. The trees stand
    flat behind one another, so that products with weights see every token once. For the prompt
    [5, 6, 7] with the completions [8, 9, EOS] and [4, EOS]:

        tokens      5 6 7 8 9 4    an EOS is predicted by the token before it, and never read
        positions   0 1 2 3 4 3    every branch goes on from its prompt
        branch_ids  0 0 0 1 1 2    4 attends to 5 6 7 and itself, not to 8 9

    Attention sees a grid with one tree a row, the longest first. The grid is cut into tiles from
    left to right, each only as high as trees reach, so that little of it is padding. With a second
    tree [5, 3] and the tiles ((2, 4), (1, 4)):

        row 0       5 6 7 8 | 9 4 . .    of the second tile, row 0 alone is computed
        row 1       5 3 . . |
        query_index 0 1 2 3 8 9 4 5      in the order of `tokens`: a tile's rows follow one another

    A prefix that all prompts share may stand once, before all trees. It is a tile of its own, and
    every row of the grid begins with it. Unused entries hold 0, and -1 in `branch_ids`.

    Attributes:
        tokens: int32[..., N], the shared prefix's h tokens the first.
        positions: int32[..., N], rotary positions. A prompt goes on from the shared prefix.
        token_index: int32[..., X, Y], for each entry of the grid its token's index in `tokens`.
        branch_ids: int32[..., X, Y], 0 in the shared prefix and the prompt, 1, 2, ... in its
            completions, -1 where the grid is empty.
        query_index: int32[..., N], for each token its index among the queries: tile after tile,
            within a tile row after row.
        tiles: (rows, width) of each; static. That of a shared prefix is (1, h).
    """

    tokens: jax.Array
    positions: jax.Array
    token_index: jax.Array
    branch_ids: jax.Array
    query_index: jax.Array
    tiles: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Batch:
    """Training rows as a loss sees them; a row may repeat another.

    Two rows with the completions [8, 9, EOS] and [4, EOS], T = 4:

        completion_mask  1 1 1 0    logprobs of the same shape are 0 where the mask is
                         1 1 0 0

    Attributes:
        completion_mask: bool[..., B, T], every completion token (EOS included when it was
            generated), right-padded.
        loss_mask: bool[..., B, T], the positions that a loss may use; a subset of
            `completion_mask`.
        weight: float32[..., B, T], token-level confidence, or an example's weight.
        advantage: float32[..., B], of the completion.
        label: int32[..., B], +1 win (or real), -1 lose (or synthetic), 0 padding row; a method may
            use other numbers.
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
    """Training rows that go through the model together, each distinct one once.

    The example of `PackedSequences`, with EOS = 2; row 2 repeats row 0:

        source[0]  2 3 4 2 5    the token at 2, which is 7, predicts 8, and also 4
        target     8 9 2 4 2
        start      0 3 0        row 0 is scored at 0 1 2, row 1 at 3 4, row 2 as row 0

    Attributes:
        packs: the tokens; one pack, or one for each of a method's `num_packs`.
        source: for each pack int32[..., M], the indices in `tokens` whose hidden states predict the
            scored completion tokens.
        target: int32[..., M], the scored completion tokens.
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
