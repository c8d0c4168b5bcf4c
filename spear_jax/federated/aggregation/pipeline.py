"""Aggregation, put together.

A round's updates δ_k = θ_k − start_k go through these steps:

    client   δ_k → client transforms → privacy's clip and local noise (an attacker replaces the
             result) → compression
    server   decode → reject what is not finite → the reducer's transforms again → reducer, or
             privacy's clipped and noisy sum → LoRA rule → server optimiser

The mean of factors streams: clients are transformed, checked and summed inside the device program,
chunk by chunk; privacy's clip is then one more transform, and its noise is added to the sum. Where a
reducer or a LoRA rule reads every client, where updates are compressed, masked or noisy themselves, where
the clip norm adapts, or somebody attacks, all of it behind local training and transforms runs on the
host, in numpy.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spear_jax.core import pytrees
from spear_jax.core.errors import unknown
from spear_jax.core.mesh import to_host
from spear_jax.federated.aggregation import exactness, vectors
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.compression.rank import RankUplink
from spear_jax.federated.aggregation.compression.uplink import Uplink
from spear_jax.federated.aggregation.exactness import Metered
from spear_jax.federated.aggregation.lora_rules.base import LoraRule, Uploads, as_float32
from spear_jax.federated.aggregation.lora_rules.mean import Mean as MeanOfFactors
from spear_jax.federated.aggregation.reducers import ClientTransform, Last, Mean, Reducer
from spear_jax.federated.aggregation.robust import ROBUST
from spear_jax.federated.aggregation.robust.norm_clip import ClipNorm
from spear_jax.federated.aggregation.secure_sum import SecureSum
from spear_jax.federated.aggregation.server_optimizer import server_optimizer
from spear_jax.federated.aggregation.weighting import Weighting
from spear_jax.federated.drift import Drift
from spear_jax.federated.privacy.central import CentralPrivacy
from spear_jax.federated.privacy.client_side import LocalPrivacy, clipped
from spear_jax.federated.state import ServerState
from spear_jax.models.params import Adapter

REDUCERS: dict[str, type[Reducer]] = {"mean": Mean, **ROBUST, "last": Last}


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """How a round's updates become the next global adapter; static and hashable.

    Attributes:
        reducer: brings the clients' adapters together.
        optimizer: turns the reduced update into the server's step.
        transforms: change each client's update, one after the other, before it is reduced.
        rule: says which factors are trained and sent, and makes the next adapter of them.
        rate: η, for a rule that makes its own step.
        weighting: of clients.
        attack: what some clients send in place of their update.
        privacy: noise on the sum of updates; None: none.
        local_privacy: noise on each update, before it leaves its client; None: none.
        uplink: how updates are compressed on their way.
        secure_sum: hides single updates from the server; None: it sees them.
        scale: alpha / rank of the adapters.
        ranks: of the clients, over and over; () where all have the adapter's.
        root: the id of the server's own client, whose update a reducer compares with.
        drift: a correction of client drift.
        waits: whether clients' updates wait until they count (`federated/asynchronous.py`).
    """

    reducer: Reducer = Mean()
    optimizer: optax.GradientTransformation = server_optimizer("fedavg")
    transforms: tuple[ClientTransform, ...] = ()
    rule: LoraRule = MeanOfFactors()
    rate: float = 1.0
    weighting: Weighting = Weighting()
    attack: Attack | None = None
    privacy: CentralPrivacy | None = None
    local_privacy: LocalPrivacy | None = None
    uplink: Uplink | RankUplink | None = None
    secure_sum: SecureSum | None = None
    scale: float = 1.0
    ranks: tuple[int, ...] = ()
    root: int | None = None
    drift: Drift | None = None
    waits: bool = False

    @property
    def collects(self) -> bool:
        """Returns whether every client's adapter comes to the host."""
        reads_each = self.reducer.collects or not self.rule.linear or self.rule.personal
        parts = (self.attack, self.uplink, self.secure_sum, self.local_privacy)
        adapts = self.privacy is not None and self.privacy.adaptive is not None
        return reads_each or adapts or self.waits or any(part is not None for part in parts)

    @property
    def products(self) -> int:
        """Returns the rank of the changes of products that clients send; 0: they send factors."""
        return self.uplink.rank if isinstance(self.uplink, RankUplink) else 0

    @property
    def client_transforms(self) -> tuple[ClientTransform, ...]:
        """Returns what is done to each client's update inside the device program."""
        return self.transforms + self.clips

    @property
    def clips(self) -> tuple[ClientTransform, ...]:
        """Returns those of `client_transforms` that a real server does to what it receives, too:
        attackers leave them out.
        """
        if self.privacy is None or self.collects:
            return self.reducer.transforms
        return (*self.reducer.transforms, ClipNorm(self.privacy.clip))

    @property
    def counts_everybody(self) -> bool:
        """Returns whether clients count that had nothing to train on, each with the weight 1."""
        return self.privacy is not None or self.local_privacy is not None

    def weights(self, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Returns the clients' weights, float[C]; arguments as `Reducer.weights`."""
        return self.reducer.weights(self.weighting(weight, active), active)

    def weights_of(
        self,
        weight: np.ndarray,
        active: np.ndarray,
        clients: Sequence[int],
        accepted: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns the weights with which a cohort is summed, float32[C]; under privacy they do not
        tell who had something to train on.

        Args: weight, active: as for `weights`; clients: their ids; accepted: bool[C], whose update
            is to enter; None: all.
        """
        weights = np.asarray(self.weights(weight, active), np.float32)
        if self.counts_everybody:
            weights = np.ones(len(weights), np.float32)
            if accepted is not None:
                weights = accepted.astype(np.float32)
        if self.privacy is not None:
            weights = weights * self.privacy.weights(clients)
        return weights

    def bytes_of_clients(
        self, adapter: Adapter, kept: dict[str, Any], clients: Sequence[int], round: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bytes that each client sends, if it does, and receives, int[C]; 0 for the
        server's own.
        """
        full, up, down = jax.tree.leaves(adapter)[0].shape[-1], [], []
        for client in clients:
            rank = int(kept["rank"][client]) if "rank" in kept else full
            plain = self.rule.bytes_up(adapter, rank, round)
            if self.uplink is not None:
                plain = self.uplink.bytes_up(self.rule, adapter, rank, round)
            received = self.rule.bytes_down(adapter, rank, round, kept)
            if self.drift is not None:
                one = self.rule.bytes_up(adapter, rank, round)
                plain, received = (
                    plain + (self.drift.up - 1) * one,
                    received + (self.drift.down - 1) * one,
                )
            up.append(plain * (client != self.root))
            down.append(received * (client != self.root))
        return np.array(up), np.array(down)

    def transform(self, start: Adapter, adapter: Adapter) -> Adapter:
        """Returns one client's adapter with its update transformed. Args: start: what it got."""
        if not self.client_transforms:
            return adapter
        update = jax.tree.map(jnp.subtract, adapter, start)
        update = self.transformed(update, self.client_transforms)
        return jax.tree.map(jnp.add, start, update)

    def transformed(self, update: Adapter, transforms: tuple[ClientTransform, ...]) -> Adapter:
        """Returns a client's update after transforms, which see what is sent alone."""
        if not self.rule.personal:
            for transform in transforms:
                update = transform(update)
            return update
        sent = self.rule.sent(update, 1)
        own = jax.tree.map(jnp.subtract, update, sent)
        for transform in transforms:
            sent = transform(sent)
        return jax.tree.map(jnp.add, self.rule.sent(sent, 1), own)


class Received(NamedTuple):
    """What the server has of a cohort.

    Attributes:
        updates: leaves float32[C, ...], zeros where they were not finite; of changes of products
            their factors.
        weight: float64[C], 0 likewise.
        metrics: by name.
        rejected: ids of the clients whose numbers were not finite.
        kept: the server's `aggregation_state`.
        below: bool[C], whose norm was within privacy's bound before anything clipped it.
    """

    updates: Any
    weight: np.ndarray
    metrics: dict[str, float]
    rejected: list[int]
    kept: dict[str, Any]
    below: np.ndarray


class Aggregated(NamedTuple):
    """A round's end.

    Attributes:
        state: the next one (round + 1).
        change: the norm of the adapter's change, float32[].
        metrics: by name.
        rejected: ids of the clients whose numbers were not finite when they arrived.
    """

    state: ServerState
    change: Any
    metrics: dict[str, float]
    rejected: list[int]


def find_reducer(reducer: str | Reducer, **numbers: Any) -> Reducer:
    """Returns the reducer of that name, or the reducer itself.

    Args: numbers: its attributes, where it has them.
    """
    if isinstance(reducer, Reducer):
        return reducer
    if reducer not in REDUCERS:
        raise unknown("reducer (federation.reducer)", reducer, REDUCERS)
    return with_numbers(REDUCERS[reducer], numbers)


def with_numbers(kind: type, numbers: dict[str, Any]) -> Any:
    """Builds a frozen dataclass with those of the numbers that it has a field for."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in numbers.items() if name in names})


def init_server(
    aggregation: Aggregation,
    adapter: Adapter,
    algorithm_state: Any,
    key: jax.Array,
    clients: int = 0,
) -> ServerState:
    """Returns the server before round 1. Args: key: the run's root key; clients: K."""
    moments = aggregation.optimizer.init(adapter)
    kept = aggregation.reducer.init_kept(adapter)
    if clients:
        rank = jax.tree.leaves(adapter)[0].shape[-1]
        ranks = np.resize(aggregation.ranks or (rank,), clients)
        kept = kept | aggregation.rule.init(adapter, ranks)
        kept = kept | (aggregation.uplink.init_kept(adapter, clients) if aggregation.uplink else {})
        kept |= aggregation.privacy.init_kept() if aggregation.privacy else {}
        kept |= aggregation.local_privacy.init_kept(clients) if aggregation.local_privacy else {}
    number, data = jnp.int32(0), jax.random.key_data(key)
    return ServerState(adapter, moments, algorithm_state, number, data, kept)


def aggregate(
    aggregation: Aggregation, state: ServerState, reduced: Any
) -> tuple[ServerState, jax.Array]:
    """Finishes the reduction and takes one server step.

    Returns: the next state (round + 1); the norm of the adapter's change, float32[].
    """
    return end_round(aggregation, state, reduced)[:2]


def end_round(
    aggregation: Aggregation,
    state: ServerState,
    reduced: Any,
    clients: Sequence[int] = (),
    starts: Adapter | None = None,
    factor: float | np.ndarray | None = None,
) -> Aggregated:
    """Finishes the reduction and takes one server step, and tells what it found.

    Args:
        reduced: the reducer's state after the whole cohort; where the aggregation collects,
            (adapters [C, ...], weight [C]).
        clients: the cohort's ids, where the aggregation collects.
        starts: what clients started from, leaves [C, ...]; None: the global adapter.
        factor: what the reduced update is multiplied by, or where the aggregation collects each
            client's, float[C]; None: nothing.
    """
    kept = state.aggregation_state
    if aggregation.collects:
        return _on_host(aggregation, state, reduced, clients, starts, factor)
    sends = aggregation.rule.sends(int(state.round) + 1)
    bare = dataclasses.replace(state, aggregation_state={})
    metrics = {}
    if isinstance(aggregation.reducer, Metered):
        metrics = exactness.metrics(to_host(_squares(aggregation.reducer, reduced, state.lora)))
    if aggregation.privacy is not None:
        update, mass = to_host(_finish(aggregation.reducer, reduced, state.lora))
        total = jax.tree.map(lambda x: np.asarray(x, np.float64) * float(mass), update)
        total = aggregation.rule.sent(total, int(state.round) + 1)
        size = int(_travels(vectors.add_axis(total), aggregation.rule, int(state.round) + 1).sum())
        released = aggregation.privacy.add_noise(total, size, kept)
        after, change, kept, told = _noisy_step(aggregation, bare, released)
        metrics |= told
    else:
        scale = None if factor is None else np.asarray(factor, np.float32)
        after, change = _finish_and_step(aggregation, sends, bare, reduced, scale)
    return Aggregated(dataclasses.replace(after, aggregation_state=kept), change, metrics, [])


def server_step(
    aggregation: Aggregation,
    state: ServerState,
    update: Adapter,
    mass: jax.typing.ArrayLike,
    sends: str = "ab",
) -> tuple[ServerState, jax.Array]:
    """Moves the global adapter along an update.

    Args:
        mass: float32[], the weight behind the update. Where it is 0 nobody trained, and adapter
            and moments stay as they are.
        sends: the factors that move; the other one and its moments stay.
    """
    adapter = state.lora
    step, moments = aggregation.optimizer.update(update, state.opt_state, adapter)
    moved = jax.tree.map(jnp.add, adapter, step)
    trained = jnp.asarray(mass) > 0
    moved, moments = pytrees.where(trained, (moved, moments), (adapter, state.opt_state))
    if sends != "ab":
        moved, moments = _held((moved, moments), (adapter, state.opt_state), sends)
    change = pytrees.global_norm(jax.tree.map(jnp.subtract, moved, adapter))
    after = dataclasses.replace(state, lora=moved, opt_state=moments, round=state.round + 1)
    return after, change


_compiled_step = jax.jit(server_step, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finish_and_step(aggregation, sends, state, reduced, factor=None):
    update, mass = aggregation.reducer.finish(reduced, state.lora)
    if factor is not None:
        update = jax.tree.map(lambda x: factor * x, update)
    return server_step(aggregation, state, update, mass, sends)


@functools.partial(jax.jit, static_argnums=0)
def _finish(reducer, reduced, start):
    return reducer.finish(reduced, start)


@functools.partial(jax.jit, static_argnums=0)
def _squares(reducer, reduced, start):
    return reducer.squares(reduced, start)


def _held(new: Any, old: Any, sends: str) -> Any:
    """The new tree, with the old leaves of a factor that was not sent."""

    def choose(path: Any, x: Any, y: Any) -> Any:
        names = [getattr(step, "name", "") for step in path]
        factor = next((name for name in reversed(names) if name in ("a", "b")), sends)
        return x if factor in sends else y

    return jax.tree_util.tree_map_with_path(choose, new, old)


# Where every client's adapter is on the host


def _on_host(aggregation, state, collected, clients, starts, factor) -> Aggregated:
    """Attack, rejection, transforms, reducer, LoRA rule and server step, in numpy."""
    adapters, weight = to_host(collected)
    start = to_host(state.lora)
    if starts is None:
        starts = jax.tree.map(lambda x, many: np.broadcast_to(x, many.shape), start, adapters)
    ids = np.asarray(clients if len(clients) else range(len(weight)))
    received = receive(aggregation, adapters, starts, np.asarray(weight), ids, state)
    return conclude(aggregation, state, start, starts, ids, received, factor)


def conclude(
    aggregation: Aggregation,
    state: ServerState,
    start: Adapter,
    starts: Adapter,
    ids: np.ndarray,
    received: Received,
    factor: float | np.ndarray | None = None,
) -> Aggregated:
    """Takes the server's step of what it has received.

    Args: start: the global adapter, on the host; starts, factor: as for `end_round`; ids: int[C].
    """
    updates, weight, metrics, rejected, kept, below = received
    if factor is not None:
        scale = lambda x: np.reshape(factor, (-1, *[1] * (x.ndim - 1))) * np.asarray(x, np.float64)
        updates = jax.tree.map(scale, updates)
    if aggregation.root is not None:
        root = ids == aggregation.root
        kept["root"] = jax.tree.map(lambda x: x[0], vectors.take(updates, root))
        weight = np.where(root, 0.0, weight)
    active = weight > 0
    private = aggregation.privacy is not None  # every round then counts, an empty one too
    too_few = bool(active.any()) and int(active.sum()) < aggregation.reducer.fewest
    failed = not private and (too_few or (not active.any() and bool(rejected)))
    metrics["round/failed"] = float(failed)
    if failed or not (private or active.any()):
        kept.pop("root", None)
        after = dataclasses.replace(state, round=state.round + 1, aggregation_state=kept)
        return Aggregated(after, np.float32(0), metrics, rejected)
    step = _linear_step if aggregation.rule.linear else _rule_step
    own = lambda tree: vectors.take(tree, active)
    number = int(state.round) + 1
    shares, even = _shares(aggregation.reducer, own(updates), weight[active])
    uploads = Uploads(
        ids[active], own(starts), own(updates), shares, even, aggregation.scale, aggregation.rate,
        number, aggregation.products,
    )  # fmt: skip
    if active.any() and not aggregation.rule.personal and not aggregation.products:
        metrics |= exactness.metrics(exactness.squares(uploads))
    if aggregation.secure_sum is not None and active.any():
        sent = aggregation.rule.sent(uploads.updates, number)
        metrics["secure/clipped"] = aggregation.secure_sum.clipped(weight[active], sent)
    if private:
        after, change, kept, told = _private_step(
            aggregation, state, start, uploads, weight[active], below[active], kept
        )
        metrics |= told
    else:
        after, change, kept = step(aggregation, state, start, uploads, weight[active], kept)
    kept.pop("root", None)
    after = dataclasses.replace(after, aggregation_state=kept)
    return Aggregated(after, change, metrics, rejected)


def receive(
    aggregation: Aggregation,
    adapters: Adapter,
    starts: Adapter,
    weight: np.ndarray,
    ids: np.ndarray,
    state: ServerState,
) -> Received:
    """Sends a cohort's updates up: attack, compression, rejection, and the reducer's transforms.

    Args: adapters, starts: leaves [C, ...], on the host; weight: float[C]; ids: int[C].
    """
    updates = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), adapters, starts)
    number, kept = int(state.round) + 1, dict(state.aggregation_state)
    active, metrics = (weight > 0) & (ids != aggregation.root), {}
    honest, below = active, np.ones(len(ids), bool)
    if aggregation.attack is not None and active.any():
        own = vectors.take(updates, active)
        sent, bad = aggregation.attack(own, weight[active], ids[active], number)
        metrics["attack/weight_share"] = float(weight[active][bad].sum() / weight[active].sum())
        updates = jax.tree.map(lambda x, y: _put(x, active, y), updates, sent)
        honest = active & ~_put(active, active, bad)
    if aggregation.counts_everybody:
        updates, below = _protected(aggregation, updates, honest, ids, number, kept)
    if aggregation.local_privacy is not None:
        told, kept = aggregation.local_privacy.count(ids[ids != aggregation.root], kept)
        metrics |= told
    if aggregation.uplink is not None and active.any():
        own, begun = vectors.take(updates, active), vectors.take(starts, active)
        travels = _travels(updates, aggregation.rule, number)
        sent, lost, kept = aggregation.uplink.send(own, ids[active], number, travels, kept, begun)
        metrics["round/compression_error"] = lost
        if aggregation.products:  # other arrays than the updates
            updates = jax.tree.map(lambda y: np.zeros((len(ids), *y.shape[1:]), y.dtype), sent)
        updates = jax.tree.map(lambda x, y: _put(x, active, y), updates, sent)
    accepted = vectors.finite(updates) & np.isfinite(weight) & (weight >= 0)
    rejected = ids[((weight > 0) | ~np.isfinite(weight) | (weight < 0)) & ~accepted].tolist()
    if not accepted.all():  # by selection: 0 times NaN is NaN
        zero = lambda x: np.where(accepted.reshape(-1, *[1] * (x.ndim - 1)), x, np.zeros_like(x))
        updates = jax.tree.map(zero, updates)
    # the clip that counts: attackers leave out their own, and rounding may lengthen a vector. Behind
    # masks there is nothing to clip
    if aggregation.reducer.transforms and len(ids) and aggregation.secure_sum is None:
        clip = lambda update: aggregation.transformed(update, aggregation.reducer.transforms)
        updates = to_host(jax.vmap(clip)(updates))
    metrics["round/rejected"] = float(len(rejected))
    weight = np.where(accepted, weight, 0.0).astype(np.float64)
    return Received(updates, weight, metrics, rejected, kept, below)


def _protected(aggregation, updates, honest, ids, number, kept):
    """Updates as they leave clients: the honest ones clip what they send, and may add noise.

    Returns: updates, likewise; bool[C], whose norm was within the bound before.
    """
    rule, local = aggregation.rule, aggregation.local_privacy
    bound = float(kept["bound"]) if local is None else local.clip
    sent = rule.sent(updates, number)
    below = np.sqrt(vectors.squared_norms(sent)) <= bound
    if local is None and aggregation.secure_sum is not None:  # S is of what the server sums
        size = int(_travels(updates, rule, number).sum())
        bound = max(0.0, bound - aggregation.secure_sum.rounding(size))
    stays = jax.tree.map(np.subtract, updates, sent)
    own = clipped(vectors.take(sent, honest), bound)
    if local is not None:
        own = rule.sent(local.add_noise(own, ids[honest], number), number)
    put = lambda x, new, rest: _put(x, honest, new) + rest
    return jax.tree.map(put, sent, own, stays), below


def _travels(updates: Any, rule: LoraRule, round: int) -> np.ndarray:
    """Which numbers of a flattened update are sent, bool[d]."""
    one = jax.tree.map(lambda x: np.ones(x.shape[1:], bool), updates)
    sent = rule.sent(one, round)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(sent)]).astype(bool)


