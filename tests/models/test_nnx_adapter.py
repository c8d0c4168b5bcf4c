"""The NNX module around the decoder: the same numbers, under NNX's filters and tools."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from spear_jax.core.errors import UserError
from spear_jax.models.decoder import Decoder, logits, unstack
from spear_jax.models.lora import LoraConfig
from spear_jax.models.nnx_adapter import NnxDecoder

LORA = LoraConfig(4, 8.0, 0.0, ("q", "down"))
BASE_ALONE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
ADAPTER = nnx.DiffState(0, nnx.LoRAParam)  # what a gradient is taken of


@pytest.fixture
def decoder(model):
    return Decoder(model.config, LORA)


@pytest.fixture
def module(decoder, model, lora):
    return NnxDecoder(decoder, model.base, lora)


@pytest.fixture
def inputs(model):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 7))
    return jnp.asarray(tokens, jnp.int32), jnp.arange(7) < jnp.array([[7], [4], [5]])


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_logits_equal_the_pure_functions(module, decoder, model, lora, inputs):
    np.testing.assert_array_equal(module(*inputs), logits(decoder, lora, model.base, *inputs))
    plain = NnxDecoder(decoder, model.base)
    np.testing.assert_array_equal(plain(*inputs), logits(decoder, None, model.base, *inputs))
    assert not np.allclose(module(*inputs), plain(*inputs), atol=1e-3)


def test_both_trees_come_back_as_they_were(module, decoder, model, lora):
    same(module.base_params(), model.base)
    same(module.adapter(), lora)
    assert NnxDecoder(decoder, model.base).adapter() is None


def test_filters_tell_the_adapter_from_the_base(module, model, lora):
    own = nnx.to_pure_dict(nnx.state(module, nnx.LoRAParam))
    assert own.keys() == {"lora"} and own["lora"].keys() == {"q", "down"}
    np.testing.assert_array_equal(own["lora"]["down"]["b"], lora.down.b)
    base = nnx.to_pure_dict(nnx.state(module, BASE_ALONE))
    assert base.keys() == {"base"}
    np.testing.assert_array_equal(base["base"]["layers"]["gate"], model.base.layers.gate)


def test_the_gradient_is_the_adapters_alone(module, decoder, model, lora, inputs):
    pull = jax.random.normal(jax.random.key(0), module(*inputs).shape)
    grads = nnx.grad(lambda m: (m(*inputs) * pull).sum(), argnums=ADAPTER)(module)
    want = jax.grad(lambda tree: (logits(decoder, tree, model.base, *inputs) * pull).sum())(lora)
    grads = nnx.to_pure_dict(grads)
    assert grads.keys() == {"lora"}
    assert grads["lora"].keys() == want.by_name().keys()
    for target, pair in want.by_name().items():
        np.testing.assert_allclose(grads["lora"][target]["a"], pair.a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grads["lora"][target]["b"], pair.b, rtol=1e-5, atol=1e-6)


def test_an_optimiser_of_the_adapter_moves_nothing_else(module, model, lora, inputs):
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(module, optimizer):
        loss = lambda m: (m(*inputs) ** 2).mean()
        value, grads = nnx.value_and_grad(loss, argnums=ADAPTER)(module)
        optimizer.update(module, grads)
        return value

    first, second = step(module, optimizer), step(module, optimizer)
    assert second < first
    same(module.base_params(), model.base)
    assert all(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, module.adapter(), lora))))


def test_split_and_merge_give_the_same_model(module, model, lora, inputs):
    graph, adapter, rest = nnx.split(module, nnx.LoRAParam, ...)
    again = nnx.merge(graph, adapter, rest)
    same(again.adapter(), lora)
    same(again.base_params(), model.base)
    halved = nnx.merge(graph, jax.tree.map(lambda x: x / 2, adapter), rest)
    same(halved.adapter(), jax.tree.map(lambda x: x / 2, lora))
    np.testing.assert_array_equal(again(*inputs), module(*inputs))


def test_orbax_saves_and_restores_it(module, decoder, model, lora, inputs, tmp_path):
    graph, state = nnx.split(module)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        empty = jax.tree.map(jnp.zeros_like, state)
        again = nnx.merge(graph, checkpointer.restore(tmp_path / "state", empty))
    same(again.adapter(), lora)
    same(again.base_params(), model.base)
    np.testing.assert_array_equal(again(*inputs), module(*inputs))


def test_unstacked_layers_are_refused(decoder, model):
    with pytest.raises(UserError, match="unstacked or quantised"):
        NnxDecoder(decoder, unstack(model.base))
