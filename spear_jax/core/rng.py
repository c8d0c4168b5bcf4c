"""Derives random streams by path, so that results do not depend on order, batching or devices."""

import hashlib

import jax
import numpy as np


def purpose(name: str) -> int:
    """A stable 31-bit tag for a named purpose, so that no two streams share a path."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def path_key(key: jax.Array, *path: int | jax.Array) -> jax.Array:
    """The key at a path: fold_in one step after the other. Paths of equal length collide only if
    they are equal.
    """
    for step in path:
        key = jax.random.fold_in(key, step)
    return key


def path_rng(seed: int, *path: int) -> np.random.Generator:
    """The host's generator at a path; `path` holds non-negative integers (purpose tag, round,
    client, ...).
    """
    return np.random.default_rng(np.random.SeedSequence([seed, *path]))
