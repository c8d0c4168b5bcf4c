"""Who tells the model that it was wrong: the oracle (labels and hints), a person, or nobody."""

import abc
import dataclasses
import sys

from spear_jax.errors import UserError, unknown
from spear_jax.tasks.base import Task
from spear_jax.types import Example

# Tried in order when everything longer would leak. They share no word, and a gold label and a gold option can
# rule out one each, so one of the three always remains.
_LAST_RESORTS = ("Wrong.", "Incorrect.", "Mistaken.")


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to comment on.

    Attributes:
        example: the question.
        answer: the text of the latest completion.
        attempt: which revision the feedback is for, from 1.
    """

    example: Example
    answer: str
    attempt: int


class Feedback(abc.ABC):
    """A provider: comments on a batch of answers; None where it has nothing to say, and no revision follows.

    Args:
        task: grades answers, states their format and gives hints.
        hint_words: how many words of the gold option a hint may quote at most.
    """

    def __init__(self, task: Task, hint_words: int):
        if hint_words < 0:
            raise UserError(f"hint_words {hint_words} is negative; give 0 for hints without words of the option.")
        self.task = task
        self.hint_words = hint_words

    @abc.abstractmethod
    def __call__(self, requests: list[Request]) -> list[str | None]:
        """Returns one feedback text, or None, per request, in order."""


class Oracle(Feedback):
    """Knows the gold answer and never states it.

    A wrong answer is told that it is wrong, not to repeat the choice, how an answer looks, and a hint; a
    right one gets None.

    Source: SPEAR (arXiv 2605.07977), oracle feedback; wording is ours. Departures:
      1. Answers are graded with the task's one extractor; the reference can tell a wrong answer that it is
         correct, and show the gold letter.
      2. No text leaves here that `task.leaks` objects to; shorter texts are tried instead.
      3. An answer that cannot be read is told so instead of being asked to change its choice.
    """

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [self._comment(request.example, request.answer) for request in requests]

    def _comment(self, example: Example, answer: str) -> str | None:
        found = self.task.extract(answer, example)
        if found is not None and found.option == example.gold:
            return None
        verdict = "That answer is wrong. Do not repeat your previous choice."
        if found is None:
            verdict = "That cannot be read as an answer."
        shape = self.task.templates.format
        hint = self.task.hint(example, self.hint_words)
        texts = (
            f"{verdict} {shape} {hint}",
            f"{verdict} {hint}",
            f"{verdict} {shape}",
            verdict,
            *_LAST_RESORTS,
        )
        return next(text for text in texts if not self.task.leaks(text, example))


class Silent(Feedback):
    """Says nothing, so that no answer is revised."""

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [None] * len(requests)


class Human(Feedback):
    """Asks a person at the terminal, one line per answer; an empty line means nothing to say.

    Raises:
        UserError: when built where standard input is no terminal, or when the input ends.
    """

    def __init__(self, task: Task, hint_words: int):
        super().__init__(task, hint_words)
        if not sys.stdin.isatty():
            raise UserError(
                "feedback 'human' needs a terminal, but standard input is none. Run in a terminal, or set "
                "the feedback to 'oracle' or 'none'."
            )

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [self._ask(request, place, len(requests)) for place, request in enumerate(requests, start=1)]

    def _ask(self, request: Request, place: int, count: int) -> str | None:
        print(f"\n--- {place} of {count}, revision {request.attempt} ---")
        print(self.task.question(request.example))
        print(f"\nThe model's answer: {request.answer.strip() or '(empty)'}")
        try:
            return input("Your feedback (empty for none): ").strip() or None
        except EOFError:
            raise UserError(
                f"the input ended at answer {place} of {count}; feedback 'human' needs one line per answer. "
                "Run again in a terminal, or set the feedback to 'oracle' or 'none'."
            ) from None


PROVIDERS: dict[str, type[Feedback]] = {"oracle": Oracle, "none": Silent, "human": Human}


def providers() -> dict[str, type[Feedback]]:
    """The providers by name; `oracle_published` repeats the published code's leaks (A4)."""
    from spear_jax.tasks.published import PublishedOracle  # it builds on this file

    return PROVIDERS | {"oracle_published": PublishedOracle}


def get_feedback(name: str, task: Task, hint_words: int) -> Feedback:
    """Builds the provider of that name; raises UserError for an unknown one."""
    known = providers()
    if name not in known:
        raise unknown("feedback", name, known)
    return known[name](task, hint_words)
