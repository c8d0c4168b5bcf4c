"""Asynchronous rounds on the simulated clock: FedBuff and FedAsync.

M clients (`federation.clients_per_round`) are always at work. One that arrives puts what it trained into
a buffer, and another one starts. When B updates are there, the global adapter moves: a new version. A
version is a round here: one line of metrics, one checkpoint, one learning rate. τ is the age of an
update: the versions that came since its client started.

    fedbuff     θ ← θ + η Σ s(τ_k) w_k δ_k / Σ w_k     s(τ) = (1 + τ)^(−a)        (arXiv 2106.06639)
    fedasync    θ ← (1 − α_τ) θ + α_τ θ_k, α_τ = α s(τ), each arrival by itself   (arXiv 1903.03934)

At an instant all arrivals come first, in the order of their starts, and each full buffer is emptied at
once. Then as many clients start as have arrived, drawn evenly from those that are idle. So equal
durations with B = M are synchronous rounds.

How long a client takes is planned from full lengths before anything is trained. The clock can therefore
be played on to the next version, which names everybody who starts on this one: they roll out and train
together, as a cohort does. What they send waits in a queue of M places, part of the checkpoint. The
buffer is empty there.

Departures:
  1. FedBuff: updates are weighed by the method, and divided by Σ w, so that age shortens the step. The
     paper's w are 1.
  2. A client without anything to train on takes a place in the buffer with the weight 0. Who arrives
     when must not depend on what was trained.
  3. A client that is lost frees its place when it would have arrived, and is not trained.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms.base import WorkEstimate
from spear_jax.core.mesh import to_host
from spear_jax.core.rng import path_key, path_rng, purpose
from spear_jax.core.types import Tally
from spear_jax.federated import ditto
from spear_jax.federated.aggregation.lora_rules.base import Uploads, as_float32
from spear_jax.federated.aggregation.pipeline import Received, conclude, receive
from spear_jax.federated.federation import Federation
from spear_jax.federated.local_training import NOT_FINITE
from spear_jax.federated.participation import Asynchronous, round_time
from spear_jax.federated.round import (
    RoundResult,
    TrainedClients,
    check_finite,
    tell_left_out,
    train_clients,
    with_budget,
)
from spear_jax.federated.round_metrics import BudgetUsed, training_metrics
from spear_jax.federated.single_client import join_metrics
from spear_jax.federated.state import ServerState
from spear_jax.models import cost_model
from spear_jax.models.params import Adapter

ASYNC = purpose("async")
NOBODY = -1  # the client of an empty place

Kept = dict[str, Any]


# The clock


class Flight(NamedTuple):
    """A client at work: its id, the version that it started from, its number among all starts, the
    time of its arrival, and whether it is lost on the way.
    """

    client: int
    version: int
    dispatch: int
    arrival: float
    lost: bool = False


@dataclasses.dataclass(frozen=True)
class Queue:
    """The clock between two versions, the buffer empty.

    Attributes:
        time: in simulated seconds.
        dispatched: starts so far.
        owed: clients that start at this instant when all its arrivals are counted.
        flights: who is at work.
    """

    time: float
    dispatched: int
    owed: int
    flights: tuple[Flight, ...]


class Played(NamedTuple):
    """What happened up to the next version.

    Attributes:
        buffer: the arrivals that make it, in order.
        late: those that were older than is allowed.
        lost: those that never came.
        started: who has started since the version before, lost ones among them.
    """

    queue: Queue
    buffer: list[Flight]
    late: list[Flight]
    lost: list[Flight]
    started: list[Flight]


def play(
    queue: Queue,
    version: int,
    size: int,
    oldest: int,
    start: Callable[[int, float, set[int]], Flight],
) -> Played:
    """Plays the clock on until the buffer is full.

    Args:
        version: the one that clients start from meanwhile.
        size: B; oldest: the age that is still taken; 0: any.
        start: (dispatch, time, clients at work) -> who starts.
    """
    flights, owed, now, count = list(queue.flights), queue.owed, queue.time, queue.dispatched
    played: Played = Played(queue, [], [], [], [])
    while True:
        if not owed:
            now = min(flight.arrival for flight in flights)
        due = sorted((x for x in flights if x.arrival == now), key=lambda x: x.dispatch)
        for flight in due:
            flights.remove(flight)
            owed += 1
            late = oldest and version - flight.version > oldest
            (played.lost if flight.lost else played.late if late else played.buffer).append(flight)
            if len(played.buffer) == size:
                return played._replace(queue=Queue(now, count, owed, tuple(flights)))
        for _ in range(owed):
            flight = start(count, now, {flight.client for flight in flights})
            flights.append(flight)
            played.started.append(flight)
            count += 1
        owed = 0


# What waits in the queue


def init(adapter: Adapter, places: int) -> Kept:
    """Returns what is kept before version 1: nobody at work, and M clients to start."""
    whole = lambda kind, value: np.full(places, value, kind)
    queue = {
        "client": whole(np.int32, NOBODY),
        "version": whole(np.int32, 0),
        "dispatch": whole(np.int32, 0),
        "arrival": whole(np.float64, 0.0),
        "lost": whole(bool, False),
        "weight": whole(np.float64, 0.0),
        "sent": jax.tree.map(lambda x: np.zeros((places, *x.shape), np.float32), adapter),
        "dispatched": np.int32(0),
        "owed": np.int32(places),
    }
    return {"queue": queue}


def read_queue(kept: Kept) -> Queue:
    """Returns the clock from what is kept."""
    rows = kept["queue"]
    columns = [rows[name] for name in Flight._fields]
    flights = [Flight(*(x.item() for x in row)) for row in zip(*columns, strict=True)]
    there = tuple(flight for flight in flights if flight.client != NOBODY)
    return Queue(float(kept["clock"]), int(rows["dispatched"]), int(rows["owed"]), there)


def write_queue(
    kept: Kept, queue: Queue, sent: dict[int, tuple[Adapter, float]], like: Adapter
) -> Kept:
    """Returns what is kept, with the clock after a version.

    Args:
        sent: dispatch -> (what the client sends, its weight), of everybody who has trained.
        like: an adapter.
    """
    rows = init(like, len(kept["queue"]["client"]))["queue"]
    for place, flight in enumerate(queue.flights):
        for name, value in flight._asdict().items():
            rows[name][place] = value
        if flight.dispatch in sent:
            update, rows["weight"][place] = sent[flight.dispatch]
            put = lambda x, new, at=place: x.__setitem__(at, new)
            jax.tree.map(put, rows["sent"], update)
    rows["dispatched"], rows["owed"] = np.int32(queue.dispatched), np.int32(queue.owed)
    return kept | {"queue": rows, "clock": np.asarray(queue.time)}


def waiting(kept: Kept) -> dict[int, tuple[Adapter, float]]:
    """Returns dispatch -> (what the client sends, its weight), of everybody at work."""
    rows = kept["queue"]
    places = np.flatnonzero(rows["client"] != NOBODY)
    row = lambda place: jax.tree.map(lambda x: x[place], rows["sent"])
    return {int(rows["dispatch"][p]): (row(p), float(rows["weight"][p])) for p in places}


# A version


def run_round(federation: Federation, state: ServerState, used: BudgetUsed) -> RoundResult:
    """Runs up to the next version; arguments as `round.run_round`."""
    given = federation.asynchronous
    assert given is not None
    version, kept = int(state.round), state.aggregation_state
    start = to_host(state.lora)
    played = play(
        read_queue(kept), version, given.size(federation.clients_per_round), given.oldest,
        starts_of(federation, start, kept, version),
    )  # fmt: skip
    sent, cohorts = waiting(kept), []
    began, algorithm_state = time.perf_counter(), state.algorithm_state
    for wave, flights in enumerate(waves(played.started, federation.clients_per_round)):
        one = train_wave(federation, state, algorithm_state, flights, wave, used, kept)
        algorithm_state, kept = one.trained.algorithm_state, one.received.kept
        cohorts.append(one)
        for slot, flight in enumerate(flights):
            update = jax.tree.map(lambda x, at=slot: np.asarray(x[at], np.float32), one.sent)
            sent[flight.dispatch] = update, float(one.received.weight[slot])
    trained_at = time.perf_counter()
    before = dataclasses.replace(
        state, lora=federation.on_devices(start), algorithm_state={}, aggregation_state=kept
    )
    after, change, measured, _ = flush(federation, given, before, played.buffer, sent)
    kept = write_queue(after.aggregation_state, played.queue, sent, start)
    after = dataclasses.replace(after, aggregation_state=kept)
    metrics: dict[str, float] = {
        **metrics_of_training(federation, [one.trained for one in cohorts]),
        **{name: x for one in cohorts for name, x in one.received.metrics.items()},
        **measured,
        **metrics_of_clock(played, version, float(state.aggregation_state["clock"])),
        **bytes_of(federation, start, kept, played, sent, version + 1),
        "round/update_norm": float(change),
    }
    rejected = sum((one.received.rejected for one in cohorts), [])
    metrics["round/rejected"] = float(len(rejected))
    not_finite = sum((one.trained.not_finite for one in cohorts), [])
    tell_left_out(version + 1, [*not_finite, *rejected])
    ended = federation.algorithm.end_round(algorithm_state, after.lora, metrics, version + 1)
    metrics["time/train"] = trained_at - began - metrics["time/rollout"]
    metrics["time/aggregate"] = time.perf_counter() - trained_at
    traces = [record for one in cohorts for record in one.trained.traces]
    result = RoundResult(dataclasses.replace(after, algorithm_state=ended), metrics, traces)
    check_finite(metrics, version + 1)
    return with_budget(result, used)


def starts_of(
    federation: Federation, adapter: Adapter, kept: Kept, version: int
) -> Callable[[int, float, set[int]], Flight]:
    """Returns how clients start on a version: who, and when they will arrive."""
    clock, steps = federation.participation, federation.algorithm.common.steps
    assert clock is not None
    up, down = federation.aggregation.bytes_of_clients(
        adapter, kept, range(len(federation.clients)), version + 1
    )

    def start(dispatch: int, now: float, busy: set[int]) -> Flight:
        idle = [client for client in range(len(federation.clients)) if client not in busy]
        client = int(path_rng(federation.seed, ASYNC, dispatch).choice(idle))
        device, flops = clock.device(client), planned_flops(federation, client)
        seconds = round_time(down[client], up[client], flops, device, clock.latency)
        lost = clock.loss(dispatch, client, steps) is not None
        return Flight(client, version, dispatch, now + seconds, lost)

    return start


def planned_flops(federation: Federation, client: int) -> float:
    """Returns the FLOPs of a client's round as planned: full lengths, every first answer wrong."""
    algorithm, worker = federation.algorithm, federation.worker
    common, data, own = algorithm.common, worker.data, federation.clients[client]
    work = algorithm.estimate_work(len(own))
    if work is None:
        work = WorkEstimate(min(len(own), common.examples), common.draws, None)
    prompt = float(np.mean([len(data.prompts[i]) for i in own]))
    times = worker.num_revisions if work.revisions is None else work.revisions
    read = work.answers * (prompt + times * data.prompt_length)
    first, revised = worker.first.max_new_tokens, worker.revise.max_new_tokens
    generated = work.answers * (first + times * revised)
    passes = 4 + 2 * ((federation.decoder.remat == "layers") + algorithm.scoring.extra_passes)
    rows = work.rows * (prompt + data.completion_length)
    tally = Tally(prompt=round(read), generated=round(generated))
    return cost_model.flops(federation.decoder.config, tally, passes * rows)


