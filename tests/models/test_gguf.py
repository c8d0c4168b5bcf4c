"""GGUF files written by the gguf package from the Hugging Face fixtures, and the tokenizer in their
metadata.
"""

import gguf
import jax
import numpy as np
import pytest
from gguf_files import CHAT, FIXTURES, Q, write_gguf
from safetensors.numpy import load_file

from spear_jax.core.errors import UserError
from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.io.gguf import FIXED, GgufTensors
from spear_jax.models.io.huggingface import load_model, open_model, save_model
from spear_jax.models.io.tensor_map import places
from spear_jax.models.lora import LoraConfig

NO_LORA = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=("q",))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_unquantised_gguf_gives_the_folders_tree_and_config(family, tmp_path):
    want = load_model(FIXTURES / family, "float32")
    got = load_model(write_gguf(tmp_path / "m.gguf", family), "float32")
    assert got.config == want.config
    assert (got.eos_ids[0], got.pad_id) == (want.eos_ids[0], want.pad_id)
    assert set(want.eos_ids) <= set(got.eos_ids)
    jax.tree.map(np.testing.assert_array_equal, got.base, want.base)


def test_biased_llama_rows_are_put_back_with_their_biases(tmp_path):
    want = load_model(FIXTURES / "llama3", "float32")
    got = load_model(write_gguf(tmp_path / "m.gguf", "llama3"), "float32")
    jax.tree.map(np.testing.assert_array_equal, got.base, want.base)


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_quantised_gguf_holds_the_decoded_values(kind, tmp_path):
    want = load_file(FIXTURES / "qwen2" / "model.safetensors")
    got = load_model(write_gguf(tmp_path / "m.gguf", "qwen2", kind), "float32")
    for place in places(got.config):
        leaf = place.leaf(got.base)
        for i, name in enumerate(place.tensors):
            tensor = want[name]
            if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
                tensor = gguf.quants.dequantize(gguf.quants.quantize(tensor, kind), kind)
            row = leaf[i] if place.of_layer else leaf
            np.testing.assert_array_equal(row, tensor.T if place.transposed else tensor)


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_k_quant_blocks_are_decoded(kind, tmp_path):
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    # Small exponents in every 16-bit scale, whichever bytes hold it: no infinities among random
    # blocks.
    blocks = np.random.default_rng(0).integers(0, 0x3C, (4, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen2")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = load_model(FIXTURES / "qwen2", "float32").config
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "k.gguf").tensors}
    source = GgufTensors(tmp_path / "k.gguf", config, tensors)
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.shapes() == {name: (4, 2 * elements)}
    got = source.read(name)
    assert np.isfinite(got).all() and got.std() > 0
    np.testing.assert_array_equal(got, gguf.quants.dequantize(blocks, kind))


def test_llama3_table_becomes_the_scaling_that_made_it(tmp_path):
    def add_table(tensors):
        # Llama 3.1: wavelengths below 8192/4 stay, above 8192/1 slow eightfold, in between a blend.
        wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, 8, 2) / 8)
        smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
        return tensors | {"rope_freqs.weight": (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)}

    got = load_model(
        write_gguf(tmp_path / "m.gguf", "llama", change=add_table, llama__rope__freq_base=500000.0),
        "float32",
    )
    scaling = got.config.rope_scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (8.0, 1.0, 4.0)
    assert scaling.original_positions == 8192
    odd = write_gguf(
        tmp_path / "odd.gguf",
        "llama",
        change=lambda t: t | {"rope_freqs.weight": np.float32([1, 2, 3, 9])},
    )
    with pytest.raises(UserError, match="rope_freqs"):
        load_model(odd, "float32")


