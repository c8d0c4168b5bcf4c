"""SPEAR: right completions become wins, wrong first answers become loses.

Clients answer, get feedback with a hint on wrong answers, and revise. Wins are trained on by
maximum likelihood, loses by confidence-weighted unlikelihood. No gold completion is ever trained
on.

Source: SPEAR (arXiv 2605.07977); token-level unlikelihood from Welleck et al. (arXiv 1908.04319).

Departures of preset `default` (preset `reference` undoes each; every switch stands alone in the
config):
    1. A1 clients are averaged from copies (federation.aggregation; `last` repeats the published
       code's aliasing).
    2. A2 a client without wins has weight 0 (skip_weight; `rollouts` gives it its number of
       rollouts).
    3. A3 the anchor has a gradient (train.anchor_gradient).
    4. A4, A5 one bounded, case-sensitive extractor grades and gives feedback (data.extractor), and
       hints never leak (rollout.feedback).
    5. A6 the sampled ids are trained on, EOS only where it was generated (retokenise).
    6. A7 random streams are paths that never collide (federation.colliding_streams).
    7. A8 the lose cap rounds up (cap).
    8. A trace's confidence weighs its own tokens (confidence_weighting; `batch_mean` as published).
       The answer of an answer-only task is located in the text (answer_window; `last` assumes that
       it ends the completion).
"""

import dataclasses
import math
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
    Scoring,
    WorkEstimate,
    metrics_of,
    needs_verdicts,
    schedule,
)
from spear_jax.algorithms.feedback_rollout import (
    FeedbackRollout,
    completion_ids,
    rollout_with_feedback,
)
from spear_jax.core.settings import number, one_of
from spear_jax.core.types import Cohort, Mean, Trace, TraceRecord
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import TrainingRow, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker


@dataclasses.dataclass(frozen=True)
class SpearSettings:
    """Settings of SPEAR."""

    win_weight: float = number(1.0, 0)  # λ_win
    lose_weight: float = number(0.1, 0)  # λ_lose
    margin: float = number(0.3, 0, 1)  # ξ: unlikelihood leaves tokens of probability <= ξ alone
    tail: int = number(0, 0)  # unlikelihood touches the last N completion tokens only; 0 means all
    skip_math_ops: bool = False  # protect operators, brackets, LaTeX and Greek from unlikelihood
    max_lose_ratio: float = number(2.0, 0)  # at most this many loses per win
    # rewrite right answers of wrong format; wins only where the rewrite is right
    strict_format: bool = False
    # 1.0 fixed and 0.5 else, or mean rollout probability
    confidence: str = one_of("fixability", "model")
    confidence_weighting: str = one_of("per_token", "batch_mean", "per_trace", "normalised")
    ul_denominator: str = one_of("masked", "active")  # active counts only p > ξ
    # restrict unlikelihood to the answer's tokens: as the task says, or not
    answer_only: str = one_of("auto", "always", "never")
    answer_window: str = one_of("span", "last")  # the answer's own tokens, or as many at the end
    # aggregation weight of a client without wins (A2)
    skip_weight: str = one_of("zero", "rollouts")
    cap: str = one_of("ceil", "floor")  # rounding of max_lose_ratio * wins (A8)
    # train on the re-encoded text plus EOS instead of the sampled ids (A6)
    retokenise: bool = False


