"""GRPO: policy gradients with advantages relative to a group of completions.

Every optimiser step samples a group of completions for each of a few prompts, with the client's
*current* adapter. Right ones are rewarded. The step follows the group-relative advantage, with a
clipped ratio and a KL term against the round-start adapter. Each phase of a round is one such
sampling for all clients at once, with their adapters stacked.

Source: GRPO (arXiv 2402.03300); reductions: DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783),
    bnpo as in TRL; CISPO (MiniMax-M1, arXiv 2506.13585). Preset `reference`: the baseline published
    with SPEAR (arXiv 2605.07977).

Departures of preset `default` from that baseline (`reference` repeats 1, 3, 4 and 6):
    1. The ratio is clipped by min for either sign of the advantage; the published branch for A < 0
       takes max.
    2. Old and new log-probabilities see the same network (no LoRA dropout), so the first ratio is
       exactly 1.
    3. The KL estimate is k3 of KL(π ‖ π_ref): δ = ref − new, unclamped; published: the other way
       round, clamped to ±5.
    4. Logits are divided by the sampling temperature before log-probabilities are taken. Top-p is
       not in them: sample with top_p 1 for exactness.
    5. Prompts hold the task and nothing else; the published StrategyQA prompts append all gold
       facts.
    6. Ratios are of tokens and not of length-normalised sequences, with DAPO's denominator.
       Advantages are divided by std + 1e-4 instead of std (1 where it is 0).
    7. The published sampling floor max(0.7, temperature) is not repeated; its configs sample at
       0.8.
Against TRL 1.16, beside which the losses are tested:
    8. The KL term is plain k3; TRL's default multiplies it by the ratio (use_bias_correction_kl).
    9. With ratio `sequence` the KL is k3 of mean log-probabilities, as in the published baseline;
       TRL averages k3 over tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import (
    EMBEDDED,
    FASTER,
    Algorithm,
    CohortData,
    Scoring,
    WorkEstimate,
    metrics_of,
    needs_verdicts,
)
from spear_jax.core.settings import number, one_of
from spear_jax.core.types import Cohort, Mean, TraceRecord
from spear_jax.models.params import Adapter
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import TrainingRow, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutRequest, RolloutWorker


@dataclasses.dataclass(frozen=True)
class GrpoSettings:
    """Settings of GRPO; train.batch_size counts prompts of a micro-batch."""

    group: int = number(4, 2)  # G, completions a prompt
    reward_scale: float = number(1.0, 0)
    scaling: str = one_of("group", "batch", "none", "std")  # of advantages; std as published
    ratio: str = one_of("token", "sequence", "cispo", "published")
    # of token losses; sequence ratios are averaged
    reduction: str = one_of("dapo", "grpo", "bnpo", "dr_grpo")
    clip_low: float = number(0.2, 0, 1)  # ε_l
    clip_high: float = number(0.2, 0)  # ε_h; with ratio cispo the cap itself
    kl_weight: float = number(0.02, 0)  # β
    tempered: bool = True  # divide logits by the sampling temperature
    updates: int = number(1, 1)  # optimiser steps on one sampling


class Grpo(Algorithm):
    """Group-relative policy gradients, sampled anew before every optimiser step.

    A micro-batch holds the groups of its prompts one after another. Two prompts a and b with groups
    of 3:

        rows       a0 a1 a2 b0 b1 b2
        reward      1  0  0  1  1  1
        advantage  ⅔ −⅓ −⅓  0  0  0      with scaling "none"; group b has no gradient
    """

    name = "grpo"
    Settings = GrpoSettings
    reference: ClassVar = {
        "grpo.ratio": "published",
        "grpo.scaling": "std",
        "grpo.tempered": False,
        "train.normalize": "micro",
        "rollout.top_k": 50,
    }

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        """Returns the groups, prompts and KL weight of the baseline published with SPEAR.

        The nucleus is off, since it is not in the log-probabilities.
        """
        if variant == "small":
            return FASTER | {"train.batch_size": 8}
        math, strategy = task in ("math_mcqa", "gsm8k"), task == "strategy_qa"
        fields: dict[str, object] = {"rollout.top_p": 1.0, "train.batch_size": 16}
        if task not in EMBEDDED:
            prompts, accumulation = (2, 8) if math else (4, 4)
            fields |= {"train.batch_size": prompts, "train.accumulation": accumulation}
        fields |= {"grpo.group": 2} if math or strategy else {}
        return fields | ({"grpo.kl_weight": 0.1} if strategy else {})

    @property
    def phases(self) -> int:
        return -(-self.common.steps // self.settings.updates)

    @property
    def scoring(self) -> Scoring:
        tempered = self.settings.tempered and self.common.temperature > 0
        return Scoring(
            dropout=False,
            temperature=self.common.temperature if tempered else 1.0,
            old_logprobs=self.settings.updates > 1,  # else the old policy is the current one
            per_micro_batch=self.settings.reduction == "bnpo",
        )

    def estimate_work(self, size: int) -> WorkEstimate:
        group = self.settings.group
        return WorkEstimate(
            self.phases * self.common.accumulation * self.common.batch_size * group,
            self.common.draws * group,
        )

    def check(self, task, examples, feedback) -> None:
        needs_verdicts(self.name, task)

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
        group, common = self.settings.group, self.common
        requests = []
        for slot, client in enumerate(cohort.clients):
            rng, examples = cohort.rngs(slot, f"grpo/{phase}"), list(cohort.indices[slot])
            prompts = [
                int(i)
                for _ in range(common.accumulation)
                for i in draw(examples, common.batch_size, rng)
            ]
            # a prompt that is drawn twice would give the same completions without its own numbers
            requests += [
                RolloutRequest(client, i, n * group + g)
                for n, i in enumerate(prompts)
                for g in range(group)
            ]
        traces = worker.answer(policy, requests, key)
        shape = (len(cohort.clients), common.accumulation, common.batch_size, group)
        rewards = self.settings.reward_scale * np.array(
            [t.first.correct for t in traces], float
        ).reshape(shape)
        advantage = np.stack([advantages(client, self.settings.scaling) for client in rewards])
        flat = [row(t, a) for t, a in zip(traces, advantage.reshape(-1), strict=True)]
        size = common.batch_size * group
        micro = [flat[i : i + size] for i in range(0, len(flat), size)]
        step = [
            micro[i : i + common.accumulation] for i in range(0, len(micro), common.accumulation)
        ]
        rows = [[batches] * self.settings.updates for batches in step]
        sizes = np.array([len(indices) for indices in cohort.indices], float)
        right = sum(t.first.correct for t in traces)
        metrics = metrics_of(traces, right, len(traces) - right)
        # a group of equal rewards has no gradient
        metrics["grpo/mixed_groups"] = float((rewards.std(-1) > 0).mean())
        records = [TraceRecord(t, "win" if t.first.correct else "lose", 1.0) for t in traces]
        return CohortData(rows, sizes, np.ones(len(sizes), bool), records, metrics)

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars
    ) -> dict[str, jax.Array]:
        one = jnp.float32(1)
        return {"tokens": batch.loss_mask.sum() * one, "rows": (batch.label != 0).sum() * one}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        settings, mask = self.settings, batch.loss_mask
        old = batch.old_logprobs if self.scoring.old_logprobs else jax.lax.stop_gradient(logprobs)
        # without a reference β is 0, and any finite array will do
        reference = (
            batch.ref_logprobs[:, 0] if settings.kl_weight else jax.lax.stop_gradient(logprobs)
        )
        span = (settings.clip_low, settings.clip_high)
        if settings.ratio in ("sequence", "published"):
            fixed = settings.ratio == "sequence"
            each = sequence_loss(
                logprobs, old, reference, mask, batch.advantage, *span, settings.kl_weight, fixed
            )
            value = losses.ratio((each * (batch.label != 0)).sum(), denominators["rows"])
        else:
            cispo = settings.ratio == "cispo"
            each = token_loss(
                logprobs, old, reference, batch.advantage[:, None], *span, settings.kl_weight, cispo
            )
            value = reduce_tokens(
                each, mask, denominators, settings.reduction, self.common.max_new_tokens
            )
        ratio = jnp.exp(logprobs - old)
        clipped = (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high)
        tokens = mask.sum()
        return value, {
            "clip_fraction": Mean((clipped & mask).sum(), tokens),
            "kl": Mean((losses.k3(logprobs, reference) * mask).sum(), tokens),
            # estimated by the samples' own log-probabilities
            "entropy": Mean(-(logprobs * mask).sum(), tokens),
        }


def row(trace, advantage: float) -> TrainingRow:
    """Returns a sampled first answer with its advantage, as a training row."""
    ids = trace.first.completion
    return TrainingRow(
        trace.first.prompt,
        ids,
        np.ones(len(ids), bool),
        1.0,
        1 if trace.first.correct else -1,
        float(advantage),
    )


def advantages(rewards: np.ndarray, scaling: str) -> np.ndarray:
    """Returns the rewards minus their group's mean, scaled by a sample standard deviation (n − 1).

        group   ÷ (std of the group + 1e-4)
        batch   ÷ (std of all + 1e-4)
        none
        std     ÷ std of the group, 1 where it is 0

        >>> advantages(np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), "none").tolist()
        [[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]]
        >>> advantages(np.array([[1.0, 0.0, 0.0, 0.0]]), "std").tolist()
        [[1.5, -0.5, -0.5, -0.5]]

    Args: rewards: float[..., G]; all leading axes together are the batch.
    """
    centred = rewards - rewards.mean(-1, keepdims=True)
    if scaling == "none":
        return centred
    if scaling == "batch":
        return centred / (rewards.std(ddof=1) + 1e-4)
    std = rewards.std(-1, ddof=1, keepdims=True)
    return centred / (std + 1e-4 if scaling == "group" else np.where(std > 0, std, 1.0))


def token_loss(
    logprobs, old, reference, advantage, clip_low, clip_high, kl_weight, cispo=False
) -> jax.Array:
    """Returns the clipped objective of every token, float[B, T].

        ρ = exp(lp − sg old)
        −min(ρ A, clip(ρ, 1 − ε_l, 1 + ε_h) A) + β k3
        cispo: −sg[min(ρ, ε_h)] A lp + β k3

    Args:
        logprobs, old, reference: float[B, T], nats.
        advantage: float[B, 1].
    """
    ratio = jnp.exp(logprobs - jax.lax.stop_gradient(old))
    if cispo:
        gain = jax.lax.stop_gradient(jnp.minimum(ratio, clip_high)) * advantage * logprobs
    else:
        gain = jnp.minimum(
            ratio * advantage, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage
        )
    return -gain + kl_weight * losses.k3(logprobs, jax.lax.stop_gradient(reference))


def reduce_tokens(
    each: jax.Array, mask: jax.Array, denominators, reduction: str, longest: int
) -> jax.Array:
    """Returns some rows' share of the step's loss.

        dapo      Σ m ℓ / Σ m of the step
        bnpo      the same within each micro-batch, then their mean (`Scoring.per_micro_batch`)
        grpo      mean over rows of their token means
        dr_grpo   Σ m ℓ / (rows · longest)

    Args:
        each: float[B, T], ℓ.
        denominators: tokens and rows of the step (bnpo: of the micro-batch, times micro-batches).
        longest: L_max in tokens.
    """
    total = (each * mask).sum()
    if reduction in ("dapo", "bnpo"):
        return losses.ratio(total, denominators["tokens"])
    if reduction == "grpo":
        return losses.ratio(losses.sequence_mean(each, mask).sum(), denominators["rows"])
    return losses.ratio(total, denominators["rows"] * longest)


def sequence_loss(
    logprobs, old, reference, mask, advantage, clip_low, clip_high, kl_weight, fixed=True
) -> jax.Array:
    """Returns the clipped objective on length-normalised sequence ratios, with k3: float[B].

    Args: fixed: False repeats the published code: max instead of min where A < 0, and e^d − 1 − d
        with d = new − ref in ±5.
    """
    new, old, reference = (losses.sequence_mean(x, mask) for x in (logprobs, old, reference))
    ratio = jnp.exp(new - jax.lax.stop_gradient(old))
    plain, clipped = ratio * advantage, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage
    gain, reference = jnp.minimum(plain, clipped), jax.lax.stop_gradient(reference)
    if fixed:
        return -gain + kl_weight * losses.k3(new, reference)
    gain = jnp.where(advantage >= 0, gain, jnp.maximum(plain, clipped))
    return -gain + kl_weight * losses.published_k3(new, reference)
