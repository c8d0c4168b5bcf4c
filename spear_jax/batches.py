"""Which prompts generation takes together: their number, their padded sizes, and who stands with whom.

Prompts go through a model in batches of G groups of equally many rows: a group for each device, or for each client where
every client answers with its own adapter. A batch's prompts are read part by part, so that what one pass holds does not grow
with the batch.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from spear_jax import packs
from spear_jax.drawing import SamplingConfig
from spear_jax.rooms import Room, Shapes

Part = list[list[int]]  # prompt numbers of each group


@dataclasses.dataclass(frozen=True)
class Plan:
    """The padded sizes of batches.

    Attributes:
        rows: B of each group.
        part: r, rows of each group whose prompts are read together; divides B.
        width: P.
        room: of a part's pack.
    """

    rows: int
    part: int
    width: int
    room: Room

    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.part, self.width, self.room.tokens, *itertools.chain(*self.room.grids))

    def cells(self, new: int) -> int:
        """Places of a batch's cache, tokens it reads and places of their grids, of each group; new: tokens to generate."""
        read = self.room.tokens + sum(rows * width for rows, width in self.room.grids)
        return self.rows * (self.width + new) + self.rows // self.part * read

    def of_shape(self, shape: tuple[int, ...]) -> "Plan":
        """The plan of another shape."""
        grids = tuple(zip(shape[4::2], shape[5::2], strict=True))
        return Plan(*shape[:3], dataclasses.replace(self.room, tokens=shape[3], grids=grids))


def length_bucket(length: int, step: int = 16) -> int:
    """The padded length for `length` tokens: multiples of `step`, coarser as they grow, at most a third of it padding."""
    size = step
    while size < length:
        size += max(step, step * (size // (4 * step)))
    return size


def row_bucket(rows: int, before: int) -> int:
    """The padded row count for `rows` of `before`: that divided by 1, 4, 16, ... while at least 4 remain."""
    size = before
    while size // 4 >= max(rows, 4):
        size //= 4
    return size


def plan_batches(
    config: SamplingConfig, groups: Sequence[Sequence[int]], prompts: Sequence[list[int]], devices: int, shapes: Shapes
) -> tuple[Plan, list[list[Part]]]:
    """The sizes for these prompts, and the parts of each batch.

    Args:
        groups: numbers of the prompts of each of G groups.
        devices: how many the groups are split over.
    """
    wanted = _smallest(config, groups, prompts, devices)
    dealt: dict[tuple[int, ...], list[list[Part]] | None] = {}

    def cost(shape: tuple[int, ...]) -> float:
        plan = wanted.of_shape(shape)
        dealt[shape] = _deal(plan, groups, prompts) if plan.width >= wanted.width else None
        return float("inf") if dealt[shape] is None else len(dealt[shape]) * plan.cells(config.max_new_tokens)

    shape = shapes.fit(f"{len(groups)} {config!r}", wanted.shape(), cost)
    plan = wanted.of_shape(shape)
    return plan, dealt.get(shape) or _deal(plan, groups, prompts)


def _smallest(config, groups, prompts, devices) -> Plan:
    """As few equal batches as rows and tokens allow, each read in as few equal parts as its tokens allow."""
    lengths = [len(prompts[i]) for group in groups for i in group]
    width, largest = length_bucket(max(lengths)), max(map(len, groups))
    held = config.max_tokens // (width + config.max_new_tokens) * devices
    most = max(1, min(config.max_rows, held) // len(groups))
    batches = -(-largest // most)
    finest = max(1, most // 8)
    rows = min(most, -(-largest // batches // finest) * finest)
    passes = min(rows, -(-sum(lengths) // (config.read_tokens * batches * devices)))
    part = -(-rows // passes)
    while part * -(-rows // part) > most:
        part -= 1
    passes = -(-rows // part)
    shares = [own for group in groups for own in _shares(group, prompts, batches * passes, part)]
    room = packs.prompt_room([[prompts[i] for i in own] for own in shares], width, batches * passes)
    return Plan(part * passes, part, width, room)


def _deal(plan: Plan, groups, prompts) -> list[list[Part]] | None:
    """The parts of each batch, in as few batches as the plan allows; None where not even single prompts fit."""
    each, largest = plan.rows // plan.part, max(map(len, groups))
    batches = -(-largest // plan.rows)
    while True:
        shares = [_shares(group, prompts, batches * each, plan.part) for group in groups]
        parts = [list(part) for part in zip(*shares, strict=True)]
        if all(packs.holds_prompts(plan.room, [[prompts[i] for i in own] for own in part]) for part in parts):
            found = [parts[begin : begin + each] for begin in range(0, len(parts), each)]
            return [[part for part in batch if any(part)] for batch in found]
        if batches * each >= largest:
            return None
        batches = min(batches + 1 + batches // 4, -(-largest // each))


def _shares(group: Sequence[int], prompts, count: int, most: int) -> list[list[int]]:
    """A group's prompts dealt to `count` parts of at most `most` rows and about equally many tokens; equal prompts, which
    are read once, stay together."""
    order = sorted(group, key=lambda i: (-len(prompts[i]), prompts[i]))
    parts: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for prompt, same in itertools.groupby(order, key=lambda i: prompts[i]):
        rows = list(same)
        while rows:
            free = (p for p in range(count) if len(parts[p]) < most)
            least = min(free, key=lambda p: (tokens[p], len(parts[p])))
            space = most - len(parts[least])
            parts[least] += rows[:space]
            tokens[least] += len(prompt)
            rows = rows[space:]
    return parts
