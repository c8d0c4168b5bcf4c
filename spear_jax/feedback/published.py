"""The published SPEAR code's feedback, faults included, for comparison only."""

from spear_jax.core.types import Example
from spear_jax.feedback.base import Feedback, Request
from spear_jax.tasks.published import extract_loosely


class PublishedOracle(Feedback):
    """The published oracle (A4): it grades with the first match and checks no leaks.

    It can call a wrong answer right.
    """

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [self._comment(request) for request in requests]

    def longest_texts(self, examples: list[Example]) -> list[str]:
        """Returns the texts about unreadable answers, which are the longest."""
        return [self._comment(Request(example, "", 1)) for example in examples]

    def _comment(self, request: Request) -> str:
        example, shape = request.example, self.task.templates.format
        read = extract_loosely(request.answer, example, first=True)
        if read is not None and read.option == example.gold:
            return f"That answer is correct: {example.labels[example.gold]}. {shape}"
        return f"That answer is wrong. Do not repeat your previous choice. {shape} {self._hint(example)}"

    def _hint(self, example: Example) -> str:
        """Returns the first solution lines without the gold letter anywhere in them.

        Without such lines it is the gold option's first words.
        """
        letter = example.labels[example.gold]
        if len(letter) > 1 or not self.hint_words:
            return self.task.hint(example, self.hint_words)
        lines = [] if self.task.scoring == "choice" else list(example.support)
        kept = [line for line in lines[:3] if letter not in line]
        if kept:
            return " ".join(kept)[:300]
        return f"The right option starts: {' '.join(example.options[example.gold].split()[: self.hint_words])}"
