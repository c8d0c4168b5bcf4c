"""The part of a method that differs between papers: its training rows, and its loss.

A method collects a round's training rows on the host. It computes a loss from their
log-probabilities on the device. Everything else is written once, elsewhere: rollouts, adapters,
reference log-probabilities, the optimiser, accumulation, clipping, the mapping over clients, and
aggregation.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.core.types import Cohort, Example, Mean, Trace, TraceRecord
from spear_jax.models.params import Adapter
from spear_jax.models.token_logprobs import TokenLogprobs
from spear_jax.packing.arrays import Batch, Block
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutRequest, RolloutWorker
from spear_jax.tasks.base import Task

LossScalars = Mapping[str, jax.Array]
EMBEDDED = ("facts", "few_facts", "reasoned")  # the tasks of the embedded model

# The better of two learning rates, 5e-3 and 1.25e-2, on the embedded tasks at the size of grids, at
# seed 100 and 4,000 generated tokens: the same search for every method. 5e-3 is the tasks' own.
FASTER: Mapping[str, object] = {
    "train.learning_rate": 1.25e-2,
    "train.learning_rate_min": 2.5e-3,
}


@dataclasses.dataclass(frozen=True)
class CommonHyperparams:
    """Hyper-parameters that every method shares; static.

    Attributes:
        examples: prompts that a client draws a round.
        steps: S, optimiser steps of a client's round.
        accumulation: A, micro-batches of an optimiser step.
        batch_size: B of the config: wins, prompts or pairs of a micro-batch, as the method says.
        max_new_tokens: the longest completion that is sampled, in tokens.
        temperature: of sampling; 0 is greedy.
        eos_ids: the token ids that end a completion.
    """

    examples: int
    steps: int
    accumulation: int
    batch_size: int
    max_new_tokens: int
    temperature: float
    eos_ids: tuple[int, ...]

    @property
    def draws(self) -> int:
        """Returns the draws of a client's round: steps x micro-batches x batch size."""
        return self.steps * self.accumulation * self.batch_size


@dataclasses.dataclass(frozen=True)
class WorkEstimate:
    """The work of a client's round, as far as it is known before the round.

    Attributes:
        answers: first answers that it samples.
        rows: rows that its local steps train on, at most.
        revisions: of a wrong first answer; None means rollout.num_revisions.
    """

    answers: int
    rows: int
    revisions: int | None = 0


@dataclasses.dataclass
class CohortData:
    """Training data of a cohort, as a method hands it to local training; host only.

    Every list has one entry per cohort client. Two clients, 1 optimiser step, 2 micro-batches of 2
    rows; client 0 has three wins, client 1 has none:

        rows     [[[[w0, w2], [w1, w0]]], [[[None, None], [None, None]]]]
        weight   [3.0, 0.0]
        active   [True, False]

    Attributes:
        rows: [C][S][A] lists of rows. A micro-batch has `rows_per_group` equal parts. None is a
            padding row.
        weight: float[C], aggregation weights.
        active: bool[C], the clients that train. The others keep the global adapter.
        traces: the rollouts, for recording.
        metrics: the round's metrics by name.
        loss_scalars: arrays that the loss needs besides the batch, equal for all clients (IRIS's
            order, TPAW's number of players).
        algorithm_state: the method's state after collecting; None leaves it as it was.
    """

    rows: list[list[list[list[TrainingRow | None]]]]
    weight: np.ndarray
    active: np.ndarray
    traces: list[TraceRecord]
    metrics: dict[str, float]
    loss_scalars: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    algorithm_state: dict | None = None


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Layout of a method's training rows in a micro-batch.

    Row i of each of `rows_per_group` equal parts of a micro-batch is one group. With 2 rows per
    group, a micro-batch of 3 pairs is

        rows     w0 w1 w2 l0 l1 l2
        groups   (w0, l0)  (w1, l1)  (w2, l2)
        k        0 for every w, 1 for every l

    Attributes:
        rows_per_group: rows that the loss needs together (2 for a pair).
        num_packs: passes over tokens that `forward` takes. A group's row k is read in pass k %
            num_packs.
        prompts: the prompts that rows may stand under: "task", "revision", "privileged".
    """

    rows_per_group: int = 1
    num_packs: int = 1
    prompts: tuple[str, ...] = ("task",)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Options of how a method's rows are scored while a client trains.

    Attributes:
        dropout: LoRA dropout. It is False wherever the loss holds a ratio of two policies.
        temperature: logits are divided by it before log-probabilities are taken.
        ref_logprobs: whether the references are scored once, before the local steps, into
            `Batch.ref_logprobs`.
        old_logprobs: whether the adapter that the phase started from is scored likewise, into
            `Batch.old_logprobs`.
        two_pass: whether `denominators` needs the log-probabilities of the whole optimiser step. It
            costs one forward pass more.
        per_micro_batch: whether every micro-batch has denominators of its own, whatever
            train.normalize says.
    """

    dropout: bool = True
    temperature: float = 1.0
    ref_logprobs: bool = True
    old_logprobs: bool = False
    two_pass: bool = False
    per_micro_batch: bool = False

    @property
    def extra_passes(self) -> int:
        """Returns the forward passes of a step beside the references' and the one with gradient."""
        return self.two_pass + self.old_logprobs


