"""Weights & Biases beside TensorBoard: with the real package, offline; nothing leaves the
machine.
"""

import json

import pytest

from spear_jax import compare, train
from spear_jax.core.errors import UserError
from spear_jax.experiment import run, wandb_logger
from spear_jax.experiment.config import default_config

# a method without rollouts: fewer programs to compile
FLAGS = [
    "--config=sft:facts,tiny,small", "--quiet", "--config.federation.clients_per_round=1",
    "--config.train.steps=1", "--config.train.batch_size=2", "--config.eval.limit=8",
    "--config.lora.rank=2", "--config.rounds=2",
]  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return wandb


def records(folder):
    """(run id, {step: {metric: value}}) of one offline run's file: a log of protobuf messages, as
    LevelDB lays logs out.
    """
    from wandb.proto import wandb_internal_pb2 as messages

    (file,) = folder.glob("*.wandb")
    data, at, whole, id, steps = file.read_bytes(), 7, b"", "", {}  # 7 bytes of header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too short for a record's head: the rest of the block is padding
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a message, or its last part
            record = messages.Record()
            record.ParseFromString(whole)
            whole, id = b"", record.run.run_id or id
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if items:
                steps[items["_step"]] = items
    return id, steps


def test_a_run_and_its_continuation_are_one_run_with_the_lines_of_metrics_jsonl(offline, tmp_path):
    workdir = tmp_path / "run"
    flags = [*FLAGS, "--config.wandb=a-project", f"--workdir={workdir}"]
    one_round = run.Run._round

    def stopping(self, *args):
        if self.finished_rounds == 1:
            raise KeyboardInterrupt
        return one_round(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_round", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    offline.finish()  # as the end of the process would
    train.main(flags)
    folders = sorted((workdir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    (first, before), (second, after) = map(records, folders)
    assert first == second == (workdir / "wandb_id").read_text().strip()
    lines = {
        x["round"]: x for x in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    }
    assert sorted(before) == [0, 1] and sorted(after) == [2]
    for step, items in (before | after).items():
        for name, value in lines[step].items():
            assert "/" not in name or items[name] == value


def test_a_missing_package_stops_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_logger.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match=r"pip install spear-jax\[wandb\]"):
        train.main([*FLAGS, "--config.wandb=a-project", f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"spear-jax\[wandb\]"):
        compare.main(
            [
                "--methods=spear",
                "--task=facts",
                "--seeds=0",
                "--budget=rounds:1",
                f"--workdir={tmp_path / 'grid'}",
            ]
            + ["--config.wandb=a-project"]
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "grid").exists()
    wandb_logger.check_wandb(default_config())


def test_nobody_logged_in_or_no_network_means_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(wandb_logger.socket, "create_connection", refuse)
    assert (
        not wandb_logger._reachable() and not asked
    )  # nobody is logged in: the network is not even tried
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8443")
    assert not wandb_logger._reachable() and asked == [("wandb.example.org", 8443)]
