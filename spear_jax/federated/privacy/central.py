"""Central differential privacy: the server clips every client's update and adds noise to the sum.

    g = (Σ_k w_k δ_k min(1, S / ‖δ_k‖) + z S ξ) / (q K),    ξ ~ N(0, I)

One client moves the sum by S at most. Every client of the cohort counts, whether it had something to
train on or not; who is lost or rejected adds zero. The denominator is the expected cohort, which is
public, not the one that came. An empty cohort gives noise alone.

Sources: DP-FedAvg (arXiv 1710.06963); the adaptive clip norm is that of Andrew et al. (arXiv
1905.03871). Departures:
  1. A client says whether its norm was within S before it clips itself, as in the paper; an
     attacker's is what the server receives.
  2. Where updates are summed as clients train, they are clipped in float32: a norm may exceed S by
     what rounding an adapter adds.
  3. Gaussian numbers are drawn in float64 from the run's seed: they repeat, and whoever knows the seed
     can take them off again. A server of real clients draws them from a secret (`flower/noise.py`).
     Floating point itself leaks a little (Mironov, CCS 2012).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from spear_jax.core.rng import path_rng, purpose
from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.secure_sum import SecureSum
from spear_jax.federated.privacy.accounting import Account

NOISE = purpose("dp_noise")
BIT_NOISE = purpose("dp_bit_noise")

Normal = Callable[[Any], Any]  # a shape to numbers from N(0, 1)


@dataclasses.dataclass(frozen=True)
class AdaptiveClip:
    """A clip norm that follows a quantile of the clients' norms.

        β = (Σ_k (b_k − ½) + σ_b ξ) / (q K) + ½,    b_k = 1 where ‖δ_k‖ ≤ S
        S ← S exp(−η (β − γ))

    Attributes: quantile: γ; rate: η; sigma: σ_b, noise of the count.
    """

    quantile: float
    rate: float
    sigma: float

    def move(self, bound: float, below: np.ndarray, expected: float, normal: float) -> float:
        """Returns the next S.

        Args: below: bool[n], b_k; expected: q K; normal: ξ, from N(0, 1).
        """
        count = float(np.sum(below - 0.5)) + self.sigma * normal
        return bound * math.exp(-self.rate * (count / expected + 0.5 - self.quantile))

    def rest(self, noise_multiplier: float) -> float:
        """Returns z of the updates, where the count and they together are worth the given one:
        (z⁻² − (2σ_b)⁻²)^(−½); it needs z < 2σ_b.
        """
        return (noise_multiplier**-2 - (2.0 * self.sigma) ** -2) ** -0.5


@dataclasses.dataclass(frozen=True)
class CentralPrivacy:
    """What the server does to a cohort's sum. It keeps `bound`, S, and `noisy_rounds`.

    Attributes:
        account: z, and how cohorts are drawn.
        clip: S of round 1.
        adaptive: how S moves; None: it stays.
        client_weights: w_k of all clients, from 0 to 1; (): 1 for each.
        seed: of the noise.
    """

    account: Account
    clip: float
    adaptive: AdaptiveClip | None = None
    client_weights: tuple[float, ...] = ()
    seed: int = 0

    @functools.cached_property
    def denominator(self) -> float:
        """Returns the weight of an expected cohort: q K, or q Σ w over all clients."""
        if not self.client_weights:
            return float(self.account.cohort)
        return self.account.cohort / self.account.clients * math.fsum(self.client_weights)

    @property
    def noise_multiplier(self) -> float:
        """Returns z of the updates."""
        z = self.account.noise_multiplier
        return z if self.adaptive is None else self.adaptive.rest(z)

    def normal(self, use: int, round: int) -> Normal:
        """Returns the source of ξ in a round. Args: use: NOISE or BIT_NOISE."""
        return path_rng(self.seed, use, round).standard_normal

    def init_kept(self) -> dict[str, Any]:
        """Returns what is kept before round 1."""
        return {"bound": np.float64(self.clip), "noisy_rounds": np.int32(0)}

    def weights(self, clients: Sequence[int]) -> np.ndarray:
        """Returns w_k of these clients, float32[n]."""
        if not self.client_weights:
            return np.ones(len(clients), np.float32)
        return np.array([self.client_weights[k] for k in clients], np.float32)

    def release(
        self,
        updates: Any,
        weight: np.ndarray,
        below: np.ndarray,
        size: int,
        kept: dict[str, Any],
        secure_sum: SecureSum | None = None,
    ) -> tuple[Any, dict[str, float], dict[str, Any]]:
        """Sums a round's updates privately.

        Args:
            updates: δ_k of n ≥ 0 clients, leaves [n, ...], zero where nothing is sent.
            weight: float[n], from 0 to 1; below: bool[n], whose norm was within S.
            size: d, how many numbers are sent.
            secure_sum: sums in the server's place, which then cannot clip what clients did not.
        Returns: g; metrics; what is kept.
        """
        round, bound = int(kept["noisy_rounds"]) + 1, float(kept["bound"])
        if secure_sum is None:
            weight = weight * clip_factors(updates, bound)
        sums = vectors.weighted_sum if secure_sum is None else secure_sum.sums(round)
        mean, told, kept = self.add_noise(sums(weight, updates), size, kept)
        told["privacy/clipped"] = float(np.mean(~below)) if len(below) else 0.0
        if self.adaptive is not None:
            one = float(self.normal(BIT_NOISE, round)(()))
            moved = self.adaptive.move(bound, below, float(self.account.cohort), one)
            kept = kept | {"bound": np.float64(moved)}
        return mean, told, kept

    def add_noise(
        self, total: Any, size: int, kept: dict[str, Any]
    ) -> tuple[Any, dict[str, float], dict[str, Any]]:
        """Adds noise to the sum of clipped updates; arguments and results as for `release`."""
        round, bound = int(kept["noisy_rounds"]) + 1, float(kept["bound"])
        sigma = self.noise_multiplier * bound
        signal = float(np.sqrt(vectors.squared_norms(vectors.add_axis(total))[0]))
        told = {
            "privacy/epsilon": self.account.epsilon(round),
            "privacy/delta": self.account.delta,
            "privacy/clip": bound,
            "privacy/snr": signal / (sigma * math.sqrt(size)),
        }
        kept = kept | {"noisy_rounds": np.int32(round)}
        return noisy_mean(total, sigma, self.denominator, self.normal(NOISE, round)), told, kept


def clip_factors(updates: Any, bound: float) -> np.ndarray:
    """Returns min(1, S / ‖δ_k‖), float64[n]; 1 for a zero update. Args: updates: leaves [n, ...]."""
    norms = np.sqrt(vectors.squared_norms(updates))
    return np.minimum(1.0, bound / np.where(norms > 0, norms, bound))


def noisy_mean(total: Any, sigma: float, denominator: float, normal: Normal) -> Any:
    """Returns (total + σ ξ) / denominator."""
    return jax.tree.map(lambda x: (x + sigma * normal(x.shape)) / denominator, total)
