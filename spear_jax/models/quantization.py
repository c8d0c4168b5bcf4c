"""Quantised bases: the seven projections of each layer in int8 or NF4, dequantised a layer at a
time where they are used.

Embedding, head, norms and biases keep the model's dtype. Adapters do, too, and are never merged:
every policy is the base with its adapter beside it.

Source: absolute-maximum int8, one scale for each output; NF4 in tiles of 64 inputs, one scale for
each tile and output (arXiv 2305.14314). Rounding and storage are qwix's.

Departures:
  1. The scales are not quantised a second time.
"""

from typing import Any

import jax

from spear_jax.models.params import LayerParams

KINDS = ("none", "int8", "nf4")


def widen(weights: LayerParams) -> LayerParams:
    """Dequantises one layer's projections to the dtype of their scales; arrays stay as they are."""
    quantised = {
        name: weight
        for name, weight in weights.by_name().items()
        if not isinstance(weight, jax.Array)
    }
    return weights.replace(**{name: _widened(weight) for name, weight in quantised.items()})


def _widened(weight: Any) -> jax.Array:
    import qwix

    return qwix.dequantize(weight)
