"""The LM head: from hidden states to logits."""

import jax
import jax.numpy as jnp

from spear_jax.models.params import DecoderParams


def head_weight(base: DecoderParams) -> jax.Array:
    """The head's weight [V, D]: the embedding where both are tied."""
    return base.embed if base.head is None else base.head


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Multiplies final-norm hidden states [..., D] by the head [V, D]: logits float32[..., V]."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
