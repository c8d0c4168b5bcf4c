"""What a run would be, without running it: `train --dry-run`."""

import functools
import math
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from spear_jax.algorithms.base import WorkEstimate
from spear_jax.core.files import writing
from spear_jax.core.mesh import CLIENTS, MODEL, bytes_on_a_device
from spear_jax.core.types import Example, Tally
from spear_jax.experiment import device_memory, run_folder
from spear_jax.experiment.builder import Experiment
from spear_jax.experiment.config import default_config, flatten
from spear_jax.federated import partition
from spear_jax.feedback.base import Request
from spear_jax.models import cost_model
from spear_jax.models.io.tensor_map import places
from spear_jax.models.lora import init_lora
from spear_jax.rollout.prefill import most_rows

SHOWN_CLIENTS = 20  # rows of the split table
SHOWN_PROMPTS = 3
SHOWN_ANSWERS = 3
SHOWN_CHARS = 300


def dry_run(built: Experiment, config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Saves and plots the data split into the workdir and prints what a run would be; trains
    nothing.

    Returns: the numbers: parameters, bytes a round, memory needed and free in bytes, tokens and
        FLOPs a round where they can be known before (None where the method's work depends on the
        run), lengths in tokens, and the fields that differ from defaults.
    Raises: UserError for the folder of a run of another config, DiskError where the split cannot be
        written.
    """
    folder = pathlib.Path(workdir)
    if (folder / "config.json").exists():  # the split there is that run's
        run_folder.open_workdir(workdir, config, "must")
    run_folder.make_folder(folder)
    with writing(folder / "split.json"):
        write_split(built, folder)
    changed = differences(config)
    print("--- config: what differs from the defaults ---")
    for name, (value, default) in changed.items():
        print(f"{name} = {value!r}   (default {default!r})")
    print("--- split ---")
    print_split(built, folder)
    numbers = sizes(built) | needs(built) | work_of(built) | privacy_of(built)
    print("--- sizes ---")
    for name, value in numbers.items():
        print(f"{name}: {'not known before the run' if value is None else shown(name, value)}")
    print_prompts(built)
    print_answers(built.federation.worker.examples)
    fields = {name: value for name, (value, _) in changed.items()}
    return {"workdir": workdir, **numbers, "config": fields}


def differences(config: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (value, default)} of the config's fields that differ from the defaults."""
    mine, default = flatten(config), flatten(default_config())
    return {name: (value, default[name]) for name, value in mine.items() if value != default[name]}


def sizes(built: Experiment) -> dict[str, int]:
    """Returns examples, parameters, bytes that travel in a round (as whole cohorts, every client
    active), and lengths in tokens.
    """
    federation, model = built.federation, built.model.config
    make = functools.partial(init_lora, lora=federation.decoder.lora, model=model)
    shapes = jax.eval_shape(make, jax.random.key(0))
    lora = jax.tree.leaves(shapes)
    count, size = sum(x.size for x in lora), sum(x.size * x.dtype.itemsize for x in lora)
    cohort, aggregation = built.settings.federation.clients_per_round, federation.aggregation

    ranks, rule = (
        np.resize(aggregation.ranks or (federation.decoder.lora.rank,), cohort),
        aggregation.rule,
    )
    start = {"base_rank": 0}
    return {
        "train_examples": len(federation.worker.examples),
        "test_examples": len(built.evaluator.examples),
        "base_parameters": sum(int(np.prod(place.leaf_shape)) for place in places(model)),
        "base_bytes": sum(x.nbytes for x in jax.tree.leaves(built.model.base)),
        "adapter_parameters": count,
        "adapter_bytes": size,
        "round_bytes_down": sum(rule.bytes_down(shapes, int(r), 1, start) for r in ranks),
        "round_bytes_up": sum(rule.bytes_up(shapes, int(r), 1) for r in ranks),
        "prompt_length": federation.worker.data.prompt_length,
        "completion_length": federation.worker.data.completion_length,
    }


def needs(built: Experiment) -> dict[str, int | None]:
    """Estimates how many sequences of full length are generated at once, how many clients train at
    once on a device, and what a device needs for either beside the base, which is loaded.
    """
    settings, federation, model = built.settings, built.federation, built.model.config
    worker = federation.worker
    each = device_memory.bytes_per_client(
        settings, federation.decoder, federation.algorithm, worker.data
    )
    # not on a CPU: generation has a copy of the layers with the adapter merged in (`as_policy`), and
    # one as decoding reads them (`decoder.unstack`)
    copies = 0 if jax.default_backend() == "cpu" else 1 + (settings.quantize == "none")
    merged = copies * bytes_on_a_device(built.model.base.layers)
    longest = max(worker.first, worker.revise, key=lambda config: config.max_new_tokens)
    width, devices = longest_prompt(built), federation.mesh.shape[CLIENTS]
    rows = most_rows(longest, width, devices)
    length, itemsize = width + longest.max_new_tokens, 2 if settings.dtype == "bfloat16" else 4
    return {
        "sequences_at_once": rows,
        "clients_at_once": federation.local.clients_at_once,
        "memory_training": federation.local.clients_at_once * each,
        "memory_rollout": merged
        + cost_model.cache_bytes(
            model, -(-rows // devices), length, itemsize, federation.mesh.shape[MODEL]
        ),
        "memory_free": cost_model.device_bytes(),
    }


def work_of(built: Experiment) -> dict[str, int | None]:
    """Estimates a round's tokens and FLOPs: mean prompts, every answer at full length, every first
    answer wrong.
    """
    federation, rollout = built.federation, built.settings.rollout
    algorithm, data = federation.algorithm, federation.worker.data
    estimates = [algorithm.estimate_work(len(own)) for own in federation.clients]
    names = ("round_answers", "round_generated_tokens", "round_trained_tokens", "round_flops")
    if any(estimate is None for estimate in estimates):
        return dict.fromkeys(names)
    cohort = built.settings.federation.clients_per_round
    answers = cohort * float(np.mean([estimate.answers for estimate in estimates]))
    rows = cohort * float(np.mean([estimate.rows for estimate in estimates]))
    times = revisions_of(built, estimates[0])
    used = np.concatenate(federation.clients)
    prompt = float(np.mean([len(data.prompts[i]) for i in used]))
    shown_prompts = revision_prompts(built, SHOWN_PROMPTS) if times else []
    revised = max(map(len, shown_prompts), default=0)
    generated = answers * (rollout.max_new_tokens + times * rollout.max_new_tokens_revision)
    trained = rows * (prompt + data.completion_length)
    remat = federation.decoder.remat == "layers"
    passes = 4 + 2 * (remat + algorithm.scoring.extra_passes)
    tally = Tally(prompt=int(answers * (prompt + times * revised)), generated=int(generated))
    flops = cost_model.flops(built.model.config, tally, trained * passes)
    return dict(zip(names, map(round, (answers, generated, trained, flops)), strict=True))


def privacy_of(built: Experiment) -> dict[str, float]:
    """Returns, of a run with central noise, ε after its last round, and the most that the clipped sum
    of an expected cohort can be in units of the noise, ‖Σ‖ / (z S √d); {} of any other.
    """
    federation, rule = built.federation, built.federation.aggregation.rule
    privacy = federation.aggregation.privacy
    if privacy is None:
        return {}
    make = functools.partial(init_lora, lora=federation.decoder.lora, model=built.model.config)
    adapter = jax.eval_shape(make, jax.random.key(0))
    size = rule.bytes_up(adapter, federation.decoder.lora.rank, 1) // 4
    return {
        "privacy_epsilon": privacy.account.epsilon(built.settings.rounds),
        "privacy_snr": privacy.denominator / (privacy.noise_multiplier * math.sqrt(size)),
    }


def revisions_of(built: Experiment, work: WorkEstimate | None) -> int:
    """Returns how many revisions a wrong first answer gets at most."""
    if work is None or built.settings.rollout.feedback == "none":
        return 0
    return built.settings.rollout.num_revisions if work.revisions is None else work.revisions


def longest_prompt(built: Experiment) -> int:
    """Returns the longest prompt that generation reads, in tokens: a question's, or a revision's
    with a full answer in it.
    """
    federation, worker = built.federation, built.federation.worker
    longest = max(len(ids) for ids in worker.data.prompts)
    if not revisions_of(built, federation.algorithm.estimate_work(len(federation.clients[0]))):
        return longest
    revised = max((len(ids) for ids in revision_prompts(built, SHOWN_PROMPTS)), default=0)
    with_answer = revised + built.settings.rollout.max_new_tokens
    return min(max(longest, with_answer), worker.renderer.limit)


def revision_prompts(built: Experiment, count: int) -> list[list[int]]:
    """Returns the token ids of the first clients' revision prompts, as they are after a wrong
    answer: another label than the gold one.
    """
    worker = built.federation.worker
    examples = [worker.examples[int(own[0])] for own in built.federation.clients[:count]]
    answers = [wrong_answer(worker.task.scoring, example) for example in examples]
    asked = [Request(example, answer, 1) for example, answer in zip(examples, answers, strict=True)]
    people = worker.feedback.asks_people or worker.feedback.asks_by_id  # nothing is asked for show
    said = ["(what you say)"] * len(asked) if people else worker.feedback(asked)
    return [
        worker.renderer.revision(worker.task, example, answer, text)
        for example, answer, text in zip(examples, answers, said, strict=True)
        if text is not None
    ]


def wrong_answer(scoring: str, example: Example) -> str:
    others = [label for i, label in enumerate(example.labels) if i != example.gold]
    return "" if not others else others[0] if scoring == "choice" else f"Answer: {others[0]}"


def print_prompts(built: Experiment) -> None:
    """First answer prompts of a few clients, and a revision prompt where the method revises."""
    decode = built.model.tokenizer.decode
    for client, part in enumerate(built.federation.clients[:SHOWN_PROMPTS]):
        print(
            f"--- first prompt of client {client} ---\n{decode(built.federation.worker.data.prompts[int(part[0])])}"
        )
    if revisions_of(
        built, built.federation.algorithm.estimate_work(len(built.federation.clients[0]))
    ):
        for ids in revision_prompts(built, 1):
            print(f"--- revision prompt of client 0, after a wrong answer ---\n{decode(ids)}")
    print("---")


def print_answers(examples: list[Example]) -> None:
    """The gold answers of the first training examples: where a file is misread, they are wrong."""
    for example in examples[:SHOWN_ANSWERS]:
        print(f"--- gold answer of example {example.id} ---")
        print(f"{cut(example.question)}\n-> {cut(gold_answer(example))}")
    print("---")


def gold_answer(example: Example) -> str:
    """Returns the gold label with its option's text, or the gold response."""
    if not example.options:
        return example.response.strip()
    label, option = example.labels[example.gold], example.options[example.gold]
    return label if label == option else f"{label}. {option}"


def cut(text: str) -> str:
    """Returns the start of a long text."""
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ..."


def print_split(built: Experiment, folder: pathlib.Path) -> None:
    """A line a client: its examples and how many of each label."""
    golds, names = _golds(built.federation.worker.examples)
    for row in partition.split_table(built.federation.clients[:SHOWN_CLIENTS], golds, names):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if len(built.federation.clients) > SHOWN_CLIENTS:
        print(f"... and {len(built.federation.clients) - SHOWN_CLIENTS} more clients")
    print(f"split: {folder / 'split.json'}   figure: {folder / 'split.png'}")


def write_split(built: Experiment, folder: pathlib.Path) -> None:
    """split.json and split.png: which client holds which examples."""
    partition.save_split(built.federation.clients, folder / "split.json")
    golds, names = _golds(built.federation.worker.examples)
    partition.plot_split(built.federation.clients, golds, names, folder / "split.png")


def shown(name: str, value: float) -> str:
    """A number for people: bytes in MB, the rest with separators."""
    if "bytes" in name or name.startswith("memory"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:.2e}" if value >= 1e9 else f"{value:,.0f}"


def _golds(examples: list[Example]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Gold options, and the labels' names; one name for all where answers are no choice among
    options.
    """
    names = max((example.labels for example in examples), key=len)
    return np.array([example.gold for example in examples]), names if len(names) > 1 else ("all",)
