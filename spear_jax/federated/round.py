"""One round, as the paper has it: roll out with the global adapter, train the cohort, aggregate."""

import dataclasses
import functools
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms.base import CohortData
from spear_jax.core.errors import UserError
from spear_jax.core.mesh import broadcast_from_main, is_main_process, to_host
from spear_jax.core.rng import path_key, purpose
from spear_jax.core.surroundings import say
from spear_jax.core.types import Cohort, Mean, Tally, TraceRecord
from spear_jax.federated import cohort_training
from spear_jax.federated.aggregation.lora_rules.base import LoraRule, rank_of
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round
from spear_jax.federated.aggregation.reducers import Reducer
from spear_jax.federated.federation import Federation
from spear_jax.federated.local_training import NOT_FINITE, Broadcast
from spear_jax.federated.participation import Outcome
from spear_jax.federated.round_metrics import BudgetUsed, sum_over_clients, training_metrics
from spear_jax.federated.state import ClientStart, ClientState, ServerState
from spear_jax.models import cost_model
from spear_jax.models.params import Adapter
from spear_jax.packing.blocks import Keys, most_blocks, pack_rows
from spear_jax.packing.rows import groups_of
from spear_jax.rollout.policy import Policy

ROUND = purpose("round")
LOCAL = purpose("local")
PHASE = purpose("phase")

NOTHING_USED = BudgetUsed()


class RoundResult(NamedTuple):
    """A finished round.

    Attributes:
        metrics: numbers by the contract's names.
        traces: what the rollouts said, as it is recorded.
    """

    state: ServerState
    metrics: dict[str, float]
    traces: list[TraceRecord]


@dataclasses.dataclass
class TrainedClients:
    """A cohort behind its phases of rollouts and local training, before aggregation.

    Attributes:
        reduced: as in `cohort_training.TrainedCohort`.
        algorithm_state: after collecting.
        means: training metrics, summed over clients and phases.
        phases: what was collected in each phase.
        learning_rate: of the round.
        work: operations a weight of the base, for `cost_model.flops`.
        seconds: {"rollout", "train"}.
        starts: what clients started from, leaves [C, ...]; None: the global adapter.
        not_finite: ids of the clients whose training ended without a finite update.
        outcome: who has reported, on the simulated clock; None: there is none.
        active: bool[C], who had something to train on, lost clients among them.
        sent: bool[C], who has sent an update.
    """

    reduced: Any
    algorithm_state: dict
    means: dict[str, Mean]
    phases: list[CohortData]
    learning_rate: float
    work: float
    seconds: dict[str, float]
    starts: Adapter | None
    not_finite: list[int]
    outcome: Outcome | None
    active: np.ndarray
    sent: np.ndarray

    @property
    def traces(self) -> list[TraceRecord]:
        return [record for phase in self.phases for record in phase.traces]

    def rollout_metrics(self) -> dict[str, float]:
        """Numbers of the rollouts: means over phases, wins and loses summed."""
        first, counts = self.phases[0].metrics, ("rollout/wins", "rollout/loses")
        means = {name: float(np.mean([x.metrics[name] for x in self.phases])) for name in first}
        return means | {name: float(sum(x.metrics[name] for x in self.phases)) for name in counts}


@dataclasses.dataclass(frozen=True)
class ClientUpdate:
    """What one client sends after its round, and what stays with it.

    Attributes:
        update: θ_k - θ, float32; zeros where the client did not train.
        weight: its aggregation weight; 0 where it did not train.
        counts: training metrics as (total, count), to be added over clients.
        metrics: numbers of its rollouts.
        client_state: its part of the algorithm's state, which never leaves it.
        traces: what was said, which does not leave it either.
    """

    update: Adapter
    weight: float
    counts: dict[str, Mean]
    metrics: dict[str, float]
    client_state: dict
    traces: list[TraceRecord]


def run_round(federation: Federation, state: ServerState, used: BudgetUsed) -> RoundResult:
    """Runs the next round. Args: used: what the run has used before it."""
    cohort = federation.cohort(int(state.round) + 1)
    result = round_of(federation, state, used, cohort)
    check_finite(result.metrics, cohort.round)
    return with_budget(result, used)


