"""The attention mask of packed sequences, and grouped-query attention: XLA's everywhere, cuDNN's
flash attention on request.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spear_jax.core.errors import UserError

KEPT = "product"  # names activations that the backward pass keeps under remat "attention"
MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN
KERNELS = ("xla", "cudnn")


def seen_in_tree(branch: jax.Array, cells: int) -> jax.Array:
    """Makes the attention mask bool[X, Y, Z] of the last Y tokens of each row.

    A token attends to its prompt, to a shared prefix before it, and to its own branch, up to
    itself.

        branch  0 0 1 1 2        a prompt of two tokens, completions of two and of one
        last    1 1 0 0 1        the mask's last line: branch 2 does not see branch 1

    Args: branch: int32[X, Z], 0 for prompts, 1, 2, ... for completions, -1 for padding; cells: Y.
    """
    before = branch.shape[1] - cells
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, before:, None])
    return jnp.tril(jnp.ones((cells, before + cells), bool), before) & same


def check_kernel(kernel: str, platform: str, dtype: str, head_width: int) -> None:
    """Raises UserError where cuDNN's flash attention is asked for and cannot be had."""
    if kernel != "cudnn":
        return
    problem = ""
    if platform != "gpu":
        problem = f"runs on NVIDIA GPUs, and JAX runs on a {platform} here"
    elif dtype != "bfloat16":
        problem = f"takes bfloat16, and the base's dtype is {dtype}"
    elif head_width > 128 or head_width % 8:
        problem = (
            f"takes heads of at most 128 in multiples of 8, and the model's are {head_width} wide"
        )
    if problem:
        raise UserError(
            f"attention_kernel is 'cudnn', which {problem}. Set --config.attention_kernel=xla."
        )


def attend(q, keys, values, visible, kernel="xla"):
    """Grouped-query softmax attention, softmax in float32.

    Args:
        q: [X, Y, H, E].
        keys, values: [at least X, U, at least Z, E]; the rest is not read.
        visible: bool[X, Y, Z].
        kernel: one of KERNELS. A single query, as when decoding, is always XLA's.
    Returns: [X, Y, H, E].
    """
    rows, length, seen = visible.shape
    keys, values = keys[:rows, :, :seen], values[:rows, :, :seen]
    if kernel == "cudnn" and length > 1:
        return flash(q, keys, values, visible)
    return _own_gradient(q, keys, values, visible)


