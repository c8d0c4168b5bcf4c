"""The environment of commands that tests start as a user would."""

import importlib.metadata
import os
import pathlib
import sys

# Most of the suite's time is compilation, which these flags make much cheaper: no optimisation, one
# LLVM module a program, and fused loops from XLA's older emitters, which take half the time of the
# newer ones. Only jaxlib 0.10 has the older emitters; 0.12 ends the process at an unknown flag.
COMPILATION = (
    "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    COMPILATION += " --xla_cpu_use_fusion_emitters=false"


def environment(devices: int = 1) -> dict[str, str]:
    """This Python, so many virtual CPU devices, and what conftest.py sets for compilation."""
    # without $VENV, which launch scripts would make anew for themselves
    mine = {name: value for name, value in os.environ.items() if name != "VENV"}
    return mine | {
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": f"{COMPILATION} --xla_force_host_platform_device_count={devices}",
    }
