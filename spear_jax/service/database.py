"""The database of the service: how it is opened, and how it is written.

One process writes. A statement that changes something runs in a transaction that takes its locks at
the start (SQLite) or row by row (PostgreSQL, `FOR UPDATE`), and is on disk when the method returns;
calls that come together share a transaction, since the disk takes most of the time. A method may be
called again with the same arguments after a reply was lost: it does nothing twice.

Locks of rows are taken in one order: leases, requests, the run. The run's counter gives every
delivered answer its cursor, so that a reader who has seen cursor 7 has seen all up to 7.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from spear_jax.core.errors import UserError, shown
from spear_jax.service.tables import log, meta, requests, runs, users, webhooks

BATCH = 1_000  # rows of one reply
CHUNK = 500  # values of one IN (...)

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Database")
Row = dict[str, Any]
Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Refused(Exception):
    """A request that is answered with an error.

    Attributes:
        status: the HTTP status.
        message: one sentence: the value, the rule, the remedy.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class User:
    """Who asks.

    Attributes:
        name: unique.
        scopes: out of "person", "trainer", "admin".
        client: the number of the federation's client that a person is; None takes requests of
            every client.
    """

    name: str
    scopes: frozenset[str]
    client: int | None = None


# Names of values in statements that are built once
WHO: sa.BindParameter[Any] = sa.bindparam("_who")
RUN: sa.BindParameter[Any] = sa.bindparam("_run")

_COUNT = runs.update().where(runs.c.name == RUN).values(cursor=runs.c.cursor + 1)
_CURSOR = sa.select(runs.c.cursor).where(runs.c.name == RUN)
_COUNTED = _COUNT.returning(runs.c.cursor)
_ADD_LOG = log.insert()
_LOGGED = tuple(column.name for column in log.c if column.name != "key")


