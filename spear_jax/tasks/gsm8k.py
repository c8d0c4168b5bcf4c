"""GSM8K: grade-school word problems with worked solutions.

A solution ends in "#### " and a number.
"""

import re
from decimal import Decimal

from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.hints import clean_lines
from spear_jax.tasks.loading import row_error, row_text
from spear_jax.tasks.math_mcqa import MATH_OPS, numbers

# A minus is a sign only where it does not subtract: not behind a digit, a letter or a closing
# bracket. Groups of three digits may be parted by commas; a full stop belongs to the number only
# before a further digit. "#### 2. Add them up" is a numbered heading, not an answer.
_NUMBER = r"(?P<sign>(?<![\w)\]}])[-−])?\\?\$?(?P<digits>\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)"
_ANY = re.compile(_NUMBER)
_MARKED = re.compile(rf"####[\s*$]*{_NUMBER}(?![\d.,]*(?:\d|[.)][ \t]+\S))")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Gsm8k(Task):
    """GSM8K. An example's only option, and its label, is the right number.

    Source: Cobbe et al. (arXiv 2110.14168); wording is ours. Departures:
      1. The calculator's marks ("<<48/2=24>>") are removed from solutions: here no calculator reads
         them.
      2. The last "#### " that a number follows gives the answer. A completion without one is read
         at its last number, so that a model which does not know the mark is graded by its last
         words.
      3. Numbers are compared by value: "$1,080.00." is 1080.
    """

    name = "gsm8k"
    hub = ("openai/gsm8k", "main")
    columns = ("question", "answer")
    templates = Templates(
        question='Problem: {question}\n\nSolve it step by step. On the last line, write "####" '
        "and the final number.",
        revision=REVISION,
        header="Solution:",
        format='Work step by step, then write the final number after "####" on the last line.',
    )
    scoring = "generate"
    protected = ("####", " ####", "\n####", "#### ", "\n#### ")
    math_ops = MATH_OPS

    def example(self, row: dict, index: int) -> Example:
        text = _CALCULATOR.sub("", row_text(row, "answer", index))
        solution, mark, last = text.rpartition("####")
        match = _ANY.fullmatch(last.strip())
        if not mark or match is None:
            raise row_error(
                index,
                f"column 'answer' ends in {text[-40:]!r}, but '#### ' and one number must end it",
            )
        number = f"{_value(match):f}"
        lines = tuple(line.strip() for line in solution.splitlines() if line.strip())
        return Example(
            id=str(index),
            question=row_text(row, "question", index),
            options=(number,),
            labels=(number,),
            gold=0,
            support=lines,
            response=self.follow("\n".join((*lines, f"#### {last.strip()}"))),
        )

    def question(self, example: Example) -> str:
        """Returns the question without options, in any template: the only option is the answer."""
        return self.templates.question.format(question=example.question, options="")

    def extract(self, text: str, example: Example) -> Answer | None:
        """Finds the completion's number: option 0 where it is the right one, else -1.

        -1 is no option.
        """
        matches = [*_MARKED.finditer(text)] or [*_ANY.finditer(text)]
        if not matches:
            return None
        last = matches[-1]
        right = _value(last) == Decimal(example.options[0])
        return Answer(
            0 if right else -1, last.start("sign" if last["sign"] else "digits"), last.end("digits")
        )

    def hint(self, example: Example, words: int) -> str:
        """Returns up to three first solution lines (300 characters) without the right number."""
        lines = clean_lines(
            example.support, lambda text: self.leaks(text, example), limit=3, chars=300
        )
        if lines:
            return "This is how it can begin: " + " ".join(lines)
        return "Start afresh and check each step of the calculation."

    def leaks(self, feedback: str, example: Example) -> bool:
        """Returns whether a feedback text holds the right number, whatever its sign.

        Digits count, and words up to ten.
        """
        return abs(float(example.options[0])) in numbers(feedback)


def _value(match: re.Match) -> Decimal:
    """Returns the number that was matched."""
    return Decimal(("-" if match["sign"] else "") + match["digits"].replace(",", ""))
