"""Reduces the cohort's updates to one."""

import numpy as np

from spear_jax.federated.aggregation.server_optimizer import ServerConfig


def client_weights(config: ServerConfig, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
    """float[C]: the weights that enter the sum; under `last` only the last client that trained
    counts.
    """
    if config.rule != "last":
        return weight
    only = np.zeros_like(weight)
    trained = np.flatnonzero(active)
    if len(trained):
        only[trained[-1]] = 1.0
    return only
