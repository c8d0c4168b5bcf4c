"""The one door between text and tokens: asks the clients' questions, grades the answers, and revises after feedback."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from spear_jax import trees
from spear_jax.feedback import Feedback, Request
from spear_jax.sampling import Sampler, SamplingConfig
from spear_jax.tasks.base import Task
from spear_jax.text import Renderer
from spear_jax.types import Attempt, Example, Trace

ROLLOUT = trees.purpose("rollout")
REWRITE = 1 << 20  # the attempt number of a rewrite's key path; no revision reaches it


@dataclasses.dataclass
class Cohort:
    """This round's clients.

    Attributes:
        round: 1-based.
        clients: client ids.
        indices: for each client, the positions of its examples in the training set.
        rngs: for each client, the host's random generator of this round, by purpose.
    """

    round: int
    clients: list[int]
    indices: list[np.ndarray]
    rngs: Callable[[int, str], np.random.Generator]


@dataclasses.dataclass
class Actor:
    """Everything a conversation needs except the weights.

    Attributes:
        examples: the training set.
        prompts: the token ids of each training question, rendered once.
        first: how first answers are sampled.
        revise: how revisions are sampled.
        num_revisions: attempts after a wrong first answer.
        report: called with (stage, rows finished).
    """

    task: Task
    renderer: Renderer
    sampler: Sampler
    feedback: Feedback
    examples: list[Example]
    prompts: list[list[int]]
    first: SamplingConfig
    revise: SamplingConfig
    num_revisions: int
    report: Callable[[str, int], None] = lambda stage, rows: None

    def answer(self, policy: dict, pairs: list[tuple[int, int]], key: jax.Array) -> list[Trace]:
        """First answers of all clients in one batch.

        Args:
            policy: base weights with the round's adapter merged in.
            pairs: (client, example index).
            key: the round's key; row keys are its path (client, example, attempt 0).
        """
        prompts = [self.prompts[index] for _, index in pairs]
        keys = row_keys(key, pairs, attempt=0)
        done = self.sampler.generate(None, policy, prompts, keys, self.first, lambda rows: self.report("rollout", rows))
        traces = []
        for (client, index), prompt, completion in zip(pairs, prompts, done, strict=True):
            example = self.examples[index]
            attempt = self._attempt(example, prompt, completion, "")
            traces.append(Trace(client, example, [attempt]))
        return traces

    def revise_until_right(
        self, policy: dict, traces: list[Trace], pairs: list[tuple[int, int]], key: jax.Array
    ) -> None:
        """Revises wrong answers after feedback, all pending ones of an attempt in one batch; extends the traces in place.

        Source: SPEAR (arXiv 2605.07977), rollout step 3: feedback is always on the latest answer.
        """
        pending = [i for i, trace in enumerate(traces) if not trace.last.correct]
        for number in range(1, self.num_revisions + 1):
            requests = [Request(traces[i].example, traces[i].last.text, number) for i in pending]
            said = dict(zip(pending, self.feedback(requests), strict=True))
            pending = [i for i in pending if said[i] is not None]
            if not pending:
                return
            prompts = [
                self.renderer.revision(self.task, traces[i].example, traces[i].last.text, said[i]) for i in pending
            ]
            keys = row_keys(key, [pairs[i] for i in pending], attempt=number)
            done = self.sampler.generate(
                None, policy, prompts, keys, self.revise, lambda rows: self.report("revision", rows)
            )
            for i, prompt, completion in zip(pending, prompts, done, strict=True):
                traces[i].attempts.append(self._attempt(traces[i].example, prompt, completion, said[i]))
            pending = [i for i in pending if not traces[i].last.correct]

    def rewrite(
        self, policy: dict, traces: list[Trace], pairs: list[tuple[int, int]], key: jax.Array
    ) -> dict[int, Attempt | None]:
        """Rewrites right first answers of wrong form, without feedback.

        Returns: by trace number, the rewrite where it is right and well formed, None where it is not (then the trace gives
        neither a win nor a lose). Source: SPEAR's published code, its format-fix branch.
        """
        chosen = [
            i
            for i, trace in enumerate(traces)
            if trace.first.correct and not self.task.well_formed(trace.first.text, trace.example)
        ]
        prompts = [
            self.renderer.revision(self.task, traces[i].example, traces[i].first.text, self.task.templates.format)
            for i in chosen
        ]
        keys = row_keys(key, [pairs[i] for i in chosen], attempt=REWRITE)
        done = self.sampler.generate(None, policy, prompts, keys, self.revise)
        rewrites: dict[int, Attempt | None] = {}
        for i, prompt, completion in zip(chosen, prompts, done, strict=True):
            attempt = self._attempt(traces[i].example, prompt, completion, "")
            whole = attempt.correct and self.task.well_formed(attempt.text, traces[i].example)
            rewrites[i] = attempt if whole else None
        return rewrites

    def _attempt(self, example, prompt, completion, feedback) -> Attempt:
        text = self.renderer.decode(completion.tokens)
        correct = self.task.grade(text, example)
        return Attempt(prompt, completion.tokens, completion.logprobs, text, correct, feedback)


def row_keys(key: jax.Array, pairs: list[tuple[int, int]], attempt: int) -> np.ndarray:
    """uint32[N, 2] key data, each row's key at the path (rollout, client, example, attempt) below the round's key."""
    if not pairs:
        return np.zeros((0, 2), np.uint32)
    # Padded to a power of two, so that the number of pending rows does not cause a compilation.
    size = 1 << (len(pairs) - 1).bit_length()
    padded = np.zeros((size, 2), np.uint32)
    padded[: len(pairs)] = pairs
    return np.asarray(_row_keys(key, padded, attempt))[: len(pairs)]


@jax.jit
def _row_keys(key, pairs, attempt):
    path = jax.vmap(lambda pair: trees.path_key(key, ROLLOUT, pair[0], pair[1], attempt))
    return jax.random.key_data(path(pairs))
