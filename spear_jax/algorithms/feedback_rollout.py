"""SPEAR's rollout, shared by every method that starts from it: ask, grade, give feedback, revise;
then rows under the task.

Source: SPEAR (arXiv 2605.07977), rollout steps 1 to 3.
"""

import dataclasses

import jax
import numpy as np

from spear_jax.algorithms.base import requests_of
from spear_jax.core.types import Attempt, Cohort, Trace
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutRequest, RolloutWorker


@dataclasses.dataclass
class FeedbackRollout:
    """A round's traces in the order they were asked.

    Attributes:
        asks: (client, example, sample) of each trace.
        rewrites: by trace number, what replaces a right first answer of wrong form (None: nothing
            does).
    """

    traces: list[Trace]
    requests: list[RolloutRequest]
    rewrites: dict[int, Attempt | None]

    def winner(self, number: int) -> Attempt | None:
        """The right completion of a trace: its first answer, its rewrite, or the revision that
        fixed it.
        """
        found = self.rewrites.get(number, self.traces[number].last)
        return found if found is not None and found.correct else None

    def wins(self, worker: RolloutWorker, client: int, retokenise: bool) -> list[TrainingRow]:
        """A client's right completions, as rows."""
        found = ((self.traces[i], self.winner(i)) for i in self.of(client))
        return [
            win_row(worker, trace, winner, retokenise)
            for trace, winner in found
            if winner is not None
        ]

    def weight(self, client: int, wins: list[TrainingRow], skip_weight: str) -> float:
        """A client's aggregation weight: its wins; without any 0, or as published its rollouts
        (A2).
        """
        return float(len(self.of(client)) if not wins and skip_weight == "rollouts" else len(wins))

    def of(self, client: int) -> list[int]:
        """The numbers of a client's traces."""
        return [number for number, trace in enumerate(self.traces) if trace.client == client]


def rollout_with_feedback(
    worker: RolloutWorker,
    policy: Policy,
    cohort: Cohort,
    count: int,
    key: jax.Array,
    strict_format: bool = False,
) -> FeedbackRollout:
    """Every client asks `count` of its examples, and wrong answers are revised after feedback.

    Args: strict_format: rewrite right answers of wrong form.
    """
    requests = requests_of(cohort, count)
    traces = worker.answer(policy, requests, key)
    rewrites = worker.rewrite(policy, traces, requests, key) if strict_format else {}
    worker.revise_until_right(policy, traces, requests, key)
    return FeedbackRollout(traces, requests, rewrites)


def completion_ids(worker: RolloutWorker, attempt: Attempt, retokenise: bool = False) -> list[int]:
    """The ids to train on: as sampled, or the stripped text encoded anew with an EOS (A6, as
    published).

    Encoded anew, a text can have more tokens than were sampled (broken characters become several);
    it is then cut to the longest completion.
    """
    if not retokenise:
        return attempt.completion
    tokenizer, room = (
        worker.renderer.tokenizer,
        max(worker.first.max_new_tokens, worker.revise.max_new_tokens),
    )
    return [
        *tokenizer.encode(attempt.text.strip(), add_special_tokens=False)[:room],
        tokenizer.eos_token_id,
    ]


def win_row(
    worker: RolloutWorker, trace: Trace, attempt: Attempt, retokenise: bool = False, label: int = 1
) -> TrainingRow:
    """A completion under the original prompt, all of its tokens supervised."""
    ids = completion_ids(worker, attempt, retokenise)
    return TrainingRow(trace.first.prompt, ids, np.ones(len(ids), bool), 1.0, label)
