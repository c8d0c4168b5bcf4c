"""Quantised bases: their numbers against numpy, their size, and whole runs on them."""

import importlib.util

import jax
import numpy as np
import pytest

from configs import quickstart
from spear_jax.core.errors import UserError
from spear_jax.core.mesh import to_host
from spear_jax.experiment import builder
from spear_jax.federated import round as rounds
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.models.io import quantize_weights
from spear_jax.models.io.huggingface import save_model
from spear_jax.models.io.tensor_map import on_default_device
from spear_jax.models.quantization import widen

# The 16 levels of NF4 (arXiv 2305.14314, appendix E).
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture(scope="module")
def leaf():
    return np.random.default_rng(0).normal(size=(2, 128, 24)).astype(np.float32)


def held(kind, name, leaf):
    return quantize_weights.quantiser(kind, on_default_device)(name, leaf)


def widened(model, kind, name, leaf):
    layers = model.base.layers.replace(**{name: held(kind, name, leaf)})
    return np.asarray(getattr(widen(layers), name))


def test_int8_is_the_nearest_of_256_steps_over_each_outputs_range(model, leaf):
    scale = np.abs(leaf).max(axis=1, keepdims=True) / 127.5
    wanted = np.clip(np.rint(leaf / scale), -128, 127) * scale
    found = widened(model, "int8", "gate", leaf)
    ties = (
        np.abs(np.abs(leaf / scale) % 1 - 0.5) < 1e-4
    )  # where the last bit of the division decides
    np.testing.assert_allclose(found[~ties], wanted[~ties], atol=1e-6)
    assert (np.abs(found - leaf) <= 0.501 * scale).all()


def test_nf4_is_the_nearest_level_of_each_tiles_largest_weight(model, leaf):
    tiles = leaf.reshape(2, 2, 64, 24)
    scale = np.abs(tiles).max(axis=2, keepdims=True)
    nearest = np.abs(tiles[..., None] / scale[..., None] - LEVELS).argmin(-1)
    np.testing.assert_allclose(
        widened(model, "nf4", "down", leaf),
        (LEVELS[nearest] * scale).reshape(leaf.shape),
        atol=1e-5,
    )


def test_only_projections_are_quantised(leaf):
    for name in ("embed", "norm", "q_bias"):
        np.testing.assert_array_equal(held("int8", name, leaf), leaf)


def build(count=1, **changes):
    config = quickstart.get_config("facts")
    config.update_from_flattened_dict(
        {
            "federation.clients_per_round": 2, "rollout.examples": 6, "train.steps": 1, "train.batch_size": 4, "eval.limit": 40,
            "lora.rank": 2, "lora.targets": ("q", "down"), "federation.clients_at_once": 2, **changes,
        }
    )  # fmt: skip
    return builder.build(config, jax.devices()[:count])


@pytest.mark.parametrize("kind, share", [("int8", 0.30), ("nf4", 0.35)])
def test_a_round_on_a_quantised_base_is_the_round_on_its_widened_weights(kind, share, tmp_path):
    """Against the same run on a float32 base with the quantised numbers in it: same text, same
    adapter.
    """
    small = build(**{"quantize": kind, "lora.dropout": 0.0})
    model = small.model
    widened = model.base.replace(layers=widen(model.base.layers))
    args = (model.raw_config, model.tokenizer, model.generation_config)
    save_model(tmp_path / "wide", widened, *args)
    wide = build(**{"model": str(tmp_path / "wide"), "lora.dropout": 0.0})
    projections = lambda layers: jax.tree.leaves((layers.q, layers.gate, layers.down))
    size = lambda base: sum(x.nbytes for x in projections(base.layers))
    assert size(model.base) <= share * size(wide.model.base)
    found = []
    for built in (small, wide):
        state, _, told = rounds.run_round(built.federation, built.initial_state(), BudgetUsed())
        policy = built.policies(state)[0]
        right = built.evaluator(policy).correct
        found.append((state.lora, [[a.completion for a in t.attempts] for t, _, _ in told], right))
    assert found[0][1:] == found[1][1:]
    for a, b in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
        # AdamW's first steps divide a gradient by its own size, and rounding errors with it
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b) + 1e-7


def test_a_quantised_base_on_many_devices_says_the_same():
    said = []
    for count in (1, 8):
        built = build(count, **{"quantize": "int8", "devices.model": 2 if count > 1 else 1})
        policy = built.federation.worker.policy(built.initial_state().lora)
        keys = np.zeros((6, 2), np.uint32)
        prompts = [p for p in built.federation.worker.data.prompts if p][:6]
        done = built.federation.worker.sampler.generate(
            policy.lora, policy.base, prompts, keys, built.evaluator.sampling
        )
        said.append([completion.tokens for completion in done])
    assert said[0] == said[1]
    split = built.model.base.layers.q.qvalue
    assert split.addressable_shards[0].data.size * 2 == to_host(split).size


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"spear-jax\[quantize\]"):
        quantize_weights.quantiser("nf4", on_default_device)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="quantize"):
        build(quantize="int3")
