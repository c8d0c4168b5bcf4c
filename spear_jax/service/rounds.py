"""Runs, their rounds and requests, and what the trainer collects."""

import hashlib
import json
from typing import Any

import sqlalchemy as sa

from spear_jax.core.errors import shown
from spear_jax.service.database import BATCH, CHUNK, Database, Refused, Row, writes
from spear_jax.service.tables import deliveries, log, requests, rounds, runs

OPEN_REQUESTS = 100_000  # of a run

_ADD_DELIVERY = deliveries.insert()


class Rounds(Database):
    """What the trainer does."""

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
        begun = (
            on.execute(
                sa.select(requests)
                .where(left, requests.c.given > 0)
                .order_by(requests.c.key)
                .with_for_update()
            )
            .mappings()
            .all()
        )
        on.execute(requests.update().where(left).values(closed=True, open=False))
        for row in begun:
            on.execute(requests.update().where(requests.c.key == row["key"]).values(done=True))
            self._deliver(on, row, self._votes(on, row), late=False)

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
        fresh = self._fresh(on, run, number, given)
        if fresh:
            self._check_room(on, run, len(fresh))
            same = {
                "run": run,
                "round": number,
                "time": self.clock(),
                "voices": self.voices,
                "free": self.voices,
                "given": 0,
                "closed": False,
                "done": False,
                "open": True,
            }
            on.execute(requests.insert(), [one | same for one in fresh])
            note = f"{len(fresh)} new requests"
            self._note(on, who, "requests", run=run, round=number, note=note)
        return len(fresh), len(given) - len(fresh)

    def _fresh(self, on: sa.Connection, run: str, number: int, given: list[Row]) -> list[Row]:
        """Those that are not stored, each once, with the digest of their content."""
        stored: dict[str, str] = {}
        for start in range(0, len(given), CHUNK):
            ids = [one["id"] for one in given[start : start + CHUNK]]
            found = on.execute(
                sa.select(requests.c.id, requests.c.digest).where(
                    requests.c.run == run, requests.c.id.in_(ids)
                )
            )
            stored |= {row.id: row.digest for row in found}
        fresh: dict[str, Row] = {}
        for one in given:
            row = one | {"digest": _digest(number, one)}
            if stored.get(one["id"], row["digest"]) != row["digest"] or (
                fresh.get(one["id"], row) != row
            ):
                raise Refused(
                    409,
                    f"request {shown(one['id'])} is known with another content; give each request "
                    "of a run an id of its own.",
                )
            if one["id"] not in stored:
                fresh[one["id"]] = row
        return list(fresh.values())

    def _check_room(self, on: sa.Connection, run: str, more: int) -> None:
        waiting = on.execute(
            sa.select(sa.func.count()).where(requests.c.run == run, requests.c.open)
        ).scalar_one()
        if waiting + more > OPEN_REQUESTS:
            raise Refused(
                503,
                f"{waiting:,} requests of run {shown(run)} wait and {more:,} more exceed the "
                f"{OPEN_REQUESTS:,} that may; close rounds that have ended.",
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

    @writes
    def collect(
        self, on: sa.Connection, run: str, after: int, until: float
    ) -> tuple[list[Row], float | None]:
        """Returns the answers with a cursor above `after`, and marks them as collected.

        Args: until: those of a round that asks still are left out that were written later.
        Returns: the answers, and the time of the first that was left out.
        """
        self.run(run)
        on.execute(sa.select(runs.c.name).where(runs.c.name == run).with_for_update())
        found = on.execute(
            sa.select(
                requests.c.id,
                requests.c.round,
                requests.c.client,
                requests.c.adapter,
                rounds.c.phase,
                *(column for column in deliveries.c if column.name not in ("run", "request")),
            )
            .join(requests, requests.c.key == deliveries.c.request)
            .outerjoin(
                rounds,
                sa.and_(rounds.c.run == deliveries.c.run, rounds.c.round == requests.c.round),
            )
            .where(deliveries.c.run == run, deliveries.c.cursor > after)
            .order_by(deliveries.c.cursor)
            .limit(BATCH)
        ).mappings()
        answers: list[Row] = []
        later = None
        for row in found:
            one = dict(row)
            if one.pop("phase") in (None, "asking") and row["time"] > until:
                later = row["time"]
                break
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


def _digest(number: int, request: Row) -> str:
    return hashlib.sha256(json.dumps([number, request], sort_keys=True).encode()).hexdigest()


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
