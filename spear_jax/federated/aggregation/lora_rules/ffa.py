"""FFA-LoRA: a is frozen, so that the mean of b is the mean of the products.

    Σ p_k a b_k = a Σ p_k b_k

Source: FFA-LoRA (arXiv 2403.12313). Departure: a's gradient is dropped before the gradient's norm
is clipped, so that it takes no part in the norm.
"""

import dataclasses
from typing import ClassVar

from spear_jax.federated.aggregation.lora_rules.base import Kept, LoraRule, factor_bytes
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class FFA(LoraRule):
    """a stays as it was drawn; b is trained, sent and averaged."""

    name: ClassVar[str] = "ffa"

    def trains(self, round: int) -> str:
        return "b"

    def bytes_down(self, adapter: Adapter, rank: int, round: int, kept: Kept) -> int:
        return factor_bytes(adapter, rank, "b")  # a is made from the seed
