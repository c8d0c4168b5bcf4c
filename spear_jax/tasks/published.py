"""The published SPEAR code's reading of answers and its feedback, faults included, for comparison only.

Source: the published SPEAR code, as described by its defects A4 (feedback may state the answer) and A5 (answers are upper-cased
first and read without word boundaries). Wording is ours. Never the default.
"""

import re

from spear_jax.feedback import Feedback, Request
from spear_jax.tasks.base import Answer
from spear_jax.types import Example


def extract_loosely(text: str, example: Example, first: bool = False) -> Answer | None:
    """A5: upper-cases the text, then takes any letter behind "answer", or else any letter that stands alone.

    "answer can" reads as C, and the article "a" as A. Answers other than letters are read as whole words.

    Args: first: take the first match (the published feedback does) instead of the last (its grading).
    """
    labels = [label.upper() for label in example.labels]
    some = "|".join(map(re.escape, labels))
    upper = text.upper()
    for pattern in (rf"ANSWER\s*(?:IS)?\s*:?\s*\(?({some})", rf"\b({some})\b"):
        found = list(re.finditer(pattern, upper))
        if found:
            match = found[0 if first else -1]
            return Answer(labels.index(match.group(1)), *match.span(1))
    return None


class PublishedOracle(Feedback):
    """A4: grades with the first match, tells a wrong answer that it is right, and hints without a leak check."""

    def __call__(self, requests: list[Request]) -> list[str | None]:
        return [self._comment(request) for request in requests]

    def _comment(self, request: Request) -> str:
        example, shape = request.example, self.task.templates.format
        found = extract_loosely(request.answer, example, first=True)
        if found is not None and found.option == example.gold:
            return f"That answer is correct: {example.labels[example.gold]}. {shape}"
        return f"That answer is wrong. Do not repeat your previous choice. {shape} {self._hint(example)}"

    def _hint(self, example: Example) -> str:
        """Opening solution lines without the gold letter anywhere in them, else the gold option's first words."""
        letter = example.labels[example.gold]
        if len(letter) > 1 or not self.hint_words:
            return self.task.hint(example, self.hint_words)
        lines = [] if self.task.scoring == "choice" else list(example.support)
        kept = [line for line in lines[:3] if letter not in line]
        if kept:
            return " ".join(kept)[:300]
        return f"The right option starts: {' '.join(example.options[example.gold].split()[: self.hint_words])}"
