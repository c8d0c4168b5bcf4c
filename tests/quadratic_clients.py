"""Clients whose losses are known in closed form, behind the real local training.

The method's loss reads no model: client k minimises Σ_i h x_i² / 2 + g_i x_i over the numbers x of its
adapter. A row holds one i as the token 3 + i, h as its weight and g as its advantage.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_cohort import local_config, make_decoder

from spear_jax.algorithms.base import Algorithm, CommonHyperparams
from spear_jax.core.mesh import make_mesh
from spear_jax.core.types import Mean
from spear_jax.federated import cohort_training, local_training
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.models.params import Adapter, LowRank
from spear_jax.packing.blocks import Keys, choose_block_shape, pack_rows
from spear_jax.packing.rows import TrainingRow


@dataclasses.dataclass(frozen=True)
class Quadratic(Algorithm):
    name = "quadratic"

    def collect(self, *_: Any):
        raise AssertionError("nothing is rolled out here")

    def forward(self, scorer, lora, block, references):
        return jnp.ravel(lora.q.a)[block.target - 3]

    def denominators(self, batch, logprobs, loss_scalars):
        return {}

    def loss(self, batch, logprobs, denominators, loss_scalars):
        each = batch.weight * logprobs**2 / 2 + batch.advantage[:, None] * logprobs
        value = jnp.sum(jnp.where(batch.completion_mask, each, 0.0))
        return value, {"value": Mean(value, jnp.float32(1))}


def adapter(x):
    """Numbers as an adapter. Args: x: leaves [..., d]."""
    a = np.asarray(x, np.float32)[..., None, :, None]
    return Adapter(q=LowRank(a, np.zeros((*a.shape[:-2], 1, 1), np.float32)))


def numbers(tree):
    """The numbers of an adapter."""
    return np.asarray(tree.q.a)[..., 0, :, 0]


def train(model, start, h, g, steps, rate, drift=None, weight=None, carried=None, own=None, **more):
    """Trains clients from a common start. Args: h: float[C]; g: float[C, d]."""
    g = np.asarray(g)
    count, size = g.shape
    moments, devices = more.pop("moments", None), more.pop("devices", 1)

    def rows(k):
        row = lambda i: TrainingRow([1], [3 + i], np.ones(1, bool), float(h[k]), 1, float(g[k, i]))
        return [(row(i),) for i in range(size)]

    micros = [[[rows(k)] for _ in range(steps)] for k in range(count)]
    shape = choose_block_shape(sum(micros, []), 1, 1, 4, 1, 64)
    keys = Keys()
    blocks = [[pack_rows(step, shape, keys) for step in client] for client in micros]
    packed = cohort_training.Rows(blocks, max(len(s) for c in blocks for s in c), shape, None)
    shared = local_training.Broadcast(
        adapter(start), model.base, (), {}, jnp.float32(rate), moments
    )
    weight = np.ones(count) if weight is None else np.asarray(weight)
    members = np.zeros((count, 2), np.uint32), np.float32(weight), np.ones(count, bool)
    keep = carried is not None
    return cohort_training.train(
        Quadratic(None, CommonHyperparams(1, steps, 1, size, 1, 1.0, (2,))),
        make_decoder(model),
        local_config(drift=drift, weight_decay=0.0, **more),
        make_mesh(jax.devices()[:devices]),
        Aggregation(drift=drift),
        shared,
        packed,
        members,
        keep,
        carried,
        own,
    )