def check_finite(metrics: dict[str, float], round: int) -> None:
    """Raises UserError where a round gave no adapter to go on with: no update was finite, or the
    new global adapter is not.
    """
    left_out = metrics["round/clients_not_finite"]
    trained = metrics["round/clients"] - metrics["round/clients_without_wins"]
    remedy = (
        f"Lower train.learning_rate or train.max_grad_norm, and start in a new --workdir; the "
        f"rounds before round {round} are kept."
    )
    if left_out and left_out >= trained:
        raise UserError(
            f"round {round}: the updates of all {int(left_out)} clients that trained are NaN or "
            f"infinite, and a round needs one that is finite. {remedy}"
        )
    if not math.isfinite(metrics["round/update_norm"]):
        raise UserError(
            f"round {round}: the new global adapter is NaN or infinite after the server's step, "
            f"and a round must end with a finite one. Lower federation.server_rate. {remedy}"
        )


def with_budget(result: RoundResult, used: BudgetUsed) -> RoundResult:
    """Adds the budget used, this round included, to a round's metrics."""
    metrics = result.metrics
    seconds = sum(metrics[f"time/{name}"] for name in ("rollout", "train", "aggregate"))
    budget = {
        "budget/tokens": used.tokens + metrics["rollout/tokens"],
        "budget/flops": used.flops + metrics["round/flops"],
        "budget/seconds": broadcast_from_main(used.seconds + seconds),
    }
    return result._replace(metrics=metrics | budget)


def round_of(
    federation: Federation, state: ServerState, used: BudgetUsed, cohort: Cohort
) -> RoundResult:
    """Runs a round of a given cohort: rollouts and local training, then one aggregation."""
    aggregation, kept = federation.aggregation, state.aggregation_state
    federation = federation.on_base(kept)
    # always placed alike, or the programs would compile again
    start = federation.on_devices(state.lora)
    root = jax.random.wrap_key_data(jnp.asarray(to_host(state.key)))
    train = train_clients if cohort.clients else train_nobody
    trained = train(federation, aggregation, start, state.algorithm_state, cohort, root, used, kept)
    began = time.perf_counter()
    before = dataclasses.replace(state, lora=start, algorithm_state={})
    state, moved, measured, rejected = end_round(
        aggregation, before, trained.reduced, cohort.clients, trained.starts
    )
    _tell_left_out(cohort.round, [*trained.not_finite, *rejected])
    change = float(moved)
    tally = federation.worker.tally
    state, told = _clock(federation, state, trained.outcome, cohort)
    means = dict(trained.means)
    left_out = means.pop(NOT_FINITE).total
    metrics: dict[str, float] = {
        **trained.rollout_metrics(),
        **training_metrics(federation.algorithm.name, means),
        **federation.worker.feedback.take_metrics(),
        "rollout/tokens": float(tally.generated),
        "round/clients": float(len(cohort.clients)),
        "round/clients_without_wins": float((~trained.active).sum()),
        "round/clients_not_finite": float(left_out),
        **_bytes(aggregation, start, kept, cohort, trained.sent),
        "round/update_norm": change,
        "round/rate": trained.learning_rate,
        "round/flops": cost_model.flops(federation.decoder.config, tally, trained.work),
        **{f"time/{name}": value for name, value in trained.seconds.items()},
        **measured,
        **told,
    }
    if aggregation.privacy is not None:
        metrics["round/failed"] = 0.0  # noise is added whoever reports
    if trained.outcome is not None:
        metrics["round/flops"] += trained.outcome.unrun
    ended = federation.algorithm.end_round(
        trained.algorithm_state, state.lora, metrics, cohort.round
    )
    metrics["time/aggregate"] = time.perf_counter() - began
    return RoundResult(dataclasses.replace(state, algorithm_state=ended), metrics, trained.traces)


def _bytes(
    aggregation: Aggregation, adapter: Adapter, kept: dict, cohort: Cohort, sent: np.ndarray
) -> dict[str, float]:
    """What travels: up from clients that send an update, down to all of the cohort."""
    up, down = aggregation.bytes_of_clients(adapter, kept, cohort.clients, cohort.round)
    return {"round/bytes_up": float(up[sent].sum()), "round/bytes_down": float(down.sum())}


def _clock(
    federation: Federation, state: ServerState, outcome: Outcome | None, cohort: Cohort
) -> tuple[ServerState, dict[str, float]]:
    """Moves the simulated clock, and says who took part."""
    if outcome is None or federation.participation is None:
        return state, {}
    kept = dict(state.aggregation_state)
    kept["clock"] = np.asarray(kept["clock"] + outcome.seconds)
    everybody = len(federation.clients) - (federation.aggregation.root is not None)
    asked = [client for client in cohort.clients if client != federation.aggregation.root]
    told = federation.participation.metrics(outcome, asked, everybody, float(kept["clock"]))
    return dataclasses.replace(state, aggregation_state=kept), told


