"""Clients' updates as vectors: distances and sums over all leaves together, float64, on the host.

A cohort's updates are a tree with leaves [n, ...]. Work goes leaf by leaf, so that no more than one
leaf of all clients is copied.
"""

import math
from typing import Any

import jax
import numpy as np


def rows(leaf: Any) -> np.ndarray:
    """Returns a leaf as float64[n, numbers]."""
    leaf = np.asarray(leaf, np.float64)
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))


def squared_norms(updates: Any) -> np.ndarray:
    """Returns ‖δ_k‖², float64[n]."""
    return np.sum([np.einsum("kd,kd->k", x, x) for x in map(rows, jax.tree.leaves(updates))], 0)


def squared_distances(updates: Any) -> np.ndarray:
    """Returns ‖δ_i − δ_j‖², float64[n, n], from products of the centred updates."""
    gram: Any = 0.0
    for x in map(rows, jax.tree.leaves(updates)):
        x = x - x.mean(0)
        gram = gram + x @ x.T
    square = np.diag(gram)
    return np.maximum(0.0, square[:, None] + square[None, :] - 2 * gram)


def weighted_sum(shares: np.ndarray, updates: Any) -> Any:
    """Returns Σ p_k δ_k, leaves float64[...]."""
    return jax.tree.map(lambda x: np.tensordot(shares, np.asarray(x, np.float64), 1), updates)


def less(updates: Any, centre: Any) -> Any:
    """Returns δ_k − v, leaves float64[n, ...]."""
    return jax.tree.map(lambda x, v: np.asarray(x, np.float64) - np.asarray(v), updates, centre)


def finite(updates: Any) -> np.ndarray:
    """Returns bool[n], the clients all of whose numbers, and whose float32 norm, are finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = [np.einsum("kd,kd->k", x, x) for x in map(rows, jax.tree.leaves(updates))]
        return np.isfinite(np.sum(square, 0).astype(np.float32))


def take(updates: Any, chosen: np.ndarray) -> Any:
    """Returns the chosen clients' rows; no copy where these are all. Args: chosen: bool[n]."""
    if chosen.all():
        return jax.tree.map(np.asarray, updates)
    return jax.tree.map(lambda x: np.asarray(x)[chosen], updates)


def add_axis(update: Any) -> Any:
    """Returns one client's update as a cohort of one."""
    return jax.tree.map(lambda x: np.asarray(x)[None], update)


def dot(updates: Any, other: Any) -> np.ndarray:
    """Returns ⟨δ_k, other⟩, float64[n]."""
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(other), strict=True)
    return np.sum([rows(x) @ np.ravel(np.asarray(y, np.float64)) for x, y in pairs], 0)