class Spear(Algorithm):
    """SPEAR's pools and loss.

    A micro-batch of B = 2 is two wins (label +1) and two loses (label -1):

        rows      w0 w1 l0 l1
        loss_mask  every completion token of a win; of a lose, what unlikelihood may push down
        weight     1, and a lose's confidence
    """

    name = "spear"
    takes_verdicts = True
    Settings = SpearSettings
    reference: ClassVar = {
        "federation.aggregation": "last",  # A1
        "spear.skip_weight": "rollouts",  # A2
        "train.anchor_gradient": False,  # A3
        "rollout.feedback": "oracle_published",  # A4
        "data.extractor": "published",  # A5
        "spear.retokenise": True,  # A6
        "federation.colliding_streams": True,  # A7
        "spear.cap": "floor",  # A8
        "spear.confidence_weighting": "batch_mean",
        "spear.answer_window": "last",
        "train.normalize": "micro",
        "rollout.top_k": 50,
    }

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        """Returns the published windows and ratios of each task."""
        if variant == "small":
            return FASTER
        tail = {"math_mcqa": 32, "gsm8k": 32, "strategy_qa": 24, "reasoned": 8}.get(task, 0)
        ratio = 4.0 if task in ("math_mcqa", "gsm8k", "strategy_qa") else 2.0
        return {
            "spear.tail": tail,
            "spear.max_lose_ratio": ratio,
            "spear.skip_math_ops": task == "math_mcqa",
        }

    @property
    def scoring(self) -> Scoring:
        return Scoring(
            two_pass=self.settings.ul_denominator == "active",
            per_micro_batch=self.settings.confidence_weighting == "batch_mean",
        )

    def estimate_work(self, size: int) -> WorkEstimate:
        return WorkEstimate(min(size, self.common.examples), 2 * self.common.draws, revisions=None)

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
        rollout = rollout_with_feedback(
            worker, policy, cohort, self.common.examples, key, self.settings.strict_format
        )
        return self.pools(worker, cohort, rollout)

    def pools(self, worker: RolloutWorker, cohort: Cohort, rollout: FeedbackRollout) -> CohortData:
        """Turns traces into wins and loses, and draws every micro-batch.

        Loses are capped, and clients get their aggregation weights.
        """
        settings, size = self.settings, self.common.batch_size
        protected = protected_ids(worker, settings.skip_math_ops)
        rows, weight, active, kept, total = [], [], [], set(), 0
        for slot, client in enumerate(cohort.clients):
            rng = cohort.rngs(slot, "pools")
            wins = rollout.wins(worker, client, settings.retokenise)
            wrong = [i for i in rollout.of(client) if not rollout.traces[i].first.correct]
            capped = cap_loses(wrong, len(wins), settings.max_lose_ratio, settings.cap, rng)
            loses = [self._lose_row(worker, rollout.traces[i], protected) for i in capped]
            rows.append(
                schedule(
                    self.common,
                    lambda w=wins, n=loses, r=rng: draw(w, size, r) + self._alike(draw(n, size, r)),
                )
            )
            kept |= set(capped)
            total += len(wins)
            active.append(bool(wins))
            weight.append(rollout.weight(client, wins, settings.skip_weight))
        records = [
            TraceRecord(trace, role(trace, i in kept), self._confidence(trace))
            for i, trace in enumerate(rollout.traces)
        ]
        metrics = metrics_of(rollout.traces, total, len(kept))
        return CohortData(rows, np.array(weight), np.array(active), records, metrics)

    def _alike(self, loses: list[TrainingRow | None]) -> list[TrainingRow | None]:
        """Returns a micro-batch's loses; with "batch_mean" all of them have their mean confidence."""
        real = [row for row in loses if row is not None]
        if self.settings.confidence_weighting != "batch_mean" or not real:
            return loses
        mean = float(np.mean([row.weight for row in real]))
        return [row and dataclasses.replace(row, weight=mean) for row in loses]

    def _confidence(self, trace: Trace) -> float:
        """Returns a trace's confidence.

        `fixability` is 1.0 for a fixed answer, 0.5 else. `model` is the geometric mean probability
        of the first answer.
        """
        if self.settings.confidence == "fixability":
            return 1.0 if trace.last.correct else 0.5
        return math.exp(float(np.mean(trace.first.logprobs)))

    def _lose_row(
        self, worker: RolloutWorker, trace: Trace, protected: tuple[int, ...]
    ) -> TrainingRow:
        """Returns the wrong first answer under the original prompt, with `lose_mask` as its mask."""
        ids = completion_ids(worker, trace.first, self.settings.retokenise)
        rule = self.settings.answer_only
        answer_only = worker.task.answer_only if rule == "auto" else rule == "always"
        window = self._answer_tokens(worker, trace, ids) if answer_only else None
        whole = np.ones((1, len(ids)), bool)
        mask = lose_mask(
            np.asarray([ids]), whole, self.common.eos_ids, self.settings.tail, protected, window
        )
        if not self.settings.retokenise:
            trace.first.unlikelihood_mask = mask[0].tolist()
        return TrainingRow(trace.first.prompt, ids, mask[0], self._confidence(trace), -1)

    def _answer_tokens(
        self, worker: RolloutWorker, trace: Trace, ids: list[int]
    ) -> range | int | None:
        """Returns the answer's positions, or a number k for the last k ("last").

        It is None where the text has no answer.
        """
        if not trace.example.labels:  # a question of a person's own
            return None
        answer = worker.task.extract(trace.first.text, trace.example)
        if answer is None:
            return None
        if self.settings.answer_window == "last":
            label = trace.first.text[answer.start : answer.end]
            return len(worker.renderer.tokenizer.encode(label, add_special_tokens=False))
        return worker.renderer.token_span(ids, answer.start, answer.end)

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars
    ) -> dict[str, jax.Array]:
        active = (
            None if logprobs is None else losses.unlikelihood(logprobs, self.settings.margin)[1]
        )
        _, count = self._lose_weights(batch, active)
        win = (batch.label > 0)[:, None] & batch.loss_mask
        return {"win": win.sum().astype(jnp.float32), "lose": count}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns λ_win L_win + λ_lose L_lose, both from one pass over win and lose rows."""
        settings = self.settings
        # L_win = −Σ m lp / Σ m over win rows
        win = losses.nll(logprobs, (batch.label > 0)[:, None] & batch.loss_mask)
        # L_lose = Σ w u / n over lose rows
        u, active = losses.unlikelihood(logprobs, settings.margin)
        weights, _ = self._lose_weights(batch, active)
        lose = (weights * u).sum()
        loss = settings.win_weight * losses.ratio(win.total, denominators["win"])
        loss += settings.lose_weight * losses.ratio(lose, denominators["lose"])
        unlikelihood_mask = (batch.label < 0)[:, None] & batch.loss_mask
        metrics = {
            "win_nll": win,
            "unlikelihood": Mean(
                jnp.where(unlikelihood_mask, u, 0.0).sum(), unlikelihood_mask.sum()
            ),
            "unlikelihood_active": Mean(
                (unlikelihood_mask & active).sum(), unlikelihood_mask.sum()
            ),
        }
        return loss, metrics

    def _lose_weights(self, batch: Batch, active: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        rows = batch.label < 0
        return losses.unlikelihood_weights(
            rows[:, None] & batch.loss_mask,
            active,
            batch.weight,
            rows,
            self.settings.confidence_weighting,
            self.settings.ul_denominator,
        )


def role(trace: Trace, kept: bool) -> str:
    """Returns the role of a trace's first answer: "win", "lose", or "unused" (dropped by the cap)."""
    if trace.first.correct:
        return "win"
    return "lose" if kept else "unused"


