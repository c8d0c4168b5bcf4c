"""The decoder: Llama, Qwen2 and Qwen3 as pure functions of (adapter, base, tokens).

Base parameters (all in the model's dtype; L stacks the layers, which are then scanned; `unstack`
gives a tuple of layers):
    embed [V, D] · norm [D] · head [V, D] (absent when tied) layers: attn_norm, mlp_norm [L, D] · q
    [L, D, H*K] · k, v [L, D, N*K] · o [L, H*K, D] · gate, up [L, D, F] ·
            down [L, F, D] · q_bias, k_bias, v_bias, o_bias (where the family has them) · q_norm,
            k_norm [L, K] (Qwen3)
The seven projections may be quantised (models/quantize.py).

Sources: Llama (arXiv 2302.13971), Llama 3 RoPE scaling (arXiv 2407.21783), Qwen2.5 (arXiv
2412.15115), Qwen3 (arXiv 2505.09388); checked against transformers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from spear_jax.core.mesh import layer_of
from spear_jax.models.attention import KEPT, attend, seen_in_tree
from spear_jax.models.config import ModelConfig
from spear_jax.models.lora import LoraConfig, merge_layer
from spear_jax.models.quantization import widen
from spear_jax.packing.arrays import PackedSequences, spans

Layers = Any  # a tree a layer in a tuple, or one tree stacked on the first axis
# nothing: every activation is kept · attention: what products with weights and attention give is
# kept; scores, norms and activation functions are computed again · layers: only each layer's input
# is kept
REMAT = ("nothing", "attention", "layers")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Static settings of one model with its adapter; hashable, safe to close over.

    Attributes:
        config: shapes.
        lora: adapter settings; its scale, dropout and layers are read when an adapter tree is
            passed.
        remat: what the backward pass recomputes; one of REMAT.
        attention: one of attention.KERNELS.
    """

    config: ModelConfig
    lora: LoraConfig
    remat: str = "attention"
    attention: str = "xla"


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the tokens of a pass stand, and whom each one sees.

    Attributes:
        positions: int32, shaped like the tokens.
        visible: of each column of queries bool[R, L, S], whether query (r, l) sees key s.
        pack: None where the tokens stand in a grid [R, L] themselves; else what maps flat tokens
            [N] to its grid and back.
    """

    positions: jax.Array
    visible: tuple[jax.Array, ...]
    pack: PackedSequences | None = None

    def to_queries(self, x: jax.Array) -> list[jax.Array]:
        if self.pack is None:
            return [x]
        return [
            x[self.pack.token_index[:rows, begin:end]]
            for rows, begin, end in spans(self.pack.tiles)
        ]

    def to_keys(self, x: jax.Array) -> jax.Array:
        """Of x [h + N, ...], with what was read before the pack in front."""
        if self.pack is None:
            return x
        read, token_index = len(x) - len(self.positions), self.pack.token_index
        first = jnp.tile(jnp.arange(read, dtype=token_index.dtype), (len(token_index), 1))
        return x[jnp.concatenate([first, token_index + read], axis=1)]

    def from_queries(self, parts: list[jax.Array]) -> jax.Array:
        if self.pack is None:
            return parts[0]
        return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in parts])[self.pack.query_index]


def packed_states(
    decoder: Decoder,
    lora: dict | None,
    base: dict,
    pack: PackedSequences,
    dropout_key: jax.Array | None = None,
    shared_prefix: Layers | None = None,
) -> tuple[jax.Array, Layers]:
    """Final-norm hidden states of packed trees: every product sees the N real tokens, attention
    alone the padded grid.

    Args:
        lora: adapter tree, or None (no adapter, or one that is merged into `base`).
        dropout_key: turns LoRA dropout on.
        opening: what this function returned as keys and values for h tokens that stand before every
            tree; the pack, which has no opening of its own then, does not count them.
    Returns: [N, D] in the base's dtype; each layer's (keys, values), [h + N, kv heads, K], the
        opening's first (stacked where the base is).
    """
    read = 0 if shared_prefix is None else jax.tree.leaves(shared_prefix)[0].shape[-3]
    branch_ids = jnp.pad(pack.branch_ids, ((0, 0), (read, 0)))
    visible = tuple(
        seen_in_tree(branch_ids[:rows, : read + end], end - begin)
        for rows, begin, end in spans(pack.tiles)
    )
    layout = _Layout(pack.positions + read, visible, pack)
    return _run(decoder, lora, base, pack.tokens, layout, dropout_key, shared_prefix=shared_prefix)


def hidden_states(
    decoder: Decoder,
    lora: dict | None,
    base: dict,
    tokens: jax.Array,
    mask: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Final-norm hidden states of padded sequences.

    Args:
        lora, dropout_key: as for `packed_states`.
        tokens: int32[B, T].
        mask: bool[B, T], real tokens; padding may stand on either side. Positions count real tokens
            from 0.
    Returns: [B, T, D] in the base's dtype.
    """
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    return _run(
        decoder, lora, base, tokens, _Layout(positions, (causal & mask[:, None, :],)), dropout_key
    )[0]


