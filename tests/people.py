"""A service in a process of its own, and people who answer it.

Imported by tests that have made sure of the extra `live`.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time

import httpx
from processes import environment

from spear_jax.tasks import get_task

TASK = get_task("few_facts")


@contextlib.contextmanager
def serve(folder, *flags):
    """The service at a free port: (url, tokens by name)."""
    command = [sys.executable, "-m", "spear_jax.serve", f"--folder={folder}", *flags]
    command += ["--port=0", "--undo=0"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    url = process.stdout.readline().split()[-1].partition("/?")[0]
    users = json.loads((folder / "tokens.json").read_text())["users"]
    yield url, {user["name"]: user["token"] for user in users}
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


class Person(threading.Thread):
    """Somebody who leases, and says right or wrong of what they know, with a hint."""

    def __init__(self, url, token, examples, most=10**9):
        super().__init__(daemon=True)
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=30)
        self.known = {TASK.question(example): example for example in examples}
        self.most, self.ids, self.done = most, [], threading.Event()

    def run(self):
        while not self.done.is_set() and len(self.ids) < self.most:
            reply = self.client.post("/api/lease")
            if reply.status_code != 200:
                time.sleep(0.05)
                continue
            item = reply.json()
            example = self.known[item["question"]]
            assert item["right"] == example.options[example.gold]
            right = TASK.grade(item["answer"], example)
            hint = None if right else TASK.hint(example, 3)
            body = {"verdict": "right" if right else "wrong", "hint": hint}
            if item["asks"] == "hint":
                assert not right
                body["verdict"] = None
            self.client.put(f"/api/answers/{item['id']}", json=body).raise_for_status()
            self.ids.append(item["id"])
