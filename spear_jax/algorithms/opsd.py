"""OPSD, on-policy self-distillation: the teacher is the student with a longer prompt.

The client's model answers. A teacher that has read the gold answer, the solution and all facts
scores every token of that answer. The student's distribution is pulled towards the teacher's, token
by token. Teacher and student are one network under two prompts.

Source: OPSD (published code; generalised Jensen-Shannon divergence as in GKD, arXiv 2306.13649).
    Preset `reference`: the baseline published with SPEAR (arXiv 2605.07977): forward KL at
    temperature 2.

Departures:
    1. Default is the official code's divergence (JSD 0.5) with the teacher at the current weights;
       its scripts hold the teacher fixed (`teacher=fixed`).
    2. The baseline's `kl_weight` and `anchor_weight` do nothing there and do not exist here.
    3. The privileged block may hold gold text. The student never sees it, and neither does the
       server.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import (
    Algorithm,
    CohortData,
    RowLayout,
    Scoring,
    WorkEstimate,
    metrics_of,
    needs_responses,
    requests_of,
    schedule,
)
from spear_jax.core.settings import number, one_of, positive
from spear_jax.core.types import Cohort, Mean, TraceRecord
from spear_jax.models.lm_head import head_logits, head_weight, pick
from spear_jax.models.params import Adapter
from spear_jax.models.token_logprobs import TokenLogprobs, map_positions
from spear_jax.packing.arrays import Batch, Block
from spear_jax.packing.rows import TrainingRow, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker


@dataclasses.dataclass(frozen=True)
class OpsdSettings:
    """Settings of OPSD."""

    divergence: str = one_of("jsd", "forward_kl", "sampled")
    beta: float = number(0.5, 0, 1)  # of jsd: 0 is forward KL, 1 reverse
    temperature: float = positive(1.0)  # T of both softmaxes; forward_kl is scaled by T²
    # both distributions renormalised on the teacher's k likeliest tokens; 0 means all
    top_k: int = number(0, 0)
    # current weights, round 1's, or a moving average over rounds
    teacher: str = one_of("dynamic", "fixed", "ema")
    ema_decay: float = number(0.9, 0, 1)  # of the old teacher


class Opsd(Algorithm):
    """Distillation from the same model under a privileged prompt.

    Rows 0..B of a micro-batch are students. Rows B..2B are the same completions under the teacher's
    prompt. For B = 2:

        rows         c0 c1 c0 c1
        under        task task privileged privileged
        label         1  1 -1 -1
        read in pass  0  0  1  1
    """

    name = "opsd"
    Settings = OpsdSettings
    # a completion under the student's prompt and under the teacher's, read in two passes
    layout = RowLayout(rows_per_group=2, num_packs=2, prompts=("task", "privileged"))
    scoring = Scoring(dropout=False, ref_logprobs=False)
    reference: ClassVar = {
        "opsd.divergence": "forward_kl",
        "opsd.temperature": 2.0,
        "train.normalize": "micro",
        "rollout.top_k": 50,
    }

    def estimate_work(self, size: int) -> WorkEstimate:
        return WorkEstimate(min(size, self.common.examples), 2 * self.common.draws)

    def check(self, task, examples, feedback) -> None:
        needs_responses(self.name, task, examples)

    @property
    def keeps_older_adapters(self) -> bool:
        return self.settings.teacher != "dynamic"

    def init_state(self, lora: Adapter, examples: int, length: int) -> dict:
        return (
            {}
            if self.settings.teacher == "dynamic"
            else {"teacher": jax.tree.map(np.asarray, lora)}
        )

    def references(self, algorithm_state: dict, start: Adapter) -> tuple[Adapter, ...]:
        return () if self.settings.teacher == "dynamic" else (algorithm_state["teacher"],)

    def end_round(self, algorithm_state: dict, lora: Adapter, metrics, round: int) -> dict:
        if self.settings.teacher != "ema":
            return algorithm_state
        d = self.settings.ema_decay
        blend = lambda old, new: (d * old + (1.0 - d) * np.asarray(new)).astype(old.dtype)
        return {"teacher": jax.tree.map(blend, algorithm_state["teacher"], lora)}

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
        traces = worker.answer(policy, requests, key)
        rows, sizes = [], []
        for slot, client in enumerate(cohort.clients):
            pool = [pair(worker, trace) for trace in traces if trace.client == client]
            rng = cohort.rngs(slot, "pools")
            rows.append(
                schedule(
                    self.common, lambda p=pool, r=rng: _split(draw(p, self.common.batch_size, r))
                )
            )
            sizes.append(float(len(pool)))
        records = [TraceRecord(trace, "unused", 1.0) for trace in traces]
        return CohortData(
            rows, np.array(sizes), np.array(sizes) > 0, records, metrics_of(traces, 0, 0)
        )

    def forward(
        self, scorer: TokenLogprobs, lora: Adapter, block: Block, references: tuple[Adapter, ...]
    ) -> jax.Array:
        """Returns the divergence at every completion token, float32[M]."""
        informed = references[0] if references else jax.lax.stop_gradient(lora)
        right = jax.lax.stop_gradient(
            dataclasses.replace(scorer, dropout_key=None).states(informed, block, pack=1)
        )
        left = scorer.states(lora, block)
        compare = _comparison(self.settings)
        return map_positions(
            compare, left, (right, block.target), head_weight(scorer.base), scorer.chunk
        )

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars
    ) -> dict[str, jax.Array]:
        return {"tokens": _students(batch).sum() * jnp.float32(1)}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns Σ m d / Σ m over student rows; `logprobs` holds the divergences d."""
        mask = _students(batch)
        total = (logprobs * mask).sum()
        return losses.ratio(total, denominators["tokens"]), {"divergence": Mean(total, mask.sum())}


