"""One round, as the paper has it: roll out with the global adapter, train the cohort, aggregate."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
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
from spear_jax.federated import cohort_training, ditto
from spear_jax.federated.aggregation.lora_rules.base import LoraRule, rank_of
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round
from spear_jax.federated.federation import Federation
from spear_jax.federated.local_training import NOT_FINITE, Broadcast, optimiser
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
        metrics: numbers of the rollouts by name, tokens, operations and seconds among them.
        traces: what the rollouts said.
        learning_rate: of the round.
        starts: what clients started from, leaves [C, ...]; None: the global adapter.
        gathered: the gradients that they sent, as `Drift.gather` left them.
        personal: their own adapters under Ditto, leaves [C, ...], and the mean loss of these; None:
            they have none.
        weight: float[C], of aggregation; 0 for clients that are left out.
        method_weight: float[C], from the method, in the last phase.
        steps: float[C], the local steps that each has taken.
        not_finite: ids of the clients whose training ended without a finite update.
        outcome: who has reported, on the simulated clock; None: there is none.
        active: bool[C], who had something to train on, lost clients among them.
        sent: bool[C], who has sent an update.
    """

    reduced: Any
    algorithm_state: dict
    means: dict[str, Mean]
    metrics: dict[str, float]
    traces: list[TraceRecord]
    learning_rate: float
    starts: Adapter | None
    gathered: Any
    personal: tuple[Adapter, float] | None
    weight: np.ndarray
    method_weight: np.ndarray
    steps: np.ndarray
    not_finite: list[int]
    outcome: Outcome | None
    active: np.ndarray
    sent: np.ndarray

    @property
    def answers(self) -> tuple[int, int]:
        """Returns (first answers, wrong ones among them)."""
        asked = [record.trace for record in self.traces if not record.trace.beside]
        return len(asked), sum(not trace.first.correct for trace in asked)


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
    return end_cohort(
        federation, aggregation, dataclasses.replace(state, lora=start), cohort, trained
    )


def end_cohort(
    federation: Federation,
    aggregation: Aggregation,
    state: ServerState,
    cohort: Cohort,
    trained: TrainedClients,
) -> RoundResult:
    """Aggregates a trained cohort, and names the round's numbers."""
    began, kept, start = time.perf_counter(), state.aggregation_state, state.lora
    before = dataclasses.replace(state, algorithm_state={})
    drift, steps = aggregation.drift, federation.algorithm.common.steps
    factor = None if drift is None else drift.factor(trained.weight, trained.steps, steps)
    state, moved, measured, rejected = end_round(
        aggregation, before, trained.reduced, cohort.clients, trained.starts, factor
    )
    state = _end_of_drift(federation, state, trained, cohort, rejected, measured)
    tell_left_out(cohort.round, [*trained.not_finite, *rejected])
    change = float(moved)
    state, told = _clock(federation, state, trained.outcome, cohort)
    means = dict(trained.means)
    left_out = means.pop(NOT_FINITE).total
    metrics: dict[str, float] = {
        **trained.metrics,
        **training_metrics(federation.algorithm.name, means),
        "round/clients": float(len(cohort.clients)),
        "round/clients_without_wins": float((~trained.active).sum()),
        "round/clients_not_finite": float(left_out),
        **_bytes(aggregation, start, kept, cohort, trained.sent),
        "round/update_norm": change,
        "round/rate": trained.learning_rate,
        **measured,
        **told,
    }
    if aggregation.privacy is not None:
        metrics["round/failed"] = 0.0  # noise is added whoever reports
    if trained.outcome is not None:
        metrics["round/flops"] += trained.outcome.unrun
    if trained.personal is not None:
        personal, metrics["personal/loss"] = trained.personal
        kept = ditto.put(state.aggregation_state, cohort.clients, personal)
        state = dataclasses.replace(state, aggregation_state=kept)
    ended = federation.algorithm.end_round(
        trained.algorithm_state, state.lora, metrics, cohort.round
    )
    metrics["time/aggregate"] = time.perf_counter() - began
    return RoundResult(dataclasses.replace(state, algorithm_state=ended), metrics, trained.traces)


def _end_of_drift(
    federation: Federation,
    state: ServerState,
    trained: TrainedClients,
    cohort: Cohort,
    rejected: list[int],
    measured: dict[str, float],
) -> ServerState:
    """Has drift correction keep what it needs of a round; nothing where the round failed."""
    drift, ids = federation.aggregation.drift, np.asarray(cohort.clients)
    accepted = (trained.weight > 0) & ~np.isin(ids, rejected)
    accepted &= ids != federation.aggregation.root
    if drift is None or measured.get("round/failed") or not accepted.any():
        return state
    kept = drift.end(
        state.aggregation_state, ids, accepted, trained.gathered, state.lora,
        optimiser(federation.local),
    )  # fmt: skip
    return dataclasses.replace(state, aggregation_state=kept)


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
        steps=last(outcome.steps, federation.algorithm.common.steps),
    )


def training_tokens(steps: list) -> int:
    """Returns the tokens of a client's training rows. Args: steps: [S][A] lists of rows."""
    rows = [row for step in steps for micro in step for row in micro if row is not None]
    return sum(len(row.prompt) + len(row.completion) for row in rows)


