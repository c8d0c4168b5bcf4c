"""Configs and the mistakes that stop an experiment before anything compiles."""

import json
import subprocess
import sys

import jax
import pytest

from configs import quickstart, spear
from spear_jax.algorithms.spear import Spear
from spear_jax.benchmark import workload
from spear_jax.core.errors import UserError
from spear_jax.experiment import builder, command_line, run_folder
from spear_jax.experiment.config import default_config, flatten, parse, set_preset
from spear_jax.models import cost_model
from spear_jax.models.config import parse_config
from spear_jax.models.io.peft import save_adapter
from spear_jax.models.lora import LoraConfig, init_lora

QUICK = "configs/quickstart.py"


def embedded(**changes):
    config = quickstart.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch):
    """Nothing in this file may trace a model: mistakes are found before that."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was traced")

    monkeypatch.setattr("spear_jax.models.decoder._run", refuse)


BAD_VALUES = {
    "rounds": 0,
    "rollout.temperature": -0.1,
    "rollout.top_p": 0.0,
    "rollout.max_new_tokens": 0,
    "spear.max_lose_ratio": -1.0,
    "spear.margin": 1.5,
    "spear.confidence_weighting": "per_tokn",
    "federation.dirichlet_alpha": 0.0,
    "federation.clients_per_round": 9,
    "federation.num_clients": 10_000,
    "federation.aggregation": "fedadm",
    "federation.beta1": 1.0,
    "federation.prox": -1.0,
    "federation.partition": "by_lable",
    "lora.rank": 0,
    "lora.dropout": 1.0,
    "lora.targets": ("q", "w"),
    "lora.last_layers": 5,
    "train.learning_rate": 0.0,
    "train.learning_rate_min": 1.0,
    "train.ema_decay": 1.0,
    "data.max_prompt_tokens": 8,
    "data.path": "somewhere",
    "data.chat_template": "always",
    "data.train_limit": 4,
    "eval.method": "guess",
    "task": "fact",
    "model": "no/such/folder.gguf",
    "dtype": "float16",
    "algorithm.name": "speer",
    "rollout.feedback": "orakle",
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_stops_before_compiling_with_a_message_that_names_it(name):
    with pytest.raises(UserError) as caught:
        builder.build(embedded(**{name: BAD_VALUES[name]}), jax.devices()[:1])
    message = str(caught.value)
    assert "\n" not in message and len(message) > 30
    value = BAD_VALUES[name]
    shown = [
        name,
        name.split(".")[-1],
        str(value),
        str(value[-1]) if isinstance(value, tuple) else str(value),
    ]
    assert any(part in message for part in shown)


@pytest.mark.parametrize(
    "name, near",
    [
        ("federation.num_client", "federation.num_clients"),
        ("sed", "seed"),
        ("spear.marign", "spear.margin"),
    ],
)
def test_a_mistyped_field_names_the_nearest_one(name, near):
    with pytest.raises(UserError, match=f"Did you mean '{near}'"):
        command_line.read_config([f"--config={QUICK}", f"--config.{name}=1"])


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "no config"),
        (["--config=configs/nothing.py"], "no config file"),
        ([f"--config={QUICK}", "--workdri=x"], "unknown argument"),
        ([f"--config={QUICK}", "--config.rounds=many"], "rounds"),
        ([f"--config={QUICK}", "--config.rounds"], "no value"),
        ([f"--config={QUICK}:fact"], "Did you mean 'facts'"),
        (["--config=configs/spear.py"], "TASK,MODEL"),
        (["--config=configs/spear.py:arc_challange,tiny"], "Did you mean 'arc_challenge'"),
        (["--config=configs/spear.py:arc_challenge,qwen"], "qwen2.5-1.5b"),
        (["--config=configs/spear.py:arc_challenge,tiny,refrence"], "Did you mean 'reference'"),
    ],
)
def test_a_bad_command_line_is_a_user_error(args, words):
    with pytest.raises(UserError, match=words):
        command_line.read_config(args)


def test_overrides_reach_the_config():
    config = command_line.read_config(
        [
            f"--config={QUICK}:reasoned",
            "--config.federation.num_clients=5",
            "--config.train.learning_rate=0.5",
        ]
    )
    assert (config.task, config.federation.num_clients, config.train.learning_rate) == (
        "reasoned",
        5,
        0.5,
    )


@pytest.mark.parametrize("task", ["arc_challenge", "hellaswag", "math_mcqa", "strategy_qa"])
@pytest.mark.parametrize("model", ["qwen2.5-1.5b", "llama-3.2-3b"])
@pytest.mark.parametrize("variant", ["", ",reference", ",cpu"])
def test_every_paper_config_is_valid_and_keeps_the_published_numbers(task, model, variant):
    config = spear.get_config(f"{task},{model}{variant}")
    parse(config)
    assert config.federation.num_clients in (50, 10) and config.lora.rank == 16
    if not variant:
        # batch x accumulation is 16 everywhere in the published table
        assert config.train.batch_size * config.train.accumulation == 16
        assert config.rollout.temperature == 0.8 and config.spear.margin == 0.3


def test_reference_preset_sets_every_switch_and_each_stands_alone():
    plain, reference = default_config(), default_config()
    set_preset(reference, "reference")
    before, after = flatten(plain), flatten(reference)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(Spear.reference) | {"algorithm.preset"}
    for name, value in Spear.reference.items():
        alone = default_config()
        alone.update_from_flattened_dict({name: value})
        parse(alone)


def test_a_workdir_of_another_config_names_the_differing_keys(tmp_path):
    run_folder.open_workdir(str(tmp_path / "run"), embedded(), "auto")
    assert run_folder.open_workdir(str(tmp_path / "run"), embedded(), "auto")[1]
    with pytest.raises(UserError, match=r"differing: seed \(0 there, 1 now\)"):
        run_folder.open_workdir(str(tmp_path / "run"), embedded(seed=1), "auto")
    with pytest.raises(UserError, match="holds a run already"):
        run_folder.open_workdir(str(tmp_path / "run"), embedded(), "never")
    with pytest.raises(UserError, match="holds no run"):
        run_folder.open_workdir(str(tmp_path / "none"), embedded(), "must")


def test_a_run_of_a_former_default_that_changes_speed_alone_goes_on(tmp_path):
    sequences = "rollout.max_concurrent_sequences"
    run_folder.open_workdir(str(tmp_path), embedded(**{sequences: 64}), "auto")
    assert run_folder.open_workdir(str(tmp_path), embedded(**{sequences: 0}), "must")[1]
    with pytest.raises(UserError, match=r"64 there, 32 now"):
        run_folder.open_workdir(str(tmp_path), embedded(**{sequences: 32}), "auto")


def test_run_folder_keeps_the_resolved_config(tmp_path):
    config = embedded(seed=3)
    folder, _ = run_folder.open_workdir(str(tmp_path / "run"), config, "auto")
    assert json.loads((folder / "config.json").read_text())["seed"] == 3
    assert flatten(run_folder.read_run_config(folder)) == flatten(config)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    built = builder.build(embedded(), jax.devices()[:1])
    lora = LoraConfig(4, 8.0, 0.0, ("q", "v"))
    save_adapter(
        tmp_path / "small",
        init_lora(jax.random.key(0), lora, built.model.config),
        lora,
        built.model.config,
        "tiny",
    )
    for changes, word in [({}, "rank"), ({"lora.rank": 4, "lora.alpha": 8.0}, "targets")]:
        with pytest.raises(UserError, match=word):
            builder.build(
                embedded(**changes, **{"lora.init_from": str(tmp_path / "small")}),
                jax.devices()[:1],
            )
    fits = {
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "lora.targets": ("q", "v"),
        "lora.init_from": str(tmp_path / "small"),
    }
    assert builder.build(embedded(**fits), jax.devices()[:1]).adapter is not None


def test_a_prompt_over_the_limit_names_its_example():
    with pytest.raises(
        UserError, match=r"example 'test-\d+' has a prompt of \d+ tokens, over the limit of 20"
    ):
        builder.build(embedded(**{"data.max_prompt_tokens": 20}), jax.devices()[:1])


def test_cohorts_depend_on_seed_and_round_alone_and_their_streams_do_not_collide():
    built = builder.build(embedded(**{"federation.clients_per_round": 4}), jax.devices()[:1])
    assert built.federation.cohort(3).clients == built.federation.cohort(3).clients
    assert any(
        built.federation.cohort(r).clients != built.federation.cohort(1).clients
        for r in range(2, 8)
    )

    def first_draw(federation, round, client):
        cohort = federation.cohort(round)
        cohort.clients[0] = client
        return cohort.rngs(0, "pools").integers(1 << 40)

    assert first_draw(built.federation, 1, 2) != first_draw(built.federation, 2, 1)
    published = builder.build(embedded(**{"federation.colliding_streams": True}), jax.devices()[:1])
    assert first_draw(published.federation, 1, 2) == first_draw(published.federation, 2, 1)


def test_a_users_mistake_exits_with_two_and_one_line(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "spear_jax.train",
            f"--config={QUICK}",
            f"--workdir={tmp_path}/x",
            "--config.rollout.top_p=2",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "error: rollout.top_p is 2.0; it must be in (0, 1]. Set --config.rollout.top_p."
    )
    assert not (tmp_path / "x").exists()


def test_too_many_clients_at_once_names_the_number_that_fits():
    with pytest.raises(UserError, match="clients_at_once=3, which would fit"):
        cost_model.check_memory(8, 3_000_000_000, 10_000_000_000)
    with pytest.raises(UserError, match="Not even one client fits"):
        cost_model.check_memory(1, 3_000_000_000, 1_000_000_000)
    cost_model.check_memory(3, 3_000_000_000, 10_000_000_000)
    cost_model.check_memory(3, 3_000_000_000, None)


def test_what_is_computed_again_is_what_memory_asks_for(monkeypatch):
    each = {"nothing": 40, "attention": 10, "layers": 2}.__getitem__
    choose = cost_model.fitting_remat
    # a CPU never keeps everything; unknown memory keeps least
    assert [choose(each, 1, whole) for whole in (1000, 20, 19, 1, None)] == [
        "attention",
        "attention",
        "layers",
        "layers",
        "layers",
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [choose(each, 1, whole) for whole in (80, 79, 19)] == ["nothing", "attention", "layers"]
    assert choose(each, 2, 80) == "attention"


def test_remat_auto_is_chosen_by_all_memory_and_not_by_what_is_free(monkeypatch):
    def chosen(whole, free):
        monkeypatch.setattr(cost_model, "whole_device_bytes", lambda: whole)
        monkeypatch.setattr(cost_model, "device_bytes", lambda: free)
        built = builder.build(embedded(**{"train.remat": "auto"}), jax.devices()[:1])
        return built.federation.decoder.remat

    assert chosen(10**12, 10**9) == chosen(10**12, 10**10) == "attention"
    assert chosen(10**8, 10**10) == "layers"


def test_remat_auto_does_not_part_clients_that_may_train_together(monkeypatch):
    """The memory is for all clients of a round that fill a device together."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    asked = []

    def fitting_remat(each, together, whole):
        asked.append(together)
        return "layers"

    monkeypatch.setattr(cost_model, "fitting_remat", fitting_remat)
    fields = {"train.remat": "auto", "federation.num_clients": 10, "rollout.kv_cache_mb": 10}
    for clients, at_once in ((3, 0), (10, 0), (10, 2)):
        fields |= {"federation.clients_per_round": clients, "federation.clients_at_once": at_once}
        builder.build(embedded(**fields), jax.devices()[:1])
    assert asked == [3, 10, 2]


