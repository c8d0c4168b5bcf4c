"""DPO, direct preference optimisation, against the adapter that the round started from.

The policy learns to prefer one completion over another. Pairs come from one of three sources.
Feedback gives a right revision and the wrong first answer before it. A preference dataset gives
pairs of its own. EAST's groups of sampled answers give a right and a wrong one.

Source: DPO (arXiv 2305.18290); hinge: SLiC (arXiv 2305.10425); IPO (arXiv 2310.12036); label
    smoothing: conservative DPO (Mitchell 2023). Sums over tokens, IPO means, as in TRL.

Departures:
    1. The reference is the round-start adapter and not the adapter-free base. Its log-probabilities
       are cached once a round.
    2. Pairs from feedback are SPEAR's fixed examples alone (its rollout, prompts and skip rule).
       Answers that were not fixed, or right at once, have no partner and are left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import east, losses
from spear_jax.algorithms.base import (
    Algorithm,
    CohortData,
    RowLayout,
    Scoring,
    WorkEstimate,
    choose,
    metrics_of,
    needs_feedback,
    needs_pairs,
    needs_verdicts,
    requests_of,
    schedule,
)
from spear_jax.algorithms.feedback_rollout import rollout_with_feedback, win_row
from spear_jax.core.settings import number, one_of, positive
from spear_jax.core.types import Cohort, Mean, Trace, TraceRecord
from spear_jax.models.params import Adapter
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import TrainingRow, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker

Pair = tuple[TrainingRow, TrainingRow]


@dataclasses.dataclass(frozen=True)
class DpoSettings:
    """Settings of DPO; train.batch_size counts pairs."""

    source: str = one_of("feedback", "data", "east")
    kind: str = one_of("sigmoid", "hinge", "ipo")
    beta: float = positive(0.1)
    smoothing: float = number(0.0, 0, 0.5)  # e, of the sigmoid
    east: int = number(8, 2)  # samples a question with source east
    east_power: float = number(1.0, 0)  # a


class Dpo(Algorithm):
    """Preference optimisation on pairs.

    Rows 0..B of a micro-batch are preferred, rows B..2B their partners. For B = 2:

        rows    w0 w1 l0 l1
        label    1  1 -1 -1
        pairs   (w0, l0)  (w1, l1)
    """

    name = "dpo"
    Settings = DpoSettings
    layout = RowLayout(rows_per_group=2)  # a win and a lose
    scoring = Scoring(dropout=False)

    @property
    def gold(self) -> str:
        return "pairs" if self.settings.source == "data" else ""

    @property
    def measures_cohort(self) -> str:  # the mean of H^a
        return "dpo.source=feedback" if self.settings.source == "east" else ""

    def estimate_work(self, size: int) -> WorkEstimate | None:
        if self.settings.source == "east":
            return None
        asks = self.settings.source == "feedback"
        return WorkEstimate(
            min(size, self.common.examples) if asks else 0,
            2 * self.common.draws,
            revisions=None if asks else 0,
        )

    def check(self, task, examples, feedback) -> None:
        if self.settings.source == "data":
            needs_pairs(self.name, task, examples)
        elif self.settings.source == "feedback":
            needs_feedback(self.name, task, feedback)
        else:
            needs_verdicts(self.name, task)

    def references(self, algorithm_state: dict, start: Adapter) -> tuple[Adapter, ...]:
        return (start,)

    def collect(
        self,
        worker: RolloutWorker,
        policy: Policy,
        cohort: Cohort,
        algorithm_state: dict,
        key: jax.Array,
        phase: int,
    ) -> CohortData:
        pairs, traces = getattr(self, f"_from_{self.settings.source}")(worker, policy, cohort, key)
        rows, sizes = [], []
        for slot, client in enumerate(cohort.clients):
            rng = cohort.rngs(slot, "pools")
            rows.append(schedule(self.common, lambda p=pairs[client], r=rng: self._draw(p, r)))
            sizes.append(float(len(pairs[client])))
        records = [
            TraceRecord(trace, "win" if trace.last.correct else "unused", 1.0) for trace in traces
        ]
        total = int(sum(sizes))
        return CohortData(
            rows, np.array(sizes), np.array(sizes) > 0, records, metrics_of(traces, total, total)
        )

    def _draw(self, pool: list[Pair], rng: np.random.Generator) -> list[TrainingRow | None]:
        chosen = [pair or (None, None) for pair in draw(pool, self.common.batch_size, rng)]
        return [win for win, _ in chosen] + [lose for _, lose in chosen]

    def _from_feedback(
        self, worker, policy, cohort, key
    ) -> tuple[dict[int, list[Pair]], list[Trace]]:
        rollout = rollout_with_feedback(worker, policy, cohort, self.common.examples, key)
        fixed = {
            client: [
                rollout.traces[i]
                for i in rollout.of(client)
                if len(rollout.traces[i].attempts) > 1 and rollout.winner(i)
            ]
            for client in cohort.clients
        }
        pairs = {
            client: [
                (win_row(worker, t, t.last), win_row(worker, t, t.first, label=-1)) for t in traces
            ]
            for client, traces in fixed.items()
        }
        return pairs, rollout.traces

    def _from_data(self, worker, policy, cohort, key) -> tuple[dict[int, list[Pair]], list[Trace]]:
        def row(ids: list[int], index: int, label: int) -> TrainingRow:
            return TrainingRow(worker.data.prompts[index], ids, np.ones(len(ids), bool), 1.0, label)

        pairs = {
            client: [
                (row(worker.data.responses[i], i, 1), row(worker.data.rejected[i], i, -1))
                for i in choose(cohort, slot, self.common.examples)
            ]
            for slot, client in enumerate(cohort.clients)
        }
        return pairs, []

    def _from_east(self, worker, policy, cohort, key) -> tuple[dict[int, list[Pair]], list[Trace]]:
        requests = requests_of(cohort, self.common.examples)
        weighed = east.sample(
            worker, policy, requests, self.settings.east, self.settings.east_power, key
        )
        pairs: dict[int, list[Pair]] = {client: [] for client in cohort.clients}
        rngs = {client: cohort.rngs(slot, "east") for slot, client in enumerate(cohort.clients)}
        for (client, *_), question in weighed.items():
            right = [trace for trace in question.traces if trace.first.correct]
            chosen, other = (
                pool[rngs[client].integers(len(pool))] for pool in (right, question.rejected)
            )
            win, lose = (
                win_row(worker, chosen, chosen.first),
                win_row(worker, other, other.first, label=-1),
            )
            pairs[client].append(
                tuple(dataclasses.replace(row, weight=question.weight) for row in (win, lose))
            )
        return pairs, [trace for question in weighed.values() for trace in question.traces]

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars
    ) -> dict[str, jax.Array]:
        return {"pairs": (batch.label > 0).sum() * jnp.float32(1)}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        settings = self.settings
        real = jnp.split(batch.label > 0, 2)[0]
        score = losses.sequence_mean if settings.kind == "ipo" else losses.sequence_sum
        gain = score(logprobs, batch.loss_mask) - score(batch.ref_logprobs[:, 0], batch.loss_mask)
        win, lose = jnp.split(gain, 2)
        weight = jnp.split(batch.weight[:, 0], 2)[0] * real
        value = losses.ratio(
            (weight * preference_loss(win - lose, settings)).sum(), denominators["pairs"]
        )
        pairs = real.sum()
        return value, {
            "margin": Mean((settings.beta * (win - lose) * real).sum(), pairs),
            "preferred": Mean(
                ((win > lose) & real).sum(), pairs
            ),  # share of pairs that are ordered right
        }


def preference_loss(difference: jax.Array, settings: DpoSettings) -> jax.Array:
    """Returns the loss of Δ = (s_w − s_w^ref) − (s_l − s_l^ref), elementwise.

    It is `losses.pair_loss` of z = β Δ; for ipo it is (Δ − 1 / (2 β))².
    """
    if settings.kind == "ipo":
        return (difference - 1.0 / (2.0 * settings.beta)) ** 2
    return losses.pair_loss(settings.beta * difference, settings.kind, settings.smoothing)
