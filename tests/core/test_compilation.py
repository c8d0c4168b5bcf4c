"""Compiled programs are kept for the next run, where the user has not said otherwise."""

import json
import subprocess
import sys

import pytest
from processes import environment

from spear_jax.core import compilation

PROGRAM = """
import json, jax, jax.numpy as jnp
from spear_jax.core import compilation
compilation.LONG = 0.0
compilation.enable_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
counted = compilation.Compiles()
out = jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.eye(8))
print(json.dumps([len(hits), counted.take()["compile/programs"], float(out)]))
"""


def run(**changes):
    env = {
        name: value for name, value in environment().items() if not name.startswith("JAX_")
    } | changes
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr, "a program out of the cache is not worth a remark"
    return json.loads(done.stdout)


def test_a_program_is_compiled_once_and_then_found_and_counts_as_one_either_way(tmp_path):
    first, second = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert list((tmp_path / "spear_jax/programs").glob("*/*"))
    assert first[0] == 0 and second[0] >= 1
    assert first[1:] == second[1:]


def test_an_empty_name_keeps_nothing_and_another_folder_takes_the_place_of_the_users(tmp_path):
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="")[0] == 0
    assert not list(tmp_path.iterdir())
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run(XDG_CACHE_HOME=str(tmp_path / "home"), **own)
    assert list((tmp_path / "own").iterdir()) and not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "flags", ["flags\t\t: fpu avx2\n", "Features\t: asimd\n", "nothing of the kind\n"]
)
def test_each_kind_of_processor_has_a_folder_of_its_own(monkeypatch, tmp_path, flags):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(compilation, "CPU", tmp_path / "cpuinfo")
    found = []
    for text in (flags, flags.replace("\n", " more\n")):
        compilation.CPU.write_text(f"processor\t: 0\n{text}processor\t: 1\n{text}")
        found.append(compilation.compilation_cache_folder())
    assert (found[0] != found[1]) == ("nothing" not in flags)
    assert found[0].parent == found[1].parent
