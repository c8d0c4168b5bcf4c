"""One side of a benchmark, in a process of its own.

It runs a phase on request, and answers with its seconds and its memory.
"""

import collections
import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from spear_jax.benchmark import machine
from spear_jax.benchmark.workload import Workload


@dataclasses.dataclass
class Side:
    """One side as built by `ours.build` or `rival.build`.

    Attributes:
        phases: by name; a call runs the phase, waits until all of it is done, and returns its
            measurements.
        device_peak: the device's high-water mark in bytes, which nothing resets; None where memory
            is the process's own.
        compiled: the metrics of compilation since the last call; empty on a side that does not
            compile.
    """

    phases: dict[str, Callable[..., dict[str, Any]]]
    device_peak: Callable[[], int] | None
    compiled: Callable[[], dict[str, float]] = dict


def serve(name: str, work: Workload) -> Callable[[tuple], dict[str, Any]]:
    """Builds a side; returns a function that answers (phase, *arguments).

    An answer holds the phase's measurements, seconds, and the metrics of compilation. The first two
    answers to a question also hold resting_bytes and peak_bytes, resident before the phase and at
    most during it (on a GPU 0, and the device's mark since the process began). Before these two the
    allocator gives back what it kept. It does not before later ones, which would have to fetch it
    again.

    All but the first answer let the phase settle. A virtual machine takes memory that nobody
    touches while the other side has its turn, and fetching it back is not the phase's work.

    Args: name: "ours" or "rival".
    """
    side = importlib.import_module(f"spear_jax.benchmark.{name}").build(work)
    asked: collections.Counter[tuple] = collections.Counter()

    def answer(question: tuple) -> dict[str, Any]:
        phase, *arguments = question
        asked[question] += 1
        settle = 0.0 if asked[question] == 1 else work.preset.settle
        fresh = asked[question] <= 2
        resting = machine.reset_peak() if fresh else 0
        side.compiled()  # building the side compiles, too
        measured, seconds = run_settled(lambda: side.phases[phase](*arguments), settle)
        measured |= {"seconds": seconds, **side.compiled()}
        if not fresh:
            return measured
        if side.device_peak is not None:
            return measured | {"resting_bytes": 0, "peak_bytes": side.device_peak()}
        return measured | {"resting_bytes": resting, "peak_bytes": machine.peak_bytes()}

    return answer


def run_settled(run: Callable[[], dict[str, Any]], settle: float) -> tuple[dict[str, Any], float]:
    """Runs a phase again and again, `settle` seconds untimed and as many timed.

    Returns: the measurements of the last run; the median seconds of the runs begun in the timed
        half, or of the last where none did.
    """
    turn = time.perf_counter()
    runs: list[tuple[float, float]] = []  # seconds into the turn, and seconds taken
    while not runs or sum(runs[-1]) < 2 * settle:
        began = time.perf_counter()
        measured = run()
        runs.append((began - turn, time.perf_counter() - began))
    timed = [took for begin, took in runs if begin >= settle] or [runs[-1][1]]
    return measured, statistics.median(timed)
