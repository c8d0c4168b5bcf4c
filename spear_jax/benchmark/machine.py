"""The machine: its ceilings, its packages, and the memory of a process.

JAX is imported only where ceilings are measured: the rival's process reads this module, and its
memory is measured.
"""

import gc
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from spear_jax.core.malloc import release_free_memory

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "torch",
    "transformers",
    "peft",
)
STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
MATRICES = {"cpu": (512, 1024, 1536), "gpu": (4096, 8192)}  # edges of square products
COPIED = {"cpu": 256 << 20, "gpu": 1 << 30}  # bytes
TRIES = 10


def measure(_: None = None) -> dict[str, Any]:
    """Measures the ceilings of JAX's first device, the best of several tries each, on random
    numbers: a GPU multiplies zeros and ones faster.

    Returns: platform, device, cpu, cores; load (processes that ran on average in the minute
        before); free_bytes (None where unknown); gemm {dtype: FLOP/s of the fastest square
        product}; copy (bytes read and written per second by adding 1 to a large array in place).
    """
    import jax

    from spear_jax.models.cost_model import device_bytes

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else "gpu"
    return {
        "platform": kind,
        "device": device.device_kind,
        "cpu": cpu_name(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "free_bytes": device_bytes(),
        "gemm": {
            dtype: max(_product(dtype, edge) for edge in MATRICES[kind])
            for dtype in ("float32", "bfloat16")
        },
        "copy": _copy(COPIED[kind]),
    }


def _product(dtype: str, edge: int) -> float:
    import jax
    import jax.numpy as jnp

    left, right = jax.random.normal(jax.random.key(0), (2, edge, edge), dtype)
    run = jax.jit(jnp.matmul)
    return 2 * edge**3 / _fastest(lambda: run(left, right).block_until_ready())


def _copy(size: int) -> float:
    import jax
    import jax.numpy as jnp

    # in place: a fresh array would measure how fast the system hands out pages
    run = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jnp.zeros(size // 4, jnp.float32)]

    def once() -> None:
        held[0] = run(held[0]).block_until_ready()

    return 2 * size / _fastest(once)


def _fastest(run: Callable[[], Any]) -> float:
    run()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def cores() -> int:
    """Returns the cores that this process may use; both sides run as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Returns the processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    named = (
        re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))
        if info.exists()
        else None
    )
    return named[1] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that either side runs on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def peak_source(platform: str) -> str:
    """Returns how peak memory is measured, for the record."""
    if platform == "gpu":
        return "the allocator's high-water mark on the device, in fresh processes for each phase"
    if CLEAR.exists():
        return "VmHWM, in fresh processes for each phase, reset before the first call and before the first repeat"
    return "ru_maxrss, in fresh processes for each phase, never reset"


def reset_peak() -> int:
    """Gives freed memory back and starts a new high-water mark (on Linux).

    Returns: the bytes still resident.
    """
    gc.collect()
    if not CLEAR.exists():
        return peak_bytes()
    release_free_memory()  # what the allocator kept would count as used
    CLEAR.write_text("5", encoding="utf-8")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Returns the process's high-water mark of resident memory, in bytes.

    It is since `reset_peak` or, elsewhere, since the process began.
    """
    if CLEAR.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))[1]) * 1024
