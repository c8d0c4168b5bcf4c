"""The run folder: its config, made once and compared on every return, and the lock of the process
that writes to it.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, ClassVar

import jax
import ml_collections

from spear_jax.algorithms import ALGORITHMS
from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.files import damaged, read_json_object, write_whole, writing
from spear_jax.core.surroundings import say
from spear_jax.core.versions import commit, versions
from spear_jax.experiment.config import RENAMED, default_config, flatten


def open_workdir(
    workdir: str, config: ml_collections.ConfigDict, resume: str
) -> tuple[pathlib.Path, bool]:
    """Makes or checks the run folder.

    Args: resume: "auto" goes on where a run of the same config stopped, "never" insists on a new
        folder, "must" on an old.
    Returns: the folder; whether it holds an earlier run of this config.
    Raises: UserError for a folder of another config (naming the keys that differ), or against the
        resume mode, and where the folder cannot be made.
    """
    check_names(workdir, resume)
    folder = pathlib.Path(workdir)
    file = folder / "config.json"
    if file.exists():
        if resume == "never":
            raise UserError(
                f"{workdir} holds a run already; give a new --workdir, or --resume=auto to go on."
            )
        old, flat = flatten(read_run_config(folder)), flatten(config)
        others = tuple(f"{name}." for name in ALGORITHMS if name != config.algorithm.name)
        differing = sorted(
            name
            for name in old.keys() | flat.keys()
            if old.get(name) != flat.get(name)
            and not name.startswith(others)
            and name not in ELSEWHERE
            and (name, old.get(name), flat.get(name)) not in FORMER_DEFAULTS
        )
        if differing:
            changes = ", ".join(
                f"{name} ({shown(old.get(name))} there, {shown(flat.get(name))} now)"
                for name in differing
            )
            raise UserError(
                f"{workdir} holds a run of another config; differing: {changes}. Give a new "
                f"--workdir."
            )
        return folder, True
    if resume == "must":
        raise UserError(
            f"--resume=must, but {workdir} holds no run; check --workdir, or use --resume=auto."
        )
    make_folder(folder)
    write_whole(file, json.dumps(config.to_dict(), indent=1) + "\n")
    return folder, False


_PATTERNS = "*?[\\"  # Orbax finds its files by glob; what is no UTF-8 TensorStore cannot open


# where somebody is asked, not what: a service may have moved when a run goes on
ELSEWHERE = ("feedback.url", "feedback.token")


def check_names(workdir: str, resume: str) -> None:
    """Raises UserError for an unknown resume mode, and for a folder without a name or with one that
    checkpoints cannot have.
    """
    if resume not in ("auto", "never", "must"):
        raise unknown("resume mode", resume, ("auto", "never", "must"))
    if not workdir.strip():
        raise UserError("--workdir is empty; give a folder, for example --workdir=runs/first.")
    path = os.path.realpath(workdir)
    strange = [mark for mark in path if mark in _PATTERNS or 0xD800 <= ord(mark) < 0xE000]
    if strange:
        raise UserError(
            f"--workdir is {path[-200:]!r}, and no folder on the way may have {strange[0]!r} in its "
            "name: checkpoints there could not be read back. Give another folder, or rename that."
        )


def make_folder(folder: pathlib.Path) -> None:
    """Makes a run folder where there is none; raises DiskError where it cannot be."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def record_start(folder: pathlib.Path, chosen: dict[str, Any]) -> None:
    """Adds a line to environment.jsonl: when and with what this process goes on with the run.

    It holds time, command, versions, the commit of a checkout, and the devices.

    Args: chosen: settings that the run has chosen by the device's memory; the line holds them, too.
    """
    devices = [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
    entry = {
        "time": time.time(),
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "devices": {kind: devices.count(kind) for kind in dict.fromkeys(devices)},
        "chosen": chosen,
    }
    file = folder / "environment.jsonl"
    with writing(file), file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")


RETIRED = (
    ("rollout", "segment"),
)  # fields of older versions that changed speed alone; they are dropped


# (field, default of older versions, default now) that differ in speed alone
FORMER_DEFAULTS = (
    ("rollout.max_concurrent_sequences", 64, 0),
    ("train.remat", "layers", "auto"),
    ("train.max_tokens_per_block", 4096, 0),
)


def read_run_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The resolved config of a run folder, fields that are younger than the run at their defaults.

    Raises: UserError where there is none, and where it is no config.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder} is no run folder: it has no config.json. Give the --workdir of a `train` "
            f"command."
        )
    saved, config = read_json_object(file), default_config()
    for name, value in config.items():
        given = saved.get(name, {})
        if isinstance(value, ml_collections.ConfigDict) and not isinstance(given, dict):
            what = f"is no config of a run: {name} is {shown(given)}, not a group of settings"
            raise damaged(file, what)
    for group, name in RETIRED:
        saved.get(group, {}).pop(name, None)
    for old, new in RENAMED.items():
        _move(saved, old.split("."), new.split("."))
    try:
        with config.unlocked():  # a field that is no longer there stays to be seen, and differs
            config.update(saved)
    except (AttributeError, TypeError, ValueError) as error:
        raise damaged(file, f"is no config of a run ({shown(str(error), 200)})") from error
    return config


