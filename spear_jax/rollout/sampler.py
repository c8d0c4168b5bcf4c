"""Text generation with continuous batching.

All clients' prompts share one batch. When a sequence ends, the next prompt is prefilled into its
slot. A sequence depends only on its own prompt and random key, so batching never changes the text.

Prompts are prefilled as packed sequences: equal prompts once, and a prefix that all of them share
once (`prefill` plans which go together). Decoding (`decode`) runs until enough slots are free for
the next prefill. When no prompt waits, the live sequences move into fewer slots.

Slots form equal groups: one for each device, or one for each client where every client generates
with its own adapter.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core.malloc import release_free_memory
from spear_jax.core.mesh import over_heads, to_host
from spear_jax.models.decoder import Decoder, LayerKeyValues, unstack
from spear_jax.models.params import Adapter, DecoderParams
from spear_jax.packing.prefix_tree import one_sequence, pack_prompts
from spear_jax.packing.shape_buckets import ShapeBuckets
from spear_jax.rollout import decode
from spear_jax.rollout.prefill import PrefillBatch, PrefillPlan, fewer_rows, plan_prefill
from spear_jax.rollout.token_sampling import SamplingConfig


@dataclasses.dataclass
class Completion:
    """A finished completion: token ids (a generated EOS included) and their untempered
    log-probabilities in nats.
    """

    tokens: list[int]
    logprobs: list[float]


ADAPTERS = 64  # of clients' own that are on the devices at one time, at most

_prefill_shared_prefix = jax.jit(decode.prefill_shared_prefix, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _prefill(
    decoder, config, lora, base, state, shared_prefix, pack, index, mask, keys, live, slots, at
):
    keys = jax.random.wrap_key_data(keys)
    return decode.prefill(
        decoder, config, lora, base, state, shared_prefix, pack, index, mask, keys, live, slots, at
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode_until(decoder, config, lora, base, state, at, enough):
    with_keys = lambda state, keys: state.replace(completions=state.completions.replace(keys=keys))
    state = with_keys(state, jax.random.wrap_key_data(state.completions.keys))
    state, at = decode.decode_until(decoder, config, lora, base, state, at, enough)
    return with_keys(state, jax.random.key_data(state.completions.keys)), at


@jax.jit
def _take(state, rows):
    """Takes the given slots of a decode state."""
    return jax.tree.map(lambda x: x[rows], state)


class Sampler:
    """Generator of completions: the host's side of continuous batching.

    Args:
        decoder: the model's static settings.
        place: puts an array with a leading axis that `devices` divides on the devices (identity on
            one device).
        spread: puts a whole array on each device.
        shapes: the shape buckets. A resumed run must have the same ones: padding decides the last
            bits of a logit.
        shared_prefixes: token ids that prompts may begin with. The longest one that all prompts of
            a call share is prefilled once.
    """

    def __init__(
        self,
        decoder: Decoder,
        place: Callable = jnp.asarray,
        devices: int = 1,
        shapes: ShapeBuckets | None = None,
        spread: Callable = jnp.asarray,
        shared_prefixes: Sequence[list[int]] = (),
    ):
        self.decoder, self.place, self.devices, self.spread = decoder, place, devices, spread
        self.shapes = ShapeBuckets() if shapes is None else shapes
        self.shared_prefixes = sorted(shared_prefixes, key=len, reverse=True)

    def generate(
        self,
        lora: Adapter | None,
        base: DecoderParams,
        prompts: list[list[int]],
        keys: np.ndarray,
        config: SamplingConfig,
        finished: Callable[[int, Completion], None] = lambda number, completion: None,
        owners: np.ndarray | None = None,
    ) -> list[Completion]:
        """Completes every prompt.

        Args:
            lora: None where an adapter is merged into `base`; else one adapter, or C of them
                stacked behind the layer axis. Stacked ones may wait on the host: as many are on the
                devices as `max_rows` slots need, ADAPTERS at most.
            prompts: token ids, each non-empty.
            keys: uint32[prompts, 2] key data, one key a prompt.
            finished: called with a prompt's number and its completion, while the device goes on
                with others.
            owners: int32[prompts], the number of each prompt's adapter where `lora` holds several.
        Returns: one Completion a prompt, in their order.
        """
        done: dict[int, Completion] = {}
        bases = (base, unstack(base))  # for prefill, which scans stacked layers, and for decode
        shared_prefix = self.shared_prefix(prompts)
        for adapters, groups in self._groups(prompts, config.max_rows, lora, owners):
            # groups of clients need not fill the devices evenly; they are then on all of them
            even = len(groups) % self.devices == 0
            place, devices = (self.place, self.devices) if even else (self.spread, 1)
            plan, batches = plan_prefill(
                config, groups, prompts, devices, self.shapes, len(shared_prefix)
            )
            slots = ContinuousBatch(
                self, adapters, bases, config, plan, len(groups), place, shared_prefix
            )
            for new in slots.run(batches, prompts, keys):
                for number, completion in new.items():
                    finished(number, completion)
                done |= new
        return [done[number] for number in range(len(prompts))]

    def shared_prefix(self, prompts: Sequence[list[int]]) -> list[int]:
        """Finds the longest of `shared_prefixes` that all prompts begin with, [] for none; every
        prompt goes on behind it.
        """
        begins = lambda shared_prefix: all(
            len(p) > len(shared_prefix) and p[: len(shared_prefix)] == shared_prefix
            for p in prompts
        )
        return next(filter(begins, self.shared_prefixes), [])

    def prefill_shared_prefix(
        self, lora: Adapter | None, base: DecoderParams, tokens: list[int]
    ) -> LayerKeyValues | None:
        """Computes keys and values of a shared prefix; None where it is empty."""
        if not tokens:
            return None
        return _prefill_shared_prefix(
            self.decoder, lora, base, jax.tree.map(self.spread, one_sequence(tokens))
        )

    def _groups(
        self, prompts, max_rows, lora, owners
    ) -> Iterator[tuple[Adapter | None, list[list[int]]]]:
        """Yields (adapters, groups of prompt numbers): what shares the slots at one time."""
        if owners is None:
            order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
            yield lora, [order[device :: self.devices] for device in range(self.devices)]
            return
        clients = jax.tree.leaves(lora)[0].shape[1]
        own = [
            [i for i, owner in enumerate(owners) if owner == client] for client in range(clients)
        ]
        # no more adapters than slots can use
        together = min(clients, ADAPTERS, max(1, max_rows // max(map(len, own))))
        for first in range(0, clients, together):
            # the last group is filled up with earlier clients, so that one shape serves all
            chosen = np.arange(first, first + together) % clients
            adapters = (
                lora if together == clients else jax.tree.map(lambda x, c=chosen: x[:, c], lora)
            )
            groups = [own[c] if first + slot < clients else [] for slot, c in enumerate(chosen)]
            yield jax.tree.map(self.spread, adapters), groups


class ContinuousBatch:
    """Slots on the devices, and the prompts whose completions grow in them.

    Attributes:
        owner: int[G, slots], the number of the prompt that a slot completes, -1 for a free slot:
            [[4, -1], [0, 2]] completes prompt 4 in group 0, prompts 0 and 2 in group 1.
        at: the cache ring's next column.
        state: the DecodeState; None until the first prefill.
    """

    def __init__(
        self,
        sampler: Sampler,
        lora,
        bases,
        config: SamplingConfig,
        plan: PrefillPlan,
        groups: int,
        place,
        shared_prefix,
    ):
        self.decoder, self.shapes, self.place = sampler.decoder, sampler.shapes, place
        self.lora, self.bases, self.config, self.plan = lora, bases, config, plan
        self.dtype = bases[0].embed.dtype
        self.owner, self.at, self.state = np.full((groups, plan.rows), -1), np.int32(0), None
        self.length, self.shared_prefix = (
            len(shared_prefix),
            sampler.prefill_shared_prefix(lora, bases[0], shared_prefix),
        )

    def run(
        self, batches: list[PrefillBatch], prompts: list[list[int]], keys: np.ndarray
    ) -> Iterator[dict[int, Completion]]:
        """Completes all prompts; yields those that have finished while the device goes on."""
        waiting, finished = collections.deque(batches), {}
        while waiting or (self.owner >= 0).any():
            while waiting and all((self.owner < 0).sum(1) >= [len(own) for own in waiting[0]]):
                self._prefill(waiting.popleft(), prompts, keys)
            fewer = [] if waiting else self._fewer()
            self._decode_until(
                [self.owner.shape[1] - len(own) for own in waiting[0]]
                if waiting
                else max(fewer, default=0)
            )
            yield finished
            finished = self._harvest()
            if fewer:
                self._compact(fewer)
        yield finished

    def _prefill(self, batch: PrefillBatch, prompts, keys) -> None:
        """Prefills a batch of prompts into free slots."""
        packed = pack_prompts(
            [[prompts[i] for i in own] for own in batch],
            self.plan.batch,
            self.plan.width,
            self.plan.pack_shape,
            self.length,
        )
        numbers = np.full((len(batch), self.plan.batch), -1)
        slots = np.full(numbers.shape, self.owner.shape[1], np.int32)
        for group, own in enumerate(batch):
            numbers[group, : len(own)] = own
            slots[group, : len(own)] = np.flatnonzero(self.owner[group] < 0)[: len(own)]
            self.owner[group, slots[group, : len(own)]] = own
        numbers = numbers.reshape(-1)
        row_keys = np.where(numbers[:, None] >= 0, keys[numbers], 0)
        inputs = jax.tree.map(self.place, (*packed, row_keys, numbers >= 0, slots))
        if self.state is None:
            self.state = self._init_state(inputs)
        self.state = _prefill(*self._model(0), self.state, self.shared_prefix, *inputs, self.at)

    def _init_state(self, inputs: tuple) -> decode.DecodeState:
        """Compiles prefill and decode, and then allocates a state of free slots.

        In this order the compiler's memory and the KV cache are never held at once.
        """
        free = self.place(np.zeros(self.owner.size, bool))
        init = functools.partial(
            decode.init_decode_state, self.decoder, self.config, self.plan.width, free, self.dtype
        )
        like = lambda sharding, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        shapes = jax.eval_shape(init)
        before = jax.tree.map(functools.partial(like, free.sharding), shapes)
        heads = over_heads(free.sharding, self.decoder.config.kv_heads)
        before = before.replace(cache=jax.tree.map(functools.partial(like, heads), shapes.cache))
        lowered = _prefill.lower(*self._model(0), before, self.shared_prefix, *inputs, self.at)
        compiled = lowered.compile()
        if self.config.max_new_tokens > 1:
            after = jax.tree.map(like, compiled.output_shardings, shapes)
            _decode_until.lower(*self._model(1), after, self.at, self._enough(0)).compile()
        release_free_memory()
        return init()

    def _model(self, base: int) -> tuple:
        """The first arguments of `_prefill` (base 0) and `_decode_until` (base 1)."""
        return self.decoder, self.config, self.lora, self.bases[base]

    def _enough(self, rows: int | list[int]) -> np.ndarray:
        """int32[G], the live slots of each group at which decoding stops."""
        return np.broadcast_to(np.asarray(rows, np.int32), len(self.owner))

    def _decode_until(self, enough: int | list[int]) -> None:
        """Starts decoding until no group has more than `enough` live slots; does not wait for the
        device.
        """
        if self.config.max_new_tokens > 1:
            self.state, self.at = _decode_until(
                *self._model(1), self.state, self.at, self._enough(enough)
            )

    def _harvest(self) -> dict[int, Completion]:
        """Waits for the device, frees the slots of finished sequences, and returns their
        completions.
        """
        grown = self.state.completions
        live, step, at = to_host((grown.live, grown.step, self.at))
        self.at = np.int32(at)
        over = (self.owner >= 0).reshape(-1) & ~live
        if not over.any():
            return {}
        tokens, logprobs = to_host((grown.tokens, grown.logprobs))
        rows = [(row, step[row]) for row in np.flatnonzero(over)]
        numbers = self.owner.reshape(-1)[over].tolist()
        self.owner[over.reshape(self.owner.shape)] = -1
        return {
            number: Completion(tokens[row, :length].tolist(), logprobs[row, :length].tolist())
            for number, (row, length) in zip(numbers, rows, strict=True)
        }

    def _shrinking(self) -> str:
        """The key under which `shapes` keeps this batch's compactions, as (slots, fewer slots)."""
        return f"compact {len(self.owner)} {self.plan.width} {self.config!r}"

    def _fewer(self) -> list[int]:
        """Lists the slots of a group that a compaction may leave."""
        now = self.owner.shape[1]
        if self.shapes.frozen:
            return [
                after for before, after in self.shapes.opened(self._shrinking()) if before == now
            ]
        return fewer_rows(now)

    def _compact(self, fewer: list[int]) -> None:
        """Moves live sequences into fewer slots where those of every group fit."""
        taken, now = (self.owner >= 0).sum(1).max(), self.owner.shape[1]
        rows = min((rows for rows in fewer if rows >= taken), default=now)
        if not taken or rows == now:
            return
        self.shapes.open(self._shrinking(), (now, rows))
        order = np.argsort(self.owner < 0, axis=1, kind="stable")[:, :rows]
        self.owner = np.take_along_axis(self.owner, order, axis=1)
        self.state = _take(
            self.state, self.place((order + now * np.arange(len(order))[:, None]).reshape(-1))
        )
