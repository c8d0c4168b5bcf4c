"""How many programs XLA compiled, and how long that took: what should be nothing after a run's
first rounds; and where they are kept for the next run.
"""

import functools
import hashlib
import os
import pathlib
import platform
import re

import jax

from spear_jax.core.malloc import release_free_memory

_EVENT = "/jax/core/compile/backend_compile_duration"
LONG = 0.2  # seconds of compiling that leave enough behind, and are worth keeping
FOLDER = "JAX_COMPILATION_CACHE_DIR"
CPU = pathlib.Path("/proc/cpuinfo")


def enable_compilation_cache() -> None:
    """From now on keeps compiled programs for later runs (`compilation_cache_folder`). Called
    before anything compiles.
    """
    if FOLDER not in os.environ:  # where it is, JAX has read it
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LONG)


def compilation_cache_folder() -> pathlib.Path | None:
    """The folder of compiled programs: what JAX_COMPILATION_CACHE_DIR names (None where it is set
    to nothing), else one in the user's cache for each kind of processor, since a home may be many
    machines' and JAX does not tell their programs apart.
    """
    if FOLDER in os.environ:
        return pathlib.Path(os.environ[FOLDER]) if os.environ[FOLDER] else None
    flags = (
        re.search(r"^(flags|Features)\s*:.*$", CPU.read_text(), re.MULTILINE)
        if CPU.exists()
        else None
    )
    kind = hashlib.sha256((flags[0] if flags else platform.processor()).encode()).hexdigest()[:12]
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches, "spear_jax", "programs", f"{platform.machine()}-{kind}")


@functools.cache
def release_after_compiling() -> None:
    """From now on gives back what compiling a program took: some 0.2 GB of a model of 135 M
    parameters, for 0.1 s.
    """
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: (
            release_free_memory() if event == _EVENT and duration_secs > LONG else None
        )
    )


class Compiles:
    """Counts from its making on; a program out of the persistent cache counts with the time that
    loading it took.
    """

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
