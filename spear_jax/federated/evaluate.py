"""Accuracy on held-out examples: by the likelihood of the answer's label, by greedy generation, or token by token.

When all labels of the examples share every token but the last (" A", " B", ...), one forward pass per question gives all
labels' scores; otherwise each label's whole continuation is scored. Responses that nothing grades are scored by their own
tokens, each predicted from the prompt and the true tokens before it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.analysis import wilson
from spear_jax.errors import UserError
from spear_jax.models.decoder import Decoder, head_weight, prefill
from spear_jax.models.token_logprobs import Scorer
from spear_jax.packing import Row, pack
from spear_jax.sampling import Sampler, SamplingConfig, length_bucket, row_bucket
from spear_jax.tasks.base import Task
from spear_jax.text import Renderer
from spear_jax.types import Example

METHODS = ("auto", "choice", "generate", "likelihood")
CHUNK = 1024  # positions per LM-head block


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """correct / count, and how it was found.

    Attributes:
        count: examples; under "likelihood" response tokens, EOS included. Tokens of one response hang together, so that
            `stderr` and `interval` are then too narrow.
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
    renderer: Renderer
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

    def __call__(self, policy: dict, lora: dict | None = None) -> Accuracy:
        """Accuracy of a policy (adapter merged), or of a base with an adapter beside it."""
        if self.method == "likelihood":
            return self._likelihood(policy, lora)
        if self.method == "generate":
            right = self._generate(policy, lora)
        else:
            right = np.argmax(self.choice_scores(policy, lora), axis=1) == [e.gold for e in self.examples]
        return Accuracy(int(np.sum(right)), len(self.examples), self.method)

    def _generate(self, policy, lora) -> list[bool]:
        keys = np.zeros((len(self.prompts), 2), np.uint32)  # greedy: never read
        done = self.sampler.generate(lora, policy, self.prompts, keys, self.sampling, self.report)
        texts = [self.renderer.decode(completion.tokens) for completion in done]
        return [self.task.grade(text, example) for text, example in zip(texts, self.examples, strict=True)]

    def _likelihood(self, policy, lora) -> Accuracy:
        """Teacher-forced scores of the responses' tokens. Sums are taken on the host, in float64 and over real tokens only."""
        order = sorted(range(len(self.responses)), key=lambda i: -len(self.responses[i]))
        hits, count, total = 0, 0, 0.0
        for begin in range(0, len(order), self.rows):
            part = order[begin : begin + self.rows]
            rows: list[Row | None] = [self._row(i, self.responses[i]) for i in part]
            rows += [None] * (row_bucket(len(part), self.rows, self.devices) - len(part))
            prompt = length_bucket(max(len(self.prompts[i]) for i in part))
            batch = pack(rows, prompt, length_bucket(len(self.responses[part[0]])), self.sampling.pad_id)
            found = _token_scores(self.decoder, CHUNK, lora, policy, jax.tree.map(self.place, batch))
            logprobs, hit = (np.asarray(array)[batch.completion_mask] for array in found)
            hits, count, total = hits + int(hit.sum()), count + len(hit), total - logprobs.sum(dtype=float)
            self.report(len(part))
        return Accuracy(hits, count, self.method, float(total) / count)

    def choice_scores(self, policy: dict, lora: dict | None = None) -> np.ndarray:
        """float32[N, options]: log p(label | prompt), −inf where a question has fewer options."""
        labels = sorted({label for example in self.examples for label in example.labels})
        ids = {label: self.renderer.continuation(label) for label in labels}
        shared = {tuple(tokens[:-1]) for tokens in ids.values()}
        if len(shared) == 1:
            return self._one_forward(policy, lora, ids, list(next(iter(shared))))
        return self._full_continuations(policy, lora, ids)

    def _one_forward(self, policy, lora, ids, prefix) -> np.ndarray:
        prompts = [prompt + prefix for prompt in self.prompts]
        width = max(len(example.labels) for example in self.examples)
        scores = np.full((len(prompts), width), -np.inf, np.float32)
        for chosen, tokens, mask in self._batches(prompts):
            last = np.zeros((len(tokens), width), np.int32)
            for row, index in enumerate(chosen):
                names = self.examples[index].labels
                last[row, : len(names)] = [ids[name][-1] for name in names]
            found = np.asarray(_last_scores(self.decoder, lora, policy, *map(self.place, (tokens, mask, last))))
            for row, index in enumerate(chosen):
                count = len(self.examples[index].labels)
                scores[index, :count] = found[row, :count]
            self.report(len(chosen))
        return scores

    def _full_continuations(self, policy, lora, ids) -> np.ndarray:
        width = max(len(example.labels) for example in self.examples)
        length = max(len(tokens) for tokens in ids.values())
        scores = np.full((len(self.prompts), width), -np.inf, np.float32)
        pairs = [(i, j) for i, example in enumerate(self.examples) for j in range(len(example.labels))]
        pairs.sort(key=lambda pair: -len(self.prompts[pair[0]]))
        for begin in range(0, len(pairs), self.rows):
            part = pairs[begin : begin + self.rows]
            rows: list[Row | None] = [self._row(i, ids[self.examples[i].labels[j]]) for i, j in part]
            rows += [None] * (row_bucket(len(part), self.rows, self.devices) - len(part))
            batch = pack(rows, length_bucket(len(self.prompts[part[0][0]])), length, self.sampling.pad_id)
            found = np.asarray(_sequence_scores(self.decoder, lora, policy, jax.tree.map(self.place, batch)))
            for (i, j), score in zip(part, found, strict=False):
                scores[i, j] = score
            self.report(sum(j == 0 for _, j in part))
        return scores

    def _row(self, index: int, tokens: list[int]) -> Row:
        return Row(self.prompts[index], tokens, np.ones(len(tokens), bool), 1.0, 1)

    def _batches(self, prompts):
        """Left-padded batches, longest first: (indices, tokens int32[B, P], mask bool[B, P])."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for begin in range(0, len(order), self.rows):
            chosen = order[begin : begin + self.rows]
            width = length_bucket(len(prompts[chosen[0]]))
            count = row_bucket(len(chosen), self.rows, self.devices)
            tokens = np.full((count, width), self.sampling.pad_id, np.int32)
            mask = np.zeros((count, width), bool)
            for row, index in enumerate(chosen):
                tokens[row, width - len(prompts[index]) :] = prompts[index]
                mask[row, width - len(prompts[index]) :] = True
            yield chosen, tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def _last_scores(decoder, lora, base, tokens, mask, candidates):
    """float32[B, n]: log-probabilities of candidate next tokens int32[B, n]."""
    hidden, _ = prefill(decoder, lora, base, tokens, mask)
    logits = jnp.einsum("bd,vd->bv", hidden, head_weight(base), preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), candidates, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _sequence_scores(decoder, lora, base, batch):
    """float32[B]: summed log-probability of each completion."""
    return Scorer(decoder, base, CHUNK).logprobs(lora, batch).sum(-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_scores(decoder, chunk, lora, base, batch):
    """float32[B, T] log-probability of each completion token, and bool[B, T] whether it is the most likely one.

    Logits are held for `chunk` positions at a time; what stands at padding has no meaning.
    """
    hidden, head = Scorer(decoder, base, chunk).hidden(lora, batch), head_weight(base)
    count = batch.completion.size
    chunk = min(chunk, count)
    spare = -count % chunk
    rows = jnp.pad(hidden.reshape(-1, hidden.shape[-1]), ((0, spare), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    targets = jnp.pad(batch.completion.reshape(-1), (0, spare)).reshape(-1, chunk)

    def block(xs):
        states, target = xs
        logits = jnp.einsum("md,vd->mv", states, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target

    found = jax.lax.map(block, (rows, targets))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(batch.completion.shape), found)
