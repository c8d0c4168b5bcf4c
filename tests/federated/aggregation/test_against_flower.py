"""Reducers against Flower's own functions on the same arrays (`flwr.server.strategy.aggregate`).

Flower averages models, the reducers updates of a common start; the start is 0 here. Where Flower weighs
by examples and the reducers count each client once, Flower gets even numbers.
"""

import jax
import numpy as np
import pytest

from spear_jax.federated.aggregation.reducers import Mean
from spear_jax.federated.aggregation.robust.bulyan import Bulyan
from spear_jax.federated.aggregation.robust.coordinate_wise import CoordinateMedian, TrimmedMean
from spear_jax.federated.aggregation.robust.krum import Krum, MultiKrum

flower = pytest.importorskip(
    "flwr.server.strategy.aggregate", reason="Flower is not installed", exc_type=ImportError
)
CLIENTS, ATTACKERS = 11, 2


def cohort(seed):
    """11 clients, whose last two are far from the others; two leaves [n, ...]."""
    rng = np.random.default_rng(seed)
    leaves = [rng.standard_normal((CLIENTS, *shape)) for shape in ((3, 4), (5,))]
    for leaf in leaves:
        leaf[-ATTACKERS:] += 9.0
    return leaves


def ours(reducer, leaves, weight=None):
    weight = np.ones(CLIENTS) if weight is None else weight
    start = jax.tree.map(lambda x: np.zeros_like(x[0]), leaves)
    return reducer.reduce(leaves, weight, start, {})[0]


def theirs(name, leaves, *args, weight=None, **named):
    counts = np.ones(CLIENTS, int) if weight is None else weight
    clients = [([leaf[k] for leaf in leaves], counts[k]) for k in range(CLIENTS)]
    return getattr(flower, name)(clients, *args, **named)


def same(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "reducer, name, arguments",
    [
        (CoordinateMedian(), "aggregate_median", ()),
        (TrimmedMean(0.2), "aggregate_trimmed_avg", (0.2,)),
        (Krum(ATTACKERS), "aggregate_krum", (ATTACKERS, 0)),
        (MultiKrum(ATTACKERS), "aggregate_krum", (ATTACKERS, CLIENTS - ATTACKERS - 2)),
        (Bulyan(ATTACKERS), "aggregate_bulyan", (ATTACKERS,)),
    ],
    ids=["median", "trimmed_mean", "krum", "multi_krum", "bulyan"],
)
def test_a_reducer_is_flowers(reducer, name, arguments, seed):
    leaves = cohort(seed)
    more = {"aggregation_rule": flower.aggregate_krum, "to_keep": 0} if "bulyan" in name else {}
    same(ours(reducer, leaves), theirs(name, leaves, *arguments, **more))


def test_the_weighted_mean_is_flowers():
    leaves, weight = cohort(2), np.arange(1, CLIENTS + 1)
    same(ours(Mean(), leaves, weight), theirs("aggregate", leaves, weight=weight))


def test_flowers_multi_krum_weighs_those_it_chose():
    """The one difference: as a robust reducer, ours counts each of them once (arXiv 1703.02757)."""
    leaves, weight = cohort(3), np.arange(1, CLIENTS + 1)
    keep = CLIENTS - ATTACKERS - 2
    found = theirs("aggregate_krum", leaves, ATTACKERS, keep, weight=weight)
    shares = MultiKrum(ATTACKERS).shares(leaves, weight)
    assert (shares > 0).sum() == keep
    weighed = np.where(shares > 0, weight, 0.0)
    same([np.tensordot(weighed / weighed.sum(), leaf, 1) for leaf in leaves], found)
    even = ours(MultiKrum(ATTACKERS), leaves, weight)
    assert max(np.abs(x - y).max() for x, y in zip(even, found, strict=True)) > 1e-3
