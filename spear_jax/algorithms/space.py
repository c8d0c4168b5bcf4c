"""SPACE: self-play by noise-contrastive estimation.

The policy's ratio to the opponent is a classifier of real against synthetic responses, with μ
synthetic responses to each real one. Real and synthetic rows are not paired. The optimum is the
data's distribution, whatever the opponent was.

Source: SPACE (self-play by noise-contrastive estimation), equation from readers' notes, checked
    here by its fixed point.

Departures (see also `self_play`):
    1. AdamW with the round's learning rate instead of RMSProp.
    2. λ is a setting; only 1 keeps the optimum, since the loss is not invariant to shifts of r.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import FASTER
from spear_jax.algorithms.self_play import SelfPlay, reward_metrics
from spear_jax.core.errors import UserError
from spear_jax.core.settings import number, positive
from spear_jax.core.types import Example, Mean
from spear_jax.packing.arrays import Batch
from spear_jax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class SpaceSettings:
    """Settings of SPACE."""

    # μ: synthetic responses to each real one; 3 and 7 gain little for several times the cost
    mu: int = number(1, 1)
    lam: float = positive(1.0)  # λ of r = λ (s_θ − s_t)
    refresh_rounds: int = number(1, 1)  # rounds of an iteration


def space_real(reward: jax.Array, mu: float) -> jax.Array:
    """Returns −log σ_μ(r) = sp(log μ − r), elementwise; σ_μ(z) = 1/(1 + μ e^{−z})."""
    return jax.nn.softplus(math.log(mu) - reward)


def space_synthetic(reward: jax.Array, mu: float) -> jax.Array:
    """Returns −log σ_{1/μ}(−r') = sp(r' − log μ), elementwise; the loss has μ times its mean."""
    return jax.nn.softplus(reward - math.log(mu))


class Space(SelfPlay):
    """SPACE; rows k B .. (k + 1) B of a micro-batch are the k-th synthetic responses.

    For B = 2 and μ = 2, with two responses a and b to each prompt:

        rows    y0 y1 a0 a1 b0 b1
        label    1  1 -1 -1 -1 -1
    """

    name = "space"
    Settings = SpaceSettings

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        return super().recommended(task, variant) | (FASTER if variant == "small" else {})

    @property
    def samples(self) -> int:
        return self.settings.mu

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:
        super().check(task, examples, feedback)
        if self.settings.mu > 1 and self.common.temperature == 0:
            raise UserError(
                f"space.mu is {self.settings.mu}, but greedy sampling gives the same response "
                f"{self.settings.mu} times. "
                "Set --config.rollout.temperature=1 or --config.space.mu=1."
            )

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        mu = self.settings.mu
        rewards = self.rewards(batch, logprobs)[0]
        real, synthetic, valid = rewards[0], rewards[1:], self.valid(batch)
        # L = mean sp(log μ − r) + μ mean sp(r' − log μ)
        loss = losses.ratio(
            jnp.where(valid[0], space_real(real, mu), 0.0).sum(), denominators["real"]
        )
        each = jnp.where(valid[1:], space_synthetic(synthetic, mu), 0.0)
        loss += mu * losses.ratio(each.sum(), denominators["synthetic"])
        return loss, reward_metrics(real, synthetic, valid)
