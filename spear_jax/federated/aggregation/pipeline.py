"""Aggregation, put together: client transforms, a reducer, and a server optimiser."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spear_jax.core import pytrees
from spear_jax.core.errors import unknown
from spear_jax.federated.aggregation.reducers import REDUCERS, Mean, Reducer
from spear_jax.federated.aggregation.server_optimizer import server_optimizer
from spear_jax.federated.state import ServerState
from spear_jax.models.params import Adapter

# One client's update θ_k − θ to what it sends; pure, inside the device program, leaves as they are.
ClientTransform = Callable[[Adapter], Adapter]


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """How a round's updates become the next global adapter; static and hashable.

    Attributes:
        reducer: brings the clients' adapters together.
        optimizer: turns the reduced update into the server's step.
        transforms: change each client's update, one after the other, before it is reduced.
    """

    reducer: Reducer = Mean()
    optimizer: optax.GradientTransformation = server_optimizer("fedavg")
    transforms: tuple[ClientTransform, ...] = ()

    def transform(self, start: Adapter, adapter: Adapter) -> Adapter:
        """Returns one client's adapter with its update transformed. Args: start: the global one."""
        if not self.transforms:
            return adapter
        update = jax.tree.map(jnp.subtract, adapter, start)
        for transform in self.transforms:
            update = transform(update)
        return jax.tree.map(jnp.add, start, update)


def make_aggregation(
    rule: str, reducer: str | Reducer, rate: float, beta1: float, beta2: float, tau: float
) -> Aggregation:
    """Builds the aggregation of a config (its group `federation`).

    Args: rule: one of `server_optimizer.RULES`; `last` is the reducer of that name. reducer: a key
        of REDUCERS, or a reducer itself. The others: see `server_optimizer`.
    Raises: UserError for an unknown reducer.
    """
    return Aggregation(
        find_reducer("last" if rule == "last" else reducer),
        server_optimizer(rule, rate, beta1, beta2, tau),
    )


def find_reducer(reducer: str | Reducer) -> Reducer:
    """Returns the reducer of that name, or the reducer itself."""
    if isinstance(reducer, Reducer):
        return reducer
    if reducer not in REDUCERS:
        raise unknown("reducer (federation.reducer)", reducer, REDUCERS)
    return REDUCERS[reducer]()


def init_server(
    aggregation: Aggregation, adapter: Adapter, algorithm_state: Any, key: jax.Array
) -> ServerState:
    """Returns the server before round 1. Args: key: the run's root key."""
    moments = aggregation.optimizer.init(adapter)
    return ServerState(adapter, moments, algorithm_state, jnp.int32(0), jax.random.key_data(key))


def aggregate(
    aggregation: Aggregation, state: ServerState, reduced: Any
) -> tuple[ServerState, jax.Array]:
    """Finishes the reduction and takes one server step.

    A streaming reducer finishes inside the compiled step. A collecting one finishes before it, on
    the host, where numpy will do; it is not asked where nobody trained.

    Args: reduced: the reducer's state after the whole cohort.
    Returns: the next state (round + 1); the norm of the adapter's change, float32[].
    """
    if not aggregation.reducer.collects:
        return _finish_and_step(aggregation, state, reduced)
    if not np.any(reduced[1] > 0):  # nobody trained: there is nothing to finish
        return _compiled_step(aggregation, state, state.lora, 0.0)
    update, mass = aggregation.reducer.finish(reduced, state.lora)
    return _compiled_step(aggregation, state, update, mass)


def server_step(
    aggregation: Aggregation, state: ServerState, update: Adapter, mass: jax.typing.ArrayLike
) -> tuple[ServerState, jax.Array]:
    """Moves the global adapter along an update.

    Args: mass: float32[], the weight behind the update. Where it is 0 nobody trained, and adapter
        and moments stay as they are.
    """
    adapter = state.lora
    step, moments = aggregation.optimizer.update(update, state.opt_state, adapter)
    moved = jax.tree.map(jnp.add, adapter, step)
    trained = jnp.asarray(mass) > 0
    moved, moments = pytrees.where(trained, (moved, moments), (adapter, state.opt_state))
    change = pytrees.global_norm(jax.tree.map(jnp.subtract, moved, adapter))
    after = dataclasses.replace(state, lora=moved, opt_state=moments, round=state.round + 1)
    return after, change


_compiled_step = jax.jit(server_step, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _finish_and_step(aggregation, state, reduced):
    return server_step(aggregation, state, *aggregation.reducer.finish(reduced, state.lora))
