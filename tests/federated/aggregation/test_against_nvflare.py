"""The mean, and steps of a server's rate, against NVFlare's own class on the same arrays.

NVFlare averages updates by weight, as its FedAvg and FedOpt do; what is compared is the adapter after
rounds of updates. `pip install nvflare` beside the project; tried with NVFlare 2.9.0.
"""

import dataclasses

import jax
import numpy as np
import pytest

from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.aggregation.server_optimizer import server_optimizer
from spear_jax.models.params import Adapter, LowRank

nvflare = pytest.importorskip(
    "nvflare.app_common.aggregators.weighted_aggregation_helper",
    reason="NVFlare is not installed",
    exc_type=ImportError,
)


def adapters(rng, *lead):
    draw = lambda *shape: rng.standard_normal((*lead, *shape)).astype(np.float32)
    return Adapter(
        q=LowRank(draw(2, 4, 3), draw(2, 3, 5)), down=LowRank(draw(2, 6, 3), draw(2, 3, 4))
    )


def their_mean(updates, weight):
    helper = nvflare.WeightedAggregationHelper()
    for client, one in enumerate(weight):
        if one:  # a client that sends nothing is no contributor
            leaves = enumerate(jax.tree.leaves(updates))
            data = {str(i): np.asarray(x[client], np.float64) for i, x in leaves}
            helper.add(data, float(one), f"client-{client}", 0)
    mean = helper.get_result()
    return jax.tree.unflatten(jax.tree.structure(updates), [mean[str(i)] for i in range(len(mean))])


@pytest.mark.parametrize("collects", [False, True], ids=["as they train", "on the host"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_mean_and_a_servers_rate_are_nvflares(rate, collects):
    rng = np.random.default_rng(5)
    start, weight = adapters(rng), np.array([3.0, 0.0, 1.0, 7.0], np.float32)
    aggregation = Aggregation(optimizer=server_optimizer("fedavg", rate=rate))
    if collects:
        aggregation = dataclasses.replace(aggregation, attack=lambda x, *_: (x, np.zeros(3, bool)))
    state = init_server(aggregation, start, {}, jax.random.key(0), len(weight))
    want = jax.tree.map(lambda x: x.astype(np.float64), start)
    for _ in range(3):
        ended = jax.tree.map(
            lambda x, held: np.asarray(held) + 0.1 * x, adapters(rng, 4), state.lora
        )
        updates = jax.tree.map(lambda x, held: x - np.asarray(held), ended, state.lora)
        want = jax.tree.map(lambda x, mean: x + rate * mean, want, their_mean(updates, weight))
        reduced = (ended, weight)
        if not aggregation.collects:
            begun = aggregation.reducer.init(state.lora)
            reduced = aggregation.reducer.add(begun, ended, weight)
        state = end_round(aggregation, state, reduced, range(4)).state
    for got, expected in zip(jax.tree.leaves(state.lora), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
