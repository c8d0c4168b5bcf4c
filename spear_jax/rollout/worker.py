"""The one door between text and tokens: asks the clients' questions, grades the answers, and
revises after feedback.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spear_jax.core.rng import path_key, purpose
from spear_jax.core.types import Attempt, Example, Progress, Tally, Trace, no_progress
from spear_jax.feedback.base import NOBODY, Feedback, Request
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.rollout.sampler import Completion, Sampler
from spear_jax.rollout.scorer import Scorer
from spear_jax.rollout.token_sampling import SamplingConfig
from spear_jax.rollout.tokenized_data import TokenizedData
from spear_jax.tasks.base import Task

ROLLOUT = purpose("rollout")
REWRITE = 1 << 20  # the attempt number of a rewrite's key path; no revision reaches it
KEYS = 256  # that are made at a time
SAMPLE_BITS = (
    21  # of a key path's last step, those below hold the attempt, those above the sample number
)


class RolloutRequest(NamedTuple):
    """One completion that is asked for.

    Attributes:
        client: who asks.
        example: position in the training set.
        sample: number among the samples of one prompt; its completion has a key of its own.
    """

    client: int
    example: int
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class RolloutWorker:
    """Rolls out and scores: everything that a rollout needs except the weights.

    Attributes:
        task, renderer, feedback: the text side.
        sampler, scorer: the array side.
        examples: the training set; data: its token ids.
        first, revise: how first answers and revisions are sampled.
        num_revisions: attempts after a wrong first answer.
        policy: adapter -> the policy that answers with it (`as_policy`).
        score_rows: rows of a block that `score` packs, about.
        tally: tokens so far in this round.
        progress: called with (stage, rows finished since the last call, rows of the stage).
    """

    task: Task
    renderer: PromptRenderer
    feedback: Feedback
    sampler: Sampler
    scorer: Scorer
    examples: list[Example]
    data: TokenizedData
    first: SamplingConfig
    revise: SamplingConfig
    num_revisions: int
    policy: Callable[[Any], Policy]
    score_rows: int = 64
    tally: Tally = dataclasses.field(default_factory=Tally)
    progress: Progress = no_progress

    def answer(self, policy: Policy, requests: list[RolloutRequest], key: jax.Array) -> list[Trace]:
        """First answers of all clients in one batch.

        Args: key: the round's key; row keys are its path (client, example, attempt 0 of the
            sample).
        """
        prompts = [self.data.prompts[request.example] for request in requests]
        examples = [self.examples[request.example] for request in requests]
        done = self._attempts(policy, examples, prompts, requests, key, 0, self.first, "rollout")
        return [
            Trace(request.client, example, [attempt])
            for request, example, attempt in zip(requests, examples, done, strict=True)
        ]

    def revise_until_right(
        self,
        policy: Policy,
        traces: list[Trace],
        requests: list[RolloutRequest],
        key: jax.Array,
        limit: int | None = None,
    ) -> None:
        """Revises wrong answers after feedback; extends the traces in place.

        All pending ones are revised in one batch. Where people are waited for, those that have been
        commented on are: no text depends on it, while the last bits of log-probabilities may.

        Args: limit: attempts; None means `num_revisions`.
        Source: SPEAR (arXiv 2605.07977), rollout step 3: feedback is always on the latest answer.
        """
        limit = self.num_revisions if limit is None else limit
        judges = self.feedback.judges
        wrong = lambda trace: (
            trace.answered and not trace.last.correct and len(trace.attempts) <= limit
        )

        def newest(rows: Sequence[int]) -> list[Request]:
            asked = [i for i in rows if judges or wrong(traces[i])]
            return self._requests(asked, traces, requests, key)

        def take(some: list[Request]) -> list[Request]:
            if judges:
                self._judge(some, traces)
            said = self._comments([x for x in some if wrong(traces[x.row])], traces)
            numbers = np.array([len(traces[i].attempts) for i in said], np.int64)
            prompts = [
                self._revision(traces[i].example, traces[i].last.text, text)
                for i, text in said.items()
            ]
            examples, own = [traces[i].example for i in said], [requests[i] for i in said]
            done = self._attempts(
                policy, examples, prompts, own, key, numbers, self.revise, "revision"
            )
            for (i, text), attempt in zip(said.items(), done, strict=True):
                traces[i].attempts.append(dataclasses.replace(attempt, feedback=text))
            return newest(list(said))

        self.feedback.converse(newest(range(len(traces))), take)

    def rewrite(
        self, policy: Policy, traces: list[Trace], requests: list[RolloutRequest], key: jax.Array
    ) -> dict[int, Attempt | None]:
        """Rewrites right first answers of wrong form, without feedback.

        Returns: by trace number, the rewrite where it is right and well formed, None where it is
        not (then the trace gives neither a win nor a lose). Source: SPEAR's published code, its
        format-fix branch.
        """
        chosen = [
            i
            for i, trace in enumerate(traces)
            if trace.first.correct and not self.task.well_formed(trace.first.text, trace.example)
        ]
        prompts = [
            self._revision(traces[i].example, traces[i].first.text, self.task.templates.format)
            for i in chosen
        ]
        examples, own = [traces[i].example for i in chosen], [requests[i] for i in chosen]
        done = self._attempts(policy, examples, prompts, own, key, REWRITE, self.revise, "rewrite")
        rewrites: dict[int, Attempt | None] = {}
        for i, attempt in zip(chosen, done, strict=True):
            whole = attempt.correct and self.task.well_formed(attempt.text, traces[i].example)
            rewrites[i] = attempt if whole else None
        return rewrites

    def reply(
        self, policy: Policy, asked: list[tuple[Example, str, str]], config: SamplingConfig
    ) -> list[Attempt]:
        """Returns answers to questions beside a round's, ungraded.

        Args: asked: (example, previous answer, feedback); the last two are "" for a first answer.
        Raises: UserError for a prompt over the limit.
        """
        prompts = [
            self._revision(example, answer, said)
            if said
            else self.renderer.prompt(self.task, example)
            for example, answer, said in asked
        ]
        keys = np.zeros((len(prompts), 2), np.uint32)  # greedy: never read
        made: dict[int, Attempt] = {}

        def keep(i: int, completion: Completion) -> None:
            text = self.renderer.decode(completion.tokens)
            tokens, logprobs = completion.tokens, completion.logprobs
            made[i] = Attempt(prompts[i], tokens, logprobs, text, False, asked[i][2])

        self.sampler.generate(policy.lora, policy.base, prompts, keys, config, keep)
        return [made[i] for i in range(len(prompts))]

    def beside(self, clients: list[int]) -> list[Trace]:
        """Returns what the provider has of these clients beside the round's questions, as far as it
        fits the shapes of training rows.
        """

        def fits(attempt: Attempt) -> bool:
            longest = self.data.prompt_length, self.data.completion_length
            return len(attempt.prompt) <= longest[0] and 0 < len(attempt.completion) <= longest[1]

        found = self.feedback.beside(clients)
        return [trace for trace in found if all(map(fits, trace.attempts))]

    def score(self, policy: Policy, rows: list[TrainingRow]) -> list[np.ndarray]:
        """Returns float32[len(completion)] a row: log-probabilities of its completion in nats,
        without gradient and untempered.
        """
        self.tally.scored += sum(len(row.prompt) + len(row.completion) for row in rows)
        tokens = self.score_rows * Scorer.mean_tokens(rows)
        lengths = self.data.prompt_length, self.data.completion_length
        return self.scorer.score(policy, rows, "score", tokens, lengths).logprobs

    def _comments(self, some: list[Request], traces: list[Trace]) -> dict[int, str]:
        """What is said of wrong answers, by row; those of which nothing is said are left out."""
        asked = [dataclasses.replace(x, attempt=len(traces[x.row].attempts)) for x in some]
        said = {x.row: text for x, text in zip(asked, self.feedback(asked), strict=True)}
        for i, text in said.items():
            traces[i].answered &= len(traces[i].attempts) > 1 or text is not NOBODY
        return {i: text for i, text in said.items() if isinstance(text, str)}

    def _judge(self, some: list[Request], traces: list[Trace]) -> None:
        """Has answers called right or wrong by the provider, in the task's place."""
        for request, verdict in zip(some, self.feedback.judge(some), strict=True):
            trace = traces[request.row]
            trace.last.correct = bool(verdict)
            if len(trace.attempts) == 1:
                trace.answered = verdict is not None

    def _requests(
        self,
        rows: list[int],
        traces: list[Trace],
        requests: list[RolloutRequest],
        key: jax.Array,
    ) -> list[Request]:
        """The newest answers of these rows, for the provider."""
        ids, newest = [""] * len(rows), [traces[i] for i in rows]
        numbers = [len(trace.attempts) - 1 for trace in newest]
        if self.feedback.asks_by_id and rows:
            keys = row_keys(key, [requests[i] for i in rows], np.array(numbers))
            ids = [
                f"{high:08x}{low:08x}-{zlib.crc32(trace.last.text.encode()):08x}"
                for trace, (high, low) in zip(newest, keys, strict=True)
            ]
        after = not self.feedback.judges  # a hint is for the next revision
        return [
            Request(
                trace.example, trace.last.text, number + after, id, trace.client, trace.last, row
            )
            for row, trace, number, id in zip(rows, newest, numbers, ids, strict=True)
        ]

    def _revision(self, example: Example, answer: str, feedback: str) -> list[int]:
        limit = self.data.revision_limit
        return self.renderer.revision(self.task, example, answer, feedback, limit)

    def _attempts(
        self, policy, examples, prompts, requests, key, number, config, stage
    ) -> list[Attempt]:
        """Graded completions of the prompts, without feedback; each is graded while the device
        completes others.
        """
        if not prompts:
            return []
        made: dict[int, Attempt] = {}

        def grade(i: int, completion: Completion) -> None:
            text = self.renderer.decode(completion.tokens)
            correct = self.task.grade(text, examples[i])
            made[i] = Attempt(prompts[i], completion.tokens, completion.logprobs, text, correct, "")
            self.progress(stage, 1, len(prompts))

        keys = row_keys(key, requests, number)
        owners = (
            np.array([policy.slots[request.client] for request in requests], np.int32)
            if policy.slots
            else None
        )
        done = self.sampler.generate(policy.lora, policy.base, prompts, keys, config, grade, owners)
        self.tally.prompt += sum(map(len, prompts))
        self.tally.generated += sum(len(completion.tokens) for completion in done)
        return [made[i] for i in range(len(prompts))]


def row_keys(
    key: jax.Array, requests: list[RolloutRequest], attempt: int | np.ndarray
) -> np.ndarray:
    """uint32[requests, 2] key data, each row's key at the path (rollout, client, example, sample and
    attempt) below the round's. Args: attempt: of all rows, or int[requests].
    """
    # so many at a time, that the number of pending rows does not cause a compilation
    padded = np.zeros((-(-len(requests) // KEYS), KEYS, 3), np.uint32)
    rows = padded.reshape(-1, 3)[: len(requests)]
    rows[:] = requests
    rows[:, 2] = (rows[:, 2] << SAMPLE_BITS) + attempt
    return np.concatenate([np.asarray(_row_keys(key, some)) for some in padded])[: len(requests)]


@jax.jit
def _row_keys(key, requests):
    path = jax.vmap(lambda request: path_key(key, ROLLOUT, request[0], request[1], request[2]))
    return jax.random.key_data(path(requests))