def play(
    federation: Federation,
    adapter: Adapter,
    kept: dict[str, Any],
    cohort: Cohort,
    phases: list[CohortData],
    passes: float,
) -> Outcome | None:
    """Plays a round on the simulated clock, before its last phase trains; None: there is no clock.

    The server's own client always reports.

    Args: passes: over the weights, of a training token.
    """
    participation, aggregation = federation.participation, federation.aggregation
    if participation is None:
        return None
    clients = [client for client in cohort.clients if client != aggregation.root]
    up, down = aggregation.bytes_of_clients(adapter, kept, clients, cohort.round)
    active = phases[-1].active[: len(clients)]
    wanted = len(clients) if federation.sampling == "poisson" else federation.clients_per_round
    read = dict.fromkeys(cohort.clients, 0)
    for record in (record for phase in phases for record in phase.traces):
        for attempt in record.trace.attempts:
            read[record.trace.client] += len(attempt.prompt) + len(attempt.completion)
    rows = [sum(training_tokens(phase.rows[i]) for phase in phases) for i in range(len(clients))]
    flops = functools.partial(cost_model.flops, federation.decoder.config)
    outcome = participation.play(
        cohort.round,
        clients,
        wanted,
        federation.algorithm.common.steps,
        down,
        np.where(active | aggregation.counts_everybody, up, 0),
        np.array([flops(Tally(prompt=read[client]), 0.0) for client in clients]),
        np.array([flops(Tally(), passes * trained) for trained in rows]) * active,
    )
    if len(clients) == len(cohort.clients):
        return outcome
    last = lambda x, own: np.append(x, own)
    return dataclasses.replace(
        outcome,
        accepted=last(outcome.accepted, True),
        sent=last(outcome.sent, False),
        lost=last(outcome.lost, False),
    )


def training_tokens(steps: list) -> int:
    """Returns the tokens of a client's training rows. Args: steps: [S][A] lists of rows."""
    rows = [row for step in steps for micro in step for row in micro if row is not None]
    return sum(len(row.prompt) + len(row.completion) for row in rows)


def _tell_left_out(round: int, clients: list[int]) -> None:
    """Names the clients that are left out of a round's aggregation."""
    if clients and is_main_process():
        names = ", ".join(map(str, clients))
        say(f"warning: round {round}: not finite, and left out: client {names}", sys.stderr)


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
    whole, federation = federation.aggregation, federation.on_base(kept)
    alone = Aggregation(_Alone(), transforms=whole.client_transforms)
    start = federation.on_devices(adapter)
    trained = train_clients(federation, alone, start, algorithm_state, cohort, key, used, kept)
    began = start
    if trained.starts is not None:
        began = jax.tree.map(lambda x: x[0], trained.starts)
    update, mass = alone.reducer.finish(trained.reduced, began)
    last, state = trained.phases[-1], trained.algorithm_state
    return ClientUpdate(
        update=update if float(mass) else jax.tree.map(jnp.zeros_like, start),
        weight=float(last.weight[0]),
        counts=trained.means,
        metrics=trained.rollout_metrics(),
        client_state={name: state[name] for name in federation.algorithm.client_state},
        traces=trained.traces,
    )


