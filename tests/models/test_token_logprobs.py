"""Gradients of the gathers behind the logits, against numpy's unbuffered sums of whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.models.lm_head import head_logits, pick
from spear_jax.models.token_logprobs import unpack_rows
from spear_jax.packing.arrays import Batch, Block


def test_gradient_of_unpacked_rows_is_the_sum_over_rows_that_repeat():
    rng = np.random.default_rng(0)
    start, length, width, scored = np.array([0, 2, 0, 5, 0]), np.array([2, 3, 2, 1, 0]), 4, 9
    mask = np.arange(width) < length[:, None]
    rows = Batch(mask, mask, mask, start, start)
    fields = dict.fromkeys(("packs", "source", "micro"))
    block = Block(target=np.zeros(scored, np.int32), start=start, rows=rows, **fields)
    change = rng.integers(-50, 50, mask.shape).astype(np.float32)
    want = np.zeros(scored, np.float32)
    np.add.at(want, (start[:, None] + np.arange(width))[mask], change[mask])
    values, pull = jax.vjp(lambda values: unpack_rows(block, values), np.arange(9.0, dtype="f"))
    np.testing.assert_array_equal(pull(change)[0], want)
    np.testing.assert_array_equal(values[:2], [[0, 1, 0, 0], [2, 3, 4, 0]])


def test_gradient_of_a_picked_logit_is_at_its_token():
    rng = np.random.default_rng(1)
    logits, token = rng.normal(size=(5, 7)).astype(np.float32), rng.integers(0, 7, 5)
    picked, pull = jax.vjp(lambda logits: pick(logits, token), jnp.asarray(logits))
    change = rng.normal(size=5).astype(np.float32)
    want = np.zeros((5, 7), np.float32)
    want[np.arange(5), token] = change
    np.testing.assert_array_equal(picked, logits[np.arange(5), token])
    np.testing.assert_array_equal(pull(change)[0], want)


def test_a_narrow_heads_gradient_is_the_wide_ones_rounded():
    rng = np.random.default_rng(3)
    hidden, head = (jnp.asarray(rng.normal(size=(n, 32)), jnp.bfloat16) for n in (20, 90))
    targets = jnp.asarray(rng.integers(0, 90, 20))

    def score(hidden, head):
        return (head_logits(hidden, head) * (jnp.arange(90) == targets[:, None])).sum()

    narrow = jax.grad(score, argnums=(0, 1))(hidden, head)
    wide = jax.grad(score, argnums=(0, 1))(*(x.astype(jnp.float32) for x in (hidden, head)))
    for ours, exact in zip(narrow, wide, strict=True):
        assert ours.dtype == jnp.bfloat16
        ours, exact = (np.asarray(x, np.float32) for x in (ours, exact))
        assert np.linalg.norm(ours - exact) < 4e-3 * np.linalg.norm(exact)