@functools.cache
def _comparison(settings: OpsdSettings) -> Callable:
    """Returns the divergence of positions from both hidden states; one object for equal settings."""

    def compare(student, fixed, head):
        teacher, target = fixed
        mine, theirs = (head_logits(x, head) for x in (student, teacher))
        return divergence(mine, theirs, target, settings)

    return compare


def _students(batch: Batch) -> jax.Array:
    return (batch.label > 0)[:, None] & batch.loss_mask


def _split(pairs: list) -> list[TrainingRow | None]:
    filled = [pair or (None, None) for pair in pairs]
    return [student for student, _ in filled] + [teacher for _, teacher in filled]


def pair(worker: RolloutWorker, trace) -> tuple[TrainingRow, TrainingRow]:
    """Returns a first answer under the task's prompt, and under the teacher's."""
    ids = trace.first.completion
    mask = np.ones(len(ids), bool)
    informed = worker.renderer.privileged(worker.task, trace.example)
    return TrainingRow(trace.first.prompt, ids, mask, 1.0, 1), TrainingRow(
        informed, ids, mask, 1.0, -1
    )


def divergence(
    student: jax.Array, teacher: jax.Array, target: jax.Array | None, settings: OpsdSettings
) -> jax.Array:
    """Returns float[M], the divergence of logits float[M, V]; the teacher's carry no gradient.

    t and s are the softmaxes of teacher and student at temperature T.

        jsd         β KL(t ‖ m) + (1 − β) KL(s ‖ m), m = β t + (1 − β) s; β = 0: KL(t ‖ s), β = 1: KL(s ‖ t)
        forward_kl  T² KL(t ‖ s)
        sampled     −sg[log t(y) − log s(y)] log s(y), y = target int32[M]
    """
    teacher = jax.lax.stop_gradient(teacher)
    if settings.top_k:
        cut = jax.lax.top_k(teacher, settings.top_k)[0][:, -1:]
        student, teacher = (jnp.where(teacher >= cut, x, -jnp.inf) for x in (student, teacher))
    s, t = (jax.nn.log_softmax(x / settings.temperature, axis=-1) for x in (student, teacher))
    if settings.divergence == "sampled":
        s, t = pick(s, target), pick(t, target)
        # outside the teacher's top k there is nothing to compare
        inside = jnp.isfinite(t)
        s, t = jnp.where(inside, s, 0.0), jnp.where(inside, t, 0.0)
        return -jax.lax.stop_gradient(t - s) * s
    # a token outside the support has probability 0 on both sides and must not make 0 * inf
    s, t = (jnp.where(jnp.isfinite(t), x, -1e30) for x in (s, t))
    if settings.divergence == "forward_kl":
        return settings.temperature**2 * _kl(t, s)
    beta = settings.beta
    if beta in (0.0, 1.0):
        return _kl(t, s) if beta == 0.0 else _kl(s, t)
    m = jnp.logaddexp(jnp.log(beta) + t, jnp.log1p(-beta) + s)
    return beta * _kl(t, m) + (1.0 - beta) * _kl(s, m)


def _kl(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the KL divergence of log-probabilities over the last axis."""
    return (jnp.exp(left) * (left - right)).sum(-1)
