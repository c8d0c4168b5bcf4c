"""Providers of feedback on answers."""

import abc
import dataclasses
import enum
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Literal

from spear_jax.core.errors import UserError
from spear_jax.core.types import Attempt, Example, Trace
from spear_jax.tasks.base import Task


class Nobody(enum.Enum):
    """What a provider gives for an answer that nobody looked at: it becomes neither win nor lose."""

    NOBODY = enum.auto()


NOBODY: Final = Nobody.NOBODY
# a feedback text; None: nothing to say, so that no revision follows; NOBODY: nobody looked at it
Said = str | None | Literal[Nobody.NOBODY]


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to comment on.

    Attributes:
        example: the question.
        answer: the text of the latest completion.
        attempt: the number of the revision that the feedback is for, from 1; where a verdict is
            asked for, the number of the answer itself, from 0.
        id: of the answer; the same in every run of the same bits.
        client: whose answer it is.
        made: the answer as it was generated.
        row: its place among the answers of one conversation (`Feedback.converse`).
    """

    example: Example
    answer: str
    attempt: int
    id: str = ""
    client: int = 0
    made: Attempt | None = None
    row: int = 0


@dataclasses.dataclass(frozen=True)
class RunView:
    """What a provider may know of the run that it serves.

    Attributes:
        name: of the run folder.
        folder: the run folder; the provider may write files of its own there.
        clients, rounds: of the config.
        examples: the training set.
        answer: the newest adapter's greedy answers to questions, each an (example, previous answer,
            feedback), of which the last two are "" where nothing is revised.
        count_tokens: of a text.
    """

    name: str
    folder: pathlib.Path
    clients: int
    rounds: int
    examples: list[Example]
    answer: Callable[[list[tuple[Example, str, str]]], list[Attempt]]
    count_tokens: Callable[[str], int]


class Feedback(abc.ABC):
    """A provider that comments on a batch of answers.

    Where it has nothing to say it gives None, and no revision follows.

    Class attributes:
        asks_people: whether a person answers, so that nothing may be asked for show.
        asks_by_id: whether requests need ids, since somebody is asked and what is said is kept.
        judges: whether the provider says right or wrong of every answer, in the task's place.

    Args:
        task: grades answers, states their format and gives hints.
        hint_words: how many words of the gold option a hint may quote at most.
    Raises: UserError for a negative hint_words.
    """

    asks_people: ClassVar[bool] = False
    asks_by_id: ClassVar[bool] = False
    judges: bool = False

    def __init__(self, task: Task, hint_words: int = 3):
        if hint_words < 0:
            raise UserError(
                f"hint_words {hint_words} is negative; give 0 for hints without words of the "
                f"option."
            )
        self.task = task
        self.hint_words = hint_words

    def longest_texts(self, examples: list[Example]) -> list[str]:
        """Returns, for each example, a text as long as any that the provider says of it.

        Training rows keep space for it in revision prompts. A longer text costs the end of the
        answer there.
        """
        return ["x" * 400] * len(examples)

    @classmethod
    def build(cls, task: Task, hint_words: int, settings: Any) -> "Feedback":
        """Builds the provider. Args: settings: `config.feedback`, for providers that read it."""
        return cls(task, hint_words)

    @abc.abstractmethod
    def __call__(self, requests: list[Request]) -> Sequence[Said]:
        """Returns what is said of each request's answer, in order."""

    def judge(self, requests: list[Request]) -> Sequence[bool | None]:
        """Returns whether each answer is right, None where nobody looked at it; only of a provider
        that judges.
        """
        raise NotImplementedError(f"{type(self).__name__} does not judge")

    def converse(
        self, requests: list[Request], take: Callable[[list[Request]], list[Request]]
    ) -> None:
        """Hands all requests to `take`, which has the answers judged and commented on by this
        provider, revises them, and returns the requests that follow.

        Here all are handed over at once. A provider that waits for people hands over what they have
        said, so that the device revises for some while others think:

            converse([a, b], take)    b is answered first: take([b]) -> [c], take([a, c]) -> []
        """
        while requests:
            requests = take(requests)

    def begin_run(self, run: RunView) -> None:  # noqa: B027 (most need nothing)
        """Called once, before the first round of a process."""

    def begin_round(self, number: int) -> None:  # noqa: B027
        """Called before a round, numbered from 1."""

    def beside(self, clients: Sequence[int]) -> list[Trace]:
        """Returns what these clients' people asked, or answered late, and said right or wrong of; each
        trace once.
        """
        return []

    def end_rollouts(self) -> None:  # noqa: B027
        """Called when the rollouts of a round, or of one of its phases, are over."""

    def end_round(self, number: int, metrics: dict[str, float]) -> None:  # noqa: B027
        """Called when a round's metrics are on disk; of round 0, when the base is evaluated."""

    def end_run(self) -> None:  # noqa: B027
        """Called when the process stops training, whatever the reason."""

    def take_metrics(self) -> dict[str, float]:
        """Returns the metrics of a round's feedback so far, and starts anew."""
        return {}