def _put(x: np.ndarray, where: np.ndarray, new: np.ndarray) -> np.ndarray:
    x = np.array(x)
    x[where] = new
    return x


def _shares(reducer, updates, weight) -> tuple[np.ndarray, np.ndarray]:
    """The reducer's shares of the clients that count, by weight and where all weigh the same; of a
    reducer without shares, even ones.
    """
    same = np.ones(len(weight))
    if not reducer.yields_shares:
        return same / len(same), same / len(same)
    return reducer.shares(updates, weight), reducer.shares(updates, same)


def _linear_step(aggregation, state, start, uploads, weight, kept):
    """The reducer's update of the factors that were sent, then the server optimiser's step."""
    rule, sends = aggregation.rule, aggregation.rule.sends(uploads.round)
    updates, secure = rule.sent(uploads.updates, uploads.round), aggregation.secure_sum
    if secure is None:
        ended = jax.tree.map(lambda x, y: np.asarray(x, np.float64) + y, start, updates)
        update, mass, kept = aggregation.reducer.reduce(ended, weight, start, kept)
    else:
        mass = secure.mass(weight, uploads.round)
        total = secure.total(weight, updates, uploads.round)
        update = jax.tree.map(lambda x: x / mass, total)
    bare = dataclasses.replace(state, aggregation_state={})
    after, change = _compiled_step(aggregation, bare, as_float32(update), np.float32(mass), sends)
    return after, change, rule.remember(uploads, after.lora, kept)


