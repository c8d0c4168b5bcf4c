"""Plans prefill: how many slots there are, and which prompts are prefilled together.

Completions grow in slots, G groups of equally many: a group for each device, or for each client
where every client generates with its own adapter. Prompts are prefilled in batches into free slots,
so that the memory of one forward pass does not grow with the slots. G = 2 groups of 4 slots, 2 of
each group at a time:

    batches = [[[0, 1], [4, 5]], [[2, 3], [6]]]     # prompts 0, 1 (group 0) and 4, 5 (group 1) first
"""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

from spear_jax.packing.prefix_tree import holds_prompts, prompt_shape
from spear_jax.packing.shape_buckets import BlockShape, ShapeBuckets, size_bucket
from spear_jax.rollout.token_sampling import SamplingConfig

PrefillBatch = list[list[int]]  # prompt numbers of each group
# The fewest batches that fill all slots, where more prompts wait than slots: a batch waits until
# its slots are free, and a larger one would wait longer.
PASSES = 3


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """The padded sizes of generation.

    Attributes:
        rows: slots of each group.
        batch: r, prompts of each group that are prefilled together.
        width: P, the padded length of a prompt.
        pack_shape: the padded sizes of a batch's packed prompts.
    """

    rows: int
    batch: int
    width: int
    pack_shape: BlockShape

    def shape(self) -> tuple[int, ...]:
        """Returns the sizes as numbers, as `ShapeBuckets` keeps them."""
        return (
            self.rows,
            self.batch,
            self.width,
            self.pack_shape.tokens,
            *itertools.chain(*self.pack_shape.tiles),
        )

    def cells(self, batches: int, new: int) -> int:
        """Estimates a group's cost: columns of the cache, and tokens and queries of the prefills.

        Args: batches: prefills; new: T, tokens to generate.
        """
        read = self.pack_shape.tokens + sum(rows * width for rows, width in self.pack_shape.tiles)
        return max(self.rows, batches * self.batch) * (self.width + new) + batches * read

    def of_shape(self, shape: tuple[int, ...]) -> "PrefillPlan":
        """Makes the plan of other sizes, as from `shape`."""
        tiles = tuple(zip(shape[4::2], shape[5::2], strict=True))
        return PrefillPlan(
            *shape[:3], dataclasses.replace(self.pack_shape, tokens=shape[3], tiles=tiles)
        )


