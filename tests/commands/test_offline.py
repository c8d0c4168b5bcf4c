"""--offline: models and datasets come from disk and caches, and what is missing is named; no
connection is tried.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
from processes import environment

from spear_jax import evaluate, export, train
from spear_jax.core.errors import UserError
from spear_jax.experiment import command_line

TINY = pathlib.Path(__file__).parents[2] / "spear_jax/assets/tiny"


@pytest.fixture
def no_network(monkeypatch):
    """Libraries that have their switch still on, and a network whose every use fails the test."""
    from datasets import config
    from huggingface_hub import constants

    for module in (config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    used = []
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda self, address: used.append(address) or pytest.fail("network"),
    )
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **_: used.append(args) or pytest.fail("network")
    )
    yield
    assert not used


def test_a_missing_model_is_named_with_its_cache_and_the_network_left_alone(no_network):
    with pytest.raises(UserError, match=r"'owner/missing' .* not in the Hub's cache.*--offline"):
        evaluate.main(["--model=owner/missing", "--task=facts", "--offline", "--quiet"])
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_missing_dataset_is_named_with_its_cache_and_the_network_left_alone(
    no_network, tmp_path, monkeypatch
):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        UserError, match=r"Rowan/hellaswag' is not in the datasets cache .*--offline"
    ):
        train.main(
            [
                "--config=configs/spear.py:hellaswag,tiny",
                "--config.model=tiny",
                f"--workdir={tmp_path / 'x'}",
                "--offline",
            ]
        )


def test_export_takes_the_flag_too(no_network, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        export.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", "--offline"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_without_the_flag_nothing_is_switched(no_network):
    command_line.go_offline(False)
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_cached_model_is_found_offline_by_a_process_of_its_own(tmp_path):
    snapshot = (
        tmp_path / "hub/models--owner--tiny/snapshots/0123456789012345678901234567890123456789"
    )
    shutil.copytree(TINY, snapshot)
    (tmp_path / "hub/models--owner--tiny/refs").mkdir()
    (tmp_path / "hub/models--owner--tiny/refs/main").write_text(snapshot.name)
    env = {name: value for name, value in environment().items() if "OFFLINE" not in name} | {
        "HF_HOME": str(tmp_path)
    }
    command = [
        sys.executable,
        "-m",
        "spear_jax.evaluate",
        "--task=facts",
        "--limit=4",
        "--quiet",
        "--offline",
    ]
    done = subprocess.run([*command, "--model=owner/tiny"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and '"count": 4' in done.stdout, done.stderr[-2000:]
    done = subprocess.run(
        [*command, "--model=owner/other"], env=env, capture_output=True, text=True
    )
    assert (
        done.returncode == 2 and "'owner/other'" in done.stderr and "Traceback" not in done.stderr
    )
