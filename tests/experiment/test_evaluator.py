"""Evaluation: one forward per question equals scoring every continuation, and counts are exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.experiment import builder, presets
from spear_jax.experiment.evaluator import Accuracy
from spear_jax.models.decoder import logits
from spear_jax.models.lora import merge_lora
from spear_jax.packing.prefix_tree import real_tokens
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.sampler import Sampler


@pytest.fixture(scope="module")
def built():
    config = presets.quickstart()
    config.eval.limit, config.eval.rows = 37, 16
    return builder.build(config, jax.devices()[:1])


def test_one_forward_equals_full_continuations_and_plain_logits(built):
    evaluator, base = built.evaluator, built.model.base
    labels = {label: evaluator.renderer.continuation(label) for label in "ABCD"}
    one = evaluator._last_tokens(Policy(base), labels, [])
    full = evaluator._full_continuations(Policy(base), labels)
    np.testing.assert_allclose(one, full, atol=1e-4)
    for index in (0, 20, 36):
        ids = jnp.array([evaluator.prompts[index]])
        row = jax.nn.log_softmax(
            logits(built.federation.decoder, None, base, ids, jnp.ones(ids.shape, bool))[0, -1]
        )
        np.testing.assert_allclose(one[index], [row[labels[x][0]] for x in "ABCD"], atol=1e-4)


def test_labels_of_several_tokens_are_scored_whole(built):
    renderer = built.evaluator.renderer
    labels = "yes", "no", "copper", "Zz"
    examples = [dataclasses.replace(e, labels=labels) for e in built.evaluator.examples]
    evaluator = dataclasses.replace(built.evaluator, examples=examples)
    ids = {label: renderer.continuation(label) for label in labels}
    assert len({len(tokens) for tokens in ids.values()}) > 1
    scores = evaluator.choice_scores(Policy(built.model.base))
    prompt = evaluator.prompts[5]
    tokens = jnp.array([prompt + ids["Zz"]])
    rows = jax.nn.log_softmax(
        logits(
            built.federation.decoder, None, built.model.base, tokens, jnp.ones(tokens.shape, bool)
        )[0]
    )
    want = sum(float(rows[len(prompt) - 1 + i, token]) for i, token in enumerate(ids["Zz"]))
    assert scores[5, 3] == pytest.approx(want, abs=1e-3)


def test_questions_with_fewer_options_never_choose_a_missing_one(built):
    examples = [
        dataclasses.replace(e, labels=e.labels[:3], options=e.options[:3]) if i % 2 else e
        for i, e in enumerate(built.evaluator.examples)
    ]
    evaluator = dataclasses.replace(built.evaluator, examples=examples)
    scores = evaluator.choice_scores(Policy(built.model.base))
    assert np.isneginf(scores[1::2, 3]).all() and np.isfinite(scores[::2]).all()


def test_greedy_generation_agrees_with_likelihood_where_the_answer_is_a_letter(built):
    """The embedded model answers with a bare letter, so the two methods choose the same option."""
    by_choice = np.argmax(built.evaluator.choice_scores(Policy(built.model.base)), axis=1)
    generating = dataclasses.replace(built.evaluator, method="generate")
    right = generating._generate(Policy(built.model.base))
    golds = np.array([e.gold for e in built.evaluator.examples])
    assert np.mean((by_choice == golds) == np.array(right)) > 0.95


def test_adapter_beside_the_base_scores_like_the_merged_one(built):
    lora = jax.tree.map(lambda x: x + 0.03, built.initial_state().lora)
    merged = merge_lora(built.model.base, lora, built.federation.decoder.lora)
    beside = built.evaluator.choice_scores(Policy(built.model.base, lora))
    np.testing.assert_allclose(beside, built.evaluator.choice_scores(Policy(merged)), atol=2e-3)


def test_what_questions_open_with_is_read_once_and_changes_no_score(built):
    shared_prefix = np.random.default_rng(0).integers(5, 200, 16).tolist()
    prompts = [shared_prefix + prompt for prompt in built.evaluator.prompts]
    labels = {label: built.evaluator.renderer.continuation(label) for label in "ABCD"}
    lora = jax.tree.map(lambda x: x + 0.03, built.initial_state().lora)
    policy, found = Policy(built.model.base, lora), {}
    for name, shared_prefixes in (("once", [shared_prefix]), ("each", [])):
        evaluator = dataclasses.replace(
            built.evaluator,
            prompts=prompts,
            sampler=Sampler(built.federation.decoder, shared_prefixes=shared_prefixes),
        )
        rows = [evaluator._row(i, [1]) for i in range(37)]
        packed = evaluator.scorer.pack(rows, *evaluator._shape_of("x", rows))
        read = sum(real_tokens(block.packs[0]) for block in packed.blocks)
        last = evaluator._last_tokens(policy, labels, [])
        found[name] = read, [last, evaluator._full_continuations(policy, labels)]
    assert found["once"][0] == found["each"][0] - 37 * 16
    for once, each in zip(found["once"][1], found["each"][1], strict=True):
        np.testing.assert_allclose(once, each, atol=1e-4)


def test_intervals_match_the_score_test():
    # p̂ = 8/10: the roots of |p̂ − p| = 1.96 sqrt(p (1 − p) / n), by hand: 0.4902 and 0.9433
    low, high = Accuracy(8, 10, "choice").interval
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert Accuracy(8, 10, "choice").stderr == pytest.approx((0.8 * 0.2 / 10) ** 0.5)
    assert Accuracy(10, 10, "choice").interval[1] == pytest.approx(1.0)
