"""Gradients of gathers against numpy's unbuffered sums. All values are whole numbers, so that sums
are exact in any order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.packing.arrays import spans
from spear_jax.packing.gathers import from_queries, grid_of, read_tokens, to_keys, to_queries
from spear_jax.packing.prefix_tree import PackBuilder, fill
from spear_jax.packing.shape_buckets import BlockShape

PREFIX = (7, 8, 9)
TILES = ((5, 8), (3, 6))


def make_pack(shared_prefix):
    """Three trees of 11, 7 and 4 tokens beside a shared prefix; 8 tokens and two rows stay empty."""
    tokens = 30 + len(shared_prefix)
    shape = BlockShape(tokens, TILES, 1, 1, 1, 1, 1, shared_prefix)
    builder = PackBuilder(shape)
    for prompt, completions in (([1] * 4, (5, 4)), ([2] * 3, (5,)), ([3] * 4, (1,))):
        for length in completions:
            assert builder.place((*shared_prefix, *prompt), [4] * length) is not None
    pack, _ = fill(builder, shape)
    return pack


@pytest.fixture(params=[(), PREFIX], ids=["alone", "behind a prefix"])
def pack(request):
    return make_pack(request.param)


def whole(rng, *shape):
    return rng.integers(-50, 50, shape).astype(np.float32)


def pulled(function, x, change):
    return jax.jit(lambda x, change: jax.vjp(function, x)[1](change)[0])(x, change)


def cut(x, tiles):
    return [x[:rows, begin:end] for rows, begin, end in spans(tiles)]


def test_gradient_of_queries_is_the_sum_over_a_tokens_queries(pack):
    rng, want = np.random.default_rng(0), np.zeros((len(pack.tokens), 2), np.float32)
    filled = [part >= 0 for part in cut(pack.branch_ids, pack.tiles)]
    change = [whole(rng, *real.shape, 2) for real in filled]
    for part, real, index in zip(change, filled, cut(pack.token_index, pack.tiles), strict=True):
        np.add.at(want, index[real], part[real])  # padded queries take no part
    grid, x = grid_of(pack), whole(rng, len(pack.tokens), 2)
    np.testing.assert_array_equal(pulled(lambda x: to_queries(grid, x), x, change), want)
    assert np.count_nonzero(want.any(1)) == 22 + len(PREFIX) * (len(pack.tiles) == 3)


def test_gradient_of_tokens_lies_at_their_queries(pack):
    rng, count = np.random.default_rng(1), sum(rows * width for rows, width in pack.tiles)
    real = np.zeros(len(pack.tokens), bool)
    real[: (pack.branch_ids[0] >= 0).sum() + 7 + 4] = True  # row 0: the prefix and the first tree
    change, want = whole(rng, len(real), 2), np.zeros((count, 2), np.float32)
    np.add.at(want, pack.query_index[real], change[real])
    grid = grid_of(pack)
    tiles = [whole(rng, rows, width, 2) for rows, width in pack.tiles]
    found = pulled(lambda tiles: from_queries(grid, tiles), tiles, change)
    np.testing.assert_array_equal(np.concatenate([x.reshape(-1, 2) for x in found]), want)


@pytest.mark.parametrize("read", [0, 2])
def test_gradient_of_keys_is_the_sum_over_the_rows_that_have_them(pack, read):
    rng, grid, real = np.random.default_rng(2), grid_of(pack), pack.branch_ids >= 0
    change = whole(rng, len(real), read + real.shape[1], 2)
    change[:, read:][~real] = 0  # nobody attends to an empty entry
    want = np.zeros((read + len(pack.tokens), 2), np.float32)
    want[:read] = change[:, :read].sum(0)
    np.add.at(want, read + pack.token_index[real], change[:, read:][real])
    found = pulled(lambda x: to_keys(grid, x), whole(rng, *want.shape), change)
    np.testing.assert_array_equal(found, want)


def test_gradient_of_reads_is_the_sum_over_a_tokens_reads():
    rng = np.random.default_rng(3)
    index, change = rng.integers(0, 6, 20), whole(rng, 20, 3)
    want = np.zeros((9, 3), np.float32)
    np.add.at(want, index, change)
    found = pulled(lambda x: read_tokens(x, index), whole(rng, 9, 3), change)
    np.testing.assert_array_equal(found, want)


def test_bfloat16_gradients_are_added_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    rows, one = 400, jnp.bfloat16(1)
    shape = BlockShape(1 + rows, ((rows, 8),), 1, 1, 1, 1, 1, (7,))
    builder = PackBuilder(shape)
    for row in range(rows):
        assert builder.place((7, row), (0,)) is not None
    pack, _ = fill(builder, shape)
    x = jnp.zeros((1 + rows, 1), jnp.bfloat16)
    keys = pulled(lambda x: to_keys(grid_of(pack), x), x, jnp.full((rows, 9, 1), one))
    reads = pulled(lambda x: read_tokens(x, jnp.zeros(rows, int)), x, jnp.full((rows, 1), one))
    assert float(keys[0, 0]) == float(reads[0, 0]) == rows
    np.testing.assert_array_equal(keys[1:].astype(np.float32), 1)
