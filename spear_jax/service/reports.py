"""What is shown of a run."""

from collections.abc import Iterator

import sqlalchemy as sa

from spear_jax.service.chats import judged
from spear_jax.service.database import BATCH, CHUNK, RUN, WHO, Database, Row, User
from spear_jax.service.tables import chats, leases, log, requests, rounds

_MINE = sa.select(sa.func.count()).where(
    log.c.who == WHO,
    log.c.what == "answer",
    log.c.run == RUN,
    log.c.round == sa.bindparam("_round"),
    sa.not_(log.c.undone),
)


class Reports(Database):
    """Reads alone."""

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
                found = (
                    on.execute(
                        sa.select(chats)
                        .where(chats.c.run == run, chats.c.key > last)
                        .order_by(chats.c.key)
                        .limit(CHUNK)
                    )
                    .mappings()
                    .all()
                )
            yield [{"kind": "chat", "run": run, "time": row["time"]} | judged(row) for row in found]
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
