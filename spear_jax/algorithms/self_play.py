"""What the self-play methods share: gold responses are real, the responses of an earlier policy
(the opponent) synthetic, and the policy learns to tell them apart, r(x, y) = λ (s_θ(y) − s_t(y)), s
the sum of a completion's log-probabilities.

An iteration begins by freezing the global adapter as the opponent π_t; every y' of the iteration is
sampled from it, and π_{t+1} is what training from π_t gave. Each method's own file adds its loss.
Source: SPIN (arXiv 2401.01335), whose scheme the others keep.

Departures:
    1. Federated: a round is an iteration (`refresh_rounds` makes it several), and a client asks
       only the examples that it draws in the round, not all of them before the first.
    2. An example's older synthetic sets are used while they are recent enough, whichever client
       round made them.
    3. The opponent is always the stored global adapter; the published code's reference is the model
       without an adapter.
    4. y' are the sampled ids, with an EOS only where one was sampled. Sampling follows
       `rollout.temperature` and `top_p`: only 1 and 1 sample the opponent itself.
"""

import abc
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import (
    Algorithm,
    CohortData,
    LossScalars,
    RowLayout,
    Scoring,
    choose,
    metrics_of,
    needs_responses,
    schedule,
)
from spear_jax.core.types import Cohort, Example, Mean, Trace, TraceRecord
from spear_jax.models.params import Adapter
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import TrainingRow, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutRequest, RolloutWorker
from spear_jax.tasks.base import Task

STORE = ("tokens", "lengths", "correct", "iteration")  # what the memory holds of the synthetic sets
RowGroup = tuple[TrainingRow, ...]  # a real row and the synthetic rows it is trained with


def log_ratio(policy: jax.Array, reference: jax.Array, lam: float) -> jax.Array:
    """r = λ (s_θ − sg s_t), elementwise, of summed log-probabilities in nats."""
    return lam * (policy - jax.lax.stop_gradient(reference))


def reward_metrics(real: jax.Array, synthetic: jax.Array, valid: jax.Array) -> dict[str, Mean]:
    """Mean rewards, and how often the real response's is the higher.

    Args: real: float[B]; synthetic: float[M, B], of the same items; valid: bool[1 + M, B].
    """
    pairs = valid[:1] & valid[1:]
    return {
        "real_reward": Mean(jnp.where(valid[0], real, 0.0).sum(), valid[0].sum()),
        "synthetic_reward": Mean(jnp.where(valid[1:], synthetic, 0.0).sum(), valid[1:].sum()),
        "real_preferred": Mean((pairs & (real > synthetic)).sum(), pairs.sum()),
    }


