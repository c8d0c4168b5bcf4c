"""`train --dry-run`: what a run would be, and that it is what the run then is."""

import functools
import json

import jax
import pytest

from spear_jax import train
from spear_jax.core.types import Example
from spear_jax.experiment import builder, dry_run
from spear_jax.experiment.config import default_config, flatten
from spear_jax.experiment.evaluator import Evaluator
from spear_jax.experiment.presets import method_config, quickstart
from spear_jax.federated import round as rounds
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.rollout.worker import RolloutWorker

SMALL = {
    "federation.clients_per_round": 2,
    "rollout.examples": 8,
    "train.steps": 2,
    "train.batch_size": 4,
    "lora.rank": 2,
    "eval.limit": 16,
}
FLAGS = [f"--config.{name}={value}" for name, value in SMALL.items()]


def small(method, **changed):
    config = method_config(method, "facts,tiny")
    config.update_from_flattened_dict(SMALL | changed)
    return config


@pytest.fixture(scope="module")
def built():
    """Method -> its experiment, built once."""
    return functools.cache(lambda method: builder.build(small(method), jax.devices()[:1]))


def changed(**fields):
    return builder.build(small("spear", **fields), jax.devices()[:1])


def test_dry_run_shows_config_split_sizes_and_prompts_and_trains_nothing(tmp_path, capsys):
    folder = tmp_path / "dry"
    found = train.main(
        ["--config=configs/quickstart.py", f"--workdir={folder}", "--dry-run", *FLAGS]
    )
    assert sorted(file.name for file in folder.iterdir()) == ["split.json", "split.png"]
    json.dumps(found)
    told = capsys.readouterr().out
    assert "lora.rank = 2   (default 16)" in told and "client 7  examples" in told
    assert (
        told.count("--- first prompt of client") == 3 and "--- revision prompt of client 0" in told
    )
    assert "That answer is wrong" in told and "memory_free" in told
    assert told.count("--- gold answer of example train-") == 3
    assert (
        found["adapter_bytes"] == 4 * found["adapter_parameters"] and found["train_examples"] > 500
    )
    assert found["round_bytes_down"] == 2 * found["adapter_bytes"]
    assert found["base_bytes"] == 4 * found["base_parameters"] == 4 * 923_520
    mine, default = flatten(quickstart()) | SMALL, flatten(default_config())
    assert found["config"] == {
        name: value for name, value in mine.items() if value != default[name]
    }


def test_gold_answers_are_shown_as_label_and_text_or_as_the_response(capsys):
    options = Example("7", "Which?", ("tin", "oak"), ("A", "B"), 1)
    number = Example("8", "How many?", ("42",), ("42",), 0)
    reply = Example("9", "Say it.", (), (), 0, response=" " + "word " * 200)
    dry_run.print_answers([options, number, reply, options])
    told = capsys.readouterr().out
    assert "example 7 ---\nWhich?\n-> B. oak\n" in told and told.count("oak") == 1
    assert "How many?\n-> 42\n" in told and "-> word word" in told and len(told) < 600


def test_the_revision_prompt_follows_an_answer_that_is_wrong(built):
    spear = built("spear")
    worker = spear.federation.worker
    example = worker.examples[int(spear.federation.clients[0][0])]
    answer = dry_run.wrong_answer("choice", example)
    assert answer in example.labels and not worker.task.grade(answer, example)
    told = spear.model.tokenizer.decode(dry_run.revision_prompts(spear, 1)[0])
    assert f"Previous answer: {answer}" in told and example.question in told


@pytest.mark.parametrize("method", ["sft", "grpo", "opsd"])
def test_a_method_that_revises_nothing_shows_no_revision_prompt(built, method, capsys):
    dry_run.print_prompts(built(method))
    assert "revision prompt" not in capsys.readouterr().out


def test_a_large_federation_is_shown_in_part(tmp_path, capsys):
    many = changed(**{"federation.num_clients": 50, "federation.min_examples": 1})
    dry_run.print_split(many, tmp_path)
    told = capsys.readouterr().out
    assert "client 19 " in told and "client 20 " not in told and "... and 30 more clients" in told


