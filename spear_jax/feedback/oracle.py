"""Feedback from an oracle that knows the gold answer and never states it."""

from spear_jax.core.types import Example
from spear_jax.feedback.base import Feedback, Request

# Tried in order when everything longer would leak. They share no word, and a gold label and a gold
# option can rule out one each, so one of the three always remains.
_LAST_RESORTS = ("Wrong.", "Incorrect.", "Mistaken.")


class Oracle(Feedback):
    """Knows the gold answer and never states it.

    A wrong answer is told that it is wrong, not to repeat the choice, how an answer looks, and a
    hint; a right one gets None.

    Source: SPEAR (arXiv 2605.07977), oracle feedback; wording is ours. Departures:
      1. Answers are graded with the task's one extractor; the reference can tell a wrong answer
         that it is correct, and show the gold letter.
      2. No text leaves here that `task.leaks` objects to; shorter texts are tried instead.
      3. An answer that cannot be read is told so instead of being asked to change its choice.
    """

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [self._comment(request.example, request.answer) for request in requests]

    def longest_texts(self, examples: list[Example]) -> list[str]:
        """Returns the texts about unreadable answers, which are the longest."""
        return [text or "" for text in self([Request(example, "", 1) for example in examples])]

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