def protected_ids(worker: RolloutWorker, math_ops: bool) -> tuple[int, ...]:
    """Returns the token ids that unlikelihood never touches.

    They are the task's answer markers and, on request, its operators.
    """
    strings = worker.task.protected + (worker.task.math_ops if math_ops else ())
    encode = worker.renderer.tokenizer.encode
    return tuple(sorted({i for text in strings for i in encode(text, add_special_tokens=False)}))


def cap_loses(loses: list, wins: int, ratio: float, how: str, rng: np.random.Generator) -> list:
    """Draws a uniform subset of at most ratio * wins loses.

    The limit is rounded up ("ceil"), or down ("floor", as published: A8). One win and a ratio of
    2.5 keep 3 loses or 2.
    """
    limit = math.ceil(ratio * wins - 1e-9) if how == "ceil" else int(ratio * wins)
    if len(loses) <= limit:
        return loses
    return [loses[i] for i in sorted(rng.choice(len(loses), size=limit, replace=False))]


def lose_mask(
    tokens: np.ndarray,
    completion_mask: np.ndarray,
    eos_ids: tuple[int, ...],
    tail: int,
    protected: tuple[int, ...],
    answer: range | int | None = None,
) -> np.ndarray:
    """Returns the positions M that unlikelihood may touch.

    In this order: completion positions; minus EOS; the last `tail` of the rest (0: all), or the
    answer's own positions; minus protected ids. Protected ids therefore shrink the window instead
    of moving it. For the completion [7, 5, 8, 9, EOS] with EOS = 2, where 8 is protected:

        >>> tokens, whole = np.array([[7, 5, 8, 9, 2]]), np.ones((1, 5), bool)
        >>> lose_mask(tokens, whole, (2,), 0, (8,)).astype(int).tolist()
        [[1, 1, 0, 1, 0]]
        >>> lose_mask(tokens, whole, (2,), 2, (8,)).astype(int).tolist()         # the last two
        [[0, 0, 0, 1, 0]]
        >>> lose_mask(tokens, whole, (2,), 0, (), range(1, 3)).astype(int).tolist()    # the answer
        [[0, 1, 1, 0, 0]]

    Args:
        tokens: int[B, T].
        completion_mask: bool[B, T].
        answer: None keeps the tail rule. A range holds the answer's positions, a number k means the
            last k. The tail caps either.
    Returns: bool[B, T].
    Source: SPEAR's published code, mask order.
    """
    mask = completion_mask.astype(bool) & ~np.isin(tokens, eos_ids)
    keep = tail
    if isinstance(answer, range):
        inside = np.zeros(tokens.shape[1], bool)
        inside[answer.start : answer.stop] = True
        mask &= inside
    elif answer is not None:
        keep = min(answer, tail) if tail > 0 else answer
    if keep > 0:
        from_end = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # 1 at the last remaining position
        mask &= from_end <= keep
    return mask & ~np.isin(tokens, protected)
