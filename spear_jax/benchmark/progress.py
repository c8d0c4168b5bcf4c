"""Progress of a benchmark: a bar on a terminal, elsewhere a line on stderr for each part."""

import sys
import time
from collections.abc import Mapping

import tqdm


class Progress:
    """Progress over a benchmark's parts. A part is a phase, or a cohort of one size.

    Without a terminal the lines are, for example,

        rollout: 12 s (1 of 7), about 72 s left

    Args:
        sizes: of every part, in the order in which they run. The time of a part is taken to grow
            with its size. The estimate of the time left is the time so far, scaled by these sizes.
        calls: calls of one part.
        bar: whether there is a terminal to draw on.
        quiet: neither bar nor lines.
    """

    def __init__(self, sizes: Mapping[str, float], calls: int, bar: bool, quiet: bool):
        self.sizes, self.lines = dict(sizes), not quiet and not bar
        self.done: list[str] = []
        self.began = self.part_began = time.monotonic()
        self.bar = tqdm.tqdm(total=len(self.sizes) * calls, disable=not bar)

    def call(self, text: str) -> None:
        """Names the call that begins."""
        self.bar.set_description(text)

    def called(self) -> None:
        """Counts the call that has ended."""
        self.bar.update(1)

    def ended(self, part: str) -> None:
        """Reports a part whose calls have all ended."""
        now = time.monotonic()
        self.done.append(part)
        took, self.part_began = now - self.part_began, now
        if self.lines:
            count = f"{len(self.done)} of {len(self.sizes)}"
            print(f"{part}: {took:.3g} s ({count}){self._left(now)}", file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        measured = sum(self.sizes[part] for part in self.done)
        left = sum(self.sizes.values()) - measured
        return f", about {(now - self.began) * left / measured:.0f} s left" if left else ""

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()
