"""FLoRA: the clients' products are stacked into the base, and everybody starts a new adapter.

    W ← W + s Σ p_k a_k b_k,    then a is drawn anew and b = 0

Exact, for clients of any rank. Each round begins with b = 0; with few local steps a round this can
be worse than FFA.

Source: FLoRA (arXiv 2409.05976). Departures:
  1. The share of a client goes into one factor, not into both.
  2. The new a is one for all clients, of which a client of rank r takes the first r columns.
  3. s = alpha / rank is one number: a client's alpha grows with its rank.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from spear_jax.core.rng import path_rng, purpose
from spear_jax.federated.aggregation import low_rank
from spear_jax.federated.aggregation.lora_rules.base import (
    Kept,
    LoraRule,
    Uploads,
    base_bytes,
    host_pair,
    rank_of,
)
from spear_jax.models.params import Adapter, LowRank

INIT = purpose("flora_init")


@dataclasses.dataclass(frozen=True)
class FLoRA(LoraRule):
    """Stacks into the base. Attributes: seed: of the new adapters."""

    name: ClassVar[str] = "flora"
    linear: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    rates: ClassVar[bool] = False
    adds_products: ClassVar[bool] = True
    seed: int = 0

    def combine(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> tuple[Adapter, Kept]:
        chosen, base = uploads.chosen(), dict(kept["base"])
        for name, a, b in chosen.pairs():
            x, y = low_rank.stack(chosen.shares, a, b)
            base[name] = (base[name] + uploads.scale * (x @ y)).astype(np.float32)
        full = rank_of(adapter)
        ranks = (
            kept["rank"][chosen.clients] if "rank" in kept else np.full(len(chosen.clients), full)
        )
        if uploads.products:
            ranks = np.minimum(ranks, uploads.products)
        total = kept["base_rank"] + np.int32(np.sum(ranks))
        fresh = self.draw(adapter, uploads.round)
        return fresh, kept | {"base": base, "base_rank": np.asarray(total, np.int32)}

    def draw(self, adapter: Adapter, round: int) -> Adapter:
        """Draws the adapter after a round: a uniform in ±1/sqrt(in) as `init_lora`, b zero."""
        rng = path_rng(self.seed, INIT, round)

        def pair(old: LowRank) -> LowRank:
            bound = 1.0 / math.sqrt(old.a.shape[-2])
            a = rng.uniform(-bound, bound, old.a.shape).astype(np.float32)
            return host_pair(a, np.zeros(old.b.shape, np.float32))

        return Adapter(**{name: pair(old) for name, old in adapter.by_name().items()})

    def bytes_down(self, adapter: Adapter, rank: int, round: int, kept: Kept) -> int:
        return base_bytes(adapter, int(kept["base_rank"]))  # the adapter is made from the seed
