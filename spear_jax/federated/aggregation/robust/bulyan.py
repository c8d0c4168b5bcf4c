"""Bulyan over Krum. Source: El Mhamdi et al. (arXiv 1802.07927).

n − 2 f times, Krum chooses among the clients that are left. Then every coordinate is the mean of
the n − 4 f chosen values that lie nearest to their median. Needs n ≥ 4 f + 3.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.robust.base import Robust
from spear_jax.federated.aggregation.robust.krum import scores


@dataclasses.dataclass(frozen=True)
class Bulyan(Robust):
    """Krum again and again, then a trimmed mean of every coordinate. Attributes: byzantine: f."""

    byzantine: int = 0

    @property
    def fewest(self) -> int:
        return 4 * self.byzantine + 3

    def combine(self, updates: Any, weight: np.ndarray) -> Any:
        chosen = choose(vectors.squared_distances(updates), self.byzantine)
        count = len(weight) - 4 * self.byzantine

        def nearest(x: np.ndarray) -> np.ndarray:
            own = x[chosen]
            order = np.argsort(np.abs(own - np.median(own, axis=0)), axis=0, kind="stable")
            return np.take_along_axis(own, order[:count], 0).mean(0)

        return jax.tree.map(nearest, updates)


def choose(distances: np.ndarray, byzantine: int) -> list[int]:
    """Returns the chosen clients in the order of their choice."""
    left, chosen = list(range(len(distances))), []
    for _ in range(len(distances) - 2 * byzantine):
        best = 0
        if len(left) > 1:
            best = int(np.argmin(scores(distances[np.ix_(left, left)], byzantine)))
        chosen.append(left.pop(best))
    return chosen
