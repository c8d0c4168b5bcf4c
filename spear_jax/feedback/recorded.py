"""Feedback that is asked for and takes time: kept in the run folder, asked for once, and replayed.

`feedback.jsonl` of a run folder has a line for every answer of the model that was shown to somebody,
written before it is used. A run that was killed finds there what was said and asks for the rest
alone. The ids come from the run's random keys and from the answers' texts: the same bits give the
same ids.
"""

import abc
import collections
import dataclasses
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import writing
from spear_jax.core.settings import number, one_of
from spear_jax.core.types import Attempt, Example, Trace
from spear_jax.feedback.base import NOBODY, Feedback, Request, RunView, Said
from spear_jax.tasks.base import WRONG, Task

FILE = "feedback.jsonl"
LONGEST_HINT = 500  # characters


@dataclasses.dataclass(frozen=True)
class FeedbackSettings:
    """What providers that ask somebody read; `rollout.feedback` names the provider."""

    asks: str = one_of(
        "hint", "verdict"
    )  # hint: about wrong answers; verdict: right or wrong of all
    show_right: bool = False  # people see what is right
    deadline: float = number(0.0, 0)  # seconds for first answers, and for each revision; 0 is none
    answers: int = number(0, 0)  # so many in a round end the waiting; 0: all
    quorum: float = number(1.0, above=0, high=1)  # this share of each client's questions ends it
    late: str = one_of("use", "drop")  # verdicts that come after the waiting: in the next round
    chats: bool = True  # what people asked themselves and said right or wrong of is trained on
    url: str = ""  # of the service, or of the judge's endpoint
    token: str = "SPEAR_FEEDBACK_TOKEN"  # the environment variable that holds the token for it
    model: str = ""  # of judge: what its endpoint calls it
    reward: str = ""  # of reward: MODULE:FUNCTION
    mixture: str = ""  # of mixture: "0-3=service,4=judge,*=oracle", by client
    replay: str = ""  # a run folder, or its feedback.jsonl
    reply_rate: float = number(1.0, 0, 1)  # of simulated people: how often they answer
    error_rate: float = number(
        0.0, 0, 1
    )  # how often they take right for wrong, and wrong for right
    hint_rate: float = number(1.0, 0, 1)  # how often they hint
    delay: float = number(0.0, 0)  # mean seconds until they answer, exponential


DEFAULTS = FeedbackSettings()


class Answer(NamedTuple):
    """What somebody said of an answer of the model.

    Attributes:
        verdict: right or wrong; None where a hint alone was asked for.
        hint: a text, or None.
        user: who said it.
        seconds: that it took.
    """

    verdict: bool | None
    hint: str | None
    user: str
    seconds: float = 0.0


