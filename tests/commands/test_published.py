"""Coming from the published SPEAR code: its YAML files as configs, its runs as run folders, its
adapters as PEFT folders.

The files are written here, from the published schema; none of the published ones is in the
repository.
"""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
import yaml

from spear_jax import evaluate as evaluate_command
from spear_jax import published
from spear_jax import report as report_command
from spear_jax.analysis import runs
from spear_jax.core.errors import UserError
from spear_jax.experiment import builder, command_line
from spear_jax.experiment.config import default_config, flatten, parse
from spear_jax.experiment.presets import method_config
from spear_jax.experiment.published import yaml_config
from spear_jax.experiment.published.keys import KEYS
from spear_jax.experiment.published.values import DATASETS, METHODS
from spear_jax.models.config import read_config
from spear_jax.models.io import peft as peft_module

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "spear_jax/assets/tiny"
MODELS = {"qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B", "llama-3.2-3b": "meta-llama/Llama-3.2-3B"}
# rounds, clients a round, rollouts, steps, examples, new tokens, tail, loses per win, lr, lr_min
NUMBERS = {
    "arc_challenge": (100, 3, 160, 5, 400, 256, 0, 2.0, 5e-5, 1e-5),
    "hellaswag": (50, 5, 160, 10, 400, 256, 0, 2.0, 5e-5, 1e-5),
    "math_mcqa": (50, 3, 80, 5, 500, 512, 32, 4.0, 5.05e-5, 1e-5),
    "strategy_qa": (100, 5, 80, 5, 400, 256, 24, 4.0, 1e-4, 5e-5),
}


