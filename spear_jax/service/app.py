"""The API of the service, and the page.

One process of uvicorn serves it: what waits for news waits for a bell of this process, and the
rates are counted here. Several processes on one database are not supported.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import secrets
import time
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, TypeVar

import fastapi
import jinja2
import pydantic
import sqlalchemy as sa
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException

from spear_jax.core.errors import shown
from spear_jax.service import security
from spear_jax.service.agreement import agreement
from spear_jax.service.security import COOKIE, Buckets, Gate, Keys
from spear_jax.service.store import Call, Refused, Store, User
from spear_jax.service.webhooks import Webhooks

PAGE = pathlib.Path(__file__).parent / "page"
WRITES = 100  # calls of one transaction
LONGEST_WAIT = 25.0  # seconds of a long poll
RATES = {"person": 100.0, "trainer": 500.0, "admin": 100.0, "nobody": 50.0}  # requests a second

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a service is made with.

    Attributes:
        folder: holds the tokens, and the database where no other is given.
        database: URL of SQLAlchemy; None is `feedback.db` in the folder.
        address: of the service, as people reach it; stands in the links.
        people: how many persons get a token.
        clients: person i is client i % clients; None: they take requests of every client.
        voices: how many people each request is put to.
        lease: seconds for which a person holds a request.
        undo: seconds for which an answer is kept back from the trainer, so that it can be undone;
            0 hands it out at once.
        rates: requests a second by scope.
    """

    folder: pathlib.Path
    database: str | None = None
    address: str = "http://127.0.0.1:8765"
    people: int = 1
    clients: int | None = None
    voices: int = 1
    lease: float = 120.0
    undo: float = 0.0
    rates: dict[str, float] = dataclasses.field(default_factory=lambda: dict(RATES))

    @property
    def url(self) -> str | sa.URL:
        """Of the database."""
        file = self.folder / "feedback.db"
        return self.database or sa.URL.create("sqlite", database=str(file.absolute()))


class Bell:
    """Wakes who waits for a topic."""

    def __init__(self) -> None:
        self._events: weakref.WeakValueDictionary[str, asyncio.Event] = (
            weakref.WeakValueDictionary()
        )
        self.closed = False

    def listen(self, topic: str) -> asyncio.Event:
        """Returns what the next ring of a topic sets. Ask before you look, so that no ring between
        is missed.
        """
        event = self._events.get(topic)
        if event is None:
            event = self._events[topic] = asyncio.Event()
        return event

    def ring(self, *topics: str) -> None:
        """Wakes all who listen to one of the topics."""
        for topic in topics:
            event = self._events.pop(topic, None)
            if event is not None:
                event.set()

    def close(self) -> None:
        """Wakes everybody; nobody waits any more."""
        self.closed = True
        self.ring(*self._events)


