"""Devices, versions, caches, and a self-test of about ten seconds: one forward pass, one generation, one local step."""

import importlib.metadata
import os
import platform
import time
from typing import Any

import jax

from configs import quickstart
from spear_jax import cli, experiment
from spear_jax.federated import round as rounds

EXAMPLES = """
    python -m spear_jax.doctor
"""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.parser("doctor", __doc__, EXAMPLES)
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "compilation_cache": jax.config.jax_compilation_cache_dir or "off (set JAX_COMPILATION_CACHE_DIR)",
        "hub_cache": os.environ.get("HF_HOME", "default"),
        "self_test": self_test(),
    }
    if not args.quiet:
        for name, value in found.items():
            print(f"{name}: {value}")
    return found


def self_test() -> dict[str, float]:
    """Seconds for building, evaluating and running one small round of the embedded experiment, compilation included."""
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        {
            "federation.clients_per_round": 2,
            "rollout.examples": 4,
            "train.steps": 1,
            "train.batch_size": 2,
            "eval.limit": 16,
        }
    )
    seconds = {}
    began = time.perf_counter()
    built = experiment.build(config)
    seconds["build"] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    built.evaluator(built.model.base)
    seconds["evaluate"] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    state = built.initial_state()
    rounds.run_round(built, state.replace(lora=built.on_devices(state.lora)), rounds.Spent())
    seconds["round"] = round(time.perf_counter() - began, 2)
    return seconds


if __name__ == "__main__":
    cli.run(main)
