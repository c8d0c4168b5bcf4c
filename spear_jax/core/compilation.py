"""Compilation by XLA: the cache of compiled programs, and its metrics.

A run compiles in its first rounds, and should compile nothing after them. Programs are kept for the
next run.
"""

import functools
import hashlib
import os
import pathlib
import platform
import re
import sys

import jax

from spear_jax.core.malloc import release_free_memory
from spear_jax.core.surroundings import say

_EVENT = "/jax/core/compile/backend_compile_duration"
LONG = 0.2  # seconds of compiling that leave enough behind, and are worth keeping
FOLDER = "JAX_COMPILATION_CACHE_DIR"
CPU = pathlib.Path("/proc/cpuinfo")


def enable_compilation_cache() -> None:
    """Keeps compiled programs for later runs, from now on; called before anything compiles.

    They lie in `compilation_cache_folder`.
    """
    folder = compilation_cache_folder()
    if folder is not None and not _takes_files(folder):
        say(
            f"note: compiled programs are not kept, for {folder} cannot be written; name another "
            f"folder in {FOLDER}",
            sys.stderr,
        )
        folder = None
    if folder is None:
        jax.config.update("jax_enable_compilation_cache", False)
    elif FOLDER not in os.environ:  # where it is, JAX has read it
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LONG)


def _takes_files(folder: pathlib.Path) -> bool:
    if "://" in os.environ.get(FOLDER, ""):  # a bucket, which JAX reaches by itself
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def compilation_cache_folder() -> pathlib.Path | None:
    """Returns the folder of compiled programs, or None where the cache is off.

    JAX_COMPILATION_CACHE_DIR names it; set to nothing, it turns the cache off. Without the variable
    it is a folder in the user's cache, one for each kind of processor. Several machines may share a
    home, and JAX does not tell their programs apart. A user without a home has none.
    """
    if FOLDER in os.environ:
        return pathlib.Path(os.environ[FOLDER]) if os.environ[FOLDER] else None
    flags = (
        re.search(
            r"^(flags|Features)\s*:.*$",
            CPU.read_text(encoding="utf-8", errors="replace"),
            re.MULTILINE,
        )
        if CPU.exists()
        else None
    )
    kind = hashlib.sha256((flags[0] if flags else platform.processor()).encode()).hexdigest()[:12]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):
        return None
    return pathlib.Path(caches, "spear_jax", "programs", f"{platform.machine()}-{kind}")


@functools.cache
def release_after_compiling() -> None:
    """Gives back the memory of a compilation after it has ended, from now on.

    Of a model of 135 M parameters that is some 0.2 GB, for 0.1 s.
    """
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: (
            release_free_memory() if event == _EVENT and duration_secs > LONG else None
        )
    )


class Compiles:
    """Counter of compiled programs and seconds, from its making on.

    A program out of the persistent cache counts with the time that loading it took.
    """

    def __init__(self):
        self._count, self._seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: object) -> None:
        if event == _EVENT:
            self._count += 1
            self._seconds += seconds

    def take(self) -> dict[str, float]:
        """Returns the metrics since the last call: `compile/programs`, `compile/seconds`."""
        metrics = {"compile/programs": float(self._count), "compile/seconds": self._seconds}
        self._count, self._seconds = 0, 0.0
        return metrics
