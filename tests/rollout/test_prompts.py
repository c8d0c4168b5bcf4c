"""Rendering: the header, the chat template, limits, and where an answer's tokens lie."""

import datetime

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.experiment import builder
from spear_jax.experiment.config import Data, Settings
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


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% if open is defined and open %}<think>\n{% endif %}{% endif %}"
)
LINES = [
    "hello there, Hello world. The answer is A. Answer: A B C D",
    "<|user|> <|assistant|> Pick the best option and reply with its letter only. 1 22 333 yes No",
]


def sentencepiece_like(scheme):
    """Spaces become "▁", and one is put before a text: Llama 2 (a normaliser) and TinyLlama."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False)
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    raw.train_from_iterator(LINES * 20, trainer)
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if scheme == "normaliser":
        raw.pre_tokenizer = pre_tokenizers.Sequence([])
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return wrapped(raw)


def byte_level(pattern):
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(
        LINES * 20,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return wrapped(raw)


def wrapped(raw):
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = {
    "Llama 2": lambda: sentencepiece_like("normaliser"),
    "TinyLlama": lambda: sentencepiece_like("metaspace"),
    "SmolLM": lambda: byte_level(GPT2),
    "Llama 3": lambda: byte_level(LLAMA3),
    "Qwen": lambda: byte_level(LLAMA3.replace("{1,3}", "")),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_gold_response_has_the_tokens_of_the_whole_conversation(kind):
    """transformers' own encoding of question and reply as one text."""
    tokenizer = TOKENIZERS[kind]()
    task = get_task("pairs")
    example = Example("0", "hello there", (), (), 0, response="Hello world. yes")
    renderer = PromptRenderer(tokenizer, "auto", 400)
    ours = renderer.prompt(task, example) + renderer.response(task, example, 64)[0]
    messages = [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "Hello world. yes"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert ours == tokenizer.encode(whole, add_special_tokens=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_label_has_the_tokens_of_prompt_and_label_as_one_text(kind):
    """As lm-evaluation-harness: what the whole has behind the context's own tokens."""
    tokenizer = TOKENIZERS[kind]()
    task = get_task("mcqa")
    example = Example("0", "Pick the best", ("yes", "No"), ("A", "B"), 0)
    renderer = PromptRenderer(tokenizer, "never", 400)
    context = renderer.prompt(task, example)
    text = f"{task.question(example)}\n{task.templates.header}"
    for label in "AB":
        whole = tokenizer.encode(f"{text} {label}")
        assert context + renderer.continuation(label, task.templates.header) == whole


def test_what_a_template_writes_before_a_reply_stands_before_header_and_reply():
    tokenizer = TOKENIZERS["Qwen"]()
    tokenizer.chat_template = THINKS
    for opened in (False, True):
        renderer = PromptRenderer(tokenizer, "auto", 400, {"open": opened})
        task = get_task("pairs")
        example = Example("0", "hello", (), (), 0, response="Hello")
        text = renderer.prompt(task, example) + renderer.response(task, example, 64)[0]
        assert tokenizer.decode(text) == (
            "<|user|>\nhello</s>\n<|assistant|>\n<think>\n\n</think>\n\nHello</s>"
        )
        mcqa = get_task("mcqa")
        asked = Example("0", "hello", ("yes", "No"), ("A", "B"), 0)
        prompt = tokenizer.decode(renderer.prompt(mcqa, asked))
        assert prompt.endswith("<|assistant|>\n<think>\n\n</think>\n\nAnswer:")


def test_the_date_of_a_template_is_the_configs_whatever_day_it_is():
    tokenizer = TOKENIZERS["Llama 3"]()
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}Today: {{ strftime_now ('%d %b %Y') }}\n{% endif %}" + CHAT
    )
    task, example = get_task("pairs"), Example("0", "hello", (), (), 0, response="yes")
    for date, shown in (
        (datetime.date(2024, 7, 26), "26 Jul 2024"),
        (datetime.date(2030, 1, 2), "02 Jan 2030"),
    ):
        renderer = PromptRenderer(tokenizer, "auto", 400, date=date)
        assert tokenizer.decode(renderer.prompt(task, example)).startswith(f"Today: {shown}\n")


@pytest.mark.parametrize(
    "call", ["{% set f = strftime_now %}{{ f('%d') }}", "{{ strftime_now(form) }}"]
)
def test_a_date_that_cannot_be_fixed_is_refused(call):
    tokenizer = TOKENIZERS["Qwen"]()
    tokenizer.chat_template = call + CHAT
    with pytest.raises(UserError, match="asks for today's date in a form that cannot be fixed"):
        PromptRenderer(tokenizer, "auto", 400)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
        ("{% for m in messages %}{{ m.content }", "chat template fails"),
        ({"tool_use": CHAT}, "chat template fails"),
        (
            "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
            "leaves the question out",
        ),
        ("{% for m in messages %}{{ m.content.nothing.more }}{% endfor %}", "chat template fails"),
    ],
)
def test_a_template_that_fails_or_loses_the_question_is_one_message(template, words):
    tokenizer = TOKENIZERS["Qwen"]()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"{words}.*data.chat_template=never"):
        PromptRenderer(tokenizer, "auto", 400).prompt(
            get_task("pairs"), Example("0", "hello", (), (), 0, response="yes")
        )


@pytest.mark.parametrize("given", ["{", "[1]", "5", '{"messages": []}', "{'a': 1}", "[" * 100_000])
def test_template_arguments_that_are_none_are_refused(given):
    with pytest.raises(UserError, match="data.chat_template_kwargs"):
        builder.template_arguments(Settings(data=Data(chat_template_kwargs=given)))


def test_a_date_of_another_form_is_refused():
    with pytest.raises(UserError, match="data.date is 'yesterday'"):
        builder.template_arguments(Settings(data=Data(date="yesterday")))
    found = builder.template_arguments(
        Settings(data=Data(chat_template_kwargs='{"a": 1}', date="2026-01-31"))
    )
    assert found == ({"a": 1}, datetime.date(2026, 1, 31))


@pytest.mark.parametrize("closed", [False, True])
def test_a_block_of_thought_that_stays_open_before_answers_is_said(tokenizer, capsys, closed):
    """DeepSeek-R1's distilled models: past replies are written without the block."""
    ending = "<think></think>" if closed else "<think>\n"
    tokenizer.chat_template = TEMPLATE.replace("<assistant>", f"<assistant>{ending}")
    PromptRenderer(tokenizer, "auto", 200)
    told = capsys.readouterr().err
    assert ("opens <think> before a reply" in told) == (not closed)
