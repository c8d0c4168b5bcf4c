"""What a run would be, without running it: `train --dry-run`."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from spear_jax.algorithms.base import WorkEstimate
from spear_jax.core.types import Example, Tally
from spear_jax.experiment import builder
from spear_jax.experiment.builder import Experiment
from spear_jax.experiment.config import default_config, flatten
from spear_jax.federated import partition
from spear_jax.feedback.base import Request
from spear_jax.feedback.console import Human
from spear_jax.models import cost_model
from spear_jax.models.io.tensor_map import places
from spear_jax.models.lora import init_lora

SHOWN_CLIENTS = 20  # rows of the split table
SHOWN_PROMPTS = 3


def dry_run(built: Experiment, workdir: str) -> dict[str, Any]:
    """Saves and plots the data split into the workdir and prints what a run would be; trains
    nothing.

    Returns: the numbers: parameters, bytes a round, memory needed and free in bytes, tokens and
    FLOPs a round where they can be known before (None where the method's work depends on the run),
    lengths in tokens, and the fields that differ from defaults.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    write_split(built, folder)
    changed = differences(built)
    print("--- config: what differs from the defaults ---")
    for name, (value, default) in changed.items():
        print(f"{name} = {value!r}   (default {default!r})")
    print("--- split ---")
    print_split(built, folder)
    numbers = sizes(built) | needs(built) | work_of(built)
    print("--- sizes ---")
    for name, value in numbers.items():
        print(f"{name}: {'not known before the run' if value is None else shown(name, value)}")
    print_prompts(built)
    return {
        "workdir": workdir,
        **numbers,
        "config": {name: value for name, (value, _) in changed.items()},
    }


def differences(built: Experiment) -> dict[str, tuple[Any, Any]]:
    """{field: (value, default)} of the config's fields that differ from the defaults."""
    mine, default = flatten(built.config), flatten(default_config())
    return {name: (value, default[name]) for name, value in mine.items() if value != default[name]}


def sizes(built: Experiment) -> dict[str, int]:
    """Examples, parameters, bytes that travel in a round (as whole cohorts, every client active),
    and lengths in tokens.
    """
    made = functools.partial(init_lora, lora=built.decoder.lora, model=built.model.config)
    lora = jax.tree.leaves(jax.eval_shape(made, jax.random.key(0)))
    count, size = sum(x.size for x in lora), sum(x.size * x.dtype.itemsize for x in lora)
    cohort = built.config.federation.clients_per_round
    return {
        "train_examples": len(built.worker.examples),
        "test_examples": len(built.evaluator.examples),
        "base_parameters": sum(
            int(np.prod(place.leaf_shape)) for place in places(built.model.config)
        ),
        "base_bytes": sum(x.nbytes for x in jax.tree.leaves(built.model.base)),
        "adapter_parameters": count,
        "adapter_bytes": size,
        "round_bytes_down": cohort * size,
        "round_bytes_up": cohort * size,
        "prompt_length": built.prompt_length,
        "completion_length": built.completion_length,
    }


def needs(built: Experiment) -> dict[str, int | None]:
    """An estimate of what a device needs beside the base, which is loaded: for local training, and
    for a batch of rollouts.
    """
    config, model = built.config, built.model.config
    each = builder.bytes_per_client(
        config, built.decoder, built.algorithm, built.prompt_length, built.completion_length
    )
    # generation reads a copy of the base with the adapter merged in, but on a CPU (actor.as_policy)
    copied = config.quantize == "none" and jax.default_backend() != "cpu"
    merged = sum(x.nbytes for x in jax.tree.leaves(built.model.base)) if copied else 0
    length = longest_prompt(built) + max(
        config.rollout.max_new_tokens, config.rollout.max_new_tokens_revision
    )
    tokens = min(config.rollout.max_rows * length, max(length, built.worker.first.max_tokens))
    cache = cost_model.cache_bytes(model, 1, tokens, 2 if config.dtype == "bfloat16" else 4)
    return {
        "clients_at_once": built.local.clients_at_once,
        "memory_training": built.local.clients_at_once * each,
        "memory_rollout": merged + cache,
        "memory_free": cost_model.device_bytes(),
    }


def work_of(built: Experiment) -> dict[str, int | None]:
    """An estimate of a round's tokens and FLOPs: mean prompts, every answer at full length, every
    first answer wrong.
    """
    parts = [built.algorithm.estimate_work(len(part)) for part in built.parts]
    names = ("round_answers", "round_generated_tokens", "round_trained_tokens", "round_flops")
    if any(part is None for part in parts):
        return dict.fromkeys(names)
    rollout, cohort = built.config.rollout, built.config.federation.clients_per_round
    answers = cohort * float(np.mean([part.answers for part in parts]))
    rows = cohort * float(np.mean([part.rows for part in parts]))
    times = revisions_of(built, parts[0])
    used = np.concatenate(built.parts)
    prompt = float(np.mean([len(built.worker.prompts[i]) for i in used]))
    revised = (
        max((len(ids) for ids in revision_prompts(built, SHOWN_PROMPTS)), default=0) if times else 0
    )
    generated = answers * (rollout.max_new_tokens + times * rollout.max_new_tokens_revision)
    trained = rows * (prompt + built.completion_length)
    passes = 4 + 2 * (
        (built.decoder.remat == "layers") + built.algorithm.two_pass + built.algorithm.scores_old
    )
    tally = Tally(prompt=int(answers * (prompt + times * revised)), generated=int(generated))
    flops = cost_model.flops(built.model.config, tally, trained * passes)
    return dict(zip(names, map(round, (answers, generated, trained, flops)), strict=True))


def revisions_of(built: Experiment, work: WorkEstimate | None) -> int:
    """How many revisions a wrong first answer gets at most."""
    if work is None or built.config.rollout.feedback == "none":
        return 0
    return built.config.rollout.num_revisions if work.revisions is None else work.revisions


def longest_prompt(built: Experiment) -> int:
    """The longest prompt that generation reads, in tokens: a question's, or a revision's with a
    full answer in it.
    """
    longest = max(len(ids) for ids in built.worker.prompts)
    if not revisions_of(built, built.algorithm.estimate_work(len(built.parts[0]))):
        return longest
    revised = max((len(ids) for ids in revision_prompts(built, SHOWN_PROMPTS)), default=0)
    return min(
        max(longest, revised + built.config.rollout.max_new_tokens), built.worker.renderer.limit
    )


def revision_prompts(built: Experiment, count: int) -> list[list[int]]:
    """Token ids of the first clients' revision prompts, as they are after a wrong answer: another
    label than the gold one.
    """
    worker = built.worker
    examples = [worker.examples[int(part[0])] for part in built.parts[:count]]
    answers = [wrong_answer(worker.task.scoring, example) for example in examples]
    requests = [
        Request(example, answer, 1) for example, answer in zip(examples, answers, strict=True)
    ]
    said = (
        ["(what you say)"] * count
        if isinstance(worker.feedback, Human)
        else worker.feedback(requests)
    )
    return [
        worker.renderer.revision(worker.task, example, answer, text)
        for example, answer, text in zip(examples, answers, said, strict=False)
        if text is not None
    ]


def wrong_answer(scoring: str, example: Example) -> str:
    others = [label for i, label in enumerate(example.labels) if i != example.gold]
    return "" if not others else others[0] if scoring == "choice" else f"Answer: {others[0]}"


def print_prompts(built: Experiment) -> None:
    """First answer prompts of a few clients, and a revision prompt where the method revises."""
    decode = built.model.tokenizer.decode
    for client, part in enumerate(built.parts[:SHOWN_PROMPTS]):
        print(
            f"--- first prompt of client {client} ---\n{decode(built.worker.prompts[int(part[0])])}"
        )
    if revisions_of(built, built.algorithm.estimate_work(len(built.parts[0]))):
        for ids in revision_prompts(built, 1):
            print(f"--- revision prompt of client 0, after a wrong answer ---\n{decode(ids)}")
    print("---")


def print_split(built: Experiment, folder: pathlib.Path) -> None:
    """A line a client: its examples and how many of each label."""
    golds, names = _golds(built.worker.examples)
    for row in partition.split_table(built.parts[:SHOWN_CLIENTS], golds, names):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if len(built.parts) > SHOWN_CLIENTS:
        print(f"... and {len(built.parts) - SHOWN_CLIENTS} more clients")
    print(f"split: {folder / 'split.json'}   figure: {folder / 'split.png'}")


def write_split(built: Experiment, folder: pathlib.Path) -> None:
    """split.json and split.png: which client holds which examples."""
    partition.save_split(built.parts, folder / "split.json")
    golds, names = _golds(built.worker.examples)
    partition.plot_split(built.parts, golds, names, folder / "split.png")


def shown(name: str, value: float) -> str:
    """A number for people: bytes in MB, the rest with separators."""
    if "bytes" in name or name.startswith("memory"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.2e}" if value >= 1e9 else f"{value:,.0f}"


def _golds(examples: list[Example]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Gold options, and the labels' names; one name for all where answers are no choice among
    options.
    """
    names = max((example.labels for example in examples), key=len)
    return np.array([example.gold for example in examples]), names if len(names) > 1 else ("all",)
