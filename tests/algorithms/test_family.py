"""All methods as runs: the same streams, one batched generation, memory that resumes, centralised
and local-only, refusals.
"""

import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.algorithms import ALGORITHMS
from spear_jax.core import pytrees
from spear_jax.core.errors import UserError
from spear_jax.core.rng import path_key
from spear_jax.experiment import builder, presets
from spear_jax.experiment.config import parse
from spear_jax.experiment.run import Run, mean_accuracy
from spear_jax.federated import local_only
from spear_jax.federated import round as rounds
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.models.decoder import merge
from spear_jax.models.lora import TARGETS
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutRequest

TINY = {
    "rounds": 4,
    "federation.num_clients": 3,
    "federation.clients_per_round": 3,
    "rollout.examples": 8,
    "rollout.max_concurrent_sequences": 32,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.warmup": False,
    "eval.every": 100,
    "eval.limit": 20,
    "lora.rank": 2,
    "lora.targets": ("q",),  # each more is time to compile
    "checkpoint.keep_last": 9,
    "checkpoint.keep_best": 0,
}


def config_of(method, **changes):
    config = presets.method_config(method, "facts,tiny,small")
    config.update_from_flattened_dict(TINY | changes)
    return config


def build(method, **changes):
    return builder.build(config_of(method, **changes), jax.devices()[:1])


def train(workdir, config):
    """A run of the config, trained to its end."""
    with Run(config, workdir, quiet=True, devices=jax.devices()[:1]) as run:
        run.train()
        return run


def first_rollouts(built):
    """What the method collects in round 1."""
    state = built.initial_state()
    key = path_key(jax.random.wrap_key_data(state.key), rounds.ROUND, 1)
    federation = built.federation
    policy = federation.worker.policy(state.lora)
    return federation.algorithm.collect(federation.worker, policy, federation.cohort(1), {}, key, 0)


def run_rounds(built, count):
    """The states and metrics of the first rounds."""
    state, found = built.initial_state(), []
    for _ in range(count):
        state, metrics, _ = rounds.run_round(built.federation, state, BudgetUsed())
        found.append((state, metrics))
    return found


def measured(built, state):
    return mean_accuracy([built.evaluator(policy) for policy in built.policies(state)])


def moved(tree):
    """The adapter with every tensor changed, so that B is not zero."""
    return jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), tree
    )


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize(
    "arg",
    [
        *(f"{task},{model}" for task in presets.PAPER for model in ("qwen2.5-1.5b", "llama-3.2-3b")),
        "facts,tiny", "reasoned,tiny", "facts,tiny,small", "facts,tiny,smoke", "arc_easy,smollm2-135m,cpu",
    ],
)  # fmt: skip
def test_every_method_has_a_valid_config_for_every_task_and_model(method, arg):
    config = importlib.import_module(f"configs.{method}").get_config(arg)
    parse(config)
    assert config.algorithm.name == method


def test_feedback_sft_sees_the_same_conversations_as_spear_and_has_the_same_wins():
    wins = {}
    for method in ("spear", "feedback_sft", "dpo"):
        got = first_rollouts(build(method))
        wins[method] = [[a.completion for a in trace.attempts] for trace, _, _ in got.traces]
        if method != "dpo":
            wins[method] += [got.weight.tolist(), got.metrics["rollout/wins"]]
    assert wins["spear"] == wins["feedback_sft"]
    assert wins["spear"][:-2] == wins["dpo"]


def test_stacked_adapters_generate_what_each_clients_merged_adapter_generates():
    built = build("grpo", **{"lora.targets": TARGETS})
    worker, base, start = built.federation.worker, built.model.base, built.initial_state().lora
    own = [jax.tree.map(lambda x, c=c: x + 0.1 * c, moved(start)) for c in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *own)
    asks = [RolloutRequest(client, index) for index in range(6) for client in (7, 8, 9)]
    key = jax.random.key(5)
    together = worker.answer(Policy(base, stacked, {7: 0, 8: 1, 9: 2}), asks, key)
    for slot, client in enumerate((7, 8, 9)):
        mine = [ask for ask in asks if ask.client == client]
        alone = worker.answer(
            Policy(merge(base, own[slot], built.federation.decoder.lora)), mine, key
        )
        there = [trace for trace in together if trace.client == client]
        for a, b in zip(there, alone, strict=True):
            assert a.first.completion == b.first.completion
            np.testing.assert_allclose(a.first.logprobs, b.first.logprobs, atol=1e-4)
    assert len({tuple(t.first.logprobs) for t in together[:3]}) == 3  # the three adapters do differ


