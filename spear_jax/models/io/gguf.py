"""GGUF files: config from metadata, tensors under Hugging Face names, and the tokenizer that the
metadata spells out.

Sources: the GGUF specification (ggml's docs/gguf.md); llama.cpp's src/llama-model.cpp and
src/llama-arch.cpp for what a key means and what its absence means; the `gguf` package, which decodes
every quantisation.

Departures from llama.cpp:
  1. Quantised blocks are decoded once, on load, to the model's dtype; products run in that dtype,
     not on blocks.
  2. A `rope_freqs` tensor is accepted only where it equals Llama 3's published scaling (low 1, high
     4, 8192 original positions), because config.json states the scaling and not the table.
  3. Scaled RoPE of other kinds (linear, YaRN, LongRoPE), windows, experts and whatever else changes
     the logits of another decoder are refused by the name of their key.
"""

import math
import os
import pathlib
import typing
from typing import Any

import gguf
import numpy as np

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.files import expanded
from spear_jax.models.config import FAMILIES, ModelConfig, parse_config
from spear_jax.models.decoder import rope_frequencies
from spear_jax.models.io.gguf_tokenizer import build_tokenizer, read_vocabulary, special_ids

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
_FOLDER = "use the model's Hugging Face folder"
_OFF = (0,)
# Keys that change numbers in llama.cpp, each with the values that change nothing; any other is
# refused. Names stand behind the architecture's: "llama.attention.scale".
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": _OFF,
    "attention.max_alibi_bias": _OFF,
    "attention.output_scale": (0, 1),
    "attention.scale": _OFF,
    "attention.shared_kv_layers": _OFF,
    "attention.sliding_window": _OFF,
    "attention.temperature_length": _OFF,
    "attention.temperature_scale": _OFF,
    "attn_logit_softcapping": _OFF,
    "embedding_scale": (0, 1),
    "expert_count": _OFF,
    "expert_shared_count": _OFF,
    "expert_used_count": _OFF,
    "final_logit_softcapping": _OFF,
    "leading_dense_block_count": _OFF,
    "logit_scale": (0, 1),
    "nextn_predict_layers": _OFF,
    "pooling_type": _OFF,
    "residual_scale": (0, 1),
    "rope.scaling.alpha": _OFF,
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 0),
    "rope.scaling.yarn_log_multiplier": _OFF,
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
# Keys of RoPE and attention that are computed, and those that nothing reads beside a neutral rest.
# Others that begin so are refused.
_KNOWN = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "attention.key_length_swa",
    "attention.layer_norm_epsilon",
    "attention.sliding_window_pattern",
    "attention.value_length_swa",
    "rope.dimension_count_swa",
    "rope.freq_base_swa",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_LONGEST_ARRAY = 1 << 22  # entries; the merges of a vocabulary of 250,000 tokens are 500,000


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
        reader = _Reader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        OSError,
    ) as error:  # what a cut-off mmap read raises
        raise UserError(
            f"{str(path)!r} is truncated or no GGUF file ({shown(str(error), 200)}); fetch it again."
        ) from error
    meta = _Metadata(path, reader)
    _check_file(meta, reader)
    family = meta.need("general.architecture", str)
    if family not in FAMILIES:
        raise unknown("GGUF architecture", family, FAMILIES)
    vocabulary = read_vocabulary(meta, str(path))
    raw = _raw_config(meta, family, tensors) | special_ids(vocabulary)
    if raw["vocab_size"] != len(vocabulary.tokens):
        raise UserError(
            f"{str(path)!r}: tokenizer.ggml.tokens holds {len(vocabulary.tokens)} tokens, but "
            f"token_embd.weight has {raw['vocab_size']} rows; convert or fetch the GGUF again."
        )
    config = parse_config(raw)
    return (
        config,
        raw,
        {
            key: raw[key]
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if raw[key] is not None
        },
        build_tokenizer(vocabulary, meta, str(path), config.max_positions),
        GgufTensors(path, config, tensors),
    )


