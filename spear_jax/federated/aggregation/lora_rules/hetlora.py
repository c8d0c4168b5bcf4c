"""HetLoRA: clients of different ranks, weighed by the norms of their products, pruned by themselves.

Client k receives the first r_k columns and rows. With S_k = ‖a_k b_k‖_F over all layers and
projections, p_k = S_k / Σ S. Its loss has the penalty λ Σ ‖a[:, c:]‖ ‖b[c:, :]‖ with
c = max(r_min, ⌊γ r_k⌋). Where that sum ends below the one it received, r_k becomes c.

    value form   a ← Σ p_k pad(a_k)               (the paper), b likewise
    delta form   a ← a + Σ p_k pad(δa_k)          (the default)

Source: HetLoRA (arXiv 2401.06432). Departures:
  1. The delta form; `normalise="per_rank"`, where a rank index is divided by the shares of the
     clients that have it, in place of being diluted; `weights="method"`, the reducer's shares.
  2. Where every S_k is 0, clients weigh the same.
  3. A rank is compared with the sum that the client received, and λ is 5e-3 (not in the paper).
"""

import dataclasses
from typing import ClassVar

import numpy as np

from spear_jax.federated.aggregation import low_rank
from spear_jax.federated.aggregation.lora_rules.base import (
    Kept,
    LoraRule,
    Uploads,
    as_float32,
    host_pair,
    rank_of,
)
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class HetLoRA(LoraRule):
    """Sums of padded factors. Keeps `rank`: int32[K].

    Attributes:
        form: "delta" or "value".
        normalise: "diluted" or "per_rank".
        weights: "norms" (S_k) or "method".
        gamma: γ.
        penalty: λ.
        min_rank: r_min.
    """

    name: ClassVar[str] = "hetlora"
    linear: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    rates: ClassVar[bool] = False
    form: str = "delta"
    normalise: str = "diluted"
    weights: str = "norms"
    gamma: float = 0.99
    penalty: float = 5e-3
    min_rank: int = 1

    def init(self, adapter: Adapter, ranks: np.ndarray) -> Kept:
        return {"rank": ranks.astype(np.int32)}

    def tails(self, kept: Kept, clients: list[int], rank: int) -> np.ndarray:
        ranks, index = kept["rank"][clients], np.arange(rank)
        return (index >= self.smaller(ranks)[:, None]) & (index < ranks[:, None])

    def smaller(self, ranks: np.ndarray) -> np.ndarray:
        """Returns c of each rank."""
        return np.maximum(self.min_rank, np.floor(self.gamma * ranks + 1e-9).astype(int))

    def combine(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> tuple[Adapter, Kept]:
        chosen = uploads.chosen()
        values = chosen.ended if self.form == "value" else chosen.updates
        shares = self.shares(chosen)
        own = np.arange(rank_of(adapter)) < kept["rank"][chosen.clients][:, None]  # [n, R]
        p = np.broadcast_to(shares[:, None], own.shape) * (own if self._per_rank else 1.0)
        if self._per_rank:
            p = p / np.where(p.sum(0) > 0, p.sum(0), 1.0)
        add = lambda old, x: x if self.form == "value" else old + x
        pairs = {
            name: host_pair(
                add(np.asarray(getattr(adapter, name).a), np.einsum("kr,klmr->lmr", p, pair.a)),
                add(np.asarray(getattr(adapter, name).b), np.einsum("kr,klrn->lrn", p, pair.b)),
            )
            for name, pair in values.by_name().items()
        }
        return as_float32(Adapter(**pairs)), kept | {"rank": self._pruned(uploads, kept["rank"])}

    @property
    def _per_rank(self) -> bool:
        return self.normalise == "per_rank"

    def shares(self, chosen: Uploads) -> np.ndarray:
        """Returns p_k, float64[n]: S_k times the reducer's even shares, in sum 1."""
        if self.weights == "method":
            return chosen.shares
        square = sum(low_rank.product_norm(a, b) ** 2 for _, a, b in chosen.pairs())
        norms = np.sqrt(np.sum(square, -1))
        weights = chosen.even * norms if norms.any() else chosen.even
        return weights / weights.sum()

    def _pruned(self, uploads: Uploads, ranks: np.ndarray) -> np.ndarray:
        ranks = ranks.copy()
        tails = self.tails({"rank": ranks}, list(uploads.clients), rank_of(uploads.starts))
        before, after = tail_norm(uploads.starts, tails), tail_norm(uploads.ended, tails)
        shrink = after < before
        ranks[uploads.clients[shrink]] = self.smaller(ranks[uploads.clients])[shrink]
        return ranks


def tail_norm(adapters: Adapter, tails: np.ndarray) -> np.ndarray:
    """Returns Σ ‖a[:, tail]‖ ‖b[tail, :]‖ over layers and projections, float64[n].

    Args: adapters: leaves [n, ...]; tails: bool[n, R].
    """
    total = np.zeros(len(tails))
    for pair in adapters.by_name().values():
        a = np.asarray(pair.a, np.float64) * tails[:, None, None, :]
        b = np.asarray(pair.b, np.float64) * tails[:, None, :, None]
        total += np.sum(np.linalg.norm(a, axis=(2, 3)) * np.linalg.norm(b, axis=(2, 3)), -1)
    return total
