"""The geometric median (RFA), by smoothed Weiszfeld steps. Source: Pillutla et al. (arXiv
1912.13445).

    v⁰ = Σ p δ,    v ← Σ β δ / Σ β,    β_k = p_k / max(ν, ‖v − δ_k‖)

ν is in units of the updates; take it below their typical norm. Holds while attackers have less than
half of the weight.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.robust.base import Robust


@dataclasses.dataclass(frozen=True)
class GeometricMedian(Robust):
    """The shares β / Σ β of the last step. Attributes: iterations: T; smoothing: ν."""

    yields_shares: ClassVar[bool] = True
    iterations: int = 10
    smoothing: float = 1e-6
    weighted: bool = False

    def shares(self, updates: Any, weight: np.ndarray) -> np.ndarray:
        even = shares = self.even(weight)
        for _ in range(self.iterations):
            shares = self.step(updates, vectors.weighted_sum(shares, updates), even)
        return shares

    def step(self, updates: Any, centre: Any, even: np.ndarray) -> np.ndarray:
        """Returns β / Σ β around a centre."""
        away = np.sqrt(vectors.squared_norms(vectors.less(updates, centre)))
        beta = even / np.maximum(self.smoothing, away)
        return beta / beta.sum()
