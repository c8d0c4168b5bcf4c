"""The frozen parts of a federation: clients and their data, method, weights, and how they train."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spear_jax.algorithms.base import Algorithm
from spear_jax.core.mesh import MODEL, replicate
from spear_jax.core.rng import path_rng, purpose
from spear_jax.core.types import Cohort
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.federated.client_sampling import sample_cohort, sample_poisson
from spear_jax.federated.local_training import LocalConfig
from spear_jax.federated.participation import Asynchronous, Participation
from spear_jax.federated.schedule import Schedule
from spear_jax.models.decoder import Decoder
from spear_jax.models.lora import add_to_base
from spear_jax.packing.blocks import choose_block_shape, choose_small
from spear_jax.packing.rows import prompts
from spear_jax.packing.shape_buckets import BlockShape, ShapeBuckets
from spear_jax.rollout.policy import as_policy
from spear_jax.rollout.worker import RolloutWorker

COHORT = purpose("cohort")
POISSON = purpose("poisson")


@dataclasses.dataclass(frozen=True)
class Federation:
    """Everything that a round needs except the server's state.

    Attributes:
        base: decoder parameters, shared by all clients.
        clients: for each client, the positions of its examples in the training set; the server's
            own client (`Aggregation.root`), where there is one, is the last.
        shapes: the run's shape buckets.
        local: static settings of local training.
        aggregation: how updates become the next global adapter.
        schedule: the learning rate of a round.
        participation: who reports back, on a simulated clock; None: all do.
        asynchronous: rounds without a cohort; None: cohorts.
        ditto: λ of the pull on clients' own adapters; None: they have none.
        local_only: clients are never averaged; every one keeps an adapter of its own.
        clients_per_round: the cohort's size; sampling: "uniform", "weighted" by examples, or
            "poisson": each client by itself, so that the size is an expected one.
        cohort_limit: of more clients that "poisson" draws, so many are kept; 0: all.
        colliding_streams: A7 of the published code: client streams keyed by round + client.
        max_tokens_per_block: of packed sequences.
        seed: of all random streams.
    """

    algorithm: Algorithm
    worker: RolloutWorker
    decoder: Decoder
    base: Any
    mesh: Mesh
    shapes: ShapeBuckets
    clients: list[np.ndarray]
    local: LocalConfig
    aggregation: Aggregation
    schedule: Schedule
    participation: Participation | None
    asynchronous: Asynchronous | None
    ditto: float | None
    local_only: bool
    clients_per_round: int
    sampling: str
    colliding_streams: bool
    max_tokens_per_block: int
    seed: int
    cohort_limit: int = 0

    def cohort(self, round: int) -> Cohort:
        """Returns a round's clients and their host-side random streams; a function of (seed, round)
        alone.
        """
        root = self.aggregation.root
        sizes = np.array([len(own) for own in self.clients[:root]], float)
        rng = path_rng(self.seed, COHORT, round)
        count = self.clients_per_round
        if self.participation is not None:
            count = self.participation.asked(count)
        if self.sampling == "poisson":
            rng = path_rng(self.seed, POISSON, round)
            chosen = sample_poisson(len(sizes), count / len(sizes), self.cohort_limit, rng)
        else:
            chosen = sample_cohort(len(sizes), count, sizes, self.sampling, rng)
        return self.cohort_of(chosen if root is None else [*chosen, root], round)

    def cohort_of(self, chosen: list[int], round: int, wave: int = 0) -> Cohort:
        """Returns the cohort of these clients in a round.

        Args: wave: how many cohorts of the round came before; each has streams of its own.
        """

        def rngs(slot: int, name: str) -> np.random.Generator:
            client = chosen[slot]
            path = (round + client,) if self.colliding_streams else (round, client)
            return path_rng(self.seed, purpose(name), *path, *[wave] * bool(wave))

        return Cohort(round, chosen, [self.clients[c] for c in chosen], rngs)

    def on_base(self, kept: dict[str, Any]) -> "Federation":
        """Returns the federation on the base that rounds before have changed; itself where none has.

        Args: kept: the server's `aggregation_state`.
        """
        if "base" not in kept:
            return self
        base = add_to_base(self.base, kept["base"])
        policy = lambda lora: as_policy(base, self.on_devices(lora), self.decoder.lora, "none")
        worker = dataclasses.replace(self.worker, policy=policy)
        return dataclasses.replace(self, base=base, worker=worker)

    def on_devices(self, tree: Any) -> Any:
        """Returns a tree of host arrays on every device of the mesh."""
        return replicate(tree, self.mesh)

    def training_shapes(self, steps: list, groups: int) -> tuple[BlockShape, BlockShape | None]:
        """Returns the block shape of local training, chosen once from the micro-batches of the
        first steps (every few of them, where many), and a smaller one for the blocks that fit it
        (None: none do, or clients train together).

        Args: groups: row groups that no step exceeds.
        """
        some = [step for step in steps if any(step)]
        prefix = self.worker.sampler.shared_prefix(prompts(some))
        name = f"train {len(prefix)}" if prefix else "train"
        some = some[:: 1 + len(some) // 32]
        data, layout = self.worker.data, self.algorithm.layout
        shape = self.shapes.shape(
            name,
            lambda: choose_block_shape(
                some,
                layout.rows_per_group,
                layout.num_packs,
                data.prompt_length,
                data.completion_length,
                self.max_tokens_per_block,
                groups,
                prefix,
            ),
        )
        if self.local.clients_at_once > 1 or self.mesh.shape[MODEL] > 1:
            return shape, None  # all that train together would go through both
        small = self.shapes.shape(f"{name} small", lambda: choose_small(some, shape))
        return shape, None if small == shape else small


def broadcast_to_clients(tree: Any, clients: int) -> Any:
    """Returns a tree of host arrays with a leading axis over all clients, for local-only runs."""
    return jax.tree.map(lambda x: np.broadcast_to(x, (clients, *np.shape(x))).copy(), tree)
