"""Feedback: the oracle says what is wrong and never what is right; a person is asked at the
terminal.
"""

import dataclasses
import re

import pytest

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.feedback.base import Request
from spear_jax.feedback.registry import get_feedback
from spear_jax.tasks import get_task
from spear_jax.tasks.loading import load_examples

EXAMPLE = Example("x", "Which warms?", ("a hot stone", "ice", "a moon"), ("A", "B", "C"), 0)


def words_of(text):
    return re.findall(r"[A-Za-z0-9]+", text)


def states_answer(text, example):
    """An own rule, apart from `Task.leaks`: the gold label as a word, the gold option's words in a
    row.
    """
    said = [word.lower() for word in words_of(text)]
    gold = [word.lower() for word in words_of(example.options[example.gold])]
    label = example.labels[example.gold]
    if label in words_of(text) or (len(label) > 1 and label in said):
        return True
    return any(said[i : i + len(gold)] == gold for i in range(len(said) - len(gold) + 1))


def states_number(text, example):
    numbers = {float(n) for n in re.findall(r"\d*\.?\d+", text.replace(",", ""))}
    return float(example.options[example.gold].replace(",", "")) in numbers


def test_leak_rules_of_this_test_see_a_leak():
    assert states_answer("It is A.", EXAMPLE)
    assert states_answer("Look for A Hot stone!", EXAMPLE)
    assert not states_answer("Look for hot things, like a stone.", EXAMPLE)
    assert states_number("it costs $1,200.00", Example("x", "?", ("1200", "7"), ("A", "B"), 0))


@pytest.mark.parametrize(
    "name, folder, split, stride",
    [
        ("arc_challenge", "arc_challenge", "train", 1),
        ("arc_challenge", "arc_challenge", "test", 1),
        ("arc_easy", "arc_easy", "train", 1),
        ("arc_easy", "arc_easy", "test", 1),
        ("hellaswag", "hellaswag", "test", 5),
        ("agnews", "agnews", "test", 1),
        ("math_mcqa", "gsm8k_mcqa", "train", 1),
        ("math_mcqa", "gsm8k_mcqa", "test", 1),
        ("strategy_qa", "strategyqa", "train", 1),
        ("strategy_qa", "strategyqa", "test", 1),
        ("strategy_qa", "strategyqa_rich", "train", 1),
        ("strategy_qa", "strategyqa_rich", "test", 1),
    ],
)
def test_oracle_never_states_the_answer_of_a_real_example(data_dir, name, folder, split, stride):
    if not (data_dir / folder).is_dir():
        pytest.skip(f"no dataset {folder} in {data_dir}")
    task = get_task(name)
    oracle = get_feedback("oracle", task, hint_words=10 if name == "math_mcqa" else 3)
    for example in load_examples(task, split, str(data_dir / folder))[::stride]:
        wrong, gold = example.labels[example.gold - 1], example.labels[example.gold]
        answers = [f"A total of 12. Answer: {wrong}", "", f"Answer: {gold}. No: answer: {wrong}"]
        for text in oracle([Request(example, answer, 1) for answer in answers]):
            assert text is not None
            assert not states_answer(text, example), (example, text)
            assert name != "math_mcqa" or not states_number(text, example), (example, text)


@pytest.mark.parametrize("words", [0, 1, 100])
def test_hints_of_any_length_never_state_the_answer(data_dir, words):
    task = get_task("arc_challenge")
    oracle = get_feedback("oracle", task, words)
    examples = load_examples(task, "test", str(data_dir / "arc_challenge"), limit=400)
    for example, text in zip(examples, oracle([Request(e, "?", 1) for e in examples]), strict=True):
        assert not states_answer(text, example), (example, text)


def test_oracle_says_wrong_states_the_format_and_hints():
    task = get_task("arc_easy")
    (text,) = get_feedback("oracle", task, 3)([Request(EXAMPLE, " B", 1)])
    assert "wrong" in text and "Do not repeat" in text
    assert task.templates.format in text
    assert task.hint(EXAMPLE, 3) in text and '"hot"' in text


def test_oracle_has_nothing_to_say_on_a_right_answer():
    # A4: a first-match grader and a last-match one disagree on such texts; here there is one.
    oracle = get_feedback("oracle", get_task("arc_easy"), 3)
    texts = oracle(
        [
            Request(EXAMPLE, "B at first. Answer: A", 1),
            Request(EXAMPLE, "A total of 3. Answer: C", 2),
        ]
    )
    assert texts[0] is None
    assert "wrong" in texts[1]


def test_oracle_tells_that_an_answer_cannot_be_read():
    (text,) = get_feedback("oracle", get_task("arc_easy"), 3)(
        [Request(EXAMPLE, "A stone, I think", 1)]
    )
    assert "cannot be read" in text and "wrong" not in text


def test_oracle_falls_back_to_shorter_text_where_the_wording_is_the_answer():
    task = get_task("arc_easy")
    oracle = get_feedback("oracle", task, 3)
    for option in (
        "letter",
        "wrong",
        "that answer is wrong",
        "choice",
        "Incorrect.",
        "scientific idea",
        "read",
    ):
        for answer in ("Answer: B", "?"):
            example = dataclasses.replace(EXAMPLE, options=(option, "ice", "moon"))
            (text,) = oracle([Request(example, answer, 1)])
            assert text and not states_answer(text, example)


def test_oracle_without_leak_free_format_still_gives_the_hint():
    task = get_task("arc_easy", templates={"format": "Say A, B or C."})
    (text,) = get_feedback("oracle", task, 3)([Request(EXAMPLE, "Answer: B", 1)])
    assert "Say" not in text and '"hot"' in text


def test_provider_none_gives_no_feedback_for_each_request():
    silent = get_feedback("none", get_task("arc_easy"), 3)
    assert silent([Request(EXAMPLE, "B", 1), Request(EXAMPLE, "C", 2)]) == [None, None]


def test_person_sees_question_and_answer_and_gives_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    replies = iter(["  think of heat ", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(replies))
    human = get_feedback("human", get_task("arc_easy"), 3)
    assert human([Request(EXAMPLE, " B", 1), Request(EXAMPLE, "C", 2)]) == ["think of heat", None]
    shown = capsys.readouterr().out
    assert "Which warms?" in shown and "answer: B\n" in shown and "answer: C\n" in shown


def test_person_without_terminal_or_input_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match="'human' needs a terminal.*'oracle'"):
        get_feedback("human", get_task("arc_easy"), 3)

    def ended(prompt):
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ended)
    with pytest.raises(UserError, match="ended at answer 1 of 1"):
        get_feedback("human", get_task("arc_easy"), 3)([Request(EXAMPLE, "B", 1)])


def test_unknown_provider_or_negative_hint_is_named():
    with pytest.raises(UserError, match=r"unknown feedback 'orcale'. Did you mean 'oracle'\?"):
        get_feedback("orcale", get_task("arc_easy"), 3)
    with pytest.raises(UserError, match="hint_words -1 is negative"):
        get_feedback("oracle", get_task("arc_easy"), -1)
