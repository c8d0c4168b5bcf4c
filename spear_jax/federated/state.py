"""The states that federated training carries from step to step and from round to round."""

from typing import Any

import flax.struct
import jax

from spear_jax.models.params import Adapter


@flax.struct.dataclass
class ClientState:
    """One client in the middle of a round (or a cohort of them, with a leading axis C).

    Attributes:
        lora: its adapter.
        opt_state: its optimiser's moments.
        gradient: what it sends beside its update (`Drift.gradients`); None: nothing.
    """

    lora: Adapter
    opt_state: Any
    gradient: Any = None


@flax.struct.dataclass
class ClientStart:
    """What clients have to themselves at the start of a round, with a leading axis C.

    Attributes:
        lora: their adapters; None: the global one.
        tail: bool[C, R], the rank indices under `LocalConfig.rank_penalty`; None: none.
        correction: what drift correction adds to their gradients; None: nothing.
        steps: int32[C], the local steps that each takes; None: all.
    """

    lora: Adapter | None
    tail: jax.Array | None = None
    correction: Adapter | None = None
    steps: jax.Array | None = None


@flax.struct.dataclass
class ServerState:
    """Everything that a run needs to go on; exactly what Orbax saves.

    Attributes:
        lora: the global adapter.
        opt_state: server moments (empty for plain averaging).
        algorithm_state: arrays that a method keeps between rounds, on the host (empty for SPEAR).
            Its server part and its clients' part are told apart by `Algorithm.client_state`.
        round: int32[], rounds finished.
        key: uint32 key data of the run's root key.
        aggregation_state: arrays that aggregation keeps between rounds, on the host (empty for the
            mean): the base's change, clients' own factors and ranks, a reducer's centre.
    """

    lora: Adapter
    opt_state: Any
    algorithm_state: Any
    round: jax.Array
    key: jax.Array
    aggregation_state: Any = flax.struct.field(default_factory=dict)
