"""The way up: every client's update is encoded and decoded again."""

import dataclasses
from typing import Any

import jax
import numpy as np

from spear_jax.core.rng import path_rng, purpose
from spear_jax.federated.aggregation.compression.base import Compressor
from spear_jax.federated.aggregation.lora_rules.base import LoraRule
from spear_jax.models.params import Adapter

QUANTISE = purpose("quantise")


@dataclasses.dataclass(frozen=True)
class Uplink:
    """What happens between a client and the server.

    Attributes:
        compressor: encodes and decodes.
        error_feedback: whether a client keeps what was lost, and adds it to its next update.
        together: whether all clients of a round have one stream, so that their codes can be summed.
        seed: of the rounding; a client's stream in a round depends on nothing else.
    """

    compressor: Compressor
    error_feedback: bool = False
    together: bool = False
    seed: int = 0

    def init_kept(self, adapter: Any, clients: int) -> dict[str, Any]:
        """Returns the clients' memories, {"memory": float32[K, d]} of zeros, where they have any."""
        size = sum(x.size for x in jax.tree.leaves(adapter))
        return {"memory": np.zeros((clients, size), np.float32)} if self.error_feedback else {}

    def bytes_up(self, rule: LoraRule, adapter: Adapter, rank: int, round: int) -> int:
        """Returns the bytes that a client of that rank sends."""
        return self.compressor.bytes_of(rule.bytes_up(adapter, rank, round) // 4)

    def send(
        self,
        updates: Any,
        clients: np.ndarray,
        round: int,
        sent: np.ndarray,
        kept: dict[str, Any],
        starts: Any = None,
    ) -> tuple[Any, float, dict[str, Any]]:
        """Sends updates up.

        Args:
            updates: leaves float32[n, ...]; clients: int[n], their ids.
            sent: bool[d], the numbers that travel; the others stay as they are.
            starts: what clients started from, likewise; not needed here.
        Returns: what the server reads, likewise; the mean of ‖x̂ − x‖ / ‖x‖ over clients with
            an update; what is kept.
        """
        leaves, tree = jax.tree.flatten(updates)
        flat = np.concatenate([np.reshape(x, (len(clients), -1)) for x in leaves], 1)
        flat, memory = flat.astype(np.float64), kept.get("memory")
        memory = None if memory is None else memory.copy()
        errors: list[float] = []
        for row, client in zip(flat, clients, strict=True):
            x = row[sent] + (0.0 if memory is None else memory[client][sent])
            if not np.isfinite(x).all():  # top-k would hide it; it is to be rejected
                continue
            path = (round,) if self.together else (round, int(client))
            code = self.compressor.encode(x, path_rng(self.seed, QUANTISE, *path))
            row[sent] = self.compressor.decode(code, len(x))
            lost = x - row[sent]
            errors.append(float(np.linalg.norm(lost) / (np.linalg.norm(x) or 1.0)))
            if memory is not None:
                memory[client, sent] = lost
        ends = np.cumsum([x[0].size for x in leaves])[:-1]
        parts = zip(np.split(flat, ends, axis=1), leaves, strict=True)
        back = [np.float32(part).reshape(x.shape) for part, x in parts]
        kept = kept if memory is None else kept | {"memory": memory}
        return jax.tree.unflatten(tree, back), float(np.mean(errors or [0.0])), kept
