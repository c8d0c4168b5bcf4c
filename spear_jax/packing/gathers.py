"""The way of packed tokens into attention's grid and back, with gradients that are gathers.

A token is one query, and one key of its tree's row; a shared prefix's tokens are keys of every row.
So the index arrays of a pack are each other's inverses, and a gradient goes back by the other one.
Autodiff would scatter and add instead. A GPU does that by atomics, in an order that changes from
run to run, and in the tokens' own bfloat16.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from spear_jax.packing.arrays import PackedSequences, spans


@flax.struct.dataclass
class Grid:
    """Where the tokens of a pack stand in attention's grid.

    Attributes:
        token_index: int32[X, Y]; query_index: int32[N]; tiles: those of `PackedSequences`.
        filled: of each tile bool[rows, width], the entries that hold a token.
        used: bool[N], the tokens that are no padding.
    """

    token_index: jax.Array
    query_index: jax.Array
    filled: list[jax.Array]
    used: jax.Array
    tiles: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)

    def cut(self, x: jax.Array) -> list[jax.Array]:
        """Cuts an array of the grid [X, Y, ...] into its tiles."""
        return _cut(x, self.tiles)


def grid_of(pack: PackedSequences) -> Grid:
    """Returns the grid of a pack without leading axes."""
    filled = [branch_ids >= 0 for branch_ids in _cut(pack.branch_ids, pack.tiles)]
    tokens = _flat(_cut(pack.token_index, pack.tiles))[pack.query_index]
    # padding tokens have the query 0, which is another token's or none's
    used = (tokens == jnp.arange(len(tokens))) & _flat(filled)[pack.query_index]
    return Grid(pack.token_index, pack.query_index, filled, used, pack.tiles)


def _cut(x: jax.Array, tiles: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    return [x[:rows, begin:end] for rows, begin, end in spans(tiles)]


def _flat(tiles: Sequence[jax.Array]) -> jax.Array:
    """Lays tiles [rows, width, ...] behind one another, as `query_index` counts them."""
    return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in tiles])


def _where(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Zeros x [..., further axes] where the mask [...] is False."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0)


@jax.custom_vjp
def to_queries(grid: Grid, x: jax.Array) -> list[jax.Array]:
    """Gathers tokens [N, ...] into the tiles of queries, each [rows, width, ...]."""
    return [x[index] for index in grid.cut(grid.token_index)]


to_queries.defvjp(
    lambda grid, x: (to_queries(grid, x), grid),
    lambda grid, change: (None, _where(grid.used, _flat(change)[grid.query_index])),
)


@jax.custom_vjp
def from_queries(grid: Grid, tiles: list[jax.Array]) -> jax.Array:
    """Brings tiles of queries back to tokens [N, ...]. Nothing may depend on padding tokens: their
    gradient is dropped.
    """
    return _flat(tiles)[grid.query_index]


def _from_queries_backward(grid: Grid, change: jax.Array) -> tuple[None, list[jax.Array]]:
    tiles = zip(grid.filled, grid.cut(grid.token_index), strict=True)
    return None, [_where(filled, change[index]) for filled, index in tiles]


from_queries.defvjp(lambda grid, tiles: (from_queries(grid, tiles), grid), _from_queries_backward)


@jax.custom_vjp
def to_keys(grid: Grid, x: jax.Array) -> jax.Array:
    """Gathers tokens [h + N, ...] into rows [X, h + Y, ...].

    The first h are a shared prefix that was prefilled before the pack, and that every row has in
    front. A token's gradient is the sum over the rows that have it, in float32.
    """
    rows, read = len(grid.token_index), len(x) - len(grid.query_index)
    first = jnp.tile(jnp.arange(read, dtype=grid.token_index.dtype), (rows, 1))
    return x[jnp.concatenate([first, grid.token_index + read], axis=1)]


def _to_keys_backward(grid: Grid, change: jax.Array) -> tuple[None, jax.Array]:
    rows, columns = grid.token_index.shape
    read, (height, width) = change.shape[1] - columns, grid.tiles[0]
    over_rows = lambda x: x.sum(0, keepdims=True, dtype=jnp.float32).astype(x.dtype)
    own = change[:, read:]
    tiles = grid.cut(own)
    if height < rows:  # the tile of a shared prefix, which other rows have too
        tiles[0] = over_rows(own[:, :width])
    tokens = _where(grid.used, _flat(tiles)[grid.query_index])
    return None, jnp.concatenate([over_rows(change[:, :read])[0], tokens])


to_keys.defvjp(lambda grid, x: (to_keys(grid, x), grid), _to_keys_backward)


@jax.custom_vjp
def read_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers tokens [N, D] at int32[M] places, which may repeat: [M, D].

    The gradient is a product with a matrix of zeros and ones, which adds in float32.
    """
    return x[index]


def _read_tokens_backward(held, change: jax.Array) -> tuple[jax.Array, None]:
    index, tokens = held
    reads = (tokens[:, None] == index).astype(change.dtype)
    total = jnp.matmul(
        reads,
        change,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(change.dtype, jnp.float32),
    )
    return total.astype(change.dtype), None


read_tokens.defvjp(
    lambda x, index: (read_tokens(x, index), (index, jnp.arange(len(x)))), _read_tokens_backward
)
