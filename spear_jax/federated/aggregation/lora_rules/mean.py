"""FedIT: the factors are averaged apart. Source: FedIT (arXiv 2305.05644).

    a ← a + η Σ p_k δa_k        b ← b + η Σ p_k δb_k

The implied update (Σ p a)(Σ p b) is not Σ p a b; `round/aggregation_error` measures the difference.
"""

import dataclasses
from typing import ClassVar

from spear_jax.federated.aggregation.lora_rules.base import LoraRule


@dataclasses.dataclass(frozen=True)
class Mean(LoraRule):
    """Both factors, each by the reducer and the server optimiser."""

    name: ClassVar[str] = "mean"
