"""Multiple choice questions of your own: a local file and a mapping of its column names."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spear_jax.core.errors import UserError, shown
from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.hints import clean_lines, names_label, option_hint
from spear_jax.tasks.letters import extract_letter, letter_labels
from spear_jax.tasks.loading import (
    cell_lines,
    cell_number,
    cell_text,
    row_error,
    row_options,
    row_text,
)

READINGS = ("", "0", "1", "letter", "text")  # of answers: data.columns.answer_base


class Mcqa(Task):
    """Multiple choice from a local file.

    Keys of `columns` that are left out, or "", keep the names "question", "options", "answer" and
    no hint.

        columns   question="q", options="a,b,c", answer="key"
        row       {"q": "Which one floats?", "a": "rock", "b": "ice", "c": "iron", "key": "B"}
        example   options ("rock", "ice", "iron"), labels ("A", "B", "C"), gold 1

    Args:
        columns: the file's column for each of question, options, answer and hint. question: a text.
            options: one column with a list of texts, or several columns parted by commas
            ("a,b,c,d"), of which a row may leave the last ones empty. answer: an index (a whole
            number, or its text), an option's text, or an option's letter. hint: optional ("" for
            none), a text or list of texts that feedback may quote from.
            answer_base: no column, but how answers are read. "0" and "1": a whole number is an
            index that counts from there. "letter" and "text": every answer is one. "": whatever it
            fits, which must be one option; the whole file says where its indices count from.
    Raises: UserError for an unknown key, an empty option name, or an unknown reading.
    """

    name = "mcqa"
    mapping = {
        "question": "question",
        "options": "options",
        "answer": "answer",
        "hint": "",
        "answer_base": "",
    }
    templates = Templates(
        question="{question}\n\n{options}\n\nPick the best option and reply with its letter only.",
        revision=REVISION,
        header="Answer:",
        format="Reply with the letter of your option and nothing else.",
    )

    def __init__(self, columns: Mapping[str, str] | None = None, *wording: Any):
        columns = dict(columns or {})
        self.answer_base = str(columns.get("answer_base", ""))  # 0 in Python is "0"
        if self.answer_base not in READINGS:
            raise UserError(
                f"data.columns.answer_base is {shown(self.answer_base)}; it must be one of "
                f"{', '.join(READINGS[1:])}, or empty to take what fits."
            )
        super().__init__(columns, *wording)
        self.option_columns = tuple(name.strip() for name in self.mapping["options"].split(","))
        if not all(self.option_columns):
            raise UserError(
                f"mcqa options {shown(self.mapping['options'])} hold an empty name; give a column "
                f"between commas."
            )
        self.columns = (self.mapping["question"], *self.option_columns, self.mapping["answer"])
        self.columns += (self.mapping["hint"],) if self.mapping["hint"] else ()

    def examples(
        self,
        rows: Sequence[tuple[int, dict]],
        everything: Callable[[], list[dict]],
        where: str,
    ) -> list[Example]:
        base = self._base(everything(), where) if self.answer_base == "" else self._own_base()
        return [self._example(row, index, base) for index, row in rows]

    def example(self, row: dict, index: int) -> Example:
        """Turns one row into an Example; an index counts from 0 unless answer_base is "1".

        Raises: as `Task.example`.
        """
        return self._example(row, index, self._own_base())

    def extract(self, text: str, example: Example) -> Answer | None:
        return extract_letter(text, example.labels)

    def hint(self, example: Example, words: int) -> str:
        """Returns up to three lines (300 characters) of the row's own hint.

        Without such lines it is the gold option's first words.
        """

        def says_answer(text: str) -> bool:
            return self.leaks(text, example) or names_label(text, example)

        lines = clean_lines(example.support, says_answer, limit=3, chars=300)
        return " ".join(lines) or option_hint(
            example, words, "Read the question once more and compare the options."
        )

    def _example(self, row: dict, index: int, base: int) -> Example:
        options, hint = self._options(row, index), self.mapping["hint"]
        return Example(
            id=str(index),
            question=row_text(row, self.mapping["question"], index),
            options=options,
            labels=letter_labels(len(options)),
            gold=self._gold(row, options, index, base),
            support=tuple(cell_lines(row[hint], hint, index)) if hint else (),
        )

    def _options(self, row: dict, index: int) -> tuple[str, ...]:
        """Returns a row's options; of several columns, the empty ones at the end are left out."""
        column = self.mapping["options"]
        if len(self.option_columns) == 1:
            if isinstance(row[column], str):
                raise row_error(
                    index,
                    f"column {column!r} holds {shown(row[column])}, but a list of options is "
                    f"needed there, or a column for each option, named in data.columns.options as "
                    f"a,b,c,d",
                )
            return row_options(row[column], index, column)
        values = [cell_text(row[name], name, index) for name in self.option_columns]
        while values and not values[-1]:
            values.pop()
        return row_options(values, index, column)

    def _gold(self, row: dict, options: tuple[str, ...], index: int, base: int) -> int:
        """Returns the position of the option that the answer names by every reading."""
        answer = row[self.mapping["answer"]]
        text = row_text(row, self.mapping["answer"], index)
        readings = _readings(answer, text, options, self.answer_base, base)
        if len({at for _, at in readings}) == 1:
            return readings[0][1]
        if readings:
            said = ", ".join(
                f"as {how} it is option {at + 1} ({shown(options[at])})" for how, at in readings
            )
            raise row_error(
                index,
                f"answer {shown(answer)} fits more than one option: {said}. Say how answers are "
                f"read in data.columns.answer_base ({', '.join(READINGS[1:])}), or make the "
                f"options differ",
            )
        if self.answer_base in ("letter", "text"):
            problem = f"is no option's {self.answer_base}, as data.columns.answer_base asks"
        elif cell_number(answer) is not None:
            last = base + len(options) - 1
            problem = f"is no index of the {len(options)} options ({base} to {last})"
            if not self.answer_base and cell_number(answer) == last + 1:
                problem += "; if indices count from 1, set data.columns.answer_base=1"
        else:
            problem = "is neither an index, nor a letter, nor the text of an option"
        raise row_error(index, f"answer {shown(answer)} {problem}")

    def _own_base(self) -> int:
        return 1 if self.answer_base == "1" else 0

    def _base(self, rows: list[dict], where: str) -> int:
        """Returns what the file's index answers count from: 0 or 1.

        Where some index is 0, they count from 0. Else, where all answers are indices and some is
        the number of its row's options, they count from 1. Else it cannot be known: they are taken
        to count from 0. A note on stderr says so wherever no index is 0.
        """
        column = self.mapping["answer"]
        indices = [index for row in rows if (index := self._index(row))]
        if any(number == 0 for number, *_ in indices):
            return 0
        given = [row[column] for row in rows if row.get(column) not in (None, "")]
        ends = any(number == count for number, count, _ in indices)
        base = int(ends and all(cell_number(answer) is not None for answer in given))
        said = (
            "as none is 0 and some are the number of their options (data.columns.answer_base=0 reads "
            "them from 0)"
            if base
            else "though none is 0: set data.columns.answer_base=1 if they count from 1, else 0"
        )
        if any(alone for *_, alone in indices):
            print(
                f"note: {where}: the indices in column {column!r} are read as counted from {base}, "
                f"{said}",
                file=sys.stderr,
            )
        return base

    def _index(self, row: dict) -> tuple[int, int, bool] | None:
        """Returns a row's index answer, the number of its options, and whether it is no option's
        text; None where there is no such answer.
        """
        row = {**dict.fromkeys(self.columns), **row}  # the other split's file may have fewer
        answer = row[self.mapping["answer"]]
        number = cell_number(answer)
        if number is None:
            return None
        try:
            options = self._options(row, 0)
        except UserError:  # said where the row becomes an example
            return None
        return (number, len(options), str(answer).strip() not in options)


def _readings(
    answer: Any, text: str, options: tuple[str, ...], reading: str, base: int
) -> list[tuple[str, int]]:
    """Returns (how the answer can be read, the position of the option that it then names)."""
    number, labels = cell_number(answer), letter_labels(len(options))
    numbered = reading in ("0", "1") and number is not None  # then it is an index and nothing else
    found = []
    if reading != "letter" and not numbered:
        found += [("a text", at) for at, option in enumerate(options) if option == text]
    if reading != "text" and not numbered and text in labels:
        found += [("a letter", labels.index(text))]
    if reading in ("", "0", "1") and number is not None and 0 <= number - base < len(options):
        found += [(f"an index from {base}", number - base)]
    return found