class Service:
    """What the routes have in common: the store, who waits, and who may.

    Raises: UserError for a database or a file of tokens that cannot be used.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.issued = security.issue(settings.folder, settings.people, settings.clients)
        self.store = Store(settings.url, settings.lease, settings.voices)
        users = security.users_of(self.issued)
        self.store.set_users(users)
        self.links = security.write_tokens(settings.folder, self.issued, settings.address)
        self.keys = Keys(self.issued["secret"], users)
        self.bell, self.webhooks, self.buckets = Bell(), Webhooks(), Buckets()
        self.refused: collections.Counter[tuple[str, int]] = collections.Counter()
        self.version = time.time_ns() // 1_000_000  # higher than that of an earlier process
        self._status: tuple[int, dict[str, Any]] = (-1, {})
        self._waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.counts: dict[str, int] = {}  # of the database, at the end
        self._queue: list[tuple[Call, asyncio.Future[Any]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._threads = concurrent.futures.ThreadPoolExecutor(8, "store")
        self._at_hand = self.store.engine.dialect.name == "sqlite"
        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), autoescape=True)
        self.page = environment.get_template("index.html")

    async def call(self, method: Callable[..., T], *given: Any) -> T:
        """Calls a method of the store. What it writes is on disk when this returns.

        Calls that write and come while another is on its way to the disk go there together. SQLite
        is asked from the loop's own thread: two threads that compute take Python's lock from one
        another, which costs more than the statements. Its commits, which wait for the disk, and
        other databases have threads.
        """
        within = getattr(method, "within", None)
        if within is None:
            return method(*given) if self._at_hand else await self._in_thread(method, *given)
        future = asyncio.get_running_loop().create_future()
        self._queue.append(((functools.partial(within, self.store), given), future))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all())
        return await future

    async def _in_thread(self, function: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *given)

    async def _write_all(self) -> None:
        """Writes what is queued, in the order in which it came."""
        while self._queue:
            queued, self._queue = self._queue[:WRITES], self._queue[WRITES:]
            try:
                outcomes = await self._write([call for call, _ in queued])
            except Exception as error:  # the database is gone
                outcomes = [error] * len(queued)
            for (_, future), outcome in zip(queued, outcomes, strict=True):
                if future.done():  # who asked has gone
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    async def _write(self, calls: list[Call]) -> list[Any]:
        if self._at_hand:
            with contextlib.suppress(sa.exc.OperationalError), self.store.engine.connect() as on:
                outcomes = self.store.make(on, calls)
                await self._in_thread(on.commit)
                return outcomes
        return await self._in_thread(self.store.write, calls)

    def changed(self, *topics: str) -> None:
        """Tells who waits that the state is another."""
        self.version += 1
        self.bell.ring("status", *topics)

    async def wait(
        self,
        topic: str,
        seconds: float,
        look: Callable[[], Any],
        later: Callable[[], float | None] = lambda: None,
    ) -> Any:
        """Looks until there is something, for so many seconds.

        Args:
            look: a coroutine function; what it returns is returned as soon as it is true.
            later: the seconds until something comes by itself.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        while True:
            event = self.bell.listen(topic)
            found = await look()
            left = ends - loop.time()
            if found or left <= 0 or self.bell.closed:
                return found
            soon = later()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left if soon is None else min(left, max(soon, 0.001))):
                    await event.wait()
                    await asyncio.sleep(min(0.02, left))  # what comes together goes together

    async def status(self) -> dict[str, Any]:
        """Returns the state without "mine"; it is computed once for all who ask."""
        version = self.version
        if self._status[0] != version:
            self._status = (version, await self.call(self.store.status))
        known, status = self._status
        return status | {"version": known}

    async def wait_for_change(self, seen: int, seconds: float) -> None:
        """Waits until the state is another than `seen`. The more wait, the rarer they are told."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        self._waiting += 1
        try:
            while self.version == seen and not self.bell.closed and loop.time() < ends:
                event = self.bell.listen("status")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ends - loop.time()):
                        await event.wait()
                        await asyncio.sleep(0.05 + self._waiting / 100)
        finally:
            self._waiting -= 1

    def end(self) -> None:
        """Sends everybody away who waits; may be called from a signal's handler."""
        self.bell.closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.bell.close)

    async def write_refused(self) -> None:
        """Writes the counts of refused requests into the audit log."""
        counts = dict(self.refused)
        self.refused.clear()
        notes = [
            {"who": who, "what": "refused", "note": f"{count} with status {status}"}
            for (who, status), count in counts.items()
        ]
        if notes:
            await self.call(self.store.note, notes)

    async def note(self, who: str, what: str, note: str | None = None) -> None:
        """Writes a line of the audit log."""
        await self.call(self.store.note, [{"who": who, "what": what, "note": note}])

    @contextlib.asynccontextmanager
    async def lifespan(self, _: fastapi.FastAPI) -> AsyncIterator[None]:
        """Counts what is refused as long as the service runs, and ends all at its end."""

        async def keep_counting() -> None:
            while True:
                await asyncio.sleep(5)
                with contextlib.suppress(sa.exc.SQLAlchemyError):
                    await self.write_refused()

        self._loop = asyncio.get_running_loop()
        counting = asyncio.create_task(keep_counting())
        yield
        self.bell.close()
        counting.cancel()
        await self.webhooks.close()
        with contextlib.suppress(sa.exc.SQLAlchemyError):
            await self.write_refused()
        self.counts = await self.call(self.store.counts)
        if self._writer is not None:
            await self._writer
        self._threads.shutdown()
        self.store.close()


# What comes in


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds the character NUL, which no database keeps")
    return text


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("it holds characters that cannot be printed; use others")
    return name


def _addressable(name: str) -> str:
    if {".", "..", ""} & set(_printable(name).split("/")):
        raise ValueError("it cannot stand in an address; leave out '.', '..' and empty parts")
    return name


