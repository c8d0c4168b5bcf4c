"""The nouns of the project: what travels between host and device, and the letters of its shapes.

Dimension key
    C clients · S local steps · A micro-batches · K blocks · B rows · J reference adapters · P prompt tokens · T completion tokens
    N packed tokens · R packed trees · L cells of a tree (elsewhere: layers) · M scored tokens
    V vocabulary · D model width · H heads · N key/value heads · K head width (of a decoder) · F mlp width · R rank · L layers
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax


@dataclasses.dataclass(frozen=True)
class Example:
    """One question, with labelled options where its task has them; host only.

    Attributes:
        id: unique within its split.
        question: the text that is asked, without options.
        options: the option texts, in the order shown; () for a task without options.
        labels: how an answer names each option ("A", "B", ... or "yes", "no"); same length as `options`.
        gold: index of the right option; 0 for a task without options.
        support: text that a feedback provider may hint from (solution lines, facts, a category); never shown in a prompt.
        response: the gold completion's text as it follows the header; "" where the task derives it.
        rejected: the dispreferred completion of a preference row, likewise; "" elsewhere.
    """

    id: str
    question: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int
    support: tuple[str, ...] = ()
    response: str = ""
    rejected: str = ""


@dataclasses.dataclass
class Attempt:
    """One completion of one prompt; host only.

    Attributes:
        prompt: token ids the model saw.
        completion: token ids the model sampled, EOS included when it was generated; these ids are trained on.
        logprobs: their log-probabilities in nats under the untempered rollout policy; same length.
        text: the decoded completion without special tokens.
        correct: the oracle's verdict.
        feedback: what the user said of the attempt before this one; "" for a first answer.
        touched: where this is a lose whose sampled ids are trained on: whether unlikelihood may touch each token.
    """

    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    text: str
    correct: bool
    feedback: str = ""
    touched: list[bool] | None = None


@dataclasses.dataclass
class Trace:
    """A client's conversation about one example: a first answer, then revisions until right or out of attempts."""

    client: int
    example: Example
    attempts: list[Attempt]

    @property
    def first(self) -> Attempt:
        return self.attempts[0]

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]


@dataclasses.dataclass
class Tally:
    """Tokens since the last reading: read as prompts, scored by a frozen policy, and generated."""

    prompt: int = 0
    scored: int = 0
    generated: int = 0

    def clear(self) -> None:
        self.prompt = self.scored = self.generated = 0


@flax.struct.dataclass
class Mean:
    """A ratio that is divided once: `total / count` (0 where nothing was counted)."""

    total: jax.Array
    count: jax.Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        return float(self.total) / float(self.count) if float(self.count) else 0.0


def spans(columns: Sequence[tuple[int, int]], first: int = 0) -> list[tuple[int, int, int]]:
    """(rows, begin, end) of each (rows, width), the first of which begins at `first`."""
    *begins, _ = itertools.accumulate((width for _, width in columns), initial=first)
    return [(rows, begin, begin + width) for (rows, width), begin in zip(columns, begins, strict=True)]


@flax.struct.dataclass
class Pack:
    """Token sequences as trees: a prompt once, followed by each of its completions, all trees flat behind one another. What
    all prompts open with may stand once before them.

    Products with weights see the flat tokens; attention sees a grid of one tree a row, the longest first. Its queries are taken
    column by column, each from as many rows as trees reach it. Unused places of any array hold 0, but for `branch`.

    Attributes:
        tokens: int32[..., N], an opening's h tokens the first.
        positions: int32[..., N], rotary positions; prompts go on from the opening's, every branch from its prompt's.
        grid: int32[..., R, L], the flat place of each cell's token; the opening's stand before every tree's.
        branch: int32[..., R, L], 0 in a prompt and its opening, 1, 2, ... in its completions, -1 where a cell is empty.
        cell: int32[..., N], the place of each token among the queries: column after column, each in row-major order.
        columns: (rows, width) of each; an opening is one of its own, (1, h).
    """

    tokens: jax.Array
    positions: jax.Array
    grid: jax.Array
    branch: jax.Array
    cell: jax.Array
    columns: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Batch:
    """Rows as a loss sees them; a row may repeat another.

    Attributes:
        completion_mask: bool[..., B, T], every completion token (EOS included when it was generated), right-padded.
        loss_mask: bool[..., B, T], the positions that a loss may use; a subset of `completion_mask`.
        weight: float32[..., B, T], token-level confidence, or an example's weight.
        advantage: float32[..., B], of the completion.
        label: int32[..., B], +1 win (or real), -1 lose (or synthetic), 0 padding row; a method may use further kinds.
        reference: float32[..., B, J, T], log-probabilities under each reference adapter; filled in by local training.
        old: float32[..., B, T], under the adapter that the phase started from; filled in by local training.
    """

    completion_mask: jax.Array
    loss_mask: jax.Array
    weight: jax.Array
    advantage: jax.Array
    label: jax.Array
    reference: jax.Array | None = None
    old: jax.Array | None = None


@flax.struct.dataclass
class Block:
    """Rows that go through the model together, each distinct one once. Leading axes [C, S, K] for a round's local training.

    Attributes:
        packs: the tokens; one pack, or one for each of a method's `trunks`.
        source: for each pack int32[..., M], the flat places whose states predict the scored completion tokens.
        target: int32[..., M], those completion tokens.
        start: int32[..., B], where each row's completion begins in `target`.
        rows: the rows.
        micro: int32[...], the micro-batch that the rows belong to.
    """

    packs: tuple[Pack, ...]
    source: tuple[jax.Array, ...]
    target: jax.Array
    start: jax.Array
    rows: Batch
    micro: jax.Array


@flax.struct.dataclass
class ClientState:
    """One client in the middle of a round (or a cohort of them, with a leading axis C).

    Attributes:
        lora: its adapter.
        opt_state: its optimiser's moments.
    """

    lora: Any
    opt_state: Any


@flax.struct.dataclass
class ServerState:
    """Everything that a run needs to go on; exactly what Orbax saves.

    Attributes:
        lora: the global adapter.
        opt_state: server moments (empty for plain averaging).
        memory: what an algorithm keeps between rounds, numpy arrays (empty for SPEAR).
        round: int32[], rounds finished.
        key: uint32 key data of the run's root key.
    """

    lora: Any
    opt_state: Any
    memory: Any
    round: jax.Array
    key: jax.Array