@dataclasses.dataclass(frozen=True)
class Algorithm(abc.ABC):
    """One federated method. Methods with equal settings are equal, and share compiled programs.

    A method answers two questions. Which rows do a round's rollouts become (`collect`, on the
    host)? What is the loss on their log-probabilities (`denominators` and `loss`, pure functions of
    arrays)? The rest has defaults.

    Class attributes:
        name: the key in ALGORITHMS, and the config group of its settings.
        Settings: the frozen dataclass of its settings.
        reference: the fields that preset "reference" sets, from the method's published code; empty
            where there is none.
        takes_verdicts: whether people may say right and wrong in the task's place.
        client_state: the keys of the algorithm's state that hold clients' own texts. Between real
            devices they stay with their client; the other keys are the server's.
        layout: the layout of rows; a property where it depends on settings.
        scoring: the scoring of rows; likewise.
    """

    settings: Any
    common: CommonHyperparams

    name: ClassVar[str]
    Settings: ClassVar[type]
    reference: ClassVar[Mapping[str, object]] = {}
    client_state: ClassVar[tuple[str, ...]] = ()
    takes_verdicts: ClassVar[bool] = False
    layout = RowLayout()
    scoring = Scoring()

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        """Returns the config fields that the method sets for a task, beyond the task's own.

        Args:
            task: its name.
            variant: "", or "small" for the embedded tasks at the size of grids.
        """
        return {}

    @property
    def gold(self) -> str:
        """Returns the gold text it trains on: "" (none), "responses", or "pairs".

        "pairs" are a chosen and a rejected response to each prompt.
        """
        return ""

    @property
    def sees_gold(self) -> str:
        """Returns the gold text that enters training in any way, for tables.

        It is `gold`, or "teacher" where a frozen teacher reads gold text.
        """
        return self.gold or ("teacher" if "privileged" in self.layout.prompts else "")

    @property
    def phases(self) -> int:
        """Returns how often a round collects and trains.

        It is more than once where a method samples again between local steps.
        """
        return 1

    @property
    def keeps_older_adapters(self) -> bool:
        """Returns whether it compares with adapters of rounds before the last one.

        They are other policies where the base has changed since.
        """
        return False

    @property
    def measures_cohort(self) -> str:
        """Returns the field to change, with its value, where a client's training depends on a number
        that is measured over the other clients' data; "" where it depends on the global adapter and
        its own data alone. A client by itself trains another round where it does.
        """
        return ""

    def estimate_work(self, size: int) -> WorkEstimate | None:
        """Returns the round's work of a client with `size` examples.

        It is None where the work depends on what happens in the run.
        """
        return None

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:  # noqa: B027 (most need nothing)
        """Raises UserError where the data cannot be used; called before anything compiles.

        Args: feedback: the provider's name (rollout.feedback).
        """

    def init_state(self, lora: Adapter, examples: int, length: int) -> dict:
        """Returns the algorithm's state before round 1: a pytree of numpy arrays.

        No array ever changes its size.

        Args:
            lora: the adapter that round 1 starts from.
            examples: number of training examples.
            length: the longest completion, in tokens.
        """
        return {}

    def references(self, algorithm_state: dict, start: Adapter) -> tuple[Adapter, ...]:
        """Returns the J frozen adapters that the loss compares with; J is equal in all rounds.

        Args: start: the adapter that this round starts from.
        """
        return ()

    @abc.abstractmethod
    def collect(
        self,
        worker: RolloutWorker,
        policy: Policy,
        cohort: Cohort,
        algorithm_state: dict,
        key: jax.Array,
        phase: int,
    ) -> CohortData:
        """Rolls out, and turns the traces into training rows.

        Args:
            policy: the round's global policy; from phase 1 on each client's own.
            algorithm_state: as from `init_state`, `CohortData.algorithm_state` or `end_round`.
            key: the phase's key.
            phase: from 0.
        """

    def forward(
        self, scorer: TokenLogprobs, lora: Adapter, block: Block, references: tuple[Adapter, ...]
    ) -> jax.Array:
        """Returns the scores of a block's completion tokens: float32[M], differentiable in `lora`.

        `denominators` and `loss` get them as `logprobs`, spread over rows.
        """
        return scorer.logprobs(lora, block, self.scoring.temperature)

    @abc.abstractmethod
    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars: LossScalars
    ) -> Mapping[str, Any]:
        """Returns the denominators of some rows, a tree of scalars.

        They are summed over the optimiser step before `loss` divides by them.

        Args: logprobs: float32[B, T] without gradient where `scoring.two_pass`, else None.
        """

    @abc.abstractmethod
    def loss(
        self,
        batch: Batch,
        logprobs: jax.Array,
        denominators: Mapping[str, Any],
        loss_scalars: LossScalars,
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns some rows' share of the optimiser step's loss, and metrics as (sum, count).

        Args:
            batch: whole groups in any number, padding rows among them; no leading axes.
            logprobs: float32[B, T], differentiable.
            denominators: summed over the step's rows.
            loss_scalars: `CohortData.loss_scalars`, as `update_loss_scalars` left them.
        """

    def update_loss_scalars(
        self, loss_scalars: LossScalars, denominators: Mapping[str, Any]
    ) -> LossScalars:
        """Returns the loss scalars of the next local step.

        Args: denominators: this step's, summed over its rows.
        """
        return loss_scalars

    def end_round(
        self, algorithm_state: dict, lora: Adapter, metrics: Mapping[str, float], round: int
    ) -> dict:
        """Returns the algorithm's state after aggregation.

        Args:
            lora: the new global adapter.
            metrics: the round's metrics by name ("train/loss", ...).
            round: the round that ended, 1-based.
        """
        return algorithm_state


def choose(cohort: Cohort, slot: int, count: int) -> np.ndarray:
    """Draws the examples that a client asks this round; the same for every method.

    Args:
        slot: the client's place in the cohort.
        count: how many; all of the client's where it has fewer.
    Returns: int[n], without replacement, positions in the training set.
    """
    own = cohort.indices[slot]
    return own[
        cohort.rngs(slot, "examples").choice(len(own), size=min(len(own), count), replace=False)
    ]


def requests_of(cohort: Cohort, count: int, samples: int = 1) -> list[RolloutRequest]:
    """Returns a cohort's requests: `count` examples of every client, each `samples` times.

    Clients 4 and 7 drew example 31 and example 8. With 2 samples of each:

        (4, 31, 0)  (4, 31, 1)  (7, 8, 0)  (7, 8, 1)        (client, example, sample)
    """
    return [
        RolloutRequest(client, int(example), sample)
        for slot, client in enumerate(cohort.clients)
        for example in choose(cohort, slot, count)
        for sample in range(samples)
    ]


def schedule(
    common: CommonHyperparams, draw: Callable[[], list[TrainingRow | None]]
) -> list[list[list[TrainingRow | None]]]:
    """Draws the [S][A] micro-batches of a client's round.

    Each micro-batch is drawn on its own:

        >>> letters = iter("abcdef")
        >>> schedule(common, lambda: [next(letters)])      # 2 steps of 3 micro-batches
        [[['a'], ['b'], ['c']], [['d'], ['e'], ['f']]]
    """
    return [[draw() for _ in range(common.accumulation)] for _ in range(common.steps)]


def metrics_of(traces: list[Trace], wins: int, loses: int) -> dict[str, float]:
    """Returns the round's rollout metrics by name, without fractions where nothing was asked.

    Args: wins, loses: the rows that the round trains on.
    """
    used = {"rollout/wins": float(wins), "rollout/loses": float(loses)}
    traces = [trace for trace in traces if not trace.beside]
    if not traces:
        return used
    wrong = [trace for trace in traces if not trace.first.correct]
    return used | {
        "rollout/first_accuracy": 1.0 - len(wrong) / len(traces),
        "rollout/fixed": sum(trace.last.correct for trace in wrong) / max(1, len(wrong)),
    }


def needs_responses(name: str, task: Task, examples: list[Example]) -> None:
    """Raises UserError where the task has no gold response for an example."""
    for example in examples:
        if not task.response(example).strip():
            raise UserError(
                f"method {name!r} trains on gold responses, but task {task.name!r} has none for "
                f"example {example.id!r}; "
                "take a task with responses (task=pairs maps the columns of any file), or a "
                "method that learns from feedback."
            )


def needs_pairs(name: str, task: Task, examples: list[Example]) -> None:
    """Raises UserError where the task has no (chosen, rejected) pair for an example."""
    for example in examples:
        if not (task.response(example).strip() and example.rejected.strip()):
            raise UserError(
                f"method {name!r} with source 'data' trains on pairs, but task {task.name!r} has "
                f"none for example "
                f"{example.id!r}; set --config.task=preferences with "
                f"--config.data.columns.chosen and .rejected, or "
                f"--config.{name}.source=feedback."
            )


def needs_verdicts(name: str, task: Task) -> None:
    """Raises UserError where no answer can be called right or wrong."""
    if task.scoring == "likelihood":
        raise UserError(
            f"method {name!r} learns from right and wrong answers, but nothing grades task "
            f"{task.name!r}; take a task with an "
            "answer to compare with (qa, mcqa), or a method that learns from responses (sft, "
            "spin)."
        )


def needs_feedback(name: str, task: Task, provider: str) -> None:
    """Raises UserError where nobody would comment on answers, or none can be called wrong."""
    needs_verdicts(name, task)
    if provider == "none":
        raise UserError(
            f"method {name!r} learns from feedback, but rollout.feedback is 'none'; set it to "
            f"'oracle' or 'human', or take "
            "a method that needs none (grpo, sft)."
        )
