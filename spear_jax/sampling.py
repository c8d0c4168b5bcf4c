"""Generation with a KV cache: prompts of all clients together, each row with its own key, finished rows leaving early.

Prompts are read as flat packs, equal ones once (`batches` says which together); their keys and values are spread over
left-padded rows. Decoding runs in segments; after each one the rows that still generate are compacted into the smallest row
bucket that holds them. A row's tokens depend on its prompt and its key, never on its neighbours.

Rows stand in equal groups: one for each device, or where every client answers with its own adapter one for each client.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax import packs, rooms, trees
from spear_jax.batches import plan_batches, row_bucket
from spear_jax.devices import to_host
from spear_jax.drawing import SamplingConfig, draw
from spear_jax.models.decoder import Decoder, decode_step, head_weight, packed_states, unstack
from spear_jax.types import Pack


@dataclasses.dataclass
class Completion:
    """Sampled ids (EOS included when generated) and their untempered log-probabilities in nats."""

    tokens: list[int]
    logprobs: list[float]


def blank(decoder: Decoder, config: SamplingConfig, width: int, live: jax.Array, dtype) -> dict:
    """A decoding state without prompts, its rows laid on devices as `live` bool[B] is: a dict of arrays with leading axis B,
    caches a pair [B, N, P + new, K] a layer. Args: width: P."""
    model, rows, room = decoder.config, live.shape[0], config.max_new_tokens
    zeros = functools.partial(jnp.zeros, device=live.sharding)
    cell = rows, model.kv_heads, width + room, model.head_width
    return {
        "cache": tuple((zeros(cell, dtype), zeros(cell, dtype)) for _ in range(model.layers)),
        "cache_mask": zeros((rows, width + room), bool),
        "tokens": zeros((rows, room), jnp.int32),
        "logprobs": zeros((rows, room), jnp.float32),
        "live": zeros(rows, bool),
        "keys": zeros((rows, 2), jnp.uint32),
    }


def read(decoder: Decoder, config: SamplingConfig, lora, base, state, pack: Pack, index, mask, keys, live, at):
    """Reads prompts into some rows of a decoding state and draws their first tokens.

    Args:
        lora: None, one adapter ([L, in, R]), or one for each group stacked behind the layer axis ([L, G, in, R]).
        pack, index, mask: of r prompts of each of G groups, as from `packs.pack_prompts`. The groups' rows are equal shares
            of the state's.
        keys: [G * r]; live: bool[G * r], false for padding rows.
        at: int32[], the first of the rows in each group's share.
    Returns: the state.
    """

    def one(lora, pack, index):
        hidden, layers = packed_states(decoder, lora, base, pack)
        if not isinstance(base["layers"], tuple):
            layers = tuple(zip(*layers, strict=True))
        return hidden[index[:, -1]], jax.tree.map(lambda x: _spread(x, index), layers)

    own = 1 if lora is not None and jax.tree.leaves(lora)[0].ndim == 4 else None
    groups = index.shape[0]
    hidden, cache = trees.each(one, in_axes=(own, 0, 0))(lora, pack, index)

    def write(whole, new):
        """`new` [G, r, ...] into `whole` [B, ...], from the first place of the other axes on."""
        split = whole.reshape(groups, -1, *whole.shape[1:])
        return jax.lax.dynamic_update_slice(split, new, (0, at, *[0] * (new.ndim - 2))).reshape(whole.shape)

    rows, room = live.shape[0], config.max_new_tokens
    drawn = {
        "tokens": jnp.full((rows, room), config.pad_id, jnp.int32),
        "logprobs": jnp.zeros((rows, room), jnp.float32),
        "live": live,
        "keys": keys,
    }
    drawn = _emit(config, drawn, _head(base, hidden.reshape(rows, -1)), jnp.int32(0))
    drawn = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), drawn | {"keys": jax.random.key_data(keys)})
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, room)))
    return jax.tree.map(write, state, drawn | {"cache": cache, "cache_mask": mask})


def _spread(flat: jax.Array, index: jax.Array) -> jax.Array:
    """Keys or values of packed tokens [N_tokens, N, K] -> [rows, N, P, K]."""
    return jnp.swapaxes(flat[index], 1, 2)


def advance(decoder: Decoder, config: SamplingConfig, lora, base, state, step, until):
    """Decodes from `step` up to `until` tokens a row, or until no row is live. Returns (state, step reached)."""
    width = state["cache_mask"].shape[1] - state["tokens"].shape[1]

    def going(carry):
        state, step = carry
        return (step < until) & state["live"].any()

    def body(carry):
        state, step = carry
        token = jax.lax.dynamic_index_in_dim(state["tokens"], step - 1, axis=1, keepdims=False)
        at = width + step - 1
        new = jnp.ones((token.shape[0], 1), bool)
        seen = jax.lax.dynamic_update_slice_in_dim(state["cache_mask"], new, at, axis=1)
        hidden, cache = decode_step(decoder, lora, base, token, state["cache"], seen, at)
        state = {**state, "cache": cache, "cache_mask": seen}
        return _emit(config, state, _head(base, hidden), step), step + 1

    return jax.lax.while_loop(going, body, (state, step))


def _head(base, hidden):
    return jnp.einsum("bd,vd->bv", hidden, head_weight(base), preferred_element_type=jnp.float32)


def _emit(config, state, logits, step):
    """Draws a token for each row, writes it where the row is live, and ends the rows that drew an EOS."""
    token, logprob = draw(logits, state["keys"], step, config)
    token = jnp.where(state["live"], token, config.pad_id)
    logprob = jnp.where(state["live"], logprob, 0.0)
    ended = jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
    return {
        **state,
        "tokens": write(state["tokens"], token[:, None]),
        "logprobs": write(state["logprobs"], logprob[:, None]),
        "live": state["live"] & ~ended,
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _read(decoder, config, lora, base, state, pack, index, mask, keys, live, at):
    return read(decoder, config, lora, base, state, pack, index, mask, jax.random.wrap_key_data(keys), live, at)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _advance(decoder, config, lora, base, state, step, until):
    state = {**state, "keys": jax.random.wrap_key_data(state["keys"])}
    state, step = advance(decoder, config, lora, base, state, step, until)
    return {**state, "keys": jax.random.key_data(state["keys"])}, step


@jax.jit
def _take(state, rows):
    """The given rows of a decoding state."""
    return jax.tree.map(lambda x: x[rows], state)


class Sampler:
    """Runs generation on the host's side: packs, segments, compaction.

    Args:
        decoder: the model's static settings.
        place: puts an array with a leading axis that `devices` divides on the devices (identity on one device).
        spread: puts a whole array on each device.
        shapes: the open shapes, which a resumed run must have again: padding decides the last bits of a logit.
    """

    def __init__(
        self,
        decoder: Decoder,
        place: Callable = jnp.asarray,
        devices: int = 1,
        shapes: rooms.Shapes | None = None,
        spread: Callable = jnp.asarray,
    ):
        self.decoder, self.place, self.devices, self.spread = decoder, place, devices, spread
        self.shapes = rooms.Shapes() if shapes is None else shapes

    def generate(
        self,
        lora: dict | None,
        base: dict,
        prompts: list[list[int]],
        keys: np.ndarray,
        config: SamplingConfig,
        report: Callable[[int], None] = lambda rows: None,
        owners: np.ndarray | None = None,
    ) -> list[Completion]:
        """Completes every prompt.

        Args:
            lora: None where an adapter is merged into `base`; else an adapter ([L, in, R]), or several ([L, C, in, R]).
            prompts: token ids, each non-empty.
            keys: uint32[N, 2] key data, one key a prompt.
            report: called with the number of rows that have finished since the last call.
            owners: int32[N], each prompt's adapter where `lora` holds several.
        Returns: one Completion a prompt, in their order.
        """
        done: list[Completion | None] = [None] * len(prompts)
        bases = base, unstack(base)  # prompts are read by a scan over layers, where they are stacked
        for adapters, groups in self._groups(prompts, config.max_rows, lora, owners):
            # groups of clients need not fill the devices evenly; they are then on all of them
            even = len(groups) % self.devices == 0
            plan, batches = plan_batches(config, groups, prompts, self.devices if even else 1, self.shapes)
            for parts in batches:
                place = self.place if even else self.spread
                self._batch(adapters, bases, prompts, keys, plan, parts, config, done, report, place)
        return done

    def _groups(self, prompts, max_rows, lora, owners) -> Iterator[tuple[dict | None, list[list[int]]]]:
        """(adapters, groups of prompt numbers)."""
        if owners is None:
            order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
            yield lora, [order[device :: self.devices] for device in range(self.devices)]
            return
        clients = jax.tree.leaves(lora)[0].shape[1]
        own = [[i for i, owner in enumerate(owners) if owner == client] for client in range(clients)]
        together = min(clients, max_rows)
        for first in range(0, clients, together):
            # the last clients fill up with clients that are there already, so that one shape serves
            chosen = np.arange(first, first + together) % clients
            adapters = lora if together == clients else jax.tree.map(lambda x, c=chosen: x[:, c], lora)
            yield adapters, [own[c] if first + slot < clients else [] for slot, c in enumerate(chosen)]

    def _batch(self, lora, bases, prompts, keys, plan, parts, config, done, report, place) -> None:
        groups, rows = len(parts[0]), plan.part
        owner = np.full((groups, plan.rows), -1)
        for number, part in enumerate(parts):
            for slot, own in enumerate(part):
                owner[slot, number * rows : number * rows + len(own)] = own
        state = blank(self.decoder, config, plan.width, place(np.zeros(owner.size, bool)), bases[0]["embed"].dtype)
        for number, part in enumerate(parts):
            packed = packs.pack_prompts([[prompts[i] for i in own] for own in part], rows, plan.width, plan.room)
            mine = owner[:, number * rows : (number + 1) * rows].reshape(-1)
            row_keys = np.where(mine[:, None] >= 0, keys[mine], 0)
            inputs = jax.tree.map(place, (*packed, row_keys, mine >= 0))
            state = _read(self.decoder, config, lora, bases[0], state, *inputs, np.int32(number * rows))
        owner, step = owner.reshape(-1), 1
        while True:
            until = min(step + config.segment, config.max_new_tokens)
            if step < until:
                limits = np.int32(step), np.int32(until)
                state, reached = _advance(self.decoder, config, lora, bases[1], state, *limits)
                step = int(reached)
            live = to_host(state["live"])
            over = step >= config.max_new_tokens or not live.any()
            report(self._harvest(state, owner, np.ones_like(live) if over else ~live, config, done))
            if over:
                return
            state, owner = self._compact(state, owner, live, config, plan.width, groups, place)

    def _harvest(self, state, owner, ended, config, done) -> int:
        """Copies finished rows to the host, once; returns how many there were."""
        rows = [row for row in np.flatnonzero(ended) if owner[row] >= 0 and done[owner[row]] is None]
        if not rows:
            return 0
        tokens, logprobs = to_host((state["tokens"], state["logprobs"]))
        for row in rows:
            ids = tokens[row].tolist()
            length = next((i + 1 for i, t in enumerate(ids) if t in config.eos_ids), len(ids))
            done[owner[row]] = Completion(ids[:length], logprobs[row, :length].tolist())
        return len(rows)

    def _compact(self, state, owner, live, config, width, groups, place):
        """Drops finished rows when a smaller row bucket holds the rest of every group."""
        before = len(owner) // groups
        rows = row_bucket(int(live.reshape(groups, -1).sum(1).max()), before)
        change = (before, rows, width, groups)
        if rows >= before or not self.shapes.known(f"compact {config!r}", change):
            return state, owner
        order = np.argsort(~live.reshape(groups, -1), axis=1, kind="stable")[:, :rows]
        order = (order + before * np.arange(groups)[:, None]).reshape(-1)
        return _take(state, place(order)), np.where(live, owner, -1)[order]
