"""A superlink and supernodes of Flower as processes of this machine, without TLS.

    with Deployment(folder, nodes=3) as there:
        there.run(config, deadline=600)

launch/flower.sh does the same with TLS and keys.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

from processes import environment

from spear_jax.flower.__main__ import pyproject
from spear_jax.flower.terms import Terms

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
START = "import sys; from {} import {} as main; sys.argv[0] = {!r}; sys.exit(main())"
PROGRAMS = {
    "flower-superlink": ("flwr.superlink.cli", "flower_superlink"),
    "flower-supernode": ("flwr.supernode.cli", "flower_supernode"),
    "flwr": ("flwr.cli.app", "app"),
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Deployment:
    """Args: folder: for logs, and for what the processes keep; nodes: supernodes, client by client."""

    def __init__(self, folder, nodes=3):
        self.folder, self.count, self.port = pathlib.Path(folder), nodes, free_port()
        self.processes = {}
        self.environment = environment() | QUIET | {"FLWR_HOME": str(self.folder / "home")}
        # Flower starts flwr-serverapp and its like by name
        self.environment["PATH"] = os.pathsep.join([*_flower_scripts(), self.environment["PATH"]])

    def __enter__(self):
        (self.folder / "home").mkdir(parents=True)
        address = f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        connection = f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{address}'
        (self.folder / "home/config.toml").write_text(connection)
        self.start_server()
        for client in range(self.count):
            self.start_node(client)
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def start(self, name, program, *arguments, **more):
        """Starts a program in a session of its own, so that what it starts ends with it.

        Args: more: of its environment.
        """
        log = (self.folder / f"{name}.log").open("a")
        command = [sys.executable, "-c", START.format(*PROGRAMS[program], program), *arguments]
        self.processes[name] = subprocess.Popen(
            command, env=self.environment | more, stdout=log, stderr=log, start_new_session=True
        )

    def start_server(self):
        self.start(
            "superlink", "flower-superlink", "--insecure", "--host=127.0.0.1",
            f"--port={self.port}", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        until = time.monotonic() + 120
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert time.monotonic() < until, (self.folder / "superlink.log").read_text()
                time.sleep(0.2)

    def start_node(self, client, config="", port=None, **more):
        """Args: port: of the superlink, or of what stands before it; more: of its environment."""
        self.start(
            f"node{client}", "flower-supernode", "--insecure", "--host=127.0.0.1",
            f"--superlink=127.0.0.1:{port or self.port}", f"--port={free_port()}",
            f'--node-config=client={client} folder="{self.folder}/node{client}" {config}',
            **more,
        )  # fmt: skip

    def kill(self, name):
        """SIGKILL to a process and all that it has started."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def kill_started(self, program):
        """SIGKILL to what the superlink or a supernode has started; returns how many there were."""
        killed = 0
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                ours = f"FLWR_HOME={self.folder}/home".encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if ours and any(word.endswith(program.encode()) for word in words):
                os.kill(int(folder.name), signal.SIGKILL)
                killed += 1
        return killed

    def run(self, config, workdir, wait=True, **terms):
        """`flwr run` of a config; returns its process."""
        app = self.folder / "app"
        app.mkdir(exist_ok=True)
        terms = Terms(json.dumps(config.to_dict()), str(workdir), **terms)
        (app / "pyproject.toml").write_text(pyproject(config, terms))
        self.start("run", "flwr", "run", str(app), "here", "--stream")
        if wait:
            self.processes["run"].wait()
        return self.processes["run"]


class Relay(threading.Thread):
    """Stands before a port of this machine, and keeps all bytes that go through.

    Attributes: port; seen: the bytes of each connection and direction.
    """

    def __init__(self, port):
        super().__init__(daemon=True)
        self.behind, self.seen, self.listener = port, [], socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            one, _ = self.listener.accept()
            try:
                other = socket.create_connection(("127.0.0.1", self.behind))
            except OSError:  # it has ended
                one.close()
                continue
            for ends in ((one, other), (other, one)):
                self.seen.append(bytearray())
                args = (*ends, self.seen[-1])
                threading.Thread(target=self._carry, args=args, daemon=True).start()

    def _carry(self, source, target, seen):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                seen += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def _flower_scripts():
    """Folders with Flower's scripts, where they are not beside this Python."""
    import flwr

    beside = pathlib.Path(flwr.__file__).parents[1] / "bin"
    return [str(beside)] if (beside / "flwr-clientapp").exists() else []
