"""Live parity with transformers and PEFT; needs torch, and for the real model $SPEAR_SMOLLM2, a
folder made by `python -m spear_jax.fetch smollm2-135m-instruct --out=DIR`.
"""

import os
import pathlib

import jax
import numpy as np
import pytest

from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.io.huggingface import load_model, save_model
from spear_jax.models.io.peft import save_adapter
from spear_jax.models.lora import LoraConfig, init_lora, merge_lora
from spear_jax.rollout.sampler import Sampler
from spear_jax.rollout.token_sampling import SamplingConfig

torch = pytest.importorskip("torch", reason="live parity needs torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="live parity needs peft")
pytestmark = pytest.mark.live

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FAMILIES = ("llama", "llama3", "qwen2", "qwen3")
NO_LORA = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=("q",))
NEW_TOKENS = 32
PROMPTS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What is 17 + 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "List two mammals that live in water.",
    "What does a thermometer measure?",
    "Give a synonym for happy.",
    "Which planet is closest to the sun?",
    "Is glass a conductor of electricity? Answer yes or no.",
    "A farmer has 12 cows and sells 5. How many are left?",
    "Explain photosynthesis in a sentence.",
    "What is the opposite of cold?",
    "Which of these is a fruit: (A) carrot (B) apple (C) potato? Answer with the letter.",
    "Finish the sentence: The early bird",
    "What language is spoken in Brazil?",
    "How many days are there in a leap year?",
    "Tell me a very short story about a fox and a crow who share a piece of cheese.",
]


def hugging_face(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hugging_face_logits(model, tokens, mask):
    long = torch.from_numpy(mask.astype(np.int64))
    positions = (long.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(
            torch.from_numpy(tokens).long(), attention_mask=long, position_ids=positions
        ).logits.numpy()


def batch(family, side):
    want = np.load(FIXTURES / family / "expected.npz")
    return want[f"{side}_tokens"], want[f"{side}_mask"]


def noisy_lora(lora, config):
    tree = init_lora(jax.random.key(1), lora, config)
    return jax.tree.map(
        lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(2), leaf.shape), tree
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_live_hugging_face(family):
    model, live = load_model(FIXTURES / family, "float32"), hugging_face(FIXTURES / family)
    for side in ("right", "left"):
        tokens, mask = batch(family, side)
        got = logits(Decoder(model.config, NO_LORA), None, model.base, tokens, mask)
        np.testing.assert_allclose(
            got[mask], hugging_face_logits(live, tokens, mask)[mask], atol=1e-4
        )


@pytest.mark.parametrize("last_layers", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_adapter_and_hugging_face_our_merged_model(family, last_layers, tmp_path):
    model = load_model(FIXTURES / family, "float32")
    lora = LoraConfig(4, 6.0, 0.1, ("q", "k", "v", "o", "gate", "up", "down"), last_layers)
    tree = noisy_lora(lora, model.config)
    save_adapter(tmp_path / "adapter", tree, lora, model.config, family)
    tuned = peft.PeftModel.from_pretrained(
        hugging_face(FIXTURES / family), str(tmp_path / "adapter")
    ).eval()
    merged = merge_lora(model.base, tree, lora)
    save_model(
        tmp_path / "merged", merged, model.raw_config, model.tokenizer, model.generation_config
    )
    tokens, mask = batch(family, "left")
    got = np.asarray(logits(Decoder(model.config, lora), tree, model.base, tokens, mask))[mask]
    np.testing.assert_allclose(got, hugging_face_logits(tuned, tokens, mask)[mask], atol=1e-4)
    live = hugging_face(tmp_path / "merged")
    np.testing.assert_allclose(got, hugging_face_logits(live, tokens, mask)[mask], atol=1e-4)


@pytest.fixture(scope="module")
def smollm2():
    folder = os.environ.get("SPEAR_SMOLLM2", "")
    if not folder:
        pytest.skip(
            "set SPEAR_SMOLLM2 to a folder made by `python -m spear_jax.fetch "
            "smollm2-135m-instruct --out=DIR`"
        )
    return load_model(folder, "float32"), hugging_face(folder)


def chat_batch(tokenizer):
    """The 20 prompts as chats, left-padded: int32[20, P], bool[20, P]."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
        )
        for p in PROMPTS
    ]
    out = tokenizer(
        texts, padding=True, padding_side="left", return_tensors="np", add_special_tokens=False
    )
    return out["input_ids"].astype(np.int32), out["attention_mask"].astype(bool)


def greedy(model, prompts):
    """The most likely tokens, at most 32; rows do not stop."""
    config = SamplingConfig(NEW_TOKENS, 0.0, 0, 1.0, eos_ids=(-1,), pad_id=0)
    sampler = Sampler(Decoder(model.config, NO_LORA))
    keys = np.zeros((len(prompts), 2), np.uint32)
    return [done.tokens for done in sampler.generate(None, model.base, prompts, keys, config)]


def test_smollm2_logits_equal_live_hugging_face(smollm2, record_property):
    model, live = smollm2
    tokens, mask = chat_batch(model.tokenizer)
    got = np.asarray(
        logits(Decoder(model.config, NO_LORA), None, model.base, tokens[:4], mask[:4])
    )[mask[:4]]
    worst = np.abs(got - hugging_face_logits(live, tokens[:4], mask[:4])[mask[:4]]).max()
    record_property("max_abs_logit_difference", float(worst))
    print(f"SmolLM2 max abs logit difference {worst:.2e}, logits up to {np.abs(got).max():.1f}")
    assert worst < 1e-3  # 30 layers in float32, logits up to about 30


def test_smollm2_greedy_text_is_token_identical_to_generate(smollm2):
    model, live = smollm2
    tokens, mask = chat_batch(model.tokenizer)
    ours = greedy(model, [row[real].tolist() for row, real in zip(tokens, mask, strict=True)])
    for row, prompt in enumerate(PROMPTS):
        ids = torch.from_numpy(tokens[row][mask[row]]).long()[None]
        out = live.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        theirs = out[0, ids.shape[1] :].tolist()
        assert theirs, prompt
        assert ours[row][: len(theirs)] == theirs, prompt
