"""What differs between papers, and nothing else: how a round's rows are collected, and the loss on their log-probabilities.

Rollouts, adapters, optimiser, accumulation, clipping, mapping over clients and aggregation are written once, elsewhere.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from spear_jax.actor import Actor, Cohort
from spear_jax.packing import Row
from spear_jax.types import Batch, Mean, Trace


@dataclasses.dataclass
class Collected:
    """What a method hands to local training; host only, one entry per cohort client in every list.

    Attributes:
        rows: [C][S][A] lists of B' rows; B' is the same everywhere, None is a padding row.
        weight: float[C], aggregation weights.
        active: bool[C], clients that train; the others keep the global adapter.
        traces: what the rollouts said, for recording.
        metrics: numbers of the round.
    """

    rows: list[list[list[list[Row | None]]]]
    weight: np.ndarray
    active: np.ndarray
    traces: list[tuple[Trace, str, float]]
    metrics: dict[str, float]


class Algorithm(abc.ABC):
    """One method; hashable by its settings, since jitted programs take it as a static argument.

    Class attributes:
        name: the key in ALGORITHMS.
    """

    name: str

    @property
    def two_pass(self) -> bool:
        """Whether `counts` needs the log-probabilities of the whole optimiser step (a forward pass more)."""
        return False

    @abc.abstractmethod
    def collect(self, actor: Actor, policy: Any, cohort: Cohort, key: jax.Array) -> Collected:
        """Rolls out with the round's global policy (adapter merged) and turns traces into rows."""

    @abc.abstractmethod
    def rows_per_step(self) -> int:
        """B', the rows of one micro-batch."""

    @abc.abstractmethod
    def counts(self, batch: Batch, logprobs: jax.Array | None) -> Mapping[str, jax.Array]:
        """The denominators of one micro-batch; they are summed over the optimiser step before `loss` divides by them."""

    @abc.abstractmethod
    def loss(
        self, batch: Batch, logprobs: jax.Array, counts: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """One micro-batch's share of the optimiser step's loss, and metrics as (sum, count).

        Args:
            batch: one micro-batch, no leading axes.
            logprobs: float32[B, T], differentiable.
            counts: summed over the step's micro-batches.
        """
