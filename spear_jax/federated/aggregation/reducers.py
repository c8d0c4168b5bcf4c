"""Reducers: a cohort's adapters become one.

A round aggregates in three steps: client transforms change each client's update, a reducer brings
the updates together, and a server optimiser moves the global adapter along the result.

A streaming reducer never sees all clients at once. It adds chunk after chunk inside the device
program, so memory does not grow with the cohort:

    state = reducer.init(start)                             # adapter
    state = reducer.add(state, adapters, weight)            # [n, ...] adapters of a chunk
    state = reducer.merge(states)                           # [m, ...] states of devices or chunks
    update, mass = reducer.finish(state, start)

A collecting reducer (`collects = True`) gets every client's adapter at the end. Its `finish` takes
(adapters [C, ...], weight [C]) as the state and runs on the host, so numpy will do.

Source: FedAvg (arXiv 1602.05629); coordinate-wise median: Yin et al. (arXiv 1803.01498).
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.models.params import Adapter


class Reducer(abc.ABC):
    """Reduces a cohort's adapters to one update of the global adapter.

    Class attributes:
        collects: whether `finish` needs every client's adapter.
    """

    collects: ClassVar[bool] = False

    def weights(self, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Returns the clients' weights, float[C], before anything is added.

        Args:
            weight: float[C], from the method; 0 for a client that did not train.
            active: bool[C], the clients that trained.
        """
        return weight

    def init(self, start: Adapter) -> Any:
        """Returns the state before the first client. Args: start: the global adapter."""
        return ()

    def add(self, state: Any, adapters: Adapter, weight: jax.Array) -> Any:
        """Adds a chunk of clients. Args: adapters: leaves [n, ...]; weight: float32[n]."""
        return state

    def merge(self, states: Any) -> Any:
        """Merges states that were built apart. Args: states: leaves with a leading axis [m]."""
        return states

    @abc.abstractmethod
    def finish(self, state: Any, start: Adapter) -> tuple[Adapter, jax.Array]:
        """Returns the update of the global adapter, and the mass float32[] behind it (0: nobody
        trained, and the update is not read).
        """


@dataclasses.dataclass(frozen=True)
class Mean(Reducer):
    """The weighted mean Σ w_k θ_k / Σ w_k, less the global adapter; memory of one adapter."""

    def init(self, start: Adapter) -> Any:
        return jax.tree.map(jnp.zeros_like, start), jnp.float32(0)

    def add(self, state: Any, adapters: Adapter, weight: jax.Array) -> Any:
        total, mass = state
        add = lambda total, x: total + jnp.tensordot(weight, x, axes=1)
        return jax.tree.map(add, total, adapters), mass + weight.sum()

    def merge(self, states: Any) -> Any:
        return jax.tree.map(lambda x: x.sum(0), states)

    def finish(self, state: Any, start: Adapter) -> tuple[Adapter, jax.Array]:
        total, mass = state
        safe = jnp.where(mass > 0, mass, 1.0)
        return jax.tree.map(lambda t, old: t / safe - old, total, start), mass


@dataclasses.dataclass(frozen=True)
class Last(Mean):
    """The last client that trained overwrites all others, as in the published SPEAR code, whose
    clients share storage (A1).
    """

    def weights(self, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
        only = np.zeros_like(weight)
        trained = np.flatnonzero(active)
        if len(trained):
            only[trained[-1]] = 1.0
        return only


@dataclasses.dataclass(frozen=True)
class CoordinateMedian(Reducer):
    """The median of every coordinate over the clients that trained; their weights do not count.

    Two middle values are averaged, as numpy does. Fewer than half of the clients cannot move a
    coordinate out of the others' range.
    """

    collects: ClassVar[bool] = True

    def finish(self, state: Any, start: Adapter) -> tuple[Adapter, jax.Array]:
        adapters, weight = state
        there = weight > 0
        count = there.sum()
        low, high = jnp.maximum(0, (count - 1) // 2), count // 2

        def median(x: jax.Array, old: jax.Array) -> jax.Array:
            ordered = jnp.sort(jnp.where(there.reshape(-1, *[1] * old.ndim), x, jnp.inf), axis=0)
            return (ordered[low] + ordered[high]) / 2 - old

        return jax.tree.map(median, adapters, start), count.astype(jnp.float32)


REDUCERS: dict[str, type[Reducer]] = {"mean": Mean, "median": CoordinateMedian, "last": Last}
