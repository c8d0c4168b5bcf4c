"""Models against what Hugging Face computed for the same folders (tests/make_fixtures.py), and in
and out of them.
"""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spear_jax.core.errors import UserError
from spear_jax.models.attention import attend, check_kernel, library, seen_in_tree
from spear_jax.models.config import parse_config
from spear_jax.models.decoder import (
    Decoder,
    decode_step,
    logits,
    packed_states,
    unstack,
)
from spear_jax.models.io.huggingface import end_ids, load_model, save_model
from spear_jax.models.io.tensor_map import build_params
from spear_jax.models.lm_head import head_logits, head_weight
from spear_jax.models.lora import LoraConfig, init_lora
from spear_jax.packing.arrays import spans
from spear_jax.packing.prefix_tree import pack_prompts, prompt_shape
from spear_jax.rollout import decode

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FAMILIES = ("llama", "llama3", "qwen2", "qwen3")
NO_LORA = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=("q",))


@pytest.fixture
def folder(tmp_path):
    """A copy of the llama fixture to damage."""
    return pathlib.Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))


def edit(folder, name="config.json", **changes):
    raw = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(raw))


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {
        name: f"model-0000{i % 3 + 1}-of-00003.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(index.values()):
        save_file({name: tensors[name] for name in index if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_hugging_face_under_either_padding(family, side):
    model, want = (
        load_model(FIXTURES / family, "float32"),
        np.load(FIXTURES / family / "expected.npz"),
    )
    tokens, mask = want[f"{side}_tokens"], want[f"{side}_mask"]
    got = logits(Decoder(model.config, NO_LORA), None, model.base, tokens, mask)
    np.testing.assert_allclose(got[mask], want[f"{side}_logits"][mask], atol=1e-4)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_steps_equal_the_full_forward(family):
    model, want = (
        load_model(FIXTURES / family, "float32"),
        np.load(FIXTURES / family / "expected.npz"),
    )
    tokens, mask, decoder = want["left_tokens"], want["left_mask"], Decoder(model.config, NO_LORA)
    rows = mask[:, 4]  # real tokens before position 5, so that a prompt of 5 is not empty
    tokens, mask, full = tokens[rows], mask[rows], want["left_logits"][rows]
    base, shape = unstack(model.base), tokens.shape[1] - 5
    prompts = [[row[5 - n : 5].tolist() for row, n in zip(tokens, mask[:, :5].sum(1), strict=True)]]
    pack, index, _ = pack_prompts(prompts, len(tokens), 5, prompt_shape(prompts, 5))
    pack = jax.tree.map(lambda x: x[0], pack)
    hidden, cache = packed_states(decoder, None, base, pack)
    padded = lambda x: jnp.pad(decode._to_cache(x, index[0]), ((0, 0), (0, 0), (0, shape), (0, 0)))
    hidden, cache = hidden[index[0, :, -1]], jax.tree.map(padded, cache)
    for step in range(5, tokens.shape[1] + 1):
        got = head_logits(hidden, head_weight(base))
        np.testing.assert_allclose(got, full[:, step - 1], atol=1e-4)
        if step < tokens.shape[1]:
            seen = jnp.asarray(mask & (np.arange(mask.shape[1]) <= step))
            hidden, cache = decode_step(
                decoder, None, base, tokens[:, step], cache, seen, jnp.int32(step)
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_after_layer_equals_the_scan(family):
    model, want = (
        load_model(FIXTURES / family, "float32"),
        np.load(FIXTURES / family / "expected.npz"),
    )
    lora = LoraConfig(rank=2, alpha=2.0, dropout=0.0, targets=("q", "down"), last_layers=1)
    tree = jax.tree.map(lambda x: x + 0.1, init_lora(jax.random.key(0), lora, model.config))
    inputs = want["left_tokens"], want["left_mask"]
    scanned, looped = (
        logits(Decoder(model.config, lora), tree, base, *inputs)
        for base in (model.base, unstack(model.base))
    )
    np.testing.assert_allclose(looped[inputs[1]], scanned[inputs[1]], atol=1e-5)


# a column of queries, and three from ever fewer rows; keys of an opening before them; JAX's own
# attention
@pytest.mark.parametrize("attention", [attend, functools.partial(library, implementation="xla")])
@pytest.mark.parametrize("shared_prefix", [0, 7])
@pytest.mark.parametrize("tiles", [((3, 20),), ((3, 20), (2, 16), (1, 30))])
def test_attention_by_columns_of_queries_equals_softmax_over_what_is_visible(
    tiles, shared_prefix, attention
):
    length = sum(width for _, width in tiles)
    rng = np.random.default_rng(length)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    seen = length + shared_prefix
    q, keys, values, pull = (
        draw(3, length, 4, 8),
        draw(3, 2, seen, 8),
        draw(3, 2, seen, 8),
        draw(3, length, 4, 8),
    )
    branch_ids = (
        np.sort(rng.integers(-1, 3, (3, length)), axis=1) % 4
    )  # prompt, two branches, padding
    branch_ids = np.where(branch_ids == 3, -1, branch_ids)
    branch_ids = np.pad(branch_ids, ((0, 0), (shared_prefix, 0)))
    whole = seen_in_tree(jnp.asarray(branch_ids), length)
    own = spans(tiles)

    def plain(q, keys, values):
        scores = jnp.einsum("rlhk,rhsk->rhls", q, jnp.repeat(keys, 2, axis=1)) / np.sqrt(8)
        weights = jax.nn.softmax(jnp.where(whole[:, None], scores, -1e30), axis=-1)
        mixed = jnp.einsum("rhls,rhsk->rlhk", weights, jnp.repeat(values, 2, axis=1))
        return [mixed[:rows, begin:end] for rows, begin, end in own]

    def by_columns(q, keys, values):
        found = []
        for rows, begin, end in own:
            visible = seen_in_tree(
                jnp.asarray(branch_ids[:rows, : shared_prefix + end]), end - begin
            )
            cut = (
                (slice(None),)
                if attention is attend
                else (slice(rows), slice(None), slice(shared_prefix + end))
            )
            found.append(attention(q[:rows, begin:end], keys[cut], values[cut], visible))
        return found

    taken = [pull[:rows, begin:end] for rows, begin, end in own]
    both = [jax.jit(f)(q, keys, values) for f in (by_columns, plain)]
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    value = lambda f: lambda x: sum((a * b).sum() for a, b in zip(f(*x), taken, strict=True))
    slopes = [jax.jit(jax.grad(value(f)))((q, keys, values)) for f in (by_columns, plain)]
    for a, b in zip(*slopes, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "where, told",
    [
        (("cpu", "bfloat16", 64), "runs on NVIDIA GPUs, and JAX runs on a cpu"),
        (("gpu", "float32", 64), "takes bfloat16, and the base's dtype is float32"),
        (("gpu", "bfloat16", 256), "at most 128 in multiples of 8, and the model's are 256 wide"),
    ],
)
def test_flash_attention_that_cannot_be_had_is_refused(where, told):
    check_kernel("cudnn", "gpu", "bfloat16", 128)
    check_kernel("xla", *where)
    with pytest.raises(UserError, match=f"{told}.*attention_kernel=xla"):
        check_kernel("cudnn", *where)


def test_bfloat16_model_stays_in_bfloat16_and_close():
    model, want = (
        load_model(FIXTURES / "qwen3", "bfloat16"),
        np.load(FIXTURES / "qwen3" / "expected.npz"),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(model.base)} == {jnp.dtype(jnp.bfloat16)}
    mask = want["right_mask"]
    got = logits(Decoder(model.config, NO_LORA), None, model.base, want["right_tokens"], mask)
    # 8 significant bits, three layers: about 2 % of the logits' spread.
    assert (
        np.abs(got[mask] - want["right_logits"][mask]).mean()
        < 0.03 * want["right_logits"][mask].std()
    )


def test_program_does_not_grow_with_depth():
    def equations(layers):
        raw = json.loads((FIXTURES / "qwen3/config.json").read_text()) | {
            "num_hidden_layers": layers
        }
        config = parse_config(raw)
        make = lambda place: jax.ShapeDtypeStruct(place.leaf_shape, jnp.float32)
        base = build_params(config, make)
        lora = LoraConfig(
            rank=2, alpha=2.0, dropout=0.1, targets=("q", "down"), last_layers=layers // 2
        )
        tree = jax.eval_shape(lambda: init_lora(jax.random.key(0), lora, config))
        tokens, mask = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), bool)
        run = jax.jit(lambda *args: logits(Decoder(config, lora, remat="layers"), *args))
        return len(run.lower(tree, base, tokens, mask).as_text().splitlines())

    assert equations(2) == equations(8)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_precisions_convert_exactly_or_round_to_nearest(folder, stored):
    retensor(
        folder, lambda tensors: tensors.update({k: v.astype(stored) for k, v in tensors.items()})
    )
    disk = load_file(folder / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        base = load_model(folder, dtype).base
        want = disk["model.layers.1.mlp.up_proj.weight"].T.astype(dtype)
        assert base.layers.up.dtype == dtype
        np.testing.assert_array_equal(base.layers.up[1], want)
        np.testing.assert_array_equal(base.embed, disk["model.embed_tokens.weight"].astype(dtype))


def test_shards_give_the_same_tree_as_one_file(folder):
    shard(folder)
    same_tree(load_model(folder, "float32").base, load_model(FIXTURES / "llama", "float32").base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
def test_saved_folder_holds_the_same_tensors_as_hugging_face_wrote(family, shard_bytes, tmp_path):
    model = load_model(FIXTURES / family, "float32")
    args = (model.raw_config, model.tokenizer, model.generation_config)
    save_model(tmp_path / "out", model.base, *args, shard_bytes=shard_bytes)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
        assert shard_bytes > 40_000 or file.name != "model.safetensors"
    same_tree(written, load_file(FIXTURES / family / "model.safetensors"))
    again = load_model(tmp_path / "out", "float32")
    same_tree(again.base, model.base)
    assert (again.config, again.eos_ids, again.pad_id) == (
        model.config,
        model.eos_ids,
        model.pad_id,
    )
    assert (
        again.tokenizer("aé<|user|>b")["input_ids"] == model.tokenizer("aé<|user|>b")["input_ids"]
    )


def test_saved_bfloat16_folder_says_so(folder, tmp_path):
    model = load_model(folder, "bfloat16")
    save_model(tmp_path / "out", model.base, model.raw_config, model.tokenizer)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    same_tree(load_model(tmp_path / "out", "bfloat16").base, model.base)


def test_saving_over_a_sharded_folder_leaves_no_old_shard(folder):
    model = load_model(folder, "float32")
    args = (model.base, model.raw_config, model.tokenizer)
    save_model(folder, *args, shard_bytes=40_000)
    save_model(folder, *args)
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]


def test_known_buffers_and_tied_copies_are_let_through(folder):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    retensor(folder, change)
    assert load_model(folder, "float32").base.head is None


def test_end_ids_are_the_union_with_the_tokenizers_first(folder):
    edit(folder, eos_token_id=5)
    edit(folder, "generation_config.json", eos_token_id=[7, 0, 5])
    model = load_model(folder, "float32")
    assert (model.eos_ids, model.pad_id) == ((0, 5, 7), 1)


NAME = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json", "Hub id"]),
    "config not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json", "not valid JSON"],
    ),
    "unknown family": (lambda f: edit(f, model_type="lama"), ["'lama'", "Did you mean 'llama'"]),
    "missing width": (lambda f: edit(f, hidden_size=None), ["hidden_size"]),
    "uneven heads": (lambda f: edit(f, num_key_value_heads=3), ["num_key_value_heads", "3", "4"]),
    "unknown rope": (
        lambda f: edit(f, rope_parameters={"rope_type": "yarn"}),
        ["'yarn'", "llama3"],
    ),
    "rope without factor": (
        lambda f: edit(f, rope_parameters={"rope_type": "llama3"}),
        ["llama3", "factor"],
    ),
    "sliding window": (lambda f: edit(f, use_sliding_window=True), ["sliding"]),
    "no safetensors": (
        lambda f: (f / "model.safetensors").rename(f / "model.bin"),
        ["model.safetensors", "model.bin"],
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        ["model/model.safetensors", "truncated"],
    ),
    "missing shard": (
        lambda f: (shard(f), (f / "model-00002-of-00003.safetensors").unlink()),
        ["model-00002-of-00003.safetensors", "missing"],
    ),
    "index not JSON": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("[]")),
        ["index.json", "damaged"],
    ),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop(NAME)), [NAME, "no tensor"]),
    "wrong shape": (
        lambda f: retensor(f, lambda t: t.update({NAME: np.ones((32, 16), np.float32)})),
        [NAME, "[32, 16]", "[32, 32]"],
    ),
    "extra tensor": (
        lambda f: retensor(f, lambda t: t.update({"x.y": np.ones(2, np.float32)})),
        ["'x.y'"],
    ),
    "quantised": (
        lambda f: retensor(f, lambda t: t.update({NAME: np.ones((32, 32), np.int8)})),
        [NAME, "I8"],
    ),
    "untied without head": (lambda f: edit(f, tie_word_embeddings=False), ["lm_head.weight"]),
    "no tokenizer": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer_config.json").unlink()),
        ["tokenizer.json"],
    ),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ["tokenizer", "cannot be read"],
    ),
    "no EOS": (
        lambda f: edit(f, "tokenizer_config.json", eos_token=None),
        ["no EOS", "tokenizer_config.json"],
    ),
    "damaged generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        ["generation_config"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_refused_by_name(folder, damage):
    harm, words = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder, "float32")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_tokenizer_with_ids_beyond_the_embedding_is_refused():
    model = load_model(FIXTURES / "llama", "float32")
    small = parse_config(model.raw_config | {"vocab_size": 200})
    with pytest.raises(UserError, match=r"ids up to 258.*200 rows"):
        end_ids(small, {}, None, model.tokenizer, "here")


def test_unknown_dtype_missing_folder_and_plain_file_are_refused(folder):
    for source, dtype, word in (
        (folder, "float8", "Known: bfloat16, float32"),
        ("/nowhere/model", "float32", "no model folder"),
        (folder / "config.json", "float32", "is a file"),
        ("nowhere.gguf", "float32", "no GGUF file"),
    ):
        with pytest.raises(UserError, match=word):
            load_model(source, dtype)


def test_unreachable_hub_is_a_user_error_with_a_remedy(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"nobody/nothing.*no network.*spear_jax\.fetch"):
        load_model("nobody/nothing", "float32")