def test_gguf_model_leaves_as_a_hugging_face_folder(tmp_path):
    got = load_model(write_gguf(tmp_path / "m.gguf", "llama", Q.Q8_0), "float32")
    save_model(tmp_path / "hf", got.base, got.raw_config, got.tokenizer, got.generation_config)
    again = load_model(tmp_path / "hf", "float32")
    assert again.config == got.config
    jax.tree.map(np.testing.assert_array_equal, again.base, got.base)
    text = "<|user|>a 12é\n\nab"
    assert again.tokenizer(text)["input_ids"] == got.tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == CHAT
    want = np.load(FIXTURES / "llama/expected.npz")
    mask = want["left_mask"]
    out = logits(Decoder(again.config, NO_LORA), None, again.base, want["left_tokens"], mask)
    # 8-bit weights: about 1 % of the logits' spread away from the exact model.
    assert (
        np.abs(out[mask] - want["left_logits"][mask]).mean()
        < 0.05 * want["left_logits"][mask].std()
    )


PIECES = {  # how each pre-tokenizer cuts, by its model's published rule
    "gpt-2": ["Don", "'t", "Ġmix", "Ġ12345", "Ċ", "Ċ", "ok"],
    "smollm": ["Don", "'t", "Ġmix", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ċ", "ok"],
    "llama-bpe": ["Don", "'t", "Ġmix", "Ġ", "123", "45", "ĊĊ", "ok"],
    "qwen2": ["Don", "'t", "Ġmix", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "ok"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_each_pre_tokenizer_cuts_text_its_own_way(pre, tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        tokenizer__ggml__pre=pre,
        tokenizer__ggml__bos_token_id=np.uint32(2),
    )
    tokenizer = load_model(path, "float32").tokenizer.backend_tokenizer
    pieces = [
        piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("Don't mix 12345\n\nok")
    ]
    assert pieces == PIECES[pre]


def test_gguf_tokenizer_merges_keeps_special_tokens_whole_and_comes_back_to_text(tmp_path):
    tokenizer = load_model(write_gguf(tmp_path / "m.gguf", "llama"), "float32").tokenizer
    ids = tokenizer("ab<|end|>é")["input_ids"]
    assert ids[:2] == [263, 0]  # "ab" is the last row; <|end|> the first
    assert tokenizer.decode(ids) == "ab<|end|>é"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abé"
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        == "<|user|>x"
    )


def opened(tmp_path, **meta):
    meta = {f"tokenizer__ggml__{name}": value for name, value in meta.items()}
    return open_model(write_gguf(tmp_path / "m.gguf", "llama", **meta))


@pytest.mark.parametrize(
    "pre, stated, added",
    [
        ("llama-bpe", None, True),
        ("llama3", None, True),
        ("llama-v3", True, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("qwen2", None, False),
        ("smollm", True, True),
    ],
)
def test_bos_stands_before_a_text_where_llama_cpp_puts_it(tmp_path, pre, stated, added):
    """llama-vocab.cpp: add_bos is on for the Llama-3-like pre-tokenizers unless the key is there."""
    model = opened(tmp_path, pre=pre, bos_token_id=np.uint32(2), add_bos_token=stated)
    assert (model.tokenizer("ab")["input_ids"][0] == 2) == added


def test_a_default_bos_without_a_token_is_refused(tmp_path):
    with pytest.raises(UserError, match="'llama-bpe'.*no tokenizer.ggml.bos_token_id"):
        opened(tmp_path, pre="llama-bpe")


def test_generation_ends_at_eos_eot_and_eom(tmp_path):
    model = opened(tmp_path, eot_token_id=np.uint32(250), eom_token_id=np.uint32(251))
    assert model.eos_ids == (0, 250, 251)
    assert model.generation_config["eos_token_id"] == [0, 250, 251]


def test_generation_ends_at_tokens_that_llama_cpp_knows_by_their_text(tmp_path):
    tokens = [model_token(i) for i in range(264)]
    tokens[5] = "<|eot_id|>"
    assert opened(tmp_path, tokens=tokens).eos_ids == (0, 5)


def model_token(index):
    return "ab" if index == 263 else {0: "<|end|>", 100: "a", 101: "b"}.get(index, f"t{index}")


@pytest.mark.parametrize("template, closes", [("{{ x }}t7", 7), ("{{ x }}", 0)])
def test_a_completion_ends_as_the_template_ends_a_turn(tmp_path, template, closes):
    tokens = [model_token(i) for i in range(264)]
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__eot_token_id=np.uint32(7),
        tokenizer__chat_template=template,
    )
    assert open_model(path).tokenizer.eos_token_id == closes


@pytest.mark.parametrize("name", FIXED)
def test_a_key_that_changes_numbers_is_refused_by_name(tmp_path, name):
    value = {"rope.scaling.type": "yarn", "attention.causal": False}.get(name, 4.0)
    path = write_gguf(tmp_path / "m.gguf", "llama", **{f"llama.{name}": value})
    with pytest.raises(UserError, match=f"'llama.{name}' is"):
        open_model(path)


def test_a_factor_counts_only_where_its_type_is_not_none(tmp_path):
    """llama.cpp scales linearly by a factor that has no type."""
    factor = {"llama.rope.scaling.factor": 2.0}
    path = write_gguf(tmp_path / "a.gguf", "llama", **factor, **{"llama.rope.scaling.type": "none"})
    assert open_model(path).config.rope_scaling is None
    with pytest.raises(UserError, match="'llama.rope.scaling.factor' is 2.0; only 0 or 1 is"):
        open_model(write_gguf(tmp_path / "b.gguf", "llama", **factor))


def test_numbers_that_are_none_in_a_tensor_are_refused_by_name(tmp_path):
    def spoil(tensors):
        tensors["blk.1.ffn_up.weight"][0, 0] = np.inf
        return tensors

    path = write_gguf(tmp_path / "m.gguf", "llama", change=spoil)
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight.*holds inf"):
        load_model(path, "float32")


def test_gguf_that_asks_for_bos_gets_it(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        tokenizer__ggml__add_bos_token=True,
        tokenizer__ggml__bos_token_id=np.uint32(2),
    )
    assert load_model(path, "float32").tokenizer("ab")["input_ids"] == [2, 263]


REFUSED = {
    "architecture": ({"architecture": "gemma"}, ["'gemma'", "llama"]),
    "sentencepiece": ({"tokenizer__ggml__model": "llama"}, ["tokenizer 'llama'", "byte-level BPE"]),
    "pre-tokenizer": ({"tokenizer__ggml__pre": "qwen3"}, ["'qwen3'", "qwen2"]),
    "no tokens": ({"tokenizer__ggml__tokens": None}, ["tokenizer.ggml.tokens"]),
    "foreign merges": ({"tokenizer__ggml__merges": ["zz yy"]}, ["merges"]),
    "EOS out of range": ({"tokenizer__ggml__eos_token_id": np.uint32(999)}, ["eos_token_id 999"]),
    "no EOS": ({"tokenizer__ggml__eos_token_id": None}, ["no EOS"]),
    "no metadata": ({"llama__block_count": None}, ["llama.block_count"]),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, ["'yarn'"]),
    "partial rope": (
        {"llama__rope__dimension_count": np.uint32(4)},
        ["rope.dimension_count is 4", "8 dimensions"],
    ),
    "missing tensor": (
        {"change": lambda t: {k: v for k, v in t.items() if k != "output_norm.weight"}},
        ["model.norm"],
    ),
    "extra tensor": (
        {"change": lambda t: t | {"blk.0.odd.weight": np.ones((2, 32), np.float32)}},
        ["blk.0.odd"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_gguf_is_refused_by_name(case, tmp_path):
    settings, words = REFUSED[case]
    path = write_gguf(tmp_path / "m.gguf", "llama", **settings)
    with pytest.raises(UserError) as caught:
        load_model(path, "float32")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_gguf_is_refused_by_name(keep, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=r"m\.gguf.*(truncated|no GGUF)"):
        load_model(path, "float32")