def _private_step(aggregation, state, start, uploads, weight, below, kept):
    """The noisy mean of what was sent, then the server optimiser's step."""
    rule, secure = aggregation.rule, aggregation.secure_sum
    updates = rule.sent(uploads.updates, uploads.round)
    bare = dataclasses.replace(state, aggregation_state={})
    size = int(_travels(updates, rule, uploads.round).sum())
    released = aggregation.privacy.release(updates, weight, below, size, kept, secure)
    after, change, kept, told = _noisy_step(aggregation, bare, released)
    return after, change, rule.remember(uploads, after.lora, kept), told


def _noisy_step(aggregation, state, released):
    """The server optimiser's step along what privacy has released; noise stays off the rest."""
    update, told, kept = released
    rule, number = aggregation.rule, int(state.round) + 1
    update = as_float32(rule.sent(update, number))
    after, change = _compiled_step(aggregation, state, update, np.float32(1), rule.sends(number))
    return after, change, kept, told


def _rule_step(aggregation, state, start, uploads, weight, kept):
    """The LoRA rule's own step."""
    adapter, kept = aggregation.rule.combine(uploads, start, kept)
    moved = vectors.squared_norms(vectors.add_axis(vectors.less(adapter, start)))
    number = state.round + 1
    return dataclasses.replace(state, lora=adapter, round=number), np.sqrt(moved[0]), kept
