"""How the service bears a crowd, and whether it loses anything when it is killed among them.

    python tests/service/load.py --requests=10000 --people=200 --kills=10
    python tests/service/load.py --requests=10000 --people=200 --kills=10 --postgres

People lease and answer as fast as they are served. In between the service is ended by SIGKILL and
started again. At the end every answer that a person was told to be kept is with the trainer, once,
and as it was given. Prints one JSON line: pairs of lease and answer a second, and seconds of a pair
by quantile, without those that a kill fell into.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import numpy as np
from serving import postgresql

BROKEN = (OSError, http.client.HTTPException)


class Caller:
    """One person's connection, of the standard library: a richer client would take more of the
    machine than the service does.
    """

    def __init__(self, address: str, token: str, over: threading.Event):
        self.address, self.over = address, over
        self.headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.connection: http.client.HTTPConnection | None = None

    def call(self, method: str, path: str, body=None):
        """The reply's JSON; None for one without, and where a lease was lost to a kill."""
        while not self.over.is_set():
            try:
                self.connection = self.connection or http.client.HTTPConnection(
                    self.address, timeout=60
                )
                self.connection.request(method, path, body and json.dumps(body), self.headers)
                reply = self.connection.getresponse()
                text, status = reply.read(), reply.status
            except BROKEN:
                if self.connection is not None:
                    self.connection.close()
                self.connection = None
                time.sleep(0.1)
                continue
            if status in (429, 503):
                time.sleep(0.2)
            elif status in (204, 403):
                return None
            else:
                assert status == 200, text
                return json.loads(text)
        return None


class Crowd:
    def __init__(self, address: str, tokens: dict[str, str], requests: int):
        self.requests, self.over = requests, threading.Event()
        self.callers = {name: Caller(address, token, self.over) for name, token in tokens.items()}
        self.kept: dict[str, str] = {}  # id -> the hint that was answered, of those told to be kept
        self.seconds: list[tuple[float, float]] = []  # (when, how long) of each pair

    def person(self, name: str) -> None:
        caller, draw = self.callers[name], random.Random(name)
        while not self.over.is_set():
            began = time.monotonic()
            item = caller.call("POST", "/api/lease")
            if item is None:
                time.sleep(0.2 + 0.2 * draw.random())
                continue
            hint = f"{item['id']} by {name}"
            body = {"verdict": "wrong", "hint": hint}
            if caller.call("PUT", f"/api/answers/{item['id']}", body) is not None:
                assert self.kept.setdefault(item["id"], hint) == hint, f"{item['id']} twice"
                self.seconds.append((time.monotonic(), time.monotonic() - began))

    def trainer(self) -> dict[str, str]:
        """Sends all requests and collects all answers. Returns {id: hint}."""
        caller = self.callers["trainer"]
        about = {"run": "load", "task": "load", "clients": 1, "rounds": 1, "asks": "verdict"}
        caller.call("POST", "/api/runs", about | {"show_right": False, "examples": []})
        ids = [hashlib.sha256(str(i).encode()).hexdigest()[:24] for i in range(self.requests)]
        for begin in range(0, len(ids), 500):
            rows = [
                {"id": id, "client": 0, "attempt": 0, "question": f"What is {id}?"}
                | {"answer": "It is.", "right": None, "adapter": "round 0"}
                for id in ids[begin : begin + 500]
            ]
            caller.call("POST", "/api/requests", {"run": "load", "round": 1, "requests": rows})
        found: dict[str, str] = {}
        cursor = 0
        while len(found) < len(ids):
            reply = caller.call("GET", f"/api/answers?run=load&after={cursor}&wait=5")
            cursor = reply["cursor"]
            for one in reply["answers"]:
                assert one["id"] not in found, f"{one['id']} was delivered twice"
                found[one["id"]] = one["hint"]
        self.over.set()
        assert set(found) == set(ids)
        return found


@contextlib.contextmanager
def service(folder: pathlib.Path, people: int, database: str | None):
    """Yields the address and a function that kills the process and starts it again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "spear_jax.serve", f"--folder={folder}", f"--port={port}"]
    command += [f"--people={people}", "--undo=0", "--quiet"]
    command += [f"--database={database}"] if database else []
    url, held = f"http://127.0.0.1:{port}", []

    def start() -> None:
        held.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{url}/healthz").raise_for_status()
            assert held[-1].poll() is None, "the service has ended"
            time.sleep(0.05)

    def again() -> None:
        os.kill(held[-1].pid, signal.SIGKILL)
        held[-1].wait()
        start()

    start()
    try:
        yield url, again
    finally:
        held[-1].terminate()
        held[-1].wait(30)


def measure(args: argparse.Namespace, database: str | None) -> dict:
    with (
        tempfile.TemporaryDirectory() as folder,
        service(pathlib.Path(folder), args.people, database) as (url, again),
        concurrent.futures.ThreadPoolExecutor(args.people + 2) as threads,
    ):
        users = json.loads((pathlib.Path(folder) / "tokens.json").read_text())["users"]
        tokens = {user["name"]: user["token"] for user in users}
        crowd = Crowd(url.partition("//")[2], tokens, args.requests)
        outages: list[tuple[float, float]] = []

        def kill() -> None:
            for number in range(args.kills):
                while len(crowd.kept) < (number + 1) * args.requests / (args.kills + 1):
                    time.sleep(0.05)
                began = time.monotonic()
                again()
                outages.append((began, time.monotonic()))

        began = time.monotonic()
        others = [threads.submit(crowd.person, f"person-{i}") for i in range(args.people)]
        others.append(threads.submit(kill))
        try:
            found = crowd.trainer()
        finally:
            crowd.over.set()
        seconds = time.monotonic() - began - sum(end - start for start, end in outages)
        for one in others:
            one.result()
    # of an answer on its way when the process was killed nobody was told; it may be there
    assert all(found[id] == hint for id, hint in crowd.kept.items())
    assert all(hint.startswith(f"{id} by person-") for id, hint in found.items())
    whole = [
        took
        for when, took in crowd.seconds
        if not any(start < when and when - took < end + 1 for start, end in outages)
    ]
    p50, p99 = np.quantile(whole, [0.5, 0.99]).round(3).tolist()
    return {
        "database": "postgresql" if database else "sqlite",
        "people": args.people,
        "answers": len(found),
        "kills": len(outages),
        "lost": len(crowd.kept.keys() - found.keys()),
        "pairs_per_second": round(len(found) / seconds, 1),
        "p50": p50,
        "p99": p99,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--postgres", action="store_true", help="a server of Debian's packages")
    args = parser.parse_args()
    with postgresql() if args.postgres else contextlib.nullcontext() as database:
        print(json.dumps(measure(args, database)))


if __name__ == "__main__":
    main()
