"""GGUF files: config from metadata, tensors under Hugging Face names, and the tokenizer that the
metadata spells out.

A metadata key that changes numbers in llama.cpp is computed, or refused by name (`FIXED`).

Sources: the GGUF specification (ggml's docs/gguf.md); the `gguf` package, which decodes every
quantisation; llama.cpp's llama-model.cpp for what its keys do and for their defaults.

Departures from llama.cpp:
  1. Quantised blocks are decoded once, on load, to the model's dtype; products run in that dtype,
     not on blocks.
  2. A `rope_freqs` tensor is accepted only where it equals Llama 3's published scaling (low 1, high
     4, 8192 original positions), because config.json states the scaling and not the table.
"""

import os
import pathlib
from typing import Any

import gguf
import numpy as np

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.files import expanded
from spear_jax.models.config import FAMILIES, ModelConfig, parse_config
from spear_jax.models.decoder import rope_frequencies
from spear_jax.models.io.gguf_tokenizer import build_tokenizer, end_of_generation, special_ids

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_TABLE = "rope_freqs.weight"
# Keys of an architecture that change numbers and are not computed, with the values that change
# none. Without a type, llama.cpp scales RoPE linearly by the factor.
FIXED = {
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.dimension_sections": (),
    "attention.layer_norm_epsilon": (),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attention.sliding_window_pattern": (),
    "attention.temperature_scale": (0,),
    "attention.temperature_length": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
}
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load_gguf(
    path: str | os.PathLike,
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any], Any, "GgufTensors"]:
    """Opens a GGUF file; no tensor is decoded yet.

    Returns: the config, what its config.json and generation_config.json would say, a transformers
        fast tokenizer, and the tensors as a source for `weights.fill`.
    Raises: UserError for a missing, truncated or unsupported file.
    """
    path = expanded(path)
    if not path.is_file():
        raise UserError(f"no GGUF file {str(path)!r}.")
    try:
        reader = gguf.GGUFReader(path)
        meta = _Metadata(path, reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        OSError,
    ) as error:  # what a cut-off mmap read raises
        raise UserError(
            f"{str(path)!r} is truncated or no GGUF file ({error}); fetch it again."
        ) from error
    if meta.get("general.type", str) not in (None, "model"):
        raise UserError(
            f"{str(path)!r} holds a {meta.get('general.type', str)!r} (general.type), not a model; "
            "give the model's GGUF."
        )
    if (meta.get("split.count", int) or 1) > 1:
        raise UserError(
            f"{str(path)!r} is one of {meta.get('split.count', int)} parts (split.count); join "
            "them with llama.cpp's `llama-gguf-split --merge`."
        )
    family = meta.get("general.architecture", str)
    if family not in FAMILIES:
        raise unknown("GGUF architecture", str(family), FAMILIES)
    raw = _raw_config(meta, family, tensors)
    config = parse_config(raw)
    tokenizer = build_tokenizer(meta, str(path), config.max_positions)
    generation = {key: raw[key] for key in ("bos_token_id", "pad_token_id") if raw[key] is not None}
    generation["eos_token_id"] = end_of_generation(meta)
    return config, raw, generation, tokenizer, GgufTensors(path, config, tensors)


_TYPES = {
    int: "a whole number of at least 1, or a token's id",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
}


