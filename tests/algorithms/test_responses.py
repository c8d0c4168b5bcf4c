"""Gold responses: what each task's response is, its tokens, the teacher's prompt, and their
likelihood on held-out rows.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spear_jax
from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.experiment.evaluator import Accuracy, Evaluator
from spear_jax.feedback.base import Request
from spear_jax.feedback.registry import get_feedback
from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.io.huggingface import load_model, load_tokenizer
from spear_jax.models.lora import LoraConfig
from spear_jax.packing.blocks import choose_block_shape, pack_single_rows
from spear_jax.packing.rows import TrainingRow
from spear_jax.packing.shape_buckets import ShapeBuckets
from spear_jax.rollout import scorer
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.rollout.sampler import Sampler
from spear_jax.rollout.scorer import Scorer
from spear_jax.rollout.token_sampling import SamplingConfig
from spear_jax.tasks import TASKS, get_task, world
from spear_jax.tasks.loading import load_examples

TINY = pathlib.Path(spear_jax.__file__).parent / "assets" / "tiny"
QWEN2 = pathlib.Path(__file__).parents[1] / "fixtures" / "qwen2"
GSM8K_ROW = {
    "question": "A pen costs $540. What do two cost?",
    "answer": "Two pens are twice one.\nThat is 2*540 = $<<2*540=1080>>1080.\n#### 1,080",
}


def said(*turns):
    return [{"role": role, "content": text} for role, text in turns]


CHAT = said(
    ("user", " What is light? "),
    ("assistant", "A wave."),
    ("user", "Why?"),
    ("assistant", "It bends."),
)


def letters(gold=1, support=(), options=("a stone", "a wave")):
    return Example("x", "What is light?", options, ("A", "B"), gold, support)


# --- the response of each task ---


def test_response_of_a_letter_task_is_the_gold_letter_behind_the_header():
    for name in ("arc_challenge", "arc_easy", "hellaswag", "mcqa", "facts"):
        assert get_task(name).response(letters()) == " B"


def test_math_response_is_the_solution_and_the_answer_line():
    task = get_task("math_mcqa")
    assert (
        task.response(letters(support=("We add.", "So it is 5.")))
        == " We add.\nSo it is 5.\nAnswer: B"
    )
    assert task.response(letters()) == " Answer: B"


def test_strategy_response_is_the_joined_facts_and_the_answer_line():
    task = get_task("strategy_qa")
    example = Example("x", "?", ("yes", "no"), ("yes", "no"), 1, ("Fish swim.", "Trees grow."))
    assert task.response(example) == " Fish swim. Trees grow.\nAnswer: no"
    assert task.response(Example("x", "?", ("yes", "no"), ("yes", "no"), 0)) == " Answer: yes"


def test_gsm8k_response_is_the_solution_without_calculator_marks_and_the_number_line():
    task = get_task("gsm8k")
    example = task.example(GSM8K_ROW, 3)
    assert task.response(example) == " Two pens are twice one.\nThat is 2*540 = $1080.\n#### 1,080"
    assert (example.id, example.options, example.labels, example.gold) == (
        "3",
        ("1080",),
        ("1080",),
        0,
    )
    assert example.support == ("Two pens are twice one.", "That is 2*540 = $1080.")


@pytest.mark.parametrize("name", ["facts", "reasoned"])
def test_embedded_responses_grade_as_right_in_the_asked_form(name):
    task = get_task(name)
    for split in ("train", "test"):
        for example in task.generate(split):
            assert task.grade(task.response(example), example)
            assert task.well_formed(task.response(example), example)


@pytest.mark.parametrize(
    "name, folder, split",
    [
        ("arc_challenge", "arc_challenge", "train"),
        ("arc_easy", "arc_easy", "train"),
        ("hellaswag", "hellaswag", "test"),
        ("math_mcqa", "gsm8k_mcqa", "train"),
        ("strategy_qa", "strategyqa", "train"),
        ("strategy_qa", "strategyqa_rich", "train"),
        ("gsm8k", "gsm8k", "train"),
        ("gsm8k", "gsm8k", "test"),
    ],
)
def test_real_responses_grade_as_right_in_the_asked_form(data_dir, name, folder, split):
    if not (data_dir / folder).is_dir():
        pytest.skip(f"no dataset {folder} in {data_dir}")
    task = get_task(name)
    for example in load_examples(task, split, str(data_dir / folder)):
        assert task.grade(task.response(example), example)
        assert task.well_formed(task.response(example), example)
        assert task.response(example).startswith(" ")


def test_ungraded_tasks_take_prompt_and_response_as_they_stand():
    chat = get_task("ultrachat").example({"messages": CHAT}, 0)
    pair = get_task("pairs", columns={"prompt": "q", "response": "", "hint": ""})
    assert pair.columns == ("q", "response")
    read = pair.example({"q": "What is light?", "response": "A wave."}, 0)
    for task, example in ((get_task("ultrachat"), chat), (pair, read)):
        assert task.question(example) == "What is light?"
        assert task.response(example) == "A wave."  # the header is empty, so no space
        assert task.extract("A wave.", example) is None and not task.grade("A wave.", example)
        assert task.scoring == "likelihood"
    marked = get_task("pairs", templates={"header": "Response:"})
    assert marked.response(marked.example({"prompt": "p", "response": "A wave."}, 0)) == " A wave."


def test_preferences_are_texts_or_conversations_whose_last_reply_counts():
    task = get_task("preferences", columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    texts = {"q": "What is light?", "good": "It bends.", "bad": "A stone."}
    turns = {
        "q": said(("user", "What is light?")),
        "good": CHAT,
        "bad": said(("assistant", "A stone.")),
    }
    for row in (texts, turns):
        example = task.example(row, 0)
        assert (example.question, example.response, example.rejected) == (
            "What is light?",
            "It bends.",
            "A stone.",
        )


def test_local_files_of_pairs_and_preferences_are_read(tmp_path):
    (tmp_path / "train.csv").write_text("ask,reply\nWhat?,That.\n")
    pairs = get_task("pairs", columns={"prompt": "ask", "response": "reply"})
    assert load_examples(pairs, "train", str(tmp_path))[0].response == "That."
    row = {
        "prompt": "What?",
        "chosen": CHAT,
        "rejected": said(("user", "What?"), ("assistant", "No.")),
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = load_examples(get_task("preferences"), "test", str(tmp_path))
    assert (example.response, example.rejected) == ("It bends.", "No.")


# --- gsm8k grading ---


@pytest.mark.parametrize(
    "text, right",
    [
        ("So it is 1080.\n#### 1080", True),
        ("#### 1,080", True),
        ("#### $1,080.00.", True),
        ("####1080 dollars", True),
        ("#### **1080**", True),
        ("#### 7\nNo, wait.\n#### 1080", True),  # the last mark counts
        ("#### 1080\nIn 3 steps.", True),  # the mark goes before later numbers
        ("#### 1. Add\n540 + 540 = 1080", True),  # a numbered heading is no answer
        ("#### 12. Add\n540 + 540 = 1080", True),
        ("The answer is \\$1,080.", True),  # no mark: the last number
        ("540*2=1080", True),
        ("It is 1080, in 2 steps", False),
        ("#### 10800", False),
        ("#### 1,0800", False),
        ("#### 1080.5", False),
        ("#### -1080", False),
        ("#### 108", False),
        ("no number", False),
        ("", False),
    ],
)
def test_gsm8k_is_graded_by_the_marked_number_else_by_the_last_one(text, right):
    task = get_task("gsm8k")
    assert task.grade(text, task.example(GSM8K_ROW, 0)) is right


@pytest.mark.parametrize(
    "text, right",
    [
        ("#### -7", True),
        ("#### -$7", True),
        ("12 - 19 = −7", True),
        ("#### 7", False),
        ("12-7", False),
        ("(12)-7", False),
    ],
)
def test_gsm8k_minus_is_a_sign_unless_it_subtracts(text, right):
    task = get_task("gsm8k")
    assert (
        task.grade(text, task.example({"question": "?", "answer": "It falls.\n#### -7"}, 0))
        is right
    )


@pytest.mark.parametrize(
    "text, span", [("a\n#### $1,080.", "1,080"), ("#### -$3", "-$3"), ("at last 9 !", "9")]
)
def test_gsm8k_answer_span_is_the_number_itself(text, span):
    task = get_task("gsm8k")
    found = task.extract(text, task.example(GSM8K_ROW, 0))
    assert text[found.start : found.end] == span


def test_gsm8k_prompt_never_shows_the_number_whatever_the_template():
    task = get_task("gsm8k", templates={"question": "{question} {options}"})
    assert task.question(task.example(GSM8K_ROW, 0)) == GSM8K_ROW["question"] + " "


def test_gsm8k_hint_gives_opening_lines_without_the_number():
    task = get_task("gsm8k")
    assert (
        task.hint(task.example(GSM8K_ROW, 0), 3)
        == "This is how it can begin: Two pens are twice one."
    )
    bare = task.example({"question": "?", "answer": "It is 5.\n#### 5"}, 0)
    assert task.hint(bare, 3) == "Start afresh and check each step of the calculation."
    assert (
        task.leaks("five of them", bare)
        and task.leaks("$5.00", bare)
        and not task.leaks("15 or 0.5", bare)
    )


def test_gsm8k_oracle_never_states_the_number_of_a_real_example(data_dir):
    if not (data_dir / "gsm8k").is_dir():
        pytest.skip(f"no dataset gsm8k in {data_dir}")
    task = get_task("gsm8k")
    oracle = get_feedback("oracle", task, 3)
    for example in load_examples(task, "test", str(data_dir / "gsm8k")):
        assert oracle([Request(example, task.response(example), 1)]) == [None]
        for answer in ("#### 123456789", "I do not know"):
            text = oracle([Request(example, answer, 1)])[0].replace(",", "")
            # an own rule: the digits do not stand there with no digit and no decimal point beside
            # them
            digits = example.options[0].lstrip("-")
            places = [i for i in range(len(text)) if text.startswith(digits, i)]
            around = [
                (text[i - 1], text[i + len(digits) : i + len(digits) + 2] + "  ") for i in places
            ]
            assert all(
                a.isdigit() or a == "." or b[0].isdigit() or (b[0] == "." and b[1].isdigit())
                for a, b in around
            ), text


# --- mistakes in rows and columns ---

EMPTY = said(("user", "Hello"), ("assistant", " "))


@pytest.mark.parametrize(
    "name, row, problem",
    [
        (
            "gsm8k",
            GSM8K_ROW | {"answer": "It is 5."},
            "ends in 'It is 5.', but '#### ' and one number must end it",
        ),
        ("gsm8k", GSM8K_ROW | {"answer": "#### five"}, "one number must end it"),
        ("gsm8k", GSM8K_ROW | {"answer": "#### 5 or 6"}, "one number must end it"),
        ("gsm8k", GSM8K_ROW | {"question": ""}, "column 'question' is empty"),
        ("ultrachat", {"messages": "Hello"}, "holds 'Hello', but a list of messages is needed"),
        ("ultrachat", {"messages": []}, "a list of messages is needed"),
        (
            "ultrachat",
            {"messages": CHAT[1:]},
            "opens with assistant, user, but a user and then an assistant must open it",
        ),
        ("ultrachat", {"messages": CHAT[:1]}, "opens with user, but"),
        ("ultrachat", {"messages": EMPTY}, "the response is empty"),
        (
            "ultrachat",
            {"messages": [{"role": "user"}]},
            "message 1 in column 'messages' lacks 'role' or 'content'",
        ),
        ("ultrachat", {"messages": [{"role": "user", "content": ["x"]}]}, "has no text there"),
        ("pairs", {"prompt": " ", "response": "x"}, "column 'prompt' is empty"),
        ("pairs", {"prompt": "x", "response": None}, "column 'response' is empty"),
        (
            "preferences",
            {"prompt": CHAT, "chosen": "x", "rejected": "y"},
            "one message of a user .*longer conversation",
        ),
        (
            "preferences",
            {"prompt": said(("user", "")), "chosen": "x", "rejected": "y"},
            "the prompt is empty",
        ),
        (
            "preferences",
            {"prompt": "x", "chosen": CHAT[:1], "rejected": "y"},
            "'chosen' has no message of an assistant",
        ),
        (
            "preferences",
            {"prompt": "x", "chosen": "y", "rejected": EMPTY},
            "the rejected response is empty",
        ),
        (
            "preferences",
            {"prompt": "x", "chosen": "y", "rejected": {}},
            "a list of messages is needed",
        ),
    ],
)
def test_row_that_breaks_a_rule_is_named(name, row, problem):
    with pytest.raises(UserError, match=f"row 31: .*{problem}.*never skipped"):
        get_task(name).example(row, 31)


def test_every_tasks_columns_are_named_by_its_own_keys_alone():
    everything = {key: "" for cls in TASKS.values() for key in cls.mapping}
    assert set(everything) == {
        "question",
        "options",
        "answer",
        "answers",
        "hint",
        "answer_base",
        "prompt",
        "response",
        "chosen",
        "rejected",
    }
    for name in TASKS:
        assert get_task(name, columns=everything).columns == get_task(name).columns
    assert get_task("mcqa", columns=everything | {"answer": "gold"}).columns == (
        "question",
        "options",
        "gold",
    )
    with pytest.raises(
        UserError, match=r"unknown pairs column key 'answer'.*Known: prompt, response"
    ):
        get_task("pairs", columns=everything | {"answer": "x"})
    with pytest.raises(
        UserError,
        match=r"data.columns.answer is 'x', but the columns of task 'arc_easy' are fixed \(id, ",
    ):
        get_task("arc_easy", columns=everything | {"answer": "x"})


# --- token ids ---


@pytest.fixture(scope="module")
def renderer():
    return PromptRenderer(load_tokenizer(TINY), "auto", 200)


def test_response_ids_are_its_tokens_and_exactly_one_eos(renderer):
    task = get_task("reasoned")
    example = task.generate("train")[0]
    ids, cut = renderer.response(task, example, 64)
    eos = renderer.tokenizer.eos_token_id
    assert not cut and ids.count(eos) == 1 and ids[-1] == eos
    assert renderer.tokenizer.decode(ids[:-1]) == task.response(example)
    pairs = get_task("pairs")
    ending = pairs.example({"prompt": "p", "response": f"Yes.{renderer.tokenizer.eos_token}"}, 0)
    assert renderer.response(pairs, ending, 64) == renderer.response(
        pairs, pairs.example({"prompt": "p", "response": "Yes."}, 0), 64
    )


def test_long_response_is_cut_to_the_limit_and_loses_its_eos(renderer):
    task = get_task("reasoned")
    example = task.generate("train")[0]
    whole, _ = renderer.response(task, example, 64)
    assert renderer.response(task, example, len(whole)) == (whole, False)
    assert renderer.response(task, example, len(whole) - 1) == (whole[:-1], True)
    assert renderer.response(task, example, 3) == (whole[:3], True)


def test_rejected_ids_are_those_of_the_same_text_as_a_response(renderer):
    task = get_task("preferences")
    example = task.example({"prompt": "p", "chosen": "yes", "rejected": "no"}, 0)
    swapped = task.example({"prompt": "p", "chosen": "no", "rejected": "yes"}, 0)
    assert renderer.rejected(task, example, 9) == renderer.response(task, swapped, 9)
    assert renderer.rejected(task, swapped, 9) == renderer.response(task, example, 9)


def test_missing_rejected_response_and_inner_eos_are_named(renderer):
    task = get_task("facts")
    with pytest.raises(
        UserError, match="'train-.*task 'facts' has no rejected response; only task 'preferences'"
    ):
        renderer.rejected(task, task.generate("train")[0], 9)
    pairs = get_task("pairs")
    inner = pairs.example(
        {"prompt": "p", "response": f"Yes.{renderer.tokenizer.eos_token} And no."}, 7
    )
    with pytest.raises(
        UserError, match="example '7' has the end mark .* inside a response.*delete it"
    ):
        renderer.response(pairs, inner, 9)


# --- the teacher's prompt ---


def test_privileged_question_puts_support_and_gold_answer_before_the_question():
    for name, gold in (
        ("arc_easy", "B. a wave"),
        ("math_mcqa", "B. a wave"),
        ("mcqa", "B. a wave"),
    ):
        task = get_task(name)
        text = task.privileged(letters(support=("It bends.", "It shines.")))
        places = [
            text.index(part) for part in ("It bends.\nIt shines.", gold, task.question(letters()))
        ]
        assert places == sorted(places) and text.endswith(task.question(letters()))
    yes = Example("x", "?", ("yes", "no"), ("yes", "no"), 0, ("Fish swim.",))
    assert "Fish swim.\nRight answer: yes\n" in get_task("strategy_qa").privileged(yes)
    gsm8k = get_task("gsm8k")
    assert "$1080.\nRight answer: 1080\n" in gsm8k.privileged(gsm8k.example(GSM8K_ROW, 0))
    pairs = get_task("pairs")
    assert "REFERENCE\nRight answer: A wave.\n" in pairs.privileged(
        pairs.example({"prompt": "p", "response": "A wave."}, 0)
    )


def test_privileged_block_is_cut_to_2000_characters_and_keeps_the_answer_line():
    task = get_task("math_mcqa")
    example = letters(support=("word " * 1000,))
    block = task.privileged(example).removesuffix(task.question(example))
    assert len(block) == 2000 and "\nRight answer: B. a wave\n" in block
    pairs = get_task("pairs")
    long = pairs.example({"prompt": "p", "response": "x" * 5000}, 0)
    assert len(pairs.privileged(long)) == 2000 + len("p")


@pytest.mark.parametrize(
    "name, wrong", [("facts", lambda e: e.labels[0] if e.gold else e.labels[1]), ("reasoned", None)]
)
def test_embedded_teacher_reads_a_revision_with_the_oracles_own_feedback(name, wrong):
    task = get_task(name)
    oracle = get_feedback("oracle", task, 3)
    for example in task.generate("test"):
        text = task.privileged(example)
        if wrong is None:
            answer = text.split("Previous answer: ")[1].split("\n")[0]
            assert task.extract(answer, example).option == 1 - example.gold
            ware = answer.split(" sells ")[1].split(".")[0]
            assert (
                f"kind of {world.KIND_OF[ware]}." in answer
                and f" {ware}." not in example.support[0]
            )
        else:
            answer = wrong(example)
        assert text == task.revision(example, answer, oracle([Request(example, answer, 1)])[0])


def test_privileged_ids_are_cut_at_their_start_and_keep_the_question_whole():
    task, renderer = get_task("mcqa"), PromptRenderer(load_tokenizer(TINY), "auto", 2000)
    example = letters(support=("It bends. " * 30,))
    asked = f"{task.question(example)}\n{task.templates.header}"
    whole = renderer.privileged(task, example)
    assert renderer.decode(whole) == f"{task.privileged(example)}\n{task.templates.header}"
    question = len(renderer.tokenizer.encode(asked))
    for limit in (len(whole) - 1, question + 40, question):
        ids = PromptRenderer(renderer.tokenizer, "auto", limit).privileged(task, example)
        text = renderer.decode(ids)
        assert (
            limit - 4 < len(ids) <= limit
            and text.endswith(asked)
            and renderer.decode(whole).endswith(text)
        )
    with pytest.raises(
        UserError,
        match=rf"privileged prompt of {question} tokens, over the limit of {question - 1}",
    ):
        PromptRenderer(renderer.tokenizer, "auto", question - 1).privileged(task, example)


# --- likelihood ---


def make_evaluator(folder, task, examples, method, rows=4, responses=True, seen="prompt"):
    model = load_model(str(folder), "float32")
    decoder = Decoder(model.config, LoraConfig(1, 1.0, 0.0, ()))
    greedy = SamplingConfig(40, 0.0, 0, 1.0, model.eos_ids, model.pad_id)
    render = PromptRenderer(model.tokenizer, "auto", 250)
    prompts = [getattr(render, seen)(task, example) for example in examples]
    ids = [render.response(task, example, 40)[0] for example in examples] if responses else ()
    shapes = ShapeBuckets()
    made = Evaluator(
        task=task,
        renderer=render,
        sampler=Sampler(decoder, shapes=shapes),
        scorer=Scorer(decoder, shapes),
        examples=examples,
        prompts=prompts,
        method=method,
        sampling=greedy,
        rows=rows,
        responses=ids,
    )
    return made, Policy(model.base)


@pytest.fixture(scope="module")
def random_model():
    """The random Qwen2 fixture, and seven pairs of unlike lengths: blocks of about 4 rows, two of
    them, both with padding rows.
    """
    task = get_task("pairs")
    rows = [
        {"prompt": "say " + "x" * (11 * i), "response": "abcdefg"[: 1 + i] * (1 + i)}
        for i in range(7)
    ]
    return make_evaluator(
        QWEN2, task, [task.example(row, i) for i, row in enumerate(rows)], "likelihood"
    )


def test_likelihood_equals_whole_logits_of_right_padded_sequences(random_model):
    evaluator, policy = random_model
    decoder = evaluator.scorer.decoder
    sequences = [
        prompt + response
        for prompt, response in zip(evaluator.prompts, evaluator.responses, strict=True)
    ]
    tokens, mask = (
        np.zeros((7, max(map(len, sequences))), int),
        np.zeros((7, max(map(len, sequences))), bool),
    )
    for i, ids in enumerate(sequences):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    plain = np.asarray(
        logits(decoder, None, policy.base, jnp.array(tokens), jnp.array(mask)), float
    )
    hits, logprobs = [], []
    for i, response in enumerate(evaluator.responses):
        for token, row in zip(response, plain[i, len(evaluator.prompts[i]) - 1 :], strict=False):
            hits.append(row.argmax() == token)
            logprobs.append(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
    told = []
    found = dataclasses.replace(evaluator, progress=lambda *step: told.append(step))(policy)
    assert found.method == "likelihood" and sum(done for _, done, _ in told) == 7
    assert {(stage, total) for stage, _, total in told} == {("evaluate", 7)}
    assert (found.correct, found.count) == (sum(hits), sum(map(len, evaluator.responses)))
    assert found.nll == pytest.approx(-np.mean(logprobs), abs=1e-4)


def test_likelihood_of_a_model_that_knows_nothing_is_uniform(random_model):
    # All embeddings 0: every logit is 0, so each token costs log V nats, and the arg-max is id 0,
    # which is EOS here. Six responses end in it; the seventh, of 49 letters, was cut at 40 tokens.
    evaluator, policy = random_model
    base = policy.base.replace(embed=jnp.zeros_like(policy.base.embed))
    found = evaluator(Policy(base))
    vocab = evaluator.scorer.decoder.config.vocab_size
    assert found.nll == pytest.approx(np.log(vocab), rel=1e-6)
    assert (found.correct, found.count) == (6, sum(n * n + 1 for n in range(1, 7)) + 40)


def test_likelihood_does_not_depend_on_batch_chunk_or_order(random_model):
    evaluator, policy = random_model
    decoder = evaluator.scorer.decoder
    pairs = zip(evaluator.prompts, evaluator.responses, strict=True)
    block = one_block([TrainingRow(p, r, np.ones(len(r), bool), 1.0, 1) for p, r in pairs], 96, 50)
    whole = scorer._score_tokens(decoder, 10_000, None, policy.base, block)
    for chunk in (33, 350):
        parts = scorer._score_tokens(decoder, chunk, None, policy.base, block)
        np.testing.assert_allclose(parts[0], whole[0], atol=1e-5)
        np.testing.assert_array_equal(parts[1], whole[1])
    assert evaluator(policy).nll == pytest.approx(
        -float(whole[0][block.rows.completion_mask].mean()), abs=1e-5
    )


def one_block(rows, prompt, length):
    """All rows in one block, with a leading axis of one device."""
    room = choose_block_shape([[[(row,) for row in rows]]], 1, 1, prompt, length, 10**6)
    blocks, _ = pack_single_rows(rows, room)
    assert len(blocks) == 1
    return jax.tree.map(lambda x: x[None], blocks[0])


def test_likelihood_never_holds_logits_of_all_positions(random_model):
    evaluator, policy = random_model
    decoder = evaluator.scorer.decoder
    rows = [TrainingRow([5, 6, i], [7] * 32, np.ones(32, bool), 1.0, 1) for i in range(4)]
    call = functools.partial(scorer._score_tokens, decoder, 16, None)
    block = one_block(rows, 16, 32)
    shapes = str(jax.make_jaxpr(call)(policy.base, block))
    (scored,), padded = block.target.shape[1:], block.rows.completion_mask.shape[1:]
    vocab = decoder.config.vocab_size
    assert f"f32[16,{vocab}]" in shapes
    every = ("4,32", "128", "8,16", f"{scored}", f"{scored // 16},16", "{},{}".format(*padded))
    assert not any(f"{lead},{vocab}]" in shapes for lead in every)


def test_embedded_teacher_knows_the_responses_that_its_student_does_not():
    for name in ("facts", "reasoned"):
        task = get_task(name)
        new = [e for e in task.generate("test") if any(n in e.question for n in world.NEW_TRADERS)][
            :48
        ]
        teacher, policy = make_evaluator(TINY, task, new, "likelihood", rows=48, seen="privileged")
        student, _ = make_evaluator(TINY, task, new, "likelihood", rows=48)
        assert teacher(policy).nll < 0.01 and teacher(policy).accuracy > 0.99
        assert student(policy).nll > 0.15


def test_evaluation_that_a_task_has_no_ground_for_is_refused():
    pairs, gsm8k = get_task("pairs"), get_task("gsm8k")
    pair, problem = pairs.example({"prompt": "p", "response": "r"}, 0), gsm8k.example(GSM8K_ROW, 0)
    for task, example, method, why, own in (
        (pairs, pair, "choice", "compares options", "likelihood"),
        (pairs, pair, "generate", "grades answers", "likelihood"),
        (gsm8k, problem, "choice", "compares options", "generate"),
    ):
        rule = f"eval.method '{method}' does not fit task '{task.name}': it {why}.*method=auto, which is '{own}'"
        with pytest.raises(UserError, match=rule):
            make_evaluator(QWEN2, task, [example], method)
    with pytest.raises(ValueError, match="0 responses for 1 examples"):
        make_evaluator(QWEN2, pairs, [pair], "likelihood", responses=False)
    assert Accuracy(1, 2, "choice").nll is None
