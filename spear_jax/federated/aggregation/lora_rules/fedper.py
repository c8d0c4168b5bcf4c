"""FedPer for adapters: the last layers' adapters stay with their clients, the others are averaged.

Source: FedPer (arXiv 1912.00818). Departure: the layers that stay are those of the adapter; the base has
no part in it. A client that was not sampled, or did not train, keeps the layers that it had; they begin
as the adapter's.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.federated.aggregation.lora_rules.base import (
    Kept,
    LoraRule,
    Uploads,
    as_float32,
    factor_bytes,
)
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class FedPer(LoraRule):
    """Averages all layers but the last n. Keeps `own`: leaves float32[K, n, ...].

    Attributes:
        personal_layers: n.
    """

    name: ClassVar[str] = "fedper"
    personal: ClassVar[bool] = True
    personal_layers: int = 1

    def sent(self, update: Any, round: int) -> Any:
        def cut(x: Any) -> Any:  # leaves end in [L', in, out]
            shared = np.arange(x.shape[-3]) < x.shape[-3] - self.personal_layers
            return x * shared[:, None, None]

        return jax.tree.map(cut, update)

    def init(self, adapter: Adapter, ranks: np.ndarray) -> Kept:
        mine = lambda x: np.asarray(x, np.float32)[-self.personal_layers :]
        return {"own": jax.tree.map(lambda x: np.repeat(mine(x)[None], len(ranks), 0), adapter)}

    def starts(self, adapter: Adapter, kept: Kept, clients: list[int]) -> Adapter:
        def joined(x: Any, own: np.ndarray) -> np.ndarray:
            many = np.repeat(np.asarray(x)[None], len(clients), axis=0)
            many[:, -self.personal_layers :] = own[clients]
            return many

        return jax.tree.map(joined, adapter, kept["own"])

    def remember(self, uploads: Uploads, adapter: Adapter, kept: Kept) -> Kept:
        own = jax.tree.map(np.array, kept["own"])  # a copy: a checkpoint may still be writing it

        def put(old: np.ndarray, new: np.ndarray) -> None:
            old[uploads.clients] = new[:, -self.personal_layers :]

        jax.tree.map(put, own, as_float32(uploads.ended))
        return kept | {"own": own}

    def policies(self, adapter: Adapter, kept: Kept) -> list[Adapter]:
        clients = list(range(len(jax.tree.leaves(kept["own"])[0])))
        mine = self.starts(adapter, kept, clients)
        return [jax.tree.map(lambda x, c=c: x[c], mine) for c in clients]

    def bytes_up(self, adapter: Adapter, rank: int, round: int) -> int:
        return factor_bytes(adapter, rank, "ab") - self.own_bytes(adapter, rank)

    def bytes_down(self, adapter: Adapter, rank: int, round: int, kept: Kept) -> int:
        return self.bytes_up(adapter, rank, round)

    def own_bytes(self, adapter: Adapter, rank: int) -> int:
        layers = jax.tree.leaves(adapter)[0].shape[0]
        if self.personal_layers >= layers:
            raise UserError(
                f"aggregation.personal_layers is {self.personal_layers}, but the adapter has {layers} "
                "layers, and one at least must be shared; lower it, or take "
                "federation.aggregation=local."
            )
        return factor_bytes(adapter, rank, "ab") // layers * self.personal_layers
