"""SPIN: the policy learns to prefer the gold response to its own earlier one.

It plays against its earlier self, and tells the two responses apart. The next iteration's opponent
is the trained policy. The game is at rest only where the policy answers as the data does.

Source: SPIN (arXiv 2401.01335), equation 4.7; reductions, losses and the two kept data sets from
    its published code.

Departures (see also `self_play`):
    1. λ is one number; the published code runs iterations 0 to 2 with 0.1 and iteration 3 with 5
       (set `lam` and resume).
    2. AdamW with the round's learning rate instead of RMSProp with linear decay.
    3. One template for sampling and training, and one EOS (the published code has two of each).
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
class SpinSettings:
    """Settings of SPIN."""

    # λ of r = λ (s_θ − s_t). Exact inner solves contract only above 0.5; 0.1 relies on few steps
    # per iteration.
    lam: float = positive(0.1)
    kind: str = one_of("logistic", "hinge")  # sp(−z), or max(0, 1 − z)
    history: int = number(2, 1)  # iterations whose synthetic responses are trained on
    refresh_rounds: int = number(1, 1)  # rounds of an iteration


def spin_loss(real: jax.Array, synthetic: jax.Array, kind: str) -> jax.Array:
    """Returns ℓ(r − r'), elementwise; ℓ(z) = log(1 + e^{−z}) or max(0, 1 − z).

    Args: real, synthetic: float[...], r of paired responses.
    """
    return losses.pair_loss(real - synthetic, "sigmoid" if kind == "logistic" else kind)


class Spin(SelfPlay):
    """SPIN; row i and row B + i of a micro-batch are a pair."""

    name = "spin"
    Settings = SpinSettings

    @property
    def kept(self) -> int:
        return self.settings.history

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        real, synthetic = self.rewards(batch, logprobs)[0]
        valid = self.valid(batch)
        each = spin_loss(real, synthetic, self.settings.kind)
        # L = (1/n) Σ_i ℓ(r_i − r'_i)
        loss = losses.ratio(jnp.where(valid[0], each, 0.0).sum(), denominators["real"])
        return loss, reward_metrics(real, synthetic[None], valid)
