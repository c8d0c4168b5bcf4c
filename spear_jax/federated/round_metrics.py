"""Names a round's metrics, and adds up the budget used."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from spear_jax.core.types import Mean

# what every method has; the rest goes under the method's own name
COMMON = ("loss", "grad_norm", "skipped_steps", "win_nll", "unlikelihood", "unlikelihood_active")


@dataclasses.dataclass(frozen=True)
class BudgetUsed:
    """What a run has used so far: generated tokens, FLOPs (`cost_model.flops`), and seconds of
    rounds.
    """

    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def read(cls, line: Mapping[str, float]) -> "BudgetUsed":
        """Reads a line of metrics.jsonl; nothing is used before round 1."""
        return cls(*(line.get(f"budget/{field.name}", 0.0) for field in dataclasses.fields(cls)))


def training_metrics(method: str, means: Mapping[str, Mean]) -> dict[str, float]:
    """Returns training metrics by the contract's names ("train/loss", "grpo/kl").

    Args: means: (total, count) of the whole cohort.
    """
    name_of = lambda name: f"train/{name}" if name in COMMON else f"{method}/{name}"
    return {name_of(name): mean.value() for name, mean in means.items()}


def sum_over_clients(means: Mapping[str, Mean]) -> dict[str, Mean]:
    """Sums per-client metrics, (total, count) float32[C] each, in float64."""
    return jax.tree.map(lambda x: np.sum(x, dtype=np.float64), means)


def accuracy_metrics(accuracy: float, count: int) -> dict[str, float]:
    """Returns `eval/accuracy`, `eval/count` and the binomial `eval/stderr`."""
    return {
        "eval/accuracy": accuracy,
        "eval/count": float(count),
        "eval/stderr": math.sqrt(accuracy * (1 - accuracy) / count),
    }
