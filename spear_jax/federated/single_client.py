"""The round of one client by itself, as a real device runs it, and the round that such clients make.

update = client_round(federation, adapter, algorithm_state, client, round, key)
result = join_updates(federation, state, used, cohort, {client: update, ...})

Where the server is to know sums alone, clients `hide` their updates and `join_sum` ends the round.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core import types
from spear_jax.core.mesh import to_host
from spear_jax.core.types import Cohort, TraceRecord
from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.federated.aggregation.reducers import Mean
from spear_jax.federated.federation import Federation
from spear_jax.federated.local_training import NOT_FINITE
from spear_jax.federated.privacy.client_side import clipped
from spear_jax.federated.round import (
    NOTHING_USED,
    RoundResult,
    TrainedClients,
    check_finite,
    end_cohort,
    train_clients,
    train_nobody,
    with_budget,
)
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.state import ServerState
from spear_jax.models.params import Adapter

# numbers of clients of which the largest counts, or their sum, where their rounds are joined
LARGEST = ("time/", "feedback/tokens_of_most")
SUMMED = ("rollout/tokens", "rollout/wins", "rollout/loses", "feedback/", "round/flops")


@dataclasses.dataclass(frozen=True)
class ClientUpdate:
    """What one client sends after its round, and what stays with it.

    Attributes:
        update: θ_k - θ, float32; zeros where the client did not train.
        weight: its aggregation weight, before the reducer weighs; 0 where its update is not finite.
        active: whether it had something to train on.
        counts: training metrics as (total, count), to be added over clients.
        metrics: numbers of its rollouts by name.
        answers: (first answers, wrong ones among them), over which clients' fractions are averaged.
        learning_rate: of the round.
        gradient: what it sends beside its update (`Drift.gather` of it alone); None: nothing.
        personal: its own adapter under Ditto, which does not leave it; None: it has none.
        client_state: its part of the algorithm's state, which never leaves it.
        traces: what was said, which does not leave it either.
    """

    update: Adapter
    weight: float
    active: bool
    counts: dict[str, types.Mean]
    metrics: dict[str, float]
    answers: tuple[int, int]
    learning_rate: float
    client_state: dict
    traces: list[TraceRecord]
    gradient: Any = None
    personal: Adapter | None = None


def client_round(
    federation: Federation,
    adapter: Adapter,
    algorithm_state: dict,
    client: int,
    round: int,
    key: jax.Array,
    used: BudgetUsed = NOTHING_USED,
    kept: dict[str, Any] = {},  # noqa: B006 (never changed)
) -> ClientUpdate:
    """Runs one client's round by itself, as a real device would.

    The weighted mean of all clients' updates is the round's update (`run_round` computes the same
    for a whole cohort in one program). One departure: IRIS measures its gap on this client alone.

    Args:
        adapter: the global adapter θ.
        algorithm_state: the server's part and this client's own.
        round: 1-based.
        key: the run's root key.
        used: what the run has used before the round; it sets the learning rate.
        kept: the server's `aggregation_state`.
    """
    cohort = federation.cohort_of([client], round)
    whole = federation.aggregation
    federation = dataclasses.replace(federation.on_base(kept), sampling="uniform")  # always one
    alone = Aggregation(_Alone(), transforms=whole.client_transforms, drift=whole.drift)
    start = federation.on_devices(adapter)
    trained = train_clients(federation, alone, start, algorithm_state, cohort, key, used, kept)
    began = start
    if trained.starts is not None:
        began = jax.tree.map(lambda x: x[0], trained.starts)
    update, mass = alone.reducer.finish(trained.reduced, began)
    return ClientUpdate(
        update=update if float(mass) else jax.tree.map(jnp.zeros_like, start),
        weight=0.0 if trained.not_finite else float(trained.method_weight[0]),
        active=bool(trained.active[0]),
        counts=trained.means,
        metrics=trained.metrics,
        answers=trained.answers,
        learning_rate=trained.learning_rate,
        client_state={
            name: trained.algorithm_state[name] for name in federation.algorithm.client_state
        },
        traces=trained.traces,
        gradient=trained.gathered,
        personal=trained.personal and jax.tree.map(lambda x: x[0], trained.personal[0]),
    )


def join_updates(
    federation: Federation,
    state: ServerState,
    used: BudgetUsed,
    cohort: Cohort,
    updates: Mapping[int, ClientUpdate],
) -> RoundResult:
    """Ends a round of clients that trained by themselves (`client_round`), as a real server would.

    The clients that sent nothing do not count; under central privacy they add zero, and the
    denominator stays. The state's parts of clients stay as they are. Without any update it is the
    round of an empty cohort: nothing moves, or by noise alone.

    Args: updates: by client, of some of the cohort.
    """
    own = [updates[client] for client in cohort.clients if client in updates]
    cohort = federation.cohort_of([c for c in cohort.clients if c in updates], cohort.round)
    aggregation, start = federation.aggregation, federation.on_devices(state.lora)
    if own:
        trained = _trained(federation, state, start, cohort, own)
    else:
        key = jax.random.wrap_key_data(jnp.asarray(to_host(state.key)))
        trained = train_nobody(
            federation, aggregation, start, state.algorithm_state, cohort, key, used,
            state.aggregation_state,
        )  # fmt: skip
    result = end_cohort(
        federation, aggregation, dataclasses.replace(state, lora=start), cohort, trained
    )
    check_finite(result.metrics, cohort.round)
    return with_budget(result, used)


def hide(
    federation: Federation, client: int, update: ClientUpdate, kept: Mapping[str, Any]
) -> tuple[Any, dict[str, types.Mean]]:
    """Returns what a client adds to its cohort's secure sum: w δ of what it sends, leaves float64,
    and its weight, counts and metrics, as (total, count).

    Only sums of them are read, so that `join_sum` takes the mean of what `join_metrics` takes the
    largest of.

    Args: kept: the server's `aggregation_state`, of which privacy's bound is read.
    """
    aggregation, sent = federation.aggregation, update.update
    secure, privacy = aggregation.secure_sum, aggregation.privacy
    assert secure is not None
    weight = aggregation.weights_of(np.array([update.weight]), np.array([update.active]), [client])
    mass = 0.0 if update.counts[NOT_FINITE].total else float(weight[0])
    if privacy is not None:  # nobody else can: what rounding may add is left free
        size = sum(x.size for x in jax.tree.leaves(sent))
        bound = float(kept["bound"]) - secure.rounding(size)
        sent = jax.tree.map(lambda x: x[0], clipped(vectors.add_axis(sent), max(0.0, bound)))
    told = {"own/weight": types.Mean(mass, 1.0), "own/active": types.Mean(float(update.active), 1)}
    told |= {f"count/{name}": x for name, x in update.counts.items()}
    for name, value in update.metrics.items():
        one = name.startswith((*LARGEST, *SUMMED))
        share = 1.0 if one else float(update.answers[name == "rollout/fixed"])
        told[f"metric/{name}"] = types.Mean(value * share, share)
    hidden = jax.tree.map(lambda x: mass * np.asarray(x, np.float64), sent)
    cut = [np.abs(x) > secure.bound for x in jax.tree.leaves(hidden)]
    told["metric/secure/clipped"] = types.Mean(
        float(sum(x.sum() for x in cut)), float(sum(x.size for x in cut))
    )
    return hidden, told


def join_sum(
    federation: Federation,
    state: ServerState,
    used: BudgetUsed,
    cohort: Cohort,
    total: Any,
    told: Mapping[str, types.Mean],
) -> RoundResult:
    """Ends a round of clients of which the server knows sums alone (`hide`).

    Args: cohort: the clients whose numbers are in the sums; total: Σ w_k δ_k, leaves float64.
    """
    start, clients = federation.on_devices(state.lora), len(cohort.clients)
    aggregation = dataclasses.replace(federation.aggregation, secure_sum=None)
    mass, active = told["own/weight"].total, np.arange(clients) < round(told["own/active"].total)
    named = lambda kind: {
        name.removeprefix(kind): x for name, x in told.items() if name.startswith(kind)
    }
    metrics = {
        name: float(x.total) if name.startswith(SUMMED) else x.value()
        for name, x in named("metric/").items()
    }
    lora = jax.tree.map(lambda x, s: np.float32(np.asarray(x, np.float64) * mass + s), start, total)
    trained = TrainedClients(
        (federation.on_devices(lora), jnp.float32(mass)),
        state.algorithm_state,
        named("count/"),
        metrics,
        [],
        federation.schedule.learning_rate(cohort.round, used.tokens, used.seconds),
        starts=None,
        gathered=None,
        personal=None,
        weight=np.full(clients, mass / clients),
        method_weight=np.full(clients, mass / clients),
        steps=np.full(clients, federation.algorithm.common.steps),
        not_finite=[],
        outcome=None,
        active=active,
        sent=np.ones(clients, bool),
    )
    result = end_cohort(
        federation, aggregation, dataclasses.replace(state, lora=start), cohort, trained
    )
    check_finite(result.metrics, cohort.round)
    return with_budget(result, used)


def _trained(
    federation: Federation,
    state: ServerState,
    start: Adapter,
    cohort: Cohort,
    own: Sequence[ClientUpdate],
) -> TrainedClients:
    """The cohort's updates, summed or collected. Args: own: at least one, in the cohort's order."""
    aggregation = federation.aggregation
    active = np.array([one.active for one in own])
    finite = [bool(vectors.finite(vectors.add_axis(to_host(one.update)))[0]) for one in own]
    told = [not one.counts[NOT_FINITE].total for one in own]
    left_out = [c for c, *good in zip(cohort.clients, finite, told, strict=True) if not all(good)]
    raw = np.array([one.weight for one in own])
    weight = aggregation.weights_of(raw, active, cohort.clients)
    weight = np.where(np.isin(cohort.clients, left_out), np.float32(0), weight)
    nothing = jax.tree.map(np.zeros_like, own[0].update)  # by selection: 0 times NaN is NaN
    updates = [one.update if good else nothing for one, good in zip(own, finite, strict=True)]
    counts = jax.tree.map(lambda *x: sum(x), *(one.counts for one in own))
    return TrainedClients(
        _reduced(aggregation, start, updates, weight),
        state.algorithm_state,
        counts | {NOT_FINITE: types.Mean(float(len(left_out)), float(active.sum()))},
        join_metrics(own),
        [record for one in own for record in one.traces],
        own[0].learning_rate,
        starts=None,
        gathered=None,
        personal=None,
        weight=weight,
        method_weight=raw,
        steps=np.full(len(own), federation.algorithm.common.steps),
        not_finite=left_out,
        outcome=None,
        active=active,
        sent=active | aggregation.counts_everybody,
    )


def _reduced(
    aggregation: Aggregation, start: Adapter, updates: Sequence[Adapter], weight: np.ndarray
) -> Any:
    """Adds clients one by one, as a cohort's program does; collects them where the aggregation does.

    What is added is clipped once more, since the client may not have done so.

    Args: weight: float32[C].
    """
    adapter = lambda update: jax.tree.map(jnp.add, start, update)
    if aggregation.collects:
        stack = lambda *x: np.stack(x)
        return jax.tree.map(stack, *(to_host(adapter(update)) for update in updates)), weight
    reduced = aggregation.reducer.init(start)
    for update, mass in zip(updates, weight, strict=True):
        reduced = _add(aggregation, reduced, start, update, mass[None])
    return reduced


@functools.partial(jax.jit, static_argnums=0)
def _add(aggregation: Aggregation, state: Any, start: Adapter, update: Adapter, weight: Any) -> Any:
    update = aggregation.transformed(update, aggregation.clips)
    adapters = jax.tree.map(lambda x, y: (x + y)[None], start, update)
    return aggregation.reducer.add(state, adapters, weight)


def join_metrics(updates: Sequence[ClientUpdate | TrainedClients]) -> dict[str, float]:
    """Joins numbers of rollouts: counts are summed, fractions averaged over first answers (over the
    wrong ones for what was fixed), and of LARGEST the largest is taken.
    """
    metrics = {}
    for name in sorted({name for one in updates for name in one.metrics}):
        known = [one for one in updates if name in one.metrics]
        values = [one.metrics[name] for one in known]
        if name.startswith(LARGEST):
            metrics[name] = max(values)
        elif name.startswith(SUMMED):
            metrics[name] = float(np.sum(values))
        else:
            mass = [one.answers[name == "rollout/fixed"] for one in known]
            metrics[name] = float(np.average(values, weights=mass if any(mass) else None))
    return metrics


@dataclasses.dataclass(frozen=True)
class _Alone(Mean):
    """The mean of a cohort of one: its update, whatever its weight."""

    def weights(self, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
        return active.astype(np.float32)
