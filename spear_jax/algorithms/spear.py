"""SPEAR: clients answer, are told right or wrong with a hint, and revise. Right completions become wins (maximum likelihood),
wrong first answers become loses (confidence-weighted unlikelihood). No gold completion is ever trained on.

Source: SPEAR (arXiv 2605.07977); token-level unlikelihood from Welleck et al. (arXiv 1908.04319).

Departures of preset `default` (preset `reference` undoes each; every switch stands alone in the config):
    1. A1 clients are averaged from copies (federation.rule; `last` repeats the published code's aliasing).
    2. A2 a client without wins has weight 0 (skip_weight; `rollouts` gives it its number of rollouts).
    3. A3 the anchor has a gradient (train.anchor_gradient).
    4. A4, A5 one bounded, case-sensitive extractor grades and gives feedback (data.extractor), and hints never leak
       (rollout.feedback).
    5. A6 the sampled ids are trained on, EOS only where it was generated (retokenise).
    6. A7 random streams are paths that never collide (federation.colliding_streams).
    7. A8 the lose cap rounds up (cap).
    8. A trace's confidence weighs its own tokens (confidence_weighting; `batch_mean` as published), and the answer of an
       answer-only task is located in the text (answer_window; `last` assumes that it ends the completion).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax import losses
from spear_jax.actor import Actor, Cohort
from spear_jax.algorithms.base import Algorithm, Collected
from spear_jax.packing import Row, draw
from spear_jax.types import Attempt, Batch, Mean, Trace


@dataclasses.dataclass(frozen=True)
class SpearConfig:
    """The method's numbers; see `spear_jax.config` for what each means and its range."""

    rollouts: int
    batch_size: int
    steps: int
    accumulation: int
    win_weight: float
    lose_weight: float
    margin: float
    tail: int
    max_lose_ratio: float
    strict_format: bool
    confidence: str
    confidence_weighting: str
    ul_denominator: str
    answer_window: str
    skip_weight: str
    cap: str
    retokenise: bool
    protected_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Spear(Algorithm):
    """SPEAR's rollout, pools and loss. Frozen: equal configs are equal methods, and share compiled programs."""

    config: SpearConfig
    name = "spear"

    @property
    def two_pass(self) -> bool:
        return self.config.ul_denominator == "active"

    def rows_per_step(self) -> int:
        return 2 * self.config.batch_size  # wins and loses share one forward and backward

    def collect(self, actor: Actor, policy: dict, cohort: Cohort, key: jax.Array) -> Collected:
        pairs = []
        for slot, client in enumerate(cohort.clients):
            own = cohort.indices[slot]
            count = min(len(own), self.config.rollouts)
            chosen = cohort.rngs(slot, "examples").choice(len(own), size=count, replace=False)
            pairs += [(client, int(own[i])) for i in chosen]
        traces = actor.answer(policy, pairs, key)
        rewrites = actor.rewrite(policy, traces, pairs, key) if self.config.strict_format else {}
        actor.revise_until_right(policy, traces, pairs, key)
        pools: dict[int, tuple[list[Row], list[tuple[int, Row]]]] = {client: ([], []) for client in cohort.clients}
        for number, trace in enumerate(traces):
            wins, loses = pools[trace.client]
            winner = rewrites.get(number, trace.last)
            if winner is not None and winner.correct:
                wins.append(self._row(actor, trace, winner, +1, 1.0))
            if not trace.first.correct:
                loses.append((number, self._row(actor, trace, trace.first, -1, self._confidence(trace))))
        return self._schedule(cohort, pools, traces)

    def _confidence(self, trace: Trace) -> float:
        """`fixability`: 1.0 for a fixed answer, 0.5 else. `model`: the geometric mean probability of the first answer."""
        if self.config.confidence == "fixability":
            return 1.0 if trace.last.correct else 0.5
        return math.exp(float(np.mean(trace.first.logprobs)))

    def _row(self, actor: Actor, trace: Trace, attempt: Attempt, label: int, confidence: float) -> Row:
        """A pool row: always under the original prompt."""
        completion = attempt.completion
        if self.config.retokenise:
            text = actor.renderer.decode(completion).strip()
            completion = [*actor.renderer.tokenizer.encode(text, add_special_tokens=False), self.config.eos_ids[0]]
        mask = np.ones(len(completion), bool)
        if label < 0:
            window = self._answer_tokens(actor, trace, attempt.text, completion) if actor.task.answer_only else None
            mask = lose_mask(
                np.asarray([completion]),
                mask[None],
                self.config.eos_ids,
                self.config.tail,
                self.config.protected_ids,
                window,
            )[0]
        return Row(trace.first.prompt, completion, mask, confidence, label)

    def _answer_tokens(self, actor: Actor, trace: Trace, text: str, completion: list[int]) -> range | int | None:
        """The answer's positions; a number k for the last k ("last"); None where no answer was found."""
        found = actor.task.extract(text, trace.example)
        if found is None:
            return None
        if self.config.answer_window == "last":
            label = trace.example.labels[found.option]
            return len(actor.renderer.tokenizer.encode(label, add_special_tokens=False))
        return actor.renderer.token_span(completion, found.start, found.end)

    def _schedule(self, cohort: Cohort, pools: dict, traces: list[Trace]) -> Collected:
        """Caps the loses, draws every micro-step's rows, and weighs the clients."""
        config = self.config
        rows, weight, active, kept = [], [], [], set()
        for slot, client in enumerate(cohort.clients):
            wins, loses = pools[client]
            rng = cohort.rngs(slot, "pools")
            capped = cap_loses(loses, len(wins), config.max_lose_ratio, config.cap, rng)
            kept |= {number for number, _ in capped}
            lose_rows = [row for _, row in capped]
            active.append(bool(wins))
            rollouts = sum(trace.client == client for trace in traces)
            weight.append(float(rollouts if not wins and config.skip_weight == "rollouts" else len(wins)))
            rows.append(
                [
                    [
                        draw(wins, config.batch_size, rng) + draw(lose_rows, config.batch_size, rng)
                        for _ in range(config.accumulation)
                    ]
                    for _ in range(config.steps)
                ]
            )
        told = [(trace, role(trace, number in kept), self._confidence(trace)) for number, trace in enumerate(traces)]
        metrics = _metrics(traces, sum(len(wins) for wins, _ in pools.values()), len(kept))
        return Collected(rows, np.array(weight), np.array(active), told, metrics)

    def counts(self, batch: Batch, logprobs: jax.Array | None) -> dict[str, jax.Array]:
        active = None if logprobs is None else losses.unlikelihood(logprobs, self.config.margin)[1]
        _, count = self._lose_weights(batch, active)
        win = (batch.label > 0)[:, None] & batch.loss_mask
        return {"win": win.sum().astype(jnp.float32), "lose": count}

    def loss(self, batch: Batch, logprobs: jax.Array, counts) -> tuple[jax.Array, dict[str, Mean]]:
        """λ_win L_win + λ_lose L_lose, both from one pass over win and lose rows."""
        config = self.config
        # L_win = −Σ m lp / Σ m over win rows
        win = losses.nll(logprobs, (batch.label > 0)[:, None] & batch.loss_mask)
        # L_lose = Σ w u / n over lose rows
        u, active = losses.unlikelihood(logprobs, config.margin)
        weights, _ = self._lose_weights(batch, active)
        lose = (weights * u).sum()
        loss = config.win_weight * losses.ratio(win.total, counts["win"])
        loss += config.lose_weight * losses.ratio(lose, counts["lose"])
        touched = (batch.label < 0)[:, None] & batch.loss_mask
        metrics = {
            "win_nll": win,
            "unlikelihood": Mean(jnp.where(touched, u, 0.0).sum(), touched.sum()),
            "unlikelihood_active": Mean((touched & active).sum(), touched.sum()),
        }
        return loss, metrics

    def _lose_weights(self, batch: Batch, active: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        rows = batch.label < 0
        return losses.unlikelihood_weights(
            rows[:, None] & batch.loss_mask,
            active,
            batch.weight,
            rows,
            self.config.confidence_weighting,
            self.config.ul_denominator,
        )


def role(trace: Trace, kept: bool) -> str:
    """What the first answer of a trace became: a win, a lose, or unused (dropped by the cap)."""
    if trace.first.correct:
        return "win"
    return "lose" if kept else "unused"


def cap_loses(loses: list, wins: int, ratio: float, how: str, rng: np.random.Generator) -> list:
    """A uniform subset of ratio * wins loses, rounded up ("ceil") or down ("floor", as published: A8)."""
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
    """The positions M that unlikelihood may touch.

    In this order: completion positions; minus EOS; the last `tail` of what remains (0: all), or the answer's own positions;
    minus protected ids, which therefore shrink the window instead of moving it.

    Args:
        tokens: int[B, T]; completion_mask: bool[B, T].
        answer: None keeps the tail rule. A range holds the answer's positions, a number k means the last k; the tail caps
            either.
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


def _metrics(traces: list[Trace], wins: int, loses: int) -> dict[str, float]:
    """The round's rollout numbers, by the contract's names."""
    wrong = [trace for trace in traces if not trace.first.correct]
    return {
        "rollout/first_accuracy": 1.0 - len(wrong) / max(1, len(traces)),
        "rollout/fixed": sum(trace.last.correct for trace in wrong) / max(1, len(wrong)),
        "rollout/wins": float(wins),
        "rollout/loses": float(loses),
        "rollout/tokens": float(sum(len(a.completion) for trace in traces for a in trace.attempts)),
    }
