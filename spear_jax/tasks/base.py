"""What a task is: where its rows come from, how a question is asked, and an answer read and graded."""

import abc
import dataclasses
import re

from spear_jax.types import Example

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


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer found in a completion's text: the option's index and the character span of its label."""

    option: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Templates:
    """The wording of one task; each can be replaced from `config.data.templates`.

    Attributes:
        question: fields {question} and {options} (one option a line, "A. text").
        revision: fields {task} (the question as asked), {answer} (the previous completion), {feedback}.
        header: what the completion continues; ends without a space, so that answers start with one.
        format: one sentence that states the answer's form without naming a label; for feedback and revisions.
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
        templates: the default wording.
        scoring: "choice" (evaluated by the log-likelihood of the label after the header) or "generate".
        answer_only: whether unlikelihood is restricted to the answer's own tokens (SPEAR's answer-only mode).
        protected: strings whose tokens unlikelihood never touches (variants of the answer marker).
        math_ops: further strings to protect when `ul_skip_math_ops` is on (operators, LaTeX commands).
    """

    name: str
    hub: tuple[str, str | None] | None = None
    splits: dict[str, str] = {"train": "train", "test": "test"}
    columns: tuple[str, ...] = ()
    templates: Templates
    scoring: str = "choice"
    answer_only: bool = True
    protected: tuple[str, ...] = ()
    math_ops: tuple[str, ...] = ()

    @abc.abstractmethod
    def example(self, row: dict, index: int) -> Example:
        """Turns one dataset row into an Example; raises UserError naming the row and the rule it breaks."""

    @abc.abstractmethod
    def extract(self, text: str, example: Example) -> Answer | None:
        """Finds the answer in a completion: the one extractor, for grading, feedback and loss masks alike."""

    @abc.abstractmethod
    def hint(self, example: Example, words: int) -> str:
        """One hint sentence towards the right option; never the gold label, never the whole gold option."""

    def generate(self, split: str) -> list[Example] | None:
        """All examples of a split, for a procedural task; None for one that is read from rows."""
        return None

    def well_formed(self, text: str, example: Example) -> bool:
        """Whether the completion has the asked form: the answer ends it and, where only a label is asked for, is all of it."""
        found = self.extract(text, example)
        if found is None or text[found.end :].strip(" .\n"):
            return False
        return self.scoring == "generate" or not text[: found.start].strip()

    def question(self, example: Example) -> str:
        """The question as asked, without the header."""
        options = "\n".join(f"{label}. {text}" for label, text in zip(example.labels, example.options, strict=True))
        return self.templates.question.format(question=example.question, options=options)

    def revision(self, example: Example, answer: str, feedback: str) -> str:
        """The revision prompt, without the header; an empty previous answer shows as "(empty)"."""
        return self.templates.revision.format(
            task=self.question(example),
            answer=answer.strip() or "(empty)",
            feedback=feedback,
            format=self.templates.format,
        )

    def grade(self, text: str, example: Example) -> bool:
        """Whether the completion's answer is the right one."""
        found = self.extract(text, example)
        return found is not None and found.option == example.gold

    def leaks(self, feedback: str, example: Example) -> bool:
        """Whether a feedback text states the gold label (as a word, case-sensitive) or the whole gold option.

        The option is compared without case, runs of white space and final punctuation.
        """
        label = re.search(rf"(?<!\w){re.escape(example.labels[example.gold])}(?!\w)", feedback)
        gold = " ".join(example.options[example.gold].split())
        gold = gold.rstrip(".,;:!?") or gold
        said = " ".join(feedback.split())
        option = re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", said, re.IGNORECASE) if gold else None
        return bool(label or option)
