"""The learning rate of a round."""

import numpy as np


def round_rate(
    round: float, rounds: int, peak: float, low: float, warmup_ratio: float, warmup: bool
) -> float:
    """The learning rate of a round (1-based; a fraction where a budget of tokens sets the pace),
    constant inside it.

    w = int(warmup_ratio R);  r <= w: peak r / max(1, w);  else low + ½ (peak − low)(1 + cos(π (r − w) / max(1, R − w)));
    without warm-up: peak. Source: the published SPEAR code.
    """
    if not warmup:
        return peak
    w = int(warmup_ratio * rounds)
    if round <= w:
        return peak * round / max(1, w)
    return low + 0.5 * (peak - low) * (1 + float(np.cos(np.pi * (round - w) / max(1, rounds - w))))
