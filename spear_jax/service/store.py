"""The tables of the service, and every statement that reads or writes them.

One process writes. A statement that changes something runs in a transaction that takes its locks at
the start (SQLite) or row by row (PostgreSQL, `FOR UPDATE`), and is on disk when the method returns;
calls that come together share a transaction, since the disk takes most of the time. A method may be
called again with the same arguments after a reply was lost: it does nothing twice.

Locks of rows are taken in one order: leases, requests, the run. The run's counter gives every
delivered answer its cursor, so that a reader who has seen cursor 7 has seen all up to 7.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from spear_jax.core.errors import UserError, shown

OPEN_REQUESTS = 100_000  # of a run
OPEN_JOBS = 50  # of a run
BATCH = 1_000  # rows of one reply
CHUNK = 500  # values of one IN (...)

P = ParamSpec("P")
T = TypeVar("T")
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


# Tables

meta = sa.MetaData()
NAME = sa.String(64)

users = sa.Table(
    "users",
    meta,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),  # SHA-256 of the token
    sa.Column("scopes", sa.String(64), nullable=False),  # joined by commas
    sa.Column("client", sa.Integer),
)
runs = sa.Table(
    "runs",
    meta,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("clients", sa.Integer, nullable=False),
    sa.Column("rounds", sa.Integer, nullable=False),
    sa.Column("asks", sa.String(16), nullable=False),
    sa.Column("show_right", sa.Boolean, nullable=False),
    sa.Column("examples", sa.Text, nullable=False),  # JSON
    sa.Column("opened", sa.Double, nullable=False),  # the newest is the current run
    sa.Column("cursor", sa.BigInteger, nullable=False),  # of the newest delivery or chat
    sa.Column("collected", sa.BigInteger, nullable=False),  # the trainer has seen up to here
)
rounds = sa.Table(
    "rounds",
    meta,
    sa.Column("run", sa.String(200), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("deadline", sa.Double),
    sa.Column("wanted", sa.Integer),
    sa.Column("accuracy", sa.Double),
    sa.Column("question", sa.Text),  # of the sample
    sa.Column("answer", sa.Text),
)
requests = sa.Table(
    "requests",
    meta,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("run", sa.String(200), nullable=False),
    sa.Column("id", NAME, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),  # of the content
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("client", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("question", sa.Text, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("right", sa.Text),
    sa.Column("adapter", sa.String(200), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("voices", sa.Integer, nullable=False),  # how many people are asked
    sa.Column("given", sa.Integer, nullable=False),  # how many have answered
    sa.Column("free", sa.Integer, nullable=False),  # voices less given less leased
    sa.Column("closed", sa.Boolean, nullable=False),  # its round has ended
    sa.Column("done", sa.Boolean, nullable=False),  # delivered
    sa.Column("open", sa.Boolean, nullable=False),  # may be leased
    sa.UniqueConstraint("run", "id"),
    sa.Index("requests_of_all", "run", "open", "round", "key"),
    sa.Index("requests_of_a_client", "run", "open", "client", "round", "key"),
    sa.Index("requests_of_a_round", "run", "round", "done", "closed"),
)
leases = sa.Table(
    "leases",
    meta,
    sa.Column("who", NAME, primary_key=True),
    sa.Column("request", sa.Integer, nullable=False, index=True),
    sa.Column("since", sa.Double, nullable=False),
    sa.Column("expires", sa.Double, nullable=False, index=True),
)
# Who did what: the audit log, and the answers themselves (what = "answer").
log = sa.Table(
    "log",
    meta,
    sa.Column("key", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("who", NAME, nullable=False),
    sa.Column("what", sa.String(16), nullable=False),
    sa.Column("run", sa.String(200)),
    sa.Column("round", sa.Integer),
    sa.Column("request", sa.Integer),
    sa.Column("verdict", sa.String(8)),
    sa.Column("hint", sa.Text),
    sa.Column("seconds", sa.Double),
    sa.Column("late", sa.Boolean),
    sa.Column("undone", sa.Boolean),
    sa.Column("note", sa.Text),
    sa.Index("log_of_a_request", "request", "who", "what"),
    sa.Index("log_of_a_person", "who", "what", "run", "key"),
)
# What the trainer gets: one resolved answer a request, in the order of the cursor.
deliveries = sa.Table(
    "deliveries",
    meta,
    sa.Column("run", sa.String(200), primary_key=True),
    sa.Column("cursor", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("request", sa.Integer, nullable=False, index=True),
    sa.Column("verdict", sa.String(8)),
    sa.Column("hint", sa.Text),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("late", sa.Boolean, nullable=False),
    sa.Column("undone", sa.Boolean, nullable=False),
)
chats = sa.Table(
    "chats",
    meta,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("run", sa.String(200), nullable=False),
    sa.Column("who", NAME, nullable=False),
    sa.Column("client", sa.Integer, nullable=False),
    sa.Column("question", sa.Text, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("pending", sa.Boolean, nullable=False),  # a job waits for the trainer
    sa.Column("revised", sa.Boolean, nullable=False),  # a revision was asked for
    sa.Column("cursor", sa.BigInteger),  # from the first answer's verdict on
    *(
        sa.Column(f"{which}{name}", kind)
        for which in ("", "revision_")
        for name, kind in (
            ("answer", sa.Text),
            ("error", sa.Text),
            ("adapter", sa.String(200)),
            ("verdict", sa.String(8)),
            ("hint", sa.Text),
        )
    ),
    sa.Index("chats_that_wait", "run", "pending", "key"),
    sa.Index("chats_of_a_cursor", "run", "cursor"),
)
webhooks = sa.Table(
    "webhooks",
    meta,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("secret", sa.String(64), nullable=False),
)


# Statements of every lease and every answer, built once

_WHO, _RUN, _CLIENT, _KEY = (sa.bindparam(f"_{name}") for name in ("who", "run", "client", "key"))
_HELD = (
    sa.select(leases.c.since, leases.c.expires, *requests.c)
    .join(requests, requests.c.key == leases.c.request)
    .where(leases.c.who == _WHO)
    .with_for_update()
)


def _waiting(of_client: bool, not_seen: tuple[str, ...]) -> sa.Select:
    """The oldest open request of the oldest round that this person has not answered or skipped."""
    seen = sa.exists().where(
        log.c.request == requests.c.key,
        log.c.who == _WHO,
        log.c.what.in_(not_seen),
        sa.not_(log.c.undone),
    )
    found = sa.select(requests).where(requests.c.run == _RUN, requests.c.open, ~seen)
    if of_client:
        found = found.where(requests.c.client == _CLIENT)
    found = found.order_by(requests.c.round, requests.c.key).limit(1)
    return found.with_for_update(skip_locked=True)


_NEXT = {
    (of_client, skipped): _waiting(of_client, ("answer",) if skipped else ("answer", "skip"))
    for of_client in (False, True)
    for skipped in (False, True)
}
_TAKE = (
    requests.update()
    .where(requests.c.key == _KEY)
    .values(free=requests.c.free - 1, open=requests.c.free > 1)
)
_FREE = (
    requests.update()
    .where(requests.c.key == _KEY)
    .values(
        free=requests.c.free + 1, open=sa.and_(sa.not_(requests.c.closed), sa.not_(requests.c.done))
    )
)
_GIVE = (
    requests.update()
    .where(requests.c.key == _KEY)
    .values(
        given=requests.c.given + 1,
        done=sa.bindparam("_done"),
        open=sa.and_(requests.c.open, sa.not_(sa.bindparam("_done", type_=sa.Boolean))),
    )
)
_DROP_LEASE = leases.delete().where(leases.c.who == _WHO)
_COUNT = runs.update().where(runs.c.name == _RUN).values(cursor=runs.c.cursor + 1)
_CURSOR = sa.select(runs.c.cursor).where(runs.c.name == _RUN)
_COUNTED = _COUNT.returning(runs.c.cursor)
_ADD_LOG, _ADD_LEASE, _ADD_DELIVERY = log.insert(), leases.insert(), deliveries.insert()
_MINE = sa.select(sa.func.count()).where(
    log.c.who == _WHO,
    log.c.what == "answer",
    log.c.run == _RUN,
    log.c.round == sa.bindparam("_round"),
    sa.not_(log.c.undone),
)


def writes(
    method: Callable[Concatenate["Store", sa.Connection, P], T],
) -> Callable[Concatenate["Store", P], T]:
    """Gives a method a transaction that writes: its own, or with `Store.write` one of several."""

    @functools.wraps(method)
    def whole(self: "Store", *args: P.args, **kwargs: P.kwargs) -> T:
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


class Store:
    """All that people said, and what they were asked.

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

    # Runs and rounds

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

    @writes
    def open_run(self, on: sa.Connection, who: str, description: Row) -> None:
        """Makes a run, or describes it anew, and makes it the current one.

        Raises: Refused(409) where it asks other things than when it began.
        """
        name = description["name"]
        row = description | {
            "examples": json.dumps(description["examples"]),
            "opened": self.clock(),
        }
        found = on.execute(
            sa.select(runs.c.asks).where(runs.c.name == name).with_for_update()
        ).first()
        if found is None:
            on.execute(runs.insert(), row | {"cursor": 0, "collected": 0})
        elif found.asks != description["asks"]:
            raise Refused(
                409,
                f"run {shown(name)} began with asks={found.asks!r} and cannot go on with "
                f"{description['asks']!r}; give the run another name.",
            )
        else:
            on.execute(runs.update().where(runs.c.name == name), row)
        self._note(on, who, "run", run=name)
        self._remember(row)

    @writes
    def set_round(self, on: sa.Connection, who: str, run: str, values: Row, close: bool) -> bool:
        """Writes what is known of a round; what is not in `values` stays as it was.

        Args: close: closes what is left of its requests. Those that some of several people have
            answered are delivered as they are.
        Returns: whether the round is new.
        """
        self.run(run)
        number = values["round"]
        if close:
            self._close_round(on, run, number)
        here = sa.and_(rounds.c.run == run, rounds.c.round == number)
        new = on.execute(sa.select(rounds.c.phase).where(here).with_for_update()).first() is None
        if new:
            on.execute(rounds.insert(), values | {"run": run})
        else:
            on.execute(rounds.update().where(here), values)
        self._note(on, who, "round", run=run, round=number, note=values["phase"])
        return new

    def _close_round(self, on: sa.Connection, run: str, number: int) -> None:
        left = sa.and_(
            requests.c.run == run,
            requests.c.round == number,
            sa.not_(requests.c.done),
            sa.not_(requests.c.closed),
        )
        begun = on.execute(
            sa.select(requests)
            .where(left, requests.c.given > 0)
            .order_by(requests.c.key)
            .with_for_update()
        ).mappings()
        begun = [dict(row) for row in begun]
        on.execute(requests.update().where(left).values(closed=True, open=False))
        for row in begun:
            on.execute(requests.update().where(requests.c.key == row["key"]).values(done=True))
            self._deliver(on, row, self._votes(on, row), late=False)

    # Requests

    @writes
    def add_requests(
        self, on: sa.Connection, who: str, run: str, number: int, given: list[Row]
    ) -> tuple[int, int]:
        """Adds the requests of a round that are not known yet.

        Returns: how many are new, and how many were known.
        Raises: Refused: 404 for an unknown run, 409 for a known id with other content, 422 for a
            client that the run does not have, 503 where too many wait. Then nothing is added.
        """
        clients = self.run(run)["clients"]
        for one in given:
            if one["client"] >= clients:
                raise Refused(
                    422,
                    f"request {shown(one['id'])} is of client {one['client']}, but run {shown(run)} "
                    f"has {clients}; number its clients from 0 to {clients - 1}.",
                )
        on.execute(sa.select(runs.c.name).where(runs.c.name == run).with_for_update())
        known: dict[str, str] = {}
        ids = [one["id"] for one in given]
        for start in range(0, len(ids), CHUNK):
            of = requests.c.id.in_(ids[start : start + CHUNK])
            rows = on.execute(
                sa.select(requests.c.id, requests.c.digest).where(requests.c.run == run, of)
            )
            known |= {row.id: row.digest for row in rows}
        new = []
        for one in given:
            digest = _digest(number, one)
            if known.setdefault(one["id"], digest) != digest:
                raise Refused(
                    409,
                    f"request {shown(one['id'])} is known with another content; give each request "
                    "of a run an id of its own.",
                )
            new.append(one | {"digest": digest})
        fresh = self._fresh(on, run, new)
        waiting = on.execute(
            sa.select(sa.func.count()).where(requests.c.run == run, requests.c.open)
        ).scalar_one()
        if fresh and waiting + len(fresh) > OPEN_REQUESTS:
            raise Refused(
                503,
                f"{waiting:,} requests of run {shown(run)} wait and {len(fresh):,} more exceed the "
                f"{OPEN_REQUESTS:,} that may; close rounds that have ended.",
            )
        if fresh:
            now = self.clock()
            state = {
                "voices": self.voices,
                "free": self.voices,
                "given": 0,
                "closed": False,
                "done": False,
                "open": True,
            }
            on.execute(
                requests.insert(),
                [one | state | {"run": run, "round": number, "time": now} for one in fresh],
            )
            self._note(
                on, who, "requests", run=run, round=number, note=f"{len(fresh)} new requests"
            )
        return len(fresh), len(given) - len(fresh)

    def _fresh(self, on: sa.Connection, run: str, given: list[Row]) -> list[Row]:
        """Those that are not stored, each once."""
        ids = list({one["id"] for one in given})
        stored: set[str] = set()
        for start in range(0, len(ids), CHUNK):
            of = requests.c.id.in_(ids[start : start + CHUNK])
            stored |= set(on.scalars(sa.select(requests.c.id).where(requests.c.run == run, of)))
        return list({one["id"]: one for one in given if one["id"] not in stored}.values())

    # Leases and answers

    @writes
    def lease(self, on: sa.Connection, user: User) -> Row | None:
        """Leases a request of the current run: the one that the user holds, else the oldest.

        Returns: the request and "expires"; None with nothing left.
        """
        run = self.current
        self._end_leases(on)
        held = on.execute(_HELD, {"_who": user.name}).mappings().first()
        if held is not None:
            if run is not None and held["run"] == run["name"]:
                return self._offer(held, held["expires"])
            self._give_back(on, user, held["key"])
        if run is None:
            return None
        given = {"_who": user.name, "_run": run["name"], "_client": user.client}
        for skipped in (False, True):
            found = on.execute(_NEXT[user.client is not None, skipped], given).mappings().first()
            if found is not None:
                return self._lease(on, user, found)
        return None

    def _lease(self, on: sa.Connection, user: User, found: Any, take: bool = True) -> Row:
        """Writes a lease; `take` takes one of the request's free places for it."""
        now = self.clock()
        expires = now + self.lease_seconds
        if take:
            on.execute(_TAKE, {"_key": found["key"]})
        on.execute(
            _ADD_LEASE,
            {"who": user.name, "request": found["key"], "since": now, "expires": expires},
        )
        self._note(on, user.name, "lease", found)
        self._next_end = min(self._next_end, expires)
        return self._offer(found, expires)

    def _offer(self, row: Any, expires: float) -> Row:
        run = self.run(row["run"])
        names = ("id", "run", "round", "client", "attempt", "question", "answer", "adapter")
        return {name: row[name] for name in names} | {
            "right": row["right"] if run["show_right"] else None,
            "expires": expires,
            "asks": run["asks"],
        }

    def _give_back(self, on: sa.Connection, user: User, request: int) -> None:
        on.execute(_DROP_LEASE, {"_who": user.name})
        on.execute(_FREE, {"_key": request})

    def _end_leases(self, on: sa.Connection) -> None:
        """Gives back what is leased too long. Until somebody asks for the next request, the holder
        may still answer.
        """
        now = self.clock()
        if now < self._next_end:
            return
        ended = on.execute(
            sa.select(leases.c.who, leases.c.request)
            .where(leases.c.expires <= now)
            .with_for_update(skip_locked=True)
        ).all()
        for who, request in ended:
            on.execute(_DROP_LEASE, {"_who": who})
            on.execute(_FREE, {"_key": request})
        first = on.execute(sa.select(sa.func.min(leases.c.expires))).scalar()
        self._next_end = math.inf if first is None else first

    @writes
    def answer(
        self, on: sa.Connection, user: User, id: str, verdict: str | None, hint: str | None
    ) -> bool:
        """Writes what a user says of the request that they hold.

        Returns: whether it is new; False for the same answer again.
        Raises: Refused: 403 without the lease, 404 for an unknown id, 409 for another answer than
            the user's earlier one, 422 for what the run does not ask.
        """
        hint = hint if hint and hint.strip() else None
        held = on.execute(_HELD, {"_who": user.name}).mappings().first()
        if held is None or held["id"] != id:
            self._same_answer(on, user, id, verdict, hint)
            return False
        _check_answer(self.run(held["run"])["asks"], verdict, hint)
        seconds = max(0.0, self.clock() - held["since"])
        late = bool(held["closed"])
        deliver = not held["done"] and (late or held["given"] + 1 >= held["voices"])
        on.execute(_DROP_LEASE, {"_who": user.name})
        self._note(
            on,
            user.name,
            "answer",
            held,
            verdict=verdict,
            hint=hint,
            seconds=seconds,
            late=late,
            undone=False,
        )
        on.execute(_GIVE, {"_key": held["key"], "_done": held["done"] or deliver})
        if deliver:
            votes = (
                self._votes(on, held) if held["given"] else [(user.name, verdict, hint, seconds)]
            )
            self._deliver(on, held, votes, late)
        return True

    def _same_answer(
        self, on: sa.Connection, user: User, id: str, verdict: str | None, hint: str | None
    ) -> None:
        run = self.current
        found = None
        if run is not None:
            found = on.execute(
                sa.select(requests.c.key).where(requests.c.run == run["name"], requests.c.id == id)
            ).first()
        if found is None:
            raise Refused(404, f"request {shown(id)} is not known in this run; lease one.")
        earlier = on.execute(
            sa.select(log.c.verdict, log.c.hint)
            .where(log.c.request == found.key, log.c.who == user.name, log.c.what == "answer")
            .where(sa.not_(log.c.undone))
        ).first()
        if earlier is None:
            raise Refused(
                403,
                f"request {shown(id)} is not leased to {user.name}, or no longer; lease one with "
                "POST /api/lease.",
            )
        if (earlier.verdict, earlier.hint) != (verdict, hint):
            raise Refused(
                409,
                f"request {shown(id)} has another answer of {user.name} already; take it back with "
                "POST /api/undo first.",
            )

    def _votes(self, on: sa.Connection, request: Any) -> list[Any]:
        """(who, verdict, hint, seconds) of each answer to a request, oldest first."""
        return list(
            on.execute(
                sa.select(log.c.who, log.c.verdict, log.c.hint, log.c.seconds)
                .where(log.c.request == request["key"], log.c.what == "answer")
                .where(sa.not_(log.c.undone))
                .order_by(log.c.key)
            )
        )

    def _deliver(self, on: sa.Connection, request: Any, votes: list[Any], late: bool) -> None:
        """Puts the resolved answer of a request where the trainer collects it."""
        verdict, hint = resolve([(verdict, hint) for _, verdict, hint, _ in votes])
        on.execute(
            _ADD_DELIVERY,
            {
                "run": request["run"],
                "cursor": self._count(on, request["run"]),
                "request": request["key"],
                "verdict": verdict,
                "hint": hint,
                "who": ", ".join(who for who, *_ in votes),
                "seconds": sum(seconds for *_, seconds in votes) / len(votes),
                "time": self.clock(),
                "late": late,
                "undone": False,
            },
        )

    def _count(self, on: sa.Connection, run: str) -> int:
        """The run's next cursor. It locks the run, so commits come in the order of their cursors."""
        if self.engine.dialect.update_returning:
            return on.execute(_COUNTED, {"_run": run}).scalar_one()
        on.execute(_COUNT, {"_run": run})
        return on.execute(_CURSOR, {"_run": run}).scalar_one()

    @writes
    def skip(self, on: sa.Connection, user: User, id: str) -> bool:
        """Gives a lease back; the user gets the request again when nothing else is left.

        Returns: whether it is new; False for what the user has skipped already.
        Raises: Refused: 403 without the lease, 404 for an unknown id.
        """
        held = on.execute(_HELD, {"_who": user.name}).mappings().first()
        if held is not None and held["id"] == id:
            self._give_back(on, user, held["key"])
            self._note(on, user.name, "skip", held, undone=False)
            return True
        run = self.current
        found = (
            run
            and on.execute(
                sa.select(requests.c.key).where(requests.c.run == run["name"], requests.c.id == id)
            ).scalar()
        )
        if not found:
            raise Refused(404, f"request {shown(id)} is not known in this run; lease one.")
        skipped = on.execute(
            sa.select(log.c.key).where(
                log.c.request == found, log.c.who == user.name, log.c.what == "skip"
            )
        ).first()
        if skipped is None:
            raise Refused(
                403,
                f"request {shown(id)} is not leased to {user.name}; skip what you have leased.",
            )
        return False

    @writes
    def undo(self, on: sa.Connection, user: User) -> Row:
        """Takes the user's last answer back and leases its request to them again.

        Called twice, it takes back one. Another lease of the user is given back.

        Returns: as `lease`.
        Raises: Refused(409) where there is no answer, or the trainer has it.
        """
        run = self.current
        last = (
            run
            and on.execute(
                sa.select(log)
                .where(log.c.who == user.name, log.c.what == "answer", log.c.run == run["name"])
                .order_by(log.c.key.desc())
                .limit(1)
            ).first()
        )
        held = on.execute(_HELD, {"_who": user.name}).mappings().first()
        if not last or last.undone:
            if last and held is not None and held["key"] == last.request:
                return self._offer(held, held["expires"])
            raise Refused(409, f"{user.name} has no answer to take back; answer a request first.")
        request = (
            on.execute(sa.select(requests).where(requests.c.key == last.request).with_for_update())
            .mappings()
            .one()
        )
        if request["done"]:
            self._undeliver(on, request, user)
        on.execute(log.update().where(log.c.key == last.key).values(undone=True))
        on.execute(
            requests.update()
            .where(requests.c.key == last.request)
            .values(
                given=requests.c.given - 1,
                done=False,
                open=sa.and_(sa.not_(requests.c.closed), requests.c.free > 0),
            )
        )
        if held is not None:
            self._give_back(on, user, held["key"])
        self._note(on, user.name, "undo", request)
        return self._lease(on, user, request, take=False)

    def _undeliver(self, on: sa.Connection, request: Any, user: User) -> None:
        cursor = self._count(on, request["run"])
        delivery = on.execute(
            sa.select(deliveries)
            .where(deliveries.c.request == request["key"])
            .order_by(deliveries.c.cursor.desc())
            .limit(1)
        ).mappings()
        delivery = dict(delivery.one())
        collected = on.execute(
            sa.select(runs.c.collected).where(runs.c.name == request["run"])
        ).scalar_one()
        if delivery["cursor"] <= collected:
            raise Refused(
                409,
                f"the trainer has the answer to {shown(request['id'])} already; it can be taken "
                "back only before that.",
            )
        again = {"cursor": cursor, "undone": True, "time": self.clock()}
        on.execute(_ADD_DELIVERY, delivery | again)

    @writes
    def collect(
        self, on: sa.Connection, run: str, after: int, until: float
    ) -> tuple[list[Row], float | None]:
        """Returns the answers with a cursor above `after` that were written until a time, and marks
        them as collected. The second value is the time of the first that was written later.
        """
        self.run(run)
        on.execute(sa.select(runs.c.name).where(runs.c.name == run).with_for_update())
        found = on.execute(
            sa.select(
                requests.c.id,
                requests.c.round,
                requests.c.client,
                requests.c.adapter,
                *(column for column in deliveries.c if column.name not in ("run", "request")),
            )
            .join(requests, requests.c.key == deliveries.c.request)
            .where(deliveries.c.run == run, deliveries.c.cursor > after)
            .order_by(deliveries.c.cursor)
            .limit(BATCH)
        ).mappings()
        answers: list[Row] = []
        later = None
        for row in found:
            if row["time"] > until:
                later = row["time"]
                break
            one = dict(row)
            one["user"] = one.pop("who")
            for flag in ("late", "undone"):
                if not one[flag]:
                    del one[flag]
            answers.append(one)
        if answers:
            seen = answers[-1]["cursor"]
            on.execute(
                runs.update()
                .where(runs.c.name == run, runs.c.collected < seen)
                .values(collected=seen)
            )
        return answers, later

    def news(self, run: str, after: int) -> bool:
        """Whether there are answers with a cursor above `after`."""
        self.run(run)
        with self._reader.connect() as on:
            return (
                on.execute(
                    sa.select(deliveries.c.cursor)
                    .where(deliveries.c.run == run, deliveries.c.cursor > after)
                    .limit(1)
                ).first()
                is not None
            )

    # Chats

    @writes
    def add_chat(self, on: sa.Connection, user: User, question: str) -> int:
        """Asks the model a question.

        Returns: the chat's key; that of the user's last chat where it asks the same and waits.
        Raises: Refused: 409 without a run, 503 where too many jobs wait.
        """
        run = self.current
        if run is None:
            raise Refused(409, "no run is under way, so no model can answer; wait for one.")
        waits = sa.and_(chats.c.run == run["name"], chats.c.pending)
        found = on.execute(
            sa.select(chats.c.key)
            .where(waits, chats.c.who == user.name, chats.c.question == question)
            .where(sa.not_(chats.c.revised))
        ).scalar()
        if found is not None:
            return found
        self._check_jobs(on, run["name"])
        client = 0 if user.client is None else user.client % run["clients"]
        key = on.execute(
            chats.insert(),
            {
                "run": run["name"],
                "who": user.name,
                "client": client,
                "question": question,
                "time": self.clock(),
                "pending": True,
                "revised": False,
            },
        ).inserted_primary_key[0]
        self._note(on, user.name, "chat", run=run["name"], note=f"chat {key}")
        return key

    def _check_jobs(self, on: sa.Connection, run: str) -> None:
        waiting = on.execute(
            sa.select(sa.func.count()).where(chats.c.run == run, chats.c.pending)
        ).scalar_one()
        if waiting >= OPEN_JOBS:
            raise Refused(
                503,
                f"{waiting} questions wait for the model, which is the most that may; ask again in "
                "a moment.",
            )

    def chat(self, user: User, key: int) -> Row:
        """Returns a chat of the user as the API shows it.

        Raises: Refused: 403 for another user's, 404 for an unknown one.
        """
        with self._reader.connect() as on:
            return _chat(self._chat(on, user, key))

    def _chat(self, on: sa.Connection, user: User, key: int) -> Any:
        found = (
            on.execute(sa.select(chats).where(chats.c.key == key).with_for_update())
            .mappings()
            .first()
        )
        if found is None:
            raise Refused(404, f"chat '{key}' is not known; POST a question to /api/chats.")
        if found["who"] != user.name:
            raise Refused(403, f"chat '{key}' is another user's; ask a question of your own.")
        return found

    @writes
    def judge_chat(
        self,
        on: sa.Connection,
        user: User,
        key: int,
        verdict: str,
        hint: str | None,
        revision: bool,
    ) -> str:
        """Writes what a user says of one of a chat's two answers. A wrong first answer with a hint
        asks for a revision.

        Returns: the chat's run.
        Raises: Refused: 403, 404, 409 for an answer that is not there or has another verdict, 422
            for a hint to a right answer, 503 where too many jobs wait.
        """
        _check_answer("verdict", verdict, hint := hint if hint and hint.strip() else None)
        found = self._chat(on, user, key)
        which = "revision_" if revision else ""
        if found[f"{which}answer"] is None:
            raise Refused(
                409,
                f"chat '{key}' has no {'revision' if revision else 'answer'} yet; wait for it with "
                f"GET /api/chats/{key}.",
            )
        if found[f"{which}verdict"] is not None:
            if (found[f"{which}verdict"], found[f"{which}hint"]) != (verdict, hint):
                raise Refused(409, f"chat '{key}' has another verdict already; ask again instead.")
            return found["run"]
        values: Row = {f"{which}verdict": verdict, f"{which}hint": hint}
        if hint is not None and not revision:
            self._check_jobs(on, found["run"])
            values |= {"pending": True, "revised": True}
        values["cursor"] = self._count(on, found["run"])
        on.execute(chats.update().where(chats.c.key == key), values)
        self._note(on, user.name, "verdict", run=found["run"], note=f"chat {key} {verdict}")
        return found["run"]

    def jobs(self, run: str) -> list[Row]:
        """Returns the chats that wait for an answer of the model, oldest first."""
        self.run(run)
        with self._reader.connect() as on:
            found = on.execute(
                sa.select(chats)
                .where(chats.c.run == run, chats.c.pending)
                .order_by(chats.c.key)
                .limit(2 * OPEN_JOBS)
            ).mappings()
            return [
                {
                    "id": _job(row, row["revised"]),
                    "chat": str(row["key"]),
                    "client": row["client"],
                    "question": row["question"],
                    "answer": row["answer"] if row["revised"] else None,
                    "feedback": row["hint"] if row["revised"] else None,
                }
                for row in found
            ]

    @writes
    def finish_job(self, on: sa.Connection, who: str, id: str, given: Row) -> tuple[int, str]:
        """Writes the model's answer, or why there is none.

        Returns: the chat's key, and its run.
        Raises: Refused: 404 for an unknown job, 409 where it has ended otherwise.
        """
        number, revision = id[:-1], id.endswith("r")
        plain = number.isascii() and number.isdigit() and len(number) < 10 and id[-1] in "ar"
        found = (
            on.execute(sa.select(chats).where(chats.c.key == int(number)).with_for_update())
            .mappings()
            .first()
            if plain
            else None
        )
        if found is None or (revision and not found["revised"]):
            raise Refused(404, f"job {shown(id)} is not known; take jobs from GET /api/jobs.")
        which = "revision_" if revision else ""
        old = {name: found[f"{which}{name}"] for name in given}
        if found[f"{which}answer"] is not None or found[f"{which}error"] is not None:
            if old != given:
                raise Refused(409, f"job {shown(id)} has another end already; take the next one.")
            return found["key"], found["run"]
        values: Row = {f"{which}{name}": value for name, value in given.items()}
        values["pending"] = False
        if revision:
            values["cursor"] = self._count(on, found["run"])
        on.execute(chats.update().where(chats.c.key == found["key"]), values)
        self._note(on, who, "job", run=found["run"], note=f"job {id}")
        return found["key"], found["run"]

    def judged_chats(self, run: str, after: int) -> list[Row]:
        """Returns the chats whose first answer has a verdict and that changed after a cursor."""
        self.run(run)
        with self._reader.connect() as on:
            found = on.execute(
                sa.select(chats)
                .where(chats.c.run == run, chats.c.cursor > after)
                .order_by(chats.c.cursor)
                .limit(BATCH)
            ).mappings()
            return [_judged(row) for row in found]

    # What is shown

    def status(self) -> Row:
        """Returns the state of the current run without "version" and "mine"."""
        run = self.current
        if run is None:
            return {
                "run": None, "task": None, "asks": None, "examples": [], "round": None, "rounds": 0,
                "phase": None, "deadline": None, "wanted": None, "waiting": 0, "leased": 0,
                "answered": 0, "curve": [], "samples": [], "adapter": None,
            }  # fmt: skip
        name = run["name"]
        with self._reader.connect() as on:
            told = on.execute(
                sa.select(rounds).where(rounds.c.run == name).order_by(rounds.c.round)
            ).all()
            asked = on.execute(
                sa.select(sa.func.max(requests.c.round)).where(requests.c.run == name)
            ).scalar()
            newest = told[-1] if told else None
            number = max((n for n in (newest and newest.round, asked) if n is not None), default=0)
            if newest is not None and newest.round != number:
                newest = None  # its requests came before its description
            of = sa.and_(requests.c.run == name, requests.c.round == number)
            states = on.execute(
                sa.select(requests.c.done, requests.c.closed, sa.func.count())
                .where(of)
                .group_by(requests.c.done, requests.c.closed)
            ).all()
            leased = on.execute(
                sa.select(sa.func.count(sa.distinct(requests.c.key)))
                .join(leases, leases.c.request == requests.c.key)
                .where(of, sa.not_(requests.c.done), sa.not_(requests.c.closed))
                .where(leases.c.expires > self.clock())
            ).scalar_one()
            adapter = on.execute(
                sa.select(requests.c.adapter)
                .where(requests.c.run == name)
                .order_by(requests.c.key.desc())
                .limit(1)
            ).scalar()
        left = sum(count for done, closed, count in states if not done and not closed)
        return {
            "run": name,
            "task": run["task"],
            "asks": run["asks"],
            "examples": run["examples"],
            "round": number,
            "rounds": run["rounds"],
            "phase": newest.phase if newest else "asking",
            "deadline": newest.deadline if newest else None,
            "wanted": newest.wanted if newest else None,
            "waiting": left - leased,
            "leased": leased,
            "answered": sum(count for done, _, count in states if done),
            "curve": [[row.round, row.accuracy] for row in told if row.accuracy is not None],
            "samples": [
                {"round": row.round, "question": row.question, "answer": row.answer}
                for row in told
                if row.answer is not None
            ],
            "adapter": adapter,
        }

    def mine(self, user: User, run: str | None, number: int | None) -> int:
        """Returns how many requests of a round the user has answered."""
        if run is None:
            return 0
        with self._reader.connect() as on:
            given = {"_who": user.name, "_run": run, "_round": number}
            return on.execute(_MINE, given).scalar_one()

    def export(self, run: str) -> Iterator[list[Row]]:
        """Yields all feedback of a run in batches: requests with their answers and skips, then
        chats.
        """
        self.run(run)
        last: int | None = 0
        while last is not None:
            rows, last = self._export_requests(run, last)
            yield rows
        last = 0
        while last is not None:
            with self._reader.connect() as on:
                found = on.execute(
                    sa.select(chats)
                    .where(chats.c.run == run, chats.c.key > last)
                    .order_by(chats.c.key)
                    .limit(CHUNK)
                ).mappings()
                found = list(found)
            yield [
                {"kind": "chat", "run": run, "time": row["time"]} | _judged(row) for row in found
            ]
            last = found[-1]["key"] if found else None

    def _export_requests(self, run: str, after: int) -> tuple[list[Row], int | None]:
        names = "run id round client attempt question answer right adapter time".split()
        with self._reader.connect() as on:
            found = on.execute(
                sa.select(requests)
                .where(requests.c.run == run, requests.c.key > after)
                .order_by(requests.c.key)
                .limit(CHUNK)
            ).mappings()
            rows = {
                row["key"]: {"kind": "request"}
                | {name: row[name] for name in names}
                | {"closed": row["closed"], "answers": [], "skips": []}
                for row in found
            }
            said = on.execute(
                sa.select(log)
                .where(log.c.request.in_(rows), log.c.what.in_(("answer", "skip")))
                .order_by(log.c.key)
            ).mappings()
            for one in said:
                shared = {"user": one["who"], "time": one["time"]}
                if one["what"] == "skip":
                    rows[one["request"]]["skips"].append(shared)
                else:
                    told = ("verdict", "hint", "seconds", "late", "undone")
                    rows[one["request"]]["answers"].append(
                        shared | {name: one[name] for name in told}
                    )
        return list(rows.values()), max(rows, default=None)

    def votes(self, run: str) -> list[tuple[int, str, str | None]]:
        """Returns (request, user, verdict) of every answer of a run that was not taken back."""
        self.run(run)
        with self._reader.connect() as on:
            found = on.execute(
                sa.select(log.c.request, log.c.who, log.c.verdict)
                .where(log.c.run == run, log.c.what == "answer", sa.not_(log.c.undone))
                .order_by(log.c.key)
            )
            return [tuple(row) for row in found]

    def audit(self, after: int) -> list[Row]:
        """Returns who did what, from a cursor on."""
        names = ("time", "who", "what", "run", "round", "verdict", "late", "note")
        with self._reader.connect() as on:
            found = on.execute(
                sa.select(log, requests.c.id)
                .outerjoin(requests, requests.c.key == log.c.request)
                .where(log.c.key > after)
                .order_by(log.c.key)
                .limit(BATCH)
            ).mappings()
            return [
                {"cursor": row["key"]}
                | {name: row[name] for name in names if row[name] is not None}
                | ({"request": row["id"]} if row["id"] is not None else {})
                for row in found
            ]

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