class _Reader(gguf.GGUFReader):
    """gguf's reader, which here refuses what does not fit the file instead of going on."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, before its own contents do")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if int(raw_type) == gguf.GGUFValueType.ARRAY:
            kind = int(self._get(orig_offs, np.uint32)[0])
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if kind == gguf.GGUFValueType.ARRAY or length > _LONGEST_ARRAY:
                raise ValueError(f"its metadata has an array of arrays, or of {length} entries")
        return super()._get_field_parts(orig_offs, raw_type)


class _Metadata:
    """Typed look-ups in a GGUF's key-value store."""

    def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader):
        self._path, self._fields = path, reader.fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the keys that begin with it."""
        return [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]

    def value(self, key: str) -> Any:
        """The value as it is; None where the key is absent. Raises UserError for broken text."""
        if key not in self._fields:
            return None
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{str(self._path)!r}: {key} is not UTF-8 ({error.reason}); convert or fetch the "
                f"GGUF again."
            ) from error

    def get(self, key: str, kind: Any) -> Any:
        """The value, or None where the key is absent; floats as the shortest decimal of their 32
        bits.

        Args: kind: int (0 and up), float, bool, str, list[int] or list[str].
        Raises: UserError for a value of another type, or a number that is none.
        """
        value = self.value(key)
        if value is None:
            return None
        inner = typing.get_args(kind)
        items = value if isinstance(value, list) else [value]
        of_kind = all(type(item) is (inner[0] if inner else kind) for item in items)
        if not of_kind or isinstance(value, list) != bool(inner):
            wanted = f"list of {inner[0].__name__}" if inner else kind.__name__
            raise self.wrong(key, f"it must be of type {wanted}; convert or fetch the GGUF again")
        if kind is int and not 0 <= value < 1 << 31:
            raise self.wrong(key, "it must be 0 or a count; convert or fetch the GGUF again")
        if kind is float and not math.isfinite(value):
            raise self.wrong(key, "it must be a finite number; convert or fetch the GGUF again")
        return float(str(np.float32(value))) if kind is float else value

    def need(self, key: str, kind: Any) -> Any:
        """The value; raises UserError where the key is absent."""
        value = self.get(key, kind)
        if value is None:
            raise UserError(
                f"{str(self._path)!r} has no metadata {key!r}; convert or fetch the GGUF again."
            )
        return value

    def count(self, key: str, layers: int = 0) -> int | None:
        """A count of 1 or more, or None where the key is absent.

        Args: layers: with it, an array of one number a layer counts as the number if all are equal.
        """
        value = self.value(key)
        if layers and isinstance(value, list):
            if len(value) != layers or len(set(map(repr, value))) != 1:
                raise self.wrong(
                    key, f"layers that differ are not supported ({layers} layers); {_FOLDER}"
                )
            value = value[0]
        elif value is not None:
            value = self.get(key, int)
        if value is not None and (type(value) is not int or value < 1):
            raise self.wrong(key, "it must be 1 or more; convert or fetch the GGUF again")
        return value

    def wrong(self, key: str, rule: str) -> UserError:
        """The error for a key's value: "FILE: KEY is VALUE; RULE."."""
        return UserError(f"{str(self._path)!r}: {key} is {shown(self.value(key))}; {rule}.")


def _check_file(meta: _Metadata, reader: _Reader) -> None:
    """Raises UserError for a file that is whole, but not one model in this machine's byte order."""
    if reader.byte_order == "S":
        raise UserError(
            f"{meta.get('general.name', str) or 'the GGUF'!r} is stored in the other byte order "
            f"(big-endian); turn it with `gguf-convert-endian FILE little`."
        )
    if (meta.get("split.count", int) or 1) > 1:
        raise meta.wrong(
            "split.count",
            "a model in parts is not supported; join them with `llama-gguf-split --merge`",
        )
    kind = meta.get("general.type", str) or "model"
    if kind != "model":
        raise meta.wrong("general.type", "it must be 'model'; give the file of a whole model")


def _check_keys(meta: _Metadata, family: str) -> None:
    """Raises UserError for a key that changes numbers in a way that is not computed here."""
    for name in meta.names(f"{family}."):
        key = f"{family}.{name}"
        if name in _NEUTRAL:
            if meta.value(key) not in _NEUTRAL[name]:
                neutral = " or ".join(map(repr, _NEUTRAL[name]))
                raise meta.wrong(key, f"only {neutral} is supported; {_FOLDER}, or another model")
        elif name.startswith(("rope.", "attention.")) and name not in _KNOWN:
            raise meta.wrong(key, f"this key is not supported; {_FOLDER}, or another model")


