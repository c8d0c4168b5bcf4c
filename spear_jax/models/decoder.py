"""The decoder: Llama, Qwen2 and Qwen3 as pure functions of (adapter, base, tokens).

models/params.py says what a base and an adapter hold. Layers that are stacked are scanned, so that
a program does not grow with depth; a tuple of layers (`unstack`) runs layer after layer.

Sources: Llama (arXiv 2302.13971), Llama 3 RoPE scaling (arXiv 2407.21783), Qwen2.5 (arXiv
2412.15115), Qwen3 (arXiv 2505.09388); checked against transformers.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from spear_jax.core.mesh import layer_of
from spear_jax.models.attention import KEPT, attend, seen_in_tree
from spear_jax.models.config import ModelConfig
from spear_jax.models.lm_head import head_logits, head_weight
from spear_jax.models.lora import LoraConfig, merge_weights, projection_shapes
from spear_jax.models.params import Adapter, DecoderParams, KeyValues, LayerParams
from spear_jax.models.quantization import widen
from spear_jax.packing.arrays import PackedSequences, spans
from spear_jax.packing.gathers import Grid, from_queries, grid_of, to_keys, to_queries

# One KeyValues a layer in a tuple, or one of all layers stacked on the first axis: as the base's.
LayerKeyValues = tuple[KeyValues, ...] | KeyValues

# What the backward pass computes again: "nothing"; "attention": scores, norms and activation
# functions (it keeps the results of projections and attention); "layers": all but each layer's
# input.
REMAT = ("nothing", "attention", "layers")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Static settings of one model with its adapter; hashable, safe to close over.

    Attributes:
        config: shapes.
        lora: adapter settings; scale and dropout are read where an adapter is passed.
        remat: what the backward pass recomputes; one of REMAT.
        attention: one of attention.KERNELS.
    """

    config: ModelConfig
    lora: LoraConfig
    remat: str = "attention"
    attention: str = "xla"


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Positions and attention mask of a forward pass.

    Attributes:
        positions: int32, shaped like the tokens.
        visible: of each tile of queries bool[rows, width, Z]: query (r, l) attends to key s.
        grid: None where tokens are padded sequences [B, T]; else it maps flat tokens [N] to the
            tiles of attention and back.
    """

    positions: jax.Array
    visible: tuple[jax.Array, ...]
    grid: Grid | None = None

    def to_queries(self, x: jax.Array) -> list[jax.Array]:
        """Gathers flat x [N, ...] into the tiles of queries, each [rows, width, ...]."""
        return [x] if self.grid is None else to_queries(self.grid, x)

    def to_keys(self, x: jax.Array) -> jax.Array:
        """Gathers flat x [h + N, ...] into rows [X, h + Y, ...], as `gathers.to_keys`."""
        return x if self.grid is None else to_keys(self.grid, x)

    def from_queries(self, tiles: list[jax.Array]) -> jax.Array:
        """Brings tiles of queries back to flat tokens [N, ...]."""
        return tiles[0] if self.grid is None else from_queries(self.grid, tiles)


def packed_states(
    decoder: Decoder,
    lora: Adapter | None,
    base: DecoderParams,
    pack: PackedSequences,
    dropout_key: jax.Array | None = None,
    shared_prefix: LayerKeyValues | None = None,
) -> tuple[jax.Array, LayerKeyValues]:
    """Computes final-norm hidden states of packed sequences.

    Projections see the N packed tokens. Attention alone sees rows that are padded.

    Args:
        lora: None without an adapter, or where it is merged into `base`.
        dropout_key: turns LoRA dropout on.
        shared_prefix: the keys and values that this function returned for h tokens which stand
            before every sequence; `pack` does not hold them.
    Returns: [N, D] in the base's dtype; every layer's KeyValues [h + N, U, E], the shared
        prefix first (stacked where the base's layers are).
    """
    read = prefix_length(shared_prefix)
    branch_ids = jnp.pad(pack.branch_ids, ((0, 0), (read, 0)))
    visible = tuple(
        seen_in_tree(branch_ids[:rows, : read + end], end - begin)
        for rows, begin, end in spans(pack.tiles)
    )
    layout = _Layout(pack.positions + read, visible, grid_of(pack))
    return _run(decoder, lora, base, pack.tokens, layout, dropout_key, shared_prefix=shared_prefix)


def prefix_length(shared_prefix: LayerKeyValues | None) -> int:
    """Returns h, the tokens of a prefilled shared prefix; 0 for None."""
    return 0 if shared_prefix is None else jax.tree.leaves(shared_prefix)[0].shape[-3]


def hidden_states(
    decoder: Decoder,
    lora: Adapter | None,
    base: DecoderParams,
    tokens: jax.Array,
    mask: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Computes final-norm hidden states of padded sequences.

    Args:
        lora, dropout_key: as for `packed_states`.
        tokens: int32[B, T].
        mask: bool[B, T], real tokens. Padding may stand on either side; positions count real tokens
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
    lora: Adapter | None,
    base: DecoderParams,
    token: jax.Array,
    cache: tuple[KeyValues, ...],
    cache_mask: jax.Array,
    at: jax.Array,
) -> tuple[jax.Array, tuple[KeyValues, ...]]:
    """Computes the hidden states of one new token a row, and writes its keys and values.

    Args:
        base: with unstacked layers (`unstack`).
        token: int32[B].
        cache: KeyValues [B, U, Z, E] of each layer.
        cache_mask: bool[B, Z], the columns that hold real tokens, the new one included; their
            number gives its position.
        at: int32[], the new token's column.
    Returns: hidden states [B, D]; the cache.
    """
    positions = cache_mask.sum(-1, keepdims=True) - 1
    layout = _Layout(positions, (cache_mask[:, None, :],))
    hidden, cache = _run(decoder, lora, base, token[:, None], layout, None, (cache, at))
    return hidden[:, 0], cache


def unstack(base: DecoderParams) -> DecoderParams:
    """Splits the stacked layers into a tuple; on a CPU its weights are views of the stacked ones.

    A pass then runs layer after layer instead of scanning them. It compiles longer and copies no
    weights, which decoding needs. On a GPU projections of one input are joined (`_joined`). A base
    that is unstacked is returned as it is.
    """
    if not base.stacked:
        return base
    platform = next(iter(base.embed.devices())).platform
    if platform == "cpu":
        return base.replace(layers=_layers_of(base.layers))
    sharding = getattr(base.layers.gate, "sharding", None)  # a quantised weight has none
    whole = sharding is not None and sharding.is_fully_replicated
    return base.replace(layers=_copied_layers(base.layers, whole and platform != "tpu"))


def _layers_of(stack: LayerParams) -> tuple[LayerParams, ...]:
    """Splits stacked layers."""
    count = jax.tree.leaves(stack)[0].shape[0]
    return tuple(jax.tree.map(lambda w, i=i: layer_of(w, i), stack) for i in range(count))


@functools.partial(jax.jit, static_argnums=1)  # one program, and not one a layer and weight
def _copied_layers(stack: LayerParams, join: bool) -> tuple[LayerParams, ...]:
    """Copies stacked layers one by one."""
    layers = _layers_of(stack)
    return tuple(map(_joined, layers)) if join else layers


def _joined(weights: LayerParams) -> LayerParams:
    """Joins a layer's projections of one input: q, k and v are one product, gate and up another.

    `q` [D, (H + 2 U) E] then holds all three and `gate` [D, 2 F] both; the others are None. A GPU's
    compiler would join the products by itself, and copy the weights together in every step.
    """
    biases = (weights.q_bias, weights.k_bias, weights.v_bias)
    return weights.replace(
        q=jnp.concatenate([weights.q, weights.k, weights.v], axis=-1),
        k=None,
        v=None,
        q_bias=None if biases[0] is None else jnp.concatenate(biases, axis=-1),
        k_bias=None,
        v_bias=None,
        gate=jnp.concatenate([weights.gate, weights.up], axis=-1),
        up=None,
    )


def merge(base: DecoderParams, lora: Adapter, settings: LoraConfig) -> DecoderParams:
    """Merges an adapter into a base with stacked layers, all other tensors being the base's own."""
    layers = base.layers.replace(**merged_layers(base.layers, lora, settings))
    return base.replace(layers=layers)


@functools.partial(jax.jit, static_argnums=2)
def merged_layers(stack: LayerParams, lora: Adapter, settings: LoraConfig) -> dict[str, jax.Array]:
    """Copies the stacked projections that carry adapters, with these merged in.

    The layers go through one after another: the program does not grow with depth, and the product
    A B of all layers is never held.
    """
    own, count = stack.by_name(), lora.num_layers
    pairs = lora.by_name()
    tails = {name: own[name][-count:] for name in pairs}
    merged = jax.lax.map(lambda xs: merge_weights(*xs, settings), (tails, pairs))
    whole = count == next(iter(own.values())).shape[0]
    join = lambda name, tail: tail if whole else own[name].at[-count:].set(tail)
    return {name: join(name, tail) for name, tail in merged.items()}


def logits(
    decoder: Decoder,
    lora: Adapter | None,
    base: DecoderParams,
    tokens: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Computes every logit, float32[B, T, V]; for checks and small inputs, as it holds V numbers a
    token. Arguments as for `hidden_states`.
    """
    return head_logits(hidden_states(decoder, lora, base, tokens, mask), head_weight(base))


def _run(decoder, lora, base, tokens, layout, dropout_key, past=None, shared_prefix=None):
    """Runs all layers: first those without adapters, then those that carry them.

    Args:
        past: (cache, the new token's column), for `decode_step`.
        shared_prefix: as for `packed_states`.
    Returns: final-norm hidden states; every layer's KeyValues.
    """
    config = decoder.config
    hidden = base.embed[tokens]
    rotation = _rotation(config, layout.positions, hidden.dtype)
    adapted = 0 if lora is None else lora.num_layers
    plain = config.layers - adapted

    def layer(hidden, weights, adapter, index, cached, before):
        weights = widen(weights)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return _layer(decoder, weights, adapter, hidden, rotation, layout, cached, before, key)

    if not base.stacked:
        caches = []
        for index, weights in enumerate(base.layers):
            adapter = None if index < plain else lora.layer(index - plain)
            cached = None if past is None else (past[0][index], past[1])
            hidden, cache = layer(
                hidden, weights, adapter, index, cached, shared_prefix and shared_prefix[index]
            )
            caches.append(cache)
        return _rms_norm(hidden, base.norm, config.norm_eps), tuple(caches)

    def body(hidden, xs):
        index, adapter = xs
        # Weights are indexed inside the loop: slicing the stack first would copy it.
        own = lambda tree: jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
        )
        return layer(hidden, own(base.layers), adapter, index, None, own(shared_prefix))

    body = _rematerialised(body, decoder.remat)
    caches = []
    if plain:
        hidden, cache = jax.lax.scan(body, hidden, (jnp.arange(plain), None))
        caches.append(cache)
    if adapted:
        hidden, cache = jax.lax.scan(body, hidden, (jnp.arange(plain, config.layers), lora))
        caches.append(cache)
    cache = caches[0] if len(caches) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *caches)
    return _rms_norm(hidden, base.norm, config.norm_eps), cache


def _rematerialised(body, remat: str):
    """The scan's body, its activations computed again in the backward pass as `remat` says."""
    if remat == "nothing":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == "attention" else None
    return jax.checkpoint(body, policy=policy)


def _layer(
    decoder: Decoder,
    weights: LayerParams,
    adapter: Adapter | None,
    hidden: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    layout: _Layout,
    cached: tuple[KeyValues, jax.Array] | None,
    before: KeyValues | None,
    key: jax.Array | None,
) -> tuple[jax.Array, KeyValues]:
    """Runs one layer: attention and gated MLP, each on the normed residual stream.

    Args:
        cached: the layer's cache and the new token's column, when decoding.
        before: keys and values of the shared prefix.
    Returns: hidden states; the keys and values of all tokens so far, or the cache.
    """
    config = decoder.config
    lead = hidden.shape[:-1]
    low_ranks = {} if adapter is None else adapter.by_name()

    def project(x, *names):
        """Yields x W + bias + scale * dropout(x) A B of each projection."""
        own = {name: low_ranks[name] for name in names if name in low_ranks}
        inner = _inner(decoder.lora, {name: pair.a for name, pair in own.items()}, x, key)
        for name, y in zip(names, _products(config, weights, x, names), strict=True):
            if name in own:
                y = y + _grouped(inner[name], own[name].b.astype(x.dtype)) * decoder.lora.scale
            yield y

    x = _rms_norm(hidden, weights.attn_norm, config.norm_eps)
    q, k, v = (y.reshape(*lead, -1, config.head_width) for y in project(x, "q", "k", "v"))
    if config.qk_norm:  # the norm's gradient needs its input
        q = _rms_norm(checkpoint_name(q, KEPT), weights.q_norm, config.norm_eps)
        k = _rms_norm(checkpoint_name(k, KEPT), weights.k_norm, config.norm_eps)
    q, k, v = (checkpoint_name(y, KEPT) for y in (_rotate(q, rotation), _rotate(k, rotation), v))
    kept = KeyValues(k, v)
    if cached is None:
        if before is not None:
            kept = jax.tree.map(lambda *x: jnp.concatenate(x), before, kept)
        keys, values = (jnp.swapaxes(layout.to_keys(y), 1, 2) for y in (kept.keys, kept.values))
    else:
        cache, at = cached
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, jnp.swapaxes(new, 1, 2), at, axis=2
        )
        kept = jax.tree.map(write, cache, kept)
        keys, values = kept.keys, kept.values
    tiles = zip(layout.to_queries(q), layout.visible, strict=True)
    attended = layout.from_queries(
        [attend(own, keys, values, seen, decoder.attention) for own, seen in tiles]
    )
    attended = attended.reshape(*lead, config.heads * config.head_width)
    hidden = checkpoint_name(hidden + next(project(attended, "o")), KEPT)
    x = _rms_norm(hidden, weights.mlp_norm, config.norm_eps)
    gate, up = (checkpoint_name(y, KEPT) for y in project(x, "gate", "up"))
    hidden = hidden + next(project(jax.nn.silu(gate) * up, "down"))
    return hidden, kept


def _products(
    config: ModelConfig, weights: LayerParams, x: jax.Array, names: tuple[str, ...]
) -> Iterator[jax.Array]:
    """Yields x W + bias of projections with the common input x, which may be joined (`_joined`)."""
    product = lambda weight, bias: x @ weight if bias is None else x @ weight + bias
    if len(names) > 1 and weights.projection(names[-1])[0] is None:
        shapes = projection_shapes(config)
        ends = np.cumsum([shapes[name][1] for name in names])[:-1].tolist()
        yield from jnp.split(product(*weights.projection(names[0])), ends, axis=-1)
        return
    for name in names:
        yield product(*weights.projection(name))


# the number of an input's masks in the dropout key, by the first projection that reads it; another
# number would draw other masks
_DROPOUT_STREAM = {name: i for i, name in enumerate(("q", "k", "v", "o", "gate", "up", "down"))}
_LEVELS = 1 << 16  # of dropout's probability


def _inner(
    lora: LoraConfig, factors: dict[str, jax.Array], x: jax.Array, key: jax.Array | None
) -> dict[str, jax.Array]:
    """Multiplies dropout(x) by the A of each projection; one product for all without dropout.

    Args:
        factors: {projection: A [in, R]}, of projections with the common input x.
        key: None turns dropout off.
    Returns: {projection: [..., R]} in x's dtype.
    """
    if not factors:
        return {}
    if key is None or lora.dropout == 0.0:
        joint = _grouped(x, jnp.concatenate([a.astype(x.dtype) for a in factors.values()], axis=-1))
        joint = checkpoint_name(joint, KEPT)
        return dict(zip(factors, jnp.split(joint, len(factors), axis=-1), strict=True))
    key = jax.random.fold_in(key, _DROPOUT_STREAM[next(iter(factors))])
    masks, kept = _keep_masks(key, lora.dropout, (len(factors), *x.shape))
    inner = {}
    for (name, a), mask in zip(factors.items(), masks, strict=True):
        dropped = jnp.where(mask, x / kept, 0.0).astype(x.dtype)
        inner[name] = checkpoint_name(dropped @ a.astype(x.dtype), KEPT)
    return inner


def _keep_masks(key: jax.Array, dropout: float, shape: tuple[int, ...]) -> tuple[jax.Array, float]:
    """Draws dropout's masks, bool of a shape [..., N, D]. Each random word gives an entry of the
    first half of the N rows and one of the second.

    Returns: the masks; the probability of True, which is 1 - dropout to the nearest 65,536th.
    """
    drop, (*lead, rows, width) = min(round(_LEVELS * dropout), _LEVELS - 1), shape
    words = jax.random.bits(key, (*lead, -(-rows // 2), width), jnp.uint32)
    # halves side by side in the last axis would be padded on a TPU, from 2 to 128
    masks = jnp.concatenate([words % _LEVELS >= drop, words // _LEVELS >= drop], axis=-2)
    return masks[..., :rows, :], 1.0 - drop / _LEVELS


def _grouped(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies x [B, ..., in] by weight [in, out], or each of G equal groups of rows by its own
    of [G, in, out].
    """
    if weight.ndim == 2:
        return x @ weight
    grouped = jnp.einsum("gni,gio->gno", x.reshape(weight.shape[0], -1, x.shape[-1]), weight)
    return grouped.reshape(*x.shape[:-1], -1)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Divides x [..., D] by its root mean square, in float32, and multiplies by weight [D]."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def _rotation(config: ModelConfig, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Computes cos and sin of the rotary angles, each [..., 1, E] for positions [...]."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)[..., None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Computes float32[E/2], radians per position; Llama-3 scaling slows the long wavelengths."""
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
    """Rotates x [..., H, E]; feature i is paired with i + E/2, as Hugging Face stores them."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
