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

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core import pytrees
from spear_jax.core.errors import UserError
from spear_jax.core.records import wilson
from spear_jax.core.types import Example, Progress, no_progress
from spear_jax.models.lm_head import head_logits, head_weight
from spear_jax.models.token_logprobs import TokenLogprobs
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.rollout.sampler import Completion, Sampler
from spear_jax.rollout.scorer import Scorer, Scores
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
    def accuracy(self) -> float:
        """Returns the share of right ones."""
        return self.correct / self.count

    @property
    def stderr(self) -> float:
        """The binomial standard error sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval."""
        return wilson(self.accuracy, self.count)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A fixed set of questions, rendered once.

    Attributes:
        prompts: token ids of each question.
        method: "choice", "generate" or "likelihood".
        sampling: greedy settings for "generate".
        rows: questions in one forward pass.
        responses: token ids of each example's gold response, for "likelihood".
        progress: called with ("evaluate", questions finished, all questions).
    Raises: UserError for a method that the task has no ground for.
    """

    task: Task
    renderer: PromptRenderer
    sampler: Sampler
    scorer: Scorer
    examples: list[Example]
    prompts: list[list[int]]
    method: str
    sampling: SamplingConfig
    rows: int
    responses: Sequence[list[int]] = ()
    progress: Progress = no_progress

    def __post_init__(self):
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

    def __call__(self, policy: Policy) -> Accuracy:
        """Measures a policy on all questions; raises UserError where its scores are not finite."""
        if self.method == "likelihood":
            return self._likelihood(policy)
        if self.method == "generate":
            right = self._generate(policy)
        else:
            scores = self.choice_scores(policy)
            self._check(np.isfinite(scores.max(axis=1)))  # NaN in any option makes the largest NaN
            chosen = np.argmax(scores, axis=1)
            right = chosen == [example.gold for example in self.examples]
        return Accuracy(int(np.sum(right)), len(self.examples), self.method)

    def _check(self, finite: np.ndarray) -> None:
        """Raises UserError where a score is none."""
        if not finite.all():
            raise UserError(
                f"the model gives NaN or infinity as {int((~finite).sum())} of {len(finite)} "
                f"scores of task {self.task.name!r}, which says nothing about its answers. Its "
                "weights or its adapter overflow: set dtype=float32, or train at a lower rate."
            )

    def _generate(self, policy: Policy) -> list[bool]:
        keys = np.zeros((len(self.prompts), 2), np.uint32)  # greedy: never read
        right = [False] * len(self.prompts)

        def grade(i: int, completion: Completion) -> None:
            right[i] = self.task.grade(self.renderer.decode(completion.tokens), self.examples[i])
            self.progress("evaluate", 1, len(self.prompts))

        self.sampler.generate(policy.lora, policy.base, self.prompts, keys, self.sampling, grade)
        return right

    def _likelihood(self, policy: Policy) -> Accuracy:
        """Teacher-forced scores of the responses' tokens. Sums are taken on the host, in float64
        and over real tokens only.
        """
        rows = [self._row(i, response) for i, response in enumerate(self.responses)]
        scores = self._score(policy, "likelihood", rows)
        logprobs, hit = np.concatenate(scores.logprobs), np.concatenate(scores.likeliest)
        self._check(np.isfinite(logprobs))
        nll = -float(logprobs.sum(dtype=float)) / len(hit)
        return Accuracy(int(hit.sum()), len(hit), self.method, nll)

    def choice_scores(self, policy: Policy) -> np.ndarray:
        """Returns float32[N, options]: log p(label | prompt), −inf where a question has fewer
        options.
        """
        labels = sorted({label for example in self.examples for label in example.labels})
        header = self.task.templates.header if self.task else ""  # the benchmark has no task
        ids = {label: self.renderer.continuation(label, header) for label in labels}
        shared = {tuple(tokens[:-1]) for tokens in ids.values()}
        if len(shared) == 1:
            return self._last_tokens(policy, ids, list(next(iter(shared))))
        return self._full_continuations(policy, ids)

    def _last_tokens(self, policy: Policy, ids: dict[str, list[int]], prefix) -> np.ndarray:
        """Scores of labels that differ in their last token alone, by one forward a question."""
        width = max(len(example.labels) for example in self.examples)
        rows = [
            self._row(i, ids[example.labels[0]][-1:], prefix)
            for i, example in enumerate(self.examples)
        ]
        packed = self.scorer.pack(rows, *self._shape_of("choice", rows))
        last = np.zeros((len(packed.blocks), packed.shape.groups, width), np.int32)
        for example, place in zip(self.examples, packed.places, strict=True):
            last[place][: len(example.labels)] = [ids[name][-1] for name in example.labels]
        prefilled = self._prefilled(policy)
        run = lambda xs: _score_candidates(
            self.scorer.decoder, policy.lora, policy.base, *xs, prefilled
        )
        found = self.scorer.over_devices(
            run, list(zip(packed.blocks, last, strict=True)), self._report()
        )
        scores = np.full((len(rows), width), -np.inf, np.float32)
        for i, (example, place) in enumerate(zip(self.examples, packed.places, strict=True)):
            count = len(example.labels)
            scores[i, :count] = found[place][:count]
        return scores

    def _full_continuations(self, policy: Policy, ids: dict[str, list[int]]) -> np.ndarray:
        width = max(len(example.labels) for example in self.examples)
        pairs = [
            (i, j) for i, example in enumerate(self.examples) for j in range(len(example.labels))
        ]
        rows = [self._row(i, ids[self.examples[i].labels[j]]) for i, j in pairs]
        found = self._score(policy, "continuations", rows).logprobs
        scores = np.full((len(self.prompts), width), -np.inf, np.float32)
        for pair, logprobs in zip(pairs, found, strict=True):
            scores[pair] = logprobs.sum()
        return scores

    @functools.cached_property
    def _shared_prefix(self) -> list[int]:
        return self.sampler.shared_prefix(self.prompts)

    def _prefilled(self, policy: Policy):
        """Keys and values of what `_row` leaves out."""
        return self.sampler.prefill_shared_prefix(policy.lora, policy.base, self._shared_prefix)

    def _row(self, index: int, tokens: list[int], prefix: Sequence[int] = ()) -> TrainingRow:
        prompt = self.prompts[index][len(self._shared_prefix) :]
        return TrainingRow([*prompt, *prefix], tokens, np.ones(len(tokens), bool), 1.0, 1)

    def _shape_of(self, name: str, rows: list[TrainingRow]) -> tuple[str, int]:
        """The name of the rows' block shape, and the tokens of about `self.rows` questions."""
        longest = max(len(r.prompt) for r in rows), max(len(r.completion) for r in rows)
        return "evaluate {} {} {}".format(name, *longest), self.rows * Scorer.mean_tokens(rows)

    def _score(self, policy: Policy, name: str, rows: list[TrainingRow]) -> Scores:
        return self.scorer.score(
            policy,
            rows,
            *self._shape_of(name, rows),
            shared_prefix=self._prefilled(policy),
            report=self._report(),
        )

    def _report(self) -> Callable[[int, int], None]:
        """Turns finished blocks into finished questions."""
        reported = 0

        def report(done: int, total: int) -> None:
            nonlocal reported
            finished = len(self.prompts) * done // total
            self.progress("evaluate", finished - reported, len(self.prompts))
            reported = finished

        return report


@functools.partial(jax.jit, static_argnums=0)
def _score_candidates(decoder, lora, base, blocks, candidates, shared_prefix=None):
    """float32[G, B, n]: log-probabilities of candidate next tokens int32[G, B, n]."""

    def one(block, candidates):
        model = TokenLogprobs(decoder, base, 0, shared_prefix=shared_prefix)
        hidden = model.states(lora, block)[block.start]
        logits = head_logits(hidden, head_weight(base))
        return jnp.take_along_axis(jax.nn.log_softmax(logits), candidates, axis=-1)

    return pytrees.vmap_or_single(one)(blocks, candidates)