class SelfPlay(Algorithm, abc.ABC):
    """The shell of a self-play method.

    A micro-batch of B items holds K blocks of B rows: row i of block 0 is an item's gold response
    (label +1), row i of block k the item's k-th synthetic one (label -1). A padding item has K rows
    of label 0.

    Memory (numpy, of constant size; a synthetic set is the `samples` responses to one prompt of one
    iteration):
        opponents: adapters with a leading axis of `players`, π_t first, then π_{t−1}, ...
        tokens int32[N, H, M, T], lengths int32[N, H, M]: H sets of each of N examples.
        correct bool[N, H, M]: whether each response was right.
        iteration int32[N, H]: the one that a set is of; -1 where there is none.
    """

    scoring = Scoring(dropout=False)
    client_state = STORE

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        """Synthetic responses are the opponent's own: neither sharpened nor cut."""
        return {} if variant else {"rollout.temperature": 1.0, "rollout.top_p": 1.0}

    @property
    def players(self) -> int:
        """Opponents that are remembered."""
        return 1

    @property
    def kept(self) -> int:
        """H, synthetic sets that are remembered for each prompt."""
        return 1

    @property
    def samples(self) -> int:
        """M, synthetic responses to a prompt in an iteration."""
        return 1

    @property
    def layout(self) -> RowLayout:
        """A real row and its synthetic ones."""
        return RowLayout(rows_per_group=1 + self.samples)

    @property
    def gold(self) -> str:
        return "responses"

    def iteration(self, round: int) -> int:
        """t, from 0; round is 1-based."""
        return (round - 1) // self.settings.refresh_rounds

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:
        needs_responses(self.name, task, examples)

    # Memory

    def init_state(self, lora: Adapter, examples: int, length: int) -> dict:
        shape = (examples, self.kept, self.samples)
        return {
            "opponents": jax.tree.map(
                lambda x: np.repeat(np.asarray(x)[None], self.players, axis=0), lora
            ),
            "tokens": np.zeros((*shape, length), np.int32),
            "lengths": np.zeros(shape, np.int32),
            "correct": np.zeros(shape, bool),
            "iteration": np.full(shape[:2], -1, np.int32),
        }

    def references(self, algorithm_state: dict, start: Adapter) -> tuple[Adapter, ...]:
        return tuple(opponent(algorithm_state, player) for player in range(self.players))

    def end_round(
        self, algorithm_state: dict, lora: Adapter, metrics: Mapping[str, float], round: int
    ) -> dict:
        """At the end of an iteration the new adapter becomes the first opponent, and the last one
        is forgotten.
        """
        if round % self.settings.refresh_rounds:
            return algorithm_state
        shift = lambda old, new: np.concatenate([np.asarray(new)[None], np.asarray(old)[:-1]])
        return algorithm_state | {
            "opponents": jax.tree.map(shift, algorithm_state["opponents"], lora)
        }

    def place(self, when: int) -> int:
        """Where an iteration's synthetic set is kept."""
        return when % self.kept

    # Collecting

    def sets(self, now: int) -> tuple[int, ...]:
        """The iterations whose synthetic sets every chosen example must have."""
        return (now,)

    def author(
        self, worker: RolloutWorker, policy: Policy, algorithm_state: dict, round: int, when: int
    ) -> Policy:
        """Who answers for an iteration's set: the opponent, which is the round's own policy where a
        round is an iteration.
        """
        return (
            policy
            if self.settings.refresh_rounds == 1
            else worker.policy(opponent(algorithm_state, 0))
        )

    def measure(
        self,
        worker: RolloutWorker,
        author: Policy,
        records: list[tuple[RolloutRequest, Trace]],
        algorithm_state: dict,
    ) -> dict:
        """Entries of the memory that change with the opponent's new responses."""
        return {}

    def loss_scalars(self, algorithm_state: dict, now: int) -> dict[str, np.ndarray]:
        """`CohortData.loss_scalars` of a round."""
        return {}

    def collect(
        self,
        worker: RolloutWorker,
        policy: Policy,
        cohort: Cohort,
        algorithm_state: dict,
        key: jax.Array,
        phase: int,
    ) -> CohortData:
        now = self.iteration(cohort.round)
        chosen = [
            choose(cohort, slot, self.common.examples).tolist()
            for slot in range(len(cohort.clients))
        ]
        # Copies: a checkpoint may still be writing the old arrays.
        algorithm_state = algorithm_state | {
            name: np.array(algorithm_state[name]) for name in STORE
        }
        traces = []
        for offset, when in enumerate(self.sets(now)):
            requests = self._requests(cohort, chosen, algorithm_state, when, offset * self.samples)
            if not requests:
                continue
            author = self.author(worker, policy, algorithm_state, cohort.round, when)
            records = list(zip(requests, worker.answer(author, requests, key), strict=True))
            self._store(algorithm_state, records, when)
            traces += [trace for _, trace in records]
            if when == now:
                algorithm_state |= self.measure(worker, author, records, algorithm_state)
        rows, sizes = [], []
        for slot, indices in enumerate(chosen):
            pool = [
                item
                for index in indices
                for item in self.items(worker, algorithm_state, index, now)
            ]
            rng = cohort.rngs(slot, "pools")
            rows.append(schedule(self.common, lambda pool=pool, rng=rng: self._draw(pool, rng)))
            sizes.append(len(pool))
        metrics = metrics_of([], sum(sizes), (self.layout.rows_per_group - 1) * sum(sizes))
        right = algorithm_state["correct"][sum(chosen, []), self.place(now)]
        metrics["rollout/first_accuracy"] = float(right.sum() / max(1, right.size))
        return CohortData(
            rows=rows,
            weight=np.array([len(indices) for indices in chosen], float),
            active=np.array(sizes) > 0,
            traces=[
                TraceRecord(trace, "win" if trace.first.correct else "unused", 1.0)
                for trace in traces
            ],
            metrics=metrics,
            loss_scalars=self.loss_scalars(algorithm_state, now),
            algorithm_state=algorithm_state,
        )

    def _requests(
        self, cohort: Cohort, chosen: list[list[int]], algorithm_state: dict, when: int, first: int
    ) -> list[RolloutRequest]:
        """The questions whose set is missing; samples are numbered from `first`, so that no two
        sets share a key.
        """
        stored, place = algorithm_state["iteration"], self.place(when)
        missing = [
            (c, i)
            for c, own in zip(cohort.clients, chosen, strict=True)
            for i in own
            if stored[i, place] != when
        ]
        return [
            RolloutRequest(client, index, first + sample)
            for client, index in missing
            for sample in range(self.samples)
        ]

    def _store(
        self, algorithm_state: dict, records: list[tuple[RolloutRequest, Trace]], when: int
    ) -> None:
        place = self.place(when)
        for (_, index, number), trace in records:
            completion, at = trace.first.completion, (index, place, number % self.samples)
            algorithm_state["tokens"][at] = 0
            algorithm_state["tokens"][at][: len(completion)] = completion
            algorithm_state["lengths"][at] = len(completion)
            algorithm_state["correct"][at] = trace.first.correct
            algorithm_state["iteration"][index, place] = when

    def items(
        self, worker: RolloutWorker, algorithm_state: dict, index: int, now: int
    ) -> Iterator[RowGroup]:
        """An example's items: its gold response beside each recent synthetic set, the newest
        first.
        """
        for when in range(now, max(-1, now - self.kept), -1):
            if algorithm_state["iteration"][index, self.place(when)] == when:
                yield (
                    real_row(worker, index),
                    *self.synthetic(worker, algorithm_state, index, when, -1),
                )

    def synthetic(
        self, worker: RolloutWorker, algorithm_state: dict, index: int, when: int, label: int
    ) -> list[TrainingRow]:
        """The rows of a stored set."""
        place = self.place(when)
        pairs = zip(
            algorithm_state["tokens"][index, place],
            algorithm_state["lengths"][index, place],
            strict=True,
        )
        return [
            _row(worker.data.prompts[index], tokens[:length].tolist(), label)
            for tokens, length in pairs
        ]

    def _draw(self, pool: list[RowGroup], rng: np.random.Generator) -> list[TrainingRow | None]:
        drawn = draw(pool, self.common.batch_size, rng)
        return [
            None if item is None else item[kind]
            for kind in range(self.layout.rows_per_group)
            for item in drawn
        ]

    # On device

    def by_kind(self, values: jax.Array) -> jax.Array:
        """[..., K B] -> [..., K, B]."""
        return values.reshape(*values.shape[:-1], self.layout.rows_per_group, -1)

    def valid(self, batch: Batch) -> jax.Array:
        """bool[K, B]: the rows that hold a response."""
        return self.by_kind(batch.label != 0)

    def rewards(self, batch: Batch, logprobs: jax.Array) -> jax.Array:
        """r against every opponent, float32[J, K, B]."""
        policy = losses.sequence_sum(logprobs, batch.loss_mask)
        reference = losses.sequence_sum(batch.ref_logprobs, batch.loss_mask[:, None])  # [K B, J]
        return self.by_kind(log_ratio(policy, reference.T, self.settings.lam))

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars: LossScalars
    ) -> dict[str, jax.Array]:
        valid = self.valid(batch)
        real, synthetic = valid[0].sum(), valid[1:].sum()
        return {"real": real.astype(jnp.float32), "synthetic": synthetic.astype(jnp.float32)}


def opponent(algorithm_state: dict, player: int) -> dict:
    """The adapter of a remembered opponent; 0 is π_t."""
    return jax.tree.map(lambda x: x[player], algorithm_state["opponents"])


def real_row(worker: RolloutWorker, index: int) -> TrainingRow:
    """The gold response of a training example, under its own prompt."""
    return _row(worker.data.prompts[index], worker.data.responses[index], +1)


def _row(prompt: list[int], completion: list[int], label: int) -> TrainingRow:
    return TrainingRow(prompt, completion, np.ones(len(completion), bool), 1.0, label)
