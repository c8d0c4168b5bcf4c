"""Feedback from people in a browser, through the service that `spear-jax serve` starts."""

import collections
import contextlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from spear_jax.core.errors import UserError
from spear_jax.core.surroundings import say
from spear_jax.core.types import Example
from spear_jax.feedback.base import Request, RunView
from spear_jax.feedback.recorded import (
    DEFAULTS,
    Answer,
    FeedbackSettings,
    Recorded,
    as_json,
    check_url,
    http,
)
from spear_jax.tasks.base import WRONG, Task

ADDRESS = "http://127.0.0.1:8765"  # of `spear-jax serve`, unless it is told another
BATCH = 500  # requests that are sent at once
WAIT = 1.0  # seconds that the service holds back a reply with nothing new
PATIENCE = 600.0  # seconds without the service, after which the run ends
TIMEOUT = 30.0  # seconds of one call
SAMPLED = 20  # questions of which people may try one, and one is shown in every round
SAMPLE = "sample"  # the chat job of the latter


class Service(Recorded):
    """People who answer through the service at `feedback.url`.

    While the run waits for them, and while clients train, it also answers what they ask in the
    chat. The latter is done by a thread of its own, between the end of a round's rollouts and the
    next call of this object: the two are never at work together.

    Raises: UserError without a url or a token, without the `live` extra, and where the service
        refuses or is away for ten minutes: what was said until then is kept.
    """

    asks_people: ClassVar[bool] = True

    def __init__(self, task: Task, hint_words: int = 3, settings: FeedbackSettings = DEFAULTS):
        super().__init__(task, hint_words, settings)
        check_url(settings.url, "service", ADDRESS)
        self._opened: _Calls | None = None
        self.cursor = self.chat_cursor = 0
        self.arrived: dict[str, dict[str, Any]] = {}  # answers by id, until they are used
        self.ready: list[dict[str, Any]] = []  # traces beside the rounds, until a round takes them
        self.taken: set[str] = set()  # chats that became traces
        self.sent: dict[str, float] = {}  # when each request of this round was sent
        self.asked: collections.Counter[int] = collections.Counter()  # questions by client
        self.answered = 0  # of what is asked now
        self._chatter: _Chatter | None = None

    def begin_run(self, run: RunView) -> None:
        super().begin_run(run)
        token = os.environ.get(self.settings.token, "")
        if not token:
            raise UserError(
                f"feedback 'service' needs the trainer's token in the environment variable "
                f"{self.settings.token}, which is empty; `spear-jax serve` writes it into tokens.json."
            )
        self._opened = _Calls(self.settings.url, token)
        lines = [line for round in self.log.beside.values() for line in round]
        self.taken = {line["chat"] for line in lines if "chat" in line}
        for line in lines:
            self.log.open.pop(line.get("id", ""), None)
        some = [self.task.question(example) for example in run.examples[:SAMPLED]]
        body = {
            "run": run.name,
            "task": self.task.name,
            "clients": run.clients,
            "rounds": run.rounds,
            "asks": self.settings.asks,
            "show_right": self.settings.show_right,
            "examples": some,
        }
        self.calls.post("/api/runs", body)
        self.known = {
            question: example for question, example in zip(some, run.examples, strict=False)
        }

    def begin_round(self, number: int) -> None:
        self._end_chatter()
        super().begin_round(number)
        self.sent = {}
        self._tell("asking")

    def end_rollouts(self) -> None:
        self._tell("training", close=True)
        self._chatter = _Chatter(self._chat)

    def _end_chatter(self) -> None:
        chatter, self._chatter = self._chatter, None
        if chatter is not None:
            chatter.end(PATIENCE + TIMEOUT)  # by then its last call has ended, too

    def _beside(self, round: int, clients: Sequence[int]) -> list[dict[str, Any]]:
        """What came in since, kept for this round before it is used."""
        self._end_chatter()
        self._collect()
        for line in self.ready[:]:
            if line["client"] in clients:
                self.ready.remove(line)
                self.log.write(line | {"beside": round})
        return self.log.beside[round]

    def _collect(self) -> None:
        """Takes late answers and judged chats; each becomes a line once."""
        self._take_answers(0)
        query = {"run": self._view.name, "after": self.chat_cursor, "wait": 0}
        found = self.calls.get("/api/chats", query)
        self.chat_cursor = found["cursor"]
        for chat in found["chats"] if self.settings.chats else ():
            line = self._chat_line(chat)
            if line is not None and chat["id"] not in self.taken:
                self.taken.add(chat["id"])
                self.ready.append(line)

    def _late(self, one: dict[str, Any]) -> None:
        """Takes an answer that came after the waiting."""
        line = self.log.open.pop(one["id"])
        if self.settings.late == "use":
            same = {name: line[name] for name in ("id", "client", "example")}
            attempts = [line["made"] | {"correct": one["verdict"] == "right"}]
            told = {"asked_in": line["round"], "user": one["user"], "question": ""}
            self.ready.append(same | told | {"attempts": attempts})

    def _chat_line(self, chat: dict[str, Any]) -> dict[str, Any] | None:
        """A judged chat as a trace; None while its revision has no verdict, and where its tokens are
        not known.
        """
        first, again = self.log.jobs.get(chat["job"]), chat["revision"]
        waits = chat["verdict"] == "wrong" and chat["hint"] and not (again and again["verdict"])
        if first is None or waits:
            return None
        attempts = [first["made"] | {"correct": chat["verdict"] == "right"}]
        if again and again["job"] in self.log.jobs:
            revised = self.log.jobs[again["job"]]["made"]
            attempts.append(revised | {"correct": again["verdict"] == "right"})
        return {
            "chat": chat["id"],
            "client": self._client_of(chat),
            "example": first["example"],
            "question": first["question"],
            "user": chat["user"],
            "attempts": attempts,
        }

    def _client_of(self, chat: dict[str, Any]) -> int:
        """Whose a chat is: a person of every client counts as one of them."""
        if chat["client"] is not None:
            return int(chat["client"])
        return zlib.crc32(chat["user"].encode()) % self._view.clients

    def end_round(self, number: int, metrics: dict[str, float]) -> None:
        self._end_chatter()
        self.round = number
        example = self._sample()
        answer = self._view.answer([(example, "", "")])[0].text.strip()
        sample = {"question": self.task.question(example), "answer": answer or "(empty)"}
        self._tell("done", accuracy=metrics.get("eval/accuracy"), sample=sample)

    def _sample(self) -> Example:
        """The question whose answer is shown round after round: one that is answered wrongly at
        first, the same in a run that goes on.
        """
        some = self._view.examples[:SAMPLED]
        if SAMPLE not in self.log.jobs:
            made = self._view.answer([(example, "", "") for example in some])
            graded = zip(some, made, strict=True)
            wrong = [i for i, (x, y) in enumerate(graded) if not self.task.grade(y.text, x)]
            self.log.write({"job": SAMPLE, "example": some[wrong[0] if wrong else 0].id})
        chosen = self.log.jobs[SAMPLE]["example"]
        return next((example for example in some if example.id == chosen), some[0])

    def end_run(self) -> None:
        chatter, self._chatter = self._chatter, None
        if chatter is not None:
            with contextlib.suppress(UserError):  # the run has ended, with a message of its own
                chatter.end(TIMEOUT)
        if self._opened is not None:
            self._opened.close()

    def ask(self, requests: list[Request]) -> Iterator[tuple[Request, Answer]]:
        self._begin(requests)
        while requests:
            for request in (heard := self._hear(requests)):
                if request.id in self.arrived:
                    yield request, _answer(self.arrived.pop(request.id))
            taken = {request.id for request in heard}
            requests = [request for request in requests if request.id not in taken]

    def converse(
        self, requests: list[Request], take: Callable[[list[Request]], list[Request]]
    ) -> None:
        self._begin(requests)
        super().converse(requests, take)

    def _begin(self, requests: list[Request]) -> None:
        self._end_chatter()  # of an earlier phase of the round
        self.asked = collections.Counter(request.client for request in requests)
        self.answered = 0

    def next_of(self, requests: list[Request]) -> list[Request]:
        """Those of which something was said, now or before a kill, or that are waited for no more."""
        some = self.log.first_wave(requests)
        if not some:
            some, wave = self._hear(requests), max(self.log.waves.values(), default=0) + 1
            for request in some:
                one = self.arrived.pop(request.id, None)
                self._keep(request, None if one is None else _answer(one), wave)
        self.answered += sum(self.log.said[request.id] is not None for request in some)
        return some

    def _hear(self, requests: list[Request]) -> list[Request]:
        """Waits for people, and answers the chat meanwhile. Returns the requests that have arrived;
        where the waiting for some is over, these.
        """
        self._send([request for request in requests if request.id not in self.sent])
        while True:
            if arrived := [request for request in requests if request.id in self.arrived]:
                return arrived
            if self._enough(requests):
                return requests
            since = time.time() - self.settings.deadline
            over = [request for request in requests if self.sent[request.id] < since]
            if over and self.settings.deadline:
                return over
            self._take_answers(WAIT)
            self._chat()

    def _send(self, requests: list[Request]) -> None:
        """Puts requests before people."""
        if not requests:
            return
        for begin in range(0, len(requests), BATCH):
            some = [self._item(request) for request in requests[begin : begin + BATCH]]
            body = {"run": self._view.name, "round": self.round, "requests": some}
            self.calls.post("/api/requests", body)
        now, deadline = time.time(), self.settings.deadline
        self.sent |= {request.id: now for request in requests}
        ends = now + deadline if deadline else None
        self._tell("asking", wanted=len(self.sent), deadline=ends)

    def _enough(self, open_: list[Request]) -> bool:
        """Whether so much has been said that the rest is waited for no more."""
        left = collections.Counter(request.client for request in open_)
        share = 1 - self.settings.quorum + 1e-9
        return 0 < self.settings.answers <= self.answered or (
            self.settings.quorum < 1
            and all(left[client] <= share * asked for client, asked in self.asked.items())
        )

    def _take_answers(self, wait: float) -> None:
        """Takes what came in: answers to what is asked now, or was asked before a kill, wait in
        `arrived`; those that came after the waiting are late.
        """
        found = self.calls.get("/api/answers", self._since(wait))
        self.cursor = found["cursor"]
        for one in found["answers"]:
            if one.get("undone"):
                self.arrived.pop(one["id"], None)
            elif one["id"] in self.log.open:
                self._late(one)
            elif one["id"] not in self.log.said:
                self.arrived[one["id"]] = one

    def _chat(self, wait: float = 0) -> None:
        """Answers what people ask in the chat, or do within `wait` seconds."""
        for job in self.calls.get("/api/jobs", {"run": self._view.name, "wait": wait})["jobs"]:
            question = job["question"].strip()
            example = self.known.get(question) or Example("chat", question, (), (), 0)
            said = (
                f"{WRONG} {self.task.templates.format} {job['feedback']}" if job["feedback"] else ""
            )
            try:
                made = self._view.answer([(example, job["answer"] or "", said)])[0]
                self.log.write(
                    {
                        "job": job["id"],
                        "question": question,
                        "example": example.id,
                        "adapter": self._adapter,
                        "made": as_json(made),
                    }
                )
                body = {"answer": made.text.strip() or "(empty)", "adapter": self._adapter}
            except UserError as error:
                body = {"error": str(error)}
            self.calls.post(f"/api/jobs/{job['id']}", body)

    @property
    def calls(self) -> "_Calls":
        """The service; open from the run's beginning."""
        assert self._opened is not None, "begin_run comes first"
        return self._opened

    @property
    def _view(self) -> RunView:
        assert self.run is not None, "begin_run comes first"
        return self.run

    @property
    def _adapter(self) -> str:
        return f"round {max(0, self.round - 1)}"

    def _since(self, wait: float) -> dict[str, Any]:
        return {"run": self._view.name, "after": self.cursor, "wait": wait}

    def _item(self, request: Request) -> dict[str, Any]:
        example = request.example
        right = example.options[example.gold] if example.options else example.response.strip()
        return {
            "id": request.id,
            "client": request.client,
            "attempt": request.attempt,
            "question": self.task.question(example),
            "answer": request.answer.strip(),
            "right": right if self.settings.show_right else None,
            "adapter": self._adapter,
        }

    def _tell(self, phase: str, **more: Any) -> None:
        body = {"run": self._view.name, "round": self.round, "phase": phase, **more}
        self.calls.post("/api/rounds", body)


