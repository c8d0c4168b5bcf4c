"""Local-only training: every client is a federation of one, with an adapter and a state of its own.

The server's state then holds all clients': `lora` and `algorithm_state` have a leading axis over
the whole population. Nothing is averaged; a round's metrics are sums or means over its clients.
"""

import dataclasses

import jax
import numpy as np

from spear_jax.federated.federation import Federation
from spear_jax.federated.round import RoundResult, check_finite, round_of, with_budget
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.state import ServerState

SUMMED = (
    "time/",
    "rollout/tokens",
    "rollout/wins",
    "rollout/loses",
    "feedback/",
    "round/clients",
    "round/bytes",
    "round/flops",
)


def run_round(federation: Federation, state: ServerState, used: BudgetUsed) -> RoundResult:
    """Runs the next round of every chosen client by itself; arguments as `round.run_round`."""
    number = int(state.round) + 1
    lines, traces, ended = [], [], {}
    for client in federation.cohort(number).clients:
        own = of_client(state, client)
        result = round_of(federation, own, used, federation.cohort_of([client], number))
        lines.append(result.metrics)
        traces += result.traces
        ended[client] = result.state
    # copies: a checkpoint may still be writing the old arrays
    lora, kept = jax.tree.map(np.array, (state.lora, state.algorithm_state))
    for client, own in ended.items():
        put = lambda stack, new, client=client: stack.__setitem__(client, new)
        jax.tree.map(put, (lora, kept), (own.lora, own.algorithm_state))
    after = dataclasses.replace(state, lora=lora, algorithm_state=kept, round=state.round + 1)
    metrics = _joined(lines)
    check_finite(metrics, number)
    return with_budget(RoundResult(after, metrics, traces), used)


def of_client(state: ServerState, client: int) -> ServerState:
    """Returns the state of one client's own federation."""
    own = lambda tree: jax.tree.map(lambda x: x[client], tree)
    return dataclasses.replace(
        state, lora=own(state.lora), algorithm_state=own(state.algorithm_state)
    )


def _joined(lines: list[dict[str, float]]) -> dict[str, float]:
    """The clients' metrics as the round's."""
    metrics = {}
    for name in lines[0]:
        values = [line[name] for line in lines if name in line]
        metrics[name] = float(np.sum(values) if name.startswith(SUMMED) else np.mean(values))
    return metrics