def decode_step(
    decoder: Decoder,
    lora: dict | None,
    base: dict,
    token: jax.Array,
    cache: Layers,
    cache_mask: jax.Array,
    at: jax.Array,
) -> tuple[jax.Array, Layers]:
    """One token further; its keys and values are written into the cache.

    Args:
        base: with unstacked layers (`unstack`).
        token: int32[B].
        cache: a (keys, values) a layer, each [B, N, S, K].
        cache_mask: bool[B, S], which positions are real, the new one included; their number gives
            its position.
        at: int32[], where the new token stands in the cache.
    Returns: hidden [B, D]; the cache.
    """
    positions = cache_mask.sum(-1, keepdims=True) - 1
    layout = _Layout(positions, (cache_mask[:, None, :],))
    hidden, cache = _run(decoder, lora, base, token[:, None], layout, None, (cache, at))
    return hidden[:, 0], cache


def head_weight(base: dict) -> jax.Array:
    """The LM head, [V, D]; the embedding itself where they are tied."""
    return base["head"] if "head" in base else base["embed"]


def unstack(base: dict) -> dict:
    """The base with its layers as a tuple of trees, on a CPU views of the stacked ones. A pass then
    runs layer after layer instead of scanning them: it compiles longer and copies no weights, which
    decoding on a CPU needs. A base that is unstacked already is returned as it is.
    """
    layers = base["layers"]
    if isinstance(layers, tuple):
        return base
    count = jax.tree.leaves(layers)[0].shape[0]
    return {
        **base,
        "layers": tuple(jax.tree.map(lambda w, i=i: layer_of(w, i), layers) for i in range(count)),
    }


@functools.partial(jax.jit, static_argnums=2)
def merge(base: dict, lora: dict, settings: LoraConfig) -> dict:
    """The base with the adapter merged into it and its layers unstacked, as generation takes it."""
    layers = unstack(base)["layers"]
    plain = len(layers) - jax.tree.leaves(lora)[0].shape[0]
    return {
        **base,
        "layers": tuple(_merged(one, lora, i - plain, settings) for i, one in enumerate(layers)),
    }


def _merged(weights: dict, lora: dict, index: int, settings: LoraConfig) -> dict:
    """One layer's weights with its part of the adapter; those below the adapted layers as they
    are.
    """
    if index < 0:
        return weights
    return merge_layer(weights, jax.tree.map(lambda x: x[index], lora), settings)


def logits(
    decoder: Decoder, lora: dict | None, base: dict, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """float32[B, T, V]: every logit. For checks and small inputs only; training never holds this
    array.
    """
    hidden = hidden_states(decoder, lora, base, tokens, mask)
    return jnp.einsum("btd,vd->btv", hidden, head_weight(base), preferred_element_type=jnp.float32)


def _run(decoder, lora, base, tokens, layout, dropout_key, past=None, shared_prefix=None):
    """The one forward pass: layers without adapters first, then those that carry them.

    Args: past: (cache, place of the new token); opening: as for `packed_states`.
    """
    config = decoder.config
    hidden = base["embed"][tokens]
    rotation = _rotation(config, layout.positions, hidden.dtype)
    adapted = jax.tree.leaves(lora)[0].shape[0] if lora else 0
    plain = config.layers - adapted

    def layer(hidden, weights, pairs, index, cached, before):
        weights = widen(weights)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return _layer(decoder, weights, pairs, hidden, rotation, layout, cached, before, key)

    if isinstance(base["layers"], tuple):
        caches = []
        for index, weights in enumerate(base["layers"]):
            pairs = None if index < plain else jax.tree.map(lambda x, i=index - plain: x[i], lora)
            cached = None if past is None else (*past[0][index], past[1])
            hidden, cache = layer(
                hidden, weights, pairs, index, cached, shared_prefix and shared_prefix[index]
            )
            caches.append(cache)
        return _rms_norm(hidden, base["norm"], config.norm_eps), tuple(caches)

    def body(hidden, xs):
        index, pairs = xs
        # Weights are indexed inside the loop: slicing the stack first would copy it.
        own = lambda tree: jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
        )
        return layer(hidden, own(base["layers"]), pairs, index, None, own(shared_prefix))

    body = _recomputed(body, decoder.remat)
    caches = []
    if plain:
        hidden, cache = jax.lax.scan(body, hidden, (jnp.arange(plain), None))
        caches.append(cache)
    if adapted:
        hidden, cache = jax.lax.scan(body, hidden, (jnp.arange(plain, config.layers), lora))
        caches.append(cache)
    cache = caches[0] if len(caches) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *caches)
    return _rms_norm(hidden, base["norm"], config.norm_eps), cache


