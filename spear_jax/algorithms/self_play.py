"""Self-play: the policy learns to tell gold responses from those of an earlier policy.

Gold responses are real. The responses of an earlier policy, the opponent, are synthetic. The
log-ratio is r(x, y) = λ (s_θ(y) − s_t(y)), with s the sum of a completion's log-probabilities.

An iteration begins by freezing the global adapter as the opponent π_t. Every y' of the iteration is
sampled from it. π_{t+1} is the result of training from π_t. Each method's own file adds its loss.

Source: SPIN (arXiv 2401.01335), whose scheme the others keep.

Departures:
    1. Federated: a round is an iteration (`refresh_rounds` makes it several). A client asks only
       the examples that it draws in the round, not all of them before the first.
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

STORE = ("tokens", "lengths", "correct", "iteration")  # the state's arrays of synthetic sets
RowGroup = tuple[TrainingRow, ...]  # a real row and the synthetic rows it is trained with


def log_ratio(policy: jax.Array, reference: jax.Array, lam: float) -> jax.Array:
    """Returns r = λ (s_θ − sg s_t), elementwise, of summed log-probabilities in nats."""
    return lam * (policy - jax.lax.stop_gradient(reference))


def reward_metrics(real: jax.Array, synthetic: jax.Array, valid: jax.Array) -> dict[str, Mean]:
    """Returns the mean rewards, and how often the real response's is the higher.

    Args:
        real: float[B].
        synthetic: float[samples, B], of the same groups.
        valid: bool[1 + samples, B].
    """
    pairs = valid[:1] & valid[1:]
    return {
        "real_reward": Mean(jnp.where(valid[0], real, 0.0).sum(), valid[0].sum()),
        "synthetic_reward": Mean(jnp.where(valid[1:], synthetic, 0.0).sum(), valid[1:].sum()),
        "real_preferred": Mean((pairs & (real > synthetic)).sum(), pairs.sum()),
    }


class SelfPlay(Algorithm, abc.ABC):
    """Base of the self-play methods: synthetic responses, their store, and the rewards.

    A group is an example's gold response (k = 0, label +1) and its synthetic ones (k = 1, 2, ...,
    label -1). A micro-batch of B groups holds the B rows of k = 0, then those of k = 1, and so on.
    The rows of a padding group have label 0. For B = 2 and one synthetic response, with the second
    group padding:

        rows    y0 -- y'0 --
        label    1  0  -1  0
        k        0  0   1  1

    The algorithm's state is numpy arrays of constant size. A synthetic set is the `samples`
    responses to one prompt of one iteration. The store keeps `kept` sets for each training example:

        opponents                                     adapters with a leading axis of `players`:
                                                      π_t, π_{t−1}, ...
        tokens     int32[examples, kept, samples, T]  the responses, right-padded
        lengths    int32[examples, kept, samples]     their lengths
        correct    bool[examples, kept, samples]      whether each was right
        iteration  int32[examples, kept]              the iteration that a set is of, -1 where none is

    With kept = 2, the set of iteration t lies at t % 2. An example that was drawn in iterations 0,
    2 and 3:

        iteration[i]   2 3          the set of iteration 0 is overwritten
    """

    scoring = Scoring(dropout=False)
    client_state = STORE

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        """Returns the sampling of the opponent itself: neither sharpened nor cut."""
        return {} if variant else {"rollout.temperature": 1.0, "rollout.top_p": 1.0}

    @property
    def players(self) -> int:
        """Returns the number of opponents that the state keeps."""
        return 1

    @property
    def kept(self) -> int:
        """Returns the number of synthetic sets that the state keeps for each prompt."""
        return 1

    @property
    def samples(self) -> int:
        """Returns the number of synthetic responses to a prompt in an iteration."""
        return 1

    @property
    def layout(self) -> RowLayout:
        """Returns the layout of a real row with its synthetic ones."""
        return RowLayout(rows_per_group=1 + self.samples)

    @property
    def gold(self) -> str:
        return "responses"

    def iteration(self, round: int) -> int:
        """Returns t, from 0, of a 1-based round."""
        return (round - 1) // self.settings.refresh_rounds

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:
        needs_responses(self.name, task, examples)

    # The algorithm's state

    @property
    def keeps_older_adapters(self) -> bool:
        return self.players > 1 or self.settings.refresh_rounds > 1

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
        """Returns the state with the new adapter as first opponent, where an iteration ends.

        The last opponent is forgotten.
        """
        if round % self.settings.refresh_rounds:
            return algorithm_state
        shift = lambda old, new: np.concatenate([np.asarray(new)[None], np.asarray(old)[:-1]])
        return algorithm_state | {
            "opponents": jax.tree.map(shift, algorithm_state["opponents"], lora)
        }

    def place(self, when: int) -> int:
        """Returns the store's place for an iteration's synthetic set."""
        return when % self.kept

    # Collecting

    def sets(self, now: int) -> tuple[int, ...]:
        """Returns the iterations whose synthetic sets every chosen example must have."""
        return (now,)

    def author(
        self, worker: RolloutWorker, policy: Policy, algorithm_state: dict, round: int, when: int
    ) -> Policy:
        """Returns the policy that answers for an iteration's set: the opponent.

        It is the round's own policy where a round is an iteration.
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
        """Returns the entries of the state that change with the opponent's new responses."""
        return {}

    def loss_scalars(self, algorithm_state: dict, now: int) -> dict[str, np.ndarray]:
        """Returns `CohortData.loss_scalars` of a round."""
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
        traces = self._answer(worker, policy, cohort, chosen, algorithm_state, key)
        rows, sizes = self._rows(worker, cohort, chosen, algorithm_state)
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

    def _answer(
        self,
        worker: RolloutWorker,
        policy: Policy,
        cohort: Cohort,
        chosen: list[list[int]],
        algorithm_state: dict,
        key: jax.Array,
    ) -> list[Trace]:
        """Samples the synthetic sets that are missing, and enters them in the state."""
        now = self.iteration(cohort.round)
        traces: list[Trace] = []
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
        return traces

    def _rows(
        self,
        worker: RolloutWorker,
        cohort: Cohort,
        chosen: list[list[int]],
        algorithm_state: dict,
    ) -> tuple[list[list[list[list[TrainingRow | None]]]], list[int]]:
        """Draws every client's [S][A] micro-batches; returns them with the sizes of the pools."""
        now = self.iteration(cohort.round)
        rows, sizes = [], []
        for slot, indices in enumerate(chosen):
            pool = [
                group
                for index in indices
                for group in self.groups(worker, algorithm_state, index, now)
            ]
            rng = cohort.rngs(slot, "pools")
            rows.append(schedule(self.common, lambda pool=pool, rng=rng: self._draw(pool, rng)))
            sizes.append(len(pool))
        return rows, sizes

    def _requests(
        self, cohort: Cohort, chosen: list[list[int]], algorithm_state: dict, when: int, first: int
    ) -> list[RolloutRequest]:
        """Returns the requests of the sets that are missing.

        Samples are numbered from `first`, so that no two sets share a key.
        """
        stored, place = algorithm_state["iteration"], self.place(when)
        missing = [
            (client, index)
            for client, indices in zip(cohort.clients, chosen, strict=True)
            for index in indices
            if stored[index, place] != when
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

    def groups(
        self, worker: RolloutWorker, algorithm_state: dict, index: int, now: int
    ) -> Iterator[RowGroup]:
        """Yields an example's groups: its gold response beside each recent set, the newest first."""
        for when in range(now, max(-1, now - self.kept), -1):
            if algorithm_state["iteration"][index, self.place(when)] == when:
                yield (
                    real_row(worker, index),
                    *self.synthetic(worker, algorithm_state, index, when, -1),
                )

    def synthetic(
        self, worker: RolloutWorker, algorithm_state: dict, index: int, when: int, label: int
    ) -> list[TrainingRow]:
        """Returns the rows of a stored set."""
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
            None if group is None else group[k]
            for k in range(self.layout.rows_per_group)
            for group in drawn
        ]

    # On device

    def split_rows(self, values: jax.Array) -> jax.Array:
        """Splits the last axis by the rows' place in the group: [..., rows] -> [..., k, B].

        Two groups of a real and a synthetic row:

            y0 y1 y'0 y'1  ->  [[y0 y1] [y'0 y'1]]
        """
        return values.reshape(*values.shape[:-1], self.layout.rows_per_group, -1)

    def valid(self, batch: Batch) -> jax.Array:
        """Returns bool[k, B], the rows that hold a response."""
        return self.split_rows(batch.label != 0)

    def rewards(self, batch: Batch, logprobs: jax.Array) -> jax.Array:
        """Returns r against every opponent, float32[J, k, B]."""
        policy = losses.sequence_sum(logprobs, batch.loss_mask)
        reference = losses.sequence_sum(batch.ref_logprobs, batch.loss_mask[:, None])  # [rows, J]
        return self.split_rows(log_ratio(policy, reference.T, self.settings.lam))

    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars: LossScalars
    ) -> dict[str, jax.Array]:
        valid = self.valid(batch)
        real, synthetic = valid[0].sum(), valid[1:].sum()
        return {"real": real.astype(jnp.float32), "synthetic": synthetic.astype(jnp.float32)}


def opponent(algorithm_state: dict, player: int) -> dict:
    """Returns the adapter of an opponent in the state; player 0 is π_t."""
    return jax.tree.map(lambda x: x[player], algorithm_state["opponents"])


def real_row(worker: RolloutWorker, index: int) -> TrainingRow:
    """Returns the gold response of a training example, under its own prompt."""
    return _row(worker.data.prompts[index], worker.data.responses[index], +1)


def _row(prompt: list[int], completion: list[int], label: int) -> TrainingRow:
    return TrainingRow(prompt, completion, np.ones(len(completion), bool), 1.0, label)
