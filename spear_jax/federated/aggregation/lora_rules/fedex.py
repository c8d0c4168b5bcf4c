"""FedEx-LoRA: the factors are averaged apart, and the base takes what that loses.

    ã = Σ p a_k,  b̃ = Σ p b_k,  E = Σ p a_k b_k − ã b̃,  W ← W + s E

so that W + s ã b̃ afterwards is W + s Σ p a_k b_k, exactly. E has rank (n − 1) R at most; the
truncated form keeps the best part of a given rank.

Source: FedEx-LoRA (arXiv 2410.09432). Departures:
  1. The base's change is kept apart, in float32: small residuals would vanish in a bfloat16 W.
  2. E comes from centred factors (`low_rank.residual`).
"""

import dataclasses
from typing import ClassVar

import numpy as np

from spear_jax.federated.aggregation import low_rank
from spear_jax.federated.aggregation.lora_rules.base import Kept, LoraRule, Uploads, rank_of
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class FedEx(LoraRule):
    """The residual goes into the base. Attributes: rank: of the residual; 0 is all of it."""

    name: ClassVar[str] = "fedex"
    linear: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True
    rates: ClassVar[bool] = False
    rank: int = 0

    def combine(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> tuple[Adapter, Kept]:
        chosen, base = uploads.chosen(), dict(kept["base"])
        for name, a, b in chosen.pairs():
            x, y = low_rank.residual(chosen.shares, a, b)
            if self.rank and x.shape[-1]:
                x, y = low_rank.best_adapter(x, y, self.rank)
            base[name] = (base[name] + uploads.scale * (x @ y)).astype(np.float32)
        exact = rank_of(adapter) * (len(chosen.clients) - 1)
        total = kept["base_rank"] + (min(self.rank, exact) if self.rank else exact)
        kept = kept | {"base": base, "base_rank": np.asarray(total, np.int32)}
        return uploads.mean_step(adapter), kept


@dataclasses.dataclass(frozen=True)
class FedExTruncated(FedEx):
    """The residual's best part of rank `rank` goes into the base."""

    name: ClassVar[str] = "fedex_truncated"
    rank: int = 8
