"""The median and the trimmed mean of every number. Source: Yin et al. (arXiv 1803.01498)."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from spear_jax.federated.aggregation.robust.base import Robust


@dataclasses.dataclass(frozen=True)
class CoordinateMedian(Robust):
    """The median of every coordinate over the clients that trained.

    Two middle values are averaged, as numpy does. Fewer than half of the clients cannot move a
    coordinate out of the others' range. Weighted, it is the least value whose cumulated share
    reaches ½, averaged with the next one at exactly ½.
    """

    weighted: bool = False

    def combine(self, updates: Any, weight: np.ndarray) -> Any:
        if not self.weighted:
            return jax.tree.map(lambda x: np.median(x, axis=0), updates)
        return jax.tree.map(lambda x: _weighted_median(x, self.even(weight)), updates)


@dataclasses.dataclass(frozen=True)
class TrimmedMean(Robust):
    """The mean of every coordinate without the ⌊β n⌋ least and largest values.

    Attributes: trim: β. Breaks down at ⌊β n⌋ + 1 attackers.
    """

    trim: float = 0.1

    def combine(self, updates: Any, weight: np.ndarray) -> Any:
        count = len(weight)
        drop = math.floor(self.trim * count)
        return jax.tree.map(lambda x: np.sort(x, axis=0)[drop : count - drop].mean(0), updates)


def _weighted_median(x: np.ndarray, shares: np.ndarray) -> np.ndarray:
    order = np.argsort(x, axis=0, kind="stable")
    ordered = np.take_along_axis(x, order, 0)
    sums = np.cumsum(shares[order], axis=0)
    first = np.sum(sums < 0.5 - 1e-12, axis=0, keepdims=True)
    at = np.take_along_axis(sums, first, 0)
    low = np.take_along_axis(ordered, first, 0)
    high = np.take_along_axis(ordered, np.minimum(first + 1, len(x) - 1), 0)
    return np.where(np.abs(at - 0.5) < 1e-12, (low + high) / 2, low)[0]
