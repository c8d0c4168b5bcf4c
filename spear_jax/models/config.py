"""Model shapes read from a Hugging Face `config.json`: Llama, Qwen2/2.5 and Qwen3 decoders."""

import dataclasses
import json
import pathlib
from typing import Any

from spear_jax.core.errors import UserError, unknown

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling. Source: Llama 3 (arXiv 2407.21783), as in `config.json`'s
    rope_scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static shape of a decoder; hashable, so it can be closed over by jitted functions."""

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int


def read_config(path: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads `config.json` of a model folder.

    Returns: the static shape, and the raw JSON (kept for export).
    Raises: UserError for a folder without config.json, an unsupported family, or a feature that we
        do not have.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"no config.json in {str(path)!r}: a model folder holds config.json, tokenizer.json "
            f"and *.safetensors. "
            "Give a Hugging Face model folder, a Hub id, or a .gguf file."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); fetch the model again.") from error
    return parse_config(raw), raw


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turns a Hugging Face config into a ModelConfig; raises UserError for what is not
    supported.
    """
    family = str(raw.get("model_type", "?"))
    if family not in FAMILIES:
        raise unknown("model family (config.json's model_type)", family, FAMILIES)
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    for name in needed:
        if not isinstance(raw.get(name), int) or raw[name] < 1:
            raise UserError(
                f"config.json's {name!r} is {raw.get(name)!r}, not a count; fetch the model again."
            )
    if raw.get("use_sliding_window"):
        raise UserError(
            "config.json asks for sliding-window attention, which is not supported; use another "
            "model."
        )
    if raw.get("mlp_bias") or raw.get("hidden_act", "silu") != "silu":
        raise UserError(
            "config.json asks for MLP biases or an activation other than silu, which are not "
            "supported."
        )
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(
            f"config.json's num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{kv_heads}."
        )
    qwen2 = family == "qwen2"
    default_head = (
        128 if family == "qwen3" else raw["hidden_size"] // heads
    )  # transformers' defaults
    theta, scaling = _rope(raw)
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_width=raw.get("head_dim") or default_head,
        mlp_width=raw["intermediate_size"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qwen2 or bool(raw.get("attention_bias", False)),
        o_bias=not qwen2 and bool(raw.get("attention_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_positions=raw.get("max_position_embeddings", 2048),
    )


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling; transformers 5 writes `rope_parameters`, earlier releases
    `rope_theta`/`rope_scaling`.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"config.json's rope type {kind!r} is not supported; supported: default, llama3."
        )
    for name in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        if name not in rope:
            raise UserError(
                f"config.json's llama3 RoPE scaling lacks {name!r}; fetch the model again."
            )
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_positions=int(rope["original_max_position_embeddings"]),
    )
