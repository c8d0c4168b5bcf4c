"""Free answers: which columns hold right texts, what is compared, and what feedback may say."""

import random
import re
import string

import numpy as np
import pytest

from spear_jax.core.errors import UserError
from spear_jax.feedback.base import Request
from spear_jax.feedback.registry import get_feedback
from spear_jax.tasks import get_task
from spear_jax.tasks.base import MISSHAPEN
from spear_jax.tasks.loading import load_examples
from spear_jax.tasks.qa import normalise

TASK = get_task("qa")


def asked(*right, **more):
    return TASK.example({"question": "Which?", "answers": list(right), **more}, 0)


def read(tmp_path, text, **columns):
    """The examples of a CSV file, of both splits."""
    file = tmp_path / "questions.csv"
    file.write_text(text, encoding="utf-8")
    task = get_task("qa", columns=columns)
    return sorted(
        (
            example
            for split in ("train", "test")
            for example in load_examples(task, split, str(file))
        ),
        key=lambda example: int(example.id),
    )


ROWS = "".join(f"Who is {i}?,nobody,\n" for i in range(1, 12))  # so that both splits have rows


# --- columns ---


def test_right_texts_come_one_a_line_from_a_list_or_from_columns_of_their_own(tmp_path):
    first, *_ = read(tmp_path, 'question,answers,x\n"Where?","Paris\nin Paris",\n' + ROWS)
    assert (first.options, first.labels, first.gold) == (("Paris",), ("Paris",), 0)
    assert first.also_right == ("in Paris",)
    first, second, *_ = read(
        tmp_path,
        "question,key,also\nWhere?,Paris,in Paris\nWho?,,Ann\n" + ROWS,
        answers="key, also",
    )
    assert (first.options, first.also_right) == (("Paris",), ("in Paris",))
    assert (second.options, second.also_right) == (("Ann",), ())
    listed = asked("Paris", "in Paris", "paris.", "")
    assert (listed.options, listed.also_right) == (("Paris",), ("in Paris",))


def test_the_gold_response_follows_the_header():
    assert TASK.response(asked("Paris", "in Paris")) == " Paris"
    assert "Paris" not in TASK.question(asked("Paris"))
    shown = get_task("qa", templates={"question": "{question} {options}"})
    assert "Paris" not in shown.question(asked("Paris"))


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"question": "Which?", "answers": ""}, "column 'answers' has no answer"),
        ({"question": "Which?", "answers": []}, "column 'answers' has no answer"),
        ({"question": "Which?", "answers": "..."}, "answer '...' in column 'answers' is punct"),
        ({"question": "", "answers": "x"}, "column 'question' is empty"),
        ({"question": "Which?", "answers": {"text": ["x"]}}, "column 'answers' holds"),
        ({"question": "Which?", "answers": [["x"]]}, "column 'answers' holds"),
    ],
)
def test_a_row_that_breaks_a_rule_is_named(row, problem):
    with pytest.raises(UserError, match=f"row 31: {re.escape(problem)}.*never skipped"):
        TASK.example(row, 31)


def test_a_missing_column_is_named_with_its_flag(tmp_path):
    with pytest.raises(
        UserError,
        match=r"'answers' is missing.*Columns there: question, answer\..*"
        r"--config\.data\.columns\.answers=COLUMN",
    ):
        read(tmp_path, "question,answer\nWhere?,Paris\n")
    with pytest.raises(UserError, match="holds an empty name"):
        get_task("qa", columns={"answers": "a,,b"})


def test_a_list_written_as_a_text_is_said(tmp_path, capsys):
    first, *_ = read(tmp_path, "question,answers,x\nWhere?,['Paris'],\n" + ROWS)
    assert first.options == ("['Paris']",)
    assert "1 answers, such as \"['Paris']\", look like lists" in capsys.readouterr().err


# --- grading ---


@pytest.mark.parametrize(
    "one, other",
    [
        ("Paris", "  paris. "),
        ("The Eiffel Tower", "“eiffel  tower”"),
        ("1,080", "1080"),
        ("it’s", "It's"),
        ("10–12", "10-12"),
        ("Ａ１", "a1"),
        ("A", "a"),
        ("(42)", "**42**"),
        ("São Paulo", "são paulo!"),
        ("San\u00a0Marino", "san marino"),
    ],
)
def test_what_is_left_out_of_the_comparison(one, other):
    assert normalise(one) == normalise(other) != ""


