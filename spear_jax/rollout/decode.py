"""Decoding as pure functions of a state: slots in which completions grow, a KV cache, and prompts
that are read into them.

A row's cache is a ring of P + T columns. Every row writes the same column in a step, wherever its
prompt stands, so that a prompt may be read while others are being completed: it is laid to end
where the ring is.
"""

import functools

import jax
import jax.numpy as jnp

from spear_jax.core import pytrees
from spear_jax.models.decoder import Decoder, decode_step, head_weight, packed_states
from spear_jax.packing.arrays import PackedSequences
from spear_jax.rollout.token_sampling import SamplingConfig, sample_token

# Turns in which a part's rows get their keys and values: in one, XLA would spread those of all
# layers before it wrote the first.
TURNS = 4


def init_decode_state(
    decoder: Decoder, config: SamplingConfig, width: int, live: jax.Array, dtype
) -> dict:
    """A decoding state of free slots, laid on devices as `live` bool[B] is: a dict of arrays with
    leading axis B, caches a pair [B, N, P + T, K] a layer. Args: width: P.
    """
    model, rows, room = decoder.config, live.shape[0], config.max_new_tokens
    zeros = functools.partial(jnp.zeros, device=live.sharding)
    query_index = rows, model.kv_heads, width + room, model.head_width
    return {
        "cache": tuple(
            (zeros(query_index, dtype), zeros(query_index, dtype)) for _ in range(model.layers)
        ),
        "cache_mask": zeros((rows, width + room), bool),
        "tokens": zeros((rows, room), jnp.int32),
        "logprobs": zeros((rows, room), jnp.float32),
        "step": zeros(rows, jnp.int32),
        "live": zeros(rows, bool),
        "keys": zeros((rows, 2), jnp.uint32),
    }


def prefill(
    decoder: Decoder,
    config: SamplingConfig,
    lora,
    base,
    state,
    shared_prefix,
    pack: PackedSequences,
    index,
    mask,
    keys,
    live,
    slots,
    at,
):
    """Reads prompts into free slots of a decoding state and draws their first tokens.

    Args:
        lora: None, one adapter ([L, in, R]), or one for each group stacked behind the layer axis
            ([L, G, in, R]).
        opening: None, or as from `prefill_shared_prefix`.
        pack, index, mask: of r prompts of each of G groups, as from `packs.pack_prompts`. The
            groups' slots are equal shares of the state's.
        keys: [G * r]; live: bool[G * r], false for padding rows.
        slots: int32[G, r], places in each group's share; padding rows have one behind its end.
        at: int32[], the ring's next column.
    Returns: the state.
    """
    (groups, taken, width), room = index.shape, config.max_new_tokens
    share = -(-taken // TURNS)
    ring = lambda x: jnp.roll(jnp.pad(x, ((0, 0), (0, 0), (0, room))), at - width, axis=2)
    apart = lambda x: x.reshape(groups, -1, *x.shape[1:])

    def one(lora, pack, last, places, shared_prefix, slots, cache):
        hidden, layers = packed_states(decoder, lora, base, pack, shared_prefix=shared_prefix)
        if shared_prefix is not None:
            last = last - jax.tree.leaves(shared_prefix)[0].shape[-3]
        if not isinstance(base["layers"], tuple):
            layers = tuple(zip(*layers, strict=True))

        def write(turn, cache):
            # a slice that would pass the end begins earlier, and what is put twice is put alike
            to, source = (
                jax.lax.dynamic_slice_in_dim(x, turn * share, share) for x in (slots, places)
            )
            return jax.tree.map(
                lambda old, new: old.at[to].set(_spread(new, source), mode="drop"), cache, layers
            )

        return hidden[last], jax.lax.fori_loop(0, -(-taken // share), write, cache)

    own = (1, 0) if _own(lora) else (None, None)
    run = pytrees.vmap_or_single(one, in_axes=(own[0], 0, 0, 0, own[1], 0, 0))
    cache = jax.tree.map(apart, state["cache"])
    hidden, cache = run(lora, pack, index[:, :, -1], ring(index), shared_prefix, slots, cache)
    rows = live.shape[0]
    drawn = {
        "tokens": jnp.full((rows, room), config.pad_id, jnp.int32),
        "logprobs": jnp.zeros((rows, room), jnp.float32),
        "step": jnp.zeros(rows, jnp.int32),
        "live": live,
        "keys": keys,
    }
    drawn = append_token(config, drawn, _head(base, hidden.reshape(rows, -1)))
    drawn = jax.tree.map(apart, drawn | {"keys": jax.random.key_data(keys)}) | {
        "cache_mask": ring(mask)
    }
    put = pytrees.vmap_or_single(lambda old, new, at: old.at[at].set(new, mode="drop"))
    written = {name: put(apart(state[name]), new, slots) for name, new in drawn.items()} | {
        "cache": cache
    }
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), written)


def _own(lora) -> bool:
    """Whether each group has an adapter of its own."""
    return lora is not None and jax.tree.leaves(lora)[0].ndim == 4


def _spread(flat: jax.Array, index: jax.Array) -> jax.Array:
    """Keys or values of packed tokens [N_tokens, N, K] -> [rows, N, columns, K]."""
    return jnp.swapaxes(flat[index], 1, 2)


def prefill_shared_prefix(decoder: Decoder, lora, base, pack: PackedSequences):
    """Keys and values of the tokens that all prompts open with, as `packed_states` gives them; with
    a leading axis G where each of G groups has its own adapter. Args: pack: of that one
    sequence.
    """
    one = lambda lora: packed_states(decoder, lora, base, pack)[1]
    return pytrees.vmap_or_single(one, in_axes=1)(lora) if _own(lora) else one(lora)


def decode_until(decoder: Decoder, config: SamplingConfig, lora, base, state, at, enough):
    """Decodes from the ring's column `at` on, until no group has more than its `enough` int32[G] of
    live rows. Returns the state and the next column.
    """
    tiles = state["cache_mask"].shape[1]

    def going(carry):
        live = carry[0]["live"].reshape(enough.shape[0], -1)
        return (live.sum(1) > enough).any()

    def body(carry):
        state, at = carry
        token = jnp.take_along_axis(
            state["tokens"], jnp.maximum(state["step"] - 1, 0)[:, None], axis=1
        )[:, 0]
        new = jnp.ones((token.shape[0], 1), bool)
        seen = jax.lax.dynamic_update_slice_in_dim(state["cache_mask"], new, at, axis=1)
        hidden, cache = decode_step(decoder, lora, base, token, state["cache"], seen, at)
        state = {**state, "cache": cache, "cache_mask": seen}
        return append_token(config, state, _head(base, hidden)), (at + 1) % tiles

    return jax.lax.while_loop(going, body, (state, at))


def _head(base, hidden):
    return jnp.einsum("bd,vd->bv", hidden, head_weight(base), preferred_element_type=jnp.float32)


def append_token(config, state, logits):
    """Draws a token for each row, writes it where the row is live, and ends the rows that drew an
    EOS or are full.
    """
    token, logprob = sample_token(logits, state["keys"], state["step"], config)
    room = config.max_new_tokens
    here = (jnp.arange(room) == state["step"][:, None]) & state["live"][:, None]
    step = state["step"] + state["live"]
    ended = jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32)) | (step >= room)
    return {
        **state,
        "tokens": jnp.where(here, token[:, None], state["tokens"]),
        "logprobs": jnp.where(here, logprob[:, None], state["logprobs"]),
        "step": step,
        "live": state["live"] & ~ended,
    }