def test_grpo_samples_again_at_every_step_with_what_the_clients_have_become(monkeypatch):
    built = build(
        "grpo", **{"train.steps": 3, "train.learning_rate": 0.05, "train.learning_rate_min": 0.05}
    )
    state = built.initial_state()
    start = jax.tree.map(np.array, state.lora)
    state = state.replace(lora=built.federation.on_devices(state.lora))
    seen = []
    collect = type(built.federation.algorithm).collect

    def spy(self, worker, policy, cohort, memory, key, phase):
        seen.append(jax.tree.map(np.asarray, policy.lora))
        return collect(self, worker, policy, cohort, memory, key, phase)

    monkeypatch.setattr(type(built.federation.algorithm), "collect", spy)
    state, metrics, told = rounds.run_round(built.federation, state, BudgetUsed())
    assert len(seen) == 3
    jax.tree.map(
        np.testing.assert_array_equal,
        seen[0],
        jax.tree.map(np.asarray, built.federation.on_devices(start)),
    )
    assert len(told) == 3 * 3 * 2 * built.federation.algorithm.settings.group
    b1, b2 = (np.asarray(tree.q.b) for tree in seen[1:])
    assert b1.shape[1] == 3 and not np.allclose(b1[:, 0], b1[:, 1]) and not np.allclose(b1, b2)
    # the average of the three clients, weighted by their data, is the new global adapter: the last
    # step moved it further
    sizes = np.array([len(part) for part in built.federation.cohort(1).indices], float)
    before = np.tensordot(sizes / sizes.sum(), b2.swapaxes(0, 1), axes=1)
    assert not np.allclose(before, np.asarray(state.lora.q.b))


def test_several_updates_on_one_sampling_use_ratios_to_the_samples_own_policy():
    # eight prompts a step: some group has right and wrong answers, whatever is drawn
    changes = {
        "grpo.updates": 2,
        "train.steps": 4,
        "train.learning_rate": 0.02,
        "train.learning_rate_min": 0.02,
        "train.batch_size": 8,
    }
    built = build("grpo", **changes)
    assert built.federation.algorithm.phases == 2
    state = built.initial_state()
    state, metrics, told = rounds.run_round(
        built.federation, state.replace(lora=moved(state.lora)), BudgetUsed()
    )
    assert len(told) == 2 * 3 * 8 * built.federation.algorithm.settings.group
    assert metrics["grpo/clip_fraction"] > 0  # the second update is off-policy


@pytest.mark.parametrize(
    "method, changes",
    [
        ("tpaw", {}),
        ("tspin", {}),
        ("iris", {}),
        ("opsd", {"opsd.teacher": "ema"}),
        ("spin", {"federation.aggregation": "local"}),
    ],
)
def test_a_resumed_run_has_the_same_bits_memory_included(method, changes, tmp_path):
    config = config_of(method, **changes, **{"train.batch_size": 16 if method == "iris" else 2})
    whole = train(tmp_path / "run", config).state
    for name in ("3", "4"):  # as if it had been stopped after round 2
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    again = train(tmp_path / "run", config).state
    assert int(again.round) == 4 and jax.tree.leaves(again.algorithm_state)
    assert pytrees.digest((again.lora, again.algorithm_state)) == pytrees.digest(
        (whole.lora, whole.algorithm_state)
    )


def test_the_memory_has_a_constant_size():
    built = build("tpaw")
    shapes = jax.tree.map(np.shape, built.initial_state().algorithm_state)
    for state, _ in run_rounds(built, 2):
        assert jax.tree.map(np.shape, state.algorithm_state) == shapes


@pytest.mark.parametrize("method", ["spear", "grpo", "opsd", "sft", "tpaw", "tspin"])
def test_local_only_gives_every_client_what_it_would_reach_alone(method):
    built = build(
        method,
        **{
            "federation.aggregation": "local",
            "federation.num_clients": 2,
            "federation.clients_per_round": 2,
        },
    )
    built.shapes.open("train blocks", (4,))
    built.shapes.freeze()  # one program trains both clients
    state = built.initial_state()
    assert jax.tree.leaves(state.lora)[0].shape[0] == 2
    after, metrics, told = local_only.run_round(built.federation, state, BudgetUsed())
    assert metrics["round/clients"] == 2 and len({t.client for t, _, _ in told}) in (0, 2)
    first = built.federation.cohort(1).clients[0]
    own = jax.tree.map(lambda x: x[first], (state.lora, state.algorithm_state))
    single, _, _ = rounds.round_of(
        built.federation,
        state.replace(lora=own[0], algorithm_state=own[1]),
        BudgetUsed(),
        built.federation.cohort_of([first], 1),
    )
    np.testing.assert_array_equal(
        flat(single.lora), flat(jax.tree.map(lambda x: x[first], after.lora))
    )
    if told or method == "sft":
        assert not np.allclose(
            *(flat(jax.tree.map(lambda x, c=c: x[c], after.lora)) for c in (0, 1))
        )
    assert measured(built, after).count == 20


def test_a_run_with_one_client_is_centralised_and_holds_all_data():
    built = build("spear", **{"federation.num_clients": 1, "federation.clients_per_round": 1})
    assert len(built.federation.clients) == 1 and len(built.federation.clients[0]) == len(
        built.federation.worker.examples
    )


