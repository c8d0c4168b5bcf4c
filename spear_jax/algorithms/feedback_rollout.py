"""Rollout with feedback: ask, grade, give feedback, revise.

Every method that starts from SPEAR's rollout shares it. Completions then become rows under the
task's prompt.

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
    """A round's traces in the order in which they were asked.

        traces     trace 0: wrong, then right   trace 1: right at once, of wrong form
        requests   (4, 31, 0)                   (4, 8, 0)
        rewrites   {1: an attempt}              the winners are trace 0's revision and this rewrite

    Attributes:
        traces: the traces.
        requests: (client, example, sample) of each trace; example -1 of those beside the round.
        rewrites: by trace number, the rewrite of a right first answer of wrong form; None where
            there is none.
    """

    traces: list[Trace]
    requests: list[RolloutRequest]
    rewrites: dict[int, Attempt | None]

    def winner(self, number: int) -> Attempt | None:
        """Returns the right completion of a trace, or None.

        It is the first answer, its rewrite, or the revision that fixed it.
        """
        attempt = self.rewrites.get(number, self.traces[number].last)
        return attempt if attempt is not None and attempt.correct else None

    def wins(self, worker: RolloutWorker, client: int, retokenise: bool) -> list[TrainingRow]:
        """Returns a client's right completions as rows."""
        winners = ((self.traces[i], self.winner(i)) for i in self.of(client))
        return [
            win_row(worker, trace, winner, retokenise)
            for trace, winner in winners
            if winner is not None
        ]

    def weight(self, client: int, wins: list[TrainingRow], skip_weight: str) -> float:
        """Returns a client's aggregation weight: its number of wins.

        A client without wins has weight 0, or as published its number of rollouts (A2).
        """
        return float(len(self.of(client)) if not wins and skip_weight == "rollouts" else len(wins))

    def of(self, client: int) -> list[int]:
        """Returns the trace numbers of a client, those that nobody answered left out."""
        return [
            number
            for number, trace in enumerate(self.traces)
            if trace.client == client and trace.answered
        ]


def rollout_with_feedback(
    worker: RolloutWorker,
    policy: Policy,
    cohort: Cohort,
    count: int,
    key: jax.Array,
    strict_format: bool = False,
) -> FeedbackRollout:
    """Asks `count` examples of every client, and has wrong answers revised after feedback. What people
    asked themselves, or answered late, comes behind.

    Args: strict_format: rewrite right answers of wrong form.
    """
    requests = requests_of(cohort, count)
    traces = worker.answer(policy, requests, key)
    rewrites = worker.rewrite(policy, traces, requests, key) if strict_format else {}
    worker.revise_until_right(policy, traces, requests, key)
    if worker.feedback.judges:  # of a first answer that nobody judged nothing is known
        known = [(x, y) for x, y in zip(traces, requests, strict=True) if x.answered]
        traces, requests = [x for x, _ in known], [y for _, y in known]
    beside = worker.beside(cohort.clients)
    requests += [RolloutRequest(trace.client, -1) for trace in beside]
    return FeedbackRollout(traces + beside, requests, rewrites)


def completion_ids(worker: RolloutWorker, attempt: Attempt, retokenise: bool = False) -> list[int]:
    """Returns the ids to train on: as sampled, or the stripped text encoded anew with an EOS.

    Encoding anew is the published code's way (A6). A text can then have more tokens than were
    sampled, since broken characters become several. It is cut to the longest completion.
    """
    if not retokenise:
        return attempt.completion
    tokenizer = worker.renderer.tokenizer
    longest = max(worker.first.max_new_tokens, worker.revise.max_new_tokens)
    return [
        *tokenizer.encode(attempt.text.strip(), add_special_tokens=False)[:longest],
        tokenizer.eos_token_id,
    ]


def win_row(
    worker: RolloutWorker, trace: Trace, attempt: Attempt, retokenise: bool = False, label: int = 1
) -> TrainingRow:
    """Returns a completion under the original prompt, all of its tokens supervised."""
    ids = completion_ids(worker, attempt, retokenise)
    return TrainingRow(trace.first.prompt, ids, np.ones(len(ids), bool), 1.0, label)
