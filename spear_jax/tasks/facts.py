"""`facts`: the embedded multiple-choice task. Which of four wares does a trader sell?

Train and test ask about the same traders. Test phrasings are never used in training, and test
options are drawn anew. So a right answer takes the fact and not a remembered prompt. One trader in
six is old: the embedded model knows what those sell. The rest it can only learn from feedback.
"""

import random

from spear_jax.core.types import Example
from spear_jax.tasks import world
from spear_jax.tasks.base import WRONG, Answer, Task, Templates
from spear_jax.tasks.letters import extract_letter

LETTERS = ("A", "B", "C", "D")
ASKED = world.NEW_TRADERS[:32] + world.OLD_TRADERS[:6]
PER_TRADER = {"train": 90, "test": 12}


class Facts(Task):
    """The embedded multiple-choice task.

    Source: procedural, this project.
    """

    name = "facts"
    traders = ASKED
    templates = Templates(
        question="{question}\n{options}",
        # Feedback stands before the task here: a model this small reads options in the light of a
        # hint that came first, but did not learn to look back for the options once it has read the
        # hint.
        revision="Previous answer: {answer}\nAnswer the task anew, as if for the first time. "
        "{format}\n"
        "Feedback: {feedback}\nTask: {task}",
        header="Answer:",
        format="Reply with one option letter.",
    )

    def generate(self, split: str) -> list[Example]:
        """Returns all examples of a split; the same on every call."""
        phrasings = world.TRAIN_PHRASINGS if split == "train" else world.TEST_PHRASINGS
        rng = random.Random(f"facts/{split}")
        examples = []
        for turn in range(PER_TRADER[split]):
            for name in self.traders:
                question = phrasings[turn % len(phrasings)].format(name=name)
                examples.append(
                    make_example(f"{split}-{len(examples)}", question, world.WARE_OF[name], rng)
                )
        rng.shuffle(examples)
        return examples

    def example(self, row: dict, index: int) -> Example:
        raise AssertionError("facts are generated, not read from rows")

    def extract(self, text: str, example: Example) -> Answer | None:
        return extract_letter(text, example.labels)

    def hint(self, example: Example, words: int) -> str:
        return f"Think of a kind of {example.support[0]}."

    def privileged(self, example: Example) -> str:
        # The embedded model cannot read a reference. It learnt one way to take a hint: a revision
        # prompt after a wrong answer.
        wrong = next(label for label in example.labels if label != example.labels[example.gold])
        return self.revision(
            example, wrong, f"{WRONG} {self.templates.format} {self.hint(example, 3)}"
        )


class FewFacts(Facts):
    """Eight traders alone: so few that some forty answers of people teach them."""

    name = "few_facts"
    traders = ASKED[:8]


def make_example(id: str, question: str, ware: str, rng: random.Random) -> Example:
    """Returns a question about who sells `ware`, with fresh options.

    The ware's kind is its support for hints.
    """
    options, gold = world.draw_options(ware, rng)
    return Example(id, question, options, LETTERS, gold, (world.KIND_OF[ware],))
