"""Accuracy on held-out examples: by the likelihood of the answer's label, by greedy generation, or
token by token.

When all labels of the examples share every token but the last (" A", " B", ...), one forward pass
per question gives all labels' scores; otherwise each label's whole continuation is scored.
Responses that nothing grades are scored by their own tokens, each predicted from the prompt and the
true tokens before it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core import pytrees
from spear_jax.core.errors import UserError
from spear_jax.core.mesh import to_host
from spear_jax.core.records import wilson
from spear_jax.core.types import Example
from spear_jax.models.decoder import Decoder
from spear_jax.models.lm_head import head_logits, head_weight
from spear_jax.models.params import Adapter, DecoderParams
from spear_jax.models.token_logprobs import TokenLogprobs
from spear_jax.packing.arrays import Block
from spear_jax.packing.blocks import choose_block_shape, pack_single_rows
from spear_jax.packing.rows import TrainingRow
from spear_jax.packing.shape_buckets import BlockShape
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.rollout.sampler import Completion, Sampler
from spear_jax.rollout.scorer import _token_scores
from spear_jax.rollout.token_sampling import SamplingConfig
from spear_jax.tasks.base import Task

METHODS = ("auto", "choice", "generate", "likelihood")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """correct / count, and how it was found.

    Attributes:
        count: examples; under "likelihood" response tokens, EOS included. Tokens of one response
            hang together, so that `stderr` and `interval` are then too narrow.
        nll: mean negative log-likelihood of those tokens in nats, under "likelihood" only.
    """

    correct: int
    count: int
    method: str
    nll: float | None = None

    @property
    def value(self) -> float:
        return self.correct / self.count

    @property
    def stderr(self) -> float:
        """The binomial standard error sqrt(p (1 - p) / n)."""
        return math.sqrt(self.value * (1 - self.value) / self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval."""
        return wilson(self.value, self.count)


