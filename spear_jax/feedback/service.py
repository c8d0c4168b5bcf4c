"""Feedback from people in a browser, through the service that `spear-jax serve` starts."""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

from spear_jax.core.errors import UserError, shown
from spear_jax.core.surroundings import say
from spear_jax.core.types import Example
from spear_jax.feedback.base import Request, RunView
from spear_jax.feedback.recorded import DEFAULTS, Answer, FeedbackSettings, Recorded
from spear_jax.tasks.base import WRONG, Task

BATCH = 500  # requests that are sent at once
WAIT = 1.0  # seconds that the service holds back a reply with nothing new
PATIENCE = 600.0  # seconds without the service, after which the run ends
TIMEOUT = 30.0  # seconds of one call


class Service(Recorded):
    """People who answer through the service at `feedback.url`.

    While the run waits for them it also answers what they ask in the chat.

    Raises: UserError without a url or a token, without the `live` extra, and where the service
        refuses or is away for ten minutes: what was said until then is kept.
    """

    asks_people: ClassVar[bool] = True

    def __init__(self, task: Task, hint_words: int = 3, settings: FeedbackSettings = DEFAULTS):
        super().__init__(task, hint_words, settings)
        if not settings.url.startswith(("http://", "https://")):
            raise UserError(
                f"rollout.feedback is 'service', but feedback.url is {shown(settings.url)}; give the address of "
                "`spear-jax serve`, such as --config.feedback.url=http://127.0.0.1:8765."
            )
        token = os.environ.get(settings.token, "")
        if not token:
            raise UserError(
                f"feedback 'service' needs the trainer's token in the environment variable "
                f"{settings.token}, which is empty; `spear-jax serve` writes it into tokens.json."
            )
        self.calls = _Calls(settings.url, token)
        self.cursor = 0
        self.waiting_since = 0.0

    def begin_run(self, run: RunView) -> None:
        super().begin_run(run)
        self.sample = run.examples[0]
        some = [self.task.question(example) for example in run.examples[:20]]
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
        super().begin_round(number)
        self._tell("asking")

    def end_rollouts(self) -> None:
        self._tell("training", close=True)

    def end_round(self, number: int, metrics: dict[str, float]) -> None:
        self.round = number
        answer = self._view.answer([(self.sample, "", "")])[0]
        sample = {"question": self.task.question(self.sample), "answer": answer.strip()}
        accuracy = metrics.get("eval/accuracy")
        self._tell("done", accuracy=accuracy, sample=sample)

    def end_run(self) -> None:
        self.calls.close()

    def ask(self, requests: list[Request]) -> Iterator[tuple[Request, Answer]]:
        for begin in range(0, len(requests), BATCH):
            some = [self._item(request) for request in requests[begin : begin + BATCH]]
            body = {"run": self._view.name, "round": self.round, "requests": some}
            self.calls.post("/api/requests", body)
        began, deadline = time.time(), self.settings.deadline
        self._tell("asking", wanted=len(requests), deadline=began + deadline if deadline else None)
        open_ = {request.id: request for request in requests}
        wanted = _Wanted(requests, self.settings)
        while open_ and not wanted.met() and not (deadline and time.time() > began + deadline):
            found = self.calls.get("/api/answers", self._since(WAIT))
            self.cursor = found["cursor"]
            for one in found["answers"]:
                request = None if one.get("undone") else open_.pop(one["id"], None)
                if request is not None:
                    wanted.count(request)
                    yield request, _answer(one)
            self._chat()

    def _chat(self) -> None:
        """Answers what people ask in the chat."""
        for job in self.calls.get("/api/jobs", {"run": self._view.name, "wait": 0})["jobs"]:
            question = job["question"].strip()
            example = self.known.get(question) or Example("chat", question, (), (), 0)
            said = (
                f"{WRONG} {self.task.templates.format} {job['feedback']}" if job["feedback"] else ""
            )
            try:
                answer = self._view.answer([(example, job["answer"] or "", said)])[0].strip()
                body = {"answer": answer or "(empty)", "adapter": self._adapter}
            except UserError as error:
                body = {"error": str(error)}
            self.calls.post(f"/api/jobs/{job['id']}", body)

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


class _Wanted:
    """Whether enough has been answered: a number in all, or a share of each client's requests."""

    def __init__(self, requests: list[Request], settings: FeedbackSettings):
        self.settings, self.answered = settings, 0
        self.left: dict[int, float] = defaultdict(float)
        for request in requests:
            self.left[request.client] += settings.quorum

    def count(self, request: Request) -> None:
        self.answered += 1
        self.left[request.client] -= 1

    def met(self) -> bool:
        enough = self.settings.answers and self.answered >= self.settings.answers
        return bool(enough) or all(left <= 1e-9 for left in self.left.values())


def _answer(one: dict[str, Any]) -> Answer:
    verdict = None if one["verdict"] is None else one["verdict"] == "right"
    return Answer(verdict, one["hint"], one["user"], float(one["seconds"]))


class _Calls:
    """Calls to the service, again while it is away."""

    def __init__(self, url: str, token: str):
        try:
            import httpx  # here, not above: an extra
        except ImportError as error:
            raise UserError(
                "feedback 'service' needs the package httpx; pip install \"spear-jax[live]\"."
            ) from error
        self.url, self.failures = url, (httpx.TransportError,)
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)

    def get(self, path: str, query: dict[str, Any]) -> dict[str, Any]:
        return self._call("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call("POST", path, json=body)

    def close(self) -> None:
        self.client.close()

    def _call(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        pause, until, told = 0.1, time.monotonic() + PATIENCE, False
        while True:
            try:
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