def waves(started: Sequence[Flight], places: int) -> list[list[Flight]]:
    """Groups those who start on a version into cohorts: no client twice, M of them at most, in the
    order of their ids. Those that are lost are left out.
    """
    cohorts: list[list[Flight]] = []
    for flight in started:
        if flight.lost:
            continue
        # behind the last cohort with the client: a later start builds on what an earlier one left
        mine = [i for i, own in enumerate(cohorts) if flight.client in {x.client for x in own}]
        later = cohorts[max(mine, default=-1) + 1 :]
        room = next((own for own in later if len(own) < places), None)
        if room is None:
            cohorts.append(room := [])
        room.append(flight)
    for cohort in cohorts:
        cohort.sort()
    return cohorts


class Wave(NamedTuple):
    """A cohort that has trained, and what the server will get of it, leaves [C, ...]."""

    trained: TrainedClients
    received: Received
    sent: Adapter


def train_wave(
    federation: Federation,
    state: ServerState,
    algorithm_state: dict,
    flights: list[Flight],
    wave: int,
    used: BudgetUsed,
    kept: Kept,
) -> Wave:
    """Trains those who start together. Args: kept: of the server, with what earlier waves left."""
    aggregation, rule = federation.aggregation, federation.aggregation.rule
    number, ids = int(state.round) + 1, [flight.client for flight in flights]
    root = jax.random.wrap_key_data(jnp.asarray(to_host(state.key)))
    root = path_key(root, ASYNC, wave) if wave else root
    cohort = federation.cohort_of(ids, number, wave)
    alone = dataclasses.replace(federation, participation=None)
    start = federation.on_devices(state.lora)
    trained = train_clients(alone, aggregation, start, algorithm_state, cohort, root, used, kept)
    adapters, weight = to_host(trained.reduced)
    begun = trained.starts
    if begun is None:
        like = lambda x, many: np.broadcast_to(np.asarray(x), many.shape)
        begun = jax.tree.map(like, state.lora, adapters)
    at = dataclasses.replace(state, aggregation_state=kept)
    received = receive(aggregation, adapters, begun, np.asarray(weight), np.asarray(ids), at)
    kept, there = received.kept, received.weight > 0
    if rule.personal and there.any():
        take = lambda tree: jax.tree.map(lambda x: np.asarray(x)[there], tree)
        even = np.full(int(there.sum()), 1 / there.sum())
        own = Uploads(
            np.asarray(ids)[there], take(begun), take(received.updates), even, even,
            aggregation.scale, aggregation.rate, number,
        )  # fmt: skip
        kept = rule.remember(own, state.lora, kept)
    if trained.personal is not None:
        kept = ditto.put(kept, ids, trained.personal[0])
    sent = as_float32(received.updates)
    if rule.personal:
        sent = rule.sent(sent, number)
    if federation.asynchronous is not None and federation.asynchronous.mixes:
        sent = jax.tree.map(lambda x, y: np.asarray(x) + y, begun, sent)
    return Wave(trained, received._replace(kept=kept), sent)


