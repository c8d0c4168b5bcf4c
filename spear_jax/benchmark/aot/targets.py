"""Accelerators that are not there, by name: their compile-only devices, their memory, their peaks.

A compile-only device takes programs and runs none. CUDA's compiler needs the PJRT plugin and
NVIDIA's assembler, a TPU's needs libtpu; neither needs a driver, a device or a network.

Sources: NVIDIA H100 SXM5 data sheet (80 GB: 989.4 TFLOP/s dense bfloat16, 3.35 TB/s) and the device
    properties that CUDA reports of that card; Google Cloud's TPU v5e page (16 GB: 197 TFLOP/s
    bfloat16, 819 GB/s).
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from spear_jax.core.errors import UserError, unknown

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Target:
    """Some accelerators of one kind.

    Attributes:
        platform: as `jax.default_backend` names it, "gpu" or "tpu".
        topology: the devices, as the platform's compiler names them.
        host: chips of a TPU's host along each axis; () for GPUs.
        memory: bytes of one device that a program may use.
        flops: peak dense bfloat16 FLOP/s of one device.
        bandwidth: peak bytes/s between one device and its memory.
        launch: seconds between the starts of two kernels.
    """

    platform: str
    topology: str
    host: tuple[int, ...]
    memory: int
    flops: float
    bandwidth: float
    launch: float


def _h100(count: int) -> Target:
    # JAX's allocator takes three quarters of the card. 2.5 us: an assumption, what CUDA's launches
    # from a stream commonly take.
    memory = int(0.75 * 84942979072)
    return Target("gpu", f"1x1x{count}", (), memory, 989.4e12, 3.35e12, 2.5e-6)


def _v5e(shape: str, host: tuple[int, ...]) -> Target:
    # 15.75 of 16 GiB are a program's; its steps are started on the chip
    return Target("tpu", f"v5e:{shape}", host, int(15.75 * GIB), 197e12, 819e9, 0.0)


TARGETS = {
    "h100-1": _h100(1),
    "h100-8": _h100(8),
    "tpu-v5e-1": _v5e("1x1x1", (1, 1, 1)),
    "tpu-v5e-8": _v5e("2x4x1", (2, 4, 1)),
    "tpu-v5e-16": _v5e("4x4x1", (2, 2, 1)),
}
WHEELS = {
    "gpu": ("jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc"),
    "tpu": ("libtpu",),
}
# what keeps libtpu from asking a metadata server which chips the machine has, and from claiming
# them for one process
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# silence about drivers that a machine without the device has not; read when JAX is imported
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
# XLA's GpuTargetConfigProto of an H100 SXM5 of 80 GB under CUDA 12.9
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def find_target(name: str) -> Target:
    """Returns the target of that name; raises UserError for an unknown one."""
    if name not in TARGETS:
        raise unknown("target (--compile-for)", name, TARGETS)
    return TARGETS[name]


def missing(target: Target) -> str:
    """Returns the name of a module that the target's compiler needs and that is not installed."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of the package that would hold it
            return False

    return next((name for name in WHEELS[target.platform] if not there(name)), "")


def check_wheels(name: str, target: Target) -> None:
    """Raises UserError where the target's compiler is not installed."""
    if lacking := missing(target):
        raise UserError(
            f"--compile-for={name} needs the {target.platform.upper()} compiler that fits this JAX, "
            f'and {lacking!r} cannot be imported; `pip install "spear-jax[aot]"`.'
        )


def devices(name: str, target: Target) -> list[Any]:
    """Returns the target's compile-only devices; no device or connection is opened.

    Raises: UserError where the compiler's wheels do not fit the JAX that is installed.
    """
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.update(ENVIRONMENT if target.platform == "tpu" else {})
    try:
        if target.platform == "tpu":
            there = topologies.get_topology_desc(
                target.topology, "tpu", chips_per_host_bounds=target.host
            )
        else:
            there = topologies.get_topology_desc(
                platform="cuda", target_config=H100, topology=target.topology
            )
    except (RuntimeError, NotImplementedError, KeyError) as error:
        raise UserError(
            f"--compile-for={name}: the compiler does not start with JAX {jax.__version__} "
            f"({str(error).splitlines()[0][:200]}); install the wheels that fit it, "
            '`pip install --upgrade "spear-jax[aot]"`.'
        ) from error
    return list(there.devices)


@contextlib.contextmanager
def compiler(target: Target) -> Iterator[None]:
    """Lets JAX compile for the target, anew: the cache of compiled programs is left out.

    JAX looks the alias "gpu" up among running devices, of which there is none; here it is CUDA.
    """
    import jax
    from jax._src import xla_bridge
    from jax.experimental.compilation_cache import compilation_cache

    alias, cached = xla_bridge.canonicalize_platform, jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        if target.platform == "gpu":
            xla_bridge.canonicalize_platform = lambda platform: (
                "cuda" if platform == "gpu" else alias(platform)
            )
        yield
    finally:
        xla_bridge.canonicalize_platform = alias
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()