@pytest.mark.parametrize(
    "method", ["spear", "feedback_sft", "grpo", "rltf_sd", "opsd", "dpo", "sft"]
)
def test_the_work_that_a_method_states_is_what_it_does(built, method, monkeypatch):
    one = built(method)
    federation, state = one.federation, one.initial_state()
    algorithm, worker, kept = federation.algorithm, federation.worker, state.algorithm_state
    done, answer = {"answers": 0, "rows": 0}, RolloutWorker.answer

    def counted(worker, policy, requests, key):
        done["answers"] += len(requests)
        return answer(worker, policy, requests, key)

    monkeypatch.setattr(RolloutWorker, "answer", counted)
    cohort, policy = federation.cohort(1), worker.policy(state.lora)
    for phase in range(algorithm.phases):
        # each phase samples with the round's first policy here: the counts do not depend on what
        # training makes of it
        data = algorithm.collect(worker, policy, cohort, kept, jax.random.key(phase), phase)
        done["rows"] += sum(
            row is not None
            for client in data.rows
            for step in client
            for micro in step
            for row in micro
        )
    stated = [algorithm.estimate_work(len(own)) for own in cohort.indices]
    assert done["answers"] == sum(work.answers for work in stated)
    assert 0 < done["rows"] <= sum(work.rows for work in stated)
    if method != "dpo":  # which has only as many pairs as answers were fixed
        assert done["rows"] > 0.4 * sum(work.rows for work in stated)


def test_the_estimates_bound_what_a_round_does(built):
    one = built("spear")
    found = dry_run.work_of(one)
    _, metrics, _ = rounds.run_round(one.federation, one.initial_state(), BudgetUsed())
    assert metrics["rollout/tokens"] <= found["round_generated_tokens"]
    # every answer at full length and none right at once: more than the round does, and not by an
    # order of magnitude
    assert metrics["round/flops"] <= found["round_flops"] <= 10 * metrics["round/flops"]
    assert metrics["round/bytes_down"] == dry_run.sizes(one)["round_bytes_down"]


def test_what_depends_on_the_run_is_left_open(built, tmp_path, capsys):
    found = dry_run.dry_run(built("spin"), small("spin"), str(tmp_path))
    assert found["round_flops"] is None and found["round_answers"] is None
    assert "round_flops: not known before the run" in capsys.readouterr().out


def test_memory_for_generation_grows_with_rows_and_length_by_the_cache():
    few, many = (
        changed(**{"rollout.max_concurrent_sequences": 8}),
        changed(**{"rollout.max_concurrent_sequences": 24}),
    )
    model = few.model.config
    # keys and values of 16 more rows, float32
    each = 2 * model.layers * model.kv_heads * model.head_width * 4
    length = dry_run.longest_prompt(few) + 3
    assert (
        dry_run.needs(many)["memory_rollout"] - dry_run.needs(few)["memory_rollout"]
        == 16 * length * each
    )


def test_a_dry_run_tells_how_many_sequences_are_generated_at_once():
    told = lambda **fields: dry_run.needs(changed(**fields))["sequences_at_once"]
    own, sequences = {"rollout.kv_cache_mb": 1}, "rollout.max_concurrent_sequences"
    assert told(**{sequences: 0}) == 64 and told(**{sequences: 24}) == 24
    built = changed(**{sequences: 1000, **own})
    model = built.model.config
    each = 2 * model.layers * model.kv_heads * model.head_width * 4
    length = dry_run.longest_prompt(built) + 3
    assert dry_run.needs(built)["sequences_at_once"] == 1_000_000 // each // length


def test_a_dry_run_evaluates_and_generates_nothing(built, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a dry run does not touch the model")

    monkeypatch.setattr(Evaluator, "__call__", never)
    monkeypatch.setattr(RolloutWorker, "answer", never)
    monkeypatch.setattr(RolloutWorker, "revise_until_right", never)
    dry_run.dry_run(built("spear"), small("spear"), str(tmp_path))
