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
(adapters [C, ...], weight [C]) as the state and runs on the host, so numpy will do. Robust reducers
are of this kind; they stand in `robust/`, one file a paper.

Where the result is Σ p_k δ_k for shares p, a reducer says so (`yields_shares`). A LoRA rule that
needs every client's factors takes the shares in place of the update.

Source: FedAvg (arXiv 1602.05629).
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.federated.aggregation import vectors
from spear_jax.models.params import Adapter

# One client's update θ_k − θ to what it sends; pure, inside the device program, leaves as they are.
ClientTransform = Callable[[Adapter], Adapter]


class Reducer(abc.ABC):
    """Reduces a cohort's adapters to one update of the global adapter.

    Class attributes:
        collects: whether `finish` needs every client's adapter.
        yields_shares: whether the update is Σ p_k δ_k for the p of `shares`.
    """

    collects: ClassVar[bool] = False
    yields_shares: ClassVar[bool] = False

    @property
    def transforms(self) -> tuple[ClientTransform, ...]:
        """Returns what is done to each client's update before it is added."""
        return ()

    @property
    def fewest(self) -> int:
        """Returns how many clients must have trained; with fewer of them the round fails."""
        return 1

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

    def shares(self, updates: Any, weight: np.ndarray) -> np.ndarray:
        """Returns p_k, float64[n], in sum 1; only where `yields_shares`.

        Args: updates: of n clients that trained, leaves [n, ...]; weight: float[n], above 0.
        """
        raise NotImplementedError(f"{type(self).__name__} yields no shares")

    def init_kept(self, adapter: Adapter) -> dict[str, Any]:
        """Returns the host arrays that are kept from round to round; part of the checkpoint."""
        return {}

    def reduce(
        self, adapters: Adapter, weight: np.ndarray, start: Adapter, kept: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Reduces a cohort whose adapters are on the host.

        Args: adapters: leaves [C, ...]; weight: float[C], 0 for clients that do not count; kept:
            from the round before.
        Returns: update and mass as `finish`; what is kept.
        """
        if self.yields_shares:
            own = np.asarray(weight) > 0
            updates = vectors.less(vectors.take(adapters, own), start)
            shares = self.shares(updates, np.asarray(weight)[own])
            return vectors.weighted_sum(shares, updates), own.sum(), kept
        state = (adapters, weight)
        if not self.collects:
            state = self.add(self.init(start), adapters, jnp.asarray(weight))
        return *self.finish(state, start), kept


@dataclasses.dataclass(frozen=True)
class Mean(Reducer):
    """The weighted mean Σ w_k θ_k / Σ w_k, less the global adapter; memory of one adapter."""

    yields_shares: ClassVar[bool] = True

    def shares(self, updates: Any, weight: np.ndarray) -> np.ndarray:
        return np.asarray(weight, np.float64) / np.sum(weight, dtype=np.float64)

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