@pytest.mark.parametrize(
    "one, other",
    [
        ("3.5", "35"),
        (".5", "5"),
        ("-5", "5"),
        ("C++", "C"),
        ("C#", "C"),
        ("Vitamin A", "Vitamin"),
        ("5 %", "5"),
        ("$5", "5"),
        ("1,08", "108"),
        ("resume", "résumé"),
        ("May 5", "May"),
    ],
)
def test_what_stays_in_the_comparison(one, other):
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize(
    "text, option, span",
    [
        (" Paris", 0, "Paris"),
        ("**Paris**.", 0, "Paris"),
        (" In Paris\n\nThat is in France.", 0, "In Paris"),
        ("\nI think of France.\nAnswer: Paris", 0, "Paris"),
        ("Answer: Rome? No, the answer is: paris", 0, "paris"),
        ("Answer:\n\nParis", 0, "Paris"),
        (" Rome.", -1, "Rome"),
        ("Parisian", -1, "Parisian"),
        ("Answer: Paris\nAnswer: Rome", -1, "Rome"),
        (" It is Paris, of course", MISSHAPEN, "It is"),
        ("Paris is the one", MISSHAPEN, "is the one"),
    ],
)
def test_the_answer_of_a_completion(text, option, span):
    answer = TASK.extract(text, asked("Paris", "in Paris"))
    assert (answer.option, text[answer.start : answer.end]) == (option, span)
    assert TASK.grade(text, asked("Paris", "in Paris")) == (option == 0)


@pytest.mark.parametrize("text", ["", "  \n ", "...", "Answer:", "**"])
def test_a_completion_without_a_word_has_no_answer(text):
    assert TASK.extract(text, asked("Paris")) is None


def test_dressed_right_texts_are_right_and_spans_lie_in_the_text():
    draw = random.Random(0)
    alphabet = string.ascii_letters + string.digits + "äßéñ漢ж-+%$.'"
    for _ in range(500):
        word = "".join(draw.choices(alphabet, k=draw.randint(1, 8))) + draw.choice("xyz7")
        more = "".join(draw.choices(string.ascii_letters, k=5))
        example = asked(word, f"{word} {more}")
        for right in (word, f"{word} {more}"):
            dressed = draw.choice(["{}", "The {}", " {}.", '"{}"', "**{}**!", "Answer: {}\nor"])
            text = dressed.format(draw.choice([right, right.upper(), f" {right} "]))
            if "ß" in text and right.upper() in text:
                continue  # "SS" is its upper case, and so it is compared
            answer = TASK.extract(text, example)
            assert answer.option == 0, (right, text)
            assert normalise(text[answer.start : answer.end]) == normalise(right)
        assert TASK.extract(f"{word}q", example).option == -1


# --- feedback ---


def test_a_right_text_among_others_is_called_unreadable_and_not_wrong():
    oracle = get_feedback("oracle", TASK, 3)
    ours, wrong, right = oracle(
        [Request(asked("Paris"), text, 1) for text in ("It is Paris", "Rome", "paris")]
    )
    assert "cannot be read" in ours and "wrong" not in ours and "Paris" not in ours
    assert "wrong" in wrong and "Do not repeat" in wrong
    assert right is None


def test_hints_come_from_the_row_else_from_the_first_words():
    own = get_task("qa", columns={"hint": "why"})
    row = {"question": "Which?", "answers": ["Lake Geneva", "Lac Leman"]}
    told = own.hint(own.example(row | {"why": "It is wet. It is lake  geneva. It is deep."}, 0), 3)
    assert told == "It is wet. It is deep."
    assert '"Lake"' in own.hint(own.example(row | {"why": ""}, 0), 3)
    assert "Lake" not in own.hint(own.example(row | {"why": ""}, 0), 0)
    # the first words are a right text themselves
    both = {"question": "Which?", "answers": ["Lake Geneva", "lake"], "why": ""}
    assert "Lake" not in own.hint(own.example(both, 0), 3)


@pytest.mark.parametrize(
    "right, told",
    [
        (["Paris"], "Think of paris!"),
        (["x", "New York"], "It is called (new  York)."),
        (["7"], "It is one more than six, so seven."),
        (["-1,200"], "Count to 1200."),
    ],
)
def test_a_feedback_text_with_a_right_text_leaks(right, told):
    assert TASK.leaks(told, asked(*right))
    assert not TASK.leaks("Think of Parisian cafés and Yorkers.", asked(*right))


@pytest.mark.parametrize(
    "right",
    [
        ["wrong", "incorrect", "mistaken"],
        ["answer", "that", "reply"],
        ["a few words"],
        ["That answer is wrong", "it begins with"],
        ["no"],
        ["5"],
    ],
)
def test_the_oracle_never_says_a_right_text(right):
    example = asked(*right)
    for answer in ("Rome", "", "one of these"):
        (told,) = get_feedback("oracle", TASK, 100)([Request(example, answer, 1)])
        said = re.findall(r"\w+", told.lower())
        for text in right:
            words = re.findall(r"\w+", text.lower())
            windows = [said[i : i + len(words)] for i in range(len(said))]
            assert told and words not in windows


def test_right_answers_of_real_solutions_never_leak(data_dir):
    """GSM8K's questions as free answers, with their solutions as hints."""
    source = get_task("gsm8k")
    task = get_task("qa", columns={"hint": "why"})
    oracle = get_feedback("oracle", task, 3)
    for number, real in enumerate(load_examples(source, "test", str(data_dir / "gsm8k"))):
        row = {"question": real.question, "answers": real.options[0], "why": list(real.support)}
        example = task.example(row, number)
        (told,) = oracle([Request(example, "nothing", 1)])
        found = {float(x) for x in re.findall(r"\d*\.?\d+", told.replace(",", ""))}
        assert np.abs(float(real.options[0])) not in found, (told, row)
