"""QSGD: a norm, and of every number a sign and one of s + 1 levels. Source: Alistarh et al. (arXiv
1610.02132).

    x̂ = ‖x‖ sign(x) ⌊s |x| / ‖x‖ + u⌋ / s,    u ~ U[0, 1)

Unbiased, E ‖x̂ − x‖² ≤ min(d / s², √d / s) ‖x‖². Departure: levels are written with
⌈log2(s + 1)⌉ bits each, not with an Elias code.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from spear_jax.federated.aggregation.compression.base import Compressor, floats


@dataclasses.dataclass(frozen=True)
class Qsgd(Compressor):
    """One norm for the whole vector. Attributes: levels: s."""

    name: ClassVar[str] = "qsgd"
    levels: int = 127

    @property
    def _bits(self) -> int:
        return math.ceil(math.log2(self.levels + 1))

    def encode(self, x: np.ndarray, rng: np.random.Generator) -> bytes:
        norm, level = quantise(x, rng.random(len(x)), self.levels)
        whole = np.where(np.isfinite(level), level, 0).astype(np.uint64)
        bits = (whole[:, None] >> np.arange(self._bits, dtype=np.uint64)) & np.uint64(1)
        signed = np.concatenate([(x < 0)[:, None], bits], 1).astype(np.uint8)
        return floats(np.array([norm])) + np.packbits(signed).tobytes()

    def decode(self, sent: bytes, size: int) -> np.ndarray:
        norm, width = float(np.frombuffer(sent, "<f4", 1)[0]), 1 + self._bits
        packed = np.frombuffer(sent, np.uint8, offset=4)
        bits = np.unpackbits(packed, count=size * width).reshape(size, width)
        level = bits[:, 1:] @ (2.0 ** np.arange(self._bits))
        return norm * (1.0 - 2.0 * bits[:, 0]) * level / self.levels

    def bytes_of(self, size: int) -> int:
        return 4 + -(-size * (1 + self._bits) // 8)


def quantise(x: np.ndarray, u: np.ndarray, levels: int) -> tuple[float, np.ndarray]:
    """Returns ‖x‖ and the levels, float64[d], whole numbers."""
    norm = float(np.linalg.norm(x))
    return norm, np.floor(levels * np.abs(x) / (norm or 1.0) + u)
