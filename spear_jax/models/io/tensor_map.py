"""Maps Hugging Face tensors to decoder parameters, for every source and both ways.

A projection is [out, in] in a file and [in, out] in `DecoderParams`, stacked over layers:

    model.layers.0.self_attn.q_proj.weight [out, in]  ->  base.layers.q[0] [in, out]
    model.layers.1.self_attn.q_proj.weight [out, in]  ->  base.layers.q[1] [in, out]
    model.embed_tokens.weight [V, D]                  ->  base.embed [V, D]

Safetensors folders and GGUF files both speak Hugging Face names. Names and shapes are checked
against the config before anything is read.

Source: tensor names as in transformers' Llama, Qwen2 and Qwen3.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.models.config import ModelConfig
from spear_jax.models.lora import projection_shapes
from spear_jax.models.params import DecoderParams, LayerParams

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# the keys of config.json that make a leaf's shape, named where a file's shape is another
_KEYS = {
    "embed": "vocab_size, hidden_size",
    "head": "vocab_size, hidden_size",
    "q": "num_attention_heads, head_dim, hidden_size",
    "k": "num_key_value_heads, head_dim, hidden_size",
    "v": "num_key_value_heads, head_dim, hidden_size",
    "o": "num_attention_heads, head_dim, hidden_size",
    "q_bias": "num_attention_heads, head_dim",
    "k_bias": "num_key_value_heads, head_dim",
    "v_bias": "num_key_value_heads, head_dim",
    "gate": "intermediate_size, hidden_size",
    "up": "intermediate_size, hidden_size",
    "down": "intermediate_size, hidden_size",
    "q_norm": "head_dim",
    "k_norm": "head_dim",
}
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_PIECE = 1 << 18  # numbers that are checked at once, so that they stay in the cache
# old checkpoints save these; nothing reads them
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


@dataclasses.dataclass(frozen=True)
class Place:
    """One leaf of the decoder parameters and the Hugging Face tensors that make it.

    Attributes:
        name: the field, of LayerParams ("q") or of DecoderParams ("embed").
        of_layer: whether it is a field of LayerParams.
        tensors: Hugging Face names, one a layer, or just one.
        shape: of one tensor, as Hugging Face stores it.
        transposed: the leaf holds the transpose.
    """

    name: str
    of_layer: bool
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the leaf, [L, ...] where layers are stacked."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (len(self.tensors), *shape) if self.of_layer else shape

    def leaf(self, base: DecoderParams) -> jax.Array:
        """Returns this leaf of a base with stacked layers."""
        return (base.layers if self.of_layer else base).by_name()[self.name]


class TensorSource(Protocol):
    """A folder or file whose tensors are read one at a time, under their Hugging Face names."""

    where: str  # named in messages

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns every tensor's name, with its shape in Hugging Face's orientation."""

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in its stored precision (float32 where it was quantised)."""


def places(config: ModelConfig) -> list[Place]:
    """Lists every leaf of a config's decoder parameters."""

    def whole(leaf: str, tensor: str, shape: tuple[int, ...]) -> Place:
        return Place(leaf, False, (tensor,), shape)

    def stacked(leaf: str, suffix: str, shape: tuple[int, ...], transposed: bool = False) -> Place:
        tensors = tuple(f"model.layers.{i}.{suffix}" for i in range(config.layers))
        return Place(leaf, True, tensors, shape, transposed)

    table = [whole("embed", "model.embed_tokens.weight", (config.vocab_size, config.width))]
    table.append(whole("norm", "model.norm.weight", (config.width,)))
    if not config.tied:
        table.append(whole("head", "lm_head.weight", (config.vocab_size, config.width)))
    table.append(stacked("attn_norm", "input_layernorm.weight", (config.width,)))
    table.append(stacked("mlp_norm", "post_attention_layernorm.weight", (config.width,)))
    for leaf, (inputs, outputs) in projection_shapes(config).items():
        table.append(stacked(leaf, f"{MODULES[leaf]}.weight", (outputs, inputs), transposed=True))
        if (leaf in ("q", "k", "v") and config.qkv_bias) or (leaf == "o" and config.o_bias):
            table.append(stacked(f"{leaf}_bias", f"{MODULES[leaf]}.bias", (outputs,)))
    if config.qk_norm:
        table.append(stacked("q_norm", "self_attn.q_norm.weight", (config.head_width,)))
        table.append(stacked("k_norm", "self_attn.k_norm.weight", (config.head_width,)))
    return table


Placer = Callable[[str, np.ndarray], jax.Array]


def on_default_device(name: str, leaf: np.ndarray) -> jax.Array:
    """Puts a leaf on JAX's first device: the usual placer."""
    del name
    return jax.device_put(leaf)


def build_params(config: ModelConfig, make: Callable[[Place], Any]) -> DecoderParams:
    """Builds a config's decoder parameters, stacked, with make(place) as each leaf."""
    leaves = {place: make(place) for place in places(config)}
    layers = {place.name: leaf for place, leaf in leaves.items() if place.of_layer}
    others = {place.name: leaf for place, leaf in leaves.items() if not place.of_layer}
    return DecoderParams(layers=LayerParams(**layers), **others)


