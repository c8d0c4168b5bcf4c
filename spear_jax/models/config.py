"""Model shapes read from a Hugging Face `config.json`: Llama, Qwen2/2.5 and Qwen3 decoders.

A key that changes numbers in transformers is computed, or refused by name. `KEYS` says which; what
it does not have changes no number there.

Source: transformers 5, LlamaConfig, Qwen2Config, Qwen3Config and the standardisation of RoPE.
"""

import dataclasses
import pathlib
from typing import Any

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.files import read_json_object

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}  # transformers' defaults
MOST = 2**31 - 1  # of any count
# What becomes of each key that changes numbers in transformers.
KEYS = {
    "model_type": "computed",
    "vocab_size": "computed",
    "hidden_size": "computed",
    "num_hidden_layers": "computed",
    "num_attention_heads": "computed",
    "num_key_value_heads": "computed; qwen2, qwen3: 32 where it is absent",
    "head_dim": "computed; qwen3: 128 where it is absent",
    "intermediate_size": "computed",
    "rms_norm_eps": "computed",
    "max_position_embeddings": "computed: the longest sequence",
    "tie_word_embeddings": "computed; a head of its own in the weights is used, as in transformers",
    "attention_bias": "computed; qwen2 has biases on q, k and v, whatever it says",
    "rope_theta": "computed; one inside rope_scaling or rope_parameters comes first",
    "rope_scaling": "computed for types default and llama3, others refused; replaces rope_parameters",
    "rope_parameters": "computed for types default and llama3, others refused",
    "partial_rotary_factor": "refused unless 1",
    "original_max_position_embeddings": "refused unless it is that of the RoPE scaling",
    "hidden_act": "refused unless silu",
    "mlp_bias": "refused unless false",
    "use_sliding_window": "refused unless false",
    "layer_types": "refused unless all are full_attention",
    "quantization_config": "refused unless null",
    "eos_token_id": "computed: ends a completion, besides the tokenizer's",
    "pad_token_id": "computed",
    "dtype": "replaced by the config field dtype",
    "torch_dtype": "replaced by the config field dtype",
    "attention_dropout": "not read: it acts in training alone, where lora.dropout stands for it",
}


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
    Raises: UserError for a folder without config.json, an unsupported family, a feature that we do
        not have, or a value of the wrong type.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"no config.json in {str(path)!r}: a model folder holds config.json, tokenizer.json "
            f"and *.safetensors. "
            "Give a Hugging Face model folder, a Hub id, or a .gguf file."
        )
    raw = read_json_object(file, "fetch the model again")
    return parse_config(raw), raw


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turns a Hugging Face config into a ModelConfig.

    Raises: UserError for a value of the wrong type or without sense, and for what is not supported.
    """
    family = raw.get("model_type", "?")
    if not isinstance(family, str) or family not in FAMILIES:
        raise unknown("model family (config.json's model_type)", str(family), FAMILIES)
    _refuse_unsupported(raw)
    qwen = family != "llama"
    heads = _count(raw, "num_attention_heads")
    kv_heads = _count(raw, "num_key_value_heads", 32 if qwen else heads, null=heads)
    if heads % kv_heads:
        raise UserError(
            f"config.json's num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{kv_heads}."
        )
    width = _count(raw, "hidden_size")
    split = max(1, width // heads)
    head_width = _count(raw, "head_dim", 128 if family == "qwen3" else split, null=split)
    if head_width % 2:
        raise UserError(
            f"config.json's head_dim is {head_width}; rotary embeddings turn pairs, so it must be "
            f"even. Check hidden_size {width} and num_attention_heads {heads}."
        )
    theta, scaling = _rope(raw, _count(raw, "max_position_embeddings", MAX_POSITIONS[family]))
    biased = _flag(raw, "attention_bias")
    return ModelConfig(
        family=family,
        vocab_size=_count(raw, "vocab_size"),
        width=width,
        layers=_count(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=_count(raw, "intermediate_size"),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or biased,
        o_bias=family != "qwen2" and biased,
        qk_norm=family == "qwen3",
        tied=_flag(raw, "tie_word_embeddings"),
        max_positions=_count(raw, "max_position_embeddings", MAX_POSITIONS[family]),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Raises UserError for the features that KEYS calls refused, RoPE's aside."""
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _refused(raw, "hidden_act", "the activation must be 'silu'")
    if _flag(raw, "mlp_bias"):
        raise _refused(raw, "mlp_bias", "MLPs with biases are not supported")
    if _flag(raw, "use_sliding_window"):
        raise _refused(raw, "use_sliding_window", "sliding-window attention is not supported")
    layers = raw.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
    ):
        raise _refused(raw, "layer_types", "only 'full_attention' is supported")
    if raw.get("quantization_config"):
        raise _refused(raw, "quantization_config", "quantised weights are not read from a folder")


def _refused(raw: dict[str, Any], name: str, rule: str) -> UserError:
    return UserError(f"config.json's {name} is {shown(raw[name])}; {rule}. Use another model.")


def _count(raw: dict[str, Any], name: str, default: int | None = None, null: int = 0) -> int:
    """Returns a positive whole number; `null` is what transformers takes for a null, 0 if none."""
    value = raw.get(name, default)
    if value is None and null and name in raw:
        return null
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise UserError(
            f"config.json's {name} is {shown(value)}; it must be a whole number from 1 to {MOST}. "
            "Fetch the model again."
        )
    return value


def _number(
    raw: dict[str, Any], name: str, default: float | None = None, where: str = "config.json's"
) -> float:
    """Returns a positive, finite number."""
    value = raw.get(name, default)
    kind_fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not kind_fits or not 0 < abs(value) <= 3.4e38 or value < 0:
        raise UserError(
            f"{where} {name} is {shown(value)}; it must be a positive number. Fetch the model "
            "again."
        )
    return float(value)


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise UserError(
            f"config.json's {name} is {shown(value)}; it must be true or false. Fetch the model "
            "again."
        )
    return value


def _rope(raw: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Returns RoPE's base and scaling.

    transformers 5 writes `rope_parameters`, earlier releases `rope_theta` and `rope_scaling`. Where
    both stand, `rope_scaling` replaces `rope_parameters`, as there.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _refused(raw, name, "it must be one object of numbers, the same for all layers")
    theta = _number(rope, "rope_theta", _number(raw, "rope_theta", 10000.0))
    for stated in (rope, raw):
        if stated.get("partial_rotary_factor") not in (None, 1):
            raise _refused(stated, "partial_rotary_factor", "partial RoPE is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"config.json's {name} has the type {shown(kind)}; supported are default and llama3. "
            "Use another model."
        )
    original = raw.get("original_max_position_embeddings")
    held = rope.get("original_max_position_embeddings", max_positions)
    if original not in (None, held):
        raise _refused(
            raw, "original_max_position_embeddings", f"it must be {shown(held)}, as in {name}"
        )
    numbers = {
        key: _number(rope, key, where=f"config.json's llama3 {name}:")
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    }
    if not isinstance(held, int) or isinstance(held, bool) or not 1 <= held <= MOST:
        raise _refused(
            {**raw, "original_max_position_embeddings": held},
            "original_max_position_embeddings",
            f"in {name} it must be a whole number from 1 to {MOST}",
        )
    return theta, RopeScaling(**numbers, original_positions=held)
