"""What an honest client does to its update before it leaves: it clips, and may add noise of its own.

    δ_k ← δ_k min(1, S / ‖δ_k‖) + z S ξ_k,    ξ_k ~ N(0, I)

With z > 0 this is local differential privacy: nobody has to trust the server, and every rule behind it
works on what is private already. Every client of the cohort sends, with a zero update where it had
nothing to train on, since silence would tell.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from spear_jax.core.rng import path_rng, purpose
from spear_jax.federated.privacy.accounting import local_epsilon
from spear_jax.federated.privacy.central import clip_factors

LOCAL_NOISE = purpose("local_noise")


@dataclasses.dataclass(frozen=True)
class LocalPrivacy:
    """Noise that every client adds. It keeps `uploads`, int32[K], how often each has sent.

    Attributes: noise_multiplier: z; clip: S; delta: δ; seed: of the noise.
    """

    noise_multiplier: float
    clip: float
    delta: float
    seed: int = 0

    def init_kept(self, clients: int) -> dict[str, Any]:
        """Returns what is kept before round 1. Args: clients: K."""
        return {"uploads": np.zeros(clients, np.int32)}

    def count(
        self, clients: np.ndarray, kept: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Counts a cohort's uploads, lost and late ones among them.

        Returns: metrics, with the ε of the client that has sent most often; what is kept.
        """
        uploads = kept["uploads"].copy()
        uploads[clients] += 1
        epsilon = local_epsilon(self.noise_multiplier, int(uploads.max()), self.delta)
        told = {"privacy/epsilon": epsilon, "privacy/delta": self.delta, "privacy/clip": self.clip}
        return told, kept | {"uploads": uploads}

    def add_noise(self, updates: Any, clients: np.ndarray, round: int) -> Any:
        """Returns the clients' updates with noise; depends on (seed, round, client) alone.

        Args: updates: clipped, leaves [n, ...]; clients: int[n], their ids.
        """
        leaves, tree = jax.tree.flatten(jax.tree.map(np.array, updates))
        sigma = self.noise_multiplier * self.clip
        for slot, client in enumerate(clients):
            rng = path_rng(self.seed, LOCAL_NOISE, round, int(client))
            for leaf in leaves:
                leaf[slot] += sigma * rng.standard_normal(leaf.shape[1:])
        return jax.tree.unflatten(tree, leaves)


def clipped(updates: Any, bound: float) -> Any:
    """Returns updates clipped to a norm, float32. Args: updates: leaves [n, ...]."""
    factors = clip_factors(updates, bound)
    scale = lambda x: np.float32(x * factors.reshape(-1, *[1] * (x.ndim - 1)))
    return jax.tree.map(scale, updates)