def library(q, keys, values, visible, implementation):
    """Computes `attend` by `jax.nn.dot_product_attention`.

    Args: implementation: "xla", or "cudnn", which never holds a head's scores.
    """
    keys, values = (jnp.swapaxes(x, 1, 2) for x in (keys, values))
    return jax.nn.dot_product_attention(
        q, keys, values, mask=visible[:, None], implementation=implementation
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash(q, keys, values, visible, implementation="cudnn"):
    """Computes `library` for odd numbers of queries and keys too, and for mapped clients.

    The backward pass runs the forward kernel once more, for the sums of the softmax.
    """
    attended = functools.partial(_of_even_lengths, implementation)
    return _clients_as_rows(attended, q, keys, values, visible)


def _flash_forward(q, keys, values, visible, implementation):
    attended = flash(q, keys, values, visible, implementation)
    return checkpoint_name(attended, KEPT), (q, keys, values, visible)


def _flash_backward(implementation, held, change):
    def gradients(q, keys, values, visible, change):
        attended = lambda *x: _of_even_lengths(implementation, *x, visible)
        return jax.vjp(attended, q, keys, values)[1](change)

    return *_clients_as_rows(gradients, *held, change), None


flash.defvjp(_flash_forward, _flash_backward)


def _of_even_lengths(implementation, q, keys, values, visible):
    """Computes `library` with queries and keys padded to even numbers, as cuDNN's gradient takes
    them. No query sees the padding.
    """
    queries, more, further = visible.shape[1], visible.shape[1] % 2, visible.shape[2] % 2
    pad = lambda x, axis, by: jnp.pad(x, [(0, by if i == axis else 0) for i in range(x.ndim)])
    q, keys, values = pad(q, 1, more), pad(keys, 2, further), pad(values, 2, further)
    visible = pad(pad(visible, 1, more), 2, further)
    return library(q, keys, values, visible, implementation)[:, :queries]


def _clients_as_rows(function, *arrays):
    """Calls a function of arrays [X, ...]; vmap over C clients calls it with C * X rows.

    JAX's own batching of the cuDNN call wants a mask for every head. It would be as large as the
    scores, which flash attention never holds.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def _(clients, mapped, *arrays):
        every = lambda x, own: x if own else jnp.broadcast_to(x, (clients, *x.shape))
        rows = [x.reshape(-1, *x.shape[2:]) for x in map(every, arrays, mapped)]
        results = _clients_as_rows(function, *rows)
        apart = jax.tree.map(lambda x: x.reshape(clients, -1, *x.shape[1:]), results)
        return apart, jax.tree.map(lambda _: True, results)

    return folded(*arrays)


@jax.custom_vjp
def _own_gradient(q, keys, values, visible):
    return _forward(q, keys, values, visible)[0]


def _forward(q, keys, values, visible):
    """Computes mixed values and the residuals of the backward pass; of the softmax these hold only
    each row's log-sum.
    """
    raw = _scores(q, keys, visible)
    most = raw.max(axis=-1, keepdims=True)
    weight = jnp.exp(raw - most)
    total = weight.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "rnls,rnsk->rnlk", weight.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    mixed = checkpoint_name(_heads_last((mixed / total).astype(values.dtype), q), KEPT)
    log_total = checkpoint_name(most + jnp.log(total), KEPT)
    return mixed, (q, keys, values, visible, mixed, log_total)


def _backward(held, change):
    """Computes the gradients from weights computed again: with P = softmax(S),
    dS = P (dP - rowsum(dO O)).

    Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.
    """
    q, keys, values, visible, mixed, log_total = held
    weight = jnp.exp(_scores(q, keys, visible) - log_total)
    along = _heads_first((change * mixed).sum(axis=-1, keepdims=True, dtype=jnp.float32), keys)
    change = _heads_first(change, keys)
    d_values = jnp.einsum("rnls,rnlk->rnsk", weight.astype(values.dtype), change)
    d_weight = jnp.einsum("rnlk,rnsk->rnls", change, values, preferred_element_type=jnp.float32)
    d_scores = (weight * (d_weight - along)).astype(q.dtype)
    d_q = jnp.einsum("rnls,rnsk->rnlk", d_scores, keys) / math.sqrt(q.shape[-1])
    d_keys = jnp.einsum("rnls,rnlk->rnsk", d_scores, _heads_first(q, keys) / math.sqrt(q.shape[-1]))
    return _heads_last(d_q, q), d_keys, d_values, None


_own_gradient.defvjp(_forward, _backward)


def _scores(q, keys, visible):
    """Computes masked scores, float32[X, U, group * Y, Z]."""
    q = _heads_first(q / math.sqrt(q.shape[-1]), keys)
    raw = jnp.einsum("rnlk,rnsk->rnls", q, keys, preferred_element_type=jnp.float32)
    r, n, rows, length = raw.shape
    mask = jnp.where(visible, 0.0, MASKED)[:, None, None]
    return (raw.reshape(r, n, -1, visible.shape[1], length) + mask).reshape(r, n, rows, length)


def _heads_first(x, keys):
    """Stacks the heads of a group: [X, Y, H, E] -> [X, U, group * Y, E]. There is then one product
    a key head, with contiguous operands.
    """
    r, length, h, width = x.shape
    n = keys.shape[1]
    return jnp.transpose(x.reshape(r, length, n, h // n, width), (0, 2, 3, 1, 4)).reshape(
        r, n, -1, width
    )


def _heads_last(x, q):
    """Undoes `_heads_first`: back to q's [X, Y, H, E]."""
    r, length, h, width = q.shape
    return jnp.transpose(x.reshape(r, -1, h // x.shape[1], length, width), (0, 3, 1, 2, 4)).reshape(
        q.shape
    )
