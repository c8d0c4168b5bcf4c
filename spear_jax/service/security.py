"""Who may do what, how often and how much: tokens, sessions, CSRF, rates, sizes, headers.

`Gate` stands before the routes. What it refuses reaches no route, and no body is read of somebody
who is not known.
"""

import asyncio
import collections
import hashlib
import hmac
import json
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

import itsdangerous
from starlette.datastructures import MutableHeaders

from spear_jax.core.errors import shown
from spear_jax.core.files import damaged, read_json_object, writing
from spear_jax.service.database import Refused, User

COOKIE = "spear_session"
SESSION_SECONDS = 30 * 24 * 3600
BODY_BYTES = 64 << 10  # of a person
TRAINER_BODY_BYTES = 8 << 20
BODY_SECONDS = 30.0  # in which a body must have come
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_log = logging.getLogger("uvicorn.error")
NOBODY = "-"  # the name of who sent no good token, in the audit log

Scope = MutableMapping[str, Any]


def digest(token: str) -> str:
    """Returns what is stored of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """Finds the user of a token or of a session, and signs sessions and CSRF values.

    Args:
        secret: signs; kept in the service's folder.
        users: by the digest of their token.
    """

    def __init__(self, secret: str, users: dict[str, User]):
        self._users = users
        self._sessions = itsdangerous.URLSafeTimedSerializer(secret, salt="session")
        self._csrf = itsdangerous.Signer(secret, salt="csrf", digest_method=hashlib.sha256)

    def of_token(self, token: str) -> User | None:
        """Returns the user whose token it is. Digests are compared, so the time that it takes tells
        nothing.
        """
        return self._users.get(digest(token))

    def session(self, token: str) -> str:
        """Returns the value of the cookie that a token is exchanged for."""
        return str(self._sessions.dumps([digest(token), secrets.token_hex(8)]))

    def of_session(self, cookie: str) -> User | None:
        """Returns the user of a session's cookie; None for one that is old or not ours."""
        try:
            known, _ = self._sessions.loads(cookie, max_age=SESSION_SECONDS)
            return self._users.get(known)
        except (itsdangerous.BadData, TypeError, ValueError):
            return None

    def csrf(self, cookie: str) -> str:
        """Returns what the page of this session must send along with every change."""
        return self._csrf.get_signature(cookie).decode()

    def check_csrf(self, cookie: str, given: str) -> None:
        """Raises: Refused(403) for another session's value, or none."""
        if not hmac.compare_digest(self.csrf(cookie).encode(), given.encode("utf-8", "replace")):
            raise Refused(
                403,
                "the header X-CSRF-Token is missing or of another session; load the page again.",
            )


