"""Secure summation, simulated: the server learns the sum of updates, and no single one.

A client writes each number in fixed point and adds a mask; masks of a cohort cancel in the sum.

    code = round(clip(x, ±c) 2^f)  in the integers modulo 2^32
    Σ x  = Σ (code_k + mask_k) / 2^f,     Σ mask_k = 0

The sum of codes is exact where n c < 2^(31 − f). Rounding moves the sum of n clients by n / 2^(f + 1)
at most, in each number. Weights go inside: a client sends w δ, and w as one number more.

Source: Bonawitz et al., "Practical secure aggregation" (CCS 2017; arXiv 1611.04482). Departures:
  1. Masks are drawn here, all but the last client's at random. There are no keys, no shares and no
     recovery of the masks of clients that are lost: those that are lost have no mask. Between real
     clients all of that is there (`spear_jax/flower/masks.py`), on the same codes.
  2. What is not finite has no code, and is not sent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spear_jax.core.rng import path_rng, purpose
from spear_jax.federated.aggregation import vectors

MASK = purpose("mask")
BITS = 32


@dataclasses.dataclass(frozen=True)
class SecureSum:
    """Sums clients' numbers behind masks.

    Attributes: bound: c; fraction_bits: f; seed: of the masks.
    """

    bound: float = 4.0
    fraction_bits: int = 16
    seed: int = 0

    @property
    def most_clients(self) -> int:
        """Returns how many clients the sum holds: the largest n with n c < 2^(31 − f)."""
        return math.ceil(2 ** (BITS - 1 - self.fraction_bits) / self.bound) - 1

    def rounding(self, size: int) -> float:
        """Returns by how much rounding may lengthen a vector. Args: size: d."""
        return math.sqrt(size) / 2 ** (self.fraction_bits + 1)

    def sums(self, round: int) -> Callable[[np.ndarray, Any], Any]:
        """Returns `total` of a round, as `vectors.weighted_sum` is called."""
        return functools.partial(self.total, round=round)

    def total(self, weight: np.ndarray, updates: Any, round: int) -> Any:
        """Returns Σ w_k δ_k, leaves float64[...].

        Args: weight: float[n]; updates: leaves [n, ...]; round: 1-based, of the masks' path.
        """
        leaves, tree = jax.tree.flatten(updates)
        rngs = [path_rng(self.seed, MASK, round, slot) for slot in range(len(weight))]
        sums = [
            self._sum(vectors.rows(x) * weight[:, None], self.bound, rngs).reshape(x.shape[1:])
            for x in leaves
        ]
        return jax.tree.unflatten(tree, sums)

    def clipped(self, weight: np.ndarray, updates: Any) -> float:
        """Returns the share of the numbers w_k δ_k that are beyond c. Arguments as for `total`."""
        leaves = [vectors.rows(x) for x in jax.tree.leaves(updates)]
        beyond = sum((np.abs(x) * weight[:, None] > self.bound).sum() for x in leaves)
        return float(beyond / max(1, sum(x.size for x in leaves)))

    def mass(self, weight: np.ndarray, round: int) -> float:
        """Returns Σ w_k; each counts up to what the sum can hold."""
        rngs = [path_rng(self.seed, MASK, round, slot, 1) for slot in range(len(weight))]
        most = (2 ** (BITS - 1 - self.fraction_bits) - 1) / max(1, len(weight))
        return float(self._sum(np.asarray(weight, np.float64)[:, None], most, rngs)[0])

    def encode(self, x: np.ndarray, bound: float) -> np.ndarray:
        """Returns the codes of numbers, uint32."""
        codes = np.rint(np.clip(x, -bound, bound) * 2.0**self.fraction_bits)
        return codes.astype(np.int64).astype(np.uint32)  # modulo 2^32

    def decode(self, total: np.ndarray) -> np.ndarray:
        """Returns the numbers of a sum of codes, float64."""
        return total.astype(np.int32) / 2.0**self.fraction_bits

    def _sum(self, x: np.ndarray, bound: float, rngs: list[np.random.Generator]) -> np.ndarray:
        """Sums rows behind masks: float64[d]. Args: x: float64[n, d]."""
        total, masks = np.zeros(x.shape[1], np.uint32), np.zeros(x.shape[1], np.uint32)
        for slot, row in enumerate(x):
            last = slot + 1 == len(x)
            mask = np.negative(masks) if last else _mask(rngs[slot], x.shape[1])
            masks = masks + mask
            total = total + (self.encode(row, bound) + mask)
        return self.decode(total)


def _mask(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 2**BITS, size, np.uint32)
