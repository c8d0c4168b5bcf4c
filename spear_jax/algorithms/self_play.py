"""What the self-play methods share: gold responses are real, the responses of an earlier policy (the opponent) synthetic, and
the policy learns to tell them apart, r(x, y) = λ (s_θ(y) − s_t(y)), s the sum of a completion's log-probabilities.

An iteration begins by freezing the global adapter as the opponent π_t; every y' of the iteration is sampled from it, and
π_{t+1} is what training from π_t gave. Each method's own file adds its loss.
Source: SPIN (arXiv 2401.01335), whose scheme the others keep.

Departures:
    1. Federated: a round is an iteration (`refresh_rounds` makes it several), and a client asks only the examples that it
       draws in the round, not all of them before the first.
    2. An example's older synthetic sets are used while they are recent enough, whichever client round made them.
    3. The opponent is always the stored global adapter; the published code's reference is the model without an adapter.
    4. y' are the sampled ids, with an EOS only where one was sampled. Sampling follows `rollout.temperature` and `top_p`:
       only 1 and 1 sample the opponent itself.
"""

import abc
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import Algorithm, Collected, Numbers, choose, metrics_of, needs_responses, schedule
from spear_jax.core.types import Cohort, Example, Mean, Trace
from spear_jax.packing.arrays import Batch
from spear_jax.packing.rows import Row, draw
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import Actor, Ask
from spear_jax.tasks.base import Task