def tell_left_out(round: int, clients: list[int]) -> None:
    """Names the clients that are left out of a round's aggregation."""
    if clients and is_main_process():
        names = ", ".join(map(str, clients))
        say(f"warning: round {round}: not finite, and left out: client {names}", sys.stderr)


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
        federation.local,
        trains=rule.trains(cohort.round),
        rank_penalty=rule.penalty,
        drift=aggregation.drift,
    )
    own, not_finite = clients_start(federation, start, kept, cohort), []
    outcome: Outcome | None = None
    personal, theirs = None, None
    if federation.ditto is not None:
        mine = jax.tree.map(lambda x: x[cohort.clients], kept["personal"])
        personal = functools.partial(ditto.train, federation, personal=mine)
    key = path_key(root, ROUND, cohort.round)
    varies = federation.asynchronous is not None or federation.sampling == "poisson"
    usual = federation.clients_per_round if varies else 0
    worker.tally.clear()
    # popped, so that merged weights are not held while clients train
    policies = [worker.policy(start)]
    if own is not None and own.lora is not None:
        # without cohorts, always as many as may be at work, or generation would compile again
        full = lambda x: np.resize(x, (usual, *x.shape[1:])) if len(x) < usual else x
        adapters = cohort_training.layers_first(jax.tree.map(full, own.lora))
        policies = [Policy(federation.base, adapters, slots)]
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
            if federation.participation is not None and federation.participation.partial:
                own = dataclasses.replace(
                    own or ClientStart(None), steps=jnp.asarray(outcome.steps, jnp.int32)
                )
        rolled = time.perf_counter()
        broadcast = make_broadcast(federation, start, algorithm_state, data, rate, kept)
        members = _members(aggregation, cohort, data, phase_key, outcome)
        rows = rows_of(federation, data)
        trained = cohort_training.train(
            algorithm,
            federation.decoder,
            local,
            federation.mesh,
            aggregation,
            broadcast,
            rows,
            members,
            keep := not last,
            carried,
            own,
            progress,
            usual=usual,
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
        if personal is not None:
            theirs = personal(local, broadcast, rows, members, own=own)
            work += trained.tokens * (passes + 2 * len(broadcast.references))
        seconds["rollout"] += rolled - began
        seconds["train"] += time.perf_counter() - rolled
    tally = worker.tally
    metrics = {
        **_rollout_metrics(phases),
        **worker.feedback.take_metrics(),
        "rollout/tokens": float(tally.generated),
        "round/flops": cost_model.flops(federation.decoder.config, tally, work),
        **{f"time/{name}": value for name, value in seconds.items()},
    }
    traces = [record for phase in phases for record in phase.traces]
    starts = None if own is None else own.lora
    weight = members[1] * np.asarray(1 - trained.means[NOT_FINITE].total)
    taken = np.asarray(trained.means["grad_norm"].count)
    return TrainedClients(
        trained.reduced, algorithm_state, means, metrics, traces, rate, starts, trained.gathered,
        theirs, weight, data.weight, taken, not_finite, outcome, active, sent,
    )  # fmt: skip


def _rollout_metrics(phases: Sequence[CohortData]) -> dict[str, float]:
    """Numbers of the rollouts: means over phases, wins and loses summed."""
    first, counts = phases[0].metrics, ("rollout/wins", "rollout/loses")
    means = {name: float(np.mean([x.metrics[name] for x in phases])) for name in first}
    return means | {name: float(sum(x.metrics[name] for x in phases)) for name in counts}


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
    names = (
        "rollout/wins",
        "rollout/loses",
        "rollout/tokens",
        "round/flops",
        "time/rollout",
        "time/train",
    )
    metrics = dict.fromkeys(names, 0.0)
    outcome = None
    if federation.participation is not None:
        outcome = Outcome(nobody, nobody, nobody, np.zeros(0, int), 0.0, 0.0)
    return TrainedClients(
        reduced=reduced,
        algorithm_state=algorithm_state,
        means={NOT_FINITE: Mean(jnp.float32(0), jnp.float32(0))},
        metrics=metrics | federation.worker.feedback.take_metrics(),
        traces=[],
        learning_rate=federation.schedule.learning_rate(cohort.round, used.tokens, used.seconds),
        starts=None,
        gathered=None,
        personal=None,
        weight=none,
        method_weight=none,
        steps=np.zeros(0, int),
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
    """Returns what the cohort's clients have to themselves; None: nothing.

    Args: adapter: the global one; kept: the server's `aggregation_state`.
    """
    rule, drift = federation.aggregation.rule, federation.aggregation.drift
    correction = None if drift is None else drift.corrections(kept, cohort.clients)
    lora = tails = None
    if type(rule).starts is not LoraRule.starts or "rank" in kept:
        lora = rule.starts(to_host(adapter), kept, cohort.clients)
    if lora is not None:
        tails = rule.tails(kept, cohort.clients, rank_of(lora))
    if lora is None and correction is None:
        return None
    return ClientStart(lora, None if tails is None else jnp.asarray(tails, jnp.float32), correction)


def make_broadcast(
    federation: Federation,
    start: Adapter,
    algorithm_state: dict,
    data: CohortData,
    learning_rate: float,
    kept: dict[str, Any],
) -> Broadcast:
    """Puts the part of a phase that all clients share on the devices."""
    references = federation.algorithm.references(algorithm_state, start)
    return Broadcast(
        start=start,
        base=federation.base,
        references=federation.on_devices(references),
        loss_scalars=federation.on_devices(jax.tree.map(np.float32, data.loss_scalars)),
        rate=np.float32(learning_rate),
        moments=federation.on_devices(kept["moments"]) if "moments" in kept else None,
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
    accepted = None if outcome is None else outcome.accepted
    weight = aggregation.weights_of(data.weight, data.active, cohort.clients, accepted)
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
