"""What differs between papers, and nothing else: how a round's rows are collected, and the loss on
their log-probabilities.

Rollouts, adapters, reference log-probabilities, optimiser, accumulation, clipping, mapping over
clients and aggregation are written once, elsewhere.
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
EMBEDDED = ("facts", "reasoned")  # the tasks of the embedded model

# The better of two learning rates, 5e-3 and 1.25e-2, on the embedded tasks at the size of grids, at
# seed 100 and 4,000 generated tokens: the same search for every method. 5e-3 is the tasks' own.
FASTER: Mapping[str, object] = {
    "train.learning_rate": 1.25e-2,
    "train.learning_rate_min": 2.5e-3,
}


@dataclasses.dataclass(frozen=True)
class CommonHyperparams:
    """The settings that every method shares; static.

    Attributes:
        examples: prompts that a client draws a round.
        steps: S, optimiser steps of a client's round.
        accumulation: A, micro-batches of an optimiser step.
        batch_size: B of the config: wins, prompts or pairs of a micro-batch, as the method says.
        max_new_tokens: the longest completion that is sampled.
        temperature: of sampling; 0 is greedy.
        eos_ids: what ends a completion.
    """

    examples: int
    steps: int
    accumulation: int
    batch_size: int
    max_new_tokens: int
    temperature: float
    eos_ids: tuple[int, ...]

    @property
    def items(self) -> int:
        """What a client's local steps draw in a round: steps x micro-batches x batch size."""
        return self.steps * self.accumulation * self.batch_size


@dataclasses.dataclass(frozen=True)
class WorkEstimate:
    """What a client does in a round, where that is known before.

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
    """What a method hands to local training; host only, one entry per cohort client in every list.

    Attributes:
        rows: [C][S][A] lists of rows, each of `rows_per_group` equal parts; None is a padding row.
        weight: float[C], aggregation weights.
        active: bool[C], clients that train; the others keep the global adapter.
        traces: what the rollouts said, for recording.
        metrics: numbers of the round.
        numbers: what the loss needs besides the batch, equal for all clients (IRIS's order, TPAW's
            number of players).
        memory: the server's memory after collecting; None leaves it as it was.
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
    """How a method's training rows stand together.

    Attributes:
        rows_per_group: rows that the loss needs together (2 for a pair); row i of each of so many
            equal parts of a micro-batch is one group.
        num_packs: passes over tokens that `forward` takes; a group's row k is read in pass
            k % num_packs.
        prompts: the prompts that rows may stand under: "task", "revision", "privileged".
    """

    rows_per_group: int = 1
    num_packs: int = 1
    prompts: tuple[str, ...] = ("task",)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a method's rows are scored while a client trains.

    Attributes:
        dropout: LoRA dropout; False wherever the loss holds a ratio of two policies.
        temperature: logits are divided by it before log-probabilities are taken.
        ref_logprobs: the references are scored once, before the local steps, into
            `Batch.ref_logprobs`.
        old_logprobs: so is the adapter that the phase started from, into `Batch.old_logprobs`.
        two_pass: `denominators` needs the log-probabilities of the whole optimiser step (a forward
            pass more).
        per_micro_batch: every micro-batch has denominators of its own, whatever train.normalize
            says.
    """

    dropout: bool = True
    temperature: float = 1.0
    ref_logprobs: bool = True
    old_logprobs: bool = False
    two_pass: bool = False
    per_micro_batch: bool = False

    @property
    def extra_passes(self) -> int:
        """Forward passes of a step beside the one with gradient and the references'."""
        return self.two_pass + self.old_logprobs


