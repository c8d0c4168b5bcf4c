"""Log-probabilities of completion tokens without a [B, T, V] array: the one fused operation behind every objective."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spear_jax.models.decoder import Decoder, head_weight, hidden_states
from spear_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model that scores completions; made inside a jitted function.

    Attributes:
        decoder: static settings.
        base: decoder parameters (never differentiated).
        chunk: positions per LM-head block; memory is chunk * V instead of B * T * V.
        dropout_key: turns LoRA dropout on.
    """

    decoder: Decoder
    base: dict
    chunk: int
    dropout_key: jax.Array | None = None

    def logprobs(self, lora: dict | None, batch: Batch, temperature: float = 1.0) -> jax.Array:
        """log p(completion token | everything before it), of logits divided by the temperature.

        Args: batch: one micro-batch, no leading axes.
        Returns: float32[B, T]; 0 at padding.
        """
        hidden = self.hidden(lora, batch) / temperature
        flat = hidden.reshape(-1, hidden.shape[-1])
        logprobs = token_logprobs(flat, head_weight(self.base), batch.completion.reshape(-1), self.chunk)
        return jnp.where(batch.completion_mask, logprobs.reshape(batch.completion.shape), 0.0)

    def hidden(self, lora: dict | None, batch: Batch) -> jax.Array:
        """[B, T, D]: the states from which each completion token is predicted."""
        tokens = jnp.concatenate([batch.prompt, batch.completion], axis=1)
        mask = jnp.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)
        length = batch.completion.shape[1]
        return hidden_states(self.decoder, lora, self.base, tokens, mask, self.dropout_key)[:, -length - 1 : -1]


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """log softmax(hidden head^T)[target], a chunk of positions at a time, logits recomputed in the backward pass.

    Args:
        hidden: [M, D].
        head: [V, D].
        targets: int32[M].
    Returns: float32[M].
    """

    def block(rows, target):
        logits = jnp.einsum("md,vd->mv", rows, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    return map_positions(block, hidden, targets, chunk)


def map_positions(block: Callable, hidden: Any, targets: jax.Array, chunk: int) -> jax.Array:
    """block(hidden, targets) -> [chunk], over a chunk of positions at a time, recomputed in the backward pass.

    Args:
        hidden: a tree of [M, D].
        targets: int32[M].
    Returns: [M].
    """
    count = targets.shape[0]
    chunk = min(chunk, count)
    blocks = -(-count // chunk)

    def split(x):
        padded = jnp.pad(x, ((0, blocks * chunk - count), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(blocks, chunk, *x.shape[1:])

    mapped = jax.checkpoint(lambda xs: block(*xs))
    return jax.lax.map(mapped, jax.tree.map(split, (hidden, targets))).reshape(-1)[:count]
