"""Chooses a round's cohort."""

import numpy as np


def sample_cohort(
    num_clients: int, count: int, sizes: np.ndarray, how: str, rng: np.random.Generator
) -> list[int]:
    """Returns a round's clients in rising order, drawn without replacement.

    Args:
        sizes: float[num_clients], examples of each.
        how: "uniform", or "weighted" by their number of examples.
    """
    chances = sizes / sizes.sum() if how == "weighted" else None
    return sorted(int(c) for c in rng.choice(num_clients, size=count, replace=False, p=chances))
