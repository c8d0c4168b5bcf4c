"""The decoder: Llama, Qwen2 and Qwen3 as pure functions of (adapter, base, tokens), layers scanned.

Base parameters (all in the model's dtype; L stacks the layers):
    embed [V, D] · norm [D] · head [V, D] (absent when tied)
    layers: attn_norm, mlp_norm [L, D] · q [L, D, H*K] · k, v [L, D, N*K] · o [L, H*K, D] · gate, up [L, D, F] ·
            down [L, F, D] · q_bias, k_bias, v_bias, o_bias (where the family has them) · q_norm, k_norm [L, K] (Qwen3)

Sources: Llama (arXiv 2302.13971), Llama 3 RoPE scaling (arXiv 2407.21783), Qwen2.5 (arXiv 2412.15115),
Qwen3 (arXiv 2505.09388); checked against transformers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.models.config import ModelConfig
from spear_jax.models.lora import LoraConfig

MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Static settings of one model with its adapter; hashable, safe to close over.

    Attributes:
        config: shapes.
        lora: adapter settings; its scale, dropout and layers are read when an adapter tree is passed.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    config: ModelConfig
    lora: LoraConfig
    remat: bool = False


def hidden_states(
    decoder: Decoder,
    lora: dict | None,
    base: dict,
    tokens: jax.Array,
    mask: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Final-norm hidden states of whole sequences.

    Args:
        lora: adapter tree, or None (no adapter, or one that is merged into `base`).
        tokens: int32[B, T].
        mask: bool[B, T], real tokens; padding may stand on either side. Positions count real tokens from 0.
        dropout_key: turns LoRA dropout on.
    Returns: [B, T, D] in the base's dtype.
    """
    hidden, _ = _run(decoder, lora, base, tokens, mask, None, dropout_key)
    return hidden


def prefill(
    decoder: Decoder,
    lora: dict | None,
    base: dict,
    tokens: jax.Array,
    mask: jax.Array,
    owner: jax.Array | None = None,
):
    """Hidden state of the last position of left-padded prompts, and their keys and values.

    Args:
        tokens: int32[B, P], left-padded.
        mask: bool[B, P].
        owner: int32[B], each row's adapter where `lora` stacks several ([L, C, ...]); None where it is one.
    Returns: hidden [B, D]; (keys, values), each [L, B, P, N, K].
    """
    hidden, cache = _run(decoder, lora, base, tokens, mask, None, None, owner)
    return hidden[:, -1], cache


def decode_step(
    decoder: Decoder,
    lora: dict | None,
    base: dict,
    token: jax.Array,
    cache,
    cache_mask: jax.Array,
    owner: jax.Array | None = None,
):
    """One token further. The cache is only read; the caller writes the new keys and values where it keeps them.

    Args:
        token: int32[B].
        cache: (keys, values), each [L, B, S, N, K].
        cache_mask: bool[B, S], which cached positions are real; their number is the new token's position.
        owner: as for `prefill`.
    Returns: hidden [B, D]; (keys, values) of the new token, each [L, B, 1, N, K].
    """
    mask = jnp.ones((token.shape[0], 1), bool)
    hidden, new = _run(decoder, lora, base, token[:, None], mask, (cache, cache_mask), None, owner)
    return hidden[:, 0], new


def head_weight(base: dict) -> jax.Array:
    """The LM head, [V, D]; the embedding itself where they are tied."""
    return base["head"] if "head" in base else base["embed"]


def logits(decoder: Decoder, lora: dict | None, base: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """float32[B, T, V]: every logit. For checks and small inputs only; training never holds this array."""
    hidden = hidden_states(decoder, lora, base, tokens, mask)
    return jnp.einsum("btd,vd->btv", hidden, head_weight(base), preferred_element_type=jnp.float32)


def _run(decoder, lora, base, tokens, mask, past, dropout_key, owner=None):
    """The one forward pass: scans the layers without adapters, then those that carry them."""
    config = decoder.config
    hidden = base["embed"][tokens]
    offset = past[1].sum(-1, keepdims=True) if past else 0
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + offset
    rotation = _rotation(config, positions, hidden.dtype)
    causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    visible = causal[None] & mask[:, None, :]

    def layer(hidden, xs):
        index, pairs = xs
        # Weights are indexed inside the loop: slicing the stack first would copy it.
        weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), base["layers"])
        cached = None
        if past:
            cached = (*jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, index, keepdims=False), past[0]), past[1])
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        if owner is not None:
            pairs = jax.tree.map(lambda stacked: stacked[owner], pairs)  # [B, in, R] and [B, R, out]: this layer's only
        return _layer(decoder, weights, pairs, hidden, rotation, visible, cached, key)

    if decoder.remat:
        layer = jax.checkpoint(layer)
    adapted = jax.tree.leaves(lora)[0].shape[0] if lora else 0
    plain = config.layers - adapted
    caches = []
    if plain:
        hidden, cache = jax.lax.scan(layer, hidden, (jnp.arange(plain), None))
        caches.append(cache)
    if adapted:
        hidden, cache = jax.lax.scan(layer, hidden, (jnp.arange(plain, config.layers), lora))
        caches.append(cache)
    cache = caches[0] if len(caches) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *caches)
    return _rms_norm(hidden, base["norm"], config.norm_eps), cache


