"""Providers of feedback on wrong answers."""

import abc
import dataclasses
from typing import ClassVar

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to comment on.

    Attributes:
        example: the question.
        answer: the text of the latest completion.
        attempt: the number of the revision that the feedback is for, from 1.
    """

    example: Example
    answer: str
    attempt: int


class Feedback(abc.ABC):
    """A provider that comments on a batch of answers.

    Where it has nothing to say it gives None, and no revision follows.

    Class attributes:
        asks_people: whether a person answers, so that nothing may be asked for show.

    Args:
        task: grades answers, states their format and gives hints.
        hint_words: how many words of the gold option a hint may quote at most.
    Raises: UserError for a negative hint_words.
    """

    asks_people: ClassVar[bool] = False

    def __init__(self, task: Task, hint_words: int = 3):
        if hint_words < 0:
            raise UserError(
                f"hint_words {hint_words} is negative; give 0 for hints without words of the "
                f"option."
            )
        self.task = task
        self.hint_words = hint_words

    def longest_texts(self, examples: list[Example]) -> list[str]:
        """Returns, for each example, a text as long as any that the provider says of it.

        Training rows keep space for it in revision prompts. A longer text costs the end of the
        answer there.
        """
        return ["x" * 400] * len(examples)

    @abc.abstractmethod
    def __call__(self, requests: list[Request]) -> list[str | None]:
        """Returns one feedback text, or None, per request, in order."""
