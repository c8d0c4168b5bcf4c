"""Bases in fewer bits: the projections of each layer held as int8 or nf4, and widened a layer at a
time where they are used.

Embedding, head, norms and biases stay as they are, and so do adapters, which are then never merged:
every policy is the base with its adapter beside it.

Source: absolute-maximum int8, one scale for each output; NF4 in tiles of 64 inputs, one scale for
each tile and output (arXiv 2305.14314). Departures: 1. scales are not quantised again. Rounding and
storage are qwix's.
"""

from typing import Any

import jax

KINDS = ("none", "int8", "nf4")


def widen(weights: dict) -> dict:
    """One layer's weights with its quantised projections in the precision of their scales; the
    others as they are.
    """
    return {
        name: weight if isinstance(weight, jax.Array) else _widened(weight)
        for name, weight in weights.items()
    }


def _widened(weight: Any) -> jax.Array:
    import qwix

    return qwix.dequantize(weight)
