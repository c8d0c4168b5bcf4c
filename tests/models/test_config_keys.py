"""config.json key by key, against the config classes of transformers."""

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from spear_jax.core.errors import UserError
from spear_jax.models.config import FAMILIES, KEYS, parse_config, read_config
from spear_jax.models.io.huggingface import load_model, open_model, save_model

CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
# What transformers' classes hold besides: names, generation, training and output formats.
WITHOUT_EFFECT = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "_name_or_path", "output_attentions", "initializer_range", "use_cache", "bos_token_id",
    "pretraining_tp", "max_window_layers", "sliding_window",
}  # fmt: skip
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_in_the_table_or_without_effect(family):
    unknown = CLASSES[family]().to_dict().keys() - KEYS.keys() - WITHOUT_EFFECT
    assert not unknown, f"say in KEYS what becomes of {unknown}"


def theirs(family, raw):
    """What transformers makes of a config.json."""
    config = CLASSES[family].from_dict({**raw})
    rope = config.rope_parameters
    heads = config.num_attention_heads
    scaled = rope["rope_type"] == "llama3"
    return {
        "kv_heads": config.num_key_value_heads,
        "head_width": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "factor": rope["factor"] if scaled else None,
        "original": rope["original_max_position_embeddings"] if scaled else None,
        "tied": config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings,
        "bias": family == "qwen2" or config.attention_bias,
    }


def ours(family, raw):
    config = parse_config(raw)
    assert config.family == family
    scaling = config.rope_scaling
    return {
        "kv_heads": config.kv_heads,
        "head_width": config.head_width,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "factor": scaling.factor if scaling else None,
        "original": scaling.original_positions if scaling else None,
        "tied": config.tied,
        "max_positions": config.max_positions,
        "bias": config.qkv_bias,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": None},
        {"num_key_value_heads": "absent", "num_attention_heads": 32, "hidden_size": 64},
        {"head_dim": 16},
        {"rms_norm_eps": 1e-5},
        {"tie_word_embeddings": True},
        {"max_position_embeddings": 512},
        {"attention_bias": True},
        {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False},
        {"sliding_window": 16, "max_window_layers": 1},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        {"rope_scaling": LLAMA3, "max_position_embeddings": 128},
        {"rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_scaling": None, "rope_parameters": {**LLAMA3, "rope_theta": 7e3}},
        {
            "rope_scaling": {**LLAMA3, "factor": 2.0, "original_max_position_embeddings": 64},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ],
    ids=lambda changes: ",".join(changes) or "defaults",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_means_what_it_means_in_transformers(family, changes):
    raw = {"model_type": family, **SMALL, **changes}
    raw = {name: value for name, value in raw.items() if value != "absent"}
    assert ours(family, raw) == theirs(family, json.loads(json.dumps(raw)))


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "gptq"}),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("head_dim", 7),
        ("num_key_value_heads", 2.0),
        ("num_hidden_layers", True),
        ("vocab_size", "64"),
        ("rms_norm_eps", float("nan")),
        ("attention_bias", 1),
        ("tie_word_embeddings", None),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_computed_is_refused_by_name(family, name, value):
    with pytest.raises(UserError, match=name):
        parse_config({"model_type": family, **SMALL, name: value})


def test_another_original_length_beside_the_scaling_is_refused():
    raw = {"model_type": "llama", **SMALL, "rope_scaling": LLAMA3, "max_position_embeddings": 64}
    with pytest.raises(UserError, match="original_max_position_embeddings is 32; it must be 64"):
        parse_config({**raw, "original_max_position_embeddings": 32})


@pytest.fixture
def tied(tmp_path):
    """A tied model's folder, and the tensors of its file."""
    import shutil

    from small_cohort import FIXTURES

    folder = shutil.copytree(FIXTURES / "llama", tmp_path / "model")
    assert read_config(folder)[0].tied
    return folder, load_file(folder / "model.safetensors")


def test_a_head_of_its_own_is_used_though_the_config_says_tied(tied, tmp_path, capsys):
    folder, tensors = tied
    head = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    model = load_model(folder, "float32")
    assert "note: tie_word_embeddings is true" in capsys.readouterr().err
    np.testing.assert_array_equal(model.base.head, head)
    saved = save_model(tmp_path / "out", model.base, model.raw_config, model.tokenizer)
    assert read_config(saved)[0].tied is False
    np.testing.assert_array_equal(load_file(saved / "model.safetensors")["lm_head.weight"], head)


def test_a_copy_of_the_embedding_is_no_head_of_its_own(tied, capsys):
    folder, tensors = tied
    copy = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": copy}, folder / "model.safetensors")
    assert open_model(folder).config.tied and not capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(tied, dtype, bad):
    folder, tensors = tied
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][-1, -1] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}.*holds {bad}"):
        load_model(folder, dtype)
