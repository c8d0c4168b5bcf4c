"""Chooses a round's cohort."""

import numpy as np


def sample_cohort(
    num_clients: int, count: int, sizes: np.ndarray, how: str, rng: np.random.Generator
) -> list[int]:
    """This round's clients, without replacement: uniformly, or in proportion to their number of
    examples ("weighted").
    """
    chances = sizes / sizes.sum() if how == "weighted" else None
    return sorted(int(c) for c in rng.choice(num_clients, size=count, replace=False, p=chances))
