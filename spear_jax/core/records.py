"""Records of a run that both the run and its analysis read.

Nothing here imports pandas, which a run does without until its end.
"""

import json
import math
import pathlib
from typing import Any


def read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the whole lines of a metrics.jsonl, by round.

    A last line that is still being written, or was cut short, is left out. Of a round that stands
    there twice, as two processes at once have left it in older run folders, the last line counts.
    """
    if not file.exists():
        return []
    lines: dict[int, dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines[line["round"]] = line
        except (ValueError, TypeError, KeyError):  # no JSON, or no round's
            break
    return [lines[number] for number in sorted(lines)]


def wilson(p: float, n: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the 95 % score interval of a fraction p of n.

    Half of a hundred answers were right:

        >>> [round(x, 3) for x in wilson(0.5, 100)]
        [0.404, 0.596]
    """
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # it holds p itself, which rounding must not push out of it where p is 0 or 1
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
