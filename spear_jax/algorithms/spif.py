"""SPIF (derived): self-play in a χ² form.

The log-ratio r is a reward. It is regressed towards +1/c on real and −1/c on synthetic responses.
The targets bound it, so that no response is pushed without end. The policy is at rest only where it
and its opponent answer as the data does. Elsewhere an iteration is a damped step.

Source: SPIF (self-play by adversarial imitation with a χ² objective), its public abstract; the loss
    is our derivation.

Departures (see also `self_play`):
    1. The full text was not available. Regularising r by (c/2)(E_p r² + E_{π_t} r²) and completing
       squares gives `mixture`. `pearson` is the variational form of χ²(p ‖ π_t), whose reward is
       not bounded. The paper's loss may be another.
    2. λ and c are ours: 0.1 and 1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from spear_jax.algorithms import losses
from spear_jax.algorithms.self_play import SelfPlay, reward_metrics
from spear_jax.core.settings import number, one_of, positive
from spear_jax.core.types import Mean
from spear_jax.packing.arrays import Batch


@dataclasses.dataclass(frozen=True)
class SpifSettings:
    """Settings of SPIF."""

    form: str = one_of("mixture", "pearson")  # bounded rewards, or not
    # the regulariser's weight: the mixture's targets are ±1/c (pearson does not read it)
    c: float = positive(1.0)
    lam: float = positive(0.1)  # λ of r = λ (s_θ − s_t)
    refresh_rounds: int = number(1, 1)  # rounds of an iteration


def spif_real(reward: jax.Array, c: float, form: str) -> jax.Array:
    """Returns (c/2)(r − 1/c)² for mixture, −r for pearson, elementwise.

    The loss has its mean over real responses.
    """
    return -reward if form == "pearson" else c / 2 * (reward - 1 / c) ** 2


def spif_synthetic(reward: jax.Array, c: float, form: str) -> jax.Array:
    """Returns (c/2)(r' + 1/c)² for mixture, r' + r'²/4 for pearson, elementwise.

    The loss has its mean over synthetic responses.
    """
    return reward + reward**2 / 4 if form == "pearson" else c / 2 * (reward + 1 / c) ** 2


class Spif(SelfPlay):
    """SPIF; real and synthetic rows are not paired."""

    name = "spif"
    Settings = SpifSettings

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        c, form = self.settings.c, self.settings.form
        real, synthetic = self.rewards(batch, logprobs)[0]
        valid = self.valid(batch)
        # L = mean f(r) + mean g(r')
        loss = losses.ratio(
            jnp.where(valid[0], spif_real(real, c, form), 0.0).sum(), denominators["real"]
        )
        each = jnp.where(valid[1], spif_synthetic(synthetic, c, form), 0.0)
        loss += losses.ratio(each.sum(), denominators["synthetic"])
        return loss, reward_metrics(real, synthetic[None], valid)
