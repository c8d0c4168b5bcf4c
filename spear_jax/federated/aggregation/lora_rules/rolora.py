"""RoLoRA: clients train and send b in odd rounds, a in even ones.

In every round one factor is common, so that the mean of the other is the mean of the products.

Source: RoLoRA (arXiv 2502.01755). Departures:
  1. Round 1 trains b. With b = 0 the gradient of a is zero.
  2. The parity is the round's number, so that a round in which nobody trained changes it, too.
  3. The server optimiser's moments of the other factor are not touched.
"""

import dataclasses
from typing import ClassVar

from spear_jax.federated.aggregation.lora_rules.base import LoraRule


@dataclasses.dataclass(frozen=True)
class RoLoRA(LoraRule):
    """One factor a round."""

    name: ClassVar[str] = "rolora"

    def trains(self, round: int) -> str:
        return "b" if round % 2 else "a"
