"""All that people said, and what they were asked: leases and answers, and all that is around them."""

import math
from typing import Any

import sqlalchemy as sa

from spear_jax.core.errors import shown
from spear_jax.service.chats import Chats, check_answer
from spear_jax.service.database import RUN, WHO, Refused, Row, User, writes
from spear_jax.service.reports import Reports
from spear_jax.service.rounds import Rounds
from spear_jax.service.tables import deliveries, leases, log, requests, runs

# Statements of every lease and every answer, built once

_CLIENT: sa.BindParameter[Any] = sa.bindparam("_client")
_KEY: sa.BindParameter[Any] = sa.bindparam("_key")
_HELD = (
    sa.select(leases.c.since, leases.c.expires, *requests.c)
    .join(requests, requests.c.key == leases.c.request)
    .where(leases.c.who == WHO)
    .with_for_update()
)


def _waiting(of_client: bool, not_seen: tuple[str, ...]) -> sa.Select:
    """The oldest open request of the oldest round that this person has not answered or skipped."""
    seen = sa.exists().where(
        log.c.request == requests.c.key,
        log.c.who == WHO,
        log.c.what.in_(not_seen),
        sa.not_(log.c.undone),
    )
    found = sa.select(requests).where(requests.c.run == RUN, requests.c.open, ~seen)
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
_DROP_LEASE = leases.delete().where(leases.c.who == WHO)
_ADD_LEASE = leases.insert()


class Store(Rounds, Chats, Reports):
    """The whole store."""

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
        check_answer(self.run(held["run"])["asks"], verdict, hint)
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
            self._undeliver(on, request)
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

    def _undeliver(self, on: sa.Connection, request: Any) -> None:
        """Makes the delivery of an answer one that says it was taken back."""
        cursor = self._count(on, request["run"])
        newest = sa.select(sa.func.max(deliveries.c.cursor)).where(
            deliveries.c.request == request["key"]
        )
        delivered = on.execute(newest).scalar_one()
        collected = on.execute(
            sa.select(runs.c.collected).where(runs.c.name == request["run"])
        ).scalar_one()
        if delivered <= collected:
            raise Refused(
                409,
                f"the trainer has the answer to {shown(request['id'])} already; it can be taken "
                "back only before that.",
            )
        on.execute(
            deliveries.update()
            .where(deliveries.c.run == request["run"], deliveries.c.cursor == delivered)
            .values(cursor=cursor, undone=True, time=self.clock())
        )
