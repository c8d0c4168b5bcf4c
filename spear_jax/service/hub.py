"""What the routes have in common: the store and its threads, who waits for news, and who may.

One process serves: what waits for news waits for a bell of this process, and the rates are counted
here. Several processes on one database are not supported.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
import time
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import fastapi
import jinja2
import sqlalchemy as sa

from spear_jax.service import security
from spear_jax.service.database import Call
from spear_jax.service.security import Buckets, Keys
from spear_jax.service.store import Store
from spear_jax.service.webhooks import Webhooks

PAGE = pathlib.Path(__file__).parent / "page"
WRITES = 100  # calls of one transaction
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
        undo: seconds for which an answer is kept back from the trainer, so that it can be undone,
            unless its round ends before; 0 hands it out at once.
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
