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


def sample_poisson(
    num_clients: int, rate: float, limit: int, rng: np.random.Generator
) -> list[int]:
    """Returns a round's clients in rising order, each drawn by itself with the same chance; there may
    be none.

    Args:
        rate: q, the chance.
        limit: of more clients than that, so many are kept at random; 0: all.
    """
    drawn = np.flatnonzero(rng.random(num_clients) < rate)
    if limit and len(drawn) > limit:
        drawn = np.sort(rng.choice(drawn, limit, replace=False))
    return drawn.tolist()
