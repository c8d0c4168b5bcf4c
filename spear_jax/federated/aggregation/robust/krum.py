"""Krum and multi-Krum. Source: Blanchard et al., "Machine learning with adversaries" (NeurIPS 2017,
arXiv 1703.02757).

Of n clients, f of them attackers, the score of a client is the sum of squared distances to the
n − f − 2 nearest others. Krum takes the client of the least score (of equals the first), multi-Krum
the mean of the m least, m = n − f − 2 by default. Needs n ≥ 2 f + 3.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.robust.base import Robust


@dataclasses.dataclass(frozen=True)
class Krum(Robust):
    """The one update that lies closest to its neighbours. Attributes: byzantine: f."""

    yields_shares: ClassVar[bool] = True
    byzantine: int = 0

    @property
    def fewest(self) -> int:
        return 2 * self.byzantine + 3

    def count(self, clients: int) -> int:
        """Returns m."""
        return 1

    def shares(self, updates: Any, weight: np.ndarray) -> np.ndarray:
        order = np.argsort(
            scores(vectors.squared_distances(updates), self.byzantine), kind="stable"
        )
        chosen = order[: self.count(len(weight))]
        shares = np.zeros(len(weight))
        shares[chosen] = 1.0 / len(chosen)
        return shares


@dataclasses.dataclass(frozen=True)
class MultiKrum(Krum):
    """The mean of the m updates of least score. Attributes: selected: m; 0 is n − f − 2."""

    selected: int = 0

    def count(self, clients: int) -> int:
        return min(clients, self.selected or max(1, clients - self.byzantine - 2))


def scores(distances: np.ndarray, byzantine: int) -> np.ndarray:
    """Returns each client's score. Args: distances: squared, float64[n, n]."""
    others = np.where(np.eye(len(distances), dtype=bool), np.inf, distances)
    neighbours = max(1, len(distances) - byzantine - 2)
    return np.sort(others, axis=1)[:, :neighbours].sum(1)
