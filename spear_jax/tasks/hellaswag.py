"""HellaSwag: which of four endings continues a scene or a how-to text?

It is answered by the letter alone.
"""

import re

from spear_jax.core.errors import shown
from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.hints import option_hint
from spear_jax.tasks.letters import extract_letter, letter_labels
from spear_jax.tasks.loading import cell_number, row_error, row_options, row_text


def strip_markers(text: str) -> str:
    """Removes the layout marks [header], [title], [step], [substeps] of how-to texts.

    A [title] begins a new sentence, so a full stop is set before it where punctuation is missing.
    """
    text = re.sub(r"(?<=[^\s.!?:;,])\s*\[title\]", ".", text.strip())
    text = re.sub(r"\[(?:header|title|step|substeps)\]", " ", text)
    return " ".join(text.split())


class HellaSwag(Task):
    """HellaSwag; its labelled test data is the Hub's "validation".

    Source: SPEAR (arXiv 2605.07977), experiments on HellaSwag; wording is ours. Departures:
      1. Layout marks of how-to texts are removed from contexts and endings.
      2. A hint is at most all but one word of the gold ending.
    """

    name = "hellaswag"
    hub = ("Rowan/hellaswag", None)
    splits = {"train": "train", "test": "validation"}
    columns = ("activity_label", "ctx", "endings", "label")
    templates = Templates(
        question="{question} ...\n\nWhich ending continues this text best?\n\n{options}\n\n"
        "Reply with the letter of the ending only.",
        revision=REVISION,
        header="Answer:",
        format="Reply with the letter of your ending and nothing else.",
    )

    def example(self, row: dict, index: int) -> Example:
        endings = row_options(row["endings"], index, "endings")
        endings = row_options([strip_markers(ending) for ending in endings], index, "endings")
        label = cell_number(row["label"])  # a string on the Hub
        if label is None or not 0 <= label < len(endings):
            raise row_error(
                index, f"label {shown(row['label'])} is no index of the {len(endings)} endings"
            )
        topic = row_text(row, "activity_label", index)
        return Example(
            id=str(index),  # the dataset's own `ind` repeats
            question=f"{topic}: {strip_markers(row_text(row, 'ctx', index))}",
            options=endings,
            labels=letter_labels(len(endings)),
            gold=label,
        )

    def extract(self, text: str, example: Example) -> Answer | None:
        return extract_letter(text, example.labels)

    def hint(self, example: Example, words: int) -> str:
        return option_hint(example, words, "Think about what happens next in the scene.")
