"""TPAW: SPIN against a team of up to three earlier policies.

The policy trains on the synthetic responses of all of them. Each opponent's game is weighted by how
badly the policy plays it. A real response that fell below an opponent's weighs η times as much.

Source: team-based self-play with dual adaptive weighting (TPAW), equations from readers' notes; its
    public repository is empty.

Departures (see also `self_play`):
    1. λ is not in our sources: 0.1, as SPIN.
    2. Whether the weights b carry a gradient is not stated: they do not (`stop_beta` off lets it
       flow).
    3. P_j <= 0 means up to TIE: an iteration starts at P = 0 but for rounding, which must not
       choose the step's side.
    4. Iterations with fewer opponents than `players` mask the missing ones, so that no program is
       compiled again.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import FASTER
from spear_jax.algorithms.self_play import SelfPlay, reward_metrics
from spear_jax.core.settings import number, positive
from spear_jax.core.types import Mean
from spear_jax.packing.arrays import Batch

TIE = 1e-3  # rewards this far above 0 are no better than 0


@dataclasses.dataclass(frozen=True)
class TpawSettings:
    """Settings of TPAW."""

    # J: opponents, and iterations whose synthetic responses are trained on
    players: int = number(3, 1, 3)
    lam: float = positive(0.1)  # λ of P_j = λ (s_θ − s_j)
    eta: float = positive(6.0)  # η: weight of a real response that has fallen below an opponent's
    # γ: how sharply opponents that are played badly weigh more; 0 weighs all alike
    gamma: float = number(0.5, 0)
    stop_beta: bool = True  # the weights b have no gradient
    refresh_rounds: int = number(1, 1)  # rounds of an iteration


def tpaw_loss(
    real: jax.Array,
    synthetic: jax.Array,
    players: jax.Array,
    eta: float,
    gamma: float,
    stop_beta: bool,
) -> jax.Array:
    """Returns Σ_j b_j sp(−(a_j P_j − P'_j)) of each pair, float[B].

    a_j = η where P_j <= 0, else 1; b = softmax_j(−γ (P_j − P'_j)).

    Args:
        real, synthetic: float[J, B], P_j of a real response and of its synthetic one.
        players: [J] in {0, 1}, the opponents that exist; at least one.
    """
    there = jnp.broadcast_to(players[:, None] > 0, real.shape)
    # a multiplies P without gradient of its own: it is a step.
    scale = jnp.where(real <= TIE, eta, 1.0)
    # b uses the margins without a.
    weight = jax.nn.softmax(-gamma * (real - synthetic), axis=0, where=there)
    weight = jax.lax.stop_gradient(weight) if stop_beta else weight
    return (weight * losses.pair_loss(scale * real - synthetic, "sigmoid")).sum(0, where=there)


class Tpaw(SelfPlay):
    """TPAW; row i and row B + i of a micro-batch are a pair.

    One opponent and η = 1 is SPIN.
    """

    name = "tpaw"
    Settings = TpawSettings

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        return super().recommended(task, variant) | (FASTER if variant == "small" else {})

    @property
    def players(self) -> int:
        return self.settings.players

    @property
    def kept(self) -> int:
        return self.settings.players

    def loss_scalars(self, algorithm_state: dict, now: int) -> dict[str, np.ndarray]:
        """Returns players, float32[J]: iteration t has t + 1 opponents, at most J.

        With J = 3:

            t = 0         1 0 0
            t = 1         1 1 0
            from t = 2    1 1 1
        """
        return {"players": (np.arange(self.players) <= now).astype(np.float32)}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        config = self.settings
        rewards = self.rewards(batch, logprobs)  # [J, 2, B]
        real, synthetic = rewards[:, 0], rewards[:, 1]
        valid = self.valid(batch)
        each = tpaw_loss(
            real, synthetic, loss_scalars["players"], config.eta, config.gamma, config.stop_beta
        )
        loss = losses.ratio(jnp.where(valid[0], each, 0.0).sum(), denominators["real"])
        return loss, reward_metrics(real[0], synthetic[:1], valid)
