"""Estimates of memory against what the compiler reports; nothing runs, and no weight exists."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cohort import local_config, spear

from spear_jax.benchmark.workload import TINY, read_preset
from spear_jax.core.mesh import make_mesh
from spear_jax.federated import local_training
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.models import cost_model
from spear_jax.models.config import parse_config
from spear_jax.models.decoder import Decoder
from spear_jax.models.io.tensor_map import build_params
from spear_jax.models.lora import TARGETS, LoraConfig, init_lora
from spear_jax.packing.blocks import BlockBuilder, stack_blocks
from spear_jax.packing.shape_buckets import BlockShape

EMBEDDED = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
SHORT = BlockShape(400, ((9, 48),), 64, 16, 1, 1, 8)  # as the embedded tasks have them
# ten trees of some 170 tokens, the longest 330, behind a shared prefix
LONG = BlockShape(
    1376, ((10, 64), (8, 64), (4, 64), (2, 64), (1, 64)), 256, 24, 1, 1, 32, (1,) * 23
)


def compiled_bytes(model, shape, remat, dropout, clients):
    """What the compiler sets aside for local training, a client."""
    lora = LoraConfig(16, 32.0, dropout, TARGETS)
    struct = lambda x: jax.ShapeDtypeStruct((clients, *np.shape(x)), np.asarray(x).dtype)
    blocks = stack_blocks([[BlockBuilder(shape, 0).build()] * 2] * 2, shape, 2)
    work = jax.tree.map(struct, local_training.LocalBatches(*blocks, None))
    base = build_params(model, lambda place: jax.ShapeDtypeStruct(place.leaf_shape, jnp.float32))
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), lora, model))
    shared = local_training.Broadcast(adapter, base, (), {}, np.float32(1))
    members = map(struct, (np.zeros(2, np.uint32), np.float32(1), np.bool_(True)))
    local = local_config(clients_at_once=clients, head_chunk=0)
    mesh = make_mesh(jax.devices()[:1])
    static = spear(), Decoder(model, lora, remat), local, mesh, Aggregation(), False
    train = jax.jit(local_training.train_cohort, static_argnums=tuple(range(6)))
    program = train.lower(*static, shared, None, work, *members).compile()
    adapter_bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(adapter))
    return program.memory_analysis().temp_size_in_bytes / clients, adapter_bytes


# what CUDA's compiler sets aside for Qwen2.5-1.5B in bfloat16 on an H100, in MB a client
# (`benchmark --compile-for=h100-1 --config=spear:arc_challenge,qwen2.5-1.5b`, jax 0.10.2)
ON_AN_H100 = {
    ("layers", True): 651,
    ("attention", True): 1787,
    ("nothing", True): 7421,
    ("nothing", False): 6810,
}


@pytest.mark.parametrize("remat, dropout", ON_AN_H100)
def test_estimate_is_within_a_fifth_of_cudas_compiler(remat, dropout):
    model = parse_config(read_preset("qwen2.5-1.5b").shape)
    tiles = (*[(3, 128)] * 4, (1, 128), (1, 104))
    block = cost_model.block_sizes(BlockShape(848, tiles, 704, 3, 1, 1, 256))
    lora = LoraConfig(16, 32.0, 0.1, TARGETS)
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), lora, model))
    adapter_bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(adapter))
    estimate = cost_model.bytes_per_client(model, block, 0, adapter_bytes, remat, 2, dropout)
    assert abs(estimate / 1e6 / ON_AN_H100[remat, dropout] - 1) < 0.2


def test_estimate_is_within_a_fifth_of_cudas_compiler_where_eight_devices_share_a_base():
    """32B, as `benchmark --compile-for=h100-8 --config.devices.model=8` has it, jax 0.10.2."""
    about = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    heads = {"num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064}
    model = parse_config(read_preset("qwen2.5-1.5b").shape | about | heads)
    tiles = (*[(17, 120)] * 3, (14, 120), (1, 120), (1, 96))
    block = cost_model.block_sizes(BlockShape(4480, tiles, 4608, 17, 1, 1, 256, (1,) * 24))
    estimate = cost_model.bytes_per_client(model, block, 0, 536_870_912, "attention", 2, True, 8)
    assert abs(estimate / 12.72e9 - 1) < 0.2


@pytest.mark.parametrize("parts, heads", [(1, 8), (2, 4), (8, 1), (3, 8)])
def test_devices_that_share_a_base_split_the_heads_of_keys_and_values(parts, heads):
    heads_of = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = parse_config(read_preset("qwen2.5-1.5b").shape | heads_of)
    wide = 2 * heads * model.head_width * model.layers * 2  # keys and values, in bfloat16
    assert cost_model.cache_bytes(model, 3, 5, 2, parts) == 15 * wide
    limits = cost_model.generation_limits(model, 2, 1000, 0, 0, 1, parts)
    assert limits.tokens == 10**9 // wide


SMOLLM2 = read_preset("smollm2-135m").shape
WIDE_MLP = SMOLLM2 | {"intermediate_size": 3072, "num_hidden_layers": 8}


@pytest.mark.parametrize(
    "shape_of_model, shape, remat, dropout, clients",
    [
        (EMBEDDED, SHORT, "attention", 0.0, 1),
        (EMBEDDED, SHORT, "layers", 0.0, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (EMBEDDED, SHORT, "nothing", 0.0, 1),
                (SMOLLM2, LONG, "layers", 0.0, 1),
                (SMOLLM2, LONG, "attention", 0.0, 3),
                (SMOLLM2, LONG, "nothing", 0.0, 1),
                (SMOLLM2, LONG, "nothing", 0.1, 1),
                (SMOLLM2, LONG, "layers", 0.1, 1),
                (WIDE_MLP, LONG, "attention", 0.0, 1),
                (WIDE_MLP, LONG, "layers", 0.0, 3),
            ]
        ),
    ],
)
def test_estimate_is_within_a_fifth_of_the_compilers(
    shape_of_model, shape, remat, dropout, clients
):
    model = parse_config(shape_of_model)
    found, adapter = compiled_bytes(model, shape, remat, dropout, clients)
    estimate = cost_model.bytes_per_client(
        model, cost_model.block_sizes(shape), 0, adapter, remat, dropout=dropout > 0
    )
    assert abs(estimate / found - 1) < 0.2, f"{estimate / 1e6:.1f} MB, compiled {found / 1e6:.1f}"
