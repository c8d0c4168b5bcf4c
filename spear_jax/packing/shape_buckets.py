"""The padded sizes of what goes through a model: how they are rounded, and which of them a run has
opened.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

COLUMN, COLUMNS = 64, 6  # tokens of a column where that makes few enough; columns at most

# how versions up to 0.10 named the fields of a saved shape
_RENAMED = {
    "columns": "tiles",
    "items": "groups",
    "kinds": "rows_per_group",
    "trunks": "num_packs",
    "opening": "shared_prefix",
}


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The sizes of a block; hashable.

    Attributes:
        tokens: N of each pack.
        columns: (R, W) of each column of a pack's attention grid: so many trees may reach so far.
        scored: M.
        items: row i and row i + items, i + 2 items, ... are one item's.
        kinds: rows of an item.
        trunks: packs; kind k stands in pack k % trunks.
        length: T.
        opening: h token ids with which every prompt begins, and which a pack holds once.
    """

    tokens: int
    tiles: tuple[tuple[int, int], ...]
    scored: int
    groups: int
    rows_per_group: int
    num_packs: int
    length: int
    shared_prefix: tuple[int, ...] = ()


def size_bucket(size: int, finest: int = 16) -> int:
    """`size` rounded up so that at most an eighth of the result is padding: a few sizes an octave,
    multiples of `finest`.
    """
    step = max(finest, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def split_tiles(longest: int) -> list[int]:
    """The widths of the columns of trees of up to `longest` tokens: at most COLUMNS, as each is
    compiled.
    """
    up = lambda n: -(-n // 8) * 8
    width = max(COLUMN, up(-(-longest // COLUMNS)))
    full = (longest - 1) // width
    return [width] * full + [up(longest - full * width)]


class ShapeBuckets:
    """The padded sizes that a run has opened. A batch takes an open one that holds it with little
    waste; once frozen any that holds it, so that nothing compiles any more. Part of what a run must
    remember (`save`, `load`).
    """

    WASTE = 1.15  # how much dearer than wanted an open shape may be before freezing

    def __init__(self):
        self.frozen = False
        self._open: dict[str, set[tuple[int, ...]]] = {}
        self._block_shapes: dict[str, BlockShape] = {}

    def freeze(self) -> None:
        """Prefers open shapes from now on, however wasteful."""
        self.frozen = True

    def fit(
        self,
        name: str,
        wanted: tuple[int, ...],
        cost: Callable[[tuple[int, ...]], float] | None = None,
    ) -> tuple[int, ...]:
        """The cheapest open shape of this name that holds what is wanted, or `wanted` itself,
        opened.

        Args: cost: of a shape, infinite where it would not do; None: its product where it is as
            large as `wanted` in every size.
        """

        def product(shape: tuple[int, ...]) -> float:
            large = all(a >= b for a, b in zip(shape, wanted, strict=True))
            return float(np.prod(shape, dtype=float)) if large else np.inf

        cost = cost or product
        found = self._open.setdefault(name, set())
        limit = sys.float_info.max if self.frozen else self.WASTE * cost(wanted)
        costs = {shape: cost(shape) for shape in found}
        fitting = [shape for shape in found if costs[shape] <= limit]
        best = min(fitting, key=lambda s: (costs[s], s), default=wanted)
        found.add(best)
        return best

    def opened(self, name: str) -> list[tuple[int, ...]]:
        """The open shapes of this name."""
        return sorted(self._open.get(name, ()))

    def open(self, name: str, shape: tuple[int, ...]) -> None:
        """Opens a shape."""
        self._open.setdefault(name, set()).add(shape)

    def shape(self, name: str, choose: Callable[[], BlockShape]) -> BlockShape:
        """The room of this name, chosen once."""
        if name not in self._block_shapes:
            self._block_shapes[name] = choose()
        return self._block_shapes[name]

    def save(self) -> dict[str, Any]:
        """What `load` needs, as JSON."""
        return {
            "frozen": self.frozen,
            "open": {name: sorted(map(list, found)) for name, found in self._open.items()},
            "rooms": {
                name: dataclasses.asdict(shape) for name, shape in self._block_shapes.items()
            },
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `save` gave."""
        self.frozen = saved["frozen"]
        self._open = {
            name: {tuple(shape) for shape in found} for name, found in saved["open"].items()
        }
        named = {
            name: {_RENAMED.get(field, field): value for field, value in shape.items()}
            for name, shape in saved["rooms"].items()
        }
        whole = lambda shape: {
            "tiles": tuple(map(tuple, shape["tiles"])),
            "shared_prefix": tuple(shape["shared_prefix"]),
        }
        # runs of before 0.8.0 saved shapes without tiles; theirs are chosen anew
        self._block_shapes = {
            name: BlockShape(**shape | whole(shape))
            for name, shape in named.items()
            if "tiles" in shape
        }