def text(longest: int, shortest: int = 0) -> Any:
    """The type of a text of so many characters."""
    size = pydantic.StringConstraints(min_length=shortest, max_length=longest)
    return Annotated[str, size, pydantic.AfterValidator(_plain)]


Id = Annotated[text(64, 1), pydantic.AfterValidator(_addressable)]
Name = Annotated[text(200, 1), pydantic.AfterValidator(_printable)]
Number = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
Verdict = Literal["right", "wrong"]
Cursor = Annotated[int, fastapi.Query(ge=0, lt=2**53)]
Wait = Annotated[float, fastapi.Query(ge=0, le=LONGEST_WAIT)]
RunName = Annotated[Name, fastapi.Query()]
ChatKey = Annotated[int, fastapi.Path(ge=0, lt=2**31)]
RequestId = Annotated[Id, fastapi.Path()]


class Body(pydantic.BaseModel):
    """A body: its own fields alone, of their types."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class RunBody(Body):
    """A run."""

    run: Name
    task: text(200)
    clients: Annotated[int, pydantic.Field(ge=1, lt=2**31)]
    rounds: Number
    asks: Literal["verdict", "hint"] = "verdict"
    show_right: bool = False
    examples: Annotated[list[text(2_000)], pydantic.Field(max_length=100)] = []


class OneRequest(Body):
    """An answer of the model that waits for a person."""

    id: Id
    client: Number
    attempt: Number = 0
    question: text(100_000)
    answer: text(100_000)
    right: text(100_000) | None = None
    adapter: text(200) = ""


class RequestsBody(Body):
    """Requests of a round."""

    run: Name
    round: Number
    requests: Annotated[list[OneRequest], pydantic.Field(max_length=10_000)]


class Sample(Body):
    """The newest adapter's answer to a fixed question."""

    question: text(100_000)
    answer: text(100_000)


class RoundBody(Body):
    """What is known of a round."""

    run: Name
    round: Number
    phase: Literal["asking", "training", "evaluating", "done"]
    deadline: float | None = None
    wanted: Number | None = None
    accuracy: float | None = None
    sample: Sample | None = None
    close: bool = False


class AnswerBody(Body):
    """What a person says of an answer."""

    verdict: Verdict | None = None
    hint: text(500) | None = None


class QuestionBody(Body):
    """A question to the model."""

    question: text(2_000, 1)


class JudgementBody(Body):
    """What a person says of a chat's answer."""

    verdict: Verdict
    hint: text(500) | None = None
    revision: bool = False


class JobBody(Body):
    """The end of a job: an answer and its adapter, or an error."""

    answer: text(100_000) | None = None
    adapter: text(200) | None = None
    error: text(2_000) | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> "JobBody":
        if (self.answer is None) == (self.error is None):
            raise ValueError("give either an answer or an error")
        return self


class WebhookBody(Body):
    """Where new rounds are told."""

    url: text(2_000, 1)

    @pydantic.field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        pydantic.TypeAdapter(pydantic.HttpUrl).validate_python(url)
        return url


def _needs(*scopes: str) -> Any:
    async def user(request: fastapi.Request) -> User:
        return security.need(request.state.user, scopes)

    return fastapi.Depends(user)


def _service(request: fastapi.Request) -> Service:
    return request.app.state.service


Person = Annotated[User, _needs("person")]
Trainer = Annotated[User, _needs("trainer")]
Admin = Annotated[User, _needs("admin")]
Anyone = Annotated[User, _needs()]
Request = fastapi.Request


