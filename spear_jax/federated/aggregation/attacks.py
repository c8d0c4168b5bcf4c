"""Simulated attacks on the server: some clients send what they like in place of what they trained.

Attackers are ⌊φ K⌋ clients, drawn once. They act in every round in which they are sampled and have
something to train on. What they send is not bound by what clients do to their own updates, such as
clipping; the server then does the same to what arrives.

    sign_flip    −γ δ_k
    gaussian     N(0, σ²) in every number, σ in units of ‖δ_k‖ / √d
    scale        γ δ_k
    replacement  (Σ w / w_k) δ_k: the mean becomes the attacker's own adapter, others' updates aside
                 (arXiv 1807.00459)
    alie         μ − z sd of the honest updates, number by number; n clients, f attackers,
                 s = ⌊n/2⌋ + 1 − f, z = Φ⁻¹((n − f − s) / (n − f)) (arXiv 1902.06156)
    ipm          −ε μ of the honest updates; the mean flips where ε > (n − f) / f (arXiv 1903.03936)
    nonfinite    one NaN

`alie` and `ipm` know all honest updates. Attacks on feedback stand in `feedback/attacks.py`.
"""

import dataclasses
import math
import statistics
from typing import Any

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.core.rng import path_rng, purpose
from spear_jax.federated.aggregation import vectors

ATTACK = purpose("attack")
ON_MODELS = ("sign_flip", "gaussian", "scale", "replacement", "alie", "ipm", "nonfinite")


def attackers(seed: int, clients: int, fraction: float) -> list[int]:
    """Returns the ids of ⌊φ K⌋ clients, in order; a function of (seed, K, φ) alone."""
    order = path_rng(seed, ATTACK).permutation(clients)
    return sorted(order[: math.floor(fraction * clients + 1e-9)].tolist())


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack on the model.

    Attributes:
        kind: one of ON_MODELS.
        clients: the attackers' ids.
        strength: γ, σ or ε.
        seed: of the noise.
    """

    kind: str
    clients: tuple[int, ...]
    strength: float = 1.0
    seed: int = 0

    def __call__(
        self, updates: Any, weight: np.ndarray, clients: np.ndarray, round: int
    ) -> tuple[Any, np.ndarray]:
        """Replaces what attackers send.

        Args:
            updates: leaves [n, ...], of clients that trained; weight: float[n], above 0.
            clients: int[n], their ids.
        Returns: the updates as the server receives them; bool[n], whose are an attacker's.
        """
        bad = np.isin(clients, self.clients)
        if not bad.any() or (self.kind in ("alie", "ipm") and bad.all()):
            return updates, bad
        if self.kind in ("alie", "ipm"):
            send = alie if self.kind == "alie" else self._inner_product
            sent = send(vectors.take(updates, ~bad), int(bad.sum()))
            put = lambda x, new: np.where(_like(bad, x), np.asarray(new, x.dtype), x)
            return jax.tree.map(put, updates, sent), bad
        if self.kind == "gaussian":
            return self._noise(updates, clients, bad, round), bad
        factor = {
            "sign_flip": -self.strength,
            "scale": self.strength,
            "replacement": weight.sum() / weight,
            "nonfinite": np.nan,
        }[self.kind]
        factors = np.where(bad, factor, 1.0)
        return jax.tree.map(lambda x: x * _like(factors, x).astype(x.dtype), updates), bad

    def _inner_product(self, honest: Any, attackers: int) -> Any:
        return inner_product(honest, self.strength)

    def _noise(self, updates: Any, clients: np.ndarray, bad: np.ndarray, round: int) -> Any:
        leaves, tree = jax.tree.flatten(jax.tree.map(np.array, updates))
        size = sum(leaf[0].size for leaf in leaves)
        sigma = self.strength * np.sqrt(vectors.squared_norms(updates) / size)
        for slot in np.flatnonzero(bad):
            rng = path_rng(self.seed, ATTACK, round, int(clients[slot]))
            for leaf in leaves:
                leaf[slot] = sigma[slot] * rng.standard_normal(leaf.shape[1:])
        return jax.tree.unflatten(tree, leaves)


def alie(honest: Any, attackers: int) -> Any:
    """Returns μ − z sd, "a little is enough". Args: honest: leaves [n − f, ...]; attackers: f.

    Where z has no value (see `alie_share`), μ is sent.
    """
    count = len(jax.tree.leaves(honest)[0])
    share = alie_share(count + attackers, attackers)
    z = statistics.NormalDist().inv_cdf(share) if 0 < share < 1 else 0.0
    return jax.tree.map(
        lambda x: np.mean(x, 0, dtype=np.float64) - z * np.std(x, 0, dtype=np.float64), honest
    )


def alie_share(clients: int, attackers: int) -> float:
    """Returns (n − f − s) / (n − f), whose normal quantile is z; outside (0, 1) there is none."""
    supporters = clients // 2 + 1 - attackers
    return (clients - attackers - supporters) / max(1, clients - attackers)


def inner_product(honest: Any, strength: float) -> Any:
    """Returns −ε μ. Args: honest: leaves [n − f, ...]."""
    return jax.tree.map(lambda x: -strength * np.mean(x, 0, dtype=np.float64), honest)


def replacement(target: Any, weight: np.ndarray, attacker: int, others: Any = None) -> Any:
    """Returns the update that sets the mean to a target: (Σ w / w_k) (target − θ), less what the
    others add, where it is known.

    Args: target: target − θ; weight: float[n]; others: leaves [n − 1, ...], in order.
    """
    boost = weight.sum() / weight[attacker]
    if others is None:
        return jax.tree.map(lambda x: boost * x, target)
    shares = np.delete(weight, attacker) / weight[attacker]
    return jax.tree.map(lambda x, y: boost * x - np.tensordot(shares, y, 1), target, others)


def check(kind: str, clients: int, attackers: int) -> None:
    """Raises UserError where `alie` has no z. Args: clients: n of a round; attackers: f."""
    attackers = min(attackers, clients)
    if kind == "alie" and attackers and not 0 < alie_share(clients, attackers) < 1:
        raise UserError(
            f"attack.kind is 'alie' with {attackers} attackers among {clients} clients a round, "
            "for which it has no z; lower attack.fraction, or raise federation.clients_per_round."
        )


def _like(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (x.ndim - 1))
