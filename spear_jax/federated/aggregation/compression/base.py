"""What clients do to their updates before they send them, and what the server reads of that.

    x = δ_k + e_k  →  encode  →  bytes  →  decode  →  x̂,        e_k ← x − x̂ with error feedback

x is the update of the factors that are sent, flattened in the order of the leaves. The server works
on x̂. Without error feedback e_k is 0. The sums of what was sent and of the updates then differ by
the last memory alone: Σ x̂ = Σ δ − e.

Source of error feedback: Stich et al. (arXiv 1809.07599), Karimireddy et al. (arXiv 1901.09847).
"""

import abc
from typing import ClassVar

import numpy as np


class Compressor(abc.ABC):
    """An encoding of a vector; a frozen dataclass.

    Class attributes:
        name: of `compression.kind`.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def encode(self, x: np.ndarray, rng: np.random.Generator) -> bytes:
        """Returns what travels. Args: x: float64[d]; rng: of the client in this round."""

    @abc.abstractmethod
    def decode(self, sent: bytes, size: int) -> np.ndarray:
        """Returns x̂, float64[d]. Args: size: d, which both sides know."""

    @abc.abstractmethod
    def bytes_of(self, size: int) -> int:
        """Returns the length of `encode(x)` for a vector of that size."""


def floats(x: np.ndarray) -> bytes:
    """Returns numbers as float32, little-endian."""
    return np.ascontiguousarray(x, "<f4").tobytes()
