"""Tasks: where their rows come from, how a question is asked, and how answers are read and graded."""

import abc
import dataclasses
import re
import string
from collections.abc import Callable, Mapping, Sequence

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.types import Example

# The revision prompt of every task; a task's own answer form enters through {format}.
REVISION = """TASK
{task}

PREVIOUS ANSWER
{answer}

FEEDBACK
{feedback}

INSTRUCTIONS
Answer the task as if for the first time. Do not mention the feedback or the previous answer. \
Begin at once, without preamble. {format}"""

# An OPSD teacher reads this before the task. The answer comes last, so that it stays where the
# start has to be cut.
PRIVILEGED = """REFERENCE
{support}Right answer: {answer}

The reference is yours alone. Answer the task below as if you had not seen it.

"""
PRIVILEGED_CHARS = 2000

# How the oracle opens on a wrong answer; the embedded tasks' teacher prompts repeat it, since their
# model learnt it.
WRONG = "That answer is wrong. Do not repeat your previous choice."

MISSHAPEN = -2  # Answer.option where a right text stands among words that should not be there


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer in a completion's text: the option's index and its label's span in characters.

    In "Answer: (C) heat" it is option 2, characters 9 to 10: `Answer(option=2, start=9, end=10)`.
    Where answers are free, -1 is a wrong one, and MISSHAPEN one that holds a right text among other
    words: the span is then of those words.
    """

    option: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Templates:
    """The wording of one task; each can be replaced from `config.data.templates`.

    Attributes:
        question: fields {question} and {options} (one option a line, "A. text").
        revision: fields {task} (the question as asked), {answer} (the previous completion),
            {feedback}.
        header: the text that the completion continues; it ends without a space, so that answers
            start with one. An empty header leaves the turn to the completion, which then starts
            without a space.
        format: one sentence that states the answer's form without naming a label; for feedback and
            revisions.
    """

    question: str
    revision: str
    header: str
    format: str


class Task(abc.ABC):
    """One dataset with all its text rules.

    Class attributes:
        name: the key in TASKS.
        hub: (dataset id, config name or None), or None for a task without a Hub home.
        splits: the Hub's names of our "train" and "test".
        columns: column names that a local file must have.
        mapping: the keys of config.data.columns that the task reads, with its own column names; {}
            where columns are fixed.
        templates: the default wording.
        scoring: "choice" (evaluated by the log-likelihood of the label after the header),
            "generate" (by grading a greedy completion), or "likelihood" (by the gold response's
            tokens; such a task is never graded).
        answer_only: whether unlikelihood is restricted to the answer's own tokens (SPEAR's
            answer-only mode).
        protected: strings whose tokens unlikelihood never touches (variants of the answer marker).
        math_ops: further strings to protect when `spear.skip_math_ops` is on (operators, LaTeX
            commands).
    """

    name: str
    hub: tuple[str, str | None] | None = None
    splits: dict[str, str] = {"train": "train", "test": "test"}
    columns: tuple[str, ...] = ()
    mapping: Mapping[str, str] = {}
    templates: Templates
    scoring: str = "choice"
    answer_only: bool = True
    protected: tuple[str, ...] = ()
    math_ops: tuple[str, ...] = ()

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        extract: Callable[[str, Example], Answer | None] | None = None,
    ):
        """Builds the task.

        Args:
            columns: the file's column for keys of `mapping`; "" and keys left out keep the task's
                own names.
            templates: wording in place of the task's own, by field of `Templates`; "" keeps it.
            extract: an extractor in place of the task's own.
        Raises: UserError for a named column that the task does not read, and for a template that
            could not be filled in.
        """
        given = {key: column for key, column in (columns or {}).items() if column}
        for key in given:
            if self.mapping and key not in self.mapping:
                raise unknown(f"{self.name} column key", key, self.mapping)
            if not self.mapping:
                raise UserError(
                    f"data.columns.{key} is {given[key]!r}, but the columns of task {self.name!r} "
                    f"are fixed ({', '.join(self.columns) or 'none'}). Leave it empty, or use a "
                    "task that maps columns, such as 'mcqa'."
                )
        self.mapping = {**self.mapping, **given}
        self.columns = self.columns or tuple(self.mapping.values())
        wording = {key: text for key, text in (templates or {}).items() if text}
        for key, text in wording.items():
            check_template(key, text)
        self.templates = dataclasses.replace(self.templates, **wording)
        if extract is not None:
            self.extract = extract  # type: ignore[method-assign, assignment] # one extractor for grading, feedback and loss masks alike

    @abc.abstractmethod
    def example(self, row: dict, index: int) -> Example:
        """Turns one dataset row into an Example.

        Raises: UserError naming the row and the rule that it breaks.
        """

    def examples(
        self,
        rows: Sequence[tuple[int, dict]],
        everything: Callable[[], list[dict]],
        where: str,
    ) -> list[Example]:
        """Turns the rows of a split into examples, by `example` unless a task reads them together.

        Args:
            rows: (index in the source, row) of the rows that become examples.
            everything: returns all rows of the source, of both splits.
            where: names the split and its source, for notes.
        Raises: as `example`.
        """
        return [self.example(row, index) for index, row in rows]

    def needed(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Returns the columns that a table must have. Args: columns: those that it has."""
        return self.columns

    @abc.abstractmethod
    def extract(self, text: str, example: Example) -> Answer | None:
        """Finds the answer in a completion.

        It is the one extractor, for grading, feedback and loss masks alike.
        """

    @abc.abstractmethod
    def hint(self, example: Example, words: int) -> str:
        """Returns one hint sentence towards the right option.

        It holds neither the gold label nor the whole gold option.
        """

    def generate(self, split: str) -> list[Example] | None:
        """Returns all examples of a split of a procedural task; None for a task that reads rows."""
        return None

    def well_formed(self, text: str, example: Example) -> bool:
        """Returns whether the completion has the asked form.

        The answer ends it. Where only a label is asked for, the label is all of it.
        """
        answer = self.extract(text, example)
        if answer is None or text[answer.end :].strip(" .\n"):
            return False
        return self.scoring == "generate" or not text[: answer.start].strip()

    def question(self, example: Example) -> str:
        """Returns the question as asked, without the header."""
        options = "\n".join(
            f"{label}. {text}" for label, text in zip(example.labels, example.options, strict=True)
        )
        return self.templates.question.format(question=example.question, options=options)

    def revision(self, example: Example, answer: str, feedback: str) -> str:
        """Returns the revision prompt, without the header.

        An empty previous answer shows as "(empty)".
        """
        return self.templates.revision.format(
            task=self.question(example),
            answer=answer.strip() or "(empty)",
            feedback=feedback,
            format=self.templates.format,
        )

    def response(self, example: Example) -> str:
        """Returns the gold completion's text as it continues the header.

        It is the example's own, else the gold label.
        """
        return example.response or self.follow(example.labels[example.gold])

    def follow(self, text: str) -> str:
        """Returns a text as it continues the header: behind a space where there is a header."""
        return f" {text}" if self.templates.header else text

    def privileged(self, example: Example) -> str:
        """Returns the question of an OPSD teacher, without the header.

        At most 2000 characters of all support and the gold answer come first, then the question as
        asked. Where they are longer, the end of the support is cut, then the end of the answer.

        Source: the OPSD baseline published with SPEAR (arXiv 2605.07977); wording is ours.
        """
        answer = self.response(example).strip()
        if example.options:
            label, option = example.labels[example.gold], example.options[example.gold]
            answer = label if label == option else f"{label}. {option}"
        limit = PRIVILEGED_CHARS - len(PRIVILEGED.format(support="", answer=""))
        answer = answer[:limit]
        support = "\n".join(example.support)[: max(0, limit - len(answer) - 1)]
        return PRIVILEGED.format(support=support and f"{support}\n", answer=answer) + self.question(
            example
        )

    def grade(self, text: str, example: Example) -> bool:
        """Returns whether the completion's answer is the right one."""
        answer = self.extract(text, example)
        return answer is not None and answer.option == example.gold

    def leaks(self, feedback: str, example: Example) -> bool:
        """Returns whether a feedback text states the gold label or the whole gold option.

        The label counts as a word, with its case. The option is compared without case, runs of
        white space and final punctuation.
        """
        label = re.search(rf"(?<!\w){re.escape(example.labels[example.gold])}(?!\w)", feedback)
        gold = " ".join(example.options[example.gold].split())
        gold = gold.rstrip(".,;:!?") or gold
        said = " ".join(feedback.split())
        option = (
            re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", said, re.IGNORECASE) if gold else None
        )
        return bool(label or option)


