"""Shows devices, versions and caches, and runs a self-test of ten seconds.

The self-test builds the embedded experiment, evaluates it, and runs one small federated round.
Optional packages are named with what they are for. The last line is a verdict; where it is "not
ready", the exit code is 1.
"""

import importlib.metadata
import os
import pathlib
import platform
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from spear_jax.core.compilation import compilation_cache_folder
from spear_jax.core.versions import PACKAGES
from spear_jax.experiment import builder, command_line, presets
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.models import cost_model
from spear_jax.rollout.policy import Policy

EXAMPLES = """
    python -m spear_jax.doctor
"""
# package -> what it is for; setup.py has the extras
OPTIONAL = {
    "qwix": "quantised bases",
    "wandb": "config.wandb",
    "torch": "benchmark --against=hf, published",
    "peft": "benchmark --against=hf",
    "trl": "tests beside TRL",
    "jupyterlab": "notebooks",
}


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("doctor", __doc__, EXAMPLES)
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    # read when JAX first looks for devices, below: most of the self-test is compilation, and nobody
    # waits for its programs
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    )
    seconds, failed = self_test()
    findings: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "optional": {name: version_of(name) for name in OPTIONAL},
        "devices": devices(),
        "memory_free": cost_model.device_bytes() if devices() else None,
        "caches": {
            name: {"path": str(path), "bytes": size_of(path)} for name, path in caches().items()
        },
        "self_test": seconds,
        "failed": failed,
    }
    findings["failed"] += [
        f"package {name} is absent" for name, version in findings["versions"].items() if not version
    ]
    findings["verdict"] = verdict(findings["failed"])
    if not args.quiet:
        show(findings)
    return findings


def devices() -> list[str]:
    """Returns the devices that JAX sees; none where it cannot start."""
    try:
        return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
    except RuntimeError:  # the self-test says why
        return []


def verdict(failed: list[str]) -> str:
    """Returns whether this machine is ready, and what would make runs on it faster or possible.

    Args: failed: what keeps it from being ready.
    """
    if failed:
        return f"not ready: {'; '.join(failed)}"
    notes = []
    if jax.default_backend() == "cpu" and any(
        pathlib.Path(path).exists() for path in ("/dev/nvidia0", "/dev/accel0")
    ):
        notes.append(
            'an accelerator is there that JAX does not see: pip install "spear-jax[cuda]" or "[tpu]"'
        )
    if compilation_cache_folder() is None:
        notes.append("programs are compiled anew in every run: set JAX_COMPILATION_CACHE_DIR")
    return "; ".join([f"ready on {jax.default_backend()}", *notes])


def show(findings: dict[str, Any]) -> None:
    """Prints the findings as lines for a person."""
    print(
        f"python {findings['python']}, "
        + ", ".join(f"{name} {version}" for name, version in findings["versions"].items())
    )
    for name, version in findings["optional"].items():
        print(f"optional {name}: {version or 'absent'} ({OPTIONAL[name]})")
    free = findings["memory_free"]
    print(
        f"devices: {', '.join(findings['devices']) or 'none'}; "
        f"{'unknown' if free is None else f'{free / 1e9:.1f} GB'} free on one"
    )
    for name, cache in findings["caches"].items():
        print(f"cache {name}: {cache['path']}, {cache['bytes'] / 1e6:,.1f} MB")
    if "compilation" not in findings["caches"]:
        print(
            "cache compilation: off, as JAX_COMPILATION_CACHE_DIR is empty; unset it and later "
            "runs start faster"
        )
    print(
        "self-test, seconds: "
        + (", ".join(f"{name} {value}" for name, value in findings["self_test"].items()) or "none")
    )
    print(findings["verdict"])


def version_of(package: str) -> str | None:
    """Returns the installed version, None where the package is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def caches() -> dict[str, pathlib.Path]:
    """Returns the folders of models, datasets and compiled programs, as far as they exist."""
    import datasets  # here, not above: with huggingface_hub it takes seconds to import
    from huggingface_hub import constants

    folders = {
        "models": pathlib.Path(constants.HF_HUB_CACHE),
        "datasets": pathlib.Path(datasets.config.HF_DATASETS_CACHE),
    }
    programs = compilation_cache_folder()
    return folders | ({"compilation": programs} if programs else {})


def size_of(folder: pathlib.Path) -> int:
    """Returns the bytes of all files below a folder, links not followed; 0 where there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            file = pathlib.Path(parent, name)
            if not file.is_symlink():
                total += file.stat().st_size
    return total


def self_test() -> tuple[dict[str, float], list[str]]:
    """Times building, evaluating and one small round of the embedded experiment.

    Returns: seconds by name, compilation included, of what went through; what did not, with the
        reason. The traceback goes to stderr.
    """
    config = presets.quickstart()
    config.update_from_flattened_dict(
        {
            "federation.clients_per_round": 2,
            "rollout.examples": 4,
            "rollout.num_revisions": 1,
            "train.steps": 1,
            "train.batch_size": 2,
            "eval.limit": 16,
        }
    )
    steps: dict[str, Callable[[Any], Any]] = {
        "build": lambda _: builder.build(config),
        "evaluate": lambda built: built.evaluator(Policy(built.model.base)),
        "round": lambda built: run_round(built.federation, built.initial_state(), BudgetUsed()),
    }
    seconds: dict[str, float] = {}
    built = None
    for name, step in steps.items():
        began = time.perf_counter()
        try:
            done = step(built)
        except Exception as error:  # whatever keeps the embedded experiment from running
            traceback.print_exc()
            line = (str(error).splitlines() or [""])[0][:300]
            return seconds, [f"self-test {name}: {type(error).__name__}: {line}"]
        built = built or done
        seconds[name] = round(time.perf_counter() - began, 2)
    return seconds, []


if __name__ == "__main__":
    command_line.run(main)
