"""Parts of the tasks' hints; none of them can state an answer."""

import re
from collections.abc import Callable, Iterable

from spear_jax.core.types import Example

# A sentence ends before white space and a new start, but not after an initial or a common
# abbreviation.
_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bDr\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bSt\.)(?<!\bJr\.)(?<!\bvs\.)"
    r"\s+(?=[\"'“(\[A-Z0-9$\\])"
)


def sentences(text: str) -> list[str]:
    """Splits text into its sentences, without surrounding white space."""
    return [part.strip() for part in _END.split(text) if part.strip()]


def names_label(text: str, example: Example) -> bool:
    """Returns whether any option's label stands in the text as a word (case-sensitive).

    Any label counts, not only the gold one. If only gold labels were removed, a label that is left
    would be known not to be the gold one.
    """
    return bool(re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, example.labels))})(?!\w)", text))


def opening_words(example: Example, words: int) -> str:
    """Returns the first words of the gold option, or "" where even those would say too much.

    It takes min(words, n - 1) of the option's n words, so never the whole option. A leading article
    is left out, since an option "A cell" would put the letter A into the hint. It stops before a
    label.

        option "A rock that floats on water", words 3   ->  "rock that"
        option "granite"                                ->  ""
    """
    option = example.options[example.gold].split()
    taken = option[: max(0, min(words, len(option) - 1))]
    if taken and taken[0].lower() in ("a", "an", "the"):
        taken = taken[1:]
    for count, word in enumerate(taken):
        if names_label(word, example):
            taken = taken[:count]
            break
    return " ".join(taken).strip("\"'“”`").rstrip(",;:.")


def option_hint(example: Example, words: int, nudge: str) -> str:
    """Returns a nudge, after the gold option's first words where any may be said."""
    quoted = opening_words(example, words)
    return f'Look for the option that says "{quoted}". {nudge}' if quoted else nudge


def clean_lines(
    lines: Iterable[str], says_answer: Callable[[str], bool], limit: int, chars: int
) -> list[str]:
    """Returns the first `limit` lines without the sentences that say the answer.

    A line without final punctuation gets a full stop, so that lines can be joined.

        >>> lines = ["Add 2 and 3. That makes 5.", "Now double it"]
        >>> clean_lines(lines, lambda text: "5" in text, limit=2, chars=100)
        ['Add 2 and 3.', 'Now double it.']

    Args:
        lines: the texts to choose from, in order.
        says_answer: tells whether a sentence must not be shown.
        limit: how many lines to keep at most.
        chars: how many characters to keep at most, over all lines and the spaces that join them; a
            line is cut after a word.
    """
    kept: list[str] = []
    for line in lines:
        if len(kept) == limit or chars <= 0:
            break
        line = " ".join(part for part in sentences(line) if not says_answer(part))
        line += "." if line and line[-1] not in ".,;:!?" else ""
        if len(line) > chars:
            line = line[: chars + 1].rpartition(" ")[0].rstrip()
            chars = 0
        if line:
            kept.append(line)
        chars -= len(line) + 1
    return kept
