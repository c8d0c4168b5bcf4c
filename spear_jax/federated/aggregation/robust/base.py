"""What robust reducers share: they see every client, and each counts once."""

from typing import Any, ClassVar

import numpy as np

from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.reducers import Reducer
from spear_jax.models.params import Adapter


class Robust(Reducer):
    """A reducer that reads every client's update.

    Weights are what clients report, and an attacker reports what it likes. So every client that
    trained counts once, unless `weighted`.

    A subclass overrides `shares` (with `yields_shares`), or `combine`.
    """

    collects: ClassVar[bool] = True
    weighted: bool = False

    def even(self, weight: np.ndarray) -> np.ndarray:
        """Returns the clients' shares before any update is read, float64[n], in sum 1."""
        weight = np.asarray(weight, np.float64)
        counted = weight if self.weighted else np.ones_like(weight)
        return counted / counted.sum()

    def combine(self, updates: Any, weight: np.ndarray) -> Any:
        """Returns the update. Args: updates: leaves float64[n, ...]; weight: float[n], above 0."""
        return vectors.weighted_sum(self.shares(updates, weight), updates)

    def finish(self, state: Any, start: Adapter) -> tuple[Any, Any]:
        adapters, weight = state
        own = np.asarray(weight) > 0
        updates = vectors.less(vectors.take(adapters, own), start)
        return self.combine(updates, np.asarray(weight)[own]), np.float32(own.sum())
