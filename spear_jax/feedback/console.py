"""Feedback from a person at the terminal, or from nobody."""

import sys
from typing import ClassVar

from spear_jax.core.errors import UserError
from spear_jax.feedback.base import Feedback, Request
from spear_jax.tasks.base import Task


class Silent(Feedback):
    """Feedback from nobody, so that no answer is revised."""

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [None] * len(requests)


class Human(Feedback):
    """A person at the terminal, asked for one line per answer; an empty line means nothing to say.

    Raises:
        UserError: when built where standard input is no terminal, or when the input ends.
    """

    asks_people: ClassVar[bool] = True

    def __init__(self, task: Task, hint_words: int = 3):
        super().__init__(task, hint_words)
        if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
            raise UserError(
                "feedback 'human' needs a terminal, but standard input is none. Run in a "
                "terminal, or set "
                "the feedback to 'oracle' or 'none'."
            )

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [
            self._ask(request, place, len(requests))
            for place, request in enumerate(requests, start=1)
        ]

    def _ask(self, request: Request, place: int, count: int) -> str | None:
        print(f"\n--- {place} of {count}, revision {request.attempt} ---")
        print(self.task.question(request.example))
        print(f"\nThe model's answer: {request.answer.strip() or '(empty)'}")
        try:
            return input("Your feedback (empty for none): ").strip() or None
        except EOFError:
            raise UserError(
                f"the input ended at answer {place} of {count}; feedback 'human' needs one line "
                f"per answer. "
                "Run again in a terminal, or set the feedback to 'oracle' or 'none'."
            ) from None