def length_bucket(length: int, step: int = 16) -> int:
    """Rounds a length up to a bucket: multiples of `step`, coarser as they grow, at most a third of
    it padding. 1 to 16 -> 16, 17 -> 32, 65 -> 80, 129 -> 160 with the usual step.
    """
    size = step
    while size < length:
        size += max(step, step * (size // (4 * step)))
    return size


def fewer_rows(rows: int) -> list[int]:
    """Lists the slots that a compaction may leave: a quarter and a sixteenth, at least 4.

    64 -> [16, 4], 40 -> [10]. Each is a program more.
    """
    return [fewer for fewer in (rows // 4, rows // 16) if fewer >= 4]


def most_rows(config: SamplingConfig, width: int, devices: int) -> int:
    """Returns how many slots the limits allow on all devices. Args: width: P."""
    held = config.max_tokens // (width + config.max_new_tokens) * devices
    return max(1, min(config.max_rows, held))


def plan_prefill(
    config: SamplingConfig,
    groups: Sequence[Sequence[int]],
    prompts: Sequence[list[int]],
    devices: int,
    shapes: ShapeBuckets,
    shared_prefix: int = 0,
) -> tuple[PrefillPlan, list[PrefillBatch]]:
    """Plans the sizes for these prompts, and the batches in which they are prefilled.

    Args:
        groups: numbers of the prompts of each of G groups.
        devices: how many the groups are split over.
        shapes: the shape buckets; an open shape is taken where one fits.
        shared_prefix: h, the tokens that all prompts begin with, and that are prefilled once.
    """
    prompts = [prompt[shared_prefix:] for prompt in prompts]
    # Tight while shapes are being opened. A longer prompt that comes later opens a coarser one, so
    # that few programs compile.
    longest = max(map(len, prompts)) + shared_prefix
    width = length_bucket(longest) if shapes.frozen else size_bucket(longest)
    wanted = _smallest(config, groups, prompts, devices, shared_prefix, width)
    dealt: dict[tuple[int, ...], list[PrefillBatch] | None] = {}

    def cost(shape: tuple[int, ...]) -> float:
        plan = wanted.of_shape(shape)
        dealt[shape] = _deal(plan, groups, prompts) if plan.width >= longest else None
        return (
            float("inf")
            if dealt[shape] is None
            else plan.cells(len(dealt[shape]), config.max_new_tokens)
        )

    shape = shapes.fit(f"read {len(groups)} {shared_prefix} {config!r}", wanted.shape(), cost)
    plan = wanted.of_shape(shape)
    return plan, dealt.get(shape) or _deal(plan, groups, prompts)


def _smallest(config, groups, prompts, devices, shared_prefix, width) -> PrefillPlan:
    """Plans as many slots as the limits allow, but no more than it takes to fill them equally
    often, and prefill batches as large as a pass allows.

    Args: prompts: without the shared prefix; width: P.
    """
    lengths = [len(prompts[i]) for group in groups for i in group]
    largest = max(map(len, groups))
    most = max(1, most_rows(config, width, devices) // len(groups))
    times = -(-largest // most)
    rows = min(most, size_bucket(-(-largest // times), max(1, min(most, 64) // 8)))
    passes = -(-sum(lengths) // (config.read_tokens * times * devices))
    if times > 1:
        # equal batches that fill all slots, where there are: completions of one length end together
        least = max(passes, PASSES)
        passes = next((n for n in range(least, 2 * least) if rows % n == 0), min(rows, least))
    batch = -(-rows // passes) if times == 1 else rows // passes
    count = -(-largest // batch)
    shares = [own for group in groups for own in _shares(group, prompts, count, batch)]
    pack_shape = prompt_shape(
        [[prompts[i] for i in own] for own in shares], width - shared_prefix, count
    )
    return PrefillPlan(rows, batch, width, pack_shape)


def _deal(plan: PrefillPlan, groups, prompts) -> list[PrefillBatch] | None:
    """Deals prompts to as few batches as the plan allows; None where not even single ones fit."""
    largest = max(map(len, groups))
    count = -(-largest // plan.batch)
    while True:
        shares = [_shares(group, prompts, count, plan.batch) for group in groups]
        batches = [list(batch) for batch in zip(*shares, strict=True)]
        if all(
            holds_prompts(plan.pack_shape, [[prompts[i] for i in own] for own in batch])
            for batch in batches
        ):
            return [batch for batch in batches if any(batch)]
        if count >= largest:
            return None
        count = min(count + 1 + count // 4, largest)


def _shares(group: Sequence[int], prompts, count: int, most: int) -> list[list[int]]:
    """Deals a group's prompts to `count` batches of at most `most` prompts and about equally many
    tokens; equal prompts, which are prefilled once, stay together.
    """
    order = sorted(group, key=lambda i: (-len(prompts[i]), prompts[i]))
    batches: list[list[int]] = [[] for _ in range(count)]
    # a heap of (tokens, prompts, batch) of the batches that are not full
    least = [(0, 0, batch) for batch in range(count)]
    for prompt, same in itertools.groupby(order, key=lambda i: prompts[i]):
        rows = list(same)
        while rows:
            tokens, taken, batch = heapq.heappop(least)
            space = most - taken
            batches[batch] += rows[:space]
            if len(rows) < space:
                heapq.heappush(least, (tokens + len(prompt), taken + len(rows), batch))
            rows = rows[space:]
    return batches
