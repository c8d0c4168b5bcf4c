"""Shape buckets: the few padded sizes that a run compiles programs for.

JAX compiles a program for every shape of its arguments. Sizes are therefore rounded up, and a run
keeps to the sizes that it has opened.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

TILE_WIDTH, MAX_TILES = 64, 6  # a tile is wider where the longest tree needs more tiles than that

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

    Of pairs (rows_per_group = 2) with groups = 3, rows 0 and 3 are the first pair, 1 and 4 the
    second. With num_packs = 2 row 0 stands in pack 0 and row 3 in pack 1; with num_packs = 1 both
    stand in pack 0.

    Attributes:
        tokens: N of each pack.
        tiles: (rows, width) of each tile of a pack's attention grid, without a shared prefix's.
        scored: M.
        groups: the most groups that a block holds. Rows i, i + groups, i + 2 groups, ... are one.
        rows_per_group: rows of a group; B = groups * rows_per_group.
        num_packs: packs. A group's row k stands in pack k % num_packs.
        length: T.
        shared_prefix: h token ids with which every prompt begins, and which a pack holds once.
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
    """Rounds a size up to one of a few: 100 to 112, 1000 to 1024, 5000 to 5120.

    At most an eighth of the result is padding, but for sizes below 8 `finest`.

    Args: finest: every result is a multiple of it.
    """
    step = max(finest, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def split_tiles(longest: int) -> list[int]:
    """Cuts trees of up to `longest` tokens into tiles: 130 tokens into widths [64, 64, 8].

    The tiles are few, MAX_TILES at most, because each adds its own attention to the program.
    """
    up = lambda n: -(-n // 8) * 8
    width = max(TILE_WIDTH, up(-(-longest // MAX_TILES)))
    full = (longest - 1) // width
    return [width] * full + [up(longest - full * width)]


class ShapeBuckets:
    """The padded sizes that a run has opened so far.

    A batch takes an open size that holds it with little waste, or opens a new one. Once the sizes
    are frozen it takes any that holds it, so that nothing compiles any more. A run saves its sizes
    with each checkpoint, because padding decides how sums are rounded.

        shapes.fit("prompts", (8, 100))    (8, 100), opened
        shapes.fit("prompts", (8, 95))     (8, 100), 5 % more than needed
        shapes.fit("prompts", (4, 50))     (4, 50), opened; once frozen it would have been (8, 100)
    """

    WASTE = 1.15  # how much dearer than wanted an open shape may be before freezing

    def __init__(self):
        self.frozen = False
        self._open: dict[str, set[tuple[int, ...]]] = {}
        self._block_shapes: dict[str, BlockShape] = {}

    def freeze(self) -> None:
        """Prefers open sizes from now on, however wasteful."""
        self.frozen = True

    def fit(
        self,
        name: str,
        wanted: tuple[int, ...],
        cost: Callable[[tuple[int, ...]], float] | None = None,
    ) -> tuple[int, ...]:
        """Returns the cheapest open shape of a name that holds what is wanted; else opens `wanted`.

        Args:
            name: shapes of one name can replace each other.
            wanted: the sizes that are needed.
            cost: of a shape, infinite where it does not hold what is wanted. None: the product of
                its sizes, where each is as large as wanted.
        """

        def product(shape: tuple[int, ...]) -> float:
            large = all(a >= b for a, b in zip(shape, wanted, strict=True))
            return float(np.prod(shape, dtype=float)) if large else np.inf

        cost = cost or product
        opened = self._open.setdefault(name, set())
        limit = sys.float_info.max if self.frozen else self.WASTE * cost(wanted)
        costs = {shape: cost(shape) for shape in opened}
        fitting = [shape for shape in opened if costs[shape] <= limit]
        best = min(fitting, key=lambda s: (costs[s], s), default=wanted)
        opened.add(best)
        return best

    def opened(self, name: str) -> list[tuple[int, ...]]:
        """Lists the open shapes of a name."""
        return sorted(self._open.get(name, ()))

    def open(self, name: str, shape: tuple[int, ...]) -> None:
        """Opens a shape."""
        self._open.setdefault(name, set()).add(shape)

    def shape(self, name: str, choose: Callable[[], BlockShape]) -> BlockShape:
        """Returns the block shape of a name, which is chosen once."""
        if name not in self._block_shapes:
            self._block_shapes[name] = choose()
        return self._block_shapes[name]

    def save(self) -> dict[str, Any]:
        """Returns what `load` needs, as JSON."""
        return {
            "frozen": self.frozen,
            "open": {name: sorted(map(list, opened)) for name, opened in self._open.items()},
            "rooms": {  # the key of versions up to 0.10, which stands in their checkpoints
                name: dataclasses.asdict(shape) for name, shape in self._block_shapes.items()
            },
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `save` gave."""
        self.frozen = saved["frozen"]
        self._open = {
            name: {tuple(shape) for shape in opened} for name, opened in saved["open"].items()
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
