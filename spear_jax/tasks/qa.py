"""Questions of your own with a free answer: a local file and a mapping of its column names."""

import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spear_jax.core.errors import UserError, shown
from spear_jax.core.types import Example
from spear_jax.tasks.base import MISSHAPEN, REVISION, Answer, Task, Templates
from spear_jax.tasks.hints import clean_lines, opening_words
from spear_jax.tasks.letters import MARKERS
from spear_jax.tasks.loading import cell_lines, row_error, row_text
from spear_jax.tasks.math_mcqa import numbers

ARTICLES = ("a", "an", "the")

_MARKER = re.compile(r"(?<![^\W_])answer[*_]*(?:\s+is\b[*_]*\s*:?|\s*:)", re.IGNORECASE)
_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−"), "-") | {ord("’"): "'"}
_ENDS = "\"'`*_.,;:!?…。、"  # beside all kinds of brackets and quotes
_STARTS = "\"'`*_¿¡"  # a point may start a number
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class Qa(Task):
    """Free answers from a local file, graded by comparison with one or several right texts.

    Keys of `columns` that are left out, or "", keep the names "question", "answers" and no hint.

        columns   question="q", answers="key,other"
        row       {"q": "Which city is on the Thames?", "key": "London", "other": "Greater London"}
        right     " London", "the answer is: london.", "**London**"
        neither   "It is London, of course": feedback asks for the answer alone

    A completion's answer is what its last "Answer:" or "answer is" opens, else its first line. It is
    right where it equals a right text after `normalise`. Where it holds one among other words it
    counts as not right, and is called unreadable, not wrong; unlikelihood then touches those other
    words alone.

    Source: exact match as in SQuAD (Rajpurkar et al., arXiv 1606.05250); code and wording are ours.
        Departures:
      1. Only the ends of words lose their punctuation, and only the first word may be an article
         that is left out: "3.5" is not "35", "-5" not "5", "C++" not "C", "Vitamin A" not "Vitamin".

    Args:
        columns: the file's column for each of question, answers and hint. question: a text.
            answers: one column with a text, with several texts one a line, or with a list of texts;
            or several columns parted by commas ("answer,also"), of which a row may leave some
            empty. The first is the gold answer, all others are as right. hint: optional ("" for
            none), a text or list of texts that feedback may quote from.
    Raises: UserError for an unknown key, and an empty answer column name.
    """

    name = "qa"
    mapping = {"question": "question", "answers": "answers", "hint": ""}
    templates = Templates(
        question="{question}\n\nReply with the answer alone, in a few words.",
        revision=REVISION,
        header="Answer:",
        format="Reply with the answer alone, in a few words, without a sentence around it.",
    )
    scoring = "generate"
    protected = MARKERS

    def __init__(self, columns: Mapping[str, str] | None = None, *wording: Any):
        super().__init__(columns, *wording)
        self.answer_columns = tuple(name.strip() for name in self.mapping["answers"].split(","))
        if not all(self.answer_columns):
            raise UserError(
                f"data.columns.answers {shown(self.mapping['answers'])} holds an empty name; give a "
                "column between commas."
            )
        self.columns = (self.mapping["question"], *self.answer_columns)
        self.columns += (self.mapping["hint"],) if self.mapping["hint"] else ()

    def examples(
        self,
        rows: Sequence[tuple[int, dict]],
        everything: Callable[[], list[dict]],
        where: str,
    ) -> list[Example]:
        examples = [self.example(row, index) for index, row in rows]
        lists = [x for x in examples if x.options[0].startswith("[") and x.options[0].endswith("]")]
        if lists:
            print(
                f"note: {where}: {len(lists)} answers, such as {shown(lists[0].options[0])}, look like "
                "lists, but are read as one text each: write one right text a line, or name a "
                "column for each in data.columns.answers=a,b",
                file=sys.stderr,
            )
        return examples

    def example(self, row: dict, index: int) -> Example:
        answers: dict[str, str] = {}  # by what is compared: each is kept once
        for column in self.answer_columns:
            for text in cell_lines(row[column], column, index):
                if not normalise(text):
                    raise row_error(
                        index,
                        f"answer {shown(text)} in column {column!r} is punctuation alone, of which "
                        "nothing is left to compare",
                    )
                answers.setdefault(normalise(text), text)
        if not answers:
            where = " and ".join(map(repr, self.answer_columns))
            raise row_error(index, f"column {where} has no answer, but one right text is needed")
        gold, *others = answers.values()
        hint = self.mapping["hint"]
        return Example(
            id=str(index),
            question=row_text(row, self.mapping["question"], index),
            options=(gold,),
            labels=(gold,),
            gold=0,
            support=tuple(cell_lines(row[hint], hint, index)) if hint else (),
            also_right=tuple(others),
        )

    def question(self, example: Example) -> str:
        """Returns the question without options, in any template: the only option is the answer."""
        return self.templates.question.format(question=example.question, options="")

    def extract(self, text: str, example: Example) -> Answer | None:
        """Finds the completion's answer: option 0 where it is right, MISSHAPEN where it holds a
        right text among other words, else -1; None where there is no word.
        """
        opened = [match.end() for match in _MARKER.finditer(text)]
        line = re.compile(r"[^\r\n]*\S[^\r\n]*").search(text, opened[-1] if opened else 0)
        said = _words(text, *line.span()) if line else []
        if not said:
            return None
        start, end = said[0].start, said[-1].end
        for right in _right(example):
            if _without_article([word.text for word in said]) == right:
                return Answer(0, start, end)
        for right in _right(example):
            at = _find(right, said)
            if at is None:
                continue
            before, behind = said[:at], said[at + len(right) :]
            return Answer(
                MISSHAPEN, *((start, before[-1].end) if before else (behind[0].start, end))
            )
        return Answer(-1, start, end)

    def hint(self, example: Example, words: int) -> str:
        """Returns up to three lines (300 characters) of the row's own hint.

        Without such lines it is the gold answer's first words, but never the whole of a right text.
        """
        lines = clean_lines(
            example.support, lambda text: self.leaks(text, example), limit=3, chars=300
        )
        nudge = "Read the question once more and think about what it asks for."
        start = opening_words(example, words)
        told = " ".join(lines) or (f'It begins with "{start}". {nudge}' if start else nudge)
        return nudge if self.leaks(told, example) else told

    def leaks(self, feedback: str, example: Example) -> bool:
        """Returns whether a feedback text holds any right text, as words after `normalise`, or the
        number that it is.
        """
        said = _words(feedback, 0, len(feedback))
        told = numbers(feedback)
        return any(
            _find(right, said) is not None or _number(" ".join(right)) in told
            for right in _right(example)
        )