def reply(content: Any) -> Response:
    """A JSON reply, made without FastAPI's walk through the content."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return Response(body, media_type="application/json")


# For the trainer

trainer = fastapi.APIRouter(prefix="/api", tags=["trainer"])


@trainer.post("/runs")
async def open_run(request: Request, user: Trainer, body: RunBody) -> Response:
    """Makes a run the current one. Again with the same name: it is described anew."""
    service = _service(request)
    row = body.model_dump()
    await service.call(service.store.open_run, user.name, {"name": row.pop("run"), **row})
    service.changed("answers", "jobs", "chats")
    return reply({"run": body.run})


@trainer.post("/requests")
async def add_requests(request: Request, user: Trainer, body: RequestsBody) -> Response:
    """Puts answers of the model to people. A request that is known is not put twice; another
    content under a known id is 409.
    """
    service = _service(request)
    rows = [one.model_dump() for one in body.requests]
    accepted, known = await service.call(
        service.store.add_requests, user.name, body.run, body.round, rows
    )
    if accepted:
        service.changed()
    return reply({"accepted": accepted, "known": known})


@trainer.get("/answers")
async def answers(
    request: Request, user: Trainer, run: RunName, after: Cursor = 0, wait: Wait = 0
) -> Response:
    """What people said, in the order in which they did; `after` is the last cursor that was seen.
    `wait` holds the reply back until there is something. An answer that was taken back comes again
    with "undone"; one after its round's end comes with "late".
    """
    service = _service(request)
    store, undo = service.store, service.settings.undo
    later: list[float | None] = [None]

    async def look() -> list[dict[str, Any]]:
        later[0] = None
        if not await service.call(store.news, run, after):
            return []
        found, later[0] = await service.call(store.collect, run, after, store.clock() - undo)
        return found

    found = await service.wait(
        "answers",
        wait,
        look,
        lambda: None if later[0] is None else later[0] + undo - store.clock(),
    )
    cursor = found[-1]["cursor"] if found else after
    return reply({"answers": found, "cursor": cursor, "status": await service.status()})


@trainer.post("/rounds")
async def set_round(request: Request, user: Trainer, body: RoundBody) -> Response:
    """Says what is known of a round; what is left out, or null, stays as it was. With "close", what
    nobody has answered is leased no more; an answer to what is leased is taken still, and late.
    """
    service = _service(request)
    values = body.model_dump(exclude={"run", "sample", "close"})
    values = {name: value for name, value in values.items() if value is not None}
    if body.sample is not None:
        values |= body.sample.model_dump()
    new = await service.call(service.store.set_round, user.name, body.run, values, body.close)
    service.changed("answers")
    if new:
        hooks = await service.call(service.store.webhooks)
        event = {"event": "round", "run": body.run, "round": body.round, "phase": body.phase}
        service.webhooks.send(hooks, event)
    return reply({"run": body.run, "round": body.round})


@trainer.get("/jobs")
async def jobs(request: Request, user: Trainer, run: RunName, wait: Wait = 0) -> Response:
    """Questions of people that wait for the model. "answer" and "feedback" are set where a revision
    is asked for. A job comes again until it has an end.
    """
    service = _service(request)

    async def look() -> list[dict[str, Any]]:
        return await service.call(service.store.jobs, run)

    return reply({"jobs": await service.wait("jobs", wait, look)})


@trainer.post("/jobs/{id}")
async def finish_job(request: Request, user: Trainer, id: RequestId, body: JobBody) -> Response:
    """Gives the model's answer to a job, or says why there is none."""
    service = _service(request)
    given = body.model_dump(exclude_none=True)
    if body.answer is not None:
        given.setdefault("adapter", "")
    key, _ = await service.call(service.store.finish_job, user.name, id, given)
    service.bell.ring(f"chat {key}", "chats")
    return reply({"id": id})


@trainer.get("/chats")
async def judged_chats(
    request: Request, user: Trainer, run: RunName, after: Cursor = 0, wait: Wait = 0
) -> Response:
    """Chats whose first answer has a verdict. One that changes, as by its revision, comes again
    with a higher cursor.
    """
    service = _service(request)

    async def look() -> list[dict[str, Any]]:
        return await service.call(service.store.judged_chats, run, after)

    found = await service.wait("chats", wait, look)
    return reply({"chats": found, "cursor": found[-1]["cursor"] if found else after})


# For people

people = fastapi.APIRouter(prefix="/api", tags=["people"])


@people.post("/lease", responses={204: {"description": "nothing is left"}})
async def lease(request: Request, user: Person) -> Response:
    """Leases the oldest request that waits, or gives the one again that the user holds."""
    service = _service(request)
    found = await service.call(service.store.lease, user)
    if found is None:
        return Response(status_code=204)
    service.changed()
    return reply(found)


@people.put("/answers/{id:path}")
async def answer(request: Request, user: Person, id: RequestId, body: AnswerBody) -> Response:
    """Answers the request that the user holds. The same answer again changes nothing."""
    service = _service(request)
    if await service.call(service.store.answer, user, id, body.verdict, body.hint):
        service.changed("answers")
    return reply({"id": id})


