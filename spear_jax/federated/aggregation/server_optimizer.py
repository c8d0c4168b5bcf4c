"""Server optimisers: optax transformations that turn the reduced update into the server's step.

With g the reduced update, average − θ for the mean:

    fedavg      θ ← θ + η g
    fedavgm     m ← β1 m + g;  θ ← θ + η m
    fedadam     m ← β1 m + (1 − β1) g;  v ← β2 v + (1 − β2) g²;  θ ← θ + η m / (√v + τ)
    fedyogi     as fedadam with v ← v + (1 − β2) g² sign(g² − v)
    fedadagrad  as fedadam with v ← v + g²

Moments start at m = 0 and v = τ².

Source: FedAvg (arXiv 1602.05629), FedAvgM (arXiv 1909.06335), FedAdagrad, FedAdam and FedYogi
(arXiv 2003.00295). Departure: no bias correction, as in the paper.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spear_jax.models.params import Adapter

# `last` and `local` are plain averaging with η 1: of the last client alone, of each client alone.
RULES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "last", "local")
WITH_VARIANCE = ("fedadam", "fedyogi", "fedadagrad")


@functools.cache
def server_optimizer(
    rule: str, rate: float = 1.0, beta1: float = 0.9, beta2: float = 0.99, tau: float = 5e-3
) -> optax.GradientTransformation:
    """Returns the transformation g -> step that is added to the global adapter.

    Args:
        rule: one of RULES.
        rate: η, the step along the update.
        beta1: momentum of fedavgm, and the first moment of the adaptive rules.
        beta2: the second moment of fedadam and fedyogi.
        tau: τ, added to the root.
    """
    rate = 1.0 if rule in ("last", "local") else rate

    def init(adapter: Adapter) -> dict[str, Any]:
        state = {}
        if rule == "fedavgm" or rule in WITH_VARIANCE:
            state["m"] = jax.tree.map(jnp.zeros_like, adapter)
        if rule in WITH_VARIANCE:
            state["v"] = jax.tree.map(lambda x: jnp.full_like(x, tau**2), adapter)
        return state

    def update(g: Adapter, state: dict[str, Any], adapter: Adapter | None = None):
        state, step = dict(state), g
        if rule == "fedavgm":
            step = state["m"] = jax.tree.map(lambda m, g: beta1 * m + g, state["m"], g)
        elif rule in WITH_VARIANCE:
            blend = lambda m, g: beta1 * m + (1 - beta1) * g
            state["m"] = jax.tree.map(blend, state["m"], g)
            second = functools.partial(_second_moment, rule, beta2)
            state["v"] = jax.tree.map(lambda v, g: second(v, g * g), state["v"], g)
            step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), state["m"], state["v"])
        return jax.tree.map(lambda s: rate * s, step), state

    return optax.GradientTransformation(init, update)


def _second_moment(rule: str, beta2: float, v: jax.Array, square: jax.Array) -> jax.Array:
    if rule == "fedadam":
        return beta2 * v + (1 - beta2) * square
    if rule == "fedyogi":
        return v + (1 - beta2) * square * jnp.sign(square - v)
    return v + square


def from_optax(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optax optimiser as a server optimiser: it sees −g, the pseudo-gradient.

    For example, `from_optax(optax.sgd(1.0))` is fedavg. The optimiser gets each layer's matrices as
    leaves of their own: what it does for every tensor, such as LAMB's trust ratio, does not depend
    on how layers are stored.
    """

    def init(adapter: Adapter) -> Any:
        return optimizer.init(_unstacked(adapter))

    def update(g: Adapter, state: Any, adapter: Adapter | None = None):
        gradient = _unstacked(jax.tree.map(jnp.negative, g))
        steps, state = optimizer.update(gradient, state, _unstacked(adapter))
        stack = lambda like, step: jnp.stack(step) if like.ndim > 2 else step
        return jax.tree.map(stack, g, steps), state

    return optax.GradientTransformation(init, update)


def _unstacked(tree: Any) -> Any:
    """The tree with a list of L' matrices in place of each stack [L', in, out]."""
    return jax.tree.map(lambda x: list(x) if x.ndim > 2 else x, tree)
