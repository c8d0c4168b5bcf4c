"""Generation with a KV cache: prompts of all clients together, each row with its own key, its slot
taken over when it ends.

Prompts are read as flat packs, equal ones once, and so is what all of them open with; `batches`
says which together. Decoding (`decoding`) runs until enough slots are free for the next prompts.
When none wait any longer, the rows that still generate are compacted into fewer slots. A row's
tokens depend on its prompt and its key, never on its neighbours.

Rows stand in equal groups: one for each device, or where every client answers with its own adapter
one for each client.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core.malloc import release_free_memory
from spear_jax.core.mesh import to_host
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.packing.prefix_tree import one_sequence, pack_prompts
from spear_jax.packing.shape_buckets import ShapeBuckets
from spear_jax.rollout import decode
from spear_jax.rollout.prefill import PrefillBatch, PrefillPlan, fewer_rows, plan_prefill
from spear_jax.rollout.token_sampling import SamplingConfig


@dataclasses.dataclass
class Completion:
    """Sampled ids (EOS included when generated) and their untempered log-probabilities in nats."""

    tokens: list[int]
    logprobs: list[float]


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
    state = {**state, "keys": jax.random.wrap_key_data(state["keys"])}
    state, at = decode.decode_until(decoder, config, lora, base, state, at, enough)
    return {**state, "keys": jax.random.key_data(state["keys"])}, at


@jax.jit
def _take(state, rows):
    """The given rows of a decoding state."""
    return jax.tree.map(lambda x: x[rows], state)


class Sampler:
    """Runs generation on the host's side: packs, slots, compaction.

    Args:
        decoder: the model's static settings.
        place: puts an array with a leading axis that `devices` divides on the devices (identity on
            one device).
        spread: puts a whole array on each device.
        shapes: the open shapes, which a resumed run must have again: padding decides the last bits
            of a logit.
        openings: what prompts may open with. Prompts that all do have the longest such opening read
            once.
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
            lora: None where an adapter is merged into `base`; else an adapter ([L, in, R]), or
                several ([L, C, in, R]), which may wait on the host: as many are on the devices as
                `max_rows` rows need.
            prompts: token ids, each non-empty.
            keys: uint32[N, 2] key data, one key a prompt.
            finished: called with a prompt's number and its completion, while the device goes on
                with others.
            owners: int32[N], each prompt's adapter where `lora` holds several.
        Returns: one Completion a prompt, in their order.
        """
        done: dict[int, Completion] = {}
        bases = (
            base,
            unstack(base),
        )  # prompts are read by a scan over layers, where they are stacked
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
        """What these prompts all open with, of `shared_prefixes`; none of them is nothing but
        that.
        """
        begins = lambda shared_prefix: all(
            len(p) > len(shared_prefix) and p[: len(shared_prefix)] == shared_prefix
            for p in prompts
        )
        return next(filter(begins, self.shared_prefixes), [])

    def prefill_shared_prefix(self, lora: dict | None, base: dict, tokens: list[int]):
        """`prefill_shared_prefix` of these tokens; None where there are none."""
        if not tokens:
            return None
        return _prefill_shared_prefix(
            self.decoder, lora, base, jax.tree.map(self.spread, one_sequence(tokens))
        )

    def _groups(
        self, prompts, max_rows, lora, owners
    ) -> Iterator[tuple[dict | None, list[list[int]]]]:
        """(adapters, groups of prompt numbers)."""
        if owners is None:
            order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
            yield lora, [order[device :: self.devices] for device in range(self.devices)]
            return
        clients = jax.tree.leaves(lora)[0].shape[1]
        own = [
            [i for i, owner in enumerate(owners) if owner == client] for client in range(clients)
        ]
        together = min(
            clients, max(1, max_rows // max(map(len, own)))
        )  # no more adapters than rows can use
        for first in range(0, clients, together):
            # the last clients fill up with clients that are there already, so that one shape serves
            chosen = np.arange(first, first + together) % clients
            adapters = (
                lora if together == clients else jax.tree.map(lambda x, c=chosen: x[:, c], lora)
            )
            groups = [own[c] if first + slot < clients else [] for slot, c in enumerate(chosen)]
            yield jax.tree.map(self.spread, adapters), groups


class ContinuousBatch:
    """A decoding state and what stands in it.

    Attributes:
        owner: int[G, slots], the number of the prompt that a slot completes, or -1.
        at: the ring's next column.
        state: as from `decoding.init_decode_state`; None until the first prompts are read.
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
        self.dtype = bases[0]["embed"].dtype
        self.owner, self.at, self.state = np.full((groups, plan.rows), -1), np.int32(0), None
        self.length, self.shared_prefix = (
            len(shared_prefix),
            sampler.prefill_shared_prefix(lora, bases[0], shared_prefix),
        )

    def run(
        self, batches: list[PrefillBatch], prompts: list[list[int]], keys: np.ndarray
    ) -> Iterator[dict[int, Completion]]:
        """Completes all prompts; yields those that have finished, while the device goes on."""
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
        """Reads a part's prompts into free slots."""
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
            self.state = self._begin(inputs)
        self.state = _prefill(*self._of(0), self.state, self.shared_prefix, *inputs, self.at)

    def _begin(self, inputs: tuple):
        """A state of free slots. What reads and what decodes is compiled before it is there:
        compiling takes memory, too, and many keys and values would lie there meanwhile. What that
        leaves, and what an earlier state was, is given back.
        """
        free = self.place(np.zeros(self.owner.size, bool))
        blank = functools.partial(
            decode.init_decode_state, self.decoder, self.config, self.plan.width, free, self.dtype
        )
        like = lambda sharding, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        shapes = jax.eval_shape(blank)
        begun = jax.tree.map(functools.partial(like, free.sharding), shapes)
        read = _prefill.lower(*self._of(0), begun, self.shared_prefix, *inputs, self.at).compile()
        if self.config.max_new_tokens > 1:
            after = jax.tree.map(like, read.output_shardings, shapes)
            _decode_until.lower(*self._of(1), after, self.at, self._enough(0)).compile()
        release_free_memory()
        return blank()

    def _of(self, base: int) -> tuple:
        """The arguments that reading (0) and decoding (1) begin with."""
        return self.decoder, self.config, self.lora, self.bases[base]

    def _enough(self, rows: int | list[int]) -> np.ndarray:
        return np.broadcast_to(np.asarray(rows, np.int32), len(self.owner))

    def _decode_until(self, enough: int | list[int]) -> None:
        """Decodes until no group has more than `enough` rows that go on; returns before that is
        done.
        """
        if self.config.max_new_tokens > 1:
            self.state, self.at = _decode_until(
                *self._of(1), self.state, self.at, self._enough(enough)
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
            return [
                after for before, after in self.shapes.opened(self._shrinking()) if before == now
            ]
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
        self.state = _take(
            self.state, self.place((order + now * np.arange(len(order))[:, None]).reshape(-1))
        )
