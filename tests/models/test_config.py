"""config.json against transformers' own config classes, key by key, without torch."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from spear_jax.core.errors import UserError
from spear_jax.models.config import FAMILIES, KEYS, UNUSED, parse_config
from spear_jax.models.decoder import rope_frequencies
from spear_jax.models.io import tensor_map
from spear_jax.models.io.huggingface import load_model, open_model, save_model

ROOT = pathlib.Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
SIZES = {
    "vocab_size": 264, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 32,
    "intermediate_size": 48,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def raw(family, **changes):
    return {"model_type": family, **SIZES, **changes}


def edit(folder, name="config.json", **changes):
    held = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(held | changes))


def copy(tmp_path, family="llama"):
    return pathlib.Path(shutil.copytree(FIXTURES / family, tmp_path / family))


# What transformers makes of a config.json


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_in_a_row(family):
    theirs = CLASSES[family](**raw(family))
    names = {field.name for field in dataclasses.fields(theirs)} | set(theirs.to_dict())
    assert names - KEYS.keys() - UNUSED.keys() == set()


SPELLINGS = [
    {},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 4},
    {"num_attention_heads": 64},
    {"head_dim": 16},
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 77},
    {"tie_word_embeddings": True},
    {"hidden_act": "swish"},
    {"layer_types": ["full_attention"] * 4},
    {"sliding_window": None, "use_sliding_window": False},
    {"rope_theta": 5e5},
    {"rope_theta": 500000},
    {"rope_parameters": {"rope_theta": 7e3, "rope_type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_theta": 7e3}},
    {"rope_parameters": {}, "rope_scaling": None, "rope_theta": 5e5},
    {"rope_parameters": None},
    {"rope_parameters": {"rope_theta": 7e3}, "rope_scaling": {}},
    {"rope_parameters": {"rope_theta": 7e3}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {**LLAMA3, "rope_theta": 7e3}, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 7e3}, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 4}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 4096},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
]


@pytest.mark.parametrize("changes", SPELLINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_defaults_are_those_of_transformers(family, changes):
    ours = parse_config(raw(family, **changes))
    theirs = CLASSES[family](**json.loads(json.dumps(raw(family, **changes))))
    assert ours.heads == theirs.num_attention_heads
    assert ours.kv_heads == theirs.num_key_value_heads
    head_width = getattr(theirs, "head_dim", None)
    assert ours.head_width == (head_width or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    plain = rope_frequencies(dataclasses.replace(ours, rope_scaling=None))
    if rope["rope_type"] == "default":
        assert ours.rope_scaling is None
    elif rope["rope_type"] == "linear":
        np.testing.assert_allclose(rope_frequencies(ours), plain / rope["factor"], rtol=1e-6)
    else:
        assert dataclasses.astuple(ours.rope_scaling) == tuple(
            rope[name]
            for name in (
                "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
            )
        )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_attention_bias_is_read_where_transformers_reads_it(bias):
    # modeling_llama and modeling_qwen3 give all four projections the bias; modeling_qwen2 gives it
    # to q, k and v whatever the key says
    got = {family: parse_config(raw(family, attention_bias=bias)) for family in FAMILIES}
    assert {name: (c.qkv_bias, c.o_bias) for name, c in got.items()} == {
        "llama": (bias, bias), "qwen2": (True, False), "qwen3": (bias, bias),
    }  # fmt: skip


def test_keys_of_another_family_are_left_unread_as_in_transformers():
    assert parse_config(raw("qwen2", mlp_bias=True, sliding_window=4096, max_window_layers=2))
    assert parse_config(raw("llama", max_window_layers=2, num_labels=3))


REFUSED_BY_TRANSFORMERS = [
    {"hidden_size": "256"},
    {"hidden_size": 256.0},
    {"hidden_size": True},
    {"hidden_size": None},
    {"num_attention_heads": [32]},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": True},
    {"rms_norm_eps": None},
    {"tie_word_embeddings": 1},
    {"tie_word_embeddings": None},
    {"max_position_embeddings": 2048.0},
    {"hidden_act": None},
    {"rope_parameters": "linear"},
    {"rope_parameters": [1]},
    {"rope_parameters": {"rope_type": "linear"}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": None}},
    {"head_dim": 7},
    {"layer_types": ["no_such_attention"] * 4},
]


@pytest.mark.parametrize("changes", REFUSED_BY_TRANSFORMERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_refuses_is_refused_with_the_key(family, changes):
    with pytest.raises(UserError) as caught:
        parse_config(raw(family, **changes))
    assert next(iter(changes)) in str(caught.value)
    if family == "qwen3":  # the class that reads all of these keys
        with pytest.raises(Exception):  # noqa: B017 (its errors have no common type)
            CLASSES[family](**raw(family, **changes))


SENSELESS = [
    {"num_key_value_heads": 0},
    {"num_key_value_heads": 3},
    {"num_attention_heads": -2},
    {"max_position_embeddings": 10**9},
    {"rms_norm_eps": -1.0},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": 10**400},
    {"rope_theta": 0},
    {"rope_theta": "1e4"},
    {"rope_theta": True},
    {"rope_theta": None},
    {"rope_parameters": {"rope_theta": None}},
    {"rope_parameters": {"rope_theta": float("inf")}},
    {"rope_parameters": {"rope_type": None}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
    {"rope_parameters": {**LLAMA3, "factor": None}},
    {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
    {"rope_scaling": {"type": "linear", "factor": 0.0}},
    {"original_max_position_embeddings": 99, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 5}},
    {"layer_types": ["full_attention", "sliding_attention"] * 2},
    {"layer_types": "full_attention"},
    {"quantization_config": {}},
    {"attention_dropout": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("changes", SENSELESS, ids=lambda changes: str(changes)[:60])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_makes_no_sense_is_refused_in_a_short_message(family, changes):
    with pytest.raises(UserError) as caught:
        parse_config(raw(family, **changes))
    assert next(iter(changes)) in str(caught.value) and len(str(caught.value)) < 400


# The table of the guide

OTHER = {
    "mlp_bias": True,
    "hidden_act": "gelu",
    "attention_dropout": 0.1,
    "use_sliding_window": True,
    "sliding_window": 4096,
    "layer_types": ["sliding_attention"] * 4,
    "attention_chunk_size": 64,
    "kv_sharing_modes": ["reuse"],
    "per_layer_config": {"0": {"head_dim": 8}},
    "quantization_config": {"quant_method": "gptq"},
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
    "partial_rotary_factor": 0.5,
}


def row(name):
    """A key's line in docs/guides/real-models.md; the message is the one that its refusal gives."""
    key = KEYS[name]
    built = "built: " + ", ".join(f"`{json.dumps(one)}`" for one in key.built)
    cells = [
        "not read" if family not in key.families else built if key.built else "computed"
        for family in FAMILIES
    ]
    message = ""
    if key.built:
        with pytest.raises(UserError) as caught:
            parse_config(raw(key.families[0], **{name: OTHER[name]}))
        message = str(caught.value).replace(key.families[0] + ";", "FAMILY;")
    return f"| `{name}` | {' | '.join(cells)} | {message} |"


