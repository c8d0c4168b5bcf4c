"""Log-probabilities of completion tokens without a [B, T, V] array: the one fused operation behind
every objective.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spear_jax.models.decoder import Decoder, head_weight, packed_states
from spear_jax.packing.arrays import Block

LOGITS = (
    1 << 26
)  # floats of one block of logits, where nothing else is asked for: 256 MB, whatever the vocabulary


def block_positions(chunk: int, vocab: int) -> int:
    """Positions of one LM-head block: `chunk`, or where that is 0 as many as LOGITS allows."""
    return chunk or max(1, LOGITS // vocab)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """A model that scores completions; made inside a jitted function.

    Attributes:
        decoder: static settings.
        base: decoder parameters (never differentiated).
        chunk: positions per LM-head block, 0 for as many as take LOGITS; memory is chunk * V
            instead of M * V.
        dropout_key: turns LoRA dropout on.
        opening: keys and values of what stands before every tree, as for `packed_states`.
    """

    decoder: Decoder
    base: dict
    chunk: int
    dropout_key: jax.Array | None = None
    shared_prefix: Any = None

    def logprobs(self, lora: dict | None, block: Block, temperature: float = 1.0) -> jax.Array:
        """log p(token | everything before it) of each scored token, of logits divided by the temperature.

        Returns: float32[M].
        """
        return token_logprobs(
            self.states(lora, block) / temperature, head_weight(self.base), block.target, self.chunk
        )

    def states(self, lora: dict | None, block: Block, pack: int = 0) -> jax.Array:
        """[M, D]: the states from which each scored token is predicted, in one of the block's
        packs.
        """
        hidden, _ = packed_states(
            self.decoder, lora, self.base, block.packs[pack], self.dropout_key, self.shared_prefix
        )
        return hidden[block.source[pack]]


def unpack_rows(block: Block, values: jax.Array) -> jax.Array:
    """Values of scored tokens as rows: [M] -> [B, T], 0 at padding; the gradient of rows that
    repeat each other adds up.
    """
    index = block.start[:, None] + jnp.arange(block.rows.completion_mask.shape[1])
    return jnp.where(
        block.rows.completion_mask, values[jnp.minimum(index, values.shape[0] - 1)], 0.0
    )


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """log softmax(hidden head^T)[target], a chunk of positions at a time; differentiable in
    `hidden` alone.

    Args:
        hidden: [M, D].
        head: [V, D].
        targets: int32[M].
    Returns: float32[M].
    """
    return map_positions(_logprob, hidden, (targets,), head, chunk)


def _logprob(hidden, fixed, head):
    (target,) = fixed
    logits = jnp.einsum("md,vd->mv", hidden, head, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def map_positions(
    block: Callable, hidden: jax.Array, fixed: Any, head: jax.Array, chunk: int
) -> jax.Array:
    """block(hidden, fixed, head) -> float32[chunk], one number a position, over a chunk of
    positions at a time.

    A position's number depends on that position alone, so its gradient in `hidden` is found next to
    it, while its logits are at hand: the backward pass is one multiplication, nothing is
    recomputed, and no logits are kept.

    Args:
        block: a hashable function; the same object in every call with the same meaning, or programs
            compile again.
        hidden: [M, D]; the only argument that is differentiated.
        fixed: a tree of [M, ...].
        head: [V, D].
        chunk: positions at a time, at most; 0 for as many as take LOGITS.
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
    """function(*arrays) over chunks of equal size of arrays [M, ...], as few as `chunk` positions
    each allow.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    blocks = -(-count // chunk)
    size = -(-count // blocks)

    def split(x):
        padded = jnp.pad(x, ((0, blocks * size - count), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(blocks, size, *x.shape[1:])

    if blocks == 1:
        return function(*arrays)
    found = jax.lax.map(lambda xs: function(*xs), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)
