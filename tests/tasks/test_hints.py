"""Hints: what may be told of the right option, and what counts as telling it."""

import pytest

from spear_jax.core.types import Example
from spear_jax.tasks import get_task
from spear_jax.tasks.hints import opening_words, sentences

ABCD = ("A", "B", "C", "D")

STRATEGY_ROW = {
    "qid": "s1",
    "question": "Can a fish climb?",
    "answer": False,
    "facts": "Fish live in water. Climbing needs limbs. Trees grow on land. Fins are weak.",
}


def letter_example(*options, gold=0, support=()):
    return Example("x", "Which?", options, ABCD[: len(options)], gold, support)


@pytest.mark.parametrize(
    "option, words, opening",
    [
        ("a very large wave", 3, "very large"),
        ("A cell", 3, ""),  # the article alone would name option A
        ("dry palms", 3, "dry"),
        ("heat", 3, ""),
        ("dark red apple pie", 0, ""),
        ("vitamin C helps the skin", 4, "vitamin"),  # stops before a label
        ("the sun is hot now", 3, "sun is"),
    ],
)
def test_opening_words_never_hold_the_whole_option_or_a_label(option, words, opening):
    assert opening_words(letter_example(option, "other", "third"), words) == opening


def test_math_hint_gives_opening_lines_without_the_result():
    task = get_task("math_mcqa")
    lines = (
        "Let x be the sum. Then x = 1,200.",
        "Half of it is 600",
        r"So \boxed{7}.",
        "We halve 600.",
        "Add 1.",
    )
    example = letter_example("1200", "5", "6", "7", gold=0, support=lines)
    assert (
        task.hint(example, 10)
        == "This is how it can begin: Let x be the sum. Half of it is 600. We halve 600."
    )


def test_math_hint_is_cut_at_300_characters_after_a_word():
    task = get_task("math_mcqa")
    example = letter_example("9", "5", support=("word " * 100,))
    hint = task.hint(example, 10).removeprefix("This is how it can begin: ")
    assert hint == ("word " * 60).strip()  # 60 words of 4 letters and 59 spaces are 299 characters


def test_math_hint_without_usable_line_falls_back_to_words_then_to_a_nudge():
    task = get_task("math_mcqa")
    assert '"x ="' in task.hint(letter_example("x = 5", "6", support=("So x = 5.",)), 10)
    nudge = task.hint(letter_example("5", "6", support=("The sum is 5.", "Answer A holds.")), 10)
    assert nudge == "Start afresh and check each step of the calculation."


@pytest.mark.parametrize(
    "gold, text",
    [
        ("70000", "a profit of $70,000"),
        ("3", "she has three left"),
        ("12", "that is 12.00 dollars"),
        (r"\frac12", r"so $x = \dfrac{1}{2}$"),
        ("50", "it is 50%"),
        ("x+1", "we get $x + 1$"),
        (r"\text{Friday}", "it is friday"),
    ],
)
def test_math_leak_sees_the_value_written_otherwise(gold, text):
    task = get_task("math_mcqa")
    assert task.leaks(text, letter_example(gold, "else"))
    assert not task.leaks("we count the legs of 17 goats", letter_example(gold, "else"))


def test_strategy_hint_gives_the_first_half_of_the_facts():
    task = get_task("strategy_qa")
    hint = task.hint(task.example(STRATEGY_ROW, 0), 3)
    assert hint == "Keep this in mind: Fish live in water. Climbing needs limbs."
    single = task.example(STRATEGY_ROW | {"facts": "Fish swim."}, 0)
    assert task.hint(single, 3) == "Keep this in mind: Fish swim."


def test_strategy_hint_leaves_out_facts_that_hold_either_label():
    task = get_task("strategy_qa")
    facts = ["There is no gill in an ape.", "Yes is a word.", "Fins are weak.", "Apes climb."]
    for answer in (True, False):
        example = task.example(STRATEGY_ROW | {"facts": facts, "answer": answer}, 0)
        assert task.hint(example, 3) == "Keep this in mind: Fins are weak. Apes climb."


def test_leak_check_sees_the_option_without_its_full_stop_and_with_other_spacing():
    task = get_task("arc_easy")
    example = letter_example("Days get shorter.", "Years pass.", gold=0)
    assert task.leaks("it says days  get\nshorter than", example)
    assert task.leaks("option A", example)
    assert not task.leaks("a day gets shorter", example)


def test_sentence_split_keeps_initials_and_titles_together():
    text = "Dr. Smith met J. Bond in St. Louis. They ate 3.5 pies! Why? Hunger."
    assert sentences(text) == [
        "Dr. Smith met J. Bond in St. Louis.",
        "They ate 3.5 pies!",
        "Why?",
        "Hunger.",
    ]