STORE = ("tokens", "lengths", "correct", "iteration")  # what the memory holds of the synthetic sets
Item = tuple[Row, ...]  # a real row and the synthetic rows it is trained with


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

    A micro-batch of B items holds K blocks of B rows: row i of block 0 is an item's gold response (label +1), row i of block k
    the item's k-th synthetic one (label -1). A padding item has K rows of label 0.

    Memory (numpy, of constant size; a synthetic set is the `samples` responses to one prompt of one iteration):
        opponents: adapters with a leading axis of `players`, π_t first, then π_{t−1}, ...
        tokens int32[N, H, M, T], lengths int32[N, H, M]: H sets of each of N examples.
        correct bool[N, H, M]: whether each response was right.
        iteration int32[N, H]: the one that a set is of; -1 where there is none.
    """

    dropout = False

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
    def kinds(self) -> int:
        """K, rows of an item."""
        return 1 + self.samples

    @property
    def gold(self) -> str:
        return "responses"

    def iteration(self, round: int) -> int:
        """t, from 0; round is 1-based."""
        return (round - 1) // self.settings.refresh_rounds

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:
        needs_responses(self.name, task, examples)

    # Memory

    def init_memory(self, lora: dict, examples: int, length: int) -> dict:
        shape = (examples, self.kept, self.samples)
        return {
            "opponents": jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], self.players, axis=0), lora),
            "tokens": np.zeros((*shape, length), np.int32),
            "lengths": np.zeros(shape, np.int32),
            "correct": np.zeros(shape, bool),
            "iteration": np.full(shape[:2], -1, np.int32),
        }

    def references(self, memory: dict, start: dict) -> tuple[dict, ...]:
        return tuple(opponent(memory, player) for player in range(self.players))

    def end_round(self, memory: dict, lora: dict, metrics: Mapping[str, float], round: int) -> dict:
        """At the end of an iteration the new adapter becomes the first opponent, and the last one is forgotten."""
        if round % self.settings.refresh_rounds:
            return memory
        shift = lambda old, new: np.concatenate([np.asarray(new)[None], np.asarray(old)[:-1]])
        return memory | {"opponents": jax.tree.map(shift, memory["opponents"], lora)}

    def place(self, when: int) -> int:
        """Where an iteration's synthetic set is kept."""
        return when % self.kept

    # Collecting

    def sets(self, now: int) -> tuple[int, ...]:
        """The iterations whose synthetic sets every chosen example must have."""
        return (now,)

    def author(self, actor: Actor, policy: Policy, memory: dict, round: int, when: int) -> Policy:
        """Who answers for an iteration's set: the opponent, which is the round's own policy where a round is an iteration."""
        return policy if self.settings.refresh_rounds == 1 else actor.merge(opponent(memory, 0))

    def measure(self, actor: Actor, author: Policy, told: list[tuple[Ask, Trace]], memory: dict) -> dict:
        """Entries of the memory that change with the opponent's new responses."""
        return {}

    def numbers(self, memory: dict, now: int) -> dict[str, np.ndarray]:
        """`Collected.numbers` of a round."""
        return {}

    def collect(
        self, actor: Actor, policy: Policy, cohort: Cohort, memory: dict, key: jax.Array, phase: int
    ) -> Collected:
        now = self.iteration(cohort.round)
        chosen = [choose(cohort, slot, self.shell.examples).tolist() for slot in range(len(cohort.clients))]
        # Copies: a checkpoint may still be writing the old arrays.
        memory = memory | {name: np.array(memory[name]) for name in STORE}
        traces = []
        for offset, when in enumerate(self.sets(now)):
            asks = self._asks(cohort, chosen, memory, when, offset * self.samples)
            if not asks:
                continue
            author = self.author(actor, policy, memory, cohort.round, when)
            told = list(zip(asks, actor.answer(author, asks, key), strict=True))
            self._store(memory, told, when)
            traces += [trace for _, trace in told]
            if when == now:
                memory |= self.measure(actor, author, told, memory)
        rows, sizes = [], []
        for slot, indices in enumerate(chosen):
            pool = [item for index in indices for item in self.items(actor, memory, index, now)]
            rng = cohort.rngs(slot, "pools")
            rows.append(schedule(self.shell, lambda pool=pool, rng=rng: self._draw(pool, rng)))
            sizes.append(len(pool))
        metrics = metrics_of([], sum(sizes), (self.kinds - 1) * sum(sizes))
        right = memory["correct"][sum(chosen, []), self.place(now)]
        metrics["rollout/first_accuracy"] = float(right.sum() / max(1, right.size))
        return Collected(
            rows=rows,
            weight=np.array([len(indices) for indices in chosen], float),
            active=np.array(sizes) > 0,
            traces=[(trace, "win" if trace.first.correct else "unused", 1.0) for trace in traces],
            metrics=metrics,
            numbers=self.numbers(memory, now),
            memory=memory,
        )

    def _asks(self, cohort: Cohort, chosen: list[list[int]], memory: dict, when: int, first: int) -> list[Ask]:
        """The questions whose set is missing; samples are numbered from `first`, so that no two sets share a key."""
        stored, place = memory["iteration"], self.place(when)
        missing = [
            (c, i) for c, own in zip(cohort.clients, chosen, strict=True) for i in own if stored[i, place] != when
        ]
        return [(client, index, first + sample) for client, index in missing for sample in range(self.samples)]

    def _store(self, memory: dict, told: list[tuple[Ask, Trace]], when: int) -> None:
        place = self.place(when)
        for (_, index, number), trace in told:
            completion, at = trace.first.completion, (index, place, number % self.samples)
            memory["tokens"][at] = 0
            memory["tokens"][at][: len(completion)] = completion
            memory["lengths"][at] = len(completion)
            memory["correct"][at] = trace.first.correct
            memory["iteration"][index, place] = when

    def items(self, actor: Actor, memory: dict, index: int, now: int) -> Iterator[Item]:
        """An example's items: its gold response beside each recent synthetic set, the newest first."""
        for when in range(now, max(-1, now - self.kept), -1):
            if memory["iteration"][index, self.place(when)] == when:
                yield (real_row(actor, index), *self.synthetic(actor, memory, index, when, -1))

    def synthetic(self, actor: Actor, memory: dict, index: int, when: int, label: int) -> list[Row]:
        """The rows of a stored set."""
        place = self.place(when)
        pairs = zip(memory["tokens"][index, place], memory["lengths"][index, place], strict=True)
        return [_row(actor.prompts[index], tokens[:length].tolist(), label) for tokens, length in pairs]

    def _draw(self, pool: list[Item], rng: np.random.Generator) -> list[Row | None]:
        drawn = draw(pool, self.shell.batch_size, rng)
        return [None if item is None else item[kind] for kind in range(self.kinds) for item in drawn]

    # On device

    def by_kind(self, values: jax.Array) -> jax.Array:
        """[..., K B] -> [..., K, B]."""
        return values.reshape(*values.shape[:-1], self.kinds, -1)

    def valid(self, batch: Batch) -> jax.Array:
        """bool[K, B]: the rows that hold a response."""
        return self.by_kind(batch.label != 0)

    def rewards(self, batch: Batch, logprobs: jax.Array) -> jax.Array:
        """r against every opponent, float32[J, K, B]."""
        policy = losses.sequence_sum(logprobs, batch.loss_mask)
        reference = losses.sequence_sum(batch.reference, batch.loss_mask[:, None])  # [K B, J]
        return self.by_kind(log_ratio(policy, reference.T, self.settings.lam))

    def counts(self, batch: Batch, logprobs: jax.Array | None, numbers: Numbers) -> dict[str, jax.Array]:
        valid = self.valid(batch)
        real, synthetic = valid[0].sum(), valid[1:].sum()
        return {"real": real.astype(jnp.float32), "synthetic": synthetic.astype(jnp.float32)}


def opponent(memory: dict, player: int) -> dict:
    """The adapter of a remembered opponent; 0 is π_t."""
    return jax.tree.map(lambda x: x[player], memory["opponents"])


def real_row(actor: Actor, index: int) -> Row:
    """The gold response of a training example, under its own prompt."""
    return _row(actor.prompts[index], actor.responses[index], +1)


def _row(prompt: list[int], completion: list[int], label: int) -> Row:
    return Row(prompt, completion, np.ones(len(completion), bool), 1.0, label)
