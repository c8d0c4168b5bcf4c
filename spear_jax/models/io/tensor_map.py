"""Where each Hugging Face tensor lives in the base tree, and the one loop that fills the tree from
any source.

A projection is [out, in] in a file and [in, out] in the tree, stacked over layers. Sources
(safetensors folders, GGUF files) speak Hugging Face names; names and shapes are checked against the
config before anything is read.

Source: tensor names as in transformers' Llama, Qwen2 and Qwen3.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import ml_dtypes
import numpy as np

from spear_jax.core.errors import UserError, unknown
from spear_jax.models.config import ModelConfig
from spear_jax.models.lora import projection_shapes

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
_BUFFERS = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".masked_bias",
)  # old checkpoints save these; nothing reads them


@dataclasses.dataclass(frozen=True)
class Place:
    """One leaf of the base tree and the Hugging Face tensors that make it.

    Attributes:
        path: keys into the base tree, ("layers", "q") or ("embed",).
        names: Hugging Face names: one per layer, or just one.
        shape: of one tensor, as Hugging Face stores it.
        transposed: the tree holds the transpose.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the leaf in the tree."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (len(self.names), *shape) if self.path[0] == "layers" else shape


class TensorSource(Protocol):
    """Something that tensors are read from, one at a time, under their Hugging Face names."""

    where: str  # named in messages

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor there is, with its shape in Hugging Face's orientation."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the precision that it is stored in (float32 where it was quantised)."""


def places(config: ModelConfig) -> list[Place]:
    """The whole base tree of a config, leaf by leaf."""

    def stacked(leaf: str, suffix: str, shape: tuple[int, ...], transposed: bool = False) -> Place:
        names = tuple(f"model.layers.{i}.{suffix}" for i in range(config.layers))
        return Place(("layers", leaf), names, shape, transposed)

    table = [Place(("embed",), ("model.embed_tokens.weight",), (config.vocab_size, config.width))]
    table.append(Place(("norm",), ("model.norm.weight",), (config.width,)))
    if not config.tied:
        table.append(Place(("head",), ("lm_head.weight",), (config.vocab_size, config.width)))
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
    """The usual placer: everything on JAX's first device."""
    del name
    return jax.device_put(leaf)


def fill(
    config: ModelConfig, source: TensorSource, dtype: str, place_leaf: Placer = on_default_device
) -> dict:
    """The base tree, read tensor by tensor and put on its devices leaf by leaf.

    Host memory beyond the tree itself: one stacked leaf and one tensor.

    Args:
        dtype: "float32" or "bfloat16"; every leaf gets it, rounded to nearest even.
        place_leaf: (the leaf's name, such as "q" or "embed", its array on the host) -> the leaf.
    Raises: UserError for an unknown dtype, and for missing, extra or misshapen tensors, before any
        is read.
    """
    check_dtype(dtype)
    check_tensors(config, source)  # reads headers only
    base: dict = {"layers": {}}
    for place in places(config):
        leaf = np.empty(place.leaf_shape, DTYPES[dtype])
        rows = leaf if place.path[0] == "layers" else [leaf]
        for row, name in zip(rows, place.names, strict=True):
            tensor = source.read(name)
            row[...] = tensor.T if place.transposed else tensor
        node = base["layers"] if place.path[0] == "layers" else base
        node[place.path[-1]] = place_leaf(place.path[-1], leaf)
    return base


def check_dtype(dtype: str) -> None:
    """Raises UserError for a dtype that a model cannot be held in."""
    if dtype not in DTYPES:
        raise unknown("model dtype", dtype, DTYPES)


def check_tensors(config: ModelConfig, source: TensorSource) -> None:
    """Raises UserError where a source lacks, misshapes, or adds tensors to what the config calls
    for.
    """
    found = source.shapes()
    wanted = {name: place.shape for place in places(config) for name in place.names}
    for name, shape in wanted.items():
        if name not in found:
            near = difflib.get_close_matches(name, found.keys() - wanted.keys(), n=1)
            near_text = f" The nearest unused name is {near[0]!r}." if near else ""
            raise UserError(
                f"{source.where} has no tensor {name!r}, which its config ({config.family}, "
                f"{config.layers} layers, "
                f"tied={config.tied}) calls for.{near_text} Check config.json, or fetch the "
                f"model again."
            )
        if found[name] != shape:
            raise UserError(
                f"{source.where}: tensor {name!r} has shape {list(found[name])}, but its config "
                f"calls for "
                f"{list(shape)}. Check config.json, or fetch the model again."
            )
    spare = [name for name in found.keys() - wanted.keys() if not _ignorable(name, config)]
    if spare:
        raise UserError(
            f"{source.where} has {len(spare)} tensors that a {config.family} model with "
            f"{config.layers} layers does "
            f"not use, such as {min(spare)!r}. Use the plain model (not a quantised, "
            f"adapter-wrapped "
            "or multimodal one), or check config.json."
        )


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Buffers of old checkpoints, and the copy of the embedding that some tied models carry."""
    return name.endswith(_BUFFERS) or (config.tied and name == "lm_head.weight")


def emit(
    config: ModelConfig, base: dict
) -> Iterator[tuple[str, tuple[int, ...], jax.Array, int | None]]:
    """Walks the tree as (Hugging Face name, its shape there, leaf, layer or None); `to_numpy` reads
    one of them.
    """
    for place in places(config):
        node = base["layers"] if place.path[0] == "layers" else base
        for index, name in enumerate(place.names):
            yield (
                name,
                place.shape,
                node[place.path[-1]],
                index if place.path[0] == "layers" else None,
            )


def to_numpy(leaf: jax.Array, index: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a leaf on the host, contiguous, in Hugging Face's orientation (a layer's matrix
    transposed).
    """
    tensor = np.asarray(leaf if index is None else leaf[index])
    tensor = tensor.T if index is not None and tensor.ndim == 2 else tensor
    assert tensor.shape == shape, (tensor.shape, shape)
    return np.ascontiguousarray(tensor)
