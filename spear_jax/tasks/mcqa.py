"""Multiple choice questions of your own: a local file and a mapping of its column names."""

from collections.abc import Mapping
from typing import Any

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.hints import clean_lines, names_label, option_hint
from spear_jax.tasks.letters import extract_letter, letter_labels
from spear_jax.tasks.loading import row_error, row_options, row_text


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
            ("a,b,c,d"). answer: an integer (index from 0), an option's text, or an option's letter.
            hint: optional ("" for none), a text or list of texts that feedback may quote from.
    Raises: UserError for an unknown key or an empty option name.
    """

    name = "mcqa"
    mapping = {"question": "question", "options": "options", "answer": "answer", "hint": ""}
    templates = Templates(
        question="{question}\n\n{options}\n\nPick the best option and reply with its letter only.",
        revision=REVISION,
        header="Answer:",
        format="Reply with the letter of your option and nothing else.",
    )

    def __init__(self, columns: Mapping[str, str] | None = None, *wording: Any):
        super().__init__(columns, *wording)
        self.option_columns = tuple(name.strip() for name in self.mapping["options"].split(","))
        if not all(self.option_columns):
            raise UserError(
                f"mcqa options {self.mapping['options']!r} hold an empty name; give a column "
                f"between commas."
            )
        self.columns = (self.mapping["question"], *self.option_columns, self.mapping["answer"])
        self.columns += (self.mapping["hint"],) if self.mapping["hint"] else ()

    def example(self, row: dict, index: int) -> Example:
        many = len(self.option_columns) > 1
        values = (
            [row[name] for name in self.option_columns] if many else row[self.option_columns[0]]
        )
        options = row_options(values, index, self.mapping["options"])
        hint = (row[self.mapping["hint"]] or ()) if self.mapping["hint"] else ()
        hint = hint.splitlines() if isinstance(hint, str) else [str(line) for line in hint]
        return Example(
            id=str(index),
            question=row_text(row, self.mapping["question"], index),
            options=options,
            labels=letter_labels(len(options)),
            gold=_gold(row[self.mapping["answer"]], options, index),
            support=tuple(line.strip() for line in hint if line.strip()),
        )

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


def _gold(answer: object, options: tuple[str, ...], index: int) -> int:
    """Returns the index that an answer names: an integer, an option's text, or a letter."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(options):
            return answer
        raise row_error(
            index,
            f"answer {answer} is no index of the {len(options)} options (0 to {len(options) - 1})",
        )
    text, labels = str(answer).strip(), letter_labels(len(options))
    named = {i for i, option in enumerate(options) if option == text}
    named |= {labels.index(text)} if text in labels else set()
    if len(named) > 1:
        raise row_error(index, f"answer {text!r} fits more than one option (as text or as letter)")
    if not named:
        raise row_error(
            index, f"answer {text!r} is neither an index, nor a letter, nor the text of an option"
        )
    return named.pop()