@pytest.mark.parametrize("name", KEYS)
def test_the_guide_has_the_row_of_every_key(name):
    lines = (ROOT / "docs/guides/real-models.md").read_text().splitlines()
    assert row(name) in lines, f"the guide's line should be\n{row(name)}"


# A head beside a tied embedding


def tied(tmp_path, family, change):
    """A tied folder of random numbers, whose file has the head that `change` makes of the
    embedding.
    """
    folder = copy(tmp_path, family)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    edit(folder, tie_word_embeddings=True)
    return folder, tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_unlike_the_embedding_is_used_and_exported(family, tmp_path, capsys):
    folder, tensors = tied(tmp_path, family, lambda embed: embed[::-1] + np.float32(1))
    model = load_model(folder, "float32")
    np.testing.assert_array_equal(model.base.head, tensors["lm_head.weight"])
    assert capsys.readouterr().err.count("\n") == 1
    out = save_model(tmp_path / "out", model.base, model.raw_config, model.tokenizer)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    jax.tree.map(np.testing.assert_array_equal, load_model(out, "float32").base, model.base)
    assert capsys.readouterr().err == ""


def test_one_number_of_a_head_makes_it_unlike_in_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("spear_jax.models.io.safetensors._PIECE", 1000)  # 31 of the 264 rows

    def change(embed, at):
        head = embed.copy()
        head[at, 3] += 1
        return head

    for at in (0, 31, 263):
        folder, _ = tied(tmp_path / str(at), "llama", lambda embed, at=at: change(embed, at))
        assert not open_model(folder).config.tied