@people.post("/requests/{id:path}/skip")
async def skip(request: Request, user: Person, id: RequestId) -> Response:
    """Gives a lease back; the user gets the request again when nothing else is left."""
    service = _service(request)
    if await service.call(service.store.skip, user, id):
        service.changed()
    return reply({"id": id})


@people.post("/undo")
async def undo(request: Request, user: Person) -> Response:
    """Takes the user's last answer back, unless the trainer has it, and leases its request to them
    again.
    """
    service = _service(request)
    found = await service.call(service.store.undo, user)
    service.changed("answers")
    return reply(found)


@people.post("/chats")
async def add_chat(request: Request, user: Person, body: QuestionBody) -> Response:
    """Asks the model a question."""
    if not body.question.strip():
        raise Refused(422, "question is blank; write a question.")
    service = _service(request)
    key = await service.call(service.store.add_chat, user, body.question)
    service.bell.ring("jobs")
    return reply({"id": str(key)})


@people.get("/chats/{id}")
async def chat(request: Request, user: Person, id: ChatKey, wait: Wait = 0) -> Response:
    """A chat of the user. `wait` holds the reply back until the answer, or the revision, is there."""
    service = _service(request)
    found: dict[str, Any] = {}

    async def look() -> bool:
        found.update(await service.call(service.store.chat, user, id))
        newest = found["revision"] or found
        return newest["answer"] is not None or newest["error"] is not None

    await service.wait(f"chat {id}", wait, look)
    return reply(found)


@people.put("/chats/{id}")
async def judge_chat(request: Request, user: Person, id: ChatKey, body: JudgementBody) -> Response:
    """Says whether a chat's answer is right, or with "revision" whether its revision is. Wrong with
    a hint asks for a revision.
    """
    service = _service(request)
    await service.call(service.store.judge_chat, user, id, body.verdict, body.hint, body.revision)
    service.bell.ring("jobs", "chats", f"chat {id}")
    return reply({"id": str(id)})


@people.get("/status")
async def status(
    request: Request,
    user: Anyone,
    wait: Wait = 0,
    seen: Annotated[int, fastapi.Query(ge=-1, lt=2**53)] = -1,
) -> Response:
    """How the round stands. With `wait` and `seen`, the version that was seen last, the reply is
    held back until something has changed.
    """
    service = _service(request)
    await service.wait_for_change(seen, wait)
    shared = await service.status()
    mine = await service.call(service.store.mine, user, shared["run"], shared["round"])
    return reply(shared | {"mine": mine})


# For who may look

admin = fastapi.APIRouter(prefix="/api", tags=["admin"])


@admin.get("/export")
async def export(request: Request, user: Admin, run: RunName) -> Response:
    """All feedback of a run as JSONL: requests with every answer and skip, and chats."""
    service = _service(request)
    service.store.run(run)
    await service.note(user.name, "export", run)
    batches = service.store.export(run)

    async def lines() -> AsyncIterator[bytes]:
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            told = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in batch)
            yield "".join(f"{line}\n" for line in told).encode("utf-8")

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@admin.get("/agreement")
async def agree(request: Request, user: Admin, run: RunName) -> Response:
    """Krippendorff's alpha of people who answered the same requests, and counts."""
    service = _service(request)
    votes = await asyncio.to_thread(service.store.votes, run)
    await service.note(user.name, "agreement", run)
    return reply({"run": run, **await asyncio.to_thread(agreement, votes)})


@admin.get("/audit")
async def audit(request: Request, user: Admin, after: Cursor = 0) -> Response:
    """Who did what and when. It holds no tokens."""
    service = _service(request)
    await service.write_refused()
    found = await service.call(service.store.audit, after)
    return reply({"audit": found, "cursor": found[-1]["cursor"] if found else after})


@admin.post("/webhooks")
async def add_webhook(request: Request, user: Admin, body: WebhookBody) -> Response:
    """Tells a URL of every new round. The reply holds the secret that signs: the header
    X-Spear-Signature is "sha256=" and the HMAC-SHA256 of the body in hex.
    """
    service = _service(request)
    secret = secrets.token_hex(32)
    secret = await service.call(service.store.add_webhook, user.name, body.url, secret)
    return reply({"url": body.url, "secret": secret})


