"""The one reader of answers that name an option, by a letter or by yes and no."""

import functools
import re

from spear_jax.tasks.base import Answer

# How a completion may announce its answer, with the space and case variants that tokenizers tell
# apart.
MARKERS = (
    "Answer:",
    " Answer:",
    "\nAnswer:",
    "Answer: ",
    "Answer :",
    "answer:",
    " answer:",
    "\nanswer:",
    "ANSWER:",
    " ANSWER:",
)

# Between the marker and the label may stand spaces, brackets, quotes, bold marks, a LaTeX
# wrapper.
_OPEN = r"(?:[\s*_(\[{\"'`$]|\\boxed|\\text(?:bf)?|\\mathrm)*"
# Nothing that makes the label the start of a longer word or symbol: "Can", "A4", "A-frame", "C's",
# "C_1".
_BOUND = r"(?![^\W_])(?!['’_-][^\W_])"
_MARKER = r"(?<![^\W_])(?i:answer)[*_]*(?:\s+is\b[*_]*\s*:?|\s*:)"
# A first label counts only where it stands alone: "B", "B.", "(B) heat", "B\nBecause"; not "A
# total", "D.C.".
_ALONE = r"(?!\.[A-Z]\.)(?=[*_\"'`\]}$]*(?:[.):,]|[ \t]*(?:\n|\Z)))"


def letter_labels(count: int) -> tuple[str, ...]:
    """Returns the labels "A", "B", ... of `count` options (2 to 26)."""
    return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count])


def extract_letter(text: str, labels: tuple[str, ...]) -> Answer | None:
    """Finds the option letter that a completion names.

    The last explicit marker with a label ("Answer: C", "the answer is (C)") wins. Without a marker,
    a label that opens the text and stands alone counts. Nothing else counts: no article, no part of
    a word.

        >>> extract_letter("Answer: A. No, the answer is (C)", ("A", "B", "C"))
        Answer(option=2, start=30, end=31)
        >>> extract_letter("A rock", ("A", "B", "C")) is None
        True

    Args:
        text: the completion's text.
        labels: the labels that count; matched with their case, since "a" is an article.
    Returns: the option's index with the character span of its label, or None.
    Source: SPEAR (arXiv 2605.07977), answer grading. Departures:
      1. Case-sensitive and word-bounded for letters; the reference upper-cases the text first,
         which reads "answer can" as C and the article "a" as A.
      2. Grading, feedback and loss masks share this function; the reference mixes first and last
         matches.
    """
    return _find(text, labels, ignore_case=False)


def extract_word(text: str, labels: tuple[str, ...]) -> Answer | None:
    """Finds a label that is a lower-case word ("yes", "no"), in any case; else as `extract_letter`."""
    return _find(text, labels, ignore_case=True)


def _find(text: str, labels: tuple[str, ...], ignore_case: bool) -> Answer | None:
    marked, leading = _patterns(labels, ignore_case)
    matches = list(marked.finditer(text))
    match = matches[-1] if matches else leading.match(text)
    if match is None:
        return None
    name = match["label"].lower() if ignore_case else match["label"]
    return Answer(labels.index(name), match.start("label"), match.end("label"))


@functools.cache
def _patterns(labels: tuple[str, ...], ignore_case: bool) -> tuple[re.Pattern, re.Pattern]:
    """Returns the compiled (marked, leading) patterns for a set of labels."""
    flag = "i:" if ignore_case else ":"
    label = rf"(?P<label>(?{flag}{'|'.join(map(re.escape, labels))})){_BOUND}"
    kind = rf"(?:(?i:option|choice)\s{_OPEN})?"
    marked = re.compile(f"{_MARKER}{_OPEN}{kind}{label}")
    leading = re.compile(f"{_OPEN}{kind}{label}{_ALONE}")
    return marked, leading
