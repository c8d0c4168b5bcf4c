"""RLTF-SD: reinforcement learning from text feedback, with self-distillation.

Each prompt is answered several times. Every wrong answer is revised once after feedback. Both turns
are rewarded. Policy gradients train the first answer under the task, and the revision under its
feedback prompt. Distillation trains the *revision under the task's own prompt*, weighted by how
much better it is than first answers are on average.

Source: RLTF-SD as published with SPEAR (arXiv 2605.07977).

Departures:
    1. The KL estimate is k3 of KL(π ‖ π_ref), δ = ref − new, unclamped; preset `reference` repeats
       the published orientation.
    2. The paper's one "RL coefficient (Self Distillation) 0.1" is read as sd_weight 0.1 with
       rl_weight 1; the other reading is sd_weight 1 with rl_weight 0.1.
    3. LoRA dropout is off, since the loss holds ratios to the reference.
    4. The published sampling floor max(0.7, temperature) is not repeated; its configs sample at
       0.8.
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
    RowLayout,
    Scoring,
    WorkEstimate,
    metrics_of,
    needs_feedback,
    requests_of,
    schedule,
)
from spear_jax.core.settings import number, one_of
from spear_jax.core.types import Attempt, Cohort, Mean, Trace, TraceRecord
from spear_jax.models.params import Adapter
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import TrainingRow, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker

FIRST, REVISED, DISTILLED = 1, 2, 3  # the three rows of a sample, in `Batch.label`


@dataclasses.dataclass(frozen=True)
class RltfSdSettings:
    """Settings of RLTF-SD; train.batch_size counts samples, each of which is three rows."""

    samples: int = number(4, 2)  # N answers a prompt; rollout.examples // N prompts a client
    discount: float = number(1.0, 0)  # γ
    sd_weight: float = number(0.1, 0)  # c_SD
    rl_weight: float = number(1.0, 0)  # c_RL
    kl_weight: float = number(0.02, 0)  # β
    kl: str = one_of("k3", "published")
    scores: str = one_of("mean", "sum")  # s̄ as published, or s
    # leave the second turn of answers that were right at once out of the RL term
    drop_terminated_turn1: bool = False


class RltfSd(Algorithm):
    """Two-turn policy gradients and distillation of revisions.

    A sample is three rows. In a micro-batch of two samples a and b:

        rows    a_first b_first a_revised b_revised a_distilled b_distilled
        label         1       1         2         2           3           3
    """

    name = "rltf_sd"
    Settings = RltfSdSettings
    layout = RowLayout(prompts=("task", "revision"))
    scoring = Scoring(dropout=False)
    reference: ClassVar = {
        "rltf_sd.kl": "published",
        "train.normalize": "micro",
        "rollout.top_k": 50,
    }

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        if variant == "small":
            return FASTER
        fields = {"rltf_sd.samples": 2} if task in ("math_mcqa", "strategy_qa", "gsm8k") else {}
        return fields | ({"rltf_sd.kl_weight": 0.1} if task == "strategy_qa" else {})

    def estimate_work(self, size: int) -> WorkEstimate:
        count = self.settings.samples
        return WorkEstimate(
            min(size, max(1, self.common.examples // count)) * count,
            3 * self.common.draws,
            revisions=1,
        )

    def check(self, task, examples, feedback) -> None:
        needs_feedback(self.name, task, feedback)

    def references(self, algorithm_state: dict, start: Adapter) -> tuple[Adapter, ...]:
        return (start,) if self.settings.kl_weight else ()

    def collect(
        self,
        worker: RolloutWorker,
        policy: Policy,
        cohort: Cohort,
        algorithm_state: dict,
        key: jax.Array,
        phase: int,
    ) -> CohortData:
        count = self.settings.samples
        prompts = max(1, self.common.examples // count)
        requests = requests_of(cohort, prompts, count)
        traces = worker.answer(policy, requests, key)
        worker.revise_until_right(policy, traces, requests, key, limit=1)
        # an answer that was right at once ends the trace: its second turn repeats the first
        r0, r1 = (
            np.array([float(x(t).correct) for t in traces]).reshape(-1, count)
            for x in (_first, _last)
        )
        flat = [a.reshape(-1) for a in advantages(r0, r1, self.settings.discount)]
        rows, sizes = [], []
        for slot, client in enumerate(cohort.clients):
            pool = [
                self._rows(t, *(float(a[i]) for a in flat))
                for i, t in enumerate(traces)
                if t.client == client
            ]
            rng = cohort.rngs(slot, "pools")
            rows.append(
                schedule(
                    self.common, lambda p=pool, r=rng: _lay_out(draw(p, self.common.batch_size, r))
                )
            )
            sizes.append(float(len(pool)))
        records = [TraceRecord(t, "win" if t.last.correct else "lose", 1.0) for t in traces]
        metrics = metrics_of(traces, int(r1.sum()), int((1 - r1).sum()))
        return CohortData(rows, np.array(sizes), np.array(sizes) > 0, records, metrics)

    def _rows(
        self, trace: Trace, a_sd: float, a_0: float, a_1: float
    ) -> tuple[TrainingRow, TrainingRow | None, TrainingRow]:
        first, last = trace.first, trace.last
        ended = len(trace.attempts) == 1 and self.settings.drop_terminated_turn1
        return (
            _row(first.prompt, first, FIRST, a_0),
            None if ended else _row(last.prompt, last, REVISED, a_1),
            _row(first.prompt, last, DISTILLED, a_sd),
        )

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars
    ) -> dict[str, jax.Array]:
        labels = {"first": FIRST, "revised": REVISED, "distilled": DISTILLED}
        return {
            name: (batch.label == label).sum() * jnp.float32(1) for name, label in labels.items()
        }

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        settings, label = self.settings, batch.label
        score = losses.sequence_mean if settings.scores == "mean" else losses.sequence_sum
        new = score(logprobs, batch.loss_mask)
        held = (
            score(batch.ref_logprobs[:, 0], batch.loss_mask)
            if settings.kl_weight
            else jax.lax.stop_gradient(new)
        )
        rl = policy_loss(new, held, batch.advantage, settings.kl_weight, settings.kl)
        sd = -batch.advantage * new
        part = lambda each, rows, name: losses.ratio(
            (each * (label == rows)).sum(), denominators[name]
        )
        first, revised = part(rl, FIRST, "first"), part(rl, REVISED, "revised")
        distilled = part(sd, DISTILLED, "distilled")
        turns = (label == FIRST) | (label == REVISED)
        return settings.sd_weight * distilled + settings.rl_weight * (first + revised), {
            "distillation": Mean((sd * (label == DISTILLED)).sum(), (label == DISTILLED).sum()),
            "policy": Mean((rl * turns).sum(), turns.sum()),
        }


def _first(trace: Trace) -> Attempt:
    return trace.first


def _last(trace: Trace) -> Attempt:
    return trace.last


def _row(prompt: list[int], attempt: Attempt, label: int, advantage: float) -> TrainingRow:
    ids = attempt.completion
    return TrainingRow(prompt, ids, np.ones(len(ids), bool), 1.0, label, advantage)


def _lay_out(samples: list) -> list[TrainingRow | None]:
    """Lays samples out as a micro-batch: all first answers, all revisions, all distilled rows."""
    filled = [sample or (None, None, None) for sample in samples]
    return [sample[k] for k in range(3) for sample in filled]


def advantages(
    r0: np.ndarray, r1: np.ndarray, discount: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns A_SD = r1 − mean(r0), A_0 = R − mean(R) and A_1 = r1 − mean(r1).

    R = r0 + γ r1. Means are over the group; there is no std. One prompt with two samples: the first
    was wrong and fixed, the second right at once (its second turn repeats the first):

        >>> sd, first, revised = advantages(np.array([[0.0, 1.0]]), np.array([[1.0, 1.0]]), discount=1.0)
        >>> sd.tolist(), first.tolist(), revised.tolist()
        ([[0.5, 0.5]], [[-0.5, 0.5]], [[0.0, 0.0]])

    Args: r0, r1: float[prompts, N], rewards of the two turns.
    """
    mean = lambda x: x.mean(-1, keepdims=True)
    both = r0 + discount * r1
    return r1 - mean(r0), both - mean(both), r1 - mean(r1)


def policy_loss(
    new: jax.Array, held: jax.Array, advantage: jax.Array, kl_weight: float, kl: str
) -> jax.Array:
    """Returns −A s̄ + β k, elementwise.

    Args: new, held: float[B], scores under policy and reference.
    """
    estimate = losses.published_k3 if kl == "published" else losses.k3
    return -advantage * new + kl_weight * estimate(new, jax.lax.stop_gradient(held))
