"""What travels between server and clients: adapters and numbers, never text.

    down   adapter, the server's part of the algorithm's state, round, budget used
    up     update, weight, training metrics as (total, count), numbers of the rollouts

Every array is checked by name, shape, type and for NaN where it arrives; nothing is unpickled.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from spear_jax.core import pytrees
from spear_jax.core.types import Mean
from spear_jax.federated.local_training import NOT_FINITE
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.single_client import ClientUpdate
from spear_jax.flower import PROTOCOL
from spear_jax.flower.records import Refused, check_answer, check_protocol, record_of
from spear_jax.models.params import Adapter

OWN = ("weight", "active", "answers", "wrong", "learning_rate")  # of an update, beside its metrics


@dataclasses.dataclass(frozen=True)
class Request:
    """A client's round, as the server asks for it.

    Attributes:
        run: names the run, so that a node keeps runs apart.
        client: whom the server means.
        round: 1-based.
        adapter: the global one, float32 on the host.
        state: the server's part of the algorithm's state.
        used: what the run has used before the round.
    """

    run: str
    client: int
    round: int
    adapter: Adapter
    state: dict[str, Any]
    used: BudgetUsed


def write_request(request: Request) -> RecordDict:
    """Returns a request as records."""
    asked = {"protocol": PROTOCOL, "run": request.run, "client": request.client}
    used = {f"used_{name}": float(value) for name, value in vars(request.used).items()}
    return RecordDict(
        {
            "asked": ConfigRecord({**asked, "round": request.round, **used}),
            "adapter": _arrays(request.adapter),
            "state": _arrays(request.state),
        }
    )


def read_request(records: RecordDict, adapter: Adapter, state: dict[str, Any]) -> Request:
    """Reads a request.

    Args: adapter, state: of the same structure, shapes and types.
    Raises: Refused.
    """
    check_protocol(records, "asked")
    asked = record_of(records, "asked", ConfigRecord)
    used = {name: float(asked[f"used_{name}"]) for name in vars(BudgetUsed())}
    return Request(
        run=str(asked["run"]),
        client=int(asked["client"]),
        round=int(asked["round"]),
        adapter=_tree(record_of(records, "adapter", ArrayRecord), adapter),
        state=_tree(record_of(records, "state", ArrayRecord), state),
        used=BudgetUsed(**used),
    )


def write_update(update: ClientUpdate, sends: str) -> RecordDict:
    """Returns an update as records, without text. Args: sends: its factors, "ab", "a" or "b"."""
    answers, wrong = update.answers
    values = (update.weight, float(update.active), answers, wrong, update.learning_rate)
    counts = {name: [float(x.total), float(x.count)] for name, x in update.counts.items()}
    return RecordDict(
        {
            "answer": ConfigRecord({"protocol": PROTOCOL}),
            "update": _arrays(update.update, sends),
            "counts": MetricRecord(counts),
            "metrics": MetricRecord({name: float(x) for name, x in update.metrics.items()}),
            "own": MetricRecord(dict(zip(OWN, map(float, values), strict=True))),
        }
    )


def read_update(records: RecordDict, adapter: Adapter, sends: str) -> ClientUpdate:
    """Reads an update.

    Args: adapter: the global one; sends: the factors that a client sends.
    Raises: Refused for a message of another protocol, and for arrays or numbers that are missing,
        too many, of another shape, or not finite.
    """
    check_answer(records)
    own, metrics = _numbers(records, "own"), _numbers(records, "metrics")
    if own.keys() != set(OWN):
        raise Refused(f"its numbers are {sorted(own)}, not {sorted(OWN)}")
    if own["weight"] < 0:
        raise Refused(f"its weight is {own['weight']:g}, below 0")
    counts = {}
    for name, pair in record_of(records, "counts", MetricRecord).items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(math.isfinite, pair))):
            raise Refused(f"its metric {name[:40]!r} is not a finite total and count")
        counts[name] = Mean(*map(float, pair))
    if NOT_FINITE not in counts:
        raise Refused("it does not say whether its training was finite")
    return ClientUpdate(
        update=_tree(
            record_of(records, "update", ArrayRecord), jax.tree.map(np.zeros_like, adapter), sends
        ),
        weight=own["weight"],
        active=bool(own["active"]),
        counts=counts,
        metrics=metrics,
        answers=(int(own["answers"]), int(own["wrong"])),
        learning_rate=own["learning_rate"],
        client_state={},
        traces=[],
    )


def as_vector(tree: Any, sends: str) -> np.ndarray:
    """Returns the factors of an adapter that are sent, behind each other, [d]."""
    return np.concatenate([np.ravel(x) for x in _leaves(tree, sends).values()])


def from_vector(vector: np.ndarray, adapter: Adapter, sends: str) -> Any:
    """Returns the tree of a vector, and zeros for the factors that are not sent."""
    like = jax.tree.map(lambda x: np.zeros(np.shape(x), vector.dtype), adapter)
    leaves = _leaves(like, sends)
    ends = np.cumsum([leaf.size for leaf in leaves.values()])[:-1]
    parts = zip(leaves.items(), np.split(vector, ends), strict=True)
    return _filled({name: part.reshape(leaf.shape) for (name, leaf), part in parts}, like)


def size(records: Any) -> int:
    """Returns the bytes of records as Flower sends them, object by object."""
    return len(records.deflate()) + sum(map(size, (records.children or {}).values()))


def _arrays(tree: Any, factors: str = "ab") -> ArrayRecord:
    """The leaves of a tree by their paths, as "q.a"; of an adapter some factors alone."""
    return ArrayRecord({name: Array(np.asarray(x)) for name, x in _leaves(tree, factors).items()})


def _leaves(tree: Any, factors: str) -> dict[str, Any]:
    named = jax.tree_util.tree_leaves_with_path(pytrees.to_dicts(tree))
    paths = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in named}
    if factors == "ab":
        return paths
    return {name: leaf for name, leaf in paths.items() if name.endswith(f".{factors}")}


def _tree(record: ArrayRecord, like: Any, factors: str = "ab") -> Any:
    """The tree of a record's arrays; of an adapter, factors that are not sent are those of `like`.

    Raises: Refused.
    """
    wanted = _leaves(like, factors)
    if record.keys() != wanted.keys():
        raise Refused(f"its arrays are not {', '.join(wanted) or 'none'}")
    arrays = {}
    for name, leaf in wanted.items():
        leaf, given = np.asarray(leaf), record[name]
        if tuple(given.shape) != leaf.shape or given.dtype != str(leaf.dtype):
            shape = tuple(given.shape)
            raise Refused(f"{name} is {given.dtype}{shape}, not {leaf.dtype}{leaf.shape}")
        try:
            array = given.numpy()
        except ValueError as error:
            raise Refused(f"{name} cannot be read") from error
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise Refused(f"{name} is not what it says")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Refused(f"{name} has numbers that are NaN or infinite")
        arrays[name] = array
    return _filled(arrays, like)


def _filled(arrays: dict[str, Any], like: Any) -> Any:
    """The tree of arrays by their paths; where there is none, the leaf of `like`."""
    dicts = pytrees.to_dicts(like)
    named, structure = jax.tree_util.tree_flatten_with_path(dicts)
    path = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    leaves = [arrays.get(path(where), leaf) for where, leaf in named]
    return pytrees.from_dicts(jax.tree.unflatten(structure, leaves), like)


def _numbers(records: Mapping[str, Any], name: str) -> dict[str, float]:
    """The numbers of a record. Raises: Refused where one is none or not finite."""
    record = record_of(records, name, MetricRecord)
    for key, value in record.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Refused(f"its number {key[:40]!r} is not finite")
    return {key: float(value) for key, value in record.items()}