def test_a_copy_of_the_embedding_is_left_unread_without_a_word(tmp_path, capsys):
    folder, _ = tied(tmp_path, "llama", np.copy)
    model = load_model(folder, "float32")
    assert model.base.head is None and model.config.tied and capsys.readouterr().err == ""


def test_a_head_of_another_shape_is_refused(tmp_path):
    folder, _ = tied(tmp_path, "llama", lambda embed: embed[:9])
    with pytest.raises(UserError, match=r"lm_head.weight.*\[9, 32\].*vocab_size"):
        open_model(folder)


# Files


@pytest.mark.parametrize(
    "content",
    [
        b"[]", b"null", b"5", b'"x"', b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 1}',
        b'{"a": NaN}', b'{"a": {"b": -Infinity}}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: str(content[:16]),
)  # fmt: skip
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_a_file_that_is_no_json_object_is_named(name, content, tmp_path):
    folder = copy(tmp_path)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_model(folder)
    assert name in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-1, True, "0", [], [0, -1], [[0]], {"a": 1}, 1.0, 264, 2**70])
def test_an_eos_that_is_no_id_is_refused(name, value, tmp_path):
    folder = copy(tmp_path)
    edit(folder, name, eos_token_id=value)
    with pytest.raises(UserError, match=rf"^{name}.*eos_token_id"):
        open_model(folder)


@pytest.mark.parametrize("value", ["x", True, 1.5, [1]])
def test_a_pad_that_is_no_id_is_refused(value, tmp_path):
    folder = copy(tmp_path)
    edit(folder, pad_token_id=value)
    with pytest.raises(UserError, match="pad_token_id"):
        open_model(folder)


@pytest.mark.parametrize(
    "value", [5, "x", [], {}, {"a": 5}, {"a": None}, {"a": "gone"}, {"a": "x" * 5000}]
)
def test_an_index_that_names_no_files_is_refused(value, tmp_path):
    folder = copy(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(UserError, match=r"weight_map|tensor 'a'|missing") as caught:
        open_model(folder)
    assert len(str(caught.value)) < 600


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = copy(tmp_path)
    tensors, name = load_file(folder / "model.safetensors"), "model.norm.weight"
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({name: tensors[name] + 1}, folder / "b.safetensors")
    index = dict.fromkeys(tensors, "a.safetensors") | {name: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=rf"{name}.*b\.safetensors"):
        open_model(folder)


@pytest.mark.parametrize("layers", [4, 10**9, 10**30])
def test_more_layers_than_a_file_has_are_refused_before_they_are_listed(layers, tmp_path):
    folder = copy(tmp_path)
    edit(folder, num_hidden_layers=layers)
    with pytest.raises(UserError, match=rf"3 layers.*{layers}.*num_hidden_layers"):
        open_model(folder)


@pytest.mark.parametrize("word", ["a tokenizer that panics", "a tokenizer that raises"])
def test_a_tokenizer_that_cannot_be_read_is_named(word, tmp_path, monkeypatch):
    kind = BaseException if "panics" in word else Exception

    def fail(*args, **kwargs):
        raise kind(word + "!" * 5000)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match=rf"tokenizer.*{word}") as caught:
        open_model(FIXTURES / "llama")
    assert len(str(caught.value)) < 600


# Numbers that are none


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers_are_refused_by_name(bad, stored, tmp_path):
    folder, name = copy(tmp_path), "model.layers.1.mlp.down_proj.weight"
    tensors = {
        key: held.astype(stored) for key, held in load_file(folder / "model.safetensors").items()
    }
    tensors[name][3, 4] = bad
    save_file(tensors, folder / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match=rf"{name}.*NaN or infinity"):
            load_model(folder, dtype)


def test_a_number_too_large_for_the_dtype_is_refused_in_that_dtype(tmp_path):
    folder, name = copy(tmp_path), "model.norm.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0] = np.finfo(np.float32).max
    save_file(tensors, folder / "model.safetensors")
    assert load_model(folder, "float32")
    with pytest.raises(UserError, match=rf"{name}.*bfloat16"):
        load_model(folder, "bfloat16")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_check_of_bits_is_numpys(dtype):
    """Over every bfloat16, and as many float32."""
    every = np.arange(1 << 16, dtype=np.uint32)
    wide = (every << 16).view(np.float32)
    array = wide if dtype is np.float32 else every.astype(np.uint16).view(dtype)
    got = [tensor_map._finite(array[at : at + 1]) for at in range(0, array.size, 7)]
    np.testing.assert_array_equal(got, np.isfinite(wide[::7]))
