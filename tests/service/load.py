"""How the service bears a crowd, and whether it loses anything when it is killed among them.

    python tests/service/load.py --requests=10000 --people=200 --kills=10
    python tests/service/load.py --requests=10000 --people=200 --kills=10 --postgres

People lease and answer as fast as they are served. In between the service is ended by SIGKILL and
started again. At the end every answer that a person was told to be kept is with the trainer, once,
and as it was given. Prints one JSON line: pairs of lease and answer a second, and seconds of a pair
by quantile, without those that a kill fell into.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import httpx
import numpy as np
from serving import postgresql


class Crowd:
    def __init__(self, url: str, tokens: dict[str, str], requests: int):
        self.url, self.requests = url, requests
        self.headers = {name: {"Authorization": f"Bearer {x}"} for name, x in tokens.items()}
        self.kept: dict[str, str] = {}  # id -> the hint that was answered, of those told to be kept
        self.seconds: list[tuple[float, float]] = []  # (when, how long) of each pair
        self.done = False

    async def person(self, http: httpx.AsyncClient, name: str) -> None:
        headers, draw = self.headers[name], random.Random(name)
        while not self.done:
            began = time.monotonic()
            item = await self.call(http, "POST", "/api/lease", headers)
            if item is None:
                await asyncio.sleep(0.2 + 0.2 * draw.random())
                continue
            hint = f"{item['id']} by {name}"
            body = {"verdict": "wrong", "hint": hint}
            path = f"/api/answers/{item['id']}"
            if await self.call(http, "PUT", path, headers, body) is not None:
                assert self.kept.setdefault(item["id"], hint) == hint, f"{item['id']} twice"
                self.seconds.append((time.monotonic(), time.monotonic() - began))

    async def call(self, http, method, path, headers, body=None):
        """The reply's JSON; None for one without, and where a lease was lost to a kill."""
        while True:
            try:
                reply = await http.request(method, path, headers=headers, json=body)
            except httpx.TransportError:
                if self.done:
                    return None
                await asyncio.sleep(0.1)
                continue
            if reply.status_code in (429, 503):
                await asyncio.sleep(0.2)
            elif reply.status_code in (204, 403):
                return None
            else:
                assert reply.status_code == 200, reply.text
                return reply.json()

    async def trainer(self, http: httpx.AsyncClient) -> dict[str, str]:
        """Sends all requests and collects all answers. Returns {id: hint}."""
        headers = self.headers["trainer"]
        about = {"run": "load", "task": "load", "clients": 1, "rounds": 1, "asks": "verdict"}
        about |= {"show_right": False, "examples": []}
        await self.call(http, "POST", "/api/runs", headers, about)
        ids = [hashlib.sha256(str(i).encode()).hexdigest()[:24] for i in range(self.requests)]
        for begin in range(0, len(ids), 500):
            rows = [
                {"id": id, "client": 0, "attempt": 0, "question": f"What is {id}?"}
                | {"answer": "It is.", "right": None, "adapter": "round 0"}
                for id in ids[begin : begin + 500]
            ]
            body = {"run": "load", "round": 1, "requests": rows}
            await self.call(http, "POST", "/api/requests", headers, body)
        found: dict[str, str] = {}
        cursor = 0
        while len(found) < len(ids):
            path = f"/api/answers?run=load&after={cursor}&wait=5"
            reply = await self.call(http, "GET", path, headers)
            cursor = reply["cursor"]
            for one in reply["answers"]:
                assert one["id"] not in found, f"{one['id']} was delivered twice"
                found[one["id"]] = one["hint"]
        self.done = True
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


async def measure(args: argparse.Namespace, database: str | None) -> dict:
    with (
        tempfile.TemporaryDirectory() as folder,
        service(pathlib.Path(folder), args.people, database) as (url, again),
    ):
        users = json.loads((pathlib.Path(folder) / "tokens.json").read_text())["users"]
        crowd = Crowd(url, {user["name"]: user["token"] for user in users}, args.requests)
        outages: list[tuple[float, float]] = []

        async def kill() -> None:
            for number in range(args.kills):
                while len(crowd.kept) < (number + 1) * args.requests / (args.kills + 1):
                    await asyncio.sleep(0.05)
                began = time.monotonic()
                await asyncio.to_thread(again)
                outages.append((began, time.monotonic()))

        limits = httpx.Limits(max_connections=args.people + 10)
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:
            people = [crowd.person(http, f"person-{i}") for i in range(args.people)]
            found, *_ = await asyncio.gather(crowd.trainer(http), kill(), *people)
        seconds = time.monotonic() - began - sum(end - start for start, end in outages)
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
        print(json.dumps(asyncio.run(measure(args, database))))


if __name__ == "__main__":
    main()
