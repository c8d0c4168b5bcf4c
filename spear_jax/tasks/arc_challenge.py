"""ARC, challenge and easy: school science questions of three to five options.

They are answered by a letter.
"""

from spear_jax.core.errors import shown
from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.files import listed
from spear_jax.tasks.hints import option_hint
from spear_jax.tasks.letters import extract_letter, letter_labels
from spear_jax.tasks.loading import cell_lines, row_error, row_options, row_text


class ArcChallenge(Task):
    """ARC-Challenge.

    Source: SPEAR (arXiv 2605.07977), experiments on ARC-Challenge; wording is ours. Departures:
      1. Options are labelled A, B, ... by position, also in the rows that the dataset labels 1 to
         4.
      2. A hint is at most all but one word of the gold option; the reference's three words can be
         all of it.
    """

    name = "arc_challenge"
    hub = ("allenai/ai2_arc", "ARC-Challenge")
    columns = ("id", "question", "choices", "answerKey")
    templates = Templates(
        question="Science question: {question}\n\n{options}\n\nPick the best option and reply "
        "with its letter only.",
        revision=REVISION,
        header="Answer:",
        format="Reply with the letter of your option and nothing else.",
    )

    def example(self, row: dict, index: int) -> Example:
        choices, key = row["choices"], row_text(row, "answerKey", index)
        if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
            raise row_error(
                index,
                f"column 'choices' holds {shown(choices)}, but lists 'text' and 'label' are needed",
            )
        options = row_options(choices["text"], index, "choices")
        names = cell_lines(choices["label"], "choices", index)
        if len(names) != len(options):
            raise row_error(index, f"{len(options)} option texts but {len(names)} option labels")
        if key not in names:
            raise row_error(
                index, f"answerKey {shown(key)} is none of the option labels {listed(names)}"
            )
        return Example(
            id=row_text(row, "id", index),
            question=row_text(row, "question", index),
            options=options,
            labels=letter_labels(len(options)),
            gold=names.index(key),
        )

    def extract(self, text: str, example: Example) -> Answer | None:
        return extract_letter(text, example.labels)

    def hint(self, example: Example, words: int) -> str:
        return option_hint(example, words, "Think about the scientific idea behind the question.")


class ArcEasy(ArcChallenge):
    """ARC-Easy: the same text rules on the easier questions."""

    name = "arc_easy"
    hub = ("allenai/ai2_arc", "ARC-Easy")
