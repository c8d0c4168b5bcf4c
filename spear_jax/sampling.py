"""Generation with a KV cache: prompts of all clients in one batch, each row with its own key, finished rows leaving early.

Prompts are sorted by length and read as one flat pack, equal ones once; their keys and values are then spread over left-padded
rows. Decoding runs in segments; after each one the rows that still generate are compacted into the smallest row bucket that
holds them. A row's tokens depend on its prompt and its key, never on its neighbours.

Rows stand in equal groups: one for each device, or where every client answers with its own adapter one for each client.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax import packs, rooms
from spear_jax.devices import to_host
from spear_jax.drawing import SamplingConfig, draw
from spear_jax.models.decoder import Decoder, decode_step, head_weight, packed_states, unstack
from spear_jax.types import Pack


@dataclasses.dataclass
class Completion:
    """Sampled ids (EOS included when generated) and their untempered log-probabilities in nats."""

    tokens: list[int]
    logprobs: list[float]


def length_bucket(length: int, step: int = 16) -> int:
    """The padded length for `length` tokens: multiples of `step`, coarser as they grow, at most a third of it padding."""
    size = step
    while size < length:
        size += max(step, step * (size // (4 * step)))
    return size


def row_bucket(rows: int, max_rows: int) -> int:
    """The padded row count for `rows`: max_rows divided by 1, 4, 16, ... while at least 4 remain."""
    size = max_rows
    while size // 4 >= max(rows, 4):
        size //= 4
    return size


def start(decoder: Decoder, config: SamplingConfig, lora, base, pack: Pack, index, mask, keys, live):
    """Reads a batch's prompts and draws its first tokens.

    Args: pack, index, mask: as from `packs.pack_prompts`, leading axis G; keys [B]; live bool[B], false for padding rows;
        lora: None, one adapter ([L, in, R]), or one for each group stacked behind the layer axis ([L, G, in, R]).
    Returns: the decoding state, a dict of arrays with leading axis B = G * rows (caches: a pair [B, N, P + new, K] a layer).
    """
    spread = functools.partial(_spread, config.max_new_tokens)

    def read(lora, pack, index):
        hidden, layers = packed_states(decoder, lora, base, pack)
        return hidden[index[:, -1]], jax.tree.map(lambda x: spread(x, index), layers)

    own = 1 if lora is not None and jax.tree.leaves(lora)[0].ndim == 4 else None
    hidden, cache = jax.vmap(read, in_axes=(own, 0, 0))(lora, pack, index)
    hidden, cache, mask = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (hidden, cache, mask))
    rows, room = mask.shape[0], config.max_new_tokens
    state = {
        "cache": cache,
        "cache_mask": jnp.pad(mask, ((0, 0), (0, room))),
        "tokens": jnp.full((rows, room), config.pad_id, jnp.int32),
        "logprobs": jnp.zeros((rows, room), jnp.float32),
        "live": live,
        "keys": keys,
    }
    return _emit(config, state, _head(base, hidden), jnp.int32(0))


def _spread(room: int, flat: jax.Array, index: jax.Array) -> jax.Array:
    """Keys or values of packed tokens [N_tokens, N, K] -> [rows, N, P + room, K]."""
    return jnp.pad(jnp.swapaxes(flat[index], 1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(decoder, config, lora, base, pack, index, mask, keys, live):
    state = start(decoder, config, lora, base, pack, index, mask, jax.random.wrap_key_data(keys), live)
    return {**state, "keys": jax.random.key_data(state["keys"])}


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
        base = unstack(base)
        for adapters, whole in self._batches(prompts, config.max_rows, lora, owners):
            for groups in self._parts(config, whole, prompts):
                self._batch(adapters, base, prompts, keys, groups, config, done, report)
        return done

    def _batches(self, prompts, max_rows, lora, owners) -> Iterator[tuple[dict | None, list[list[int]]]]:
        """(adapters, groups of prompt numbers), the longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        if owners is None:
            for begin in range(0, len(order), max_rows):
                part = order[begin : begin + max_rows]
                yield lora, [part[device :: self.devices] for device in range(self.devices)]
            return
        clients = jax.tree.leaves(lora)[0].shape[1]
        own = [[i for i in order if owners[i] == client] for client in range(clients)]
        together = min(clients, max_rows)
        rows = max(1, max_rows // together)
        for first in range(0, clients, together):
            # the last clients fill up with clients that are there already, so that one shape serves
            chosen = np.arange(first, first + together) % clients
            adapters = lora if together == clients else jax.tree.map(lambda x, c=chosen: x[:, c], lora)
            mine = [own[c] if first + slot < clients else [] for slot, c in enumerate(chosen)]
            for begin in range(0, max(map(len, mine)), rows):
                yield adapters, [one[begin : begin + rows] for one in mine]

    def _batch(self, lora, base, prompts, keys, groups, config, done, report) -> None:
        rows, width, room = self._fit(config, [[prompts[i] for i in group] for group in groups])
        packed = packs.pack_prompts([[prompts[i] for i in group] for group in groups], rows, width, room)
        owner = np.full((len(groups), rows), -1)
        for slot, group in enumerate(groups):
            owner[slot, : len(group)] = group
        owner = owner.reshape(-1)
        row_keys = np.where(owner[:, None] >= 0, keys[owner], 0)
        # groups of clients need not fill the devices evenly; they are then on all of them
        place = self.place if len(groups) % self.devices == 0 else self.spread
        inputs = jax.tree.map(place, (*packed, row_keys, owner >= 0))
        state = _start(self.decoder, config, lora, base, *inputs)
        step = 1
        while True:
            until = min(step + config.segment, config.max_new_tokens)
            if step < until:
                state, reached = _advance(self.decoder, config, lora, base, state, np.int32(step), np.int32(until))
                step = int(reached)
            live = to_host(state["live"])
            over = step >= config.max_new_tokens or not live.any()
            report(self._harvest(state, owner, np.ones_like(live) if over else ~live, config, done))
            if over:
                return
            state, owner = self._compact(state, owner, live, config, width, len(groups), place)

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

    def _parts(self, config: SamplingConfig, groups: list[list[int]], prompts) -> Iterator[list[list[int]]]:
        """The groups, or once frozen, where no open shape holds them, halves of them: two batches cost less than a program."""
        whole = not self.shapes.frozen or max(map(len, groups)) < 2
        if not whole:
            wanted = _Wanted(config, [[prompts[i] for i in group] for group in groups])
            whole = self.shapes.held(wanted.name, wanted.held_by)
        if whole:
            yield groups
            return
        for half in (0, 1):
            yield from self._parts(config, [group[half::2] for group in groups], prompts)

    def _fit(self, config: SamplingConfig, groups: list[list[list[int]]]) -> tuple[int, int, rooms.Room]:
        """The rows of a group, the prompt width, and the room that a batch is padded to."""
        wanted = _Wanted(config, groups)
        found = self.shapes.fit(wanted.name, wanted.shape, wanted.held_by)
        return found[0], found[1], wanted.room(found)


class _Wanted:
    """What a batch's prompts ask of a shape: (rows of a group, prompt width, packed tokens, rows and length of each grid).

    Args: groups: the prompts of each group.
    """

    def __init__(self, config: SamplingConfig, groups: list[list[list[int]]]):
        self.name, self._groups = f"{len(groups)} {config!r}", groups
        rows = row_bucket(max(map(len, groups)), -(-config.max_rows // len(groups)))
        width = length_bucket(max(len(prompt) for group in groups for prompt in group))
        self._room = packs.prompt_room(groups, width)
        self.shape = (rows, width, self._room.tokens, *itertools.chain(*self._room.grids))

    def room(self, shape: tuple[int, ...]) -> rooms.Room:
        """The room of a shape."""
        grids = tuple(zip(shape[3::2], shape[4::2], strict=True))
        return dataclasses.replace(self._room, tokens=shape[2], grids=grids)

    def held_by(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape holds the batch."""
        large = shape[0] >= self.shape[0] and shape[1] >= self.shape[1]
        return large and packs.holds_prompts(self.room(shape), self._groups)
