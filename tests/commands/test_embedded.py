"""The embedded world and model: honest splits, and a model that can use hints but does not know the
facts.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from spear_jax.experiment import builder, presets
from spear_jax.feedback.base import Request
from spear_jax.feedback.registry import get_feedback
from spear_jax.rollout.policy import Policy
from spear_jax.tasks import facts, get_task, reasoned, world


def test_train_and_test_ask_the_same_facts_in_different_words_and_options():
    task = facts.Facts()
    train, test = task.generate("train"), task.generate("test")

    def pairs(examples):
        return {
            (next(n for n in facts.ASKED if n in e.question), e.options[e.gold]) for e in examples
        }

    assert pairs(train) == pairs(test) and len(pairs(test)) == len(facts.ASKED)
    assert not set(world.TRAIN_PHRASINGS) & set(world.TEST_PHRASINGS)
    assert not {task.question(e) for e in train} & {task.question(e) for e in test}
    assert all(world.WARE_OF[name] == ware for name, ware in pairs(test))


def test_gold_letters_are_balanced_and_only_the_gold_option_is_of_the_hinted_kind():
    for split in ("train", "test"):
        examples = facts.Facts().generate(split)
        counts = np.bincount([e.gold for e in examples], minlength=4) / len(examples)
        np.testing.assert_allclose(counts, 0.25, atol=0.07)
        for e in examples:
            assert [world.KIND_OF[o] for o in e.options].count(e.support[0]) == 1


@pytest.mark.parametrize("name", ["facts", "reasoned"])
def test_embedded_feedback_never_states_the_answer(name):
    task = get_task(name)
    oracle = get_feedback("oracle", task, 3)
    for split in ("train", "test"):
        for e in task.generate(split):
            for label in (*e.labels, "nonsense"):
                answer = f"Answer: {label}" if name == "reasoned" else label
                said = oracle([Request(e, answer, 1)])[0]
                assert said is None or not task.leaks(said, e)


def test_reasoned_solutions_grade_as_right_and_their_hint_is_the_first_fact():
    task = reasoned.Reasoned()
    for e in task.generate("test"):
        assert task.grade(reasoned.solution(e), e)
        assert task.hint(e, 3) == e.support[0] and "yes" not in e.support[0]
    golds = [e.gold for e in task.generate("train")]
    assert np.mean(golds) == 0.5


def test_old_and_new_traders_are_apart_and_wares_are_spread():
    assert not set(world.OLD_TRADERS) & set(world.NEW_TRADERS)
    counts = [list(world.WARE_OF.values()).count(ware) for ware in world.WARES]
    assert max(counts) - min(counts) <= 1


@pytest.fixture(scope="module")
def built():
    return builder.build(presets.quickstart(), jax.devices()[:1])


def test_the_model_is_an_ordinary_small_hugging_face_folder():
    raw = json.loads((builder.TINY / "config.json").read_text())
    assert raw["model_type"] == "llama" and raw["architectures"] == ["LlamaForCausalLM"]
    assert sum(file.stat().st_size for file in builder.TINY.iterdir()) < 4e6
    assert (builder.TINY / "tokenizer.json").exists()


def accuracy(built, examples, prompts):
    evaluator = dataclasses.replace(built.evaluator, examples=examples, prompts=prompts)
    return evaluator(Policy(built.model.base)).accuracy


def test_the_model_answers_about_old_traders_but_not_about_new_ones(built):
    task = built.federation.worker.task
    examples = task.generate("test")
    for names, low, high in ((world.OLD_TRADERS, 0.7, 1.0), (world.NEW_TRADERS, 0.15, 0.36)):
        asked = [e for e in examples if any(name in e.question for name in names)]
        prompts = [built.federation.worker.renderer.prompt(task, e) for e in asked]
        assert low <= accuracy(built, asked, prompts) <= high


def test_the_model_uses_a_hint_in_a_revision_prompt(built):
    task, oracle = built.federation.worker.task, built.federation.worker.feedback
    asked = [
        e for e in task.generate("test") if any(name in e.question for name in world.NEW_TRADERS)
    ][:200]
    wrong = [e.labels[(e.gold + 1) % 4] for e in asked]
    said = [oracle([Request(e, w, 1)])[0] for e, w in zip(asked, wrong, strict=True)]
    prompts = [
        built.federation.worker.renderer.revision(task, e, w, s)
        for e, w, s in zip(asked, wrong, said, strict=True)
    ]
    assert accuracy(built, asked, prompts) > 0.9
