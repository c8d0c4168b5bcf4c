"""StrategyQA: yes/no questions that need several facts.

They are answered after a short chain of reasoning.
"""

from spear_jax.core.errors import shown
from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.hints import clean_lines, names_label, sentences
from spear_jax.tasks.letters import MARKERS, extract_word
from spear_jax.tasks.loading import cell_lines, cell_text, row_error, row_text

LABELS = ("yes", "no")


class StrategyQa(Task):
    """StrategyQA.

    Source: SPEAR (arXiv 2605.07977), experiments on StrategyQA; wording is ours. Departures:
      1. `facts` may be one string, as on the Hub, and is then split into sentences. The reference
         takes a string apart into characters. A string without full stops is one fact.
      2. Facts that hold a label as a word are left out of hints.
    """

    name = "strategy_qa"
    hub = ("ChilleD/StrategyQA", None)
    columns = ("qid", "question", "answer", "facts")
    templates = Templates(
        question="Question: {question}\n\nThink it through in a few sentences, then give your "
        "verdict on the "
        'last line: "Answer: yes" or "Answer: no".',
        revision=REVISION,
        header="Solution:",
        format='Reason briefly, then write your verdict after "Answer:" on the last line.',
    )
    scoring = "generate"
    answer_only = False
    protected = MARKERS

    def example(self, row: dict, index: int) -> Example:
        answer = cell_text(row["answer"], "answer", index).lower()  # a CSV file has it as a text
        if answer not in ("true", "false"):
            raise row_error(index, f"answer {shown(row['answer'])} is neither true nor false")
        facts = row["facts"]
        if not isinstance(facts, (list, tuple)):
            facts = sentences(cell_text(facts, "facts", index))
        return Example(
            id=row_text(row, "qid", index),
            question=row_text(row, "question", index),
            options=LABELS,
            labels=LABELS,
            gold=0 if answer == "true" else 1,
            support=tuple(cell_lines(facts, "facts", index)),
        )

    def response(self, example: Example) -> str:
        """Returns the facts, where there are any, and the answer line."""
        facts = (" ".join(example.support),) if example.support else ()
        return self.follow("\n".join((*facts, f"Answer: {example.labels[example.gold]}")))

    def extract(self, text: str, example: Example) -> Answer | None:
        return extract_word(text, example.labels)

    def hint(self, example: Example, words: int) -> str:
        """Returns the first max(1, F // 2) of F facts.

        `words` is not used, since an option is one word.
        """

        def says_answer(text: str) -> bool:
            return names_label(text.lower(), example)

        facts = clean_lines(
            example.support, says_answer, max(1, len(example.support) // 2), chars=1000
        )
        if not facts:
            return "Split the question into smaller questions and settle each of them first."
        return "Keep this in mind: " + " ".join(facts)
