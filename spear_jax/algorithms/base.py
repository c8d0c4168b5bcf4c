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
from spear_jax.core.types import Cohort, Example, Mean, Trace
from spear_jax.models.token_logprobs import TokenLogprobs
from spear_jax.packing.arrays import Batch, Block
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutWorker
from spear_jax.tasks.base import Task

LossScalars = Mapping[str, jax.Array]


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
        traces: (trace, role, confidence) of what the rollouts said, for recording.
        metrics: numbers of the round.
        numbers: what the loss needs besides the batch, equal for all clients (IRIS's order, TPAW's
            number of players).
        memory: the server's memory after collecting; None leaves it as it was.
    """

    rows: list[list[list[list[TrainingRow | None]]]]
    weight: np.ndarray
    active: np.ndarray
    traces: list[tuple[Trace, str, float]]
    metrics: dict[str, float]
    loss_scalars: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    algorithm_state: dict | None = None


@dataclasses.dataclass(frozen=True)
class Algorithm(abc.ABC):
    """One method. Frozen and hashable: equal settings are equal methods, and share compiled
    programs.

    Class attributes:
        name: the key in ALGORITHMS, and the config group with its settings.
        Settings: the frozen dataclass of its own numbers.
        reference: what preset "reference" sets, by config field, from the method's published code;
            empty where there is none.
        dropout: LoRA dropout while training; False wherever the loss holds a ratio of two policies.
        cached: whether the references' log-probabilities are scored once, before the local steps,
            into `Batch.ref_logprobs`.
    """

    settings: Any
    common: CommonHyperparams

    name: ClassVar[str]
    Settings: ClassVar[type]
    reference: ClassVar[Mapping[str, object]] = {}
    dropout: ClassVar[bool] = True
    cached: ClassVar[bool] = True

    @property
    def gold(self) -> str:
        """The gold text it trains on: "" (none), "responses", or "pairs" (chosen and rejected).
        Decides what data it needs.
        """
        return ""

    @property
    def sees_gold(self) -> str:
        """The gold text that enters training in any way, for tables: `gold`, or "teacher" where a
        frozen teacher reads it.
        """
        return self.gold or ("teacher" if "privileged" in self.scored_prompts else "")

    @property
    def scored_prompts(self) -> tuple[str, ...]:
        """The prompts that its rows may stand under: "task", "revision", "privileged". Decides how
        long rows are.
        """
        return ("task",)

    @property
    def phases(self) -> int:
        """Collect-and-train cycles of a round; more than one where a method samples again between
        local steps.
        """
        return 1

    @property
    def rows_per_group(self) -> int:
        """Rows of an item, which the loss needs together: row i of each of so many equal parts of a
        micro-batch.
        """
        return 1

    @property
    def num_packs(self) -> int:
        """Passes over tokens that `forward` takes: an item's kind k is read in pass k % trunks."""
        return 1

    @property
    def micro(self) -> bool:
        """Whether every micro-batch has denominators of its own whatever train.normalize says."""
        return False

    @property
    def two_pass(self) -> bool:
        """Whether `denominators` needs the log-probabilities of the whole optimiser step (a forward pass
        more).
        """
        return False

    @property
    def scored_temperature(self) -> float:
        """Logits are divided by it before log-probabilities are taken."""
        return 1.0

    @property
    def scores_old(self) -> bool:
        """Whether `Batch.old_logprobs` is to hold the log-probabilities under the adapter that the
        phase started from.
        """
        return False

    def estimate_work(self, size: int) -> WorkEstimate | None:
        """The round's work of a client with `size` examples; None where it depends on what happens
        in the run.
        """
        return None

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:  # noqa: B027 (most need nothing)
        """Raises UserError where the data cannot be used; called before anything compiles.

        Args: feedback: the provider's name (rollout.feedback).
        """

    def init_state(self, lora: dict, examples: int, length: int) -> dict:
        """The server's memory before round 1: a pytree of numpy arrays, of a size that never
        changes.

        Args:
            lora: the adapter that round 1 starts from.
            examples: number of training examples.
            length: the longest completion, in tokens.
        """
        return {}

    def references(self, algorithm_state: dict, start: dict) -> tuple[dict, ...]:
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

    @property
    def steps_per_phase(self) -> int:
        """S, optimiser steps on one phase's rows."""
        return self.common.steps

    def forward(
        self, scorer: TokenLogprobs, lora: dict, block: Block, references: tuple[dict, ...]
    ) -> jax.Array:
        """float32[M], differentiable in `lora`: what `denominators` and `loss` take, spread over rows, as
        `logprobs`.
        """
        return scorer.logprobs(lora, block, self.scored_temperature)

    @abc.abstractmethod
    def denominators(
        self, batch: Batch, logprobs: jax.Array | None, loss_scalars: LossScalars
    ) -> Mapping[str, Any]:
        """The denominators of some rows, a tree of scalars that are summed over the optimiser step
        before `loss` divides.

        Args: logprobs: float32[B, T] without gradient where `two_pass`, else None.
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
            numbers: `CohortData.loss_scalars`, as `update_loss_scalars` left them.
        """

    def update_loss_scalars(
        self, loss_scalars: LossScalars, denominators: Mapping[str, Any]
    ) -> LossScalars:
        """The numbers of the next local step, from this step's denominators (summed over its rows)."""
        return loss_scalars

    def end_round(
        self, algorithm_state: dict, lora: dict, metrics: Mapping[str, float], round: int
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
