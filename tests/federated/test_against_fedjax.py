"""Mime-lite and FedProx against FedJAX's own, on clients with quadratic losses."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from quadratic_clients import adapter, numbers, train
from small_cohort import local_config

from spear_jax.federated import local_training
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.drift import MimeLite

fedjax = pytest.importorskip("fedjax", reason="fedjax is not installed")
H, G = np.array([1.0, 3.0, 0.5]), np.array([[1.0, -2.0], [0.5, 4.0], [-3.0, 0.1]])
START, STEPS, RATE = np.array([0.3, -0.7]), 3, 0.05


@pytest.fixture(autouse=True)
def older_jax(monkeypatch):
    """The one name that FedJAX 0.0.17 misses in today's JAX."""
    monkeypatch.setattr(jax, "tree_map", jax.tree.map, raising=False)


def loss(x, batch, key):
    """h ‖x‖² / 2 + g · x of each example."""
    return batch["h"] * (x**2).sum() / 2 + batch["g"] @ x


def clients():
    keys = jax.random.split(jax.random.key(0), len(H))
    one = lambda k: {"h": np.float32(H[k : k + 1]), "g": np.float32(G[k : k + 1])}
    return [(str(k), fedjax.ClientDataset(one(k)), keys[k]) for k in range(len(H))]


def batches():
    return fedjax.ShuffleRepeatBatchHParams(batch_size=1, num_epochs=None, num_steps=STEPS)


def optimizer(transformation):
    """FedJAX's optimiser of one of learning rate 1."""
    scaled = optax.chain(transformation, optax.scale(RATE))
    return fedjax.optimizers.create_optimizer_from_optax(scaled)


def test_rounds_of_mime_lite_are_fedjaxs(model):
    """Three rounds with AdamW and clipping, both moments."""
    ours = local_training.optimiser(local_config(weight_decay=0.0))
    theirs = fedjax.algorithms.mime_lite.mime_lite(
        loss, optimizer(ours), batches(), fedjax.PaddedBatchHParams(batch_size=1), 1.0
    )
    server, drift = theirs.init(np.float32(START)), MimeLite()
    state = init_server(Aggregation(drift=drift), adapter(START), {}, jax.random.key(0))
    kept = drift.init(state.lora, len(H), ours)
    for _ in range(3):
        server, _ = theirs.apply(server, clients())
        done = train(model, numbers(state.lora), H, G, STEPS, RATE, drift, moments=kept["moments"])
        state = dataclasses.replace(state, aggregation_state={})
        state = end_round(Aggregation(drift=drift), state, done.reduced).state
        everybody = np.ones(len(H), bool)
        kept = drift.end(kept, np.arange(len(H)), everybody, done.gathered, state.lora, ours)
        np.testing.assert_allclose(numbers(state.lora), server.params, rtol=1e-4, atol=1e-6)


def test_a_round_of_fedprox_is_fedjaxs(model, monkeypatch):
    monkeypatch.setattr(local_training, "optimiser", lambda config: optax.sgd(1.0))
    plain = fedjax.optimizers.sgd(1.0)
    theirs = fedjax.algorithms.fed_prox.fed_prox(
        loss, optimizer(optax.sgd(1.0)), plain, batches(), 0.8
    )
    server, _ = theirs.apply(theirs.init(np.float32(START)), clients())
    total, mass = train(model, START, H, G, STEPS, RATE, prox=0.8).reduced
    np.testing.assert_allclose(numbers(total) / float(mass), server.params, rtol=1e-5)
