"""A service in this process, clients with the tokens of its users, and a PostgreSQL server."""

import contextlib
import glob
import json
import os
import shutil
import subprocess
import tempfile
import types

import pytest
from starlette.testclient import TestClient

from spear_jax.service.app import make_app
from spear_jax.service.hub import Settings


class Clock:
    """A time that stands still."""

    def __init__(self, now=1e9):
        self.now = now

    def __call__(self):
        return self.now


def client(at, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    found = TestClient(at.app, headers=headers, raise_server_exceptions=False)
    found.portal = at.nobody.portal  # the loop of the first
    return found


@contextlib.contextmanager
def service(folder, **settings):
    """`.app`, `.tokens` by name, and clients: `.trainer`, `.admin`, `.people`, `.nobody`."""
    app = make_app(Settings(folder=folder, **settings))
    tokens = json.loads((folder / "tokens.json").read_text())["users"]
    tokens = {one["name"]: one["token"] for one in tokens}
    at = types.SimpleNamespace(app=app, tokens=tokens)
    with TestClient(app, raise_server_exceptions=False) as at.nobody:
        at.trainer, at.admin = client(at, tokens["trainer"]), client(at, tokens["admin"])
        at.people = [client(at, tokens[name]) for name in tokens if name.startswith("person")]

        def open_run(run="r", **more):
            body = {"run": run, "task": "facts", "clients": 2, "rounds": 3} | more
            return at.trainer.post("/api/runs", json=body)

        at.open = open_run
        yield at


@contextlib.contextmanager
def postgresql():
    """The URL of a server of Debian's packages, which ends with the block."""
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql; apt-get install postgresql")
    pytest.importorskip("psycopg")
    if os.geteuid() == 0 and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    ours = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = tempfile.mkdtemp(prefix="spear-jax-pg-")
    data = f"{folder}/data"

    def run(program, *args):
        command = [*ours, f"{programs[-1]}/{program}", *args]
        subprocess.run(command, check=True, capture_output=True, cwd="/", timeout=60)

    try:
        if ours:
            shutil.chown(folder, "postgres")
        run("initdb", "-D", data, "-U", "me", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-c listen_addresses='' -k {folder} -c fsync=off"
        run("pg_ctl", "-D", data, "-w", "-o", options, "-l", f"{folder}/log", "start")
        yield f"postgresql+psycopg://me@/postgres?host={folder}"
        run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
