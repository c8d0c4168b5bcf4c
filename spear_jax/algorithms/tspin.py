"""T-SPIN: self-play without a reference, on triplets.

The policy prefers the gold response y to its latest own response y', and y' to y0. y0 is its very
first response to the prompt, and never changes. Nothing anchors the scores, so no second policy is
ever evaluated.

Source: triplet-based self-play fine-tuning (T-SPIN), equation from readers' notes.

Departures (see also `self_play`):
    1. α, β and the optimiser are not in our sources: 0.1, 1, and AdamW as for every method.
    2. In iteration 0 there is no later response yet: y0 is reused as y', and the second term is
       constant.
    3. A prompt's y0 is made when the prompt is first drawn, by the stored initial adapter.
    4. Scores are sums of log-probabilities, which favours short answers: watch `tspin/real_length`
       and `tspin/synthetic_length`. With π = p the gradient is not zero, so early stopping is part
       of the method.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import RowLayout
from spear_jax.algorithms.self_play import RowGroup, SelfPlay, real_row, reward_metrics
from spear_jax.core.settings import number, positive
from spear_jax.core.types import Mean
from spear_jax.models.params import Adapter
from spear_jax.packing.arrays import Batch
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker


@dataclasses.dataclass(frozen=True)
class TspinSettings:
    """Settings of T-SPIN."""

    alpha: float = positive(0.1)  # α: scale of the score differences
    beta: float = number(1.0, 0)  # β: weight of the second comparison, y' above y0
    refresh_rounds: int = number(1, 1)  # rounds of an iteration


def tspin_loss(
    real: jax.Array, synthetic: jax.Array, first: jax.Array, alpha: float, beta: float
) -> jax.Array:
    """Returns sp(−α (s(y) − s(y'))) + β sp(−α (s(y') − s(y0))), elementwise.

    Args: real, synthetic, first: float[...], summed log-probabilities of y, y' and y0.
    """
    latest = losses.pair_loss(alpha * (real - synthetic), "sigmoid")
    return latest + beta * losses.pair_loss(alpha * (synthetic - first), "sigmoid")


class Tspin(SelfPlay):
    """T-SPIN; a group is y (label +1), its y' (-1) and its y0 (-2). For B = 2:

        rows    y_0 y_1 y'_0 y'_1 y0_0 y0_1
        label     1   1   -1   -1   -2   -2

    The algorithm's state beside that of `SelfPlay`: `initial`, the adapter that answers y0. The
    store has two places for a prompt, y0 and the latest y'.
    """

    name = "tspin"
    Settings = TspinSettings
    layout = RowLayout(rows_per_group=3)

    @property
    def kept(self) -> int:
        return 2

    @property
    def keeps_older_adapters(self) -> bool:
        return True  # the initial policy

    def init_state(self, lora: Adapter, examples: int, length: int) -> dict:
        return super().init_state(lora, examples, length) | {
            "initial": jax.tree.map(np.array, lora)
        }

    def references(self, algorithm_state: dict, start: Adapter) -> tuple[Adapter, ...]:
        return ()

    def place(self, when: int) -> int:
        """Returns 0 for the first response, 1 for every later one."""
        return min(when, 1)

    def sets(self, now: int) -> tuple[int, ...]:
        return (0, now) if now else (0,)

    def author(
        self, worker: RolloutWorker, policy: Policy, algorithm_state: dict, round: int, when: int
    ) -> Policy:
        if when == 0 and self.iteration(round) > 0:
            return worker.policy(algorithm_state["initial"])
        return super().author(worker, policy, algorithm_state, round, when)

    def groups(
        self, worker: RolloutWorker, algorithm_state: dict, index: int, now: int
    ) -> Iterator[RowGroup]:
        """Yields the one triplet of an example."""
        latest = self.synthetic(worker, algorithm_state, index, now, -1)
        yield (
            real_row(worker, index),
            *latest,
            *self.synthetic(worker, algorithm_state, index, 0, -2),
        )

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        config, valid = self.settings, self.valid(batch)
        scores = self.split_rows(losses.sequence_sum(logprobs, batch.loss_mask))
        real, synthetic, first = scores
        each = tspin_loss(real, synthetic, first, config.alpha, config.beta)
        loss = losses.ratio(jnp.where(valid[0], each, 0.0).sum(), denominators["real"])
        lengths = self.split_rows(batch.loss_mask.sum(-1))
        metrics = reward_metrics(config.alpha * real, config.alpha * synthetic[None], valid[:2])
        metrics |= {
            "real_length": Mean(lengths[0].sum(), valid[0].sum()),
            "synthetic_length": Mean(lengths[1].sum(), valid[1].sum()),
        }
        return loss, metrics