class Buckets:
    """Token buckets by name: `rate` requests a second, five seconds' worth at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = 10_000):
        self._clock, self._most = clock, most
        self._levels: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def take(self, name: str, rate: float) -> None:
        """Takes one; raises Refused(429) from an empty bucket."""
        now = self._clock()
        level, then = self._levels.pop(name, (5 * rate, now))
        level = min(5 * rate, level + (now - then) * rate)
        self._levels[name] = (max(level - 1, 0.0) if level >= 1 else level, now)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)
        if level < 1:
            raise Refused(
                429, f"more than {rate:g} requests a second; wait a second and send it again."
            )


class Gate:
    """The ASGI layer before the routes.

    It sets `request.state.user` (None where nobody has to be known) and `request.state.cookie`.

    Args:
        app: what is behind.
        keys: finds users.
        buckets: limit their rates.
        rates: requests a second of a user by scope; the highest of a user's counts. "nobody" is for
            wrong tokens, by address.
        refused: counts (name of the user, status) of answers with an error.
    """

    def __init__(
        self,
        app: Any,
        keys: Keys,
        buckets: Buckets,
        rates: dict[str, float],
        refused: collections.Counter[tuple[str, int]],
    ):
        self.app, self.keys, self.buckets = app, keys, buckets
        self.rates, self.refused = rates, refused

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        static = scope["path"].startswith("/static/")
        state = scope.setdefault("state", {})
        state["user"] = state["cookie"] = None

        started = False

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["Cache-Control"] = "no-cache" if static else "no-store"
                if message["status"] >= 400:
                    user = state["user"]
                    self.refused[user.name if user else NOBODY, message["status"]] += 1
            await send(message)

        try:
            receive = await self._admit(scope, receive)
        except Refused as error:
            await respond(error.status, error.message, sent)
            return
        try:
            await self.app(scope, receive, sent)
        except Exception:
            _log.exception("a request failed")
            if started:
                raise
            await respond(500, "the service failed; its log says why.", sent)

    async def _admit(self, scope: Scope, receive: Callable) -> Callable:
        """Finds the user, and reads the body where there is one.

        Returns: a `receive` that gives the body.
        Raises: Refused.
        """
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        path, state = scope["path"], scope["state"]
        if path.startswith("/api/") or path == "/":
            self._identify(scope, headers)
        user = state["user"]
        if user is None:
            address = (scope.get("client") or ("?",))[0]
            if path.startswith("/api/"):
                self.buckets.take(f"address {address}", self.rates["nobody"])
                raise Refused(
                    401,
                    "no token that is known came with the request; send Authorization: Bearer "
                    "TOKEN, or open your link again.",
                )
        else:
            self.buckets.take(user.name, max(self.rates[name] for name in user.scopes))
        if scope["method"] in SAFE:
            return receive
        if user is None:
            return _given(b"")  # no route without a user takes a body
        if state["cookie"] is not None:
            given = headers.get(b"x-csrf-token", b"").decode("latin-1")
            self.keys.check_csrf(state["cookie"], given)
        most = TRAINER_BODY_BYTES if "trainer" in user.scopes else BODY_BYTES
        body = await _read(receive, headers.get(b"content-length"), most)
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if body and kind != b"application/json":
            raise Refused(
                422, f"the body is of type {shown(kind.decode('latin-1'))}; send application/json."
            )
        return _given(body)

    def _identify(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        state = scope["state"]
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind:
            if kind.lower() == "bearer":
                state["user"] = self.keys.of_token(token.strip())
            return
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return
        if COOKIE in cookies:
            state["user"] = self.keys.of_session(cookies[COOKIE].value)
            state["cookie"] = cookies[COOKIE].value if state["user"] else None


_READ = {b"authorization", b"cookie", b"content-length", b"content-type", b"x-csrf-token"}


async def _read(receive: Callable, length: bytes | None, most: int) -> bytes:
    """Reads a body of at most so many bytes. Of a larger one a little is thrown away, so that the
    sender can read the answer.
    """
    chunks: list[bytes] = []
    size = int(length) if length and length.isdigit() and len(length) < 19 else 0
    spare = most + (1 << 20)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            got, more = 0, True
            while more and got < spare:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused(400, "the connection ended before the body; send it again.")
                got += len(message.get("body", b""))
                more = message.get("more_body", False)
                if max(size, got) <= most:
                    chunks.append(message.get("body", b""))
    except TimeoutError:
        raise Refused(
            408, f"the body did not come within {BODY_SECONDS:.0f} seconds; send it again."
        ) from None
    if max(size, got) > most:
        raise Refused(
            413,
            f"the body has {max(size, got):,} bytes or more, and {most:,} are the most; send less "
            "at once.",
        )
    return b"".join(chunks)


def _given(body: bytes) -> Callable:
    """A `receive` that gives a body that was read."""
    left = [{"type": "http.request", "body": body, "more_body": False}]
    ended = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if left:
            return left.pop()
        await ended.wait()  # never: nothing of ours asks whether the connection has ended
        raise AssertionError

    return receive


async def respond(status: int, message: str, send: Callable) -> None:
    """Answers with an error."""
    body = error_body(message)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(message: str) -> bytes:
    """The JSON of an error, ASCII."""
    return json.dumps({"error": message}).encode()


def need(user: User | None, scopes: tuple[str, ...]) -> User:
    """Returns the user; Refused where they have none of the scopes."""
    if user is None:
        raise Refused(401, "no token that is known came with the request; open your link again.")
    if scopes and not user.scopes.intersection(scopes):
        raise Refused(
            403,
            f"{shown(user.name)} has the scope {', '.join(sorted(user.scopes))}, and this needs "
            f"{' or '.join(scopes)}; use the token of such a user.",
        )
    return user


# The tokens' file

TOKENS = "tokens.json"


def issue(folder: pathlib.Path, people: int, clients: int | None) -> dict[str, Any]:
    """Makes the tokens of a service, or keeps those that its folder holds.

    Args:
        people: persons person-0, person-1, ...; one that the folder knows beyond them stays.
        clients: person i is the client i % clients; None: of every client.
    Returns: {"secret", "users": [{"name", "scopes", "client", "token"}]}.
    Raises: UserError for a file that cannot be read.
    """
    file = folder / TOKENS
    remedy = "put it back as it was, or remove it for new tokens"
    kept = read_json_object(file, remedy) if file.exists() else {"secret": None, "users": []}
    try:
        known = {str(one["name"]): dict(one) for one in kept["users"]}
        assert all(isinstance(one["token"], str) and one["scopes"] for one in known.values())
        secret = kept["secret"] or secrets.token_urlsafe(32)
    except (AssertionError, KeyError, TypeError, ValueError):
        raise damaged(file, "is not a list of tokens", remedy) from None
    wanted: list[tuple[str, str, int | None]] = [
        ("trainer", "trainer", None),
        ("admin", "admin", None),
    ]
    wanted += [
        (f"person-{number}", "person", number % clients if clients else None)
        for number in range(people)
    ]
    for name, scope, client in wanted:
        token = known[name]["token"] if name in known else secrets.token_urlsafe(24)
        known[name] = {"name": name, "scopes": [scope], "client": client, "token": token}
    return {"secret": secret, "users": list(known.values())}


def write_tokens(folder: pathlib.Path, issued: dict[str, Any], url: str) -> list[tuple[str, str]]:
    """Writes the tokens' file, which its owner alone can read.

    Args: url: of the service, as `http://127.0.0.1:8765`.
    Returns: the name and the link of every user.
    """
    users = [one | {"url": f"{url}/?token={one['token']}"} for one in issued["users"]]
    file = folder / TOKENS
    temporary = file.with_name(f"{TOKENS}.tmp")
    with writing(file):
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(handle, "w", encoding="utf-8") as out:
            json.dump({"url": url, "secret": issued["secret"], "users": users}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    return [(one["name"], one["url"]) for one in users]


def users_of(issued: dict[str, Any]) -> dict[str, User]:
    """Returns the users of a tokens' file by the digest of their token."""
    return {
        digest(one["token"]): User(one["name"], frozenset(one["scopes"]), one["client"])
        for one in issued["users"]
    }
