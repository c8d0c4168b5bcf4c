"""Rendering: the header, the chat template, limits, and where an answer's tokens lie."""

import pytest

from spear_jax.core.errors import UserError
from spear_jax.experiment import builder
from spear_jax.models.io.huggingface import load_tokenizer
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.tasks import get_task

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(builder.TINY)


@pytest.fixture(scope="module")
def asked():
    task = get_task("facts")
    return task, task.generate("train")[0]


def test_without_a_template_the_header_is_the_prompts_last_line(tokenizer, asked):
    task, example = asked
    renderer = PromptRenderer(tokenizer, "auto", 200)
    assert renderer.decode(renderer.prompt(task, example)) == f"{task.question(example)}\nAnswer:"


def test_with_a_template_the_header_opens_the_assistants_turn(tokenizer, asked):
    task, example = asked
    tokenizer.chat_template = TEMPLATE
    ids = PromptRenderer(tokenizer, "auto", 200).prompt(task, example)
    assert tokenizer.decode(ids) == f"<user>{task.question(example)}</s><assistant>Answer:"
    plain = PromptRenderer(tokenizer, "never", 200).prompt(task, example)
    assert tokenizer.decode(plain).endswith("\nAnswer:")


def test_always_needs_a_template(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        PromptRenderer(tokenizer, "always", 200)
    with pytest.raises(UserError, match="must be one of"):
        PromptRenderer(tokenizer, "sometimes", 200)


def test_a_long_previous_answer_is_cut_and_the_feedback_stays(tokenizer, asked):
    task, example = asked
    renderer = PromptRenderer(tokenizer, "auto", 110)
    ids = renderer.revision(task, example, "copper " * 300, "Think of a kind of spice.")
    text = renderer.decode(ids)
    assert (
        len(ids) <= 110
        and "Think of a kind of spice." in text
        and text.endswith("Answer:")
        and "copper" in text
    )


def test_openings_are_what_a_template_puts_before_every_question_and_every_revision(tokenizer):
    task = get_task("facts")
    examples = task.generate("train")[::50]
    assert (
        PromptRenderer(tokenizer, "never", 400).shared_prefixes(task, examples) == []
    )  # nothing, or too short to be worth it
    system = "The market opens at dawn, and every trader sells one thing alone. RolloutRequest for it by name, and pay in copper."
    tokenizer.chat_template = system + TEMPLATE
    renderer = PromptRenderer(tokenizer, "auto", 400)
    least = len(tokenizer.encode(system, add_special_tokens=False))
    asked, revised = renderer.shared_prefixes(task, examples)
    assert len(asked) > least - 8 and len(revised) > least - 8  # cut to a multiple of 8
    for example in task.generate("test")[:40]:
        assert renderer.prompt(task, example)[: len(asked)] == asked
        assert renderer.revision(task, example, "copper", "Wrong.")[: len(revised)] == revised
    assert (
        renderer.shared_prefixes(task, examples[:1]) == []
    )  # of one example nobody knows what others share


def test_token_span_finds_the_letters_token_behind_reasoning(tokenizer):
    renderer = PromptRenderer(tokenizer, "auto", 200)
    text = " Velmar sells copper. Answer: yes"
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = text.index("yes")
    span = renderer.token_span(ids, start, start + 3)
    assert renderer.decode(ids[span.start : span.stop]).strip() == "yes"
    assert list(renderer.token_span(ids, 500, 510)) == []


def test_labels_continue_the_header_with_a_space(tokenizer):
    renderer = PromptRenderer(tokenizer, "auto", 200)
    assert renderer.decode(renderer.continuation("A")) == " A"
