"""LoRA-FAIR: the mean of the factors, with b corrected towards the mean of the products.

With ã, b̃ the means and E = Σ p a b − ã b̃, each projection solves one system of size R:

    (ãᵀã + λ I) Δb = ãᵀE,    λ = ρ tr(ãᵀã) / R,    b ← b̃ + Δb

ρ = 0 projects E onto the columns of ã. ‖E − ã Δb‖ is never above ‖E‖, nothing more is sent, and
the base stays.

Source: LoRA-FAIR (arXiv 2411.14961). Departure: the paper maximises a similarity by SGD; this is
ridge regression, in closed form.
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
)
from spear_jax.models.params import Adapter, LowRank


@dataclasses.dataclass(frozen=True)
class Fair(LoraRule):
    """b takes up what ã can hold of the residual. Attributes: ridge: ρ."""

    name: ClassVar[str] = "fair"
    linear: ClassVar[bool] = False
    ridge: float = 0.01

    def combine(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> tuple[Adapter, Kept]:
        chosen, pairs = uploads.chosen(), {}
        for name, a, b in chosen.pairs():
            target, old = self.corrected(chosen.shares, a, b), getattr(adapter, name)
            step = lambda old, new: old + uploads.rate * (new - np.asarray(old, np.float64))
            pairs[name] = host_pair(step(old.a, target.a), step(old.b, target.b))
        return as_float32(Adapter(**pairs)), kept

    def corrected(self, shares: np.ndarray, a: np.ndarray, b: np.ndarray) -> LowRank:
        """Returns ã and b̃ + Δb. Args: a: [n, L', in, R]; b: [n, L', R, out]."""
        mean_a, mean_b = low_rank.mean(shares, a), low_rank.mean(shares, b)
        turned = np.swapaxes(mean_a, -1, -2)
        gram = turned @ mean_a
        rank = gram.shape[-1]
        weight = self.ridge * np.trace(gram, axis1=-2, axis2=-1)[..., None, None] / rank
        right = low_rank.mean(shares, (turned @ (a - mean_a)) @ (b - mean_b))
        return host_pair(mean_a, mean_b + np.linalg.solve(gram + weight * np.eye(rank), right))
