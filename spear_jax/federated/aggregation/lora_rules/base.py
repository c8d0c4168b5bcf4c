"""The part of aggregation that knows that an adapter is two factors, a and b.

The mean of a times the mean of b is not the mean of the products a b. A LoRA rule says which factor
clients train and send, what each client starts from, and how the next global adapter is made.

A *linear* rule leaves the last step to the reducer and the server optimiser: its update is a sum of
what clients sent. Any other rule gets what every client sent, and returns the next adapter:

    starts = rule.starts(adapter, kept, clients)        # None: the global adapter
    adapter, kept = rule.combine(uploads, adapter, kept)

`kept` holds the rule's arrays from round to round, on the host. They are part of the checkpoint.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from spear_jax.federated.aggregation import low_rank, vectors
from spear_jax.models.params import Adapter, LowRank

Kept = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Uploads:
    """What the server has accepted of a round, on the host: n clients that trained.

    Attributes:
        clients: int[n], their ids.
        starts: the adapters that they received, leaves [n, ...].
        updates: δ_k, what training added, likewise.
        shares: float64[n], p_k of the reducer, in sum 1; 0 for a client that was not chosen.
        even: the reducer's shares where every client weighs the same.
        scale: s = alpha / rank.
        rate: η, `federation.server_rate`.
        round: 1-based.
        products: the rank of the changes of products that clients sent; `updates` then has their
            factors. 0: clients sent updates of their own factors.
    """

    clients: np.ndarray
    starts: Adapter
    updates: Adapter
    shares: np.ndarray
    even: np.ndarray
    scale: float
    rate: float
    round: int
    products: int = 0

    @property
    def ended(self) -> Adapter:
        """Returns the adapters that training ended with, leaves [n, ...]; float64."""
        return jax.tree.map(lambda x, y: np.asarray(x, np.float64) + y, self.starts, self.updates)

    def chosen(self) -> "Uploads":
        """Returns the clients with a share."""
        own = self.shares > 0
        rows = lambda tree: vectors.take(tree, own)
        return dataclasses.replace(
            self, clients=self.clients[own], starts=rows(self.starts), updates=rows(self.updates),
            shares=self.shares[own], even=self.even[own],
        )  # fmt: skip

    def mean_step(self, adapter: Adapter) -> Adapter:
        """Returns adapter + η Σ p_k δ_k, float32."""
        step = lambda old, x: old + self.rate * low_rank.mean(self.shares, x)
        return as_float32(jax.tree.map(step, adapter, self.updates))

    def pairs(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yields (projection, a float64[n, L', in, R], b float64[n, L', R, out]), as trained.

        Of products, a = [a⁰ | x] and b = [b⁰; y] of rank R + r', whose product is a⁰ b⁰ + x y.
        """
        ended = lambda x, y: np.asarray(x, np.float64) + y  # of one projection at a time
        for name, start in self.starts.by_name().items():
            update = getattr(self.updates, name)
            if self.products:
                yield name, *low_rank.stack([1.0, 1.0], [start.a, update.a], [start.b, update.b])
                continue
            pair = jax.tree.map(ended, start, update)
            yield name, pair.a, pair.b


