"""Derives random streams by path, so that results do not depend on order, batching or devices."""

import hashlib

import jax
import numpy as np


def purpose(name: str) -> int:
    """Returns a stable 31-bit tag of a named purpose, so that no two streams share a path."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def path_key(key: jax.Array, *path: int | jax.Array) -> jax.Array:
    """Returns the key at a path: fold_in one step after the other.

    Paths of equal length collide only if they are equal.

        path_key(key, purpose("rollout"), round, client)
    """
    for step in path:
        key = jax.random.fold_in(key, step)
    return key


def path_rng(seed: int, *path: int) -> np.random.Generator:
    """Returns the host's generator at a path of non-negative integers.

    A path is a purpose, then numbers such as the round and the client:

        path_rng(seed, purpose("rollout"), round, client)
    """
    return np.random.default_rng(np.random.SeedSequence([seed, *path]))