class _Word(NamedTuple):
    """A word as it is compared, with the characters of the text that it stands for."""

    text: str
    start: int
    end: int


def normalise(text: str) -> str:
    """Returns a text as answers are compared.

    Case, kinds of dashes and white space, punctuation, quotes and brackets at the ends of words, and
    a first article are left out, and so are commas between groups of three digits.

        >>> normalise(' The  "Eiffel Tower".'), normalise("1,080"), normalise("-3.5 °C")
        ('eiffel tower', '1080', '-3.5 °c')
    """
    return " ".join(_without_article([word.text for word in _words(text, 0, len(text))]))


def _words(text: str, start: int, end: int) -> list[_Word]:
    """Returns the words of text[start:end] as they are compared, but the first article too."""
    words = []
    for match in re.compile(r"\S+").finditer(text, start, end):
        left, right = match.span()
        while left < right and _is_edge(text[right - 1], _ENDS):
            right -= 1
        while left < right and _is_edge(text[left], _STARTS):
            left += 1
        plain = unicodedata.normalize("NFKC", text[left:right]).translate(_DASHES).casefold()
        if plain:
            words.append(_Word(_GROUPS.sub("", plain), left, right))
    return words


def _is_edge(char: str, others: str) -> bool:
    return char in others or unicodedata.category(char) in ("Ps", "Pe", "Pi", "Pf")


def _without_article(words: list[str]) -> list[str]:
    """Returns words without an article that opens them; an article alone stays."""
    return words[1:] if len(words) > 1 and words[0] in ARTICLES else words


def _right(example: Example) -> list[list[str]]:
    """Returns the words of each right text."""
    texts = (example.options[0], *example.also_right)
    return [_without_article([word.text for word in _words(x, 0, len(x))]) for x in texts]


def _find(part: list[str], words: list[_Word]) -> int | None:
    """Returns where `part` first stands among words; None where it does not."""
    texts = [word.text for word in words]
    places = range(len(texts) - len(part) + 1)
    return next((at for at in places if texts[at : at + len(part)] == part), None)


def _number(text: str) -> float | None:
    """Returns the magnitude of a text that is one number."""
    return abs(float(text)) if re.fullmatch(r"[-+]?(\d+(\.\d+)?|\.\d+)", text) else None
