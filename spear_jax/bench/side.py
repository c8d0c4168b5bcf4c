"""One side of a benchmark in a process of its own: runs a phase when asked, and tells its seconds and its memory."""

import collections
import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

from spear_jax.bench import machine
from spear_jax.bench.workload import Workload


@dataclasses.dataclass
class Side:
    """What `ours.build` and `rival.build` return.

    Attributes:
        phases: by name; a call runs the phase, waits until all of it is done, and returns what there is to tell.
        device_peak: the device's high-water mark in bytes, which nothing resets; None where memory is the process's own.
        compiled: what was compiled since it was last asked; empty on a side that does not compile.
    """

    phases: dict[str, Callable[..., dict[str, Any]]]
    device_peak: Callable[[], int] | None
    compiled: Callable[[], dict[str, float]] = dict


def serve(name: str, work: Workload) -> Callable[[tuple], dict[str, Any]]:
    """Builds a side; returns what answers (phase, *arguments).

    An answer holds what the phase tells, seconds, and what was compiled. The first two answers to a question also hold
    resting_bytes and peak_bytes, resident before the phase and at most during it (on a GPU 0, and the device's mark since the
    process began). Before these two the allocator gives back what it kept; not before later ones, which would have to fetch it
    again.

    All but the first answer run the phase again until `preset.settle` seconds have passed, and time the last run: a virtual
    machine takes memory that nobody touches while the other side has its turn, and fetching it back is not the phase's work.

    Args: name: "ours" or "rival".
    """
    side = importlib.import_module(f"spear_jax.bench.{name}").build(work)
    asked: collections.Counter[tuple] = collections.Counter()

    def answer(question: tuple) -> dict[str, Any]:
        phase, *arguments = question
        asked[question] += 1
        fresh = asked[question] <= 2
        resting = machine.reset_peak() if fresh else 0
        side.compiled()  # building the side compiles, too
        turn = time.perf_counter()
        while True:
            began = time.perf_counter()
            told = side.phases[phase](*arguments)
            ended = time.perf_counter()
            if asked[question] == 1 or ended - turn >= work.preset.settle:
                break
        told |= {"seconds": ended - began, **side.compiled()}
        if not fresh:
            return told
        if side.device_peak is not None:
            return told | {"resting_bytes": 0, "peak_bytes": side.device_peak()}
        return told | {"resting_bytes": resting, "peak_bytes": machine.peak_bytes()}

    return answer