@dataclasses.dataclass(frozen=True)
class Algorithm(abc.ABC):
    """One method. Frozen and hashable: equal settings are equal methods, and share programs.

    A method answers two questions: which rows do a round's rollouts become (`collect`, on the
    host), and what is the loss on their log-probabilities (`denominators` and `loss`, pure
    functions of arrays). The rest has defaults.

    Class attributes:
        name: the key in ALGORITHMS, and the config group with its settings.
        Settings: the frozen dataclass of its own numbers.
        reference: what preset "reference" sets, by config field, from the method's published code;
            empty where there is none.
        client_state: the keys of the algorithm's state that hold clients' own texts. Between real
            devices they stay with their client; the other keys are the server's.
        layout: how rows stand together; a property where it depends on settings.
        scoring: how rows are scored; likewise.
    """

    settings: Any
    common: CommonHyperparams

    name: ClassVar[str]
    Settings: ClassVar[type]
    reference: ClassVar[Mapping[str, object]] = {}
    client_state: ClassVar[tuple[str, ...]] = ()
    layout = RowLayout()
    scoring = Scoring()

    @classmethod
    def recommended(cls, task: str, variant: str = "") -> Mapping[str, object]:
        """Returns the config fields that the method sets for a task, beyond the task's own.

        Args: task: its name; variant: "" or "small", the embedded tasks at the size of grids.
        """
        return {}

    @property
    def gold(self) -> str:
        """The gold text it trains on: "" (none), "responses", or "pairs" (chosen and rejected)."""
        return ""

    @property
    def sees_gold(self) -> str:
        """The gold text that enters training in any way, for tables: `gold`, or "teacher" where a
        frozen teacher reads it.
        """
        return self.gold or ("teacher" if "privileged" in self.layout.prompts else "")

    @property
    def phases(self) -> int:
        """Collect-and-train cycles of a round; more than one where a method samples again between
        local steps.
        """
        return 1

    def estimate_work(self, size: int) -> WorkEstimate | None:
        """The round's work of a client with `size` examples; None where it depends on what happens
        in the run.
        """
        return None

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:  # noqa: B027 (most need nothing)
        """Raises UserError where the data cannot be used; called before anything compiles.

        Args: feedback: the provider's name (rollout.feedback).
        """

    def init_state(self, lora: Adapter, examples: int, length: int) -> dict:
        """The server's memory before round 1: a pytree of numpy arrays, of a size that never
        changes.

        Args:
            lora: the adapter that round 1 starts from.
            examples: number of training examples.
            length: the longest completion, in tokens.
        """
        return {}

    def references(self, algorithm_state: dict, start: Adapter) -> tuple[Adapter, ...]:
        """J frozen adapters that the loss compares with (the same number in every round).

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
        """Rolls out, and turns what was said into rows.

        Args:
            policy: the round's global policy; from phase 1 on each client's own.
            memory: as from `init_state`, `CohortData.algorithm_state` or `end_round`.
            key: the phase's key.
            phase: from 0.
        """

    def forward(
        self, scorer: TokenLogprobs, lora: Adapter, block: Block, references: tuple[Adapter, ...]
    ) -> jax.Array:
        """float32[M], differentiable in `lora`: what `denominators` and `loss` take, spread over rows, as
        `logprobs`.
        """
        return scorer.logprobs(lora, block, self.scoring.temperature)

    @abc.abstractmethod
    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars: LossScalars
    ) -> Mapping[str, Any]:
        """The denominators of some rows, a tree of scalars that are summed over the optimiser step
        before `loss` divides.

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
        """Some rows' share of the optimiser step's loss, and metrics as (sum, count).

        Args:
            batch: whole items in any number, padding rows among them; no leading axes.
            logprobs: float32[B, T], differentiable.
            denominators: summed over the step's rows.
            loss_scalars: `CohortData.loss_scalars`, as `update_loss_scalars` left them.
        """

    def update_loss_scalars(
        self, loss_scalars: LossScalars, denominators: Mapping[str, Any]
    ) -> LossScalars:
        """The numbers of the next local step, from this step's denominators (summed over its rows)."""
        return loss_scalars

    def end_round(
        self, algorithm_state: dict, lora: Adapter, metrics: Mapping[str, float], round: int
    ) -> dict:
        """The memory after aggregation.

        Args:
            lora: the new global adapter.
            metrics: the round's metrics by name ("train/loss", ...).
            round: the round that ended, 1-based.
        """
        return algorithm_state


def choose(cohort: Cohort, slot: int, count: int) -> np.ndarray:
    """The examples that a client asks this round: `count` of its own, without replacement, the same
    for every method.
    """
    own = cohort.indices[slot]
    return own[
        cohort.rngs(slot, "examples").choice(len(own), size=min(len(own), count), replace=False)
    ]


def requests_of(cohort: Cohort, count: int, samples: int = 1) -> list[RolloutRequest]:
    """Returns what a cohort asks: `count` examples of every client, each `samples` times."""
    return [
        RolloutRequest(client, int(example), sample)
        for slot, client in enumerate(cohort.clients)
        for example in choose(cohort, slot, count)
        for sample in range(samples)
    ]


def schedule(
    common: CommonHyperparams, draw: Callable[[], list[TrainingRow | None]]
) -> list[list[list[TrainingRow | None]]]:
    """[S][A] micro-batches, each drawn on its own."""
    return [[draw() for _ in range(common.accumulation)] for _ in range(common.steps)]


def metrics_of(traces: list[Trace], wins: int, loses: int) -> dict[str, float]:
    """The round's rollout numbers, by the contract's names; no fractions where nothing was
    asked.
    """
    counts = {"rollout/wins": float(wins), "rollout/loses": float(loses)}
    if not traces:
        return counts
    wrong = [trace for trace in traces if not trace.first.correct]
    return counts | {
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
            "answer to compare with (gsm8k, mcqa), or a method that learns from responses (sft, "
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