class _Chatter:
    """A thread that answers the chat until its end.

    Args: chat: waits so many seconds for questions, and answers them.
    """

    def __init__(self, chat: Callable[[float], None]):
        self._over = threading.Event()
        self._failure: UserError | None = None
        self._thread = threading.Thread(target=self._run, args=(chat,), daemon=True)
        self._thread.start()

    def _run(self, chat: Callable[[float], None]) -> None:
        try:
            while not self._over.is_set():
                chat(WAIT / 4)
        except UserError as error:  # raised where the run goes on
            self._failure = error

    def end(self, seconds: float) -> None:
        """Waits so many seconds for an answer that is under way. Raises: what ended the thread."""
        self._over.set()
        self._thread.join(seconds)
        if self._failure is not None:
            raise self._failure


def _answer(one: dict[str, Any]) -> Answer:
    verdict = None if one["verdict"] is None else one["verdict"] == "right"
    return Answer(verdict, one["hint"], one["user"], float(one["seconds"]))


class _Calls:
    """Calls to the service, again while it is away."""

    def __init__(self, url: str, token: str):
        httpx = http(url, "service", ADDRESS)
        self.url, self.failures = url, (httpx.TransportError,)
        headers = {"Authorization": f"Bearer {token}"}
        self.connect = lambda: httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)
        self.client: Any = None

    def get(self, path: str, query: dict[str, Any]) -> dict[str, Any]:
        return self._call("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call("POST", path, json=body)

    def close(self) -> None:
        """Closes the connections; the next call opens others."""
        if self.client is not None:
            self.client.close()
        self.client = None

    def _call(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        pause, until, told = 0.1, time.monotonic() + PATIENCE, False
        while True:
            try:
                self.client = self.client or self.connect()
                reply = self.client.request(method, path, **given)
                if reply.status_code < 400:
                    return reply.json()
                why = f"{reply.status_code} {reply.text[:300]}"
                passing = reply.status_code == 429 or reply.status_code >= 500
            except self.failures as error:
                why, passing = f"{type(error).__name__}: {str(error)[:200]}", True
            if not passing or time.monotonic() > until:
                raise UserError(
                    f"the feedback service at {self.url} does not take {method} {path}: {why}. Check it and "
                    "its token; the same command then goes on, and asks nobody again."
                )
            if not told and pause > 1:
                told = True
                say(f"note: no feedback service at {self.url} ({why}); trying again", sys.stderr)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)
