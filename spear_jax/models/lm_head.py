"""The LM head: from hidden states to logits."""

import jax
import jax.numpy as jnp

from spear_jax.models.params import DecoderParams


def head_weight(base: DecoderParams) -> jax.Array:
    """The head's weight [V, D]: the embedding where both are tied."""
    return base.embed if base.head is None else base.head


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Multiplies final-norm hidden states [..., D] by the head [V, D]: logits float32[..., V].

    The logits' gradient is rounded to the head's dtype before it meets the head. Autodiff would
    widen the head instead, and multiply in float32.
    """
    if head.dtype == jnp.float32:
        return _product(hidden, head)
    return _narrow_product(hidden, head)


def _product(hidden, head):
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _narrow_product(hidden, head):
    return _product(hidden, head)


def _narrow_backward(held, change):
    hidden, head = held
    change = change.astype(head.dtype)
    wide = {"preferred_element_type": jnp.float32}
    d_hidden = jnp.einsum("...v,vd->...d", change, head, **wide).astype(hidden.dtype)
    d_head = jnp.einsum("...v,...d->vd", change, hidden, **wide).astype(head.dtype)
    return d_hidden, d_head


_narrow_product.defvjp(
    lambda hidden, head: (_product(hidden, head), (hidden, head)), _narrow_backward
)


@jax.custom_vjp
def pick(values: jax.Array, token: jax.Array) -> jax.Array:
    """Takes one token's value at each position: of [M, V] at int32[M], [M].

    Its gradient compares, where autodiff would scatter into a second array [M, V].
    """
    return jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]


def _pick_backward(held, change):
    token, vocabulary = held
    return jnp.where(vocabulary == token[:, None], change[:, None], 0), None


pick.defvjp(
    lambda values, token: (pick(values, token), (token, jnp.arange(values.shape[-1]))),
    _pick_backward,
)