def fill(
    config: ModelConfig, source: TensorSource, dtype: str, place_leaf: Placer = on_default_device
) -> DecoderParams:
    """Reads decoder parameters tensor by tensor and puts them on their devices leaf by leaf.

    Host memory beyond the parameters themselves: one stacked leaf and one tensor.

    Args:
        dtype: "float32" or "bfloat16"; every leaf gets it, rounded to nearest even.
        place_leaf: (the leaf's name, such as "q" or "embed", its array on the host) -> the leaf.
    Raises: UserError for an unknown dtype, and for missing, extra or misshapen tensors, before any
        is read; and for a tensor with NaN or infinity, as stored or in `dtype`, when it is read.
    """
    check_dtype(dtype)
    check_tensors(config, source)  # reads headers only

    def read(place: Place) -> Any:
        leaf = np.empty(place.leaf_shape, DTYPES[dtype])
        for row, name in zip(leaf if place.of_layer else [leaf], place.tensors, strict=True):
            tensor = source.read(name)
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
                row[...] = tensor.T if place.transposed else tensor
            if not _finite(row):
                raise UserError(
                    f"{source.where}: tensor {name!r} holds NaN or infinity (in {dtype}); a model "
                    "with such weights gives no numbers. Fetch or train it again."
                )
        return place_leaf(place.name, leaf)

    return build_params(config, read)


def _finite(array: np.ndarray) -> bool:
    """Whether a contiguous float32 or bfloat16 array has neither NaN nor infinity.

    Reads bits: with the sign cut off, every number that is not finite is at least infinity. That is
    several times faster than np.isfinite where the processor has no bfloat16.
    """
    wide = array.dtype.itemsize == 4
    bits = array.reshape(-1).view(np.uint32 if wide else np.uint16)
    magnitude, infinity = (0x7FFFFFFF, 0x7F800000) if wide else (0x7FFF, 0x7F80)
    magnitude = bits.dtype.type(magnitude)
    return all(
        (bits[start : start + _PIECE] & magnitude).max() < infinity
        for start in range(0, bits.size, _PIECE)
    )


def check_dtype(dtype: str) -> None:
    """Raises UserError for a dtype that a model cannot be held in."""
    if dtype not in DTYPES:
        raise unknown("model dtype", dtype, DTYPES)


def check_tensors(config: ModelConfig, source: TensorSource) -> None:
    """Raises UserError where a source lacks, misshapes, or adds tensors to what the config calls
    for.
    """
    shapes = source.shapes()
    _check_depth(config, source.where, shapes)
    wanted = {name: place for place in places(config) for name in place.tensors}
    for name, place in wanted.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes.keys() - wanted.keys(), n=1)
            near_text = f" The nearest unused name is {near[0]!r}." if near else ""
            raise UserError(
                f"{source.where} has no tensor {name!r}, which its config ({config.family}, "
                f"{config.layers} layers, "
                f"tied={config.tied}) calls for.{near_text} Check config.json, or fetch the "
                f"model again."
            )
        if shapes[name] != place.shape:
            raise UserError(
                f"{source.where}: tensor {name!r} has shape {list(shapes[name])}, but its config "
                f"calls for {shown(list(place.shape))}. Check {_keys(place, source.where)}, or "
                "fetch the model again."
            )
    spare = [name for name in shapes.keys() - wanted.keys() if not _ignorable(name, config)]
    if spare:
        raise UserError(
            f"{source.where} has {len(spare)} tensors that a {config.family} model with "
            f"{config.layers} layers does "
            f"not use, such as {min(spare)!r}. Use the plain model (not a quantised, "
            f"adapter-wrapped "
            "or multimodal one), or check config.json."
        )


def _keys(place: Place, where: str) -> str:
    """The keys of config.json, or of a GGUF's metadata, that make a leaf's shape."""
    keys = _KEYS.get(place.name, "hidden_size")
    if not where.endswith(".gguf"):
        return f"config.json ({keys})"
    return f"its metadata ({', '.join(_GGUF_KEYS.get(key, key) for key in keys.split(', '))})"


def _check_depth(config: ModelConfig, where: str, names: Iterable[str]) -> None:
    """Raises UserError where a source has other layers than its config; before a tensor of each is
    listed, for a config may state any number.
    """
    found = {int(layer[1]) for layer in map(_LAYER.match, names) if layer}
    if config.layers > max(len(found), max(found, default=-1) + 1):
        raise UserError(
            f"{where} has the tensors of {len(found)} layers, but its config calls for "
            f"{shown(config.layers)} (config.json's num_hidden_layers). Check config.json, or "
            "fetch the model again."
        )


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Whether a tensor may be there unread: old buffers, and the embedding's copy of tied models."""
    return name.endswith(_BUFFERS) or (config.tied and name == "lm_head.weight")


def emit(
    config: ModelConfig, base: DecoderParams
) -> Iterator[tuple[str, tuple[int, ...], jax.Array, int | None]]:
    """Yields (Hugging Face name, its shape there, leaf, layer or None) of every tensor; `to_numpy`
    reads one of them.
    """
    for place in places(config):
        for index, name in enumerate(place.tensors):
            yield name, place.shape, place.leaf(base), index if place.of_layer else None


def to_numpy(leaf: jax.Array, index: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """Copies one tensor of a leaf to the host, contiguous, in Hugging Face's orientation (a layer's
    matrix transposed).
    """
    tensor = np.asarray(leaf if index is None else leaf[index])
    tensor = tensor.T if index is not None and tensor.ndim == 2 else tensor
    assert tensor.shape == shape, (tensor.shape, shape)
    return np.ascontiguousarray(tensor)
