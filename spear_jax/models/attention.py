"""Who sees whom in a packed tree, and grouped-query attention."""

import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN
BLOCK, BLOCKS = 64, 4  # queries of a block where there are enough; blocks at most, as each is compiled


def seen_in_tree(branch: jax.Array) -> jax.Array:
    """bool[R, L, L] of a tree's branches int32[R, L]: a cell sees its prompt and its own branch, up to itself."""
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return jnp.tril(jnp.ones((branch.shape[1], branch.shape[1]), bool)) & same


def attend(q, keys, values, visible):
    """Grouped-query softmax attention, softmax in float32.

    Args:
        q: [R, L, H, K]; keys, values: [R, N, S, K].
        visible: bool[R, L, S]; where S is L, no cell sees one behind it.
    Returns: [R, L, H, K].
    """
    length = q.shape[1]
    if length != keys.shape[2]:
        return _block(q, keys, values, visible)
    # block by block of queries, each against the keys up to its end: what lies above the diagonal is hardly touched
    size = -(-length // min(BLOCKS, max(1, round(length / BLOCK))))
    ends = [(begin, min(begin + size, length)) for begin in range(0, length, size)]
    parts = [_block(q[:, a:b], keys[:, :, :b], values[:, :, :b], visible[:, a:b, :b]) for a, b in ends]
    return jnp.concatenate(parts, axis=1)


def _block(q, keys, values, visible):
    """`attend` for some of the queries."""
    r, length, h, width = q.shape
    n = keys.shape[1]
    group = h // n
    # the heads of a group stand under one another: one product a key head, its operands contiguous
    q = jnp.transpose((q / math.sqrt(width)).reshape(r, length, n, group, width), (0, 2, 3, 1, 4))
    raw = jnp.einsum("rnlk,rnsk->rnls", q.reshape(r, n, -1, width), keys, preferred_element_type=jnp.float32)
    raw = raw.reshape(r, n, group, length, -1) + jnp.where(visible, 0.0, MASKED)[:, None, None]
    weight = jnp.exp(raw - jax.lax.stop_gradient(raw.max(axis=-1, keepdims=True)))
    total = weight.sum(axis=-1)[..., None]
    weight = weight.astype(values.dtype).reshape(r, n, group * length, -1)
    mixed = jnp.einsum("rnls,rnsk->rnlk", weight, values, preferred_element_type=jnp.float32)
    mixed = (mixed.reshape(r, n, group, length, width) / total).astype(values.dtype)
    return jnp.transpose(mixed, (0, 3, 1, 2, 4)).reshape(r, length, h, width)
