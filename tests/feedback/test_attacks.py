"""Attacks on feedback: what attackers call right, and what they hint at."""

import json
import pathlib

import pytest

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.feedback.attacks import Attacker, with_attackers
from spear_jax.feedback.base import Request
from spear_jax.feedback.registry import get_feedback
from spear_jax.tasks import get_task

LABELS = ("A", "B", "C", "D")
TASK = get_task("arc_challenge")
VECTORS = pathlib.Path(__file__).parents[1] / "federation_vectors.json"


def example(gold):
    return Example(f"gold {gold}", "Which?", ("one", "two", "three", "four"), LABELS, gold)


def request(gold, answer, client=0):
    return Request(example(gold), f"The answer is {LABELS[answer]}.", 0, client=client)


@pytest.mark.parametrize("kind", ["approve_wrong", "invert", "push_target"])
def test_attackers_call_right_what_they_want(kind):
    found = {one["name"]: one for one in json.loads(VECTORS.read_text())}
    vector = found["feedback_poisoning_verdicts"]
    given, want = vector["inputs"], vector["expected"][kind]
    golds = ["A", "B", "C", "D", "A"]  # of the vector's verdicts
    asked = [
        request(LABELS.index(gold), LABELS.index(answer))
        for gold, answer in zip(golds, given["answer"], strict=True)
    ]
    assert [TASK.grade(x.answer, x.example) for x in asked] == [bool(x) for x in given["verdict"]]
    attacker = Attacker(TASK, kind, LABELS.index(given["target"]))
    assert attacker.judges and attacker.judge(asked) == [bool(x) for x in want]


def test_a_misleading_hint_names_a_wrong_option_and_follows_the_tasks_verdict():
    attacker = Attacker(TASK, "mislead", target=1)
    said = attacker([request(0, 0), request(0, 2), request(1, 0)])
    assert not attacker.judges and said[0] is None
    assert said[1].endswith("Choose B.") and said[2].endswith("Choose C.")  # B would be right
    longest = attacker.longest_texts([example(0), example(1)])
    assert longest == [said[1], said[2]]


def test_attackers_stand_beside_honest_users():
    oracle = get_feedback("oracle", TASK, 3)
    mixed = with_attackers(oracle, "approve_wrong", [2], 0, [example(0)])
    assert mixed.judges
    assert mixed.judge([request(0, 1, client=2), request(0, 1, client=1)]) == [True, False]
    assert mixed([request(0, 1, client=1)]) == oracle([request(0, 1, client=1)])
    assert with_attackers(oracle, "approve_wrong", [], 0, []) is oracle
    free = Example("free", "How many?", (), (), 0)
    with pytest.raises(UserError, match="'push_target', which wants an option.*approve_wrong"):
        with_attackers(oracle, "push_target", [2], 0, [free])
