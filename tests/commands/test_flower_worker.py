"""The worker of a node: real processes, which refuse a request of another protocol and build nothing."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install -e .[flower]")

from flwr.app import ConfigRecord, Message, RecordDict
from loopback import Loopback
from processes import environment

import spear_jax as sj
from spear_jax.flower import PROTOCOL, worker
from spear_jax.flower.client_app import app
from spear_jax.flower.terms import WRONG_NODE, Terms

RUN = vars(Terms("{}", "elsewhere", deadline=60.0))


class There:
    """A node's folder, as the ClientApp finds it."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "worker.json"

    def ask(self, run="ab" * 8, run_config=RUN, **more):
        """Asks, and checks the answer; returns the worker's process."""
        asked = RecordDict({"asked": ConfigRecord({"protocol": 7, "run": run})})
        reply = worker.ask(asked, {"client": 0, "folder": str(self.folder)}, run_config, **more)
        assert "speaks protocol 7" in reply["answer"]["refused"]
        return json.loads(self.file.read_text())["pid"]

    def home(self):
        """The folder of the worker's socket."""
        return pathlib.Path(json.loads(self.file.read_text())["socket"]).parent


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    there = There(tmp_path / "a node")
    yield there
    if there.file.exists() and runs(pid := json.loads(there.file.read_text())["pid"]):
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree(there.home(), ignore_errors=True)


def runs(pid):
    state = pathlib.Path(f"/proc/{pid}/stat")  # Z: has ended, and its parent has not asked yet
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def has_ended(pid, seconds=20):
    until = time.monotonic() + seconds
    while time.monotonic() < until and runs(pid):
        time.sleep(0.02)
    return not runs(pid)


def test_a_worker_stays_and_another_takes_its_place_when_it_must(there, monkeypatch):
    first = there.ask()
    assert there.ask() == first
    home = there.home()
    assert home.stat().st_mode & 0o777 == 0o700

    os.kill(first, signal.SIGKILL)
    second = there.ask()
    assert second != first and not home.exists()

    monkeypatch.setattr(worker, "GREETING", 0.2)
    os.kill(second, signal.SIGSTOP)
    third = there.ask()
    assert has_ended(second) and third != second

    fourth = there.ask(run="cd" * 8, idle=0.5)
    assert has_ended(third) and fourth != third
    assert has_ended(fourth) and not there.home().exists()


def test_a_worker_ends_with_its_supernode_whatever_it_does(there):
    supernode = subprocess.Popen(["sleep", "600"])
    pid = there.ask(supernode=supernode.pid)
    supernode.kill()
    assert has_ended(pid) and not there.home().exists()
    supernode.wait()


def test_a_worker_that_is_not_done_in_time_is_ended(there):
    config = sj.preset("spear", task="facts", model="tiny")  # its building takes longer
    terms = vars(Terms(json.dumps(config.to_dict()), "elsewhere", deadline=0.01))
    asked = RecordDict({"asked": ConfigRecord({"protocol": PROTOCOL, "run": "ab" * 8})})
    with pytest.raises(worker.Lost, match="within the round's deadline"):
        worker.ask(asked, {"client": 0, "folder": str(there.folder)}, terms)
    assert has_ended(json.loads(there.file.read_text())["pid"])


def test_a_worker_that_cannot_start_is_lost(there, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(worker.Lost, match="does not start; its log"):
        there.ask()


def test_the_server_learns_nothing_of_a_mistake_on_a_node_but_that_there_is_one(capsys):
    grid = Loopback([{"client": 0}], RUN)
    reply = app(grid.carry(Message(RecordDict(), 1, "train")), grid.nodes[1])
    assert reply.content["answer"]["refused"] == WRONG_NODE
    assert "error: the node has no folder for what it keeps" in capsys.readouterr().out


def test_the_client_app_imports_no_jax():
    code = "import sys, spear_jax.flower.client_app; sys.exit('jax' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], env=environment()).returncode
