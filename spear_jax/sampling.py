"""Generation with a KV cache: prompts of all clients together, each row with its own key, its slot taken over when it ends.

Prompts are read as flat packs, equal ones once, and so are the tokens that all of them open with (`batches` says which together);
their keys and values are spread over rows. A row's cache is a ring of P + T columns. Every row writes the same column in a
step, wherever its prompt stands, so that a prompt may be read while others are being completed: it is laid to end where the
ring is. Decoding runs until enough slots are free for the next prompts. When none wait any longer, the rows that still generate
are compacted into fewer. A row's tokens depend on its prompt and its key, never on its neighbours.

Rows stand in equal groups: one for each device, or where every client answers with its own adapter one for each client.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax import packs, rooms, trees
from spear_jax.batches import Part, Plan, fewer_rows, plan_batches
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
    """A decoding state of free slots, laid on devices as `live` bool[B] is: a dict of arrays with leading axis B, caches a pair
    [B, N, P + T, K] a layer. Args: width: P."""
    model, rows, room = decoder.config, live.shape[0], config.max_new_tokens
    zeros = functools.partial(jnp.zeros, device=live.sharding)
    cell = rows, model.kv_heads, width + room, model.head_width
    return {
        "cache": tuple((zeros(cell, dtype), zeros(cell, dtype)) for _ in range(model.layers)),
        "cache_mask": zeros((rows, width + room), bool),
        "tokens": zeros((rows, room), jnp.int32),
        "logprobs": zeros((rows, room), jnp.float32),
        "step": zeros(rows, jnp.int32),
        "live": zeros(rows, bool),
        "keys": zeros((rows, 2), jnp.uint32),
    }


def read(
    decoder: Decoder, config: SamplingConfig, lora, base, state, opening, pack: Pack, index, mask, keys, live, slots, at
):
    """Reads prompts into free slots of a decoding state and draws their first tokens.

    Args:
        lora: None, one adapter ([L, in, R]), or one for each group stacked behind the layer axis ([L, G, in, R]).
        opening: None, or as from `read_opening`.
        pack, index, mask: of r prompts of each of G groups, as from `packs.pack_prompts`. The groups' slots are equal shares
            of the state's.
        keys: [G * r]; live: bool[G * r], false for padding rows.
        slots: int32[G, r], places in each group's share; padding rows have one behind its end.
        at: int32[], the ring's next column.
    Returns: the state.
    """
    (groups, _, width), room = index.shape, config.max_new_tokens
    ring = lambda x: jnp.roll(jnp.pad(x, ((0, 0), (0, 0), (0, room))), at - width, axis=2)

    def one(lora, pack, last, places, opening):
        hidden, layers = packed_states(decoder, lora, base, pack, opening=opening)
        if opening is not None:
            last = last - jax.tree.leaves(opening)[0].shape[-3]
        if not isinstance(base["layers"], tuple):
            layers = tuple(zip(*layers, strict=True))
        return hidden[last], jax.tree.map(lambda x: _spread(x, places), layers)

    own = (1, 0) if _own(lora) else (None, None)
    run = trees.each(one, in_axes=(own[0], 0, 0, 0, own[1]))
    hidden, cache = run(lora, pack, index[:, :, -1], ring(index), opening)
    rows = live.shape[0]
    drawn = {
        "tokens": jnp.full((rows, room), config.pad_id, jnp.int32),
        "logprobs": jnp.zeros((rows, room), jnp.float32),
        "step": jnp.zeros(rows, jnp.int32),
        "live": live,
        "keys": keys,
    }
    drawn = _emit(config, drawn, _head(base, hidden.reshape(rows, -1)))
    drawn = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), drawn | {"keys": jax.random.key_data(keys)})

    def write(whole, new):
        """`new` [G, r, ...] into its slots of `whole` [B, ...]."""
        split = whole.reshape(groups, -1, *whole.shape[1:])
        return trees.each(lambda x, y, at: x.at[at].set(y, mode="drop"))(split, new, slots).reshape(whole.shape)

    return jax.tree.map(write, state, drawn | {"cache": cache, "cache_mask": ring(mask)})


def _own(lora) -> bool:
    """Whether each group has an adapter of its own."""
    return lora is not None and jax.tree.leaves(lora)[0].ndim == 4


def _spread(flat: jax.Array, index: jax.Array) -> jax.Array:
    """Keys or values of packed tokens [N_tokens, N, K] -> [rows, N, columns, K]."""
    return jnp.swapaxes(flat[index], 1, 2)


@functools.partial(jax.jit, static_argnums=0)
def read_opening(decoder: Decoder, lora, base, pack: Pack):
    """Keys and values of the tokens that all prompts open with, as `packed_states` gives them; with a leading axis G where each
    of G groups has its own adapter. Args: pack: of that one sequence."""
    one = lambda lora: packed_states(decoder, lora, base, pack)[1]
    return trees.each(one, in_axes=1)(lora) if _own(lora) else one(lora)


def advance(decoder: Decoder, config: SamplingConfig, lora, base, state, at, enough):
    """Decodes from the ring's column `at` on, until no group has more than its `enough` int32[G] of live rows. Returns the state
    and the next column."""
    columns = state["cache_mask"].shape[1]

    def going(carry):
        live = carry[0]["live"].reshape(enough.shape[0], -1)
        return (live.sum(1) > enough).any()

    def body(carry):
        state, at = carry
        token = jnp.take_along_axis(state["tokens"], jnp.maximum(state["step"] - 1, 0)[:, None], axis=1)[:, 0]
        new = jnp.ones((token.shape[0], 1), bool)
        seen = jax.lax.dynamic_update_slice_in_dim(state["cache_mask"], new, at, axis=1)
        hidden, cache = decode_step(decoder, lora, base, token, state["cache"], seen, at)
        state = {**state, "cache": cache, "cache_mask": seen}
        return _emit(config, state, _head(base, hidden)), (at + 1) % columns

    return jax.lax.while_loop(going, body, (state, at))


def _head(base, hidden):
    return jnp.einsum("bd,vd->bv", hidden, head_weight(base), preferred_element_type=jnp.float32)


def _emit(config, state, logits):
    """Draws a token for each row, writes it where the row is live, and ends the rows that drew an EOS or are full."""
    token, logprob = draw(logits, state["keys"], state["step"], config)
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


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _read(decoder, config, lora, base, state, opening, pack, index, mask, keys, live, slots, at):
    keys = jax.random.wrap_key_data(keys)
    return read(decoder, config, lora, base, state, opening, pack, index, mask, keys, live, slots, at)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _advance(decoder, config, lora, base, state, at, enough):
    state = {**state, "keys": jax.random.wrap_key_data(state["keys"])}
    state, at = advance(decoder, config, lora, base, state, at, enough)
    return {**state, "keys": jax.random.key_data(state["keys"])}, at


@jax.jit
def _take(state, rows):
    """The given rows of a decoding state."""
    return jax.tree.map(lambda x: x[rows], state)


class Sampler:
    """Runs generation on the host's side: packs, slots, compaction.

    Args:
        decoder: the model's static settings.
        place: puts an array with a leading axis that `devices` divides on the devices (identity on one device).
        spread: puts a whole array on each device.
        shapes: the open shapes, which a resumed run must have again: padding decides the last bits of a logit.
        openings: what prompts may open with. Prompts that all do have the longest such opening read once.
    """

    def __init__(
        self,
        decoder: Decoder,
        place: Callable = jnp.asarray,
        devices: int = 1,
        shapes: rooms.Shapes | None = None,
        spread: Callable = jnp.asarray,
        openings: Sequence[list[int]] = (),
    ):
        self.decoder, self.place, self.devices, self.spread = decoder, place, devices, spread
        self.shapes = rooms.Shapes() if shapes is None else shapes
        self.openings = sorted(openings, key=len, reverse=True)

    def generate(
        self,
        lora: dict | None,
        base: dict,
        prompts: list[list[int]],
        keys: np.ndarray,
        config: SamplingConfig,
        finished: Callable[[int, Completion], None] = lambda number, completion: None,
        owners: np.ndarray | None = None,
    ) -> list[Completion]:
        """Completes every prompt.

        Args:
            lora: None where an adapter is merged into `base`; else an adapter ([L, in, R]), or several ([L, C, in, R]).
            prompts: token ids, each non-empty.
            keys: uint32[N, 2] key data, one key a prompt.
            finished: called with a prompt's number and its completion, while the device goes on with others.
            owners: int32[N], each prompt's adapter where `lora` holds several.
        Returns: one Completion a prompt, in their order.
        """
        done: dict[int, Completion] = {}
        bases = base, unstack(base)  # prompts are read by a scan over layers, where they are stacked
        begins = lambda opening: all(len(p) > len(opening) and p[: len(opening)] == opening for p in prompts)
        opening = next(filter(begins, self.openings), [])
        for adapters, groups in self._groups(prompts, config.max_rows, lora, owners):
            # groups of clients need not fill the devices evenly; they are then on all of them
            even = len(groups) % self.devices == 0
            place, devices = (self.place, self.devices) if even else (self.spread, 1)
            plan, parts = plan_batches(config, groups, prompts, devices, self.shapes, len(opening))
            for new in _Slots(self, adapters, bases, config, plan, len(groups), place, opening).run(
                parts, prompts, keys
            ):
                for number, completion in new.items():
                    finished(number, completion)
                done |= new
        return [done[number] for number in range(len(prompts))]

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


class _Slots:
    """A decoding state and what stands in it.

    Attributes:
        owner: int[G, slots], the number of the prompt that a slot completes, or -1.
        at: the ring's next column.
    """

    def __init__(self, sampler: Sampler, lora, bases, config: SamplingConfig, plan: Plan, groups: int, place, opening):
        self.decoder, self.shapes, self.place = sampler.decoder, sampler.shapes, place
        self.lora, self.bases, self.config, self.plan = lora, bases, config, plan
        self.owner, self.at = np.full((groups, plan.rows), -1), np.int32(0)
        self.state = blank(
            self.decoder, config, plan.width, place(np.zeros(self.owner.size, bool)), bases[0]["embed"].dtype
        )
        self.length, self.opening = len(opening), None
        if opening:
            pack = jax.tree.map(sampler.spread, packs.one_sequence(opening))
            self.opening = read_opening(self.decoder, lora, bases[0], pack)

    def run(self, parts: list[Part], prompts: list[list[int]], keys: np.ndarray) -> Iterator[dict[int, Completion]]:
        """Completes all prompts; yields those that have finished, while the device goes on."""
        waiting, finished = collections.deque(parts), {}
        while waiting or (self.owner >= 0).any():
            while waiting and all((self.owner < 0).sum(1) >= [len(own) for own in waiting[0]]):
                self._read(waiting.popleft(), prompts, keys)
            fewer = [] if waiting else self._fewer()
            self._advance([self.owner.shape[1] - len(own) for own in waiting[0]] if waiting else max(fewer, default=0))
            yield finished
            finished = self._harvest()
            if fewer:
                self._compact(fewer)
        yield finished

    def _read(self, part: Part, prompts, keys) -> None:
        """Reads a part's prompts into free slots."""
        packed = packs.pack_prompts(
            [[prompts[i] for i in own] for own in part], self.plan.part, self.plan.width, self.plan.room, self.length
        )
        numbers = np.full((len(part), self.plan.part), -1)
        slots = np.full(numbers.shape, self.owner.shape[1], np.int32)
        for group, own in enumerate(part):
            numbers[group, : len(own)] = own
            slots[group, : len(own)] = np.flatnonzero(self.owner[group] < 0)[: len(own)]
            self.owner[group, slots[group, : len(own)]] = own
        numbers = numbers.reshape(-1)
        row_keys = np.where(numbers[:, None] >= 0, keys[numbers], 0)
        inputs = jax.tree.map(self.place, (*packed, row_keys, numbers >= 0, slots))
        self.state = _read(
            self.decoder, self.config, self.lora, self.bases[0], self.state, self.opening, *inputs, self.at
        )

    def _advance(self, enough: int | list[int]) -> None:
        """Decodes until no group has more than `enough` rows that go on; returns before that is done."""
        if self.config.max_new_tokens > 1:
            enough = np.broadcast_to(np.asarray(enough, np.int32), len(self.owner))
            self.state, self.at = _advance(
                self.decoder, self.config, self.lora, self.bases[1], self.state, self.at, enough
            )

    def _harvest(self) -> dict[int, Completion]:
        """Waits for the device; frees the slots of finished rows and returns their completions."""
        live, step, at = to_host((self.state["live"], self.state["step"], self.at))
        self.at = np.int32(at)
        over = (self.owner >= 0).reshape(-1) & ~live
        if not over.any():
            return {}
        tokens, logprobs = to_host((self.state["tokens"], self.state["logprobs"]))
        rows = [(row, step[row]) for row in np.flatnonzero(over)]
        numbers = self.owner.reshape(-1)[over].tolist()
        self.owner[over.reshape(self.owner.shape)] = -1
        return {
            number: Completion(tokens[row, :length].tolist(), logprobs[row, :length].tolist())
            for number, (row, length) in zip(numbers, rows, strict=True)
        }

    def _shrinking(self) -> str:
        return f"compact {len(self.owner)} {self.plan.width} {self.config!r}"

    def _fewer(self) -> list[int]:
        """Slots of each group that a compaction may leave."""
        now = self.owner.shape[1]
        if self.shapes.frozen:
            return [after for before, after in self.shapes.opened(self._shrinking()) if before == now]
        return fewer_rows(now)

    def _compact(self, fewer: list[int]) -> None:
        """Drops free slots where the rest of every group fits into fewer."""
        taken, now = (self.owner >= 0).sum(1).max(), self.owner.shape[1]
        rows = min((rows for rows in fewer if rows >= taken), default=now)
        if not taken or rows == now:
            return
        self.shapes.open(self._shrinking(), (now, rows))
        order = np.argsort(self.owner < 0, axis=1, kind="stable")[:, :rows]
        self.owner = np.take_along_axis(self.owner, order, axis=1)
        self.state = _take(self.state, self.place((order + now * np.arange(len(order))[:, None]).reshape(-1)))
