"""Questions of people to the model."""

from typing import Any

import sqlalchemy as sa

from spear_jax.core.errors import shown
from spear_jax.service.database import BATCH, Database, Refused, Row, User, writes
from spear_jax.service.tables import chats

OPEN_JOBS = 50  # of a run


class Chats(Database):
    """Chats, and the jobs that they are to the trainer."""

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
        made = on.execute(
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
        ).inserted_primary_key
        key = made[0] if made else 0
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
            return _shown(self._chat(on, user, key))

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
        check_answer("verdict", verdict, hint := hint if hint and hint.strip() else None)
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
            return [judged(row) for row in found]


def check_answer(asks: str, verdict: str | None, hint: str | None) -> None:
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


def _job(row: Any, revision: bool) -> str:
    return f"{row['key']}{'r' if revision else 'a'}"


def _shown(row: Any) -> Row:
    """A chat as a person sees it."""
    shared = {name: row[name] for name in ("question", "answer", "error", "adapter", "verdict")}
    return {"id": str(row["key"])} | shared | {"hint": row["hint"], "revision": _revision(row)}


def judged(row: Any) -> Row:
    """A chat as the trainer sees it."""
    return _shown(row) | {
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
