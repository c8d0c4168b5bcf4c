"""Two hands on one run folder, and a disk that takes no more: what is refused, told and kept."""

import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
from run_sizes import small

import spear_jax as sj
from spear_jax import train as train_command
from spear_jax.core.errors import UserError
from spear_jax.core.files import DiskError
from spear_jax.experiment import command_line, grid, run_folder
from spear_jax.experiment.run_folder import FolderLock
from spear_jax.experiment.run_logger import Board, RunLogger

HOLD = """
import fcntl, json, os, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(json.dumps({"pid": os.getpid(), "host": "elsewhere", "since": "noon"}))
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(run_folder, "GRACE", 0.0)


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def lock(folder):
    """A lock that counts how often its owner had to finish or leave."""
    calls = []
    made = FolderLock(folder, lambda: calls.append("finish"), lambda: leave(made, calls))
    return made, calls


def leave(made, calls):
    calls.append("leave")
    made.release()


# Locks


def test_a_folder_in_use_is_refused_by_name_until_the_process_is_killed(tmp_path, holder, capsys):
    words = f"in use by process {holder.pid} on host elsewhere .since noon."
    with pytest.raises(UserError, match=words):
        sj.Run(small(), tmp_path)
    with pytest.raises(UserError, match=words):
        grid.run(tmp_path, [], 1, quiet=True)
    with pytest.raises(SystemExit) as ended:
        command_line.run(train_command.main, ["--config=quickstart", f"--workdir={tmp_path}"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and f"process {holder.pid}" in told
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    mine, _ = lock(tmp_path)
    mine.take()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    mine.release()


def test_a_process_that_is_dying_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_folder, "GRACE", 30.0)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        holder.kill()
        holder.wait()

    monkeypatch.setattr(run_folder.time, "sleep", sleep)
    mine, _ = lock(tmp_path)
    mine.take()
    mine.release()
    assert len(slept) == 1


def test_in_one_process_the_newest_taker_has_the_folder(tmp_path):
    first, told = lock(tmp_path)
    second, _ = lock(tmp_path / "." / "..")  # another name of the same
    second.folder = tmp_path / "link"
    second.folder.symlink_to(tmp_path)
    second.file = second.folder / "lock"
    first.take()
    with second.while_opening():  # as a reader beside the one that trains
        first.check()
    assert told == ["finish"]
    second.take()
    assert told == ["finish", "leave"]
    second.check()
    with pytest.raises(UserError, match="another Run of this process"):
        first.check()
    first.release()
    second.check()
    second.release()
    with first.while_opening():
        first.check()
    assert not FolderLock._of_this_process


def test_a_file_system_without_locks_gives_a_note(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    mine, _ = lock(tmp_path)
    for _ in range(2):
        mine.take()
        mine.check()
        mine.release()
    told = capsys.readouterr().err
    assert told.startswith("note: ") and "has no locks" in told and told.count("\n") == 1


@pytest.mark.parametrize("change", ["removed", "moved", "replaced", "unlocked by hand"])
def test_a_folder_that_goes_away_ends_its_run(tmp_path, change):
    folder = tmp_path / "run"
    folder.mkdir()
    mine, _ = lock(folder)
    mine.take()
    if change == "moved":
        folder.rename(tmp_path / "other")
    elif change == "unlocked by hand":
        (folder / "lock").unlink()
    else:
        shutil.rmtree(folder)
    if change == "replaced":
        folder.mkdir()
        (folder / "lock").touch()
    with pytest.raises(UserError, match="removed, moved or replaced"):
        mine.check()
    mine.release()


@pytest.mark.parametrize("name", ["", " ", "a[1]", "b*", "c?", "d\\e", "f\udcff"])
def test_a_folder_in_which_checkpoints_could_not_be_read_is_refused(tmp_path, name):
    """Orbax looks for its files by a pattern that holds the folder's path: a[1] finds nothing, b*
    may find another run's. What is no UTF-8 it cannot open.
    """
    workdir = f"{tmp_path}/{name}" if name.strip() else name
    for refused in (
        lambda: train_command.main(["--config=quickstart", f"--workdir={workdir}", "--dry-run"]),
        lambda: (
            grid.check_folder(pathlib.Path(workdir), [])
            if name.strip()
            else sj.Run(small(), workdir)
        ),
    ):
        with pytest.raises(UserError, match="--workdir is ") as caught:
            refused()
        caught.value.args[0].encode()  # a message that every terminal takes
    assert not list(tmp_path.iterdir())


# Disks


def test_every_file_of_a_round_that_cannot_be_written_is_named(tmp_path):
    logger = RunLogger(tmp_path, None)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"metrics.jsonl cannot be written \(No space left"):
        logger.write({"round": 1, "time": 1.0, "train/loss": 0.5})
    (tmp_path / "traces").touch()
    with pytest.raises(DiskError, match=r"round_00001.jsonl.gz cannot be written"):
        logger.traces(1, [], lambda ids: [])
    logger.close()
    full = tmp_path / "full"
    full.mkdir()
    board = Board(full, None)
    board.close()
    with open("/dev/full", "wb") as board._events._py_recordio_writer._writer:
        with pytest.raises(DiskError, match="full cannot be written"):
            board.write({"round": 1, "time": 1.0, "train/loss": 0.5})
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), board._events._py_recordio_writer._writer.fileno()
        )
    with pytest.raises(DiskError, match="cannot be written"):
        Board(tmp_path / "metrics.jsonl" / "below", None)
    with pytest.raises(DiskError, match="Not a directory"):
        run_folder.open_workdir(str(tmp_path / "traces" / "run"), small(), "auto")