def test_a_token_budget_ends_the_run_and_the_lines_add_up(tmp_path):
    config = config_of("spear", **{"rounds": 50, "budget.tokens": 150})
    workdir = train(tmp_path / "run", config).workdir
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]
    assert lines[-1]["budget/tokens"] >= 150 > (lines[-2]["budget/tokens"] if len(lines) > 1 else 0)
    assert lines[-1]["budget/tokens"] == sum(line["rollout/tokens"] for line in lines)
    assert lines[-1]["budget/flops"] == pytest.approx(sum(line["round/flops"] for line in lines))
    assert "eval/accuracy" in lines[-1]


def test_a_budget_sets_the_pace_of_the_learning_rate():
    built = build(
        "spear",
        **{
            "rounds": 100,
            "budget.tokens": 1000,
            "train.learning_rate": 1.0,
            "train.learning_rate_min": 0.0,
            "train.warmup": True,
        },
    )
    learning_rate = built.federation.schedule.learning_rate
    # 10 rounds of warm-up in 100: a tenth of the budget is the peak, all of it the minimum
    assert learning_rate(1, 100, 0) == pytest.approx(1.0)
    assert learning_rate(1, 50, 0) == pytest.approx(0.5)
    assert learning_rate(2, 1000, 0) == pytest.approx(0.0)
    assert learning_rate(10, 0, 0) == pytest.approx(1.0)


def write_pairs(path, column="response", value="B"):
    rows = [
        {"prompt": f"Which letter comes after {a}?", column: value, "chosen": value}
        for a in "ABCDEFGHIJKLMNOPQRST"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


REFUSED = [
    ("dpo", {"dpo.source": "data"}, "trains on pairs"),
    ("spear", {"task": "pairs"}, "nothing grades task"),
    ("grpo", {"task": "pairs"}, "nothing grades task"),
    ("sft", {"task": "pairs", "sft.east": 4}, "nothing grades task"),
    ("rltf_sd", {"rollout.feedback": "none"}, "learns from feedback"),
    ("dpo", {"rollout.feedback": "none"}, "learns from feedback"),
    ("iris", {"train.batch_size": 1}, "at least 2"),
    ("grpo", {"grpo.group": 1}, "at least 2"),
    ("grpo", {"grpo.reduction": "dappo"}, "must be one of dapo"),
    ("space", {"space.mu": 3, "rollout.temperature": 0.0}, "greedy sampling"),
    ("tpaw", {"tpaw.players": 4}, "between 1 and 3"),
]


@pytest.mark.parametrize("method, changes, words", REFUSED)
def test_a_method_on_data_it_cannot_use_says_so_before_compiling(
    method, changes, words, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was traced")

    monkeypatch.setattr("spear_jax.models.decoder._run", refuse)
    if changes.get("task") == "pairs":
        write_pairs(tmp_path / "pairs.jsonl")
        changes = changes | {
            "data.path": str(tmp_path / "pairs.jsonl"),
            "federation.min_examples": 1,
        }
    with pytest.raises(UserError, match=words) as caught:
        build(method, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["sft", "spin", "iris"])
def test_methods_that_learn_from_responses_run_on_any_file_of_pairs(method, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    changes = {
        "task": "pairs",
        "data.path": str(tmp_path / "pairs.jsonl"),
        "federation.min_examples": 1,
    }
    built = build(method, **changes, **{"train.batch_size": 16, "federation.partition": "iid"})
    before = measured(built, built.initial_state())
    state, _ = run_rounds(built, 3)[-1]
    assert measured(built, state).nll < before.nll


def test_dpo_trains_on_a_preference_file(tmp_path):
    rows = [{"prompt": f"Say a letter, {i}.", "chosen": "B", "rejected": "C"} for i in range(40)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "task": "preferences",
        "data.path": str(tmp_path / "prefs.jsonl"),
        "federation.min_examples": 1,
    }
    built = build(
        "dpo",
        **changes,
        **{"dpo.source": "data", "federation.partition": "iid", "train.learning_rate": 0.01},
    )
    _, metrics = run_rounds(built, 3)[-1]
    assert metrics["dpo/margin"] > 0 and metrics["rollout/tokens"] == 0


@pytest.mark.parametrize(
    "method, changes", [("sft", {"sft.east": 4}), ("dpo", {"dpo.source": "east", "dpo.east": 4})]
)
def test_east_keeps_undecided_questions_and_its_weights_average_to_one(method, changes):
    got = first_rollouts(build(method, **changes, **{"rollout.examples": 24}))
    by_question = {}
    for trace, _, _ in got.traces:
        by_question.setdefault((trace.client, trace.example.id), []).append(trace.first.correct)
    assert by_question and all(
        len(set(found)) == 2 and len(found) == 4 for found in by_question.values()
    )
    assert got.weight.sum() == len(by_question)
    rows = [
        row
        for client in got.rows
        for step in client
        for micro in step
        for row in micro
        if row is not None
    ]
    assert len({row.weight for row in rows}) > 1 and all(row.weight > 0 for row in rows)
