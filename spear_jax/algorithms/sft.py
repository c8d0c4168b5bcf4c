"""SFT: maximum likelihood of gold responses, on the same clients, steps and server.

It sees gold text that the feedback methods never do. So it is a privileged upper reference and not
a like-for-like baseline.

Source: ordinary supervised fine-tuning; EAST's weights (`east` > 0) as in
    `spear_jax.algorithms.east`.

Departures:
    1. With `east`, the weight multiplies each example's own loss; the published EAST code
       multiplies the mean of the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import east, losses
from spear_jax.algorithms.base import (
    Algorithm,
    CohortData,
    WorkEstimate,
    metrics_of,
    needs_responses,
    needs_verdicts,
    requests_of,
    schedule,
)
from spear_jax.core.settings import number, one_of
from spear_jax.core.types import Cohort, Mean, TraceRecord
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import TrainingRow, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker


@dataclasses.dataclass(frozen=True)
class SftSettings:
    """Settings of SFT."""

    reduction: str = one_of("token_mean", "seq_mean")
    # samples a question for EAST's entropy weights; 0 weighs all examples alike
    east: int = number(0, 0)
    east_power: float = number(1.0, 0)  # a


class Sft(Algorithm):
    """Maximum likelihood of gold responses."""

    name = "sft"
    Settings = SftSettings

    @property
    def gold(self) -> str:
        return "responses"

    @property
    def measures_cohort(self) -> str:  # the mean of H^a
        return "sft.east=0" if self.settings.east else ""

    def estimate_work(self, size: int) -> WorkEstimate | None:
        return None if self.settings.east else WorkEstimate(0, self.common.draws)

    def check(self, task, examples, feedback) -> None:
        needs_responses(self.name, task, examples)
        if self.settings.east:
            needs_verdicts(f"{self.name} with east", task)

    def collect(
        self,
        worker: RolloutWorker,
        policy: Policy,
        cohort: Cohort,
        algorithm_state: dict,
        key: jax.Array,
        phase: int,
    ) -> CohortData:
        requests = requests_of(cohort, self.common.examples)
        weights, traces = {request: 1.0 for request in requests}, []
        if self.settings.east:
            weighed = east.sample(
                worker, policy, requests, self.settings.east, self.settings.east_power, key
            )
            weights = {request: question.weight for request, question in weighed.items()}
            traces = [trace for question in weighed.values() for trace in question.traces]
        rows, sizes = [], []
        for slot, client in enumerate(cohort.clients):
            pool = [row(worker, i, w) for (c, i, _), w in weights.items() if c == client]
            rng = cohort.rngs(slot, "pools")
            rows.append(
                schedule(self.common, lambda p=pool, r=rng: draw(p, self.common.batch_size, r))
            )
            sizes.append(float(len(pool)))
        records = [TraceRecord(trace, "unused", 1.0) for trace in traces]
        return CohortData(
            rows,
            np.array(sizes),
            np.array(sizes) > 0,
            records,
            metrics_of(traces, int(sum(sizes)), 0),
        )

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars
    ) -> dict[str, jax.Array]:
        one = jnp.float32(1)
        return {"tokens": batch.loss_mask.sum() * one, "rows": (batch.label > 0).sum() * one}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns −Σ w m lp / Σ m, or the mean over rows of w times the row's token mean."""
        weight, mask = batch.weight[:, 0], batch.loss_mask
        if self.settings.reduction == "token_mean":
            value = losses.ratio(
                losses.nll(weight[:, None] * logprobs, mask).total, denominators["tokens"]
            )
        else:
            value = losses.ratio(
                losses.sequence_nll(weight[:, None] * logprobs, mask).total, denominators["rows"]
            )
        return value, {"win_nll": losses.nll(logprobs, mask)}


def row(worker: RolloutWorker, index: int, weight: float) -> TrainingRow:
    """Returns a gold response under its prompt, as a training row."""
    ids = worker.data.responses[index]
    return TrainingRow(worker.data.prompts[index], ids, np.ones(len(ids), bool), weight, 1)