def _move(saved: dict[str, Any], old: list[str], new: list[str]) -> None:
    """Gives a field of a saved config its present name."""
    *groups, name = old
    for group in groups:
        saved = saved.get(group, {})
    if name in saved:
        saved[new[-1]] = saved.pop(name)


# Two hands on one folder

LOCK = "lock"
GRACE = 3.0  # seconds that a process may take to die before its folder is refused
_IN_USE = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class InUse(UserError):
    """Another process writes to the folder."""


class FolderLock:
    """The right to write to a run folder, which one process has at a time.

    It is a POSIX lock on the file `lock`. The system frees it when its process ends, however that
    comes about, and NFS knows it. On a file system without locks a note says so, and nobody is
    refused. Who only reads needs none.

    In one process the newest taker has it: a notebook's cell, run again, goes on where the run
    that it left was.

    Args:
        folder: the run folder.
        finish: called before another object of this process reads the folder: waits until what
            was begun is written.
        leave: called before another object of this process takes the lock; releases this one
            (None: nothing but that).
    """

    _of_this_process: ClassVar[dict[str, "FolderLock"]] = {}

    def __init__(
        self,
        folder: pathlib.Path,
        finish: Callable[[], None] = lambda: None,
        leave: Callable[[], None] | None = None,
    ):
        self.folder, self.file = folder, folder / LOCK
        self.finish, self.leave = finish, leave or self.release
        self._held: IO[str] | None = None
        self._name = ""

    def take(self) -> None:
        """Takes the lock.

        Raises: InUse where another process has it, naming that; DiskError where the file cannot be
            written.
        """
        name = os.path.realpath(self.folder)
        owner = self._of_this_process.get(name)
        if owner is self:
            return
        if owner is not None:
            owner.leave()
        with writing(self.file):
            file = self.file.open("a+", encoding="utf-8", errors="replace")
            try:
                if not self._wait(file):
                    raise InUse(
                        f"{self.folder} is in use by {_holder(file)}, and two processes would "
                        "write the same rounds. Wait until that one ends, stop it, or give "
                        "another --workdir; `evaluate`, `export` and `report` read the folder "
                        "meanwhile."
                    )
                file.truncate(0)
                me = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
                file.write(json.dumps(me) + "\n")
                file.flush()
            except BaseException:
                with contextlib.suppress(OSError):
                    file.close()
                raise
        self._held, self._name = file, name
        self._of_this_process[name] = self

    def release(self) -> None:
        """Gives the lock back, if this object has it."""
        if self._held is None:
            return
        held, self._held = self._held, None
        if self._of_this_process.get(self._name) is self:
            del self._of_this_process[self._name]
        with contextlib.suppress(OSError):
            held.close()

    @contextlib.contextmanager
    def while_opening(self) -> Iterator[None]:
        """Keeps other processes out while the folder is made or checked.

        An object of this process that is writing stays what it is, and has finished what it began.

        Raises: as `take`.
        """
        owner = self._of_this_process.get(os.path.realpath(self.folder))
        if owner is not None:
            owner.finish()
        if owner is not None or not self.folder.is_dir():
            yield
            return
        self.take()
        try:
            yield
        finally:
            self.release()

    def check_free(self) -> None:
        """Raises InUse where another process has the lock; makes neither folder nor file."""
        if self.file.is_file():
            with self.while_opening():
                pass

    def check(self) -> None:
        """Raises UserError where another object of this process has taken the lock since, and where
        the folder is no longer there.
        """
        if self._held is None:
            raise UserError(
                f"another Run of this process has gone on with {self.folder}; iterate over that "
                "one, or over this one anew."
            )
        try:
            same = os.path.samestat(os.fstat(self._held.fileno()), os.stat(self.file))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.folder} (or its file {LOCK}) has been removed, moved or replaced while its "
                "run went on. Put it back and give the same command again, or give a new --workdir."
            )

    def _wait(self, file: IO[str]) -> bool:
        """Whether the lock is there within the grace."""
        until = time.monotonic() + GRACE
        while not (taken := _lock(file, self.folder)) and time.monotonic() < until:
            time.sleep(0.05)
        return taken


def _lock(file: IO[str], folder: pathlib.Path) -> bool:
    """Tries once; True also where the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IN_USE:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        _note_no_locks(folder, str(error.strerror))
    return True


@functools.cache
def _note_no_locks(folder: pathlib.Path, why: str) -> None:
    """Says so, once for a folder."""
    say(
        f"note: the file system of {folder} has no locks ({why}); see to it that one process alone "
        "writes there",
        sys.stderr,
    )


def _holder(file: IO[str]) -> str:
    """The process that has the lock, in words."""
    try:
        file.seek(0)
        found = json.loads(file.readline(1000))
        return f"process {found['pid']} on host {found['host']} (since {found['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
