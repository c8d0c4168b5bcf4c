"""Log-probabilities of completion tokens without a [B, T, V] array: the one fused operation behind every objective."""

import jax
import jax.numpy as jnp

from spear_jax.models.decoder import Decoder, head_weight, hidden_states
from spear_jax.types import Batch


def completion_logprobs(
    decoder: Decoder, lora: dict | None, base: dict, batch: Batch, chunk: int, dropout_key: jax.Array | None = None
) -> jax.Array:
    """log p(completion token | everything before it) under untempered logits.

    Args:
        lora: adapter tree, or None.
        base: decoder parameters (never differentiated).
        batch: one micro-batch, no leading axes.
        chunk: positions per LM-head block; memory is chunk * V instead of B * T * V.
        dropout_key: turns LoRA dropout on.
    Returns: float32[B, T]; 0 at padding.
    """
    tokens = jnp.concatenate([batch.prompt, batch.completion], axis=1)
    mask = jnp.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)
    length = batch.completion.shape[1]
    hidden = hidden_states(decoder, lora, base, tokens, mask, dropout_key)[:, -length - 1 : -1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs = token_logprobs(flat, head_weight(base), batch.completion.reshape(-1), chunk)
    return jnp.where(batch.completion_mask, logprobs.reshape(batch.completion.shape), 0.0)


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """log softmax(hidden head^T)[target], a chunk of positions at a time, logits recomputed in the backward pass.

    Args:
        hidden: [M, D].
        head: [V, D].
        targets: int32[M].
    Returns: float32[M].
    """
    count = hidden.shape[0]
    chunk = min(chunk, count)
    blocks = -(-count // chunk)
    padding = blocks * chunk - count
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(blocks, chunk, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(blocks, chunk)

    @jax.checkpoint
    def block(xs):
        rows, target = xs
        logits = jnp.einsum("md,vd->mv", rows, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(block, (hidden, targets)).reshape(-1)[:count]
