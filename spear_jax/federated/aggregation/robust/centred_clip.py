"""Centred clipping. Source: Karimireddy et al., "Learning from history" (arXiv 2012.10333).

    v ← v + Σ p (δ_k − v) min(1, τ / ‖δ_k − v‖),    L times

from the v of the round before, zero in round 1. An attacker moves v by 2 τ p a step at most.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.lora_rules.base import as_float32
from spear_jax.federated.aggregation.robust.base import Robust
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class CentredClip(Robust):
    """Keeps `centre`, the last round's update. Attributes: radius: τ; iterations: L."""

    radius: float = 1.0
    iterations: int = 1
    weighted: bool = False

    def init_kept(self, adapter: Adapter) -> dict[str, Any]:
        return {"centre": jax.tree.map(lambda x: np.zeros(x.shape, np.float32), adapter)}

    def reduce(
        self, adapters: Adapter, weight: np.ndarray, start: Adapter, kept: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        own = np.asarray(weight) > 0
        updates = vectors.less(vectors.take(adapters, own), start)
        centre = self.move(updates, kept["centre"], self.even(np.asarray(weight)[own]))
        return centre, own.sum(), kept | {"centre": as_float32(centre)}

    def move(self, updates: Any, centre: Any, even: np.ndarray) -> Any:
        """Returns v after L steps."""
        for _ in range(self.iterations):
            away = vectors.less(updates, centre)
            norms = np.sqrt(vectors.squared_norms(away))
            factors = np.minimum(1.0, self.radius / np.maximum(norms, 1e-300))
            step = vectors.weighted_sum(even * factors, away)
            centre = jax.tree.map(lambda v, x: np.asarray(v, np.float64) + x, centre, step)
        return centre

    def combine(self, updates: Any, weight: np.ndarray) -> Any:
        zero = jax.tree.map(lambda x: np.zeros(x.shape[1:]), updates)
        return self.move(updates, zero, self.even(weight))
