"""Low-rank adapters (LoRA): settings, initialisation and merging.

Source: LoRA (arXiv 2106.09685), with PEFT's conventions: y = W x + (alpha / rank) B A dropout(x).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from spear_jax.core.errors import UserError, unknown
from spear_jax.models.config import ModelConfig
from spear_jax.models.params import Adapter, DecoderParams, LowRank

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Static adapter settings.

    Attributes:
        rank: R.
        alpha: the update A B is scaled by alpha / rank.
        dropout: probability of dropping an input feature of x A while training, to the nearest
            65,536th. Every projection has masks of its own, as in PEFT.
        targets: the projections of a layer that carry an adapter, of TARGETS.
        last_layers: how many of the last layers carry adapters; 0 means all.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    last_layers: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def check_lora(lora: LoraConfig, model: ModelConfig) -> None:
    """Raises UserError where the settings do not fit the model."""
    if lora.rank < 1:
        raise UserError(f"lora.rank is {lora.rank}; it must be at least 1.")
    if not 0.0 <= lora.dropout < 1.0:
        raise UserError(f"lora.dropout is {lora.dropout}; it must lie in [0, 1).")
    if not lora.targets:
        raise UserError(f"lora.targets is empty; name at least one of {', '.join(TARGETS)}.")
    for target in lora.targets:
        if target not in TARGETS:
            raise unknown("LoRA target", target, TARGETS)
    if not 0 <= lora.last_layers <= model.layers:
        raise UserError(
            f"lora.last_layers is {lora.last_layers}, but the model has {model.layers} layers; "
            "give 0 (all) or a number up to that."
        )


def lora_layers(lora: LoraConfig, model: ModelConfig) -> int:
    """Returns L', how many layers, counted from the last, carry adapters."""
    return lora.last_layers or model.layers


def projection_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns (input width, output width) of each projection of a layer, by name."""
    d, f, h, n, k = model.width, model.mlp_width, model.heads, model.kv_heads, model.head_width
    return {
        "q": (d, h * k),
        "k": (d, n * k),
        "v": (d, n * k),
        "o": (h * k, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }


def init_lora(
    key: jax.Array, lora: LoraConfig, model: ModelConfig, dtype: Any = jnp.float32
) -> Adapter:
    """Draws a new adapter: A uniform in ±1/sqrt(inputs) (Kaiming with a = sqrt 5, as PEFT), B zero.

    Returns: a LowRank for each of `lora.targets`, a: dtype[L', in, R], b: dtype[L', R, out].
    """
    shapes, layers = projection_shapes(model), lora_layers(lora, model)
    pairs = {}
    for index, target in enumerate(TARGETS):
        if target in lora.targets:
            inputs, outputs = shapes[target]
            bound = 1.0 / math.sqrt(inputs)
            a_key = jax.random.fold_in(key, index)
            a = jax.random.uniform(a_key, (layers, inputs, lora.rank), dtype, -bound, bound)
            pairs[target] = LowRank(a, jnp.zeros((layers, lora.rank, outputs), dtype))
    return Adapter(**pairs)


def merge_lora(base: DecoderParams, adapter: Adapter, lora: LoraConfig) -> DecoderParams:
    """Adds an adapter into the base's weights; the other tensors are shared, not copied.

    Args: base: with stacked layers.
    Returns: a base with W + scale * A B in the layers that carry adapters (the product in float32,
        cast to W's dtype).
    """
    count, weights = adapter.num_layers, base.layers.by_name()
    merged = {
        target: weights[target].at[-count:].set(_add(weights[target][-count:], pair, lora))
        for target, pair in adapter.by_name().items()
    }
    return base.replace(layers=base.layers.replace(**merged))


def add_to_base(base: DecoderParams, change: dict[str, Any]) -> DecoderParams:
    """Adds a change of the weights: W + ΔW of the last L' layers, summed in float32 and cast once.

    Args: base: with stacked layers, not quantised. change: {projection: float32[L', in, out]}.
    """
    weights, changed = base.layers.by_name(), {}
    for name, delta in change.items():
        weight, count = weights[name], len(delta)
        moved = weight[-count:].astype(jnp.float32) + jnp.asarray(delta)
        whole = weight.at[-count:].set(moved.astype(weight.dtype))
        changed[name] = jax.device_put(whole, weight.sharding)
    return base.replace(layers=base.layers.replace(**changed))


def merge_weights(
    weights: dict[str, jax.Array], adapter: dict[str, LowRank], lora: LoraConfig
) -> dict[str, jax.Array]:
    """Adds an adapter's updates to weights of the same names and leading axes."""
    return {name: _add(weights[name], pair, lora) for name, pair in adapter.items()}


def _add(weight: jax.Array, pair: LowRank, lora: LoraConfig) -> jax.Array:
    """W + scale * A B, with any leading axes."""
    delta = jnp.matmul(pair.a, pair.b, precision=jax.lax.Precision.HIGHEST) * lora.scale
    return weight + delta.astype(weight.dtype)
