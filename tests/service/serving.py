"""A service in this process, and clients with the tokens of its users."""

import contextlib
import json
import types

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
