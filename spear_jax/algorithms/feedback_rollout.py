"""SPEAR's rollout, shared by every method that starts from it: ask, grade, give feedback, revise; then rows under the task.

Source: SPEAR (arXiv 2605.07977), rollout steps 1 to 3.
"""

import dataclasses

import jax
import numpy as np

from spear_jax.algorithms.base import choose
from spear_jax.core.types import Attempt, Cohort, Trace
from spear_jax.packing.rows import Row
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import Actor, Ask


@dataclasses.dataclass
class Conversation:
    """A round's traces in the order they were asked.

    Attributes:
        asks: (client, example, sample) of each trace.
        rewrites: by trace number, what replaces a right first answer of wrong form (None: nothing does).
    """

    traces: list[Trace]
    asks: list[Ask]
    rewrites: dict[int, Attempt | None]

    def winner(self, number: int) -> Attempt | None:
        """The right completion of a trace: its first answer, its rewrite, or the revision that fixed it."""
        found = self.rewrites.get(number, self.traces[number].last)
        return found if found is not None and found.correct else None

    def wins(self, actor: Actor, client: int, retokenise: bool) -> list[Row]:
        """A client's right completions, as rows."""
        found = ((self.traces[i], self.winner(i)) for i in self.of(client))
        return [win_row(actor, trace, winner, retokenise) for trace, winner in found if winner is not None]

    def weight(self, client: int, wins: list[Row], skip_weight: str) -> float:
        """A client's aggregation weight: its wins; without any 0, or as published its rollouts (A2)."""
        return float(len(self.of(client)) if not wins and skip_weight == "rollouts" else len(wins))

    def of(self, client: int) -> list[int]:
        """The numbers of a client's traces."""
        return [number for number, trace in enumerate(self.traces) if trace.client == client]


def converse(
    actor: Actor, policy: Policy, cohort: Cohort, count: int, key: jax.Array, strict_format: bool = False
) -> Conversation:
    """Every client asks `count` of its examples, and wrong answers are revised after feedback.

    Args: strict_format: rewrite right answers of wrong form.
    """
    asks = [(client, int(i), 0) for slot, client in enumerate(cohort.clients) for i in choose(cohort, slot, count)]
    traces = actor.answer(policy, asks, key)
    rewrites = actor.rewrite(policy, traces, asks, key) if strict_format else {}
    actor.revise_until_right(policy, traces, asks, key)
    return Conversation(traces, asks, rewrites)


def completion_ids(actor: Actor, attempt: Attempt, retokenise: bool = False) -> list[int]:
    """The ids to train on: as sampled, or the stripped text encoded anew with an EOS (A6, as published).

    Encoded anew, a text can have more tokens than were sampled (broken characters become several); it is then cut to the
    longest completion.
    """
    if not retokenise:
        return attempt.completion
    tokenizer, room = actor.renderer.tokenizer, max(actor.first.max_new_tokens, actor.revise.max_new_tokens)
    return [*tokenizer.encode(attempt.text.strip(), add_special_tokens=False)[:room], tokenizer.eos_token_id]


def win_row(actor: Actor, trace: Trace, attempt: Attempt, retokenise: bool = False, label: int = 1) -> Row:
    """A completion under the original prompt, all of its tokens supervised."""
    ids = completion_ids(actor, attempt, retokenise)
    return Row(trace.first.prompt, ids, np.ones(len(ids), bool), 1.0, label)
