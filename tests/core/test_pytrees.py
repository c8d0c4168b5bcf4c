"""Functions over pytrees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.core import pytrees
from spear_jax.models.params import Adapter, DecoderParams, KeyValues, LayerParams, LowRank
from spear_jax.rollout.decode import DecodeState, GrowingCompletions


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


TYPED = (Adapter, DecoderParams, DecodeState, GrowingCompletions, KeyValues, LayerParams, LowRank)


@pytest.mark.parametrize("kind", TYPED)
def test_fields_flatten_in_the_order_of_a_dict(kind):
    names = [field.name for field in dataclasses.fields(kind)]
    tree = kind(**{name: number for number, name in enumerate(names)})
    assert jax.tree.leaves(tree) == jax.tree.leaves({n: i for i, n in enumerate(names)})


def test_typed_trees_are_saved_as_the_dicts_of_version_0_10_and_come_back():
    pair = lambda x: LowRank(np.full((1, 2, 3), x, np.float32), np.full((1, 3, 2), x + 1.0))
    adapter = Adapter(q=pair(1.0), down=pair(3.0))
    tree = {"lora": adapter, "memory": {"opponents": (adapter,), "used": np.int32(4)}}
    plain = {
        name: {"a": adapter.by_name()[name].a, "b": adapter.by_name()[name].b}
        for name in ("q", "down")
    }
    want = {"lora": plain, "memory": {"opponents": (plain,), "used": np.int32(4)}}
    dicts = pytrees.to_dicts(tree)
    assert jax.tree.structure(dicts) == jax.tree.structure(want)
    assert pytrees.digest(dicts) == pytrees.digest(want) != pytrees.digest(tree)
    like = jax.tree.map(np.zeros_like, tree)
    again = pytrees.from_dicts(dicts, like)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