def _layer(decoder, weights, pairs, hidden, rotation, visible, cached, key):
    """One block: attention and gated MLP, both on a pre-normed residual stream. Returns (hidden, (keys, values))."""
    config = decoder.config
    b, t, _ = hidden.shape

    def project(name, x):
        y = x @ weights[name]
        if f"{name}_bias" in weights:
            y = y + weights[f"{name}_bias"]
        if pairs is not None and name in pairs:
            stream = None if key is None else jax.random.fold_in(key, _STREAM[name])
            y = y + _low_rank(decoder.lora, pairs[name], x, stream)
        return y

    x = _rms_norm(hidden, weights["attn_norm"], config.norm_eps)
    q = project("q", x).reshape(b, t, config.heads, config.head_width)
    k = project("k", x).reshape(b, t, config.kv_heads, config.head_width)
    v = project("v", x).reshape(b, t, config.kv_heads, config.head_width)
    if config.qk_norm:
        q = _rms_norm(q, weights["q_norm"], config.norm_eps)
        k = _rms_norm(k, weights["k_norm"], config.norm_eps)
    q, k = _rotate(q, rotation), _rotate(k, rotation)
    attended = _attention(q, k, v, visible, cached).reshape(b, t, config.heads * config.head_width)
    hidden = hidden + project("o", attended)
    x = _rms_norm(hidden, weights["mlp_norm"], config.norm_eps)
    hidden = hidden + project("down", jax.nn.silu(project("gate", x)) * project("up", x))
    return hidden, (k, v)


_STREAM = {name: i for i, name in enumerate(("q", "k", "v", "o", "gate", "up", "down"))}


def _low_rank(lora: LoraConfig, pair: dict, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """scale * dropout(x) A B, in x's dtype; A and B may have a leading row axis, then each row has its own."""
    if key is not None and lora.dropout > 0.0:
        keep = jax.random.bernoulli(key, 1.0 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - lora.dropout), 0.0).astype(x.dtype)
    return (x @ pair["a"].astype(x.dtype)) @ pair["b"].astype(x.dtype) * lora.scale


def _attention(q, k, v, visible, cached):
    """Grouped-query softmax attention, softmax in float32.

    Args:
        q: [B, T, H, K]; k, v: [B, T, N, K], the new tokens' own.
        visible: bool[B, T, T], which new tokens a new token sees.
        cached: None, or (keys [B, S, N, K], values, mask bool[B, S]) of earlier tokens, all of which are seen.
    Returns: [B, T, H, K].
    """
    b, t, h, width = q.shape
    n = k.shape[2]
    q = q.reshape(b, t, n, h // n, width)

    def scores(keys, seen):
        raw = jnp.einsum("btngk,bsnk->bngts", q, keys, preferred_element_type=jnp.float32) / math.sqrt(width)
        return jnp.where(seen[:, None, None], raw, MASKED)

    def mix(weight, values):
        return jnp.einsum("bngts,bsnk->btngk", weight.astype(v.dtype), values)

    own = scores(k, visible)
    if cached is None:
        out = mix(jax.nn.softmax(own, axis=-1), v)
    else:
        keys, values, mask = cached
        weight = jax.nn.softmax(jnp.concatenate([scores(keys, mask[:, None]), own], axis=-1), axis=-1)
        out = mix(weight[..., : keys.shape[1]], values) + mix(weight[..., keys.shape[1] :], v)
    return out.reshape(b, t, h, width)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def _rotation(config: ModelConfig, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, each [B, T, 1, K]."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """float32[K/2], radians per position; Llama-3 scaling slows the long wavelengths."""
    inverse = 1.0 / config.rope_theta ** (np.arange(0, config.head_width, 2, dtype=np.float64) / config.head_width)
    scaling = config.rope_scaling
    if scaling is not None:
        wavelength = 2.0 * np.pi / inverse
        turns = scaling.original_positions / wavelength
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)  # 0: fully slowed, 1: untouched
        inverse = blend * inverse + (1.0 - blend) * inverse / scaling.factor
    return inverse.astype(np.float32)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding in Hugging Face's half-split layout."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