def published_file(method, dataset, model, **changed):
    """{section: {key: value}} as the published files have it; `changed` is {"section.key":
    value}.
    """
    rounds, clients, rollouts, steps, most, tokens, tail, ratio, rate, low = NUMBERS[dataset]
    reasoned = dataset in ("math_mcqa", "strategy_qa")
    batch = (
        (4, 4)
        if dataset == "math_mcqa"
        else (16, 1)
        if reasoned or model == "qwen2.5-1.5b"
        else (8, 2)
    )
    if method in ("grpo", "rltf_sd"):
        batch = (2, 8) if dataset == "math_mcqa" else (4, 4)
    flat = {
        "output_dir": f"runs/{dataset}",
        "algorithm.name": method,
        "model.model_name": MODELS[model],
        "model.dtype": "bf16",
        "model.max_seq_len": 1024 if dataset == "strategy_qa" else 2048,
        **{"lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.1},
        "lora.last_n_layers": 36 if model == "qwen2.5-1.5b" else 28,
        **{
            "data.dataset": dataset,
            "data.num_clients": 50,
            "data.dirichlet_alpha": 1.0,
            "data.seed": 44,
        },
        **{
            "data.max_examples_per_client": most,
            "data.eval_every": 5,
            "data.eval_every_round_up_to": 1,
        },
        **{"fl.rounds": rounds, "fl.clients_per_round": clients},
        **{"fl.local_rollout_steps": rollouts, "fl.local_train_steps": steps},
        **{
            "gen.max_new_tokens_y0": tokens,
            "gen.max_new_tokens_y1": tokens,
            "gen.num_revisions": 2,
        },
        **{
            "gen.do_sample": True,
            "gen.temperature": 0.8,
            "gen.rollout_batch_size": 32,
            "gen.eval_batch_size": 32,
        },
        **{"spear.lambda_win": 1.0, "spear.lambda_lose": 0.1, "spear.lambda_anchor": 0.0},
        **{
            "spear.unlikelihood_margin": 0.3,
            "spear.ul_answer_only": False,
            "spear.ul_tail_tokens": tail,
        },
        **{"spear.ul_skip_math_ops": dataset == "math_mcqa", "spear.max_lose_ratio": ratio},
        **{
            "optim.lr": rate,
            "optim.lr_min": low,
            "optim.batch_size": batch[0],
            "optim.grad_accum_steps": batch[1],
        },
        **{"optim.warmup_ratio": 0.1, "optim.weight_decay": 0.0, "optim.use_warmup": True},
        **{
            "feedback.provider": "oracle",
            "feedback.mc_hint_words": {"math_mcqa": 10}.get(dataset, 3),
        },
    }
    if method in ("grpo", "rltf_sd") and reasoned:
        flat |= {
            "grpo.num_generations": 2,
            "grpo.beta_kl": 0.1 if dataset == "strategy_qa" else 0.02,
        }
    if method == "rltf_sd":
        flat |= {
            "rltf_sd.gamma": 1.0,
            "rltf_sd.sd_coeff": 0.1,
            "rltf_sd.rl_coeff": 1.0,
            "rltf_sd.early_termination": True,
        }
        flat |= {"distill.feedback_max_chars": 2000}
    nested = {}
    for name, value in (flat | changed).items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return nested


def written(folder, *args, **changed):
    file = folder / "published.yaml"
    file.write_text(yaml.safe_dump(published_file(*args, **changed)))
    return str(file)


def loaded(text, folder, variant=""):
    file = folder / "published.yaml"
    file.write_text(text)
    return yaml_config.from_argument(f"{file}{variant}")


@pytest.mark.parametrize("variant", ["", ",reference"])
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_of_every_method_and_dataset_is_a_valid_config(method, dataset, variant, tmp_path):
    for model, name in MODELS.items():
        config = yaml_config.from_argument(written(tmp_path, method, dataset, model) + variant)
        parse(config)
        assert (config.algorithm.name, config.task, config.model, config.seed) == (
            method,
            dataset,
            name,
            44,
        )
        assert config.lora.last_layers == 0  # both models have 28 layers; the files say 28 or 36


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_spears_files_give_the_configs_that_configs_spear_has(dataset, model, tmp_path):
    found = flatten(yaml_config.from_argument(written(tmp_path, "spear", dataset, model)))
    wanted = flatten(method_config("spear", f"{dataset},{model}"))
    differing = {name for name in wanted if found[name] != wanted[name]}
    # seeds and sizes of batches that change no result; its files touch whole answers, and name hint
    # words that nothing reads
    assert differing <= {
        "seed",
        "rollout.max_concurrent_sequences",
        "eval.rows",
        "spear.answer_only",
        "rollout.hint_words",
    }
    assert "rollout.hint_words" not in differing or dataset == "strategy_qa"


def test_an_empty_file_has_the_published_defaults_and_not_ours(tmp_path):
    config = loaded("", tmp_path)
    assert (config.federation.num_clients, config.federation.dirichlet_alpha, config.rounds) == (
        20,
        0.3,
        20,
    )
    assert (config.train.learning_rate, config.train.weight_decay, config.train.warmup) == (
        2e-4,
        1e-3,
        False,
    )
    assert (config.lora.last_layers, config.lora.dropout, config.eval.first_rounds) == (6, 0.05, 10)
    assert (config.spear.lose_weight, config.spear.margin, config.train.anchor_weight) == (
        0.3,
        0.1,
        0.01,
    )
    assert config.rollout.temperature == 0.0  # do_sample is false there
    assert config.dtype == "bfloat16" and config.train.remat == "auto"


def test_every_published_key_but_those_without_effect_moves_our_config_or_is_refused():
    other = {
        bool: lambda v: not v,
        int: lambda v: v + 7,
        float: lambda v: v + 0.25,
        str: lambda v: v + "x",
    }
    chosen = {
        "algorithm.name": "opsd", "data.dataset": "hellaswag", "model.dtype": "fp32", "fl.aggregation": "fedyogi",
        "data.max_examples_per_client": None, "lora.target_modules": ["q_proj"], "grpo.reward_clip": 0.5,
        "data.dirichlet_num_classes": 2, "data.eval_split": "dev", "optim.micro_batch_size": 2,
    }  # fmt: skip
    for name, key in KEYS.items():
        method = "algorithm.name" if name == "algorithm.name" else key.methods[0]
        base = {} if name == "algorithm.name" else {"algorithm.name": method}
        if name == "data.eval_split":
            base["data.dataset"] = "math_mcqa"
        if name == "gen.temperature":
            base["gen.do_sample"] = True
        value = (
            chosen[name]
            if name in chosen
            else other.get(type(key.default), lambda _: "x")(key.default)
        )
        before = flatten(yaml_config.to_config(base, "file"))
        try:
            after = flatten(yaml_config.to_config(base | {name: value}, "file"))
        except UserError as error:
            assert "refused" in key.here and name in str(error)
            continue
        assert (before == after) == key.here.startswith("no effect"), name


def test_a_key_that_the_method_does_not_read_has_no_effect():
    for name in ("spear.lambda_anchor", "grpo.clip_range", "rltf_sd.gamma"):
        before = flatten(yaml_config.to_config({"algorithm.name": "opsd"}, "file"))
        assert (
            flatten(yaml_config.to_config({"algorithm.name": "opsd", name: 0.5}, "file")) == before
        )


@pytest.mark.parametrize(
    "text, words",
    [
        ("spear:\n  lamda_lose: 0.1\n", "Did you mean 'spear.lambda_lose'"),
        ("optm:\n  lr: 0.1\n", "Did you mean 'optim'"),
        ("fl:\n  server_lr: 0.1\n", "fl.server_lr"),
        ("fl:\n  rounds: 5\n  rounds: 6\n", "'rounds' twice"),
        ("fl: 3\n", "fl is 3; it must be a section"),
        ("- a\n", "must be a mapping"),
        ("fl: [1\n", "no YAML file"),
        ("fl:\n  rounds: many\n", 'fl.rounds is "many"; it must be a whole number'),
        ("gen:\n  do_sample: 1\n", "gen.do_sample is 1; it must be true or false"),
        ("optim:\n  lr: fast\n", 'optim.lr is "fast"; it must be a number'),
        ("algorithm:\n  name: speer\n", "did you mean 'spear'"),
        ("model:\n  load_in_4bit: true\n", "--config.quantize=nf4"),
        ("model:\n  dtype: fp16\n", "take bf16"),
        ("model:\n  max_seq_len: 256\n", "must exceed gen.max_new_tokens_y0"),
        ("hf:\n  offline: true\n", "--offline"),
        ("fl:\n  fedprox_mu: 0.1\n", "--config.federation.prox"),
        ("lora:\n  target_modules: [qkv]\n", "q_proj"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_with_key_value_and_remedy(text, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        loaded(text, tmp_path)
    assert "published.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_variant_is_read_behind_the_path_and_a_wrong_one_named(tmp_path):
    assert loaded("", tmp_path, ",reference").algorithm.preset == "reference"
    with pytest.raises(UserError, match="Did you mean 'reference'"):
        loaded("", tmp_path, ",refrence")
    with pytest.raises(UserError, match="no file"):
        yaml_config.from_argument("nowhere.yaml,reference")


def test_reference_repeats_the_shared_faults_for_every_method_and_refuses_another_server(tmp_path):
    for method in METHODS:
        config = yaml_config.to_config({"algorithm.name": method}, "file", "reference")
        assert (config.federation.aggregation, config.rollout.top_k, config.data.extractor) == (
            "last",
            50,
            "published",
        )
    with pytest.raises(UserError, match="leave ,reference out"):
        yaml_config.to_config({"fl.aggregation": "fedadam"}, "file", "reference")
    config = yaml_config.to_config({"fl.aggregation": "fedadam"}, "file")
    assert (config.federation.aggregation, config.federation.server_rate) == ("fedadam", 0.01)


def test_numbers_without_a_point_are_numbers_although_yaml_reads_them_as_text(tmp_path):
    assert yaml.safe_load("5e-5") == "5e-5"
    assert loaded("optim:\n  lr: 5e-5\n", tmp_path).train.learning_rate == 5e-5


def test_the_guide_has_the_table_as_the_code_has_it():
    assert yaml_config.table() in (ROOT / "docs/guides/from-published-code.md").read_text()


def test_a_published_file_builds_with_a_model_and_data_from_disk(tmp_path):
    rows = [
        {"id": f"q{i}", "question": f"What do {i} traders sell?", "answerKey": "ABCD"[i % 4]}
        | {"choices": {"label": list("ABCD"), "text": [f"thing {i}{c}" for c in "abcd"]}}
        for i in range(60)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        "data.num_clients": 2,
        "fl.clients_per_round": 2,
        "gen.max_new_tokens_y0": 8,
        "gen.max_new_tokens_y1": 8,
    }
    file = written(tmp_path, "spear", "arc_challenge", "qwen2.5-1.5b", **small)
    config = command_line.read_config(
        [
            f"--config=from_yaml:{file}",
            f"--config.data.path={tmp_path}",
            "--config.model=tiny",
        ]
    )
    built = builder.build(config, jax.devices()[:1])
    assert [len(part) for part in built.federation.clients] and sum(
        map(len, built.federation.clients)
    ) == 60


# --- runs ---

LOGS = {
    "spear": {
        "win_loss": 0.5,
        "lose_loss": 0.25,
        "anchor_loss": 0.0,
        "steps": 4,
        "wins": 6,
        "losses": 3,
        "n_eff": 6,
    },
    "grpo": {
        "algo": "grpo",
        "steps": 4,
        "avg_reward": 0.5,
        "avg_kl": 0.01,
        "avg_pg_loss": -0.1,
        "n_eff": 100,
    },
    "rltf_sd": {
        "algo": "rltf_sd",
        "steps": 4,
        "sd_loss": 0.1,
        "rl0_loss": 0.2,
        "rl1_loss": 0.3,
        "n_eff": 12,
    }
    | {"avg_kl0": 0.0, "avg_kl1": 0.0, "avg_r0": 0.25, "avg_r1": 0.5, "n_traces": 12},
    "opsd": {"algo": "opsd", "loss": 0.75, "kl": 0.75, "steps": 4, "n_eff": 8},
}
SKIPPED = {
    "win_loss": 0,
    "lose_loss": 0,
    "anchor_loss": 0,
    "steps": 0,
    "wins": 0,
    "losses": 5,
    "skipped": True,
    "n_eff": 9,
}


def published_run(folder, method="spear", second=None, **changed):
    """A run folder as the published code writes it: three rounds of two clients, rounds 1 and 3
    evaluated.
    """
    folder.mkdir()
    history = []
    for number in (1, 2, 3):
        logs = [LOGS[method] | {"client_id": 4}, (second or LOGS[method]) | {"client_id": 7}]
        held = {
            "dataset": "arc_challenge",
            "n": 100,
            "accuracy": 0.25 * number,
            "eval_method": "log_likelihood",
        }
        one = {
            "round": number,
            "selected_clients": [4, 7],
            "client_logs": logs,
            "seconds": 10.0 * number,
        }
        history.append(one | {"eval": held if number != 2 else None})
    (folder / "history.json").write_text(json.dumps({"history": history}, indent=2))
    config = published_file(method, "arc_challenge", "qwen2.5-1.5b", **changed)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "model_info.json").write_text(json.dumps({"algorithm": method}))
    return folder


def imported(run, out, *more):
    return published.main([f"--run={run}", f"--out={out}", "--quiet", *more])


def test_a_published_history_becomes_metrics_that_analysis_and_report_read(tmp_path):
    run = published_run(tmp_path / "theirs", second=SKIPPED)
    found = imported(run, tmp_path / "ours")
    assert found == {"out": str(tmp_path / "ours"), "rounds": 3, "adapter": None}
    table = runs.load_metrics(tmp_path / "ours").set_index("round")
    assert table["eval/accuracy"].dropna().to_dict() == {1: 0.25, 3: 0.75}
    assert table.loc[1, "eval/stderr"] == pytest.approx(np.sqrt(0.25 * 0.75 / 100))
    assert table["budget/seconds"].tolist() == [10, 30, 60] and table[
        "published/seconds"
    ].tolist() == [10, 20, 30]
    assert np.diff(table["time"]).tolist() == pytest.approx([20, 30])
    # the client that was skipped trained no step: it has no share in the losses
    assert (table["rollout/wins"] == 6).all() and (table["rollout/loses"] == 8).all()
    assert (table["train/win_nll"] == 0.5).all() and (table["published/lose_loss"] == 0.25).all()
    assert (table["round/clients"] == 2).all() and (table["round/clients_without_wins"] == 1).all()
    assert json.loads((tmp_path / "ours/summary.json").read_text())["eval"]["best"]["round"] == 3
    assert runs.load_config(tmp_path / "ours")["federation.aggregation"] == "last"
    kept = tmp_path / "ours/published"
    assert sorted(file.name for file in kept.iterdir()) == [
        "config.json",
        "history.json",
        "model_info.json",
    ]
    assert (kept / "history.json").read_bytes() == (run / "history.json").read_bytes()
    report_command.main(
        [f"--workdir={tmp_path / 'ours'}", f"--out={tmp_path / 'report'}", "--quiet"]
    )
    assert (tmp_path / "report").is_dir()


@pytest.mark.parametrize(
    "method, metric, value",
    [
        ("grpo", "rollout/first_accuracy", 0.5),
        ("rltf_sd", "rollout/first_accuracy", 0.25),
        ("opsd", "opsd/divergence", 0.75),
    ],
)
def test_what_baselines_log_is_kept_by_our_names_or_under_published(
    method, metric, value, tmp_path
):
    imported(published_run(tmp_path / "theirs", method), tmp_path / "ours")
    line = runs.read_lines(tmp_path / "ours/metrics.jsonl")[0]
    assert line[metric] == value
    taken = {"client_id", "steps", "algo", *published.MEANS, *published.SUMS}
    assert {f"published/{name}" for name in LOGS[method] if name not in taken} <= set(line)


def test_rewards_of_another_scale_are_no_accuracy(tmp_path):
    imported(
        published_run(tmp_path / "theirs", "grpo", **{"grpo.reward_scale": 2.0}), tmp_path / "ours"
    )
    line = runs.read_lines(tmp_path / "ours/metrics.jsonl")[0]
    assert line["published/avg_reward"] == 0.5 and "rollout/first_accuracy" not in line


def test_a_folder_that_is_no_published_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        imported(tmp_path, tmp_path / "out")
    run = published_run(tmp_path / "theirs")
    with pytest.raises(UserError, match="no adapter of round 7; saved: none"):
        imported(run, tmp_path / "out", "--round=7")
    (run / "history.json").write_text('{"history": [')
    with pytest.raises(UserError, match="not valid JSON"):
        imported(run, tmp_path / "out")
    (run / "history.json").write_text('{"history": []}')
    with pytest.raises(UserError, match="no rounds"):
        imported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def torch_adapter(file, layers=(0, 1, 2), seed=0):
    """A state dict as get_peft_model_state_dict gives it, for the embedded model's q and down
    projections, rank 16.
    """
    torch = pytest.importorskip("torch", reason="reading .pt files needs torch")
    model, made = read_config(TINY)[0], torch.Generator().manual_seed(seed)
    widths = {
        "self_attn.q_proj": (model.width, model.heads * model.head_width),
        "mlp.down_proj": (model.mlp_width, model.width),
    }
    state = {}
    for layer in layers:
        for name, (inside, outside) in widths.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            state[f"{key}A.weight"] = torch.randn(16, inside, generator=made) / 16
            state[f"{key}B.weight"] = torch.randn(outside, 16, generator=made) / 16
    torch.save(state, file)
    return state


def test_a_published_adapter_is_a_peft_folder_with_the_same_numbers(tmp_path):
    run = published_run(tmp_path / "theirs")
    model = read_config(TINY)[0]
    every = tuple(range(model.layers))
    states = {
        number: torch_adapter(run / f"adapter_round_{number}.pt", every, number)
        for number in (0, 1, 10)
    }
    assert (
        imported(run, tmp_path / "ours")["adapter"]["round"] == 10
    )  # the newest by number, not by name
    assert imported(run, tmp_path / "first", "--round=1")["adapter"]["round"] == 1
    for folder, number in ((tmp_path / "ours", 10), (tmp_path / "first", 1)):
        tree, lora = peft_module.load_adapter(folder / "adapter", model)
        assert (lora.rank, lora.alpha, lora.dropout, lora.targets, lora.last_layers) == (
            16,
            32.0,
            0.1,
            ("q", "down"),
            0,
        )
        theirs = states[number][
            "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
        ].numpy()
        np.testing.assert_array_equal(np.asarray(tree.down.b[1]).T, theirs)
    config = default_config()
    config.update_from_flattened_dict(
        {
            "lora.init_from": str(tmp_path / "ours/adapter"),
            "lora.targets": ("q", "down"),
            "lora.rank": 16,
        }
    )
    assert builder.build(config, jax.devices()[:1]).adapter is not None
    found = evaluate_command.main(
        [
            "--model=tiny",
            f"--adapter={tmp_path / 'ours/adapter'}",
            "--task=facts",
            "--limit=8",
            "--quiet",
        ]
    )
    assert found["count"] == 8


def test_an_adapter_of_the_last_layers_keeps_them(tmp_path):
    run, model = published_run(tmp_path / "theirs"), read_config(TINY)[0]
    torch_adapter(run / "adapter_round_3.pt", (model.layers - 1,))
    imported(run, tmp_path / "ours")
    assert peft_module.load_adapter(tmp_path / "ours/adapter", model)[1].last_layers == 1


def test_peft_loads_the_folder_and_gives_the_state_dict_back(tmp_path):
    torch = pytest.importorskip("torch", reason="compared with PEFT itself")
    peft = pytest.importorskip("peft", reason="compared with PEFT itself")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    names = [n for n, _ in base.named_modules() if n.endswith(("q_proj", "down_proj"))]
    settings = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules=names, task_type="CAUSAL_LM"
    )
    made = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    run = published_run(tmp_path / "theirs")
    state = peft.get_peft_model_state_dict(made, adapter_name="default")
    torch.save(state, run / "adapter_round_3.pt")
    imported(run, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(TINY), tmp_path / "ours/adapter"
    )
    found = peft.get_peft_model_state_dict(again, adapter_name="default")
    assert found.keys() == state.keys() and all(
        torch.equal(found[name], state[name]) for name in state
    )
    tokens = torch.arange(12)[None]
    made.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(made(tokens).logits, again(tokens).logits)


def test_files_with_anything_but_lora_tensors_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pt files needs torch")
    run = published_run(tmp_path / "theirs")
    file = run / "adapter_round_1.pt"
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match="other tensors than LoRA"):
        imported(run, tmp_path / "out")
    torch.save({"x": pathlib.PurePosixPath("code")}, file)  # a class, which is not run
    with pytest.raises(UserError, match="cannot be read as an adapter"):
        imported(run, tmp_path / "out")
    file.write_bytes(b"cut short")
    with pytest.raises(UserError, match="cannot be read as an adapter"):
        imported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_torch_an_adapter_is_refused_with_the_remedy(tmp_path, monkeypatch):
    run = published_run(tmp_path / "theirs")
    (run / "adapter_round_1.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        UserError, match=r"torch is not installed; `pip install spear-jax\[torch\]`"
    ):
        imported(run, tmp_path / "out")
