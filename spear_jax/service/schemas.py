"""What comes in: bodies and parameters, and their bounds."""

from typing import Annotated, Literal

import fastapi
import pydantic

LONGEST_WAIT = 25.0  # seconds of a long poll


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds the character NUL, which no database keeps")
    return text


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("it holds characters that cannot be printed; use others")
    return name


def _addressable(name: str) -> str:
    if {".", "..", ""} & set(_printable(name).split("/")):
        raise ValueError("it cannot stand in an address; leave out '.', '..' and empty parts")
    return name


_PLAIN, _SHOWN = pydantic.AfterValidator(_plain), pydantic.AfterValidator(_printable)
Label = Annotated[str, pydantic.Field(max_length=200), _PLAIN]
Hint = Annotated[str, pydantic.Field(max_length=500), _PLAIN]
Question = Annotated[str, pydantic.Field(min_length=1, max_length=2_000), _PLAIN]
Long = Annotated[str, pydantic.Field(max_length=100_000), _PLAIN]
Id = Annotated[
    str, pydantic.Field(min_length=1, max_length=64), pydantic.AfterValidator(_addressable)
]
Name = Annotated[str, pydantic.Field(min_length=1, max_length=200), _SHOWN]
Number = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
Verdict = Literal["right", "wrong"]
Cursor = Annotated[int, fastapi.Query(ge=0, lt=2**53)]
Wait = Annotated[float, fastapi.Query(ge=0, le=LONGEST_WAIT)]
RunName = Annotated[Name, fastapi.Query()]
ChatKey = Annotated[int, fastapi.Path(ge=0, lt=2**31)]
RequestId = Annotated[Id, fastapi.Path()]


class Body(pydantic.BaseModel):
    """A body: its own fields alone, of their types."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class RunBody(Body):
    """A run."""

    run: Name
    task: Label
    clients: Annotated[int, pydantic.Field(ge=1, lt=2**31)]
    rounds: Number
    asks: Literal["verdict", "hint"] = "verdict"
    show_right: bool = False
    examples: Annotated[list[Question], pydantic.Field(max_length=100)] = []


class OneRequest(Body):
    """An answer of the model that waits for a person."""

    id: Id
    client: Number
    attempt: Number = 0
    question: Long
    answer: Long
    right: Long | None = None
    adapter: Label = ""


class RequestsBody(Body):
    """Requests of a round."""

    run: Name
    round: Number
    requests: Annotated[list[OneRequest], pydantic.Field(max_length=10_000)]


class Sample(Body):
    """The newest adapter's answer to a fixed question."""

    question: Long
    answer: Long


class RoundBody(Body):
    """What is known of a round."""

    run: Name
    round: Number
    phase: Literal["asking", "training", "evaluating", "done"]
    deadline: float | None = None
    wanted: Number | None = None
    accuracy: float | None = None
    sample: Sample | None = None
    close: bool = False


class AnswerBody(Body):
    """What a person says of an answer."""

    verdict: Verdict | None = None
    hint: Hint | None = None


class QuestionBody(Body):
    """A question to the model."""

    question: Question


class JudgementBody(Body):
    """What a person says of a chat's answer."""

    verdict: Verdict
    hint: Hint | None = None
    revision: bool = False


class JobBody(Body):
    """The end of a job: an answer and its adapter, or an error."""

    answer: Long | None = None
    adapter: Label | None = None
    error: Long | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> "JobBody":
        if (self.answer is None) == (self.error is None):
            raise ValueError("give either an answer or an error")
        return self


class WebhookBody(Body):
    """Where new rounds are told."""

    url: Annotated[str, pydantic.Field(max_length=2_000), _SHOWN]

    @pydantic.field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        pydantic.TypeAdapter(pydantic.HttpUrl).validate_python(url)
        return url