def flush(
    federation: Federation,
    given: Asynchronous,
    state: ServerState,
    buffer: list[Flight],
    sent: dict[int, tuple[Adapter, float]],
) -> Any:
    """Moves the global adapter by the updates in the buffer. Returns: as `conclude`."""
    start, rule = to_host(state.lora), federation.aggregation.rule
    version, ids = int(state.round), [flight.client for flight in buffer]
    trees = [sent[flight.dispatch][0] for flight in buffer]
    weight = np.array([sent[flight.dispatch][1] for flight in buffer], np.float64)
    updates = jax.tree.map(lambda *x: np.stack(x), *trees)
    if given.mixes:
        updates = jax.tree.map(lambda x, old: x - np.asarray(old), updates, start)
        weight = (weight > 0).astype(np.float64)
    if rule.personal:
        updates = rule.sent(updates, version + 1)
    age = np.array([version - flight.version for flight in buffer])
    starts = rule.starts(start, state.aggregation_state, ids) if rule.personal else None
    if starts is None:
        starts = jax.tree.map(lambda x, many: np.broadcast_to(x, many.shape), start, updates)
    everybody = np.ones(len(ids), bool)
    received = Received(updates, weight, {}, [], dict(state.aggregation_state), everybody)
    return conclude(
        federation.aggregation, state, start, starts, np.asarray(ids), received, given.shrink(age)
    )


