"""Feedback from an oracle that knows the gold answer and never states it."""

from spear_jax.core.types import Example
from spear_jax.feedback.base import Feedback, Request
from spear_jax.tasks.base import MISSHAPEN

# Tried in order when everything longer would leak. They share no word, and a gold label and a gold
# option can rule out one each, so one of the three always remains.
_LAST_RESORTS = ("Wrong.", "Incorrect.", "Mistaken.")


class Oracle(Feedback):
    """An oracle that knows the gold answer and never states it.

    Feedback on a wrong answer has four parts: it is wrong, the choice is not to be repeated, the
    form of an answer, and a hint. A right answer gets None.

    Source: SPEAR (arXiv 2605.07977), oracle feedback; wording is ours. Departures:
      1. Answers are graded with the task's one extractor. The reference can call a wrong answer
         correct, and show the gold letter.
      2. No text leaves here that `task.leaks` objects to. Shorter texts are tried instead.
      3. An answer that cannot be read is called unreadable. It is not asked to change its choice.
    """

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [self._comment(request.example, request.answer) for request in requests]

    def longest_texts(self, examples: list[Example]) -> list[str]:
        """Returns the texts about unreadable answers, which are the longest."""
        return [text or "" for text in self([Request(example, "", 1) for example in examples])]

    def _comment(self, example: Example, answer: str) -> str | None:
        read = self.task.extract(answer, example)
        if read is not None and read.option == example.gold:
            return None
        verdict = "That answer is wrong. Do not repeat your previous choice."
        if read is None or read.option == MISSHAPEN:
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
        # right texts could be all of these words; a mark alone is none of them
        return next((text for text in texts if not self.task.leaks(text, example)), "?")
