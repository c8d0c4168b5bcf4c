"""FlexLoRA: the product is averaged, and cut to the adapter's rank by its singular values.

    value form   P = Σ p_k a_k b_k                                (the paper)
    delta form   P = a b + η Σ p_k (a_k b_k − a_k⁰ b_k⁰)          (the default)

with a_k⁰ b_k⁰ the part that client k received: the first r_k columns and rows. The new a has
orthonormal columns, the new b carries the singular values. The two forms are equal where all
clients have the global rank.

Source: FlexLoRA (arXiv 2402.11505). Departures:
  1. The delta form. In the value form a round without any training shrinks what low ranks cannot
     hold; the delta form then changes nothing.
  2. All singular values go into b, which keeps a near the scale of a new adapter.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from spear_jax.federated.aggregation import low_rank
from spear_jax.federated.aggregation.lora_rules.base import (
    Kept,
    LoraRule,
    Uploads,
    as_float32,
    host_pair,
    rank_of,
)
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class FlexLoRA(LoraRule):
    """The mean of the products. Attributes: form: "delta" or "value"."""

    name: ClassVar[str] = "flexlora"
    linear: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    turns_basis: ClassVar[bool] = True
    adds_products: ClassVar[bool] = True
    form: str = "delta"

    def combine(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> tuple[Adapter, Kept]:
        chosen = uploads.chosen()
        p, pairs, rank = chosen.shares, {}, rank_of(adapter)
        for name, a, b in chosen.pairs():
            if self.form == "value":
                x, y = low_rank.stack(p, a, b)
            else:
                received = getattr(chosen.starts, name)
                old, step = getattr(adapter, name), uploads.rate * p
                shares = np.concatenate([[1.0], step, -step])
                x, y = low_rank.stack(
                    shares, [old.a, *a, *received.a], [old.b, *b, *received.b]
                )  # fmt: skip
            pairs[name] = host_pair(*low_rank.best_adapter(x, y, rank))
        return as_float32(Adapter(**pairs)), kept
