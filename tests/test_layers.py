"""The rules of the house: every folder is a part and imports from lower parts alone, every file is a
command, no modules import one another in a circle, and every config field is read.
"""

import ast
import dataclasses
import functools
import graphlib
import pathlib
import re

import pytest

import spear_jax
from spear_jax.algorithms import ALGORITHMS
from spear_jax.experiment.config import Settings
from spear_jax.feedback.recorded import FeedbackSettings

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "spear_jax"
# From the ground up: a part imports from floors below its own, and packing from core beside it.
FLOORS = (
    ("core", "packing"), ("models", "tasks", "analysis"), ("feedback", "service"), ("rollout",),
    ("algorithms",), ("federated",), ("experiment",), ("commands",),
)  # fmt: skip
*PARTS, _ = [part for floor in FLOORS for part in floor]
BESIDE_COMMANDS = {*PARTS, "assets", "__init__.py", "__main__.py", "py.typed"}


# Imports


@functools.cache
def modules() -> dict[str, ast.Module]:
    """{"spear_jax.core.rng": its syntax tree}; a folder is the module of its __init__.py."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, in functions as well as above them. A name
    of the public API counts as the module that defines it.
    """
    used = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write spear_jax. ..."
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if node.module == "spear_jax":
                    whole = f"spear_jax.{spear_jax._PUBLIC.get(alias.name, alias.name)}"
                used.add(whole if whole in modules() else node.module)
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            assert "spear_jax" not in names, f"{module}: name the module that you import from"
            used |= names
    return frozenset(used & modules().keys() - {module})


def part(module: str) -> str:
    """The part that a module belongs to; "" for the package's own file, which holds the version."""
    name = (module.split(".") + [""])[1]
    return name if name in PARTS or not name else "commands"


def test_no_file_imports_from_a_part_above_its_own():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{name} imports {used}"
        for name in modules()
        for used in imports(name)
        if part(name)
        and part(used)
        and part(used) != part(name)
        and (part(name), part(used)) != ("packing", "core")
        and floor[part(used)] >= floor[part(name)]
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    # the package's own file imports the API when a name of it is first used
    graph = {name: imports(name) - {"spear_jax"} for name in modules() if name != "spear_jax"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# Files


def test_beside_the_commands_stand_fifteen_entries():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert len(BESIDE_COMMANDS) == 15 and entries >= BESIDE_COMMANDS
    for name in sorted(entries - BESIDE_COMMANDS):
        path = PACKAGE / name
        assert path.suffix == ".py" or (path / "__main__.py").exists(), f"{name} is no command"
        module = f"spear_jax.{path.stem}" + ".__main__" * path.is_dir()
        tree = modules()[module]
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        assert ast.get_docstring(tree), f"{name} says nothing to `spear-jax --help`"


def test_every_part_says_what_it_is():
    for name in PARTS:
        assert ast.get_docstring(modules()[f"spear_jax.{name}"]), name


# Settings


def fields_of(kind: type, prefix: str = ""):
    """Every leaf of a settings dataclass, as (path of its group, name): ("data.columns", "hint")."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from fields_of(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix.rstrip("."), field.name


class Reads(ast.NodeVisitor):
    """The settings that a file reads, as paths: `settings.train.steps` is "train.steps".

    A name that is given to a group counts as the group, so that `train = settings.train` makes
    "train.steps" of `train.steps`. `vars(...)` of a group reads all of it: "data.columns.*".
    """

    def __init__(self, tree: ast.Module):
        self.names: dict[str, str] = {"settings": ""}
        self.paths: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                self._name(node.targets[0], node.value)
        self.visit(tree)

    def path(self, node: ast.expr) -> str | None:
        """ "" for the settings, "train" for a group; None for anything else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        if node.attr == "settings":
            return ""
        base = self.path(node.value)
        return None if base is None else f"{base}.{node.attr}".lstrip(".")

    def _name(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._name(one, other)
        elif isinstance(target, ast.Name) and self.path(value) is not None:
            self.names[target.id] = self.path(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and self.path(node):
            self.paths.add(self.path(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "vars":
            self.paths |= {f"{self.path(arg)}.*" for arg in node.args}
        self.generic_visit(node)


@functools.cache
def read() -> dict[str, frozenset[str]]:
    return {name: frozenset(Reads(tree).paths) for name, tree in modules().items()}


def test_every_config_field_is_read_through_the_parsed_settings():
    methods = {name for name in modules() if re.match(r"spear_jax\.algorithms\.", name)}
    paths = set().union(*(read()[name] for name in modules().keys() - methods))
    unread = {
        f"{group}.{name}".lstrip(".")
        for group, name in fields_of(Settings)
        if group != "feedback"  # as a whole for the providers: below
        and f"{group}.{name}".lstrip(".") not in paths
        and f"{group}.*" not in paths
    }
    # the first is kept for the record; the modules of the second are imported before the settings
    # are parsed, since they may bring the method
    assert unread == {"algorithm.preset", "imports"}


def test_every_setting_of_a_method_is_read_by_methods():
    paths = set().union(*(found for name, found in read().items() if part(name) == "algorithms"))
    unread = {
        f"{method}.{field.name}"
        for method, kind in ALGORITHMS.items()
        for field in dataclasses.fields(kind.Settings)
        if field.name not in paths
    }
    assert not unread


def test_every_setting_of_feedback_is_read_by_providers():
    paths = set().union(*(found for name, found in read().items() if part(name) == "feedback"))
    assert {field.name for field in dataclasses.fields(FeedbackSettings)} <= paths


def test_a_setting_that_nothing_reads_is_seen():
    code = (
        "fed, n = built.settings.federation, 1\nfed.prox\nconfig.train.steps\nvars(settings.data)"
    )
    assert Reads(ast.parse(code)).paths == {"federation", "federation.prox", "data", "data.*"}
