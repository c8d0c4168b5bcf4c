"""The published SPEAR code's reading of answers, faults included; for comparison only.

Source: the published SPEAR code, as described by its defects A4 (feedback may state the answer) and
    A5 (answers are upper-cased first and read without word boundaries). Wording is ours. Never the
    default.
"""

import re

from spear_jax.core.types import Example
from spear_jax.tasks.base import Answer


def extract_loosely(text: str, example: Example, first: bool = False) -> Answer | None:
    """Finds an answer as the published code does (A5).

    It upper-cases the text, then takes any letter behind "answer", or else any letter that stands
    alone. "answer can" reads as C, and the article "a" as A. Answers other than letters are read as
    whole words.

    Args: first: take the first match (the published feedback does) instead of the last (its
        grading).
    """
    labels = [label.upper() for label in example.labels]
    some = "|".join(map(re.escape, labels))
    upper = text.upper()
    for pattern in (rf"ANSWER\s*(?:IS)?\s*:?\s*\(?({some})", rf"\b({some})\b"):
        matches = list(re.finditer(pattern, upper))
        if matches:
            match = matches[0 if first else -1]
            return Answer(labels.index(match.group(1)), *match.span(1))
    return None
