"""Writes the fixtures' models as GGUF files."""

import pathlib

import gguf
import numpy as np
from safetensors.numpy import load_file

from spear_jax.models.io.huggingface import load_model

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
Q = gguf.GGMLQuantizationType
BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{BLOCK[rest]}.{kind}"


def interleave(tensor, heads):
    """llama.cpp's converter: halves of a head's rows become neighbours."""
    width = tensor.shape[0] // heads
    order = [
        head * width + i // 2 + (i % 2) * (width // 2)
        for head in range(heads)
        for i in range(width)
    ]
    return tensor[order]


def write_gguf(path, family, kind=Q.F32, architecture=None, change=None, **meta):
    """Writes a fixture as GGUF. `meta` overrides metadata, None leaves a key out; `change` edits
    the tensors.
    """
    model = load_model(FIXTURES / family, "float32")
    config, arch = model.config, architecture or model.config.family
    tokens = [model.tokenizer.convert_ids_to_tokens(i) for i in range(len(model.tokenizer))]
    fill = [f"[unused{i}]" for i in range(config.vocab_size - len(tokens))]
    keys = {
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "context_length": config.max_positions,
    }
    values = {f"{arch}.{key}": np.uint32(value) for key, value in keys.items()}
    values |= {
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + fill,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * len(fill),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": np.uint32(0),
        "tokenizer.ggml.padding_token_id": np.uint32(1),
        "tokenizer.chat_template": CHAT,
    }
    values["tokenizer.ggml.tokens"] = [*values["tokenizer.ggml.tokens"][:-1], "ab"]
    values["tokenizer.ggml.token_type"][-1] = 1
    values |= {key.replace("__", "."): value for key, value in meta.items()}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if isinstance(value, np.uint32):
            writer.add_uint32(key, int(value))
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    tensors = load_file(FIXTURES / family / "model.safetensors")
    for name, tensor in tensors.items():
        if config.family == "llama" and "q_proj" in name:
            tensor = interleave(tensor, config.heads)
        if config.family == "llama" and "k_proj" in name:
            tensor = interleave(tensor, config.kv_heads)
        tensors[name] = tensor
    named = {gguf_name(name): tensor for name, tensor in tensors.items()}
    for name, tensor in (change(named) if change else named).items():
        stored = kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else Q.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
