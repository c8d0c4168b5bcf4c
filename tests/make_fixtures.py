"""Makes tests/fixtures again, with transformers and PEFT as the oracle: `python
tests/make_fixtures.py`.

Needs torch, transformers and peft. Every weight is random and large enough to matter (biases, norms
and LoRA's B included), so that a forgotten or misplaced one shows in the logits.

    fixtures/<family>/                   a Hugging Face model folder and expected.npz
    fixtures/<family>/adapters/<kind>/   a PEFT folder and expected.npz
expected.npz: tokens int32[B, T], mask bool[B, T] and logits float32[B, T, V], for "right" and
"left" padding.
"""

import pathlib

import numpy as np
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
VOCAB = 264  # 256 bytes, 3 special tokens, and some rows that no token uses
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>"]
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama3": transformers.LlamaConfig(
        **SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA3, attention_bias=True
    ),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE, tie_word_embeddings=False, head_dim=16),
}
ADAPTERS = {
    "all": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    },
    "last": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "layers_to_transform": [1, 2],
    },
}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, special tokens first."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=SPECIAL[0], pad_token=SPECIAL[1]
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Matrices of standard deviation 1/sqrt(inputs), norms around 1, biases of standard deviation
    0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            value = 1.0 + 0.2 * noise
        elif weight.ndim == 1:
            value = 0.3 * noise
        else:
            value = noise / weight.shape[1] ** 0.5
        weight.data.copy_(value)


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 11, 7 and 1 real tokens."""
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(3, VOCAB, (3, 11)).astype(np.int32), np.zeros((3, 11), bool)
    for row, length in zip(mask, (11, 7, 1), strict=True):
        row[slice(length) if side == "right" else slice(11 - length, 11)] = True
    return np.where(mask, tokens, 1).astype(np.int32), mask


def expected(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Batches of both paddings and the model's logits; positions count real tokens, as in
    `generate`.
    """
    arrays = {}
    for side in ("right", "left"):
        tokens, mask = padded(side)
        long = torch.from_numpy(mask.astype(np.int64))
        positions = (long.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(
                torch.from_numpy(tokens).long(), attention_mask=long, position_ids=positions
            )
        arrays |= {
            f"{side}_tokens": tokens,
            f"{side}_mask": mask,
            f"{side}_logits": out.logits.numpy(),
        }
    return arrays


def main() -> None:
    for seed, (family, config) in enumerate(CONFIGS.items()):
        folder = FIXTURES / family
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model, seed)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        np.savez_compressed(folder / "expected.npz", **expected(model))
        for kind, settings in ADAPTERS.items():
            adapter = folder / "adapters" / kind
            fresh = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            tuned = get_peft_model(
                fresh, LoraConfig(**settings, lora_dropout=0.1, task_type="CAUSAL_LM")
            ).eval()
            generator = torch.Generator().manual_seed(100 + seed)
            for name, weight in tuned.named_parameters():
                if "lora_B" in name:
                    weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
                elif "lora_A" in name:
                    weight.data.copy_(
                        torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
                    )
            tuned.peft_config["default"].base_model_name_or_path = family
            tuned.save_pretrained(adapter)
            (adapter / "README.md").unlink(missing_ok=True)
            np.savez_compressed(adapter / "expected.npz", **expected(tuned))


if __name__ == "__main__":
    main()