@dataclasses.dataclass
class Evaluator:
    """A fixed set of questions, rendered once.

    Attributes:
        prompts: token ids of each question.
        method: "choice", "generate" or "likelihood".
        sampling: greedy settings for "generate".
        rows: questions in one forward pass.
        place: puts an array with a leading row axis on the devices; devices: their number.
        report: called with the number of questions finished.
        responses: token ids of each example's gold response, for "likelihood".
    Raises: UserError for a method that the task has no ground for.
    """

    task: Task
    renderer: PromptRenderer
    decoder: Decoder
    sampler: Sampler
    examples: list[Example]
    prompts: list[list[int]]
    method: str
    sampling: SamplingConfig
    rows: int
    place: Callable = jnp.asarray
    devices: int = 1
    report: Callable[[int], None] = lambda count: None
    responses: Sequence[list[int]] = ()

    def __post_init__(self):
        self._opening = self.sampler.shared_prefix(self.prompts)
        problem = ""
        if self.method == "choice" and any(len(example.labels) < 2 for example in self.examples):
            problem = "compares options, and its questions have none"
        elif self.method == "generate" and self.task.scoring == "likelihood":
            problem = "grades answers, and it has no right ones"
        elif self.method == "likelihood" and len(self.responses) != len(self.examples):
            raise ValueError(f"{len(self.responses)} responses for {len(self.examples)} examples")
        if problem:
            raise UserError(
                f"eval.method {self.method!r} does not fit task {self.task.name!r}: it {problem}. "
                f"Set --config.eval.method=auto, which is {self.task.scoring!r} here."
            )

    def __call__(self, policy: DecoderParams, lora: Adapter | None = None) -> Accuracy:
        """Accuracy of a policy (adapter merged), or of a base with an adapter beside it."""
        if self.method == "likelihood":
            return self._likelihood(policy, lora)
        if self.method == "generate":
            right = self._generate(policy, lora)
        else:
            right = np.argmax(self.choice_scores(policy, lora), axis=1) == [
                e.gold for e in self.examples
            ]
        return Accuracy(int(np.sum(right)), len(self.examples), self.method)

    def _generate(self, policy, lora) -> list[bool]:
        keys = np.zeros((len(self.prompts), 2), np.uint32)  # greedy: never read
        right = [False] * len(self.prompts)

        def grade(i: int, completion: Completion) -> None:
            right[i] = self.task.grade(self.renderer.decode(completion.tokens), self.examples[i])
            self.report(1)

        self.sampler.generate(lora, policy, self.prompts, keys, self.sampling, grade)
        return right

    def _likelihood(self, policy, lora) -> Accuracy:
        """Teacher-forced scores of the responses' tokens. Sums are taken on the host, in float64
        and over real tokens only.
        """
        rows = [self._row(i, response) for i, response in enumerate(self.responses)]
        shape, blocks, _ = self._blocks("likelihood", rows)
        shared_prefix = self._prefill_shared_prefix(policy, lora)
        found = self.over_devices(
            lambda b: _token_scores(self.decoder, 0, lora, policy, b, shared_prefix), blocks, shape
        )
        real = np.stack([block.rows.completion_mask for block in blocks])
        logprobs, hit = (array[real] for array in found)
        return Accuracy(
            int(hit.sum()), len(hit), self.method, -float(logprobs.sum(dtype=float)) / len(hit)
        )

    def choice_scores(self, policy: DecoderParams, lora: Adapter | None = None) -> np.ndarray:
        """float32[N, options]: log p(label | prompt), −inf where a question has fewer options."""
        labels = sorted({label for example in self.examples for label in example.labels})
        ids = {label: self.renderer.continuation(label) for label in labels}
        shared = {tuple(tokens[:-1]) for tokens in ids.values()}
        if len(shared) == 1:
            return self._one_forward(policy, lora, ids, list(next(iter(shared))))
        return self._full_continuations(policy, lora, ids)

    def _one_forward(self, policy, lora, ids, prefix) -> np.ndarray:
        width = max(len(example.labels) for example in self.examples)
        rows = [self._row(i, ids[e.labels[0]][-1:], prefix) for i, e in enumerate(self.examples)]
        shape, blocks, places = self._blocks("choice", rows)
        last = np.zeros((len(blocks), shape.groups, width), np.int32)
        for example, place in zip(self.examples, places, strict=True):
            last[place][: len(example.labels)] = [ids[name][-1] for name in example.labels]
        shared_prefix = self._prefill_shared_prefix(policy, lora)
        score = lambda xs: _last_scores(self.decoder, lora, policy, *xs, shared_prefix)
        found = self.over_devices(score, list(zip(blocks, last, strict=True)), shape)
        scores = np.full((len(rows), width), -np.inf, np.float32)
        for index, (example, place) in enumerate(zip(self.examples, places, strict=True)):
            count = len(example.labels)
            scores[index, :count] = found[place][:count]
        return scores

    def _full_continuations(self, policy, lora, ids) -> np.ndarray:
        width = max(len(example.labels) for example in self.examples)
        pairs = [
            (i, j) for i, example in enumerate(self.examples) for j in range(len(example.labels))
        ]
        rows = [self._row(i, ids[self.examples[i].labels[j]]) for i, j in pairs]
        shape, blocks, places = self._blocks("continuations", rows)
        shared_prefix = self._prefill_shared_prefix(policy, lora)
        score = lambda block: _token_scores(self.decoder, 0, lora, policy, block, shared_prefix)
        found, _ = self.over_devices(score, blocks, shape)
        scores = np.full((len(self.prompts), width), -np.inf, np.float32)
        for pair, place in zip(pairs, places, strict=True):
            scores[pair] = found[place].sum()
        return scores

    def _prefill_shared_prefix(self, policy, lora):
        """What `_row` leaves out, read."""
        return self.sampler.prefill_shared_prefix(lora, policy, self._opening)

    def _row(self, index: int, tokens: list[int], prefix: Sequence[int] = ()) -> TrainingRow:
        prompt = self.prompts[index][len(self._opening) :]
        return TrainingRow([*prompt, *prefix], tokens, np.ones(len(tokens), bool), 1.0, 1)

    def _blocks(
        self, name: str, rows: list[TrainingRow]
    ) -> tuple[BlockShape, list[Block], list[tuple[int, int]]]:
        """Rows in blocks of about `self.rows` questions; block and row of each."""
        prompt, length = (
            max(len(row.prompt) for row in rows),
            max(len(row.completion) for row in rows),
        )
        limit = self.rows * (
            sum(len(row.prompt) + len(row.completion) for row in rows) // len(rows)
        )
        items = [(row,) for row in rows]
        choose = lambda: choose_block_shape([[items]], 1, 1, prompt, length, limit)
        shape = self.sampler.shapes.shape(f"evaluate {name} {prompt} {length}", choose)
        return (shape, *pack_single_rows(rows, shape))

    def over_devices(self, run: Callable, blocks: list, shape: BlockShape) -> Any:
        """run(blocks with a leading axis) on as many blocks at a time as there are devices; numpy,
        stacked over blocks.
        """
        found, reported = [], 0
        for begin in range(0, len(blocks), self.devices):
            part = blocks[begin : begin + self.devices]
            whole = part + [part[0]] * (self.devices - len(part))
            real = slice(len(part))
            scores = run(jax.tree.map(lambda *x: self.place(np.stack(x)), *whole))
            found.append(jax.tree.map(lambda x, real=real: x[real], to_host(scores)))
            self.report(len(self.prompts) * (begin + len(part)) // len(blocks) - reported)
            reported = len(self.prompts) * (begin + len(part)) // len(blocks)
        return jax.tree.map(lambda *x: np.concatenate(x), *found)


@functools.partial(jax.jit, static_argnums=0)
def _last_scores(decoder, lora, base, blocks, candidates, shared_prefix=None):
    """float32[G, B, n]: log-probabilities of candidate next tokens int32[G, B, n]."""

    def one(block, candidates):
        hidden = TokenLogprobs(decoder, base, 0, shared_prefix=shared_prefix).states(lora, block)[
            block.start
        ]
        logits = head_logits(hidden, head_weight(base))
        return jnp.take_along_axis(jax.nn.log_softmax(logits), candidates, axis=-1)

    return pytrees.vmap_or_single(one)(blocks, candidates)