@dataclasses.dataclass(frozen=True)
class _Alone(Reducer):
    """The adapter of a cohort of one."""

    def weights(self, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
        return active.astype(np.float32)

    def init(self, start: Adapter) -> Any:
        return jax.tree.map(jnp.zeros_like, start), jnp.float32(0)

    def add(self, state: Any, adapters: Adapter, weight: jax.Array) -> Any:
        total, mass = state
        chosen = lambda total, x: total + jnp.tensordot(weight, x, axes=1)
        return jax.tree.map(chosen, total, adapters), mass + weight.sum()

    def merge(self, states: Any) -> Any:
        return jax.tree.map(lambda x: x.sum(0), states)

    def finish(self, state: Any, start: Adapter) -> tuple[Adapter, jax.Array]:
        total, mass = state
        return jax.tree.map(jnp.subtract, total, start), mass


def train_clients(
    federation: Federation,
    aggregation: Aggregation,
    start: Adapter,
    algorithm_state: dict,
    cohort: Cohort,
    root: jax.Array,
    used: BudgetUsed,
    kept: dict[str, Any],
) -> TrainedClients:
    """Runs a cohort's phases of rollouts and local training.

    Args:
        start: the global adapter, on the devices.
        root: the run's key.
        kept: the server's `aggregation_state`.
    """
    algorithm, worker = federation.algorithm, federation.worker
    rule, slots = federation.aggregation.rule, {c: i for i, c in enumerate(cohort.clients)}
    local = dataclasses.replace(
        federation.local, trains=rule.trains(cohort.round), rank_penalty=rule.penalty
    )
    own, not_finite = clients_start(federation, start, kept, cohort), []
    outcome: Outcome | None = None
    key = path_key(root, ROUND, cohort.round)
    worker.tally.clear()
    # popped, so that merged weights are not held while clients train
    policies = [worker.policy(start)]
    if own is not None:
        policies = [Policy(federation.base, cohort_training.layers_first(own.lora), slots)]
    carried: list[ClientState] | None = None
    means: dict[str, Mean] = {}
    phases: list[CohortData] = []
    seconds = {"rollout": 0.0, "train": 0.0}
    rate, work = 0.0, 0.0
    progress = lambda count: worker.progress("train", count, len(cohort.clients))
    for phase in range(algorithm.phases):
        began = time.perf_counter()
        phase_key = path_key(key, PHASE, phase) if phase else key
        data = algorithm.collect(worker, policies.pop(), cohort, algorithm_state, phase_key, phase)
        if data.algorithm_state is not None:
            algorithm_state = data.algorithm_state
        worker.feedback.end_rollouts()
        phases.append(data)
        if not phase:
            tokens = used.tokens + worker.tally.generated * algorithm.phases
            rate = federation.schedule.learning_rate(cohort.round, tokens, used.seconds)
        last = phase + 1 == algorithm.phases
        passes = 4 + 2 * ((federation.decoder.remat == "layers") + algorithm.scoring.extra_passes)
        if last and federation.participation is not None:
            outcome = play(federation, start, kept, cohort, phases, passes)
        active = data.active
        sent = active | federation.aggregation.counts_everybody
        if outcome is not None:
            sent = sent & outcome.sent
            data = phases[-1] = reported(data, outcome, cohort)
        rolled = time.perf_counter()
        broadcast = make_broadcast(federation, start, algorithm_state, data, rate)
        trained = cohort_training.train(
            algorithm,
            federation.decoder,
            local,
            federation.mesh,
            aggregation,
            broadcast,
            rows_of(federation, data),
            _members(aggregation, cohort, data, phase_key, outcome),
            keep := not last,
            carried,
            own,
            progress,
            federation.clients_per_round if federation.sampling == "poisson" else 0,
        )
        lost = np.flatnonzero(trained.means[NOT_FINITE].total)
        not_finite += [cohort.clients[slot] for slot in lost]
        phase_means = sum_over_clients(trained.means)
        means = jax.tree.map(np.add, means, phase_means) if means else phase_means
        carried = trained.states
        work += trained.tokens * (passes + 2 * len(broadcast.references))
        if keep and carried is not None:
            adapters = cohort_training.stacked(carried, len(slots))
            policies.append(Policy(federation.base, adapters, slots))
        seconds["rollout"] += rolled - began
        seconds["train"] += time.perf_counter() - rolled
    starts = None if own is None else own.lora
    return TrainedClients(
        trained.reduced, algorithm_state, means, phases, rate, work, seconds, starts, not_finite,
        outcome, active, sent,
    )  # fmt: skip


def train_nobody(
    federation: Federation,
    aggregation: Aggregation,
    start: Adapter,
    algorithm_state: dict,
    cohort: Cohort,
    root: jax.Array,
    used: BudgetUsed,
    kept: dict[str, Any],
) -> TrainedClients:
    """Returns an empty cohort behind its training; arguments as for `train_clients`."""
    federation.worker.tally.clear()
    nobody, none = np.zeros(0, bool), np.zeros(0, np.float32)
    reduced = aggregation.reducer.init(start)
    if aggregation.collects:
        reduced = jax.tree.map(lambda x: np.zeros((0, *x.shape), x.dtype), start), none
    counts = {"rollout/wins": 0.0, "rollout/loses": 0.0}
    outcome = None
    if federation.participation is not None:
        outcome = Outcome(nobody, nobody, nobody, np.zeros(0, int), 0.0, 0.0)
    return TrainedClients(
        reduced=reduced,
        algorithm_state=algorithm_state,
        means={NOT_FINITE: Mean(jnp.float32(0), jnp.float32(0))},
        phases=[CohortData([], none, nobody, [], counts)],
        learning_rate=federation.schedule.learning_rate(cohort.round, used.tokens, used.seconds),
        work=0.0,
        seconds={"rollout": 0.0, "train": 0.0},
        starts=None,
        not_finite=[],
        outcome=outcome,
        active=nobody,
        sent=nobody,
    )


def reported(data: CohortData, outcome: Outcome, cohort: Cohort) -> CohortData:
    """Returns a cohort's data with those alone to train whose update is to enter. The traces of lost
    clients are recorded as lost.
    """
    lost = {client for client, gone in zip(cohort.clients, outcome.lost, strict=True) if gone}
    return dataclasses.replace(
        data,
        weight=np.where(outcome.accepted, data.weight, 0.0),
        active=data.active & outcome.accepted,
        traces=[
            record._replace(role="lost") if record.trace.client in lost else record
            for record in data.traces
        ],
    )


def clients_start(
    federation: Federation, adapter: Adapter, kept: dict[str, Any], cohort: Cohort
) -> ClientStart | None:
    """Returns what the cohort's clients receive; None: all of them the global adapter.

    Args: adapter: the global one; kept: the server's `aggregation_state`.
    """
    rule = federation.aggregation.rule
    if type(rule).starts is LoraRule.starts and "rank" not in kept:
        return None
    lora = rule.starts(to_host(adapter), kept, cohort.clients)
    if lora is None:
        return None
    tails = rule.tails(kept, cohort.clients, rank_of(lora))
    return ClientStart(lora, None if tails is None else jnp.asarray(tails, jnp.float32))


def make_broadcast(
    federation: Federation,
    start: Adapter,
    algorithm_state: dict,
    data: CohortData,
    learning_rate: float,
) -> Broadcast:
    """Puts the part of a phase that all clients share on the devices."""
    references = federation.algorithm.references(algorithm_state, start)
    return Broadcast(
        start=start,
        base=federation.base,
        references=federation.on_devices(references),
        loss_scalars=federation.on_devices(jax.tree.map(np.float32, data.loss_scalars)),
        rate=np.float32(learning_rate),
    )


def _members(
    aggregation: Aggregation,
    cohort: Cohort,
    data: CohortData,
    key: jax.Array,
    outcome: Outcome | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each client: the data of its key in this phase, its weight, and whether it trains."""
    client_keys = jax.vmap(lambda c: jax.random.key_data(path_key(key, LOCAL, c)))
    weight = np.asarray(aggregation.weights(data.weight, data.active), np.float32)
    if aggregation.counts_everybody:
        weight = np.ones(len(weight), np.float32)
        if outcome is not None:
            weight = outcome.accepted.astype(np.float32)
    if aggregation.privacy is not None:
        weight = weight * aggregation.privacy.weights(cohort.clients)
    return np.asarray(client_keys(jnp.asarray(cohort.clients))), weight, data.active


def rows_of(federation: Federation, data: CohortData) -> cohort_training.Rows:
    """Packs the cohort's rows into blocks; a client that does not train has none."""
    algorithm, rows_per_group = federation.algorithm, federation.algorithm.layout.rows_per_group
    apart = algorithm.scoring.per_micro_batch or federation.local.normalize == "micro"

    def micros(step, active: bool):
        own = [groups_of(micro, rows_per_group) if active else [] for micro in step]
        return own if apart else [sum(own, [])]

    clients = zip(data.rows, data.active, strict=True)
    steps = [[micros(step, active) for step in own] for own, active in clients]
    largest = max(len(micro) for client in data.rows for step in client for micro in step)
    groups = largest // rows_per_group * algorithm.common.accumulation
    flat = sum(steps, [])
    shape, small = federation.training_shapes(flat, groups)
    keys = Keys()
    blocks = [[pack_rows(step, shape, keys) for step in own] for own in steps]
    deepest = max(len(step) for own in blocks for step in own)
    wanted = max(most_blocks(flat, shape, groups), deepest)
    (depth,) = federation.shapes.fit("train blocks", (wanted,))
    return cohort_training.Rows(blocks, depth, shape, small)
