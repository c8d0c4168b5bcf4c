"""Functions over pytrees."""

import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.core import pytrees


@pytest.mark.parametrize("count", [1, 3])
def test_each_gives_what_vmap_gives_and_does_not_map_one_alone(count):
    ranks = []

    def function(x, y, z):
        ranks.append(x["a"].ndim)
        return {"sum": x["a"].sum() + y, "z": z}

    x, y = {"a": jnp.arange(2.0 * count * 4).reshape(2, count, 4)}, jnp.arange(float(count))
    found = pytrees.vmap_or_single(function, in_axes=(1, 0, None))(x, y, jnp.ones(5))
    wanted = np.asarray(x["a"]).sum((0, 2)) + np.arange(count)
    np.testing.assert_array_equal(found["sum"], wanted)
    assert found["z"].shape == (count, 5) and ranks == [2]