class FeedbackLog:
    """The answers of people by request id, kept in a file.

    An entry of None is a request that nobody answered in time.

    Attributes:
        said: by request id.
        open: the lines of requests that nobody answered in time, by id.
        beside: lines of traces beside the rounds' questions, by round.
        jobs: lines of answers in the chat, by job.
        waves: by request id, which requests were handed on together (`Feedback.converse`): 1, 2, ...;
            0 where all were.

    Args:
        file: None keeps them in memory alone.
        durable: every entry is on disk before it is used; what simulated people say can be had again.
    Raises: UserError for a file that is not one.
    """

    def __init__(self, file: pathlib.Path | None, durable: bool = True):
        self.file, self.durable = file, durable
        self.said: dict[str, Answer | None] = {}
        self.open: dict[str, dict[str, Any]] = {}
        self.beside: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.waves: dict[str, int] = {}
        if file is not None and file.exists():
            self._read(file)

    def append(self, request: Request, answer: Answer | None, **more: Any) -> None:
        """Keeps an answer."""
        line = {
            "id": request.id,
            "client": request.client,
            "attempt": request.attempt,
            "example": request.example.id,
            "answer": request.answer,
            "answered": answer is not None,
            **(answer._asdict() if answer is not None else {}),
            "time": time.time(),
            **more,
        }
        if answer is None and request.made is not None:
            line["made"] = as_json(request.made)
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Keeps a line, in memory and in the file."""
        self._take(line)
        if self.file is None:
            return
        with writing(self.file), open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            if self.durable:
                out.flush()
                os.fsync(out.fileno())

    def _read(self, file: pathlib.Path) -> None:
        raw = file.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):  # cut short by a kill: that answer was not used
            with writing(file), open(file, "r+b") as out:
                out.truncate(len(whole))
        for at, line in enumerate(whole.splitlines(), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}, line {at}: {shown(line.decode('utf-8', 'replace'))} is no feedback; "
                    "put the file back as it was written, or delete that line."
                ) from error

    def _take(self, line: dict[str, Any]) -> None:
        if "beside" in line:
            self.beside[line["beside"]].append(line)
        elif "job" in line:
            self.jobs[line["job"]] = line
        elif line["answered"]:
            self.said[line["id"]] = Answer(*(line[name] for name in Answer._fields))
            self.waves[line["id"]] = int(line.get("wave", 0))
        else:
            self.said[line["id"]] = None
            self.waves[line["id"]] = int(line.get("wave", 0))
            if "made" in line:
                self.open[line["id"]] = line

    def first_wave(self, requests: Sequence[Request]) -> list[Request]:
        """Returns those of the requests that were handed on first, [] where none has been."""
        known = [self.waves[x.id] for x in requests if x.id in self.waves]
        return [x for x in requests if self.waves.get(x.id) == min(known)] if known else []


def as_json(attempt: Attempt) -> dict[str, Any]:
    """An attempt as JSON keeps it."""
    held = dataclasses.asdict(attempt)
    held["logprobs"] = [float(x) for x in attempt.logprobs]
    return held | {name: [int(x) for x in held[name]] for name in ("prompt", "completion")}


class Recorded(Feedback):
    """A provider that asks somebody; what was said is kept and asked for once.

    Args: settings: `config.feedback`.
    """

    asks_by_id: ClassVar[bool] = True

    def __init__(self, task: Task, hint_words: int = 3, settings: FeedbackSettings = DEFAULTS):
        super().__init__(task, hint_words)
        self.settings = settings
        self.judges = settings.asks == "verdict"
        self.log = FeedbackLog(None)
        self.run: RunView | None = None
        self.round = 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._tokens: collections.Counter[int] = collections.Counter()  # by client

    @classmethod
    def build(cls, task: Task, hint_words: int, settings: Any) -> "Recorded":
        return cls(task, hint_words, settings)

    @abc.abstractmethod
    def ask(self, requests: list[Request]) -> Iterator[tuple[Request, Answer]]:
        """Yields what is said of the requests as it comes in, until the waiting is over."""

    def converse(
        self, requests: list[Request], take: Callable[[list[Request]], list[Request]]
    ) -> None:
        open_ = list(requests)
        while open_:
            some = self.next_of(open_)
            taken = {request.id for request in some}
            open_ = [x for x in open_ if x.id not in taken] + take(some)

    def next_of(self, requests: list[Request]) -> list[Request]:
        """Returns those of the requests that are to be handed on now, at least one."""
        return requests

    def begin_run(self, run: RunView) -> None:
        self.run, self.log = run, FeedbackLog(run.folder / FILE, self.asks_people)

    def begin_round(self, number: int) -> None:
        self.round = number

    def beside(self, clients: Sequence[int]) -> list[Trace]:
        if self.run is None:
            return []
        lines = [x for x in self._beside(self.round, clients) if x["client"] in clients]
        known = {example.id: example for example in self.run.examples}
        self._counts["beside"] += len(lines)
        return [
            Trace(
                line["client"],
                known.get(line["example"]) or Example("chat", line["question"], (), (), 0),
                [Attempt(**made) for made in line["attempts"]],
                beside=True,
            )
            for line in lines
        ]

    def _beside(self, round: int, clients: Sequence[int]) -> list[dict[str, Any]]:
        """The lines of traces beside a round's questions."""
        return self.log.beside[round]

    def longest_texts(self, examples: list[Example]) -> list[str]:
        return [self._text("x" * (LONGEST_HINT // 2))] * len(examples)

    def __call__(self, requests: list[Request]) -> list[Said]:
        texts: list[Said] = []
        for request, answer in zip(requests, self._said(requests), strict=True):
            if answer is None:
                texts.append(NOBODY)
                continue
            # who judges an answer wrong has said something, with a hint or without
            silent = answer.hint is None and answer.verdict is None
            text = None if silent else self._text(answer.hint)
            texts.append(text)
            if text is not None:
                self._counts["hints"] += answer.hint is not None
                self._counts["leaks"] += self.task.leaks(text, request.example)
                if self.run is not None:
                    self._tokens[request.client] += self.run.count_tokens(text)
        return texts

    def judge(self, requests: list[Request]) -> list[bool | None]:
        return [answer and answer.verdict for answer in self._said(requests)]

    def take_metrics(self) -> dict[str, float]:
        counts, tokens = self._counts, self._tokens
        self._counts, self._tokens = collections.Counter(), collections.Counter()
        names = ("asked", "answered", "hints", "leaks", "beside")
        return {f"feedback/{name}": float(counts[name]) for name in names} | {
            "feedback/tokens": float(tokens.total()),
            "feedback/tokens_of_most": float(max(tokens.values(), default=0)),
        }

    def _said(self, requests: list[Request]) -> list[Answer | None]:
        """What was said of each request, now or before; None where nobody did."""
        requests = [request if request.id else _identified(request) for request in requests]
        missing = [request for request in requests if request.id not in self.log.said]
        for request, answer in self.ask(missing) if missing else ():
            self._keep(request, answer)
        for request in missing:
            if request.id not in self.log.said:
                self._keep(request, None)
        return [self.log.said[request.id] for request in requests]

    def _keep(self, request: Request, answer: Answer | None, wave: int = 0) -> None:
        self.log.append(request, answer, round=self.round, **({"wave": wave} if wave else {}))
        self._counts["asked"] += 1
        self._counts["answered"] += answer is not None

    def _text(self, hint: str | None) -> str:
        """Feedback as the oracle words it: wrong, the form of an answer, and the hint."""
        return " ".join(filter(None, (WRONG, self.task.templates.format, hint)))


def _identified(request: Request) -> Request:
    """A request of a caller that gives no ids."""
    key = f"{request.client}/{request.example.id}/{request.attempt}/{request.answer}"
    return dataclasses.replace(request, id=f"{zlib.crc32(key.encode()):08x}")


class Replay(Recorded):
    """What people said in another run, again.

    Raises: UserError for a run without feedback, and where this run asks what that one did not: its
        answers then differ.
    """

    def __init__(self, task: Task, hint_words: int = 3, settings: FeedbackSettings = DEFAULTS):
        super().__init__(task, hint_words, settings)
        if not settings.replay:
            raise UserError(
                "rollout.feedback is 'replay', but feedback.replay is empty; give a run folder in "
                "--config.feedback.replay."
            )
        self.source = FeedbackLog(None)

    def begin_run(self, run: RunView) -> None:
        super().begin_run(run)
        path = pathlib.Path(self.settings.replay)
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(
                f"feedback.replay is {shown(self.settings.replay)}, where no {FILE} is; give the folder of a "
                "run whose feedback was asked for, such as by service or simulated."
            )
        self.source = FeedbackLog(file)

    def next_of(self, requests: list[Request]) -> list[Request]:
        """The same company as in the other run, so that not even a last bit differs."""
        return self.source.first_wave(requests) or requests

    def _keep(self, request: Request, answer: Answer | None, wave: int = 0) -> None:
        super()._keep(request, answer, self.source.waves.get(request.id, wave))

    def ask(self, requests: list[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            if request.id not in self.source.said:
                raise UserError(
                    f"round {self.round}: {shown(self.settings.replay)} has nothing on the answer "
                    f"{shown(request.answer)} of client {request.client} to example "
                    f"{request.example.id!r}. The runs differ: take the same config, versions and "
                    "devices, and no more rounds than it has."
                )
            answer = self.source.said[request.id]
            if answer is not None:
                yield request, answer

    def _beside(self, round: int, clients: Sequence[int]) -> list[dict[str, Any]]:
        return self.source.beside[round]


def http(url: str, provider: str, example: str) -> Any:
    """Returns the package httpx, for a provider that calls a url.

    Raises: UserError for another kind of url, and without the package.
    """
    check_url(url, provider, example)
    try:
        import httpx  # here, not above: an extra
    except ImportError as error:
        raise UserError(
            f'feedback {provider!r} needs the package httpx; pip install "spear-jax[live]".'
        ) from error
    return httpx


def check_url(url: str, provider: str, example: str) -> None:
    """Raises UserError for what is no address."""
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"rollout.feedback is {provider!r}, but feedback.url is {shown(url)}; give "
            f"--config.feedback.url={example}."
        )
