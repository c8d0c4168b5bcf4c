"""Flash attention: cuDNN's kernel for odd lengths and mapped clients, as far as that shows without
a GPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.models.attention import attend, flash, seen_in_tree
from spear_jax.models.config import parse_config
from spear_jax.models.decoder import Decoder, packed_states
from spear_jax.models.io.tensor_map import build_params
from spear_jax.models.lora import LoraConfig, init_lora
from spear_jax.packing.prefix_tree import one_sequence

# a family of grouped heads, in shapes that cuDNN takes
SHAPES = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("queries, keys", [(8, 8), (7, 12), (7, 7)])
def test_clients_laid_as_rows_attend_as_each_does_alone(clients, queries, keys):
    rng = np.random.default_rng(clients)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    branch_ids = jnp.asarray(rng.integers(0, 3, (clients, 2, keys)))
    visible = jax.vmap(seen_in_tree, (0, None))(branch_ids, queries)
    # the keys are the same for all clients, so that a gradient must be summed over them
    args = draw(clients, 2, queries, 4, 8), draw(2, 2, keys, 8), draw(clients, 2, 2, keys, 8)
    change = draw(clients, 2, queries, 4, 8)

    def both(attention):
        mapped = jax.vmap(attention, (0, None, 0, 0))
        value, pull = jax.vjp(lambda *x: mapped(*x, visible), *args)
        return value, *pull(change)

    given = jax.jit(both, static_argnums=0)
    one = lambda q, keys, values, visible: flash(q, keys, values, visible, "xla")
    for ours, plain in zip(given(one), given(attend), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.fixture
def some_cudnn(monkeypatch):
    """A version of cuDNN, which JAX asks for while it traces. Nothing of cuDNN runs here."""
    library = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{library}.check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("remat", ["layers", "attention"])
@pytest.mark.parametrize("clients", [1, 3])
def test_gradient_of_mapped_clients_lowers_to_cudnn_with_a_mask_for_all_heads(
    some_cudnn, clients, remat
):
    config = parse_config(SHAPES)
    lora = LoraConfig(rank=2, alpha=2.0, dropout=0.0, targets=("q", "v"))
    decoder = Decoder(config, lora, remat, "cudnn")
    base = build_params(config, lambda place: jax.ShapeDtypeStruct(place.leaf_shape, jnp.bfloat16))
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), lora, config))
    pack = one_sequence(range(9))  # an odd length, which cuDNN's gradient refuses
    many = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((clients, *x.shape), x.dtype), tree
    )

    def loss(adapter, base, pack):
        return packed_states(decoder, adapter, base, pack)[0].astype(jnp.float32).sum()

    gradients = jax.jit(jax.vmap(jax.grad(loss), (0, None, 0)))
    lowered = gradients.trace(many(adapter), base, many(pack)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    forward = re.findall(r"fmhaScaleBiasSoftmax\((.*)", text)
    backward = re.findall(r"fmhaScaleBiasSoftmaxBackward\((.*)", text)
    assert forward and backward
    for call in forward + backward:
        operands = call.split(" : ")[-1]
        assert f"tensor<{clients}x1x10x10xbf16>" in operands  # one mask a row
        assert f"tensor<{clients}x10x4x32xbf16>" in operands
    assert f"tensor<{clients}x4x10x10x" not in text  # nor are there scores of a head anywhere