@admin.get("/webhooks")
async def list_webhooks(request: Request, user: Admin) -> Response:
    """The URLs that are told of new rounds."""
    service = _service(request)
    rows = await service.call(service.store.webhooks)
    return reply({"webhooks": [row["url"] for row in rows]})


@admin.delete("/webhooks")
async def drop_webhook(request: Request, user: Admin, body: WebhookBody) -> Response:
    """Tells a URL no more."""
    service = _service(request)
    await service.call(service.store.drop_webhook, user.name, body.url)
    return reply({"url": body.url})


# The page

page = fastapi.APIRouter(include_in_schema=False)
SIGN_IN = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Sign in</title>
<main><h1>Open your link</h1>
<p>This page opens with the link that you were given, which holds your token. If you just opened it,
<a href="./">go on</a>.</p></main></html>
"""


@page.get("/")
async def index(request: Request, token: str | None = None) -> Response:
    """The page; a token in the address is exchanged for a cookie at once."""
    service = _service(request)
    if token is not None:
        return await _sign_in(request, token)
    user, cookie = request.state.user, request.state.cookie
    if user is None or cookie is None:
        return HTMLResponse(SIGN_IN, 401)
    run = service.store.current
    shown_page = service.page.render(
        csrf=service.keys.csrf(cookie), user=user.name, run=run and run["name"]
    )
    return HTMLResponse(shown_page)


async def _sign_in(request: Request, token: str) -> Response:
    service = _service(request)
    user = service.keys.of_token(token)
    if user is None:
        address = request.client.host if request.client else "?"
        service.buckets.take(f"address {address}", service.settings.rates["nobody"])
        return HTMLResponse(SIGN_IN, 401)
    await service.note(user.name, "login")
    answer = RedirectResponse("./", 303)
    answer.set_cookie(
        COOKIE,
        service.keys.session(token),
        max_age=security.SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@page.get("/static/{name}")
async def static(name: str) -> Response:
    """A file of the page: one of those that lie in its folder."""
    for file in PAGE.iterdir():
        if file.name == name and file.suffix != ".html":
            return FileResponse(file)
    raise Refused(404, f"{shown(name)} is no file of the page; load the page again.")


@page.get("/healthz", include_in_schema=True)
async def healthz(request: Request) -> Response:
    """Whether the service and its database are up."""
    service = _service(request)
    await service.call(service.store.ping)
    return reply({"status": "ok"})


# Together


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, error.message)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error(422, f"the body is no JSON ({first['ctx']['error']}); send a JSON object.")
    where = ".".join(str(part)[:80] for part in first["loc"])
    told = first["msg"].removeprefix("Value error, ")
    return _error(
        422, f"{where} is {shown(first['input'])}: {told[:1].lower()}{told[1:]}; see /openapi.json."
    )


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {
        400: "the body is no JSON in UTF-8, or nested too deep; send a JSON object.",
        404: "there is nothing at this address; see /openapi.json.",
        405: "this address does not take this method; see /openapi.json.",
    }
    status = 422 if error.status_code == 400 else error.status_code
    return _error(status, told.get(error.status_code, f"{error.detail}; see /openapi.json."))


async def _busy(_: Request, error: Exception) -> Response:
    return _error(503, "the database did not take the request; send it again in a moment.")


def _error(status: int, message: str) -> Response:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return Response(
        security.error_body(message), status, headers=headers, media_type="application/json"
    )


def make_app(settings: Settings) -> fastapi.FastAPI:
    """Makes the service's app; `app.state.service` is its `Service`.

    Raises: UserError for a folder or a database that cannot be used.
    """
    from spear_jax import __version__

    service = Service(settings)
    app = fastapi.FastAPI(
        title="spear_jax feedback",
        version=__version__,
        description=__doc__,
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            Refused: _refused,
            RequestValidationError: _invalid,
            HTTPException: _http,
            sa.exc.OperationalError: _busy,
        },
    )
    app.state.service = service
    for router in (people, trainer, admin, page):
        app.include_router(router)
    app.add_middleware(
        Gate,
        keys=service.keys,
        buckets=service.buckets,
        rates=settings.rates,
        refused=service.refused,
    )
    schema = app.openapi()  # made once; every path under /api needs a token
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for described in methods.values() if path.startswith("/api/") else ():
            described["security"] = [{"token": []}]
    return app
