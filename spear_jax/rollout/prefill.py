"""Which prompts generation reads together: their number, their padded sizes, and who stands with whom.

Completions grow in slots, G groups of equally many: a group for each device, or for each client where every client answers with
its own adapter. Prompts are read part by part into slots that are free, so that what one pass holds does not grow with the slots.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

from spear_jax.packing.prefix_tree import holds_prompts, prompt_room
from spear_jax.packing.shape_buckets import Room, Shapes, size_bucket
from spear_jax.rollout.token_sampling import SamplingConfig

Part = list[list[int]]  # prompt numbers of each group
PASSES = 3  # the fewest that fill all slots where prompts wait for them: a part waits until so many are free


@dataclasses.dataclass(frozen=True)
class Plan:
    """The padded sizes of generation.

    Attributes:
        rows: slots of each group.
        part: r, slots of each group whose prompts are read together.
        width: P.
        room: of a part's pack.
    """

    rows: int
    part: int
    width: int
    room: Room

    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.part, self.width, self.room.tokens, *itertools.chain(*self.room.columns))

    def cells(self, parts: int, new: int) -> int:
        """Of each group: cache places that this many parts take, tokens read and queries of their grids. Args: new: tokens to
        generate."""
        read = self.room.tokens + sum(rows * width for rows, width in self.room.columns)
        return max(self.rows, parts * self.part) * (self.width + new) + parts * read

    def of_shape(self, shape: tuple[int, ...]) -> "Plan":
        """The plan of another shape."""
        columns = tuple(zip(shape[4::2], shape[5::2], strict=True))
        return Plan(*shape[:3], dataclasses.replace(self.room, tokens=shape[3], columns=columns))


def length_bucket(length: int, step: int = 16) -> int:
    """The padded length for `length` tokens: multiples of `step`, coarser as they grow, at most a third of it padding."""
    size = step
    while size < length:
        size += max(step, step * (size // (4 * step)))
    return size


def fewer_rows(rows: int) -> list[int]:
    """The row counts to which slots may shrink: theirs divided by 4, 16, ... while at least 4 remain."""
    return [] if rows // 4 < 4 else [rows // 4, *fewer_rows(rows // 4)]


def plan_batches(
    config: SamplingConfig,
    groups: Sequence[Sequence[int]],
    prompts: Sequence[list[int]],
    devices: int,
    shapes: Shapes,
    opening: int = 0,
) -> tuple[Plan, list[Part]]:
    """The sizes for these prompts, and the parts in which they are read.

    Args:
        groups: numbers of the prompts of each of G groups.
        devices: how many the groups are split over.
        opening: h tokens that all prompts begin with, and that are read once for all.
    """
    prompts = [prompt[opening:] for prompt in prompts]
    # tight while sizes are being opened anyhow; a prompt that exceeds them all later opens a size with room to spare
    longest = max(map(len, prompts)) + opening
    width = length_bucket(longest) if shapes.frozen else size_bucket(longest)
    wanted = _smallest(config, groups, prompts, devices, opening, width)
    dealt: dict[tuple[int, ...], list[Part] | None] = {}

    def cost(shape: tuple[int, ...]) -> float:
        plan = wanted.of_shape(shape)
        dealt[shape] = _deal(plan, groups, prompts) if plan.width >= longest else None
        return float("inf") if dealt[shape] is None else plan.cells(len(dealt[shape]), config.max_new_tokens)

    shape = shapes.fit(f"read {len(groups)} {opening} {config!r}", wanted.shape(), cost)
    plan = wanted.of_shape(shape)
    return plan, dealt.get(shape) or _deal(plan, groups, prompts)


def _smallest(config, groups, prompts, devices, opening, width) -> Plan:
    """As many slots as rows and tokens allow, but no more than it takes to fill them equally often, and parts as large as a
    pass allows. Args: prompts: without their opening."""
    lengths = [len(prompts[i]) for group in groups for i in group]
    largest = max(map(len, groups))
    held = config.max_tokens // (width + config.max_new_tokens) * devices
    most = max(1, min(config.max_rows, held) // len(groups))
    times = -(-largest // most)
    finest = max(1, most // 8)
    rows = min(most, -(-largest // times // finest) * finest)
    passes = -(-sum(lengths) // (config.read_tokens * times * devices))
    if times > 1:  # equal parts that fill all slots, where there are such: completions of one length end together
        least = max(passes, PASSES)
        passes = next((n for n in range(least, 2 * least) if rows % n == 0), min(rows, least))
    part = -(-rows // passes) if times == 1 else rows // passes
    count = -(-largest // part)
    shares = [own for group in groups for own in _shares(group, prompts, count, part)]
    room = prompt_room([[prompts[i] for i in own] for own in shares], width - opening, count)
    return Plan(rows, part, width, room)


def _deal(plan: Plan, groups, prompts) -> list[Part] | None:
    """As few parts as the plan allows; None where not even single prompts fit."""
    largest = max(map(len, groups))
    count = -(-largest // plan.part)
    while True:
        shares = [_shares(group, prompts, count, plan.part) for group in groups]
        parts = [list(part) for part in zip(*shares, strict=True)]
        if all(holds_prompts(plan.room, [[prompts[i] for i in own] for own in part]) for part in parts):
            return [part for part in parts if any(part)]
        if count >= largest:
            return None
        count = min(count + 1 + count // 4, largest)


def _shares(group: Sequence[int], prompts, count: int, most: int) -> list[list[int]]:
    """A group's prompts dealt to `count` parts of at most `most` rows and about equally many tokens; equal prompts, which
    are read once, stay together."""
    order = sorted(group, key=lambda i: (-len(prompts[i]), prompts[i]))
    parts: list[list[int]] = [[] for _ in range(count)]
    least = [(0, 0, part) for part in range(count)]  # a heap of (tokens, rows, part) that have room
    for prompt, same in itertools.groupby(order, key=lambda i: prompts[i]):
        rows = list(same)
        while rows:
            tokens, taken, part = heapq.heappop(least)
            space = most - taken
            parts[part] += rows[:space]
            if len(rows) < space:
                heapq.heappush(least, (tokens + len(prompt), taken + len(rows), part))
            rows = rows[space:]
    return parts
