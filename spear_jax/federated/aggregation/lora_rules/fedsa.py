"""FedSA-LoRA: both factors are trained; a is shared, every client keeps its b.

Source: FedSA-LoRA (arXiv 2410.01463). A client that was not sampled, or did not train, keeps the b
that it had; b starts at the adapter's, which is zero for a new one.
"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from spear_jax.federated.aggregation.lora_rules.base import (
    Kept,
    LoraRule,
    Uploads,
    as_float32,
    factor_bytes,
    host_pair,
)
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class FedSA(LoraRule):
    """Averages a. Keeps `b`: {projection: float32[K, L', R, out]}."""

    name: ClassVar[str] = "fedsa"
    personal: ClassVar[bool] = True

    def sends(self, round: int) -> str:
        return "a"

    def init(self, adapter: Adapter, ranks: np.ndarray) -> Kept:
        copies = lambda x: np.repeat(np.asarray(x, np.float32)[None], len(ranks), axis=0)
        return {"b": {name: copies(pair.b) for name, pair in adapter.by_name().items()}}

    def starts(self, adapter: Adapter, kept: Kept, clients: list[int]) -> Adapter:
        many = lambda x: np.repeat(np.asarray(x)[None], len(clients), axis=0)
        pairs = adapter.by_name().items()
        return Adapter(**{n: host_pair(many(pair.a), kept["b"][n][clients]) for n, pair in pairs})

    def remember(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> Kept:
        own = jax.tree.map(np.array, kept["b"])  # a copy: a checkpoint may still be writing it
        for name, pair in as_float32(uploads.ended).by_name().items():
            own[name][uploads.clients] = pair.b
        return kept | {"b": own}

    def policies(self, adapter: Adapter, kept: Kept) -> list[Adapter]:
        count = len(next(iter(kept["b"].values())))
        mine = self.starts(adapter, kept, list(range(count)))
        return [jax.tree.map(lambda x, c=c: x[c], mine) for c in range(count)]

    def own_bytes(self, adapter: Adapter, rank: int) -> int:
        return factor_bytes(adapter, rank, "b")

    def bytes_down(self, adapter: Adapter, rank: int, round: int, kept: Kept) -> int:
        return factor_bytes(adapter, rank, "a")
