"""Types that travel between host and device, and the letters of their shapes.

Dimension key, each letter once:

    federated    C clients · S local steps · A micro-batches · K blocks
    rows         B rows · J reference adapters · P prompt tokens · T completion tokens
    packed       N packed tokens · X prefix trees · Y tokens of a tree · Z keys that a query may see
                 M scored tokens · h shared-prefix tokens
    model        V vocabulary · D width · F MLP width · L layers (L' with adapters) · H heads
                 U key/value heads · E head width · R adapter rank
    generation   G groups of sequences
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import numpy as np


@dataclasses.dataclass
class Cohort:
    """The clients of a round.

    Attributes:
        round: 1-based.
        clients: client ids.
        indices: for each client, the positions of its examples in the training set.
        rngs: (slot, purpose) -> the host's random generator of that client in this round.
    """

    round: int
    clients: list[int]
    indices: list[np.ndarray]
    rngs: Callable[[int, str], np.random.Generator]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question, with labelled options where its task has them; host only.

    Attributes:
        id: unique within its split.
        question: the text that is asked, without options.
        options: the option texts, in the order shown; () for a task without options.
        labels: how an answer names each option ("A", "B", ... or "yes", "no"); same length as
            `options`.
        gold: index of the right option; 0 for a task without options.
        support: text that a feedback provider may hint from (solution lines, facts, a category);
            never shown in a prompt.
        response: the gold completion's text as it follows the header; "" where the task derives it.
        rejected: the dispreferred completion of a preference row, likewise; "" elsewhere.
        also_right: texts that are as right as the gold option, where answers are free; () elsewhere.
    """

    id: str
    question: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int
    support: tuple[str, ...] = ()
    response: str = ""
    rejected: str = ""
    also_right: tuple[str, ...] = ()


@dataclasses.dataclass
class Attempt:
    """One completion of one prompt; host only.

    Attributes:
        prompt: token ids that the model saw.
        completion: token ids that the model sampled, EOS included when it was generated. These ids
            are trained on.
        logprobs: their log-probabilities in nats under the untempered rollout policy; same length.
        text: the decoded completion without special tokens.
        correct: the oracle's verdict.
        feedback: the feedback on the attempt before this one; "" for a first answer.
        unlikelihood_mask: of a lose whose sampled ids are trained on: whether unlikelihood may
            touch each token. None elsewhere.
    """

    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    text: str
    correct: bool
    feedback: str = ""
    unlikelihood_mask: list[bool] | None = None


@dataclasses.dataclass
class Trace:
    """A client's attempts at one example: a first answer, then revisions.

    Revisions end with a right one, or when their number is used up.

    Attributes:
        answered: False where feedback was asked for and nobody gave any; the trace then gives neither
            a win nor a lose.
        beside: it is none of the round's own questions, but what people asked, or answered late.
    """

    client: int
    example: Example
    attempts: list[Attempt]
    answered: bool = True
    beside: bool = False

    @property
    def first(self) -> Attempt:
        """Returns the first answer."""
        return self.attempts[0]

    @property
    def last(self) -> Attempt:
        """Returns the latest attempt, which is the first answer where nothing was revised."""
        return self.attempts[-1]


class TraceRecord(NamedTuple):
    """A trace as it is recorded.

    Attributes:
        trace: the trace.
        role: the role of its first answer: "win", "lose" or "unused"; "lost" where its client was
            lost in the round.
        confidence: the weight of its unlikelihood.
    """

    trace: Trace
    role: str
    confidence: float


# (stage, rows finished since the last call, rows of the stage)
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, rows: int, total: int) -> None:
    """Shows nothing."""


@dataclasses.dataclass
class Tally:
    """Tokens since the last reading.

    Attributes:
        prompt: tokens read as prompts.
        scored: tokens scored by a frozen policy.
        generated: tokens generated.
    """

    prompt: int = 0
    scored: int = 0
    generated: int = 0

    def clear(self) -> None:
        """Begins to count anew."""
        self.prompt = self.scored = self.generated = 0


@flax.struct.dataclass
class Mean:
    """A ratio that is divided once: `total / count`, and 0 where nothing was counted.

    Means of micro-batches add up to the mean of the whole step:

        >>> (Mean(3.0, 2) + Mean(9.0, 1)).value()
        4.0
    """

    total: jax.Array
    count: jax.Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """Returns the ratio, on the host."""
        return float(self.total) / float(self.count) if float(self.count) else 0.0