def writes(
    method: Callable[Concatenate[S, sa.Connection, P], T],
) -> Callable[Concatenate[S, P], T]:
    """Gives a method a transaction that writes: its own, or with `Store.write` one of several."""

    @functools.wraps(method)
    def whole(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        bound = functools.partial(method, self)
        (outcome,) = self.write([(bound, args)])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    whole.within = method  # type: ignore[attr-defined]
    return whole


def connect(url: str | sa.URL) -> sa.Engine:
    """Returns the engine of a database.

    SQLite writes ahead, waits for the disk at every commit, and takes the right to write at the
    start of a transaction.

    Raises: UserError for a URL that SQLAlchemy does not take, or whose driver is missing.
    """
    try:
        engine = sa.create_engine(url, pool_size=16, pool_recycle=1800)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError, ValueError) as error:
        raise UserError(
            f"--database={shown(_without_password(url))} cannot be used ({shown(str(error), 200)}); "
            "give a URL of SQLAlchemy whose driver is installed, as sqlite:////data/feedback.db or "
            "postgresql+psycopg://user@host/name."
        ) from error
    if engine.dialect.name == "sqlite":
        if engine.url.database in (None, "", ":memory:"):
            raise UserError(
                f"--database={engine.url} is in memory and would be lost; give a file, as "
                "sqlite:////data/feedback.db."
            )

        @sa.event.listens_for(engine, "connect")
        def _settle(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # SQLAlchemy's begin is the only one
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
                connection.execute(f"PRAGMA {pragma}").close()

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            reads = connection.get_execution_options().get("reads")
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _without_password(url: str | sa.URL) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return str(url)


class Database:
    """A database that is open: what the service itself knows, and how others write.

    Args:
        url: of SQLAlchemy.
        lease: seconds for which a person holds a request.
        voices: how many people each new request is put to.
        clock: seconds since 1970.
    Raises: UserError for a database that cannot be opened.
    """

    def __init__(
        self,
        url: str | sa.URL,
        lease: float = 120.0,
        voices: int = 1,
        clock: Callable[[], float] = time.time,
    ):
        self.engine = connect(url)
        self._reader = self.engine.execution_options(reads=True)
        self.lease_seconds, self.voices, self.clock = lease, voices, clock
        self._next_end = 0.0  # no lease ends before
        self._runs: dict[str, Row] = {}
        try:
            meta.create_all(self.engine)
            with self._reader.connect() as connection:
                for row in connection.execute(sa.select(runs).order_by(runs.c.opened)).mappings():
                    self._remember(dict(row))
        except sa.exc.DBAPIError as error:
            raise UserError(
                f"the database {_without_password(url)} cannot be opened "
                f"({shown(str(error.orig), 200)}); check its place, its rights and that its server runs."
            ) from error

    def write(self, calls: list[Call]) -> list[Any]:
        """Makes calls in one transaction, which is on disk when this returns.

        Args: calls: (method, arguments) each; the method takes the connection first.
        Returns: what each returned, or the exception that it raised; that one then left nothing.
        """
        for last in (False, True):
            self._next_end = 0.0  # what is written again finds the leases as they were
            try:
                with self.engine.connect() as on:
                    outcomes = self.make(on, calls)
                    on.commit()
                    return outcomes
            except sa.exc.OperationalError:  # a connection that was lost, a lock that was not had
                if last:
                    raise
        raise AssertionError

    def make(self, on: sa.Connection, calls: list[Call]) -> list[Any]:
        """As `write`, in a transaction of the caller's."""
        outcomes: list[Any] = []
        if len(calls) == 1:  # which may take all back
            ((method, given),) = calls
            try:
                return [method(on, *given)]
            except (Refused, sa.exc.IntegrityError) as error:
                on.rollback()
                self._next_end = 0.0
                return [error]
        for method, given in calls:
            saved = on.begin_nested()
            try:
                outcomes.append(method(on, *given))
                saved.commit()
            except (sa.exc.OperationalError, sa.exc.InterfaceError):
                raise
            except Exception as error:
                saved.rollback()
                self._next_end = 0.0
                outcomes.append(error)
        return outcomes

    def close(self) -> None:
        """Closes every connection."""
        self.engine.dispose()

    def ping(self) -> None:
        """Asks the database for nothing; raises where it is not there."""
        with self._reader.connect() as on:
            on.execute(sa.select(1)).scalar_one()

    def counts(self) -> dict[str, int]:
        """Returns how many requests and answers there are, of all runs."""
        said = sa.and_(log.c.what == "answer", sa.not_(log.c.undone))
        with self._reader.connect() as on:
            return {
                "requests": on.execute(sa.select(sa.func.count(requests.c.key))).scalar_one(),
                "answers": on.execute(sa.select(sa.func.count()).where(said)).scalar_one(),
            }

    # Runs that it knows

    def _remember(self, row: Row) -> None:
        """Keeps a run's description; the last one is the current run."""
        self._runs.pop(row["name"], None)
        row = {name: row[name] for name in row if name not in ("cursor", "collected")}
        self._runs[row["name"]] = row | {"examples": json.loads(row["examples"])}

    @property
    def current(self) -> Row | None:
        """The description of the current run: name, task, clients, rounds, asks, show_right,
        examples.
        """
        try:
            return self._runs[next(reversed(self._runs))]
        except (StopIteration, KeyError, RuntimeError):  # none yet, or just replaced
            return None

    def run(self, name: str) -> Row:
        """Returns a run's description; Refused(404) where there is none of that name."""
        found = self._runs.get(name)
        if found is None:
            raise Refused(404, f"run {shown(name)} is not known; POST it to /api/runs first.")
        return found

    def _count(self, on: sa.Connection, run: str) -> int:
        """The run's next cursor. It locks the run, so commits come in the order of their cursors."""
        if self.engine.dialect.update_returning:
            return on.execute(_COUNTED, {"_run": run}).scalar_one()
        on.execute(_COUNT, {"_run": run})
        return on.execute(_CURSOR, {"_run": run}).scalar_one()

    # The log

    @writes
    def note(self, on: sa.Connection, notes: list[Row]) -> None:
        """Writes lines of the audit log: "who", "what", "note"."""
        for one in notes:
            self._note(on, one["who"], one["what"], note=one.get("note"), run=one.get("run"))

    def _note(
        self, on: sa.Connection, who: str, what: str, request: Any = None, **values: Any
    ) -> None:
        row: Row = dict.fromkeys(_LOGGED) | {"time": self.clock(), "who": who, "what": what}
        if request is not None:
            row |= {
                "run": request["run"],
                "round": request["round"],
                "request": request["key"],
            }
        on.execute(_ADD_LOG, row | values)

    # Users and webhooks

    @writes
    def set_users(self, on: sa.Connection, given: dict[str, User]) -> None:
        """Writes all users by the digest of their token; others are forgotten."""
        on.execute(users.delete())
        on.execute(
            users.insert(),
            [
                {
                    "name": user.name,
                    "digest": digest,
                    "scopes": ",".join(sorted(user.scopes)),
                    "client": user.client,
                }
                for digest, user in given.items()
            ],
        )

    def users(self) -> dict[str, User]:
        """Returns every user by the digest of their token."""
        with self._reader.connect() as on:
            return {
                row.digest: User(row.name, frozenset(row.scopes.split(",")), row.client)
                for row in on.execute(sa.select(users))
            }

    @writes
    def add_webhook(self, on: sa.Connection, who: str, url: str, secret: str) -> str:
        """Keeps a URL that is told of new rounds.

        Returns: the secret that signs; a known URL keeps its own.
        """
        known = on.execute(sa.select(webhooks.c.secret).where(webhooks.c.url == url)).scalar()
        if known is not None:
            return known
        on.execute(webhooks.insert(), {"url": url, "secret": secret})
        self._note(on, who, "webhook", note=f"added {url}")
        return secret

    @writes
    def drop_webhook(self, on: sa.Connection, who: str, url: str) -> None:
        """Forgets a URL; Refused(404) for an unknown one."""
        if not on.execute(webhooks.delete().where(webhooks.c.url == url)).rowcount:
            raise Refused(404, f"webhook {shown(url)} is not known; GET /api/webhooks lists them.")
        self._note(on, who, "webhook", note=f"removed {url}")

    def webhooks(self) -> list[Row]:
        """Returns every webhook: url, secret."""
        with self._reader.connect() as on:
            found = on.execute(
                sa.select(webhooks.c.url, webhooks.c.secret).order_by(webhooks.c.key)
            )
            return [dict(row) for row in found.mappings()]
