"""The wheel: built, installed into a folder of its own, and used from outside the repository."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from processes import environment

import spear_jax
from spear_jax.__main__ import commands

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "setup.py", "spear_jax")
# Says where it found the package, then shows every command's --help; one process, one import of JAX.
HELP = """
import contextlib, sys
from spear_jax import __file__ as where
from spear_jax.__main__ import commands, main

print(where)
sys.argv[0] = "bin/spear-jax"
for name in commands():
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
"""
PARTS = """
import json
from spear_jax.analysis.report.page import TEMPLATE
from spear_jax.experiment.builder import TINY
from spear_jax.service.hub import PAGE

names = lambda folder: sorted(f.name for f in folder.iterdir())
print(json.dumps([str(TEMPLATE), TEMPLATE.is_file(), str(TINY), names(TINY), names(PAGE)]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the working tree, built from a copy, so that no build folder stays behind."""
    for name in ("pip", "setuptools", "wheel"):
        if not importlib.util.find_spec(name):
            pytest.skip(f"building a wheel needs {name} (pip install -e .[test])")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*pip, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The folder in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(
        [*pip, "--target", str(folder), str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def run(site, tmp_path):
    """Runs a command in an empty folder, with nothing of the repository on the path."""

    def start(*command):
        env = environment() | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return start


def test_the_wheel_holds_the_package_alone(wheel, site):
    names = zipfile.ZipFile(wheel).namelist()
    version = spear_jax.__version__
    assert {name.partition("/")[0] for name in names} == {
        "spear_jax",
        f"spear_jax-{version}.dist-info",
    }
    held = {name.removeprefix("spear_jax/") for name in names}
    there = {
        str(file.relative_to(ROOT / "spear_jax"))
        for file in (ROOT / "spear_jax").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert there <= held and "py.typed" in held
    assert not (site / "configs").exists()
    entry = (site / f"spear_jax-{version}.dist-info" / "entry_points.txt").read_text()
    assert "spear-jax = spear_jax.__main__:main" in entry


def test_every_command_has_its_help_outside_the_repository(run, site):
    done = run(sys.executable, "-c", HELP)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    where, _, shown = done.stdout.partition("\n")
    assert where == str(site / "spear_jax" / "__init__.py")
    for name in commands():
        assert f"usage: spear-jax {name} " in shown
    assert shown.count("examples:\n  spear-jax ") + shown.count("examples:\n  HF_") == len(
        commands()
    )
    assert "python -m" not in shown


def test_the_pages_and_the_embedded_model_are_found(run, site):
    done = run(sys.executable, "-c", PARTS)
    template, is_file, tiny, files, page = json.loads(done.stdout)
    assert page == ["index.html", "page.css", "page.js"]
    assert is_file and {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert template.startswith(str(site)) and tiny.startswith(str(site))


def test_a_preset_is_trained_by_its_name_outside_the_repository(run, tmp_path):
    flags = ["--config.federation.num_clients=3", "--config.federation.clients_per_round=2"]
    command = [sys.executable, "-m", "spear_jax", "train", "--config=spear:facts,tiny", *flags]
    done = run(*command, "--workdir=runs/dry", "--dry-run", "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
    (tmp_path / "published.yaml").write_text("fl: {rounds: 50, clients_per_round: 3}\n")
    code = "from spear_jax.experiment.command_line import load_config as load; from spear_jax.pretrain import recipe\n"
    code += "print(load('from_yaml:published.yaml,reference').rounds, load('quickstart').task, recipe().steps)"
    assert run(sys.executable, "-c", code).stdout.split() == ["50", "facts", "2000"]


def test_the_console_script_tells_the_version(run, site):
    script = site / "bin" / "spear-jax"
    done = run(str(script), "--version")
    assert done.stdout == f"spear-jax {spear_jax.__version__}\n", done.stderr
    done = run(str(script), "evalute")
    assert done.returncode == 2 and "Did you mean 'evaluate'" in done.stderr
    assert os.access(script, os.X_OK)
