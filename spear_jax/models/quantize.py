"""Bases in fewer bits: the projections of each layer held as int8 or nf4, and widened a layer at a time where they are used.

Embedding, head, norms and biases stay as they are, and so do adapters, which are then never merged: every policy is the base with
its adapter beside it.

Source: absolute-maximum int8, one scale for each output; NF4 in tiles of 64 inputs, one scale for each tile and output
(arXiv 2305.14314). Departures: 1. scales are not quantised again. Rounding and storage are qwix's.
"""

import importlib.util
import math
from typing import Any

import jax
import numpy as np

from spear_jax.errors import UserError
from spear_jax.models.lora import TARGETS
from spear_jax.models.weights import Placer

KINDS = ("none", "int8", "nf4")
TILE = 64


def quantiser(kind: str, place: Placer) -> Placer:
    """A placer that quantises projections on this host's CPU before it puts their parts down; "none" is `place` itself.

    Raises: UserError where qwix is missing.
    """
    if kind == "none":
        return place
    if importlib.util.find_spec("qwix") is None:
        raise UserError(
            f'quantize={kind} needs qwix; `pip install "spear-jax[quantize]"`, or set --config.quantize=none.'
        )
    import qwix  # here, because only quantised bases need it

    cpu = jax.local_devices(backend="cpu")[0]

    def put(name: str, leaf: np.ndarray) -> Any:
        if name not in TARGETS:
            return place(name, leaf)
        tiles = {1: math.gcd(TILE, leaf.shape[1])} if kind == "nf4" else None
        small = qwix.quantize(jax.device_put(leaf, cpu), kind, channelwise_axes=(0, 2), tiled_axes=tiles)
        return jax.tree.map(lambda part: place(name, np.asarray(part)), small)

    return put


def widen(weights: dict) -> dict:
    """One layer's weights with its quantised projections in the precision of their scales; the others as they are."""
    return {name: weight if isinstance(weight, jax.Array) else _widened(weight) for name, weight in weights.items()}


def _widened(weight: Any) -> jax.Array:
    import qwix

    return qwix.dequantize(weight)
