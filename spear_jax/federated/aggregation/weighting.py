"""How much each client counts, before a reducer sees it.

`method` takes the method's weight, for SPEAR the number of wins. A user who calls every answer right
has as many wins as answers: four honest clients with 8, 6, 10 and 7 wins of 32 leave such a one 51 %
of the average. `uniform` leaves it 20 %, `capped` at 10 leaves it 24 %.
"""

import dataclasses

import numpy as np

KINDS = ("method", "uniform", "capped")


@dataclasses.dataclass(frozen=True)
class Weighting:
    """The weights of a cohort. Attributes: kind: one of KINDS; cap: the most, of "capped"."""

    kind: str = "method"
    cap: float = 0.0

    def __call__(self, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Returns float[C]. Args: weight: float[C], the method's; active: bool[C], who trained."""
        if self.kind == "uniform":
            return np.where(active, 1.0, 0.0)
        return np.minimum(weight, self.cap) if self.kind == "capped" else weight
