"""What training changed in the product a b, cut to a rank.

    P_k = a_k b_k − a_k⁰ b_k⁰ ≈ x_k y_k,    x [in, r'], y [r', out]

in each layer and projection: the nearest product of that rank. P_k has the rank 2 R at most, for which
r' = 2 R loses nothing. Biased; the error is √Σ σ² of the singular values that are dropped.

x and y are no factors of an adapter: their means have no meaning, so that only rules that add products
take them (`LoraRule.adds_products`). Memory of what was lost would be a matrix [in, out] for each
client and projection; there is none.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from spear_jax.federated.aggregation import low_rank, vectors
from spear_jax.federated.aggregation.lora_rules.base import LoraRule, factor_bytes, host_pair
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class RankUplink:
    """Sends changes of products in place of factors. Attributes: rank: r'."""

    name: ClassVar[str] = "rank"
    error_feedback: ClassVar[bool] = False
    rank: int = 4

    def init_kept(self, adapter: Adapter, clients: int) -> dict[str, Any]:
        """Returns what is kept before round 1: nothing."""
        return {}

    def bytes_up(self, rule: LoraRule, adapter: Adapter, rank: int, round: int) -> int:
        """Returns the bytes that a client of that rank sends, 4 min(r', 2 rank) (in + out) for each
        projection and layer: columns behind the rank of P_k are zero, and do not travel.
        """
        return factor_bytes(adapter, min(self.rank, 2 * rank), "ab")

    def send(
        self,
        updates: Adapter,
        clients: np.ndarray,
        round: int,
        sent: np.ndarray,
        kept: dict[str, Any],
        starts: Adapter,
    ) -> tuple[Adapter, float, dict[str, Any]]:
        """Sends changes of products up.

        Args: updates, starts: leaves float32[n, ...]; the others as for `Uplink.send`.
        Returns: x and y as the factors of an adapter of rank r', leaves float32[n, ...], NaN of a
            client whose update is not finite; the mean of ‖P̂ − P‖ / ‖P‖ over the others; `kept`.
        """
        finite, pairs = vectors.finite(updates), {}
        lost = whole = np.zeros(int(finite.sum()))
        of = lambda x: np.asarray(x, np.float64)[finite]
        for name, start in starts.by_name().items():
            update = getattr(updates, name)
            # a b − a⁰ b⁰ = δa b + a⁰ δb: no difference of large products
            x, y = low_rank.stack(
                [1.0, 1.0], [of(update.a), of(start.a)], [of(start.b) + of(update.b), of(update.b)]
            )
            a, b, dropped = low_rank.truncate(x, y, self.rank)
            lost = lost + np.sum(dropped**2, -1)
            whole = whole + np.sum(low_rank.product_norm(x, y) ** 2, -1)
            pairs[name] = host_pair(_with_nan(a, finite), _with_nan(b, finite))
        ratio = np.sqrt(np.divide(lost, whole, out=np.zeros_like(lost), where=whole > 0))
        return Adapter(**pairs), float(ratio.mean()) if len(ratio) else 0.0, kept


def _with_nan(x: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Returns float32[n, ...] with rows of NaN where a client is not finite."""
    whole = np.full((len(finite), *x.shape[1:]), np.nan, np.float32)
    whole[finite] = x
    return whole
