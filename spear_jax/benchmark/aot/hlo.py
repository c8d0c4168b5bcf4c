"""Reads an optimised HLO module as text: its buffers, kernels, bytes and collectives.

How often an instruction runs follows from the loops around it. A loop of known length counts with
that length. A loop whose length is data, as that over tokens to decode, counts once: what it holds
is told apart, as a number for one pass.

An instruction's bytes are its operands' and its results', each once. Of an array that is only
sliced or gathered from, the part counts; of one that is written in place, the part that is written.
What lies in a TPU's vector memory does not count. Caches that the chip has are not known here, and
neither is what a kernel reads twice.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8,
    "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64,
    "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(BITS) + r")\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":\s*"(\d+)"')
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# what no kernel runs for
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call",
    "after-all", "opt-barrier", "partition-id", "replica-id", "domain", "add-dependency",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of a program.

    Attributes:
        dtype: HLO's name, "f32"; dims: its sizes.
        on_chip: whether it lies in a TPU's vector memory.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * BITS[self.dtype] // 8

    @property
    def moved(self) -> int:
        """Returns the bytes that go between the chip and its memory."""
        return 0 if self.on_chip else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        results: the arrays that it makes.
        operation: "fusion", "while", ...
        operands: names; of a parameter its number, of a constant its text.
        rest: the attributes behind them.
    """

    name: str
    results: tuple[Buffer, ...]
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(result.moved for result in self.results)


@dataclasses.dataclass(frozen=True)
class Count:
    """A number of one call: `once`, and `loop` for each pass of the loops of unknown length."""

    once: float = 0.0
    loop: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.once + other.once, self.loop + other.loop)

    def total(self, passes: float) -> float:
        """Returns the number of a call whose loops of unknown length take so many passes."""
        return self.once + passes * self.loop