# The fields that each template may use, and those that it must.
_FIELDS = {
    "question": ({"question": "", "options": ""}, ("question",)),
    "revision": ({"task": "", "answer": "", "feedback": "", "format": ""}, ("task", "feedback")),
}


def check_template(key: str, text: str) -> None:
    """Raises UserError for a template that would fail, or lose its content, when it is filled in."""
    known = [field.name for field in dataclasses.fields(Templates)]
    if key not in known:
        raise unknown("template", key, known)
    if key == "header" and text != text.rstrip():
        raise UserError(
            f"template 'header' {shown(text)} ends in white space; end it with a mark such as 'Answer:'."
        )
    if key not in _FIELDS:
        return
    fields, needed = _FIELDS[key]
    names = ", ".join(f"{{{field}}}" for field in fields)
    rule = f"it may use {names}, as they stand here; other braces are doubled."
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:  # a brace without its other half
        raise UserError(f"template {key!r} is {shown(text)} ({error}); {rule}") from error
    for _, field, form, conversion in parts:
        if field is not None and (field not in fields or form or conversion):
            whole = (
                f"{{{field}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
            )
            raise UserError(f"template {key!r} has the field {shown(whole)}; {rule}")
    for field in needed:
        if f"{{{field}}}" not in text:
            raise UserError(
                f"template {key!r} lacks {{{field}}}; add it, or the model never sees that text."
            )
