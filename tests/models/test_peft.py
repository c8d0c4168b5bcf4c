"""Adapters against what PEFT computed, and in and out of PEFT folders."""

import json
import pathlib
import shutil

import jax
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


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "W_pack"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"W_pack": 4}, "alpha_pattern": {}, "modules_to_save": []},
    ],
)
def test_the_tensors_say_what_is_adapted_as_in_peft(folder, changes):
    model = read_config(FIXTURES / "llama")[0]
    whole, lora = load_adapter(folder, model)
    changes = changes | (
        {"rank_pattern": {"W_pack": lora.rank}} if "rank_pattern" in changes else {}
    )
    edit(folder, **changes)
    again, same = load_adapter(folder, model)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert same == lora


def test_rslora_is_scaled_by_the_root_of_the_rank(folder):
    """PEFT: alpha / sqrt(r), where plain LoRA has alpha / r."""
    model = read_config(FIXTURES / "llama")[0]
    raw = json.loads((folder / "adapter_config.json").read_text())
    edit(folder, use_rslora=True)
    lora = load_adapter(folder, model)[1]
    assert lora.scale == pytest.approx(raw["lora_alpha"] / np.sqrt(raw["r"]))


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
    "rslora": (lambda f: edit(f, use_rslora="yes"), ["use_rslora 'yes'"]),
    "dora": (lambda f: edit(f, use_dora=True), ["use_dora=True"]),
    "alpha pattern": (lambda f: edit(f, alpha_pattern={"q_proj": 3}), ["alpha_pattern"]),
    "rank pattern": (lambda f: edit(f, rank_pattern={"q_proj": 3}), ["rank_pattern"]),
    "bias": (lambda f: edit(f, bias="all"), ["bias='all'"]),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), ["pissa", "base weights"]),
    "rank": (lambda f: edit(f, r=8), ["[2, 32]", "[8, 32]"]),
    "rank zero": (lambda f: edit(f, r=0), ["r 0", "from 1"]),
    "alpha of none": (lambda f: edit(f, lora_alpha=float("nan")), ["lora_alpha nan"]),
    "no number": (
        lambda f: retensor(f, lambda t: t.update({A: np.full_like(t[A], np.nan)})),
        [A, "NaN"],
    ),
    "other projection": (
        lambda f: retensor(f, lambda t: t.update({"x.lora_A.weight": t[A]})),
        ["x.lora_A.weight"],
    ),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop(A)), [A, "lacks"]),
    "wrong width": (
        lambda f: retensor(f, lambda t: t.update({A: np.ones((2, 5), np.float32)})),
        [A, "[2, 5]"],
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


@pytest.mark.parametrize("damage", DAMAGE)
def test_adapter_that_does_not_fit_is_refused_by_name(folder, damage):
    harm, words = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError) as caught:
        load_adapter(folder, read_config(FIXTURES / "llama")[0])
    assert all(word in str(caught.value) for word in words), str(caught.value)