class LoraRule(abc.ABC):
    """How clients' factors become the next global adapter; a frozen dataclass, hashable.

    Class attributes:
        name: of `federation.lora_rule`.
        linear: whether the reducer's update, of the factors that are sent, is the rule's.
        mixed_ranks: whether clients may have ranks of their own.
        changes_base: whether the base weights change (`kept["base"]`).
        personal: whether clients keep a part of the adapter to themselves, so that a run has no
            model for all.
        rates: whether η other than 1 has a meaning.
        turns_basis: whether the adapter's columns mean something else after each round.
        adds_products: whether the products of clients' factors are all that it reads.
        penalty: λ of the norm of what lies behind `tails`, added to each local step's loss.
    """

    name: ClassVar[str]
    linear: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    rates: ClassVar[bool] = True
    turns_basis: ClassVar[bool] = False
    adds_products: ClassVar[bool] = False
    penalty: float = 0.0

    def trains(self, round: int) -> str:
        """Returns the factors that clients train: "ab", "a" or "b". Args: round: 1-based."""
        return "ab"

    def sends(self, round: int) -> str:
        """Returns the factors that clients send."""
        return self.trains(round)

    def sent(self, update: Any, round: int) -> Any:
        """Returns an update with zeros in what stays with its client. Args: update: leaves [..., L',
        in, out].
        """
        sends = self.sends(round)
        return update if sends == "ab" else only(update, sends)

    def own_bytes(self, adapter: Adapter, rank: int) -> int:
        """Returns the bytes that are kept for each client of the population; where `personal`."""
        return 0

    def init(self, adapter: Adapter, ranks: np.ndarray) -> Kept:
        """Returns what is kept before round 1. Args: ranks: int[K], of all clients."""
        mixed = ranks.min() < rank_of(adapter)
        kept: Kept = {"rank": ranks.astype(np.int32)} if mixed else {}
        if self.changes_base:
            kept["base"] = {
                name: np.zeros((*pair.a.shape[:-1], pair.b.shape[-1]), np.float32)
                for name, pair in adapter.by_name().items()
            }
            kept["base_rank"] = np.zeros((), np.int32)
        return kept

    def starts(self, adapter: Adapter, kept: Kept, clients: list[int]) -> Adapter | None:
        """Returns the adapters that clients receive, leaves [C, ...]; None: the global one.

        A client of rank r gets the first r columns of a and rows of b. The others are zero, and
        zeros in both factors have no gradient.
        """
        return sliced(adapter, kept["rank"][clients]) if "rank" in kept else None

    def tails(self, kept: Kept, clients: list[int], rank: int) -> np.ndarray | None:
        """Returns bool[C, R], the rank indices under `penalty`; None: nothing is. Args: rank: R."""
        return None

    def remember(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> Kept:
        """Returns what is kept after a linear round. Args: adapter: the next global one."""
        return kept

    def combine(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> tuple[Adapter, Kept]:
        """Returns the next global adapter and what is kept; only of a rule that is not linear.

        Args: adapter: the global one of this round.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves this to the server optimiser")

    def policies(self, adapter: Adapter, kept: Kept) -> list[Adapter]:
        """Returns the adapters to evaluate: the global one, or every client's."""
        return [adapter]

    def bytes_up(self, adapter: Adapter, rank: int, round: int) -> int:
        """Returns the bytes that a client of that rank sends."""
        return factor_bytes(adapter, rank, self.sends(round))

    def bytes_down(self, adapter: Adapter, rank: int, round: int, kept: Kept) -> int:
        """Returns the bytes that a client of that rank needs to start, if it has kept nothing."""
        changed = base_bytes(adapter, int(kept["base_rank"])) if self.changes_base else 0
        return factor_bytes(adapter, rank, "ab") + changed


def sliced(adapter: Adapter, ranks: np.ndarray) -> Adapter:
    """Returns the adapter cut to each rank and padded with zeros, leaves [n, ...]."""

    def cut(pair: LowRank) -> LowRank:
        own = np.arange(pair.a.shape[-1]) < np.asarray(ranks)[:, None]  # [n, R]
        a, b = np.asarray(pair.a), np.asarray(pair.b)
        return host_pair(a * own[:, None, None, :], b * own[:, None, :, None])

    return Adapter(**{name: cut(pair) for name, pair in adapter.by_name().items()})


def host_pair(a: Any, b: Any) -> LowRank:
    """Returns factors that lie on the host as a pair."""
    return LowRank(a, b)


def only(adapter: Adapter, factors: str) -> Adapter:
    """Returns the adapter with zeros in place of the factors that are not named."""
    zero = lambda path, x: x if path[-1].name in factors else x * 0
    return jax.tree_util.tree_map_with_path(zero, adapter)


def as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def rank_of(adapter: Adapter) -> int:
    """Returns R."""
    return next(iter(adapter.by_name().values())).a.shape[-1]


def factor_bytes(adapter: Adapter, rank: int, factors: str) -> int:
    """Returns the bytes of an adapter of that rank, float32. Args: factors: "ab", "a" or "b"."""
    widths = [
        pair.a.shape[0] * (pair.a.shape[1] * ("a" in factors) + pair.b.shape[2] * ("b" in factors))
        for pair in adapter.by_name().values()
    ]
    return 4 * rank * sum(widths)


def base_bytes(adapter: Adapter, rank: int) -> int:
    """Returns the bytes of a change of the base, of that rank in each projection and layer: as
    factors, or whole where that is less.
    """
    shapes = [(*pair.a.shape[:2], pair.b.shape[2]) for pair in adapter.by_name().values()]
    return sum(4 * layers * min(rank * (m + n), m * n) for layers, m, n in shapes)
