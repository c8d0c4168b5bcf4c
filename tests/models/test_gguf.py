"""GGUF files written by the gguf package from the Hugging Face fixtures, and the tokenizer in their
metadata.
"""

import struct

import gguf
import jax
import numpy as np
import pytest
from gguf_files import CHAT, FIXTURES, Q, write_gguf
from safetensors.numpy import load_file

from spear_jax.core.errors import UserError
from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.io.gguf import GgufTensors, load_gguf
from spear_jax.models.io.gguf_tokenizer import build_tokenizer, read_vocabulary, special_ids
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


BOS = {"tokenizer__ggml__bos_token_id": np.uint32(2)}
PIECES = {  # how each pre-tokenizer cuts, by its model's published rule
    "gpt-2": ["Don", "'t", "Ġmix", "Ġ12345", "Ċ", "Ċ", "ok"],
    "smollm": ["Don", "'t", "Ġmix", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ċ", "ok"],
    "llama-bpe": ["Don", "'t", "Ġmix", "Ġ", "123", "45", "ĊĊ", "ok"],
    "qwen2": ["Don", "'t", "Ġmix", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "ok"],
    "default": ["Don", "'", "t", "Ġmix", "Ġ", "123", "45", "Ċ", "Ċ", "ok"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_each_pre_tokenizer_cuts_text_its_own_way(pre, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", tokenizer__ggml__pre=pre, **BOS)
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


@pytest.mark.parametrize(
    "pre, asked, put",  # llama.cpp: src/llama-vocab.cpp, load
    [
        ("llama-bpe", None, True),
        ("llama3", None, True),
        ("llama-v3", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("qwen2", None, False),
        ("smollm", None, False),
        (None, None, False),
        ("gpt-2", True, True),
    ],
)
def test_bos_is_put_first_as_llama_cpp_puts_it(pre, asked, put):
    keys = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.add_bos_token": asked,
        "tokenizer.ggml.bos_token_id": 0,
    }
    assert tokens_of("ab", keys) == (["<s>"] if put else []) + ["a", "b"]


class Keys(dict):
    """GGUF metadata in memory."""

    def get(self, key, kind):
        return super().get(key)

    def wrong(self, key, rule):
        return UserError(f"{key} is {self.get(key, None)}; {rule}")


def vocabulary(keys, more=()):
    tokens = ["<s>", "</s>", "a", "b", *more]
    meta = Keys({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens})
    meta |= {"tokenizer.ggml.merges": [], "tokenizer.ggml.eos_token_id": 1, **keys}
    return meta, read_vocabulary(meta, "m.gguf")


def tokens_of(text, keys):
    meta, words = vocabulary(keys)
    tokenizer = build_tokenizer(words, meta, "m.gguf", 64)
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "odd")


@pytest.mark.parametrize(
    "keys, want",
    [
        ({}, [1, 4, 6, 5]),  # by their texts alone
        ({"eot_token_id": 7}, [1, 7, 4, 6, 5]),
        ({"eom_token_id": 7, "eot_token_id": 4}, [1, 4, 7, 6, 5]),
        ({"fim_pad_token_id": 7}, [1, 7, 4, 6, 5]),
    ],
)
def test_eot_and_eom_end_a_generation_with_or_without_a_key(keys, want):
    _, words = vocabulary({f"tokenizer.ggml.{key}": index for key, index in keys.items()}, ENDS)
    assert list(words.ends) == want
    assert special_ids(words)["eos_token_id"] == want


@pytest.mark.parametrize(
    "template, closing",
    [
        ("{{ m.content }}<|eot_id|>", "<|eot_id|>"),
        ("{{ m.content }}<|im_end|>", "<|im_end|>"),
        ("{{ m.content }}</s>", "</s>"),
        ("{{ m.content }}{{ eos_token }}{# <|eot_id|> #}", "</s>"),
        ("{{ m.content }}", "</s>"),
        (None, "</s>"),
    ],
)
def test_a_reply_closes_with_what_the_template_writes(template, closing):
    meta, words = vocabulary({"tokenizer.chat_template": template}, ENDS)
    assert words.tokens[words.ends[0]] == closing
    assert build_tokenizer(words, meta, "m.gguf", 64).eos_token == closing


def test_end_marks_are_whole_tokens_whatever_their_type():
    meta, words = vocabulary({"tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1]}, ENDS)
    tokenizer = build_tokenizer(words, meta, "m.gguf", 64)
    assert tokenizer("a<|im_end|>b")["input_ids"] == [2, 6, 3]


NEUTRAL = [  # what llama.cpp leaves the numbers alone with
    {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 8.0},
    {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0},
    {"llama__rope__scaling__factor": 0.0, "llama__rope__scale_linear": 4.0},
    {"llama__rope__scaling__original_context_length": np.uint32(8)},
    {"llama__rope__scaling__finetuned": True, "llama__rope__scaling__attn_factor": 1.0},
    {"llama__rope__freq_base": None},
    {"llama__expert_count": np.uint32(0), "llama__expert_used_count": np.uint32(0)},
    {"llama__attention__layer_norm_epsilon": 0.5, "llama__attention__causal": True},
    {"llama__attention__head_count": [4] * 3, "llama__feed_forward_length": [48] * 3},
    {"llama__attention__sliding_window": np.uint32(0), "llama__use_parallel_residual": False},
    {"split__count": np.uint32(1), "general__type": "model", "llama__another": 3.0},
]


@pytest.mark.parametrize("keys", NEUTRAL, ids=lambda keys: " ".join(keys))
def test_keys_that_change_nothing_are_accepted(keys, tmp_path):
    plain = open_model(write_gguf(tmp_path / "plain.gguf", "llama"))
    shape = plain.config
    if "llama__attention__head_count" in keys:
        keys = {
            "llama__attention__head_count": [shape.heads] * shape.layers,
            "llama__feed_forward_length": [shape.mlp_width] * shape.layers,
        }
    assert open_model(write_gguf(tmp_path / "m.gguf", "llama", **keys)).config == shape


# key -> a value that changes numbers, or is none
CHANGING = {
    "llama.rope.scaling.type": ["linear-ish", "longrope", "yarn", 3.0],
    "llama.rope.scaling.factor": [4.0, float("nan"), "4"],
    "llama.rope.scale_linear": [2.0, np.uint32(2)],
    "llama.rope.scaling.attn_factor": [0.5],
    "llama.rope.scaling.alpha": [1000.0],
    "llama.rope.scaling.yarn_ext_factor": [1.0],
    "llama.rope.scaling.of_tomorrow": [1.0],
    "llama.rope.dimension_sections": [[2, 2, 4, 0]],
    "llama.rope.freq_base": [0.0, -1.0, float("inf"), "x", np.uint32(10000)],
    "llama.rope.dimension_count": [np.uint32(4), np.uint32(0), "8"],
    "llama.attention.value_length": [np.uint32(16)],
    "llama.attention.key_length": [np.uint32(0), np.uint32(7), 8.0],
    "llama.attention.sliding_window": [np.uint32(16)],
    "llama.attention.scale": [0.3],
    "llama.attention.clamp_kqv": [8.0],
    "llama.attention.max_alibi_bias": [8.0],
    "llama.attention.causal": [False],
    "llama.attention.layer_norm_rms_epsilon": [None, "x", -1.0, float("nan"), float("inf")],
    "llama.attention.head_count": [[4, 4, 2], [4, 4], "x", np.uint32(0), True],
    "llama.feed_forward_length": [[48, 48, 32], np.uint32(0)],
    "llama.block_count": [np.uint32(10**9), np.uint32(0), "x", 3.0],
    "llama.embedding_length": [np.uint32(0)],
    "llama.expert_count": [np.uint32(8)],
    "llama.logit_scale": [0.5],
    "llama.final_logit_softcapping": [30.0],
    "llama.use_parallel_residual": [True],
    "llama.residual_scale": [0.5],
    "split.count": [np.uint32(3)],
    "general.type": ["adapter"],
    "tokenizer.ggml.add_bos_token": ["yes"],
    "tokenizer.ggml.add_eos_token": [True],
    "tokenizer.ggml.add_space_prefix": [True],
    "tokenizer.ggml.eot_token_id": [np.uint32(999), np.uint32(2**32 - 1), "x"],
    "tokenizer.ggml.bos_token_id": [np.uint32(999)],
    "tokenizer.ggml.token_type": [[1, 1], ["x"], "x"],
    "tokenizer.ggml.tokens": [["a"], [5], "x"],
    "tokenizer.ggml.merges": ["x", [5]],
    "tokenizer.chat_template": [5.0],
}


@pytest.mark.parametrize("key", CHANGING)
def test_keys_that_change_numbers_or_are_none_are_refused_by_name(key, tmp_path):
    for value in CHANGING[key]:
        path = write_gguf(tmp_path / "m.gguf", "llama", **{key.replace(".", "__"): value})
        with pytest.raises(UserError) as caught:
            open_model(path)
        assert key in str(caught.value), str(caught.value)
        assert len(str(caught.value)) < 500, str(caught.value)


def test_bos_that_is_asked_for_but_not_named_is_refused():
    with pytest.raises(UserError, match="bos_token_id"):
        tokens_of("a", {"tokenizer.ggml.pre": "llama-bpe"})


def test_a_token_that_stands_twice_is_refused_and_empty_ones_are_told_apart():
    with pytest.raises(UserError, match="'a' twice"):
        vocabulary({}, ["a"])
    assert len(vocabulary({}, ["", ""])[1].tokens) == 6


def test_rope_table_of_another_family_or_without_factors_is_refused(tmp_path):
    table = {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "qwen2", change=lambda t: t | table)
    with pytest.raises(UserError, match=r"'qwen2' and holds 'rope_freqs.weight'"):
        open_model(path)
    table["rope_freqs.weight"][1] = np.nan
    path = write_gguf(tmp_path / "m.gguf", "llama", change=lambda t: t | table)
    with pytest.raises(UserError, match="rope_freqs"):
        open_model(path)


def header(*pairs, tensors=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(pairs)) + b"".join(pairs)


def pair(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


LARGE = struct.pack("<IQ", 0, 1 << 60)  # an array of 2^60 bytes that are not there
HEADERS = {
    "array of 2^60": header(pair(b"x", 9, LARGE)),
    "arrays in arrays": header(pair(b"x", 9, struct.pack("<IQ", 9, 1) * 100_000)),
    "text of 2^60": header(pair(b"x", 8, struct.pack("<Q", 1 << 60))),
    "2^60 pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "2^60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
    "unknown type": header(pair(b"x", 77, b"abcd")),
    "unknown version": header(version=9),
    "key is no text": header(pair(b"\xff", 4, b"abcd")),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_that_asks_for_more_than_the_file_is_refused(case, tmp_path):
    (tmp_path / "m.gguf").write_bytes(HEADERS[case])
    with pytest.raises(UserError, match=r"m\.gguf.*(truncated|no GGUF)"):
        load_gguf(tmp_path / "m.gguf")


def test_value_that_is_no_utf8_is_refused_by_its_key(tmp_path):
    raw = write_gguf(tmp_path / "m.gguf", "llama").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(CHAT.encode(), b"\xff" * len(CHAT)))
    with pytest.raises(UserError, match=r"tokenizer\.chat_template is not UTF-8"):
        open_model(tmp_path / "m.gguf")


def test_file_of_the_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="big-endian"):
        load_gguf(tmp_path / "m.gguf")


REFUSED = {
    "architecture": ({"architecture": "gemma"}, ["'gemma'", "llama"]),
    "sentencepiece": ({"tokenizer__ggml__model": "llama"}, ["tokenizer 'llama'", "byte-level BPE"]),
    "pre-tokenizer": ({"tokenizer__ggml__pre": "qwen3"}, ["'qwen3'", "qwen2"]),
    "no tokens": ({"tokenizer__ggml__tokens": None}, ["tokenizer.ggml.tokens"]),
    "foreign merges": ({"tokenizer__ggml__merges": ["zz yy"]}, ["merges"]),
    "EOS out of range": ({"tokenizer__ggml__eos_token_id": np.uint32(999)}, ["eos id 999"]),
    "no EOS": ({"tokenizer__ggml__eos_token_id": None}, ["no EOS"]),
    "no metadata": ({"llama__block_count": None}, ["llama.block_count"]),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, ["'yarn'"]),
    "partial rope": ({"llama__rope__dimension_count": np.uint32(4)}, ["4 of 8"]),
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
