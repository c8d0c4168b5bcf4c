"""Feedback-SFT: SPEAR without its loses.

Clients answer, get feedback on wrong answers, and revise. Right completions are trained on by
maximum likelihood, wrong ones are dropped. The method isolates what SPEAR's unlikelihood term adds.

Source: the feedback-SFT baseline of SPEAR (arXiv 2605.07977), published code.

Departures:
    1. SPEAR's departures 1, 2, 3, 4, 5 and 6: its rollout, pools and weights are the same lines and
       random streams.
    2. Training prompts are the original prompts, as in the published code. Its README can be read
       otherwise.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import (
    FASTER,
    Algorithm,
    CohortData,
    WorkEstimate,
    metrics_of,
    needs_verdicts,
    schedule,
)
from spear_jax.algorithms.feedback_rollout import rollout_with_feedback
from spear_jax.core.settings import number, one_of
from spear_jax.core.types import Cohort, Mean, TraceRecord
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker


@dataclasses.dataclass(frozen=True)
class FeedbackSftSettings:
    """Settings of Feedback-SFT; each means the same as in SPEAR."""

    win_weight: float = number(1.0, 0)
    strict_format: bool = False
    skip_weight: str = one_of("zero", "rollouts")
    retokenise: bool = False


class FeedbackSft(Algorithm):
    """Maximum likelihood of SPEAR's wins."""

    name = "feedback_sft"
    takes_verdicts = True
    Settings = FeedbackSftSettings
    reference: ClassVar = {
        "federation.aggregation": "last",
        "feedback_sft.skip_weight": "rollouts",
        "train.anchor_gradient": False,
        "rollout.feedback": "oracle_published",
        "data.extractor": "published",
        "feedback_sft.retokenise": True,
        "federation.colliding_streams": True,
        "train.normalize": "micro",
        "rollout.top_k": 50,
    }

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        return FASTER if variant == "small" else {}

    def estimate_work(self, size: int) -> WorkEstimate:
        return WorkEstimate(min(size, self.common.examples), self.common.draws, revisions=None)

    def check(self, task, examples, feedback) -> None:
        needs_verdicts(self.name, task)

    def collect(
        self,
        worker: RolloutWorker,
        policy: Policy,
        cohort: Cohort,
        algorithm_state: dict,
        key: jax.Array,
        phase: int,
    ) -> CohortData:
        settings = self.settings
        rollout = rollout_with_feedback(
            worker, policy, cohort, self.common.examples, key, settings.strict_format
        )
        rows, weight, active, total = [], [], [], 0
        for slot, client in enumerate(cohort.clients):
            rng = cohort.rngs(slot, "pools")
            wins = rollout.wins(worker, client, settings.retokenise)
            rows.append(
                schedule(self.common, lambda w=wins, r=rng: draw(w, self.common.batch_size, r))
            )
            total += len(wins)
            active.append(bool(wins))
            weight.append(rollout.weight(client, wins, settings.skip_weight))
        records = [
            TraceRecord(trace, "win" if trace.last.correct else "unused", 1.0)
            for trace in rollout.traces
        ]
        return CohortData(
            rows, np.array(weight), np.array(active), records, metrics_of(rollout.traces, total, 0)
        )

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars
    ) -> dict[str, jax.Array]:
        return {"tokens": batch.loss_mask.sum().astype(jnp.float32)}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns λ_win L_win, with L_win = −Σ m lp / Σ m."""
        win = losses.nll(logprobs, batch.loss_mask)
        return self.settings.win_weight * losses.ratio(win.total, denominators["tokens"]), {
            "win_nll": win
        }
