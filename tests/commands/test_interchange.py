"""Runs taken out through the commands, and read by transformers, PEFT and lm-eval as
docs/guides/interchange.md says.

The readers need torch, peft and lm_eval; the real model needs $SPEAR_SMOLLM2 (a folder made by
`python -m spear_jax.fetch smollm2-135m-instruct --out=DIR`) and real data.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from gguf_files import CHAT, Q, write_gguf
from processes import environment
from run_sizes import SMALL

from spear_jax import export
from spear_jax.experiment import builder, run_folder
from spear_jax.experiment.checkpoint import restore
from spear_jax.models.decoder import logits

TINY_AND_SMOLLM2 = ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)]
ROOT = pathlib.Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/interchange.md").read_text()
SIZE = SMALL | {"rounds": 1, "eval.limit": 120}
SMOLLM2 = {"eval.limit": 60, "rollout.max_new_tokens": 4, "rollout.max_new_tokens_revision": 4}


def blocks(language):
    """The guide's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def python(folder, *arguments):
    """Runs this Python in `folder` as a user would; one device."""
    env = environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def train(folder, config, settings):
    """A short run in runs/quickstart, and the guide's exports of it."""
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    source = f"--config={ROOT}/configs/{config}"
    python(folder, "-m", "spear_jax.train", source, "--workdir=runs/quickstart", "--quiet", *flags)
    exports = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("spear-jax export ")
    ]
    assert len(exports) == 2
    with contextlib.chdir(folder):
        for line in exports:
            export.main(shlex.split(line)[2:])
    return TrainedCohort(folder)


@dataclasses.dataclass
class TrainedCohort:
    """A folder with runs/quickstart, adapters/quickstart and models/quickstart."""

    folder: pathlib.Path

    def __post_init__(self):
        workdir = self.folder / "runs/quickstart"
        self.built = builder.build(run_folder.read_run_config(workdir), jax.devices()[:1])
        self.lora = restore(self.built, workdir, None)[0].lora

    def batch(self, count):
        """The first prompts of the test set, padded on the right: int32[B, P], bool[B, P]."""
        prompts = self.built.evaluator.prompts[:count]
        mask = np.arange(max(map(len, prompts))) < np.array([[len(prompt)] for prompt in prompts])
        tokens = np.full(mask.shape, self.built.model.pad_id, np.int32)
        tokens[mask] = np.concatenate(prompts)
        return tokens, mask

    def logits(self, lora, tokens, mask):
        return np.asarray(
            logits(self.built.federation.decoder, lora, self.built.model.base, tokens, mask)
        )[mask]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tiny"), "quickstart.py", SIZE)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory, data_dir):
    model = os.environ.get("SPEAR_SMOLLM2", "")
    if not model:
        pytest.skip(
            "set SPEAR_SMOLLM2 to a folder made by `python -m spear_jax.fetch "
            "smollm2-135m-instruct --out=DIR`"
        )
    settings = SIZE | SMOLLM2 | {"model": model, "data.path": data_dir / "arc_easy"}
    return train(tmp_path_factory.mktemp("smollm2"), "spear.py:arc_easy,smollm2-135m,cpu", settings)


@pytest.fixture
def trained(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory):
    """The embedded model as a GGUF with 8-bit blocks and a chat template, trained for a round."""
    folder = tmp_path_factory.mktemp("gguf")
    raw = json.loads((builder.TINY / "tokenizer.json").read_text())
    vocab = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    write_gguf(
        folder / "tiny.gguf",
        builder.TINY,
        Q.Q8_0,
        tokenizer__ggml__tokens=vocab,
        tokenizer__ggml__token_type=[3] * 2 + [1] * (len(vocab) - 2),
        tokenizer__ggml__merges=[" ".join(pair) for pair in raw["model"]["merges"]],
    )
    return train(folder, "quickstart.py", SIZE | {"model": folder / "tiny.gguf"})


# Asked for before a run is made, so that nothing is trained for a test that is skipped.
@pytest.fixture
def torch():
    return pytest.importorskip(
        "torch", reason="reading our folders with other programs needs torch"
    )


@pytest.fixture
def peft(torch):
    return pytest.importorskip("peft", reason="reading our adapter needs peft")


@pytest.fixture
def lm_eval(torch):
    return pytest.importorskip("lm_eval", reason="scoring with the harness needs lm_eval")


def their_logits(torch, model, tokens, mask):
    with torch.no_grad():
        got = model.eval()(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
        ).logits
    return got.numpy()[mask]


def largest_difference(got, want, what, record_property):
    worst = float(np.abs(got - want).max())
    record_property(f"max_abs_difference {what}", worst)
    print(f"{what}: largest difference {worst:.1e}, values up to {np.abs(want).max():.1f}")
    return worst


