"""Low-rank adapters: their static settings, initialisation, merging, and how they fit a model.

Source: LoRA (arXiv 2106.09685), with PEFT's conventions: y = W x + (alpha / rank) B A dropout(x).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from spear_jax.core.errors import UserError, unknown
from spear_jax.models.config import ModelConfig

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Static adapter settings.

    Attributes:
        rank: R.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input feature of the low-rank branch while training.
        targets: which projections of a layer carry an adapter.
        last_layers: adapters sit in the last n layers; 0 means all.
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
    """How many layers, counted from the last, carry adapters."""
    return lora.last_layers or model.layers


def projection_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(input width, output width) of each projection of a layer."""
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
) -> dict:
    """A new adapter: A uniform in ±1/sqrt(inputs) (Kaiming with a = sqrt 5, as PEFT), B zero.

    Returns: {target: {"a": dtype[L', in, R], "b": dtype[L', R, out]}}, L' the layers that carry
        adapters.
    """
    shapes, layers = projection_shapes(model), lora_layers(lora, model)
    tree = {}
    for index, target in enumerate(TARGETS):
        if target in lora.targets:
            inputs, outputs = shapes[target]
            bound = 1.0 / math.sqrt(inputs)
            a_key = jax.random.fold_in(key, index)
            a = jax.random.uniform(a_key, (layers, inputs, lora.rank), dtype, -bound, bound)
            tree[target] = {"a": a, "b": jnp.zeros((layers, lora.rank, outputs), dtype)}
    return tree


def merge_lora(base: dict, lora_tree: dict, lora: LoraConfig) -> dict:
    """The base with the adapter added into its weights; untouched tensors are shared, not copied.

    Args:
        base: decoder parameters, weights [L, in, out].
        lora_tree: as from `init_lora`.
    Returns: a base tree; W + scale * A B on the layers that carry adapters (float32 product, cast
        to W's dtype).
    """
    count = jax.tree.leaves(lora_tree)[0].shape[0]
    adapted = {target: base["layers"][target][-count:] for target in lora_tree}
    merged = jax.vmap(lambda weights, pairs: merge_layer(weights, pairs, lora))(adapted, lora_tree)
    layers = {
        target: base["layers"][target].at[-count:].set(weight) for target, weight in merged.items()
    }
    return {**base, "layers": base["layers"] | layers}


def merge_layer(weights: dict, pairs: dict, lora: LoraConfig) -> dict:
    """One layer of `merge_lora`: weights [in, out], pairs {target: {"a": [in, R], "b": [R,
    out]}}.
    """

    def add(weight, pair):
        delta = jnp.matmul(pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST) * lora.scale
        return weight + delta.astype(weight.dtype)

    return weights | {target: add(weights[target], pair) for target, pair in pairs.items()}
