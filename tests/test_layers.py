"""The house's own rules: imports point downwards only, and every config field is read."""

import ast
import pathlib

from spear_jax.experiment.config import default_config, flatten

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "spear_jax"
# A file imports from its own layer or from layers above it in this list. Longest prefix wins.
LAYERS = [
    (
        "errors",
        "heap",
        "types",
        "trees",
        "losses",
        "records",
        "analysis",
        "grids",
        "tokens",
        "sweeps",
        "reports",
        "settings",
    ),
    (
        "models",
        "sampling",
        "packing",
        "packs",
        "batches",
        "decoding",
        "rooms",
        "drawing",
        "partition",
        "tasks",
        "feedback",
        "text",
        "memory",
        "devices",
    ),
    (
        "actor",
        "algorithms",
        "config",
        "run_folder",
        "published_values",
        "published_keys",
        "published_yaml",
    ),
    ("federated", "casting", "experiment"),
    (
        "cli",
        "train",
        "evaluate",
        "export",
        "report",
        "score",
        "fetch",
        "pretrain",
        "doctor",
        "dry_run",
        "published",
        "compare",
        "cells",
        "sweep",
        "workers",
        "benchmark",
        "compiles",
        "bench",
    ),
]
# The run's console wrapper is used by entry points alone.


def layer(module: str) -> int:
    first = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if first in names)


def imports(file: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spear_jax"):
            if node.module == "spear_jax":
                found |= {f"spear_jax.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("spear_jax.")}
    return found


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "spear_jax":
            yield name, file


def test_no_file_imports_from_a_layer_below_it():
    wrong = [
        f"{name} imports {used}"
        for name, file in modules()
        for used in imports(file)
        if layer(used) > layer(name)
    ]
    assert not wrong


def test_every_config_field_is_read_somewhere():
    text = "\n".join(file.read_text() for _, file in modules() if file.name != "config.py")
    used = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
    recorded_only = {"preset"}
    unread = {
        name
        for name in flatten(default_config())
        if name.split(".")[-1] not in used | recorded_only
    }
    # templates and columns are handed over whole
    assert not {
        name for name in unread if not name.startswith(("data.columns.", "data.templates."))
    }


def test_files_stay_short():
    long = {
        str(file): n for _, file in modules() if (n := len(file.read_text().splitlines())) > 350
    }
    assert not long