def test_model_from_a_gguf_leaves_with_its_tokenizer_and_chat_template(from_gguf):
    from transformers import AutoConfig, AutoTokenizer

    folder, ours = from_gguf.folder / "models/quickstart", from_gguf.built.model.tokenizer
    theirs, embedded = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(builder.TINY),
    )
    assert theirs.chat_template == ours.chat_template == CHAT
    assert (
        (theirs.eos_token_id, theirs.pad_token_id)
        == (ours.eos_token_id, ours.pad_token_id)
        == (0, 1)
    )
    for example in from_gguf.built.evaluator.examples[:50]:
        question = from_gguf.built.evaluator.task.question(example)
        for text in (question, f"é 12\n\n<|end|>{question}"):
            assert (
                theirs(text)["input_ids"] == ours(text)["input_ids"] == embedded(text)["input_ids"]
            )
        chat = [{"role": "user", "content": question}]
        assert theirs.apply_chat_template(chat) == ours.apply_chat_template(chat)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.tie_word_embeddings, str(config.dtype)[-7:]) == (
        "llama",
        True,
        "float32",
    )


@pytest.mark.live
@pytest.mark.parametrize("trained", TINY_AND_SMOLLM2, indirect=True)
def test_peft_gives_our_logits_with_the_exported_adapter(torch, peft, trained, record_property):
    tokens, mask = trained.batch(8)
    ours = trained.logits(trained.lora, tokens, mask)
    assert (
        np.abs(ours - trained.logits(None, tokens, mask)).max() > 0.1
    )  # the adapter does something
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(
        trained.folder / "adapters/quickstart", dtype="float32"
    )
    theirs = their_logits(torch, tuned, tokens, mask)
    assert largest_difference(ours, theirs, "PEFT's logits", record_property) < 1e-3


@pytest.mark.live
@pytest.mark.parametrize("trained", [*TINY_AND_SMOLLM2, "from_gguf"], indirect=True)
def test_transformers_gives_our_logits_with_the_merged_model(torch, trained, record_property):
    from transformers import AutoModelForCausalLM

    tokens, mask = trained.batch(8)
    ours = trained.logits(trained.lora, tokens, mask)
    model = AutoModelForCausalLM.from_pretrained(
        trained.folder / "models/quickstart", dtype="float32"
    )
    theirs = their_logits(torch, model, tokens, mask)
    assert largest_difference(ours, theirs, "transformers' logits", record_property) < 1e-3


def harness(lm_eval, folder, tmp_path):
    """The guide's lm-eval task on the merged model: the harness's model, its samples in their
    order, its accuracy.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (yaml,) = blocks("yaml")
    (tmp_path / "spear_questions.yaml").write_text(
        yaml.replace("questions.jsonl", str(folder / "questions.jsonl"))
    )
    model = HFLM(
        str(folder / "models/quickstart"),
        dtype="float32",
        add_bos_token=False,
        device="cpu",
        batch_size=16,
    )
    found = lm_eval.simple_evaluate(
        model,
        tasks=["spear_questions"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["spear_questions"], key=lambda sample: sample["doc_id"])
    return model, samples, found["results"]["spear_questions"]["acc,none"]


@pytest.mark.live
@pytest.mark.parametrize("trained", TINY_AND_SMOLLM2, indirect=True)
def test_lm_eval_scores_every_option_as_evaluate_does(
    lm_eval, trained, tmp_path, monkeypatch, record_property
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (write_questions,) = [block for block in blocks("python") if "questions.jsonl" in block]
    python(trained.folder, "-c", write_questions)
    model, samples, accuracy = harness(lm_eval, trained.folder, tmp_path)
    evaluator, base = trained.built.evaluator, trained.built.model.base
    for sample, prompt, example in zip(samples, evaluator.prompts, evaluator.examples, strict=True):
        ids = [
            model._encode_pair(*pair) for pair in sample["arguments"]
        ]  # how the harness tokenises
        assert ids == [(prompt, evaluator.renderer.continuation(label)) for label in example.labels]
        assert sample["target"] == example.gold
    scores = evaluator.choice_scores(base, trained.lora)
    theirs = [np.array([score for score, _ in sample["filtered_resps"]]) for sample in samples]
    ours = [row[: len(one)] for row, one in zip(scores, theirs, strict=True)]
    together = np.concatenate(ours), np.concatenate(theirs)
    assert largest_difference(*together, "lm-eval's log-likelihoods", record_property) < 1e-3
    assert [row.argmax() for row in ours] == [row.argmax() for row in theirs]
    assert accuracy == evaluator(base, trained.lora).value
    record_property("smallest margin", float(min(np.diff(np.sort(row)[-2:])[0] for row in ours)))
