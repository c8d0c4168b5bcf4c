"""What several files make of the vectors of the server side."""

import numpy as np
import pytest

from spear_jax.federated.aggregation.lora_rules.base import Uploads
from spear_jax.models.params import Adapter, LowRank


@pytest.fixture(scope="session")
def uploads():
    """Builds `Uploads` of one projection and one layer from lists of a_k and b_k.

    Clients started from `start`, zeros by default; ranks below the first's are padded.
    """

    def build(a, b, weight, start=None, starts=None, scale=1.0, rate=1.0, round=1):
        weight = np.array(weight, float)
        own = weight > 0
        rank = max(np.shape(x)[1] for x in a)
        wide = [np.pad(np.array(x, float), ((0, 0), (0, rank - np.shape(x)[1]))) for x in a]
        high = [np.pad(np.array(x, float), ((0, rank - len(x)), (0, 0))) for x in b]
        ended = LowRank(np.array(wide)[own, None], np.array(high)[own, None])
        if starts is None:
            starts = [start or (0 * wide[0], 0 * high[0])] * len(a)
        began = LowRank(
            np.array([x for x, _ in starts], float)[own, None],
            np.array([y for _, y in starts], float)[own, None],
        )
        return Uploads(
            clients=np.flatnonzero(own),
            starts=Adapter(q=began),
            updates=Adapter(q=LowRank(ended.a - began.a, ended.b - began.b)),
            shares=weight[own] / weight[own].sum(),
            even=np.ones(own.sum()) / own.sum(),
            scale=scale,
            rate=rate,
            round=round,
        )

    return build


@pytest.fixture(scope="session")
def adapter():
    """Builds an adapter of one projection and one layer, float64 on the host."""
    return lambda a, b: Adapter(q=LowRank(np.array(a, float)[None], np.array(b, float)[None]))