# Metrics


def metrics_of_training(federation: Federation, cohorts: list[TrainedClients]) -> dict[str, float]:
    """Returns the metrics of everybody who has trained on a version; zeros where nobody did."""
    nothing = ("rollout/wins", "rollout/loses", "rollout/tokens", "round/flops", "round/rate")
    metrics = dict.fromkeys(nothing, 0.0) | join_metrics(cohorts)
    means: dict[str, Any] = {}
    for one in cohorts:
        means = jax.tree.map(np.add, means, one.means) if means else dict(one.means)
        metrics["round/rate"] = one.learning_rate
    for name in ("time/rollout", "time/train"):
        metrics[name] = sum(one.metrics[name] for one in cohorts)
    left_out = means.pop(NOT_FINITE).total if means else 0.0
    idle = sum(int((~one.active).sum()) for one in cohorts)
    losses = [one.personal[1] for one in cohorts if one.personal is not None]
    return {
        **metrics,
        **training_metrics(federation.algorithm.name, means),
        **({"personal/loss": float(np.mean(losses))} if losses else {}),
        "round/clients": float(sum(len(one.active) for one in cohorts)),
        "round/clients_without_wins": float(idle),
        "round/clients_not_finite": float(left_out),
    }


def metrics_of_clock(played: Played, version: int, before: float) -> dict[str, float]:
    """Returns the clock's metrics, and the age of what made a version. Args: before: the clock then."""
    age = [version - flight.version for flight in played.buffer]
    return {
        "sim/seconds": played.queue.time - before,
        "sim/clock": played.queue.time,
        "participation/lost": float(len(played.lost)),
        "participation/late": float(len(played.late)),
        "participation/age": float(np.mean(age)),
        "participation/oldest": float(max(age)),
    }


def bytes_of(
    federation: Federation,
    adapter: Adapter,
    kept: Kept,
    played: Played,
    sent: dict[int, tuple[Adapter, float]],
    number: int,
) -> dict[str, float]:
    """Returns what has travelled: down to all who started, up from all who arrived with something."""
    count = federation.aggregation.bytes_of_clients
    arrived = [x.client for x in (*played.buffer, *played.late) if sent[x.dispatch][1] > 0]
    down = count(adapter, kept, [flight.client for flight in played.started], number)[1]
    return {
        "round/bytes_up": float(count(adapter, kept, arrived, number)[0].sum()),
        "round/bytes_down": float(down.sum()),
    }
