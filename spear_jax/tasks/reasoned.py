"""`reasoned`: the embedded task with a reasoned answer. Does a trader sell something of a kind?

The completion recalls what the trader sells, names its kind, and ends in an answer line: the shape
of StrategyQA. Feedback hints the first half of the facts, here what the trader sells. Evaluated by
greedy generation.
"""

import random
import re

from spear_jax.core.types import Example
from spear_jax.tasks import world
from spear_jax.tasks.base import WRONG, Answer, Task, Templates

ASKED = world.NEW_TRADERS[:24] + world.OLD_TRADERS[:8]
PER_TRADER = {"train": 16, "test": 6}
PHRASINGS = {
    "train": (
        "Does {name} sell some kind of {kind}?",
        "Is the ware of {name} a kind of {kind}?",
        "Could you buy a kind of {kind} from {name}?",
    ),
    "test": ("Would you find a kind of {kind} on the stall of {name}?",),
}
ALL_PHRASINGS = PHRASINGS["train"] + PHRASINGS["test"]
_MARKED = re.compile(r"(?<!\w)Answer:\s*(yes|no)(?!\w)")


class Reasoned(Task):
    """The embedded task with a reasoned answer.

    Source: procedural, this project.
    """

    name = "reasoned"
    scoring = "generate"
    answer_only = False
    protected = ("Answer:", " Answer:", "Answer", " Answer")
    templates = Templates(
        question="{question}",
        revision="Task: {task}\nPrevious answer: {answer}\nFeedback: {feedback}\n"
        "Answer the task anew, as if for the first time. {format}",
        header="Solution:",
        format="Give the facts, then the answer line.",
    )

    def generate(self, split: str) -> list[Example]:
        """Returns all examples of a split; the same on every call.

        Yes and no are equally frequent.
        """
        rng = random.Random(f"reasoned/{split}")
        examples = []
        for turn in range(PER_TRADER[split]):
            for name in ASKED:
                phrasing = PHRASINGS[split][turn % len(PHRASINGS[split])]
                id = f"{split}-{len(examples)}"
                examples.append(
                    make_example(id, phrasing, name, world.WARE_OF[name], turn % 2 == 0, rng)
                )
        rng.shuffle(examples)
        return examples

    def example(self, row: dict, index: int) -> Example:
        raise AssertionError("reasoned is generated, not read from rows")

    def extract(self, text: str, example: Example) -> Answer | None:
        matches = list(_MARKED.finditer(text))
        if not matches:
            return None
        return Answer(example.labels.index(matches[-1].group(1)), *matches[-1].span(1))

    def hint(self, example: Example, words: int) -> str:
        return " ".join(example.support[: max(1, len(example.support) // 2)])

    def response(self, example: Example) -> str:
        return solution(example)

    def privileged(self, example: Example) -> str:
        # As in `facts`, down to the hint: with both facts, the embedded model answers no better
        # than without any.
        name, ware = example.support[0].rstrip(".").split(" sells ")
        other = next(other for other in world.WARES if other != ware)
        wrong = f"{name} sells {other}. That is a kind of {world.KIND_OF[other]}. Answer: {example.labels[1 - example.gold]}"
        return self.revision(
            example, wrong, f"{WRONG} {self.templates.format} {self.hint(example, 3)}"
        )


def make_example(
    id: str, phrasing: str, name: str, ware: str, truth: bool, rng: random.Random
) -> Example:
    """Returns a yes-or-no question whose support is the two facts that decide it."""
    kind = world.KIND_OF[ware]
    asked = kind if truth else rng.choice([other for other in world.KINDS if other != kind])
    facts = (f"{name} sells {ware}.", f"That is a kind of {kind}.")
    return Example(
        id,
        phrasing.format(name=name, kind=asked),
        ("yes", "no"),
        ("yes", "no"),
        int(not truth),
        facts,
    )


def solution(example: Example) -> str:
    """Returns the reasoned completion that pretraining teaches for a known trader."""
    return f" {' '.join(example.support)} Answer: {example.labels[example.gold]}"
