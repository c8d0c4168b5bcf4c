"""Prefill and decode as pure functions of a state: a KV cache, and completions that grow in slots.

A slot's cache is a ring of P + T columns. In a step all slots write the same column `at`. A prompt
that is prefilled while other slots decode is laid so that it ends just before `at`, whatever its
length. P = 3, T = 2, at = 4; slot 0 has decoded one token (x) behind the prompt abc, and the prompt
de has just been prefilled into slot 1:

    column      0 1 2 3 4        next step: both write column 4, then 0, 1, ...
    slot 0      a b c x .        cache_mask 1 1 1 1 0
    slot 1      . . d e .        cache_mask 0 0 1 1 0
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from spear_jax.core import pytrees
from spear_jax.core.mesh import over_heads
from spear_jax.models.decoder import (
    Decoder,
    LayerKeyValues,
    decode_step,
    packed_states,
    prefix_length,
)
from spear_jax.models.lm_head import head_logits, head_weight
from spear_jax.models.params import Adapter, DecoderParams, KeyValues
from spear_jax.packing.arrays import PackedSequences
from spear_jax.rollout.token_sampling import SamplingConfig, sample_token

# A prefill writes its rows' keys and values in so many turns. In a single one, XLA would gather
# those of all layers before it wrote the first.
TURNS = 4


@flax.struct.dataclass
class GrowingCompletions:
    """Completions that grow, one a slot, padded to T tokens.

    Fields stand in alphabetical order, as in models/params.py.

    Attributes:
        keys: [B] random keys, or uint32[B, 2] their data between programs.
        live: bool[B], whether the completion goes on; False for a free slot, too.
        logprobs: float32[B, T], untempered log-probabilities in nats.
        step: int32[B], tokens drawn so far.
        tokens: int32[B, T].
    """

    keys: jax.Array
    live: jax.Array
    logprobs: jax.Array
    step: jax.Array
    tokens: jax.Array


@flax.struct.dataclass
class DecodeState:
    """Everything that generation carries from step to step, B slots.

    Attributes:
        cache: each layer's KeyValues [B, U, P + T, E].
        cache_mask: bool[B, P + T], columns that hold real tokens of the slot's sequence.
        completions: the slots' completions.
    """

    cache: tuple[KeyValues, ...]
    cache_mask: jax.Array
    completions: GrowingCompletions


def init_decode_state(
    decoder: Decoder, config: SamplingConfig, width: int, live: jax.Array, dtype
) -> DecodeState:
    """Makes a state of free slots, laid on devices as `live` bool[B] is; devices that share a base
    split the heads of its cache.

    Args: width: P; dtype: of the cache.
    """
    model, rows, length = decoder.config, live.shape[0], config.max_new_tokens
    zeros = functools.partial(jnp.zeros, device=live.sharding)
    shape = rows, model.kv_heads, width + length, model.head_width
    empty = lambda: jnp.zeros(shape, dtype, device=over_heads(live.sharding, model.kv_heads))
    return DecodeState(
        cache=tuple(KeyValues(empty(), empty()) for _ in range(model.layers)),
        cache_mask=zeros((rows, width + length), bool),
        completions=GrowingCompletions(
            tokens=zeros((rows, length), jnp.int32),
            logprobs=zeros((rows, length), jnp.float32),
            step=zeros(rows, jnp.int32),
            live=zeros(rows, bool),
            keys=zeros((rows, 2), jnp.uint32),
        ),
    )


def prefill(
    decoder: Decoder,
    config: SamplingConfig,
    lora: Adapter | None,
    base: DecoderParams,
    state: DecodeState,
    shared_prefix: LayerKeyValues | None,
    pack: PackedSequences,
    index: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    live: jax.Array,
    slots: jax.Array,
    at: jax.Array,
) -> DecodeState:
    """Prefills prompts into free slots and draws their first tokens.

    The state's B slots are G equal groups: slot s of group g is row g * B / G + s.

    Args:
        lora: None, one adapter, or a grouped one (an adapter for each of the G groups).
        shared_prefix: None, or as from `prefill_shared_prefix`.
        pack, index, mask: r prompts of each group, as from `prefix_tree.pack_prompts`.
        keys: [G * r]; live: bool[G * r], False for padding rows.
        slots: int32[G, r], slots within each group; padding rows have one behind its last.
        at: int32[], the ring's next column.
    Returns: the state.
    """
    (groups, taken, width), length = index.shape, config.max_new_tokens
    share = -(-taken // TURNS)
    ring = lambda x: jnp.roll(jnp.pad(x, ((0, 0), (0, 0), (0, length))), at - width, axis=2)
    by_group = lambda x: x.reshape(groups, -1, *x.shape[1:])

    def one(lora, pack, last, places, shared_prefix, slots, cache):
        hidden, layers = packed_states(decoder, lora, base, pack, shared_prefix=shared_prefix)
        if shared_prefix is not None:
            last = last - prefix_length(shared_prefix)
        if base.stacked:
            pairs = zip(layers.keys, layers.values, strict=True)
            layers = tuple(KeyValues(*pair) for pair in pairs)

        def write(turn, cache):
            # a slice that would pass the end begins earlier; rows are then written twice, alike
            to, source = (
                jax.lax.dynamic_slice_in_dim(x, turn * share, share) for x in (slots, places)
            )
            return jax.tree.map(
                lambda old, new: old.at[to].set(_to_cache(new, source), mode="drop"), cache, layers
            )

        return hidden[last], jax.lax.fori_loop(0, -(-taken // share), write, cache)

    own = (1, 0) if _grouped(lora) else (None, None)
    run = pytrees.vmap_or_single(one, in_axes=(own[0], 0, 0, 0, own[1], 0, 0))
    cache = jax.tree.map(by_group, state.cache)
    hidden, cache = run(lora, pack, index[:, :, -1], ring(index), shared_prefix, slots, cache)
    rows = live.shape[0]
    begun = GrowingCompletions(
        tokens=jnp.full((rows, length), config.pad_id, jnp.int32),
        logprobs=jnp.zeros((rows, length), jnp.float32),
        step=jnp.zeros(rows, jnp.int32),
        live=live,
        keys=keys,
    )
    begun = append_token(config, begun, head_logits(hidden.reshape(rows, -1), head_weight(base)))
    begun = jax.tree.map(by_group, begun.replace(keys=jax.random.key_data(keys)))
    begun_mask = ring(mask)
    put = pytrees.vmap_or_single(lambda old, new, at: old.at[at].set(new, mode="drop"))
    write = lambda old, new: put(by_group(old), new, slots)
    completions = jax.tree.map(write, state.completions, begun)
    written = DecodeState(cache, write(state.cache_mask, begun_mask), completions)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), written)


def _grouped(lora: Adapter | None) -> bool:
    """Whether each group has an adapter of its own."""
    return lora is not None and lora.grouped


def _to_cache(flat: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers keys or values of packed tokens [N, U, E] into [rows, U, columns, E].

    Args: index: int32[rows, columns], the packed token of each column.
    """
    return jnp.swapaxes(flat[index], 1, 2)