class Module:
    """A parsed `compiled.as_text()`.

    Attributes:
        computations: {name: its instructions}.
        runs: {computation that runs by itself, not inside a kernel: how often}.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry, current = "", ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = head[2]
                self.computations[current] = []
                entry = current if head[1] else entry
            elif current and (found := _LINE.match(line)):
                self.computations[current].append(_instruction(*found.groups(), "ROOT " in line))
        self.runs: dict[str, Count] = collections.defaultdict(Count)
        self._walk(entry, Count(once=1))

    def _walk(self, name: str, runs: Count) -> None:
        self.runs[name] += runs
        for one in self.computations.get(name, ()):
            if one.operation == "while":
                body = re.search(r"body=%?([\w.\-]+)", one.rest)
                times = self._trips(one)
                if body and times:
                    self._walk(body[1], Count(runs.once * times, runs.loop * times))
                elif body:
                    self._walk(body[1], Count(0, runs.once + runs.loop))
            elif one.operation == "conditional":
                # one branch runs; the largest stands for all
                names = re.findall(
                    r"[\w.\-]+", ",".join(map(",".join, _BRANCHES.findall(one.rest)))
                )
                if names:
                    self._walk(max(names, key=lambda n: len(self.computations.get(n, ()))), runs)
            elif one.operation == "call" and (called := _CALLED.search(one.rest)):
                self._walk(called[1], runs)

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop's body runs; 0 where it is data.

        CUDA's compiler writes it down. A TPU's leaves it to the condition, index < constant, of an
        index that JAX counts from 0.
        """
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        own = self.computations.get(condition[1], []) if condition else []
        by_name = {one.name: one for one in own}
        for one in own:
            if one.root and one.operation == "compare" and "direction=LT" in one.rest:
                most = by_name.get(one.operands[1])
                if most is not None and most.operation == "constant":
                    return int(most.operands[0])
        return 0

    def running(self) -> Iterator[tuple[Instruction, Count, dict[str, Instruction]]]:
        """Yields every instruction that a kernel runs for, how often, and its computation by
        name.
        """
        for name, runs in list(self.runs.items()):
            own = self.computations.get(name, [])
            by_name = {one.name: one for one in own}
            for one in own:
                if one.operation not in _FREE and not one.operation.endswith("-done"):
                    yield one, runs, by_name

    @functools.cached_property
    def kernels(self) -> Count:
        """The kernels (on a TPU: operations) that a call starts."""
        return sum((runs for _, runs, _ in self.running()), Count())

    @functools.cached_property
    def bytes(self) -> Count:
        """The bytes that a call moves between one device and its memory."""
        total = Count()
        for one, runs, by_name in self.running():
            size = self._moved(one, by_name)
            total += Count(runs.once * size, runs.loop * size)
        return total

    def _moved(self, one: Instruction, by_name: dict[str, Instruction]) -> int:
        operands = [by_name[name] for name in one.operands if name in by_name]
        if one.operation == "copy-start":  # (destination, source, context)
            return sum(buffer.moved for buffer in one.results[:2])
        if (
            one.operation.endswith("-start")
            and one.operation.removesuffix("-start") not in COLLECTIVES
        ):
            made = one.results[len(operands) : len(operands) + 1]  # ((sources), destination, ...)
            return sum(buffer.bytes + buffer.moved for buffer in made)
        if one.operation in _SLICES:
            return one.bytes + sum(buffer.bytes for buffer in one.results)
        if one.operation in ("dynamic-update-slice", "scatter") and len(operands) > 1:
            return 2 * operands[1 if one.operation == "dynamic-update-slice" else -1].bytes
        if one.operation == "fusion" and (called := _CALLED.search(one.rest)):
            return self._fused(self.computations.get(called[1], []), operands)
        return one.bytes + sum(operand.bytes for operand in operands)

    def _fused(self, inside: list[Instruction], operands: list[Instruction]) -> int:
        """Returns the bytes of a fusion: of a parameter that is only sliced the slices, and of
        results that are written in place the part.
        """
        by_name = {one.name: one for one in inside}
        users = collections.defaultdict(list)
        for one in inside:
            for place, name in enumerate(one.operands):
                users[name].append((one, place))

        def read(name: str, whole: int) -> int:
            total = 0
            for user, place in users[name]:
                if user.operation == "bitcast":
                    total += read(user.name, whole)
                elif user.operation in _SLICES and place == 0:
                    total += sum(buffer.bytes for buffer in user.results)
                elif not (user.operation in ("dynamic-update-slice", "scatter") and place == 0):
                    return whole
            return min(whole, total)

        def written(one: Instruction) -> int:
            if one.operation == "tuple":
                return sum(written(by_name[name]) for name in one.operands if name in by_name)
            if one.operation == "bitcast" and one.operands and one.operands[0] in by_name:
                return written(by_name[one.operands[0]])
            if one.operation in ("dynamic-update-slice", "scatter") and len(one.operands) > 1:
                part = by_name[one.operands[1 if one.operation != "scatter" else -1]]
                return sum(buffer.bytes for buffer in part.results)
            return one.bytes

        total = sum(written(one) for one in inside if one.root)
        for one in inside:
            if one.operation == "parameter" and (number := re.match(r"\d+", one.operands[0])):
                index = int(number[0])
                if index < len(operands):
                    total += read(one.name, operands[index].bytes)
        return total

    def buffers(self) -> Iterator[tuple[Buffer, Instruction]]:
        """Yields the arrays that programs write to memory, with the instructions that do."""
        for one, _, _ in self.running():
            for buffer in one.results:
                yield buffer, one

    def collectives(self) -> dict[str, dict[str, float]]:
        """Returns {operation: {"calls", "bytes"}, each {"once", "loop"}} of results.

        Bytes are those of the largest result where an operation returns its operand, too.
        """
        found: dict[str, list[Count]] = {}
        for one, runs, _ in self.running():
            base = one.operation.removesuffix("-start")
            if base in COLLECTIVES:
                sizes = [buffer.bytes for buffer in one.results]
                size = max(sizes) if one.operation != base else sum(sizes)
                calls, moved = found.get(base, [Count(), Count()])
                found[base] = [calls + runs, moved + Count(runs.once * size, runs.loop * size)]
        return {
            name: {"calls": dataclasses.asdict(calls), "bytes": dataclasses.asdict(moved)}
            for name, (calls, moved) in found.items()
        }


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """Parses what stands behind "name = "."""
    kind, text = _split(text, " ")
    operation, _, text = text.partition("(")
    inside, rest = _split("(" + text, ",")
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if operation in ("parameter", "constant"):
        operands = (inside[1:-1],)
    return Instruction(name, shapes(kind), operation, operands, rest, root)


def _split(text: str, at: str) -> tuple[str, str]:
    """Splits at the first such character outside brackets."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == at and depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def shapes(text: str) -> tuple[Buffer, ...]:
    """Returns the arrays of a type: "(f32[2,3]{1,0}, s32[])" are a matrix and a scalar."""
    return tuple(
        Buffer(dtype, tuple(map(int, dims.split(","))) if dims else (), "S(1)" in layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )
