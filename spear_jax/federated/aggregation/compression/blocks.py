"""Stochastic rounding to 8 or 4 bits, with one step for each block of numbers.

    step = max |x| / (2^(b − 1) − 1) in a block,    code = ⌊x / step + u⌋,  u ~ U[0, 1)

Unbiased, |x̂ − x| < step, variance at most step² / 4. A block of zeros has the step 0. Two codes of 4
bits share a byte, the first one low, each with an offset of 8.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from spear_jax.federated.aggregation.compression.base import Compressor, floats


@dataclasses.dataclass(frozen=True)
class Int8(Compressor):
    """8 bits a number. Attributes: block: numbers that share a step."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    block: int = 256

    def encode(self, x: np.ndarray, rng: np.random.Generator) -> bytes:
        codes, steps = quantise(x, rng.random(len(x)), self.bits, self.block)
        return floats(steps) + self._pack(codes)

    def decode(self, sent: bytes, size: int) -> np.ndarray:
        count = -(-size // self.block)
        steps = np.frombuffer(sent, "<f4", count).astype(np.float64)
        codes = self._unpack(np.frombuffer(sent, np.uint8, offset=4 * count), size)
        return codes * np.repeat(steps, self.block)[:size]

    def bytes_of(self, size: int) -> int:
        return -(-size * self.bits // 8) + 4 * -(-size // self.block)

    def _pack(self, codes: np.ndarray) -> bytes:
        return codes.astype(np.int8).tobytes()

    def _unpack(self, packed: np.ndarray, size: int) -> np.ndarray:
        return packed.view(np.int8).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Int4(Int8):
    """4 bits a number."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

    def _pack(self, codes: np.ndarray) -> bytes:
        shifted = np.pad(codes + 8, (0, len(codes) % 2)).astype(np.uint8)
        return (shifted[::2] | shifted[1::2] << 4).tobytes()

    def _unpack(self, packed: np.ndarray, size: int) -> np.ndarray:
        pairs = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:size]
        return pairs.astype(np.float64) - 8


def quantise(x: np.ndarray, u: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes float64[d], whole numbers, and steps float64[blocks].

    Args: u: [d] in [0, 1), which way each number is rounded.
    """
    most = 2 ** (bits - 1) - 1
    padded = np.pad(x, (0, -len(x) % block)).reshape(-1, block)
    steps = np.abs(padded).max(1) / most
    each = np.repeat(steps, block)[: len(x)]
    scaled = np.divide(x, each, out=np.zeros_like(x), where=each > 0)
    codes = np.clip(np.floor(scaled + u), -most, most)
    return np.where(each == 0, 0.0, codes), steps
