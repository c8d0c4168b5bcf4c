"""Aggregation: the cohort's adapters become the next global adapter.

Source: FedAvg (arXiv 1602.05629), FedAvgM (arXiv 1909.06335), FedAdagrad, FedAdam and FedYogi
(arXiv 2003.00295).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spear_jax.core import pytrees
from spear_jax.core.errors import UserError, unknown
from spear_jax.federated.state import ServerState

RULES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "last", "local")
WITH_VARIANCE = ("fedadam", "fedyogi", "fedadagrad")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Static settings of the aggregation rule.

    Attributes:
        rule: one of RULES. `last` repeats the published SPEAR code, whose clients share storage:
            the last trained client overwrites all others. `local` never averages: every client
            keeps an adapter of its own.
        rate: η, the step along the averaged update.
        beta1: momentum (fedavgm, and the first moment of the adaptive rules).
        beta2: second moment (fedadam, fedyogi).
        tau: τ, added to the root; moments start at τ².
    """

    rule: str
    rate: float
    beta1: float
    beta2: float
    tau: float


def check_server(config: ServerConfig) -> None:
    """Raises UserError for a value out of range."""
    if config.rule not in RULES:
        raise unknown("aggregation rule (federation.aggregation)", config.rule, RULES)
    if config.rate <= 0 or config.tau <= 0:
        raise UserError(
            f"federation.server_rate is {config.rate} and federation.tau is {config.tau}; both "
            f"must be positive."
        )
    for name, value in (("beta1", config.beta1), ("beta2", config.beta2)):
        if not 0 <= value < 1:
            raise UserError(f"federation.{name} is {value}; it must lie in [0, 1).")


def init_server(
    config: ServerConfig, lora: dict, algorithm_state: Any, key: jax.Array
) -> ServerState:
    """The state before round 1: zero momentum, variance τ²."""
    opt_state = {}
    if config.rule not in ("fedavg", "last", "local"):
        opt_state["m"] = jax.tree.map(jnp.zeros_like, lora)
    if config.rule in WITH_VARIANCE:
        opt_state["v"] = jax.tree.map(lambda x: jnp.full_like(x, config.tau**2), lora)
    return ServerState(lora, opt_state, algorithm_state, jnp.int32(0), jax.random.key_data(key))


def aggregate(
    config: ServerConfig, state: ServerState, total: dict, mass: jax.Array
) -> tuple[ServerState, jax.Array]:
    """One server step.

    Args:
        total: Σ w_k θ_k over clients; mass: Σ w_k. A mass of 0 (nobody had a win) leaves adapter
            and moments as they are.
    Returns: the next state (round + 1); the norm of the adapter's change.

        average = Σ w_k θ_k / Σ w_k;  g = average − θ
        fedavg      θ ← θ + η g
        fedavgm     m ← β1 m + g;  θ ← θ + η m
        fedadam     m ← β1 m + (1 − β1) g;  v ← β2 v + (1 − β2) g²;  θ ← θ + η m / (√v + τ)
        fedyogi     as fedadam with v ← v + (1 − β2) g² sign(g² − v)
        fedadagrad  as fedadam with v ← v + g²
    """
    lora, opt = state.lora, dict(state.opt_state)
    safe = jnp.where(mass > 0, mass, 1.0)
    g = jax.tree.map(lambda t, old: t / safe - old, total, lora)
    if config.rule == "fedavgm":
        opt["m"] = jax.tree.map(lambda m, g: config.beta1 * m + g, opt["m"], g)
        step = opt["m"]
    elif config.rule in WITH_VARIANCE:
        opt["m"] = jax.tree.map(lambda m, g: config.beta1 * m + (1 - config.beta1) * g, opt["m"], g)
        opt["v"] = jax.tree.map(lambda v, g: _second_moment(config, v, g * g), opt["v"], g)
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.tau), opt["m"], opt["v"])
    else:
        step = g
    rate = 1.0 if config.rule in ("last", "local") else config.rate
    moved = jax.tree.map(lambda old, s: old + rate * s, lora, step)
    moved, opt = pytrees.where(mass > 0, (moved, opt), (lora, state.opt_state))
    change = pytrees.global_norm(jax.tree.map(jnp.subtract, moved, lora))
    return state.replace(lora=moved, opt_state=opt, round=state.round + 1), change


def _second_moment(config: ServerConfig, v: jax.Array, square: jax.Array) -> jax.Array:
    if config.rule == "fedadam":
        return config.beta2 * v + (1 - config.beta2) * square
    if config.rule == "fedyogi":
        return v + (1 - config.beta2) * square * jnp.sign(square - v)
    return v + square
