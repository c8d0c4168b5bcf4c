"""Small functions over pytrees."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def global_norm(tree: Any) -> jax.Array:
    """Returns the l2 norm over all leaves, float32[]."""
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    )


def where(condition: jax.Array, left: Any, right: Any) -> Any:
    """Returns leaf by leaf `left` where the scalar condition holds, else `right`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), left, right)


def vmap_or_single(function: Callable, in_axes: Any = 0) -> Callable:
    """Returns `jax.vmap` of a function, which is called unmapped where the axis has length 1.

    Results have the new axis first either way. XLA's CPU kernels share their work over an array's
    first axis. Where its length is 1, a single core would do all of it.

        >>> double = vmap_or_single(lambda x: 2 * x)
        >>> double(jnp.ones((1, 3))).shape, double(jnp.ones((2, 3))).shape
        ((1, 3), (2, 3))
    """

    def run(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        mapped = [(arg, axis) for arg, axis in zip(args, axes, strict=True) if axis is not None]
        if any(leaf.shape[axis] != 1 for arg, axis in mapped for leaf in jax.tree.leaves(arg)):
            return jax.vmap(function, axes)(*args)
        only = lambda arg, axis: (
            arg if axis is None else jax.tree.map(lambda x: jnp.squeeze(x, axis), arg)
        )
        return jax.tree.map(lambda x: x[None], function(*map(only, args, axes)))

    return run


def to_dicts(tree: Any) -> Any:
    """Turns every dataclass of a tree into a dict of its fields; a field that is None is left out.

    Checkpoints hold dicts, so that neither their digest nor their files depend on a class.

        Adapter(q=LowRank(a, b))  ->  {"q": {"a": a, "b": b}}
    """

    def fields(node: Any) -> Any:
        if not dataclasses.is_dataclass(node):
            return node
        values = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
        return {name: to_dicts(value) for name, value in values.items() if value is not None}

    return jax.tree.map(fields, tree, is_leaf=dataclasses.is_dataclass)


def from_dicts(dicts: Any, like: Any) -> Any:
    """Turns the dicts of `to_dicts` back into dataclasses, where `like` has them."""

    def fields(like: Any, node: Any) -> Any:
        if isinstance(like, type) or not dataclasses.is_dataclass(like):
            return node
        values = {name: from_dicts(value, getattr(like, name)) for name, value in node.items()}
        return dataclasses.replace(like, **values)  # type: ignore[type-var]

    return jax.tree.map(fields, like, dicts, is_leaf=dataclasses.is_dataclass)


def digest(tree: Any) -> str:
    """Returns the sha256 over names, shapes, dtypes and bytes of all leaves.

    Equal digests mean equal bits.
    """
    state = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        state.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()
