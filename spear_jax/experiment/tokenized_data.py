"""The actor's part of an experiment: texts turned into ids once, and how long training rows can
become.
"""

import sys

import ml_collections

from spear_jax.algorithms.base import Algorithm
from spear_jax.core.types import Example
from spear_jax.experiment.evaluator import Evaluator
from spear_jax.feedback.base import Request
from spear_jax.feedback.console import Human
from spear_jax.feedback.registry import get_feedback
from spear_jax.rollout.token_sampling import SamplingConfig
from spear_jax.rollout.worker import RolloutWorker


def build_worker(
    config: ml_collections.ConfigDict,
    algorithm: Algorithm,
    evaluator: Evaluator,
    examples: list[Example],
    used: list[int],
    first: SamplingConfig,
    revise: SamplingConfig,
) -> RolloutWorker:
    """The actor, with the texts of the examples that clients hold turned into ids once."""
    task, renderer = evaluator.task, evaluator.renderer
    nothing: list[list[int]] = [[] for _ in examples]
    texts = {name: list(nothing) for name in ("prompts", "responses", "rejected")}
    cut = 0
    for index in used:
        texts["prompts"][index] = renderer.prompt(task, examples[index])
        if algorithm.gold:
            texts["responses"][index], short = renderer.response(
                task, examples[index], config.data.max_response_tokens
            )
            cut += short
        if algorithm.gold == "pairs":
            texts["rejected"][index], short = renderer.rejected(
                task, examples[index], config.data.max_response_tokens
            )
            cut += short
    if cut:
        limit = config.data.max_response_tokens
        print(
            f"note: {cut} gold responses were cut to data.max_response_tokens ({limit})",
            file=sys.stderr,
        )
    return RolloutWorker(
        task=task,
        renderer=renderer,
        sampler=evaluator.sampler,
        feedback=get_feedback(config.rollout.feedback, task, config.rollout.hint_words),
        examples=examples,
        **texts,
        first=first,
        revise=revise,
        num_revisions=config.rollout.num_revisions,
    )


def prompt_length(algorithm: Algorithm, worker: RolloutWorker, used: list[int]) -> int:
    """P: the longest prompt that a training row can stand under, in multiples of 8."""
    longest = max(len(worker.prompts[i]) for i in used)
    for index in used if "privileged" in algorithm.scored_prompts else ():
        longest = max(longest, len(worker.renderer.privileged(worker.task, worker.examples[index])))
    if "revision" in algorithm.scored_prompts:
        # A revision prompt holds an answer and a feedback text that nobody knows yet: room for what
        # the provider says of an unreadable answer to the longest questions, and a full answer; a
        # longer answer is cut by the renderer.
        examples = [
            worker.examples[i] for i in sorted(used, key=lambda i: -len(worker.prompts[i]))[:32]
        ]
        quiet = isinstance(worker.feedback, Human)
        said = (
            [None] * len(examples)
            if quiet
            else worker.feedback([Request(e, "", 1) for e in examples])
        )
        for example, text in zip(examples, said, strict=True):
            ids = worker.renderer.revision(worker.task, example, "", text or "x" * 400)
            longest = max(longest, len(ids) + worker.first.max_new_tokens)
        longest = min(longest, worker.renderer.limit)
        worker.renderer.revision_limit = longest
    return -(-longest // 8) * 8


def completion_length(algorithm: Algorithm, worker: RolloutWorker) -> int:
    """T: the longest completion of a training row."""
    sampled = max(worker.first.max_new_tokens, worker.revise.max_new_tokens)
    gold = max((len(ids) for ids in worker.responses + worker.rejected), default=0)
    encoded_anew = int(
        getattr(algorithm.settings, "retokenise", False)
    )  # the EOS that is then always added
    return max(sampled + encoded_anew, gold)
