"""MATH as multiple choice: a worked solution that ends in an answer line with a letter."""

import re

from spear_jax.core.errors import shown
from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.hints import clean_lines, names_label, option_hint
from spear_jax.tasks.letters import MARKERS, extract_letter, letter_labels
from spear_jax.tasks.loading import cell_lines, cell_number, row_error, row_options, row_text

# Every solution, right or wrong, is written with these; `spear.skip_math_ops` keeps unlikelihood
# off them.
_SIGNS = "+ - * / = < > ^ _ % & ! | ' ~ ± × ÷ · ≤ ≥ ≠ ≈ √ ∞ π °"
_BRACKETS = r"( ) [ ] { } \( \) \[ \] \{ \} $ $$ || ⟨ ⟩"
_COMMANDS = (
    r"\frac \dfrac \tfrac \sqrt \cdot \times \div \pm \mp \le \ge \leq \geq \ne \neq \approx "
    r"\equiv \sim \to "
    r"\infty \sum \prod \int \lim \log \ln \exp \sin \cos \tan \cot \sec \csc \arcsin \arccos "
    r"\arctan \max "
    r"\min \gcd \binom \pmod \left \right \text \mathrm \overline \angle \triangle \circ \boxed "
    r"\ldots \begin \end \implies \cup \cap \quad"
)
_GREEK = (
    r"\alpha \beta \gamma \delta \epsilon \theta \lambda \mu \pi \rho \sigma \tau \phi \omega "
    r"\Delta \Gamma \Theta \Sigma \Phi \Omega α β θ λ φ ω"
)
MATH_OPS = tuple(f"{_SIGNS} {_BRACKETS} {_COMMANDS} {_GREEK}".split())

_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WRAPPERS = re.compile(r"\\(?:text(?:bf)?|mathrm|left|right|displaystyle|[,!;: ])")


class MathMcqa(Task):
    """MATH-MCQA.

    Source: SPEAR (arXiv 2605.07977), experiments on MATH-MCQA; wording is ours. Departures:
      1. A hint drops the sentences that state the gold value, a label as a word, or a boxed result;
         the reference drops lines that contain the gold letter anywhere and keeps those that state
         the value.
      2. The fallback to the gold option's opening words never gives the whole option.
    """

    name = "math_mcqa"
    hub = ("stellaathena/math_mcqa", None)
    columns = ("problem", "choices", "answer", "solution")
    templates = Templates(
        question="Problem: {question}\n\n{options}\n\nSolve it step by step. On the last line, "
        "write "
        '"Answer:" and the letter of the right option.',
        revision=REVISION,
        header="Solution:",
        format='Work step by step, then write the letter of your option after "Answer:" on the '
        "last line.",
    )
    scoring = "generate"
    protected = MARKERS
    math_ops = MATH_OPS

    def example(self, row: dict, index: int) -> Example:
        options = row_options(row["choices"], index, "choices")
        answer = cell_number(row["answer"])
        if answer is None or not 0 <= answer < len(options):
            raise row_error(
                index, f"answer {shown(row['answer'])} is no index of the {len(options)} choices"
            )
        return Example(
            id=str(index),
            question=row_text(row, "problem", index),
            options=options,
            labels=letter_labels(len(options)),
            gold=answer,
            support=tuple(cell_lines(row["solution"], "solution", index)),
        )

    def response(self, example: Example) -> str:
        """Returns the solution's lines, where there are any, and the answer line."""
        return self.follow("\n".join((*example.support, f"Answer: {example.labels[example.gold]}")))

    def extract(self, text: str, example: Example) -> Answer | None:
        return extract_letter(text, example.labels)

    def hint(self, example: Example, words: int) -> str:
        """Returns up to three first solution lines (300 characters).

        Without such lines it is the gold option's first words.
        """

        def says_answer(text: str) -> bool:
            return (
                r"\boxed" in text
                or r"\fbox" in text
                or self.leaks(text, example)
                or names_label(text, example)
            )

        lines = clean_lines(example.support, says_answer, limit=3, chars=300)
        if lines:
            return "This is how it can begin: " + " ".join(lines)
        return option_hint(example, words, "Start afresh and check each step of the calculation.")

    def leaks(self, feedback: str, example: Example) -> bool:
        """Returns whether a feedback text states the gold label, option or value.

        Beside the base rule, the gold value counts in another form: "1,200" or "1200.0" for "1200",
        "three" for "3", "\\dfrac{1}{2}" for "\\frac12".
        """
        gold = example.options[example.gold]
        values = numbers(gold)
        same_value = len(values) == 1 and _is_number(gold) and bool(values & numbers(feedback))
        flat = rf"(?<!\w){re.escape(_flatten(gold))}(?!\w)"
        return (
            super().leaks(feedback, example)
            or same_value
            or bool(re.search(flat, _flatten(feedback)))
        )


def numbers(text: str) -> set[float]:
    """Returns the magnitudes of all numbers in a text, in digits or as words up to ten.

    Signs and commas between digits are dropped:

        >>> sorted(numbers("Three of 1,200 cost -4.5"))
        [3.0, 4.5, 1200.0]
    """
    digits = re.findall(
        r"\d+(?:\.\d+)?|\.\d+", re.sub(r"(?<=\d)(?:,|\{,\}|\\!)+(?=\d{3})", "", text)
    )
    words = set(re.findall(r"[a-z]+", text.lower()))
    return {float(number) for number in digits} | {
        float(_COUNTS.index(word)) for word in words & set(_COUNTS)
    }


def _is_number(text: str) -> bool:
    """Returns whether an option is one number.

    It may have a sign, a currency, percent or degree mark.
    """
    text = re.sub(r"\\[,!]|\{,\}|\^\\circ|[\s$\\%,°€£+-]", "", text)
    return text.lower() in _COUNTS or bool(re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", text))


def _flatten(text: str) -> str:
    """Returns a LaTeX text without the marks that do not change its value.

    These are braces, dollar signs, wrappers, and spaces other than those between two words.
    """
    text = re.sub(r"\\[dt]frac", r"\\frac", _WRAPPERS.sub("", text))
    text = re.sub(r"[{}$]", "", text)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text).casefold()
