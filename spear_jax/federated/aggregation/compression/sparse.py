"""A few numbers of the vector: the largest, or some at random.

    top-k      the k = max(1, ⌈ρ d⌉) largest |x|, of equals the first; ‖x − x̂‖² ≤ (1 − k/d) ‖x‖²
    random-k   k at random, times d / k, which is unbiased; a seed of 8 bytes stands for their places

Source: sparsified SGD with memory (arXiv 1809.07599). Top-k is biased: it wants error feedback. With
error feedback random-k is not scaled.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from spear_jax.federated.aggregation.compression.base import Compressor, floats


@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """The largest numbers, with their places or a bitmap, whichever is less. Attributes: share: ρ."""

    name: ClassVar[str] = "topk"
    share: float = 0.01

    def count(self, size: int) -> int:
        """Returns k."""
        return max(1, math.ceil(self.share * size))

    def encode(self, x: np.ndarray, rng: np.random.Generator) -> bytes:
        size, k = len(x), self.count(len(x))
        places = np.sort(np.argsort(-np.abs(x), kind="stable")[:k])
        if 4 * k <= -(-size // 8):
            return places.astype("<u4").tobytes() + floats(x[places])
        return np.packbits(np.isin(np.arange(size), places)).tobytes() + floats(x[places])

    def decode(self, sent: bytes, size: int) -> np.ndarray:
        k, x = self.count(size), np.zeros(size)
        if 4 * k <= -(-size // 8):
            places = np.frombuffer(sent, "<u4", k)
        else:
            bitmap = np.frombuffer(sent, np.uint8, -(-size // 8))
            places = np.flatnonzero(np.unpackbits(bitmap, count=size))
        x[places] = np.frombuffer(sent, "<f4", k, offset=len(sent) - 4 * k)
        return x

    def bytes_of(self, size: int) -> int:
        k = self.count(size)
        return 4 * k + min(4 * k, -(-size // 8))


@dataclasses.dataclass(frozen=True)
class RandomK(TopK):
    """Some numbers at random. Attributes: error_feedback: whether they are sent unscaled."""

    name: ClassVar[str] = "randk"
    error_feedback: bool = False

    def encode(self, x: np.ndarray, rng: np.random.Generator) -> bytes:
        seed = rng.bytes(8)
        return seed + floats(x[self.places(seed, len(x))] * self._scale(len(x)))

    def decode(self, sent: bytes, size: int) -> np.ndarray:
        x = np.zeros(size)
        x[self.places(sent[:8], size)] = np.frombuffer(sent, "<f4", offset=8)
        return x

    def places(self, seed: bytes, size: int) -> np.ndarray:
        """Returns the k places that a seed stands for."""
        rng = np.random.default_rng(int.from_bytes(seed, "little"))
        return np.sort(rng.choice(size, self.count(size), replace=False))

    def bytes_of(self, size: int) -> int:
        return 4 * self.count(size) + 8

    def _scale(self, size: int) -> float:
        return 1.0 if self.error_feedback else size / self.count(size)