def _recomputed(body, remat: str):
    if remat == "nothing":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == "attention" else None
    return jax.checkpoint(body, policy=policy)


def _layer(decoder, weights, pairs, hidden, rotation, layout, cached, before, key):
    """One block: attention and gated MLP, both on a pre-normed residual stream. Returns (hidden,
    (keys, values)).
    """
    config = decoder.config
    lead = hidden.shape[:-1]

    def project(x, *names):
        """x times each of the weights, their low-rank parts included."""
        own = [name for name in names if pairs is not None and name in pairs]
        inner = _inner(decoder.lora, {name: pairs[name]["a"] for name in own}, x, key)
        for name in names:
            y = x @ weights[name]
            if f"{name}_bias" in weights:
                y = y + weights[f"{name}_bias"]
            if name in inner:
                y = y + _own(inner[name], pairs[name]["b"].astype(x.dtype)) * decoder.lora.scale
            yield y

    x = _rms_norm(hidden, weights["attn_norm"], config.norm_eps)
    q, k, v = (y.reshape(*lead, -1, config.head_width) for y in project(x, "q", "k", "v"))
    if config.qk_norm:  # whose gradient needs what it was given
        q = _rms_norm(checkpoint_name(q, KEPT), weights["q_norm"], config.norm_eps)
        k = _rms_norm(checkpoint_name(k, KEPT), weights["k_norm"], config.norm_eps)
    q, k, v = (checkpoint_name(y, KEPT) for y in (_rotate(q, rotation), _rotate(k, rotation), v))
    kept = (k, v)
    if cached is None:
        if before is not None:
            kept = tuple(jnp.concatenate(pair) for pair in zip(before, kept, strict=True))
        keys, values = (jnp.swapaxes(layout.to_keys(y), 1, 2) for y in kept)
    else:
        *cache, at = cached
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, jnp.swapaxes(new, 1, 2), at, axis=2
        )
        keys, values = kept = tuple(map(write, cache, (k, v)))
    tiles = zip(layout.to_queries(q), layout.visible, strict=True)
    attended = layout.from_queries(
        [attend(own, keys, values, seen, decoder.attention) for own, seen in tiles]
    )
    attended = attended.reshape(*lead, config.heads * config.head_width)
    hidden = checkpoint_name(hidden + next(project(attended, "o")), KEPT)
    x = _rms_norm(hidden, weights["mlp_norm"], config.norm_eps)
    gate, up = (checkpoint_name(y, KEPT) for y in project(x, "gate", "up"))
    hidden = hidden + next(project(jax.nn.silu(gate) * up, "down"))
    return hidden, kept


_STREAM = {name: i for i, name in enumerate(("q", "k", "v", "o", "gate", "up", "down"))}


def _inner(lora: LoraConfig, pairs: dict, x: jax.Array, key: jax.Array | None) -> dict:
    """{projection: dropout(x) A}, in x's dtype, of projections with a common input; one product for
    all without dropout.

    Args: pairs: {projection: A [in, R]}.
    """
    if not pairs:
        return {}
    if key is None or lora.dropout == 0.0:
        joint = _own(x, jnp.concatenate([a.astype(x.dtype) for a in pairs.values()], axis=-1))
        joint = checkpoint_name(joint, KEPT)
        return dict(zip(pairs, jnp.split(joint, len(pairs), axis=-1), strict=True))
    found = {}
    for name, a in pairs.items():
        keep = jax.random.bernoulli(
            jax.random.fold_in(key, _STREAM[name]), 1.0 - lora.dropout, x.shape
        )
        dropped = jnp.where(keep, x / (1.0 - lora.dropout), 0.0).astype(x.dtype)
        found[name] = checkpoint_name(dropped @ a.astype(x.dtype), KEPT)
    return found


def _own(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [B, ..., in] times weight [in, out]; or times [G, in, out], each of G equal groups of rows
    with its own.
    """
    if weight.ndim == 2:
        return x @ weight
    grouped = jnp.einsum("gni,gio->gno", x.reshape(weight.shape[0], -1, x.shape[-1]), weight)
    return grouped.reshape(*x.shape[:-1], -1)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def _rotation(config: ModelConfig, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, each [..., 1, K] for positions [...]."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)[..., None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """float32[K/2], radians per position; Llama-3 scaling slows the long wavelengths."""
    inverse = 1.0 / config.rope_theta ** (
        np.arange(0, config.head_width, 2, dtype=np.float64) / config.head_width
    )
    scaling = config.rope_scaling
    if scaling is not None:
        wavelength = 2.0 * np.pi / inverse
        turns = scaling.original_positions / wavelength
        blend = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)  # 0: fully slowed, 1: untouched
        inverse = blend * inverse + (1.0 - blend) * inverse / scaling.factor
    return inverse.astype(np.float32)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding in Hugging Face's half-split layout."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