def prefill_shared_prefix(
    decoder: Decoder, lora: Adapter | None, base: DecoderParams, pack: PackedSequences
) -> LayerKeyValues:
    """Computes keys and values of the tokens that all prompts begin with.

    Args: lora: as for `prefill`; pack: of the prefix, as one sequence.
    Returns: as `packed_states`; with a leading axis G where `lora` is grouped.
    """
    one = lambda lora: packed_states(decoder, lora, base, pack)[1]
    return pytrees.vmap_or_single(one, in_axes=1)(lora) if _grouped(lora) else one(lora)


def decode_until(
    decoder: Decoder,
    config: SamplingConfig,
    lora: Adapter | None,
    base: DecoderParams,
    state: DecodeState,
    at: jax.Array,
    enough: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Decodes until no group has more live slots than its number of `enough`.

    The host reads the loop's condition while a GPU waits, so that it is asked once in
    `config.steps_per_check`; up to one step less is decoded in vain. A slot that has ended stays as
    it is, so that completions do not depend on that number.

    Args: at: int32[], the ring's next column; enough: int32[G].
    Returns: the state; the ring's next column.
    """
    columns = state.cache_mask.shape[1]

    def going(carry):
        live = carry[0].completions.live.reshape(enough.shape[0], -1)
        return (live.sum(1) > enough).any()

    def step(carry):
        state, at = carry
        grown = state.completions
        token = jnp.take_along_axis(grown.tokens, jnp.maximum(grown.step - 1, 0)[:, None], axis=1)[
            :, 0
        ]
        new = jnp.ones((token.shape[0], 1), bool)
        seen = jax.lax.dynamic_update_slice_in_dim(state.cache_mask, new, at, axis=1)
        hidden, cache = decode_step(decoder, lora, base, token, state.cache, seen, at)
        grown = append_token(config, grown, head_logits(hidden, head_weight(base)))
        return DecodeState(cache, seen, grown), (at + 1) % columns

    count = min(config.steps_per_check, config.max_new_tokens - 1)  # more than that none needs
    steps = lambda carry: jax.lax.fori_loop(0, count, lambda _, carry: step(carry), carry)
    return jax.lax.while_loop(going, step if count == 1 else steps, (state, at))


def append_token(
    config: SamplingConfig, completions: GrowingCompletions, logits: jax.Array
) -> GrowingCompletions:
    """Draws a token a slot, writes it where the slot is live, and ends the slots that drew an EOS
    or are full.

    Args: logits: float32[B, V].
    """
    token, logprob = sample_token(logits, completions.keys, completions.step, config)
    length, live = config.max_new_tokens, completions.live
    here = (jnp.arange(length) == completions.step[:, None]) & live[:, None]
    step = completions.step + live
    ended = jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32)) | (step >= length)
    return completions.replace(
        tokens=jnp.where(here, token[:, None], completions.tokens),
        logprobs=jnp.where(here, logprob[:, None], completions.logprobs),
        step=step,
        live=live & ~ended,
    )
