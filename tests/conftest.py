"""Fixtures of more than one test file, and eight virtual CPU devices for all of them."""

import gc
import os
import pathlib
import tempfile

from processes import COMPILATION

# Before anything imports JAX. Tests of a GPU (test_gpu.py) have it compile as it does for a user.
if "cuda" not in os.environ.get("JAX_PLATFORMS", ""):
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), COMPILATION, "--xla_force_host_platform_device_count=8"]
    )

# Programs that several files, processes and runs of the suite's subprocesses have in common are
# compiled once. pytest-xdist's workers find the folder in what they inherit.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="spear-jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees a module's compiled programs: each holds memory maps, and a process may have only so
    many (65,530 on Linux).
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder with real datasets: $SPEAR_DATA, else ../shared/data beside the repository."""
    root = pathlib.Path(__file__).resolve().parents[1]
    folder = (
        pathlib.Path(os.environ["SPEAR_DATA"])
        if "SPEAR_DATA" in os.environ
        else root.parent / "shared/data"
    )
    if not folder.is_dir():
        pytest.skip(
            f"no real data at {folder}; set SPEAR_DATA to a folder with one subfolder per dataset"
        )
    return folder


@pytest.fixture(scope="module")
def model():
    """A Qwen2 of two layers with random weights (fixtures/qwen2)."""
    import small_cohort

    return small_cohort.load_small_model()


@pytest.fixture(scope="module")
def lora(model):
    """An adapter of it, B not zero."""
    import small_cohort

    return small_cohort.make_lora(model)


@pytest.fixture(scope="module")
def cohort(model):
    """[C][S][A] lists of B wins and B loses."""
    import small_cohort

    return small_cohort.make_rows(model)