def _raw_config(meta: _Metadata, family: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The metadata as a config.json, without the tokenizer's ids."""

    def count(name: str, of_layers: bool = False) -> int:
        key = f"{family}.{name}"
        found = meta.count(key, layers if of_layers else 0)
        return meta.need(key, int) if found is None else found

    def optional(name: str, default: int, of_layers: bool = False) -> int:
        return count(name, of_layers) if f"{family}.{name}" in meta else default

    _check_keys(meta, family)
    if "token_embd.weight" not in tensors:
        raise UserError(
            "the GGUF has no tensor 'token_embd.weight'; fetch a whole model, not an adapter or "
            "a part."
        )
    layers = count("block_count")
    if layers > len(tensors):
        raise meta.wrong(
            f"{family}.block_count",
            f"the file holds {len(tensors)} tensors, fewer than that many layers have; convert or "
            f"fetch the GGUF again",
        )
    width, heads = count("embedding_length"), count("attention.head_count", True)
    head_width = optional("attention.key_length", width // heads)
    _check_heads(meta, family, head_width, optional("rope.dimension_count", head_width))
    raw = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads, True),
        "head_dim": head_width,
        "intermediate_size": count("feed_forward_length", True),
        "hidden_act": "silu",
        "rms_norm_eps": meta.need(f"{family}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": _rope_base(meta, family),
        "max_position_embeddings": optional("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if raw["rms_norm_eps"] < 0:
        raise meta.wrong(f"{family}.attention.layer_norm_rms_epsilon", "it must not be negative")
    if family != "qwen2":
        raw["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if _ROPE_TABLE in tensors:
        if family != "llama":
            raise UserError(
                f"the GGUF is of architecture {family!r} and holds {_ROPE_TABLE!r}, which only "
                f"'llama' has; {_FOLDER}."
            )
        raw["rope_scaling"] = _llama3_scaling(
            raw, np.asarray(tensors[_ROPE_TABLE].data, np.float64)
        )
    return raw


def _check_heads(meta: _Metadata, family: str, head_width: int, turned: int) -> None:
    """Raises UserError where a head's width is not one that is computed here."""
    if turned != head_width:
        raise UserError(
            f"the GGUF turns {turned} of {head_width} head dimensions "
            f"({family}.rope.dimension_count); partial RoPE is not supported: {_FOLDER}, or another "
            f"model."
        )
    if head_width % 2:
        raise UserError(
            f"the GGUF's heads are {head_width} wide ({family}.attention.key_length); the width "
            f"must be even. Convert or fetch the GGUF again."
        )
    values = f"{family}.attention.value_length"
    if (meta.count(values) or head_width) != head_width:
        raise meta.wrong(
            values, f"it must equal {family}.attention.key_length ({head_width}); {_FOLDER}"
        )


def _rope_base(meta: _Metadata, family: str) -> float:
    """The base of RoPE, 10000 where no key states it; raises UserError for scaled RoPE.

    As in llama.cpp the kind is linear and the factor 1 where no key says otherwise, a factor of 0
    is 1, and "none" leaves the factor unread.
    """
    kind_key = f"{family}.rope.scaling.type"
    kind = meta.get(kind_key, str) or "linear"
    if kind not in ("none", "linear"):
        raise meta.wrong(
            kind_key, f"only 'none' and Llama 3's table are supported; {_FOLDER}, or another model"
        )
    factors = (f"{family}.rope.scaling.factor", f"{family}.rope.scale_linear")
    factor_key = next((key for key in factors if key in meta), None)
    if factor_key and kind == "linear" and meta.get(factor_key, float) not in (0.0, 1.0):
        raise meta.wrong(
            factor_key, f"scaled RoPE is not supported; {_FOLDER}, or a model without scaling"
        )
    key = f"{family}.rope.freq_base"
    base = meta.get(key, float)
    if base is not None and base <= 0:
        raise meta.wrong(key, "it must be above 0; convert or fetch the GGUF again")
    return 10000.0 if base is None else base


def _llama3_scaling(raw: dict[str, Any], table: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling whose slow-down per frequency is `table` (float64[K/2]); its largest entry
    is the factor.
    """
    if table.ndim != 1 or not np.isfinite(table).all() or not (table > 0).any():
        raise UserError(f"the GGUF's rope_freqs table holds no factors; {_FOLDER}.")
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
