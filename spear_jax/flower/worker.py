"""A process that stays on a node between rounds, so that only the first one imports and builds.

Flower starts the ClientApp anew for every message. The ClientApp imports no JAX. It hands the
request to this process, through a socket that the node's user alone can reach, and passes on what
comes back. In the node's folder:

    worker.json     its process, its socket, and whom it works for
    worker.log      what it prints
    worker.lock     taken by the ClientApp that asks it

It ends when nobody has asked for a while, and when its supernode is gone.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Client, Connection
from typing import Any

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from spear_jax import __version__
from spear_jax.core.files import write_whole, writing
from spear_jax.flower.terms import Terms, folder_of

IDLE = 600.0  # seconds without a request, after which it ends: many times what its start takes
START = 300.0  # seconds that its start may take
GREETING = 10.0  # seconds until it takes a request; nobody else asks it meanwhile
LONGEST = 1e6  # seconds that a poll can wait


class Lost(Exception):
    """A worker that has not answered; says why, without any text of a client."""


def ask(
    records: RecordDict,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    idle: float = IDLE,
    supernode: int | None = None,
) -> RecordDict:
    """Has the node's worker answer a request. It is started where there is none, and anew where it
    is stuck or works for another run, config or version.

    Args:
        idle: seconds without a request, after which a worker that is started ends.
        supernode: the process with which it ends; by default the one that started this one.
    Raises: UserError for a node without a folder, Lost for a worker that ends or is not done within
        the round's deadline.
    """
    folder, deadline = folder_of(node_config), Terms.read(run_config).deadline
    run = records["asked"].get("run") if "asked" in records else None
    configs = json.dumps([dict(node_config), dict(run_config)])
    task = hashlib.sha256(f"{__version__} {run} {configs}".encode()).hexdigest()
    with _alone(folder):
        worker = _find(folder, task) or _start(folder, task, idle, supernode or os.getppid())
        with worker.connection as there:
            try:
                there.send_bytes(configs.encode())
                there.send_bytes(recorddict_to_proto(records).SerializeToString())
                if there.poll(min(deadline, LONGEST)):
                    return _records(there.recv_bytes())
            except (EOFError, OSError):
                raise Lost("the node's worker has ended; its log may say why") from None
            worker.kill()
    raise Lost("the node was not done within the round's deadline")


@dataclasses.dataclass(frozen=True)
class _Worker:
    """A worker that is connected.

    Attributes: pid: its own as long as it is connected; home: the folder of its socket.
    """

    connection: Connection
    pid: int
    home: pathlib.Path

    def greets(self, seconds: float) -> bool:
        """Whether it takes a request."""
        with contextlib.suppress(EOFError, OSError):
            return self.connection.poll(seconds) and bool(self.connection.recv_bytes())
        return False

    def kill(self) -> None:
        """Ends it, and waits until it has."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(EOFError, OSError):
            while self.connection.recv_bytes():
                pass
        self.connection.close()
        shutil.rmtree(self.home, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other ClientApp asks the worker of a folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "worker.lock").open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        yield


def _find(folder: pathlib.Path, task: str) -> _Worker | None:
    """The worker that is there, where it takes requests of the task; any other one is ended."""
    try:
        there = json.loads((folder / "worker.json").read_text(encoding="utf-8"))
        home = pathlib.Path(there["socket"]).parent
        worker = _Worker(Client(there["socket"], "AF_UNIX"), there["pid"], home)
    except (FileNotFoundError, ValueError, KeyError):  # none was started, or it has ended
        return None
    except ConnectionRefusedError:  # it was killed
        shutil.rmtree(home, ignore_errors=True)
        return None
    if there["task"] == task and worker.greets(GREETING):
        return worker
    worker.kill()
    return None


def _start(folder: pathlib.Path, task: str, idle: float, supernode: int) -> _Worker:
    """Starts a worker for a task. Its socket is open before it is, in a folder of the user's own."""
    home = tempfile.mkdtemp(prefix="spear-jax-worker-")
    address = os.path.join(home, "socket")
    command = [sys.executable, "-m", "spear_jax.flower.worker", str(idle), str(supernode)]
    with socket.socket(socket.AF_UNIX) as listener, writing(folder / "worker.log"):
        listener.bind(address)
        listener.listen()
        connection = Client(address, "AF_UNIX")
        with (folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=listener, stdout=log, stderr=log, start_new_session=True
            )
    there = {"pid": process.pid, "socket": address, "task": task}
    write_whole(folder / "worker.json", json.dumps(there) + "\n")
    worker = _Worker(connection, process.pid, pathlib.Path(home))
    if worker.greets(START):
        return worker
    worker.kill()
    raise Lost("the node's worker does not start; its log may say why")


def _records(sent: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(sent))


# The process itself


def main(idle: float, supernode: int) -> None:
    """Answers requests that come through the socket at stdin."""
    from spear_jax.flower.node import Answers

    with socket.socket(fileno=sys.stdin.fileno()) as listener:
        home = pathlib.Path(listener.getsockname()).parent
        threading.Thread(target=_end_with, args=(supernode, home), daemon=True).start()
        listener.settimeout(idle)
        answers = None
        while True:
            try:
                connection = Connection(listener.accept()[0].detach())
            except TimeoutError:
                break
            with connection, contextlib.suppress(EOFError, OSError):  # the ClientApp has ended
                connection.send_bytes(b"ready")
                configs = json.loads(connection.recv_bytes())  # the same for each request
                answers = answers or Answers(*configs)
                reply = answers.reply(_records(connection.recv_bytes()))
                connection.send_bytes(recorddict_to_proto(reply).SerializeToString())
    shutil.rmtree(home, ignore_errors=True)


def _end_with(supernode: int, home: pathlib.Path) -> None:
    """Ends this process, whatever it does, when the supernode is gone."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "pidfd_open"):  # of Linux; also where nobody has taken note of its end
            select.select([os.pidfd_open(supernode)], [], [])
        while not hasattr(os, "pidfd_open"):
            os.kill(supernode, 0)
            time.sleep(1.0)
    shutil.rmtree(home, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
