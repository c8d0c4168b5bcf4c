"""The training set as token ids, and how long its rows can become."""

import dataclasses
import sys
from collections.abc import Sequence

from spear_jax.core.types import Example
from spear_jax.feedback.base import Feedback
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.tasks.base import Task

LONGEST_QUESTIONS = 32  # so many are tried for the longest revision prompt


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """Token ids of every training example that a client holds; empty lists for the others.

    Attributes:
        prompts: of the questions.
        responses, rejected: of the gold and the dispreferred completions, where the method trains
            on them.
        prompt_length: P, the longest prompt that a training row can stand under, in multiples of 8.
        completion_length: T, the longest completion of a training row.
        revision_limit: the longest revision prompt; None: as long as any prompt may be.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    rejected: list[list[int]]
    prompt_length: int
    completion_length: int
    revision_limit: int | None = None


def tokenize(
    task: Task,
    renderer: PromptRenderer,
    feedback: Feedback,
    examples: Sequence[Example],
    used: Sequence[int],
    gold: str,
    stands_under: tuple[str, ...],
    max_new_tokens: int,
    sampled: int,
    max_response_tokens: int,
) -> TokenizedData:
    """Turns the texts of examples into ids, once.

    Args:
        used: positions of the examples that clients hold.
        gold: what the method trains on (`Algorithm.gold`).
        stands_under: the prompts of its rows (`RowLayout.prompts`).
        max_new_tokens: of first answers.
        sampled: the longest sampled completion of a row.
        max_response_tokens: gold completions are cut there, with a note on stderr.
    Raises: UserError naming the example, for one that is too long or has no such text.
    """
    prompts, responses, rejected = ([[] for _ in examples] for _ in range(3))
    cut = 0
    for index in used:
        example = examples[index]
        prompts[index] = renderer.prompt(task, example)
        if gold:
            responses[index], short = renderer.response(task, example, max_response_tokens)
            cut += short
        if gold == "pairs":
            rejected[index], short = renderer.rejected(task, example, max_response_tokens)
            cut += short
    if cut:
        print(
            f"note: {cut} gold responses were cut to data.max_response_tokens "
            f"({max_response_tokens})",
            file=sys.stderr,
        )
    longest, revision_limit = max(len(prompts[i]) for i in used), None
    for index in used if "privileged" in stands_under else ():
        longest = max(longest, len(renderer.privileged(task, examples[index])))
    if "revision" in stands_under:
        # A revision prompt holds an answer and a feedback text that nobody knows yet: room for the
        # provider's longest text about the longest questions, and for a full answer; a longer
        # answer is cut by the renderer.
        some = sorted(used, key=lambda i: -len(prompts[i]))[:LONGEST_QUESTIONS]
        texts = feedback.longest_texts([examples[i] for i in some])
        for index, text in zip(some, texts, strict=True):
            ids = renderer.revision(task, examples[index], "", text)
            longest = max(longest, len(ids) + max_new_tokens)
        longest = revision_limit = min(longest, renderer.limit)
    completion = max(sampled, *map(len, responses), *map(len, rejected))
    return TokenizedData(
        prompts, responses, rejected, -(-longest // 8) * 8, completion, revision_limit
    )