def test_a_gpus_blocks_fill_it_and_then_clients_train_alone(monkeypatch):
    wide = parse_config(workload.PRESETS["qwen2.5-1.5b"]().shape)
    narrow = parse_config(workload.PRESETS["tiny"]().shape)
    assert cost_model.filling_tokens(wide) == 4096
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cost_model.filling_tokens(wide) == 25_000_000 // 1536 == 16_276
    assert cost_model.filling_tokens(narrow) == 25_000_000 // 128
    fields = {"federation.num_clients": 10, "federation.clients_per_round": 10}
    fields |= {"rollout.kv_cache_mb": 10}
    together = lambda **more: (
        builder.build(embedded(**fields, **more), jax.devices()[:1]).federation
    )
    assert together().local.clients_at_once == 10
    assert together().max_tokens_per_block == 25_000_000 // 128
    # rows of 4 x 4 x 512 tokens and more fill it alone
    alone = together(**{"train.batch_size": 4000, "train.max_tokens_per_block": 190_000})
    assert alone.local.clients_at_once == 1


def test_clients_at_once_is_one_on_a_cpu_and_fills_half_of_an_accelerator(monkeypatch):
    assert cost_model.fitting(30, 1_000_000_000, 64_000_000_000) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cost_model.fitting(30, 1_000_000_000, 64_000_000_000) == 30
    assert cost_model.fitting(100, 1_000_000_000, 64_000_000_000) == 32  # half of 64 GB
    assert cost_model.fitting(100, 1_000_000_000, None) == 100
    assert (
        cost_model.fitting(100, 1_000_000_000, 500_000_000) == 1
    )  # `check_memory` then says why it cannot be
