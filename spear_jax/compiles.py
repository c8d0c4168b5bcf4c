"""How many programs XLA compiled, and how long that took: what should be nothing after a run's first rounds."""

import functools

import jax

from spear_jax import heap

_EVENT = "/jax/core/compile/backend_compile_duration"
LONG = 0.2  # seconds of compiling that leave enough behind


@functools.cache
def trim_after_compiling() -> None:
    """From now on gives back what compiling a program took: some 0.2 GB of a model of 135 M parameters, for 0.1 s."""
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: heap.trim() if event == _EVENT and seconds > LONG else None
    )


class Compiles:
    """Counts from its making on; a program out of the persistent cache counts with the time that loading it took."""

    def __init__(self):
        self._count, self._seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: object) -> None:
        if event == _EVENT:
            self._count += 1
            self._seconds += seconds

    def take(self) -> dict[str, float]:
        """Metrics since the last call: `compile/programs`, `compile/seconds`."""
        found = {"compile/programs": float(self._count), "compile/seconds": self._seconds}
        self._count, self._seconds = 0, 0.0
        return found
