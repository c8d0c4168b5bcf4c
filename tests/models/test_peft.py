"""Adapters against what PEFT computed, and in and out of PEFT folders."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spear_jax.core.errors import UserError
from spear_jax.models.config import read_config
from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.io.huggingface import load_model
from spear_jax.models.io.peft import load_adapter, save_adapter
from spear_jax.models.lora import LoraConfig, init_lora, merge_lora

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FAMILIES = ("llama", "llama3", "qwen2", "qwen3")
KINDS = ("all", "last")


@pytest.fixture
def folder(tmp_path):
    """A copy of an adapter of the llama fixture to damage."""
    return pathlib.Path(shutil.copytree(FIXTURES / "llama/adapters/last", tmp_path / "adapter"))


def edit(folder, **changes):
    raw = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(raw))


def retensor(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_and_merged_logits_equal_pefts(family, kind):
    model = load_model(FIXTURES / family, "float32")
    folder = FIXTURES / family / "adapters" / kind
    want = np.load(folder / "expected.npz")
    tree, lora = load_adapter(folder, model.config)
    for side in ("right", "left"):
        tokens, mask = want[f"{side}_tokens"], want[f"{side}_mask"]
        got = logits(Decoder(model.config, lora), tree, model.base, tokens, mask)
        np.testing.assert_allclose(got[mask], want[f"{side}_logits"][mask], atol=1e-4)
        merged = merge_lora(model.base, tree, lora)
        got = logits(Decoder(model.config, lora), None, merged, tokens, mask)
        np.testing.assert_allclose(got[mask], want[f"{side}_logits"][mask], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_of_peft_survives_in_and_out_bit_for_bit(kind, tmp_path):
    source = FIXTURES / "qwen3/adapters" / kind
    model, _ = read_config(FIXTURES / "qwen3")
    tree, lora = load_adapter(source, model)
    save_adapter(tmp_path / "out", tree, lora, model, "qwen3")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", source))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    raw, want = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", source)
    )
    assert sorted(raw["target_modules"]) == sorted(want["target_modules"])
    for key in ("r", "lora_alpha", "lora_dropout", "layers_to_transform", "peft_type", "task_type"):
        assert raw[key] == want[key]
    again, settings = load_adapter(tmp_path / "out", model)
    assert settings == lora
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_adapter_of_ours_comes_back_with_its_settings(tmp_path):
    model, _ = read_config(FIXTURES / "qwen2")
    lora = LoraConfig(
        rank=3,
        alpha=7.5,
        dropout=0.25,
        targets=("q", "k", "v", "o", "gate", "up", "down"),
        last_layers=1,
    )
    tree = init_lora(jax.random.key(0), lora, model)
    again, settings = load_adapter(save_adapter(tmp_path / "a", tree, lora, model, "x"), model)
    assert settings == lora
    jax.tree.map(np.testing.assert_array_equal, again, tree)


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ["adapter_config.json", "PEFT"]),
    "config not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), ["not valid JSON"]),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        ["adapter_model.safetensors", "safe_serialization"],
    ),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        ["adapter_model.safetensors", "truncated"],
    ),
    "other kind": (lambda f: edit(f, peft_type="IA3"), ["'IA3'", "LORA"]),
    "dora": (lambda f: edit(f, use_dora=True), ["use_dora=True"]),
    "alpha pattern": (lambda f: edit(f, alpha_pattern={"q_proj": 3}), ["alpha_pattern"]),
    "rank pattern": (lambda f: edit(f, rank_pattern={"q_proj": 3}), ["rank_pattern"]),
    "bias": (lambda f: edit(f, bias="all"), ["bias='all'"]),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), ["pissa", "base weights"]),
    "rank": (lambda f: edit(f, r=8), ["[2, 32]", "[8, 32]"]),
    "rank zero": (lambda f: edit(f, r=0), ["r is 0", "1 or more"]),
    "other projection": (
        lambda f: retensor(f, lambda t: t.update({"x.lora_A.weight": t[A]})),
        ["x.lora_A.weight"],
    ),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop(A)), [A, "lacks"]),
    "wrong width": (
        lambda f: retensor(f, lambda t: t.update({A: np.ones((2, 5), np.float32)})),
        [A, "[2, 5]"],
    ),
    "not a number": (lambda f: retensor(f, lambda t: t[A].fill(np.nan)), [A, "NaN"]),
    "infinite": (lambda f: retensor(f, lambda t: t[A].fill(-np.inf)), [A, "infinity"]),
    "too large": (
        lambda f: retensor(f, lambda t: t.update({A: np.full((2, 32), 1e300)})),
        [A, "infinity"],
    ),
    "whole numbers": (
        lambda f: retensor(f, lambda t: t.update({A: t[A].astype(np.int8)})),
        [A, "I8"],
    ),
    "adapter's name in tensors": (
        lambda f: retensor(
            f, lambda t: t.update({A.replace(".weight", ".default.weight"): t.pop(A)})
        ),
        ["lora_A.default.weight", "save_pretrained"],
    ),
    "no prefix": (
        lambda f: retensor(f, lambda t: t.update({A.removeprefix("base_model.model."): t.pop(A)})),
        ["'model.layers.1.self_attn.q_proj.lora_A.weight'", "save_pretrained"],
    ),
    "MLX": (
        lambda f: (f / "adapter_config.json").write_text('{"fine_tune_type": "lora"}'),
        ["peft_type", "MLX"],
    ),
    "large rank": (lambda f: edit(f, r=10**9), ["[2, 32]", "[1000000000, 32]"]),
    "not targeted": (lambda f: edit(f, target_modules=["k_proj"]), ["target_modules", "leaves"]),
    "excluded": (lambda f: edit(f, exclude_modules=["q_proj"]), ["exclude_modules", "q_proj"]),
    "other layers": (
        lambda f: edit(f, layers_to_transform=[0]),
        ["layers_to_transform", "layers.1"],
    ),
    "endless layer": (
        lambda f: retensor(f, lambda t: t.update({A.replace("s.1", "s." + "9" * 5000): t.pop(A)})),
        ["belongs to no projection"],
    ),
    "no tensors": (lambda f: retensor(f, dict.clear), ["no LoRA tensors"]),
    "layer too deep": (
        lambda f: retensor(f, lambda t: t.update({A.replace("layers.1", "layers.3"): t.pop(A)})),
        ["layer 3", "has 3"],
    ),
    "first layers": (
        lambda f: retensor(f, lambda t: [t.pop(k) for k in list(t) if "layers.2" in k]),
        ["layers [1] of 3", "last n"],
    ),
    "uneven targets": (
        lambda f: retensor(
            f, lambda t: [t.pop(k) for k in list(t) if "layers.1.self_attn.v_proj" in k]
        ),
        ["v_proj", "layer 1"],
    ),
}


WRONG = {  # settings of a JSON file that mean nothing
    "r": ["2", 0, -1, 2.5, None, True, [2], float("nan"), 10**400],
    "lora_alpha": ["8", 0, -1, None, True, [8], float("nan"), float("inf"), 1e39, 10**400],
    "lora_dropout": ["x", None, 1, -0.1, float("nan"), [0.1]],
    "use_rslora": ["yes", [True]],
    "target_modules": [5, [5], {"q_proj": 1}],
    "exclude_modules": [5, [["v_proj"]]],
    "layers_to_transform": ["1", [1.5], True],
    "rank_pattern": [[2], {"q_proj": None}, {"(q_proj+)+": 3}, {"q_proj\\": 3}, {"q_proj": "2"}],
    "alpha_pattern": ["x", {"layers.1.self_attn.q_proj": 3}, {"nothing|q_proj": 3}],
    "peft_type": [None, 5, ["LORA"], "lora"],
    "modules_to_save": [["lm_head"]],
    "bias": [5, "lora_only"],
    "init_lora_weights": [[1], "olora"],
}


@pytest.mark.parametrize("name", WRONG)
def test_setting_that_means_nothing_is_refused_by_name(folder, name):
    model = read_config(FIXTURES / "llama")[0]
    whole = (folder / "adapter_config.json").read_text()
    for value in WRONG[name]:
        (folder / "adapter_config.json").write_text(whole)
        edit(folder, **{name: value})
        with pytest.raises(UserError) as caught:
            load_adapter(folder, model)
        assert name in str(caught.value) and len(str(caught.value)) < 600, str(caught.value)


@pytest.mark.parametrize("text", [b"[]", b"5", b"null", b"\xff\xfa", b'{"a":' * 50_000, b"NaN"])
def test_config_that_is_no_object_is_refused(folder, text):
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(folder, read_config(FIXTURES / "llama")[0])


# what PEFT loads as if it were not there
HARMLESS = {
    "name that matches nothing": {"target_modules": ["q_proj", "v_proj", "gate_proj", "W_pack"]},
    "name without tensors": {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj"]},
    "excluded": {"exclude_modules": ["up_proj", "layers.0.self_attn.q_proj"]},
    "pattern": {"target_modules": r".*\.(self_attn|mlp)\..*_proj", "layers_to_transform": None},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": "lm_head"},
    "rank pattern of nothing": {"rank_pattern": {"W_pack": 64, "proj": 64, "layers.7.*": 2}},
    "rank pattern of the default": {"rank_pattern": {"(q|v)_proj": 2, "q_proj": 2}},
    "nothing to save": {"modules_to_save": [], "layer_replication": None, "loftq_config": {}},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "Unsloth": {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "unsloth_fixed": True},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_settings_that_peft_passes_over_load(folder, case):
    model = read_config(FIXTURES / "llama")[0]
    want, settings = load_adapter(folder, model)
    edit(folder, **HARMLESS[case])
    got, again = load_adapter(folder, model)
    assert again == settings
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_rank_stabilised_scale_is_alpha_over_root_r(folder):
    model = read_config(FIXTURES / "llama")[0]
    edit(folder, use_rslora=True, lora_alpha=3)
    _, lora = load_adapter(folder, model)
    np.testing.assert_allclose(lora.scale, 3 / np.sqrt(lora.rank), rtol=1e-15)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_tensors_of_other_floats_come_as_float32(folder, dtype):
    model = read_config(FIXTURES / "llama")[0]
    want, _ = load_adapter(folder, model)
    retensor(folder, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    got, _ = load_adapter(folder, model)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            a, np.asarray(b).astype(dtype).astype(np.float32), strict=True
        ),
        got,
        want,
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_adapter_that_does_not_fit_is_refused_by_name(folder, damage):
    harm, words = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError) as caught:
        load_adapter(folder, read_config(FIXTURES / "llama")[0])
    assert all(word in str(caught.value) for word in words), str(caught.value)
