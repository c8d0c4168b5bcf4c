"""Log-probabilities of completion tokens without an array of all logits; every loss starts here.

Logits are computed for a chunk of positions at a time. A position's gradient is taken beside its
log-probability, so that memory is chunk * V and no logits are kept for the backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spear_jax.models.decoder import Decoder, LayerKeyValues, packed_states
from spear_jax.models.lm_head import head_logits, head_weight, pick
from spear_jax.models.params import Adapter, DecoderParams
from spear_jax.packing.arrays import Block
from spear_jax.packing.gathers import read_tokens

# float32 logits of one chunk where no chunk is asked for: 256 MB, whatever the vocabulary
LOGITS = 1 << 26


def block_positions(chunk: int, vocab: int) -> int:
    """Returns the positions of one chunk: `chunk`, or where that is 0 as many as LOGITS allows."""
    return chunk or max(1, LOGITS // vocab)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Scorer of completion tokens under a base and an adapter; made inside a jitted function.

    Attributes:
        decoder: static settings.
        base: decoder parameters (never differentiated).
        chunk: positions of one chunk of logits, 0 for as many as LOGITS allows.
        dropout_key: turns LoRA dropout on.
        shared_prefix: keys and values of the tokens before every sequence, as for `packed_states`.
    """

    decoder: Decoder
    base: DecoderParams
    chunk: int
    dropout_key: jax.Array | None = None
    shared_prefix: LayerKeyValues | None = None

    def logprobs(self, lora: Adapter | None, block: Block, temperature: float = 1.0) -> jax.Array:
        """Computes log p(token | everything before it) of each scored token.

        Args: temperature: divides the logits.
        Returns: float32[M], nats.
        """
        return token_logprobs(
            self.states(lora, block) / temperature, head_weight(self.base), block.target, self.chunk
        )

    def states(self, lora: Adapter | None, block: Block, pack: int = 0) -> jax.Array:
        """Computes the hidden states [M, D] that predict each scored token.

        Args: pack: which of the block's packs.
        """
        hidden, _ = packed_states(
            self.decoder, lora, self.base, block.packs[pack], self.dropout_key, self.shared_prefix
        )
        return read_tokens(hidden, block.source[pack])


@jax.custom_vjp
def unpack_rows(block: Block, values: jax.Array) -> jax.Array:
    """Lays values of scored tokens [M] out as rows [B, T], 0 at padding.

    Rows that repeat each other read the same values, so that their gradients add up.

        values [.1 .2 .3], start [0 0 2], lengths [2 2 1]  ->  [[.1 .2] [.1 .2] [.3 0]]
    """
    index = block.start[:, None] + jnp.arange(block.rows.completion_mask.shape[1])
    return jnp.where(
        block.rows.completion_mask, values[jnp.minimum(index, values.shape[0] - 1)], 0.0
    )


def _unpack_rows_backward(block: Block, change: jax.Array) -> tuple[None, jax.Array]:
    mask = block.rows.completion_mask
    place = jnp.arange(block.target.shape[0]) - block.start[:, None]  # [B, M]: where row b reads m
    inside = (place >= 0) & (place < mask.shape[1])
    read = jnp.take_along_axis(jnp.where(mask, change, 0), jnp.where(inside, place, 0), axis=1)
    return None, jnp.where(inside, read, 0).sum(0)


unpack_rows.defvjp(lambda block, values: (unpack_rows(block, values), block), _unpack_rows_backward)


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """Computes log softmax(hidden head^T)[target], a chunk of positions at a time; differentiable
    in `hidden` alone.

    Args:
        hidden: [M, D].
        head: [V, D].
        targets: int32[M].
    Returns: float32[M], nats.
    """
    return map_positions(_logprob, hidden, (targets,), head, chunk)


def _logprob(hidden, fixed, head):
    (target,) = fixed
    logits = head_logits(hidden, head)
    return pick(logits, target) - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def map_positions(
    block: Callable, hidden: jax.Array, fixed: Any, head: jax.Array, chunk: int
) -> jax.Array:
    """Computes block(hidden, fixed, head) -> float32[chunk], one number a position, over a chunk of
    positions at a time.

    A position's number depends on that position alone. Its gradient in `hidden` is therefore
    computed next to it, while its logits are at hand: the backward pass is one multiplication.

    Args:
        block: a hashable function; the same object in every call with the same meaning, or programs
            compile again.
        hidden: [M, D]; the only argument that is differentiated.
        fixed: a tree of [M, ...].
        head: [V, D].
        chunk: positions at a time, at most; 0 for as many as LOGITS allows.
    Returns: float32[M].
    """
    return over_chunks(
        lambda h, f: block(h, f, head), (hidden, fixed), block_positions(chunk, head.shape[0])
    )


def _forward(block, hidden, fixed, head, chunk):
    def both(h, f):
        values, pull = jax.vjp(lambda h: block(h, f, head), h)
        return values, pull(jnp.ones_like(values))[0]

    return over_chunks(both, (hidden, fixed), block_positions(chunk, head.shape[0]))


def _backward(block, chunk, slope, cotangent):
    return (cotangent[:, None] * slope).astype(slope.dtype), None, None


map_positions.defvjp(_forward, _backward)


def over_chunks(function: Callable, arrays: tuple, chunk: int) -> Any:
    """Maps a function over arrays [M, ...] in chunks of equal size, as few as `chunk` positions
    each allow; the last one is padded.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    blocks = -(-count // chunk)
    size = -(-count // blocks)

    def split(x):
        padded = jnp.pad(x, ((0, blocks * size - count), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(blocks, size, *x.shape[1:])

    if blocks == 1:
        return function(*arrays)
    results = jax.lax.map(lambda xs: function(*xs), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)
