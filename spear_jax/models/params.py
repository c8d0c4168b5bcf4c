"""Typed parameter trees: a decoder's weights, an adapter, and a layer's keys and values.

Letters: V vocabulary, D width, L layers, H heads, N key/value heads, K head width, F mlp width,
R rank. L' counts the layers that carry adapters; they are the last ones.

Fields stand in alphabetical order. A tree then flattens in the order of a dict with the same names,
so that compiled programs and checkpoints (`core.pytrees.to_dicts`) are those of such a dict.

    adapter = Adapter(q=LowRank(a, b))
    adapter.q.a.shape                 # (L', D, R)
    adapter.by_name()                 # {"q": LowRank(a, b)}
"""

import dataclasses
from typing import Any

import flax.struct
import jax


class ParamsByName:
    """Fields as a dict, for code that loops over names."""

    def by_name(self) -> dict[str, Any]:
        """{name: value} of the fields that are not None, in alphabetical order."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@flax.struct.dataclass(kw_only=True)
class LayerParams(ParamsByName):
    """Weights of one layer, or of all layers behind a leading axis L; all in the model's dtype.

    The seven projections may be quantised (qwix.QArray; see models/quantization.py).

    Attributes:
        attn_norm, mlp_norm: [D].
        q: [D, H * E]; k, v: [D, U * E]; o: [H * E, D].
        gate, up: [D, F]; down: [F, D]. In layers that decode on a GPU, q holds k and v too, and gate
            holds up (`decoder._joined`).
        q_bias: [H * E]; k_bias, v_bias: [U * E]; o_bias: [D]; None where the family has none.
        q_norm, k_norm: [E]; Qwen3's, None elsewhere.
    """

    attn_norm: jax.Array
    down: jax.Array
    gate: jax.Array
    k: jax.Array | None
    k_bias: jax.Array | None = None
    k_norm: jax.Array | None = None
    mlp_norm: jax.Array
    o: jax.Array
    o_bias: jax.Array | None = None
    q: jax.Array
    q_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    up: jax.Array | None
    v: jax.Array | None
    v_bias: jax.Array | None = None

    def projection(self, name: str) -> tuple[jax.Array | None, jax.Array | None]:
        """Weight and bias of the projection `name` ("q", "k", "v", "o", "gate", "up", "down")."""
        return getattr(self, name), getattr(self, f"{name}_bias", None)


@flax.struct.dataclass(kw_only=True)
class DecoderParams(ParamsByName):
    """All weights of a decoder: the base that every client shares.

    Attributes:
        embed: [V, D].
        head: [V, D], or None where the embedding is the head, too (tied).
        layers: LayerParams with a leading axis L, which a pass scans; or a tuple of L LayerParams
            (`decoder.unstack`), which a pass runs one after another.
        norm: [D], before the head.
    """

    embed: jax.Array
    head: jax.Array | None = None
    layers: LayerParams | tuple[LayerParams, ...]
    norm: jax.Array

    @property
    def stacked(self) -> bool:
        """Whether the layers stand in one tree with a leading axis."""
        return not isinstance(self.layers, tuple)


@flax.struct.dataclass
class LowRank:
    """The update A B of one projection, in an adapter of all layers.

    Attributes:
        a: [L', in, R].
        b: [L', R, out].
    """

    a: jax.Array
    b: jax.Array


@flax.struct.dataclass(kw_only=True)
class Adapter(ParamsByName):
    """A LoRA adapter: a LowRank for each projection that carries one, None for the others.

    Several adapters may be stacked behind the layer axis (a: [L', G, in, R], b: [L', G, R, out]):
    each of G equal groups of rows then has its own.
    """

    down: LowRank | None = None
    gate: LowRank | None = None
    k: LowRank | None = None
    o: LowRank | None = None
    q: LowRank | None = None
    up: LowRank | None = None
    v: LowRank | None = None

    @property
    def num_layers(self) -> int:
        """L', how many layers carry adapters."""
        return jax.tree.leaves(self)[0].shape[0]

    @property
    def grouped(self) -> bool:
        """Whether several adapters are stacked behind the layer axis."""
        return jax.tree.leaves(self)[0].ndim == 4

    def layer(self, index: int) -> "Adapter":
        """The part of one layer: a [in, R], b [R, out]. Args: index: counted from 0 to L' - 1."""
        return jax.tree.map(lambda x: x[index], self)


@flax.struct.dataclass
class KeyValues:
    """Attention's keys and values of one layer (or of all, behind a leading axis L).

    Attributes:
        keys, values: [N, U, E] of packed tokens; [B, U, Z, E] in a cache of Z columns.
    """

    keys: jax.Array
    values: jax.Array