class _Metadata:
    """Typed look-ups in a GGUF's key-value store."""

    def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader):
        self._path, self._fields = path, reader.fields

    def get(self, key: str, kind: type) -> Any:
        """The value, or None where the key is absent; floats as the shortest decimal of their 32
        bits.

        Raises: UserError for a value of another type, and for a number that is none.
        """
        if key not in self._fields:
            return None
        try:
            value = self._fields[key].contents()
        except (ValueError, IndexError) as error:  # a text that is not UTF-8 among them
            raise self._wrong(key, f"unreadable ({shown(str(error))})", kind) from error
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if np.isfinite(np.float32(value)):
                return float(str(np.float32(value)))
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        raise self._wrong(key, shown(value), kind)

    def _wrong(self, key: str, value: str, kind: type) -> UserError:
        return UserError(
            f"{str(self._path)!r}: metadata {key!r} is {value}; it must be {_TYPES[kind]}. Convert "
            "or fetch the GGUF again."
        )

    def count(self, key: str, default: int | None = None) -> int:
        """A count of at least 1; raises UserError for any other value, and without a default."""
        value = self.get(key, int)
        value = default if value is None else value
        if value is None or not 1 <= value < 2**31:
            raise self._wrong(key, str(value), int)
        return value

    def check_fixed(self, family: str) -> None:
        """Raises UserError for a key of `FIXED` with a value that changes numbers."""
        for name, harmless in FIXED.items():
            key = f"{family}.{name}"
            value = self._fields[key].contents() if key in self._fields else None
            if name == "rope.scaling.factor" and self.get(f"{family}.rope.scaling.type", str) == (
                "none"
            ):
                continue
            if value is not None and value not in harmless:
                rule = f"only {' or '.join(map(str, harmless))} is" if harmless else "it is not"
                raise UserError(
                    f"{str(self._path)!r}: metadata {key!r} is {shown(value)}; {rule} supported. "
                    "Use the model's safetensors folder, or another model."
                )

    def positive(self, key: str, default: float | None = None) -> float:
        """A positive number; raises UserError for any other value, and without a default."""
        value = self.get(key, float)
        value = default if value is None else value
        if value is None or value <= 0:
            raise self._wrong(key, str(value), float)
        return value


def _raw_config(meta: _Metadata, family: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The metadata as a config.json."""
    meta.check_fixed(family)
    width, heads = (
        meta.count(f"{family}.embedding_length"),
        meta.count(f"{family}.attention.head_count"),
    )
    head_width = meta.count(f"{family}.attention.key_length", max(1, width // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        other = meta.count(f"{family}.{name}", head_width)
        if other != head_width:
            raise UserError(
                f"the GGUF's {family}.{name} is {other}, but a head has {head_width} dimensions; "
                "only heads of one width, turned whole, are supported. Use another model."
            )
    if "token_embd.weight" not in tensors:
        raise UserError(
            "the GGUF has no tensor 'token_embd.weight'; fetch a whole model, not an adapter or "
            "a part."
        )
    raw = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "num_hidden_layers": meta.count(f"{family}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count(f"{family}.attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": meta.count(f"{family}.feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": meta.positive(f"{family}.attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.positive(f"{family}.rope.freq_base", 10000.0),
        "max_position_embeddings": meta.count(f"{family}.context_length", 2048),
        "tie_word_embeddings": "output.weight" not in tensors,
        **special_ids(meta),
    }
    if family != "qwen2":
        raw["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if _ROPE_TABLE in tensors:
        raw["rope_scaling"] = _llama3_scaling(
            raw, np.asarray(tensors[_ROPE_TABLE].data, np.float64)
        )
    return raw


def _llama3_scaling(raw: dict[str, Any], table: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling whose slow-down per frequency is `table` (float64[K/2]); its largest entry
    is the factor.
    """
    scaling = {"rope_type": "llama3", "factor": float(np.float32(table.max())), **_LLAMA3}
    slowed = rope_frequencies(parse_config({**raw, "rope_scaling": scaling}))
    plain = rope_frequencies(parse_config(raw))
    if slowed.shape != table.shape or not np.allclose(plain / slowed, table, rtol=1e-4):
        raise UserError(
            "the GGUF's rope_freqs table is not Llama 3's scaling; use the model's safetensors "
            "folder."
        )
    return scaling


class GgufTensors:
    """A GGUF's tensors under Hugging Face names, decoded one at a time to float32 (or as stored,
    where unquantised).
    """

    def __init__(self, path: pathlib.Path, config: ModelConfig, tensors: dict[str, Any]):
        self.where, self._config = str(path), config
        self._tensors = {
            _hf_name(name): tensor for name, tensor in tensors.items() if name != _ROPE_TABLE
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(int(n) for n in tensor.shape[::-1])
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.where!r}: tensor {name!r} is quantised as {tensor.tensor_type.name}, "
                f"which is not supported; "
                "use F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant."
            ) from error
        if self._config.family == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = _unpermute(
                values, self._config.heads if ".q_proj." in name else self._config.kv_heads
            )
        return values


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; unknown ones keep their own, to be named in a
    message.
    """
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    return name


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from GGUF's interleaved rotary pairs (0, K/2, 1, K/2+1, ...) back to Hugging
    Face's halves.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