_LOGGED = tuple(column.name for column in log.c if column.name != "key")


def _digest(number: int, request: Row) -> str:
    return hashlib.sha256(json.dumps([number, request], sort_keys=True).encode()).hexdigest()


def _check_answer(asks: str, verdict: str | None, hint: str | None) -> None:
    """Raises: Refused(422) for what does not answer the question."""
    if asks == "verdict" and verdict is None:
        raise Refused(422, "verdict is null, but this run asks for one; give 'right' or 'wrong'.")
    if asks == "hint" and verdict is not None:
        raise Refused(
            422,
            f"verdict is {verdict!r}, but this run asks for hints to wrong answers alone; give null.",
        )
    if verdict == "right" and hint is not None:
        raise Refused(422, "a hint goes with the verdict 'wrong' alone; leave it out or say wrong.")


def resolve(votes: list[tuple[str | None, str | None]]) -> tuple[str | None, str | None]:
    """Makes one answer of several people's.

    The majority's verdict counts, a tie is "wrong". Hints are joined by a blank line, and dropped
    where the answer is right.

    Args: votes: (verdict, hint) of each.
    """
    verdicts = [verdict for verdict, _ in votes if verdict is not None]
    verdict = None
    if verdicts:
        verdict = "right" if 2 * verdicts.count("right") > len(verdicts) else "wrong"
    hints = [hint for _, hint in votes if hint is not None and verdict != "right"]
    return verdict, "\n\n".join(hints) or None


def _job(row: Any, revision: bool) -> str:
    return f"{row['key']}{'r' if revision else 'a'}"


def _chat(row: Any) -> Row:
    """A chat as a person sees it."""
    shared = {name: row[name] for name in ("question", "answer", "error", "adapter", "verdict")}
    return {"id": str(row["key"])} | shared | {"hint": row["hint"], "revision": _revision(row)}


def _judged(row: Any) -> Row:
    """A chat as the trainer sees it."""
    return _chat(row) | {
        "client": row["client"],
        "user": row["who"],
        "job": _job(row, False),
        "cursor": row["cursor"],
    }


def _revision(row: Any) -> Row | None:
    if not row["revised"]:
        return None
    names = ("answer", "error", "adapter", "verdict", "hint")
    return {name: row[f"revision_{name}"] for name in names} | {"job": _job(row, True)}
