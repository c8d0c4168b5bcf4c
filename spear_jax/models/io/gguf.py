"""GGUF files: config from metadata, tensors under Hugging Face names, and the tokenizer that the
metadata spells out.

Sources: the GGUF specification (ggml's docs/gguf.md) and the `gguf` package, which decodes every
quantisation.

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

from spear_jax.core.errors import UserError, unknown
from spear_jax.core.files import expanded
from spear_jax.models.config import FAMILIES, ModelConfig, parse_config
from spear_jax.models.decoder import rope_frequencies
from spear_jax.models.io.gguf_tokenizer import build_tokenizer, special_ids

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
    family = meta.get("general.architecture", str)
    if family not in FAMILIES:
        raise unknown("GGUF architecture", str(family), FAMILIES)
    raw = _raw_config(meta, family, tensors)
    config = parse_config(raw)
    return (
        config,
        raw,
        {
            key: raw[key]
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if raw[key] is not None
        },
        build_tokenizer(meta, str(path), config.max_positions),
        GgufTensors(path, config, tensors),
    )


class _Metadata:
    """Typed look-ups in a GGUF's key-value store."""

    def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader):
        self._path, self._fields = path, reader.fields

    def get(self, key: str, kind: type) -> Any:
        """The value, or None where the key is absent; floats as the shortest decimal of their 32
        bits.
        """
        if key not in self._fields:
            return None
        value = self._fields[key].contents()
        return float(str(np.float32(value))) if kind is float else kind(value)

    def need(self, key: str, kind: type) -> Any:
        """The value; raises UserError where the key is absent."""
        value = self.get(key, kind)
        if value is None:
            raise UserError(
                f"{str(self._path)!r} has no metadata {key!r}; convert or fetch the GGUF again."
            )
        return value


def _raw_config(meta: _Metadata, family: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The metadata as a config.json."""
    width, heads = (
        meta.need(f"{family}.embedding_length", int),
        meta.need(f"{family}.attention.head_count", int),
    )
    head_width = meta.get(f"{family}.attention.key_length", int) or width // heads
    turned = meta.get(f"{family}.rope.dimension_count", int) or head_width
    if turned != head_width:
        raise UserError(
            f"the GGUF turns {turned} of {head_width} head dimensions; partial RoPE is not "
            f"supported."
        )
    scaling = meta.get(f"{family}.rope.scaling.type", str) or "none"
    if scaling != "none":
        raise UserError(
            f"the GGUF's RoPE scaling {scaling!r} is not supported; supported: none, Llama 3's "
            f"table."
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
        "num_hidden_layers": meta.need(f"{family}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{family}.attention.head_count_kv", int) or heads,
        "head_dim": head_width,
        "intermediate_size": meta.need(f"{family}.feed_forward_length", int),
        "hidden_act": "silu",
        "rms_norm_eps": meta.need(f"{family}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": meta.get(f"{family}.rope.freq_base", float) or 10000.0,
        "max_position_embeddings": meta.get(f"{family}.context_length", int) or 2048,
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
