"""Scores completions under frozen policies: packed, block by block, over all devices.

Every score of a frozen policy takes this one path: a method's references to responses (IRIS), the
likelihood of held-out responses, and the comparison of options.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core import pytrees
from spear_jax.core.mesh import to_host
from spear_jax.models.decoder import Decoder
from spear_jax.models.lm_head import head_logits, head_weight
from spear_jax.models.token_logprobs import (
    TokenLogprobs,
    block_positions,
    over_chunks,
    unpack_rows,
)
from spear_jax.packing.arrays import Block
from spear_jax.packing.blocks import choose_block_shape, pack_single_rows
from spear_jax.packing.rows import TrainingRow
from spear_jax.packing.shape_buckets import BlockShape, ShapeBuckets
from spear_jax.rollout.policy import Policy


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of rows, in their order; a float32[len(completion)] each.

    Attributes:
        logprobs: log-probabilities in nats.
        likeliest: 1 where the token is the most likely one, else 0.
    """

    logprobs: list[np.ndarray]
    likeliest: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows in blocks of one shape.

    Attributes:
        places: for each row (block, row in the block).
    """

    shape: BlockShape
    blocks: list[Block]
    places: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Packs rows, sends a block to each device, and reads the scores back.

    Attributes:
        decoder: the model's static settings.
        shapes: the run's shape buckets.
        place: puts an array with a leading block axis on the devices; devices: their number.
    """

    decoder: Decoder
    shapes: ShapeBuckets
    place: Callable[[Any], Any] = jnp.asarray
    devices: int = 1

    @staticmethod
    def mean_tokens(rows: Sequence[TrainingRow]) -> int:
        """Returns the mean length of rows in tokens, rounded down."""
        return sum(len(row.prompt) + len(row.completion) for row in rows) // len(rows)

    def score(
        self,
        policy: Policy,
        rows: Sequence[TrainingRow],
        name: str,
        tokens: int,
        lengths: tuple[int, int] | None = None,
        shared_prefix: Any = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scores:
        """Scores every completion under its prompt, teacher-forced.

        Args:
            name: of the block shape, which is chosen once a name.
            tokens: of a block, about.
            lengths: the longest prompt and completion that this name will see, in tokens; None: of
                these rows.
            shared_prefix: keys and values of what stands before every prompt
                (`Sampler.prefill_shared_prefix`); the rows' prompts go on from there.
            report: called with blocks done and all blocks.
        """
        packed = self.pack(rows, name, tokens, lengths)
        run = lambda blocks: _score_tokens(
            self.decoder, 0, policy.lora, policy.base, blocks, shared_prefix
        )
        found = self.over_devices(run, packed.blocks, report)
        read = lambda scores: [
            scores[place][: len(row.completion)]
            for place, row in zip(packed.places, rows, strict=True)
        ]
        return Scores(*map(read, found))

    def pack(
        self,
        rows: Sequence[TrainingRow],
        name: str,
        tokens: int,
        lengths: tuple[int, int] | None = None,
    ) -> PackedRows:
        """Packs rows into blocks; arguments as for `score`."""
        if lengths is None:
            lengths = max(len(r.prompt) for r in rows), max(len(r.completion) for r in rows)
        groups = [(row,) for row in rows]
        choose = lambda: choose_block_shape([[groups]], 1, 1, *lengths, tokens)
        shape = self.shapes.shape(name, choose)
        return PackedRows(shape, *pack_single_rows(rows, shape))

    def over_devices(
        self,
        run: Callable[[Any], Any],
        blocks: Sequence[Any],
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Any:
        """Returns run(blocks with a leading axis), as many blocks at a time as there are devices;
        numpy arrays, stacked over blocks.
        """
        parts = []
        for begin in range(0, len(blocks), self.devices):
            part = list(blocks[begin : begin + self.devices])
            whole = part + [part[0]] * (self.devices - len(part))
            scores = to_host(run(jax.tree.map(lambda *x: self.place(np.stack(x)), *whole)))
            parts.append(jax.tree.map(lambda x, part=part: x[: len(part)], scores))
            report(begin + len(part), len(blocks))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_tokens(decoder, chunk, lora, base, blocks, shared_prefix=None):
    """float32[G, B, T] log-probability of each completion token, and whether it is the most likely
    one; 0 at padding. Logits are held for `chunk` positions at a time (0: as `block_positions`).
    """
    head = head_weight(base)
    chunk = block_positions(chunk, head.shape[0])

    def score(states, target):
        logits = head_logits(states, head)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        likeliest = jnp.argmax(logits, axis=-1) == target
        return picked - jax.nn.logsumexp(logits, axis=-1), likeliest.astype(jnp.float32)

    def one(block):
        model = TokenLogprobs(decoder, base, chunk, shared_prefix=shared_prefix)
        scores = over_chunks(score, (model.states(lora, block), block.target), chunk)
        return [unpack_rows(block, x) for x in scores]

    return pytrees.vmap_or_single(one)(blocks)
