"""Fine-tuning at the end: after the last round every client trains for itself.

Each client takes `personal.finetune` local steps from the global adapter (or from what it has of its
own), on rollouts of its own examples, at `train.learning_rate`. Adapter and checkpoint stay as they are.
What comes of it is measured: held-out accuracy before and after, as means over clients with a 95 %
interval over clients.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core.mesh import to_host
from spear_jax.experiment.builder import Experiment
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.federated.federation import Federation
from spear_jax.federated.single_client import client_round
from spear_jax.federated.state import ServerState

NAME = "personal.json"  # of the result, in the run folder


def finetune(experiment: Experiment, state: ServerState) -> dict[str, Any]:
    """Fine-tunes and evaluates every client.

    Returns: {"steps", "before", "after"}, the last two {"accuracy", "half_width", "clients"}: the mean,
        half of its 95 % interval (0 where there is one client), and each client's.
    """
    federation, number = alone(experiment), int(state.round) + 1
    count = len(federation.clients) - (experiment.federation.aggregation.root is not None)
    key = jax.random.wrap_key_data(jnp.asarray(to_host(state.key)))
    accuracy = lambda adapter: experiment.evaluator(experiment.policy_of(adapter, state)).accuracy
    own, before, after = experiment.adapters(state), [], []
    for client in range(count):
        begun = own[client if len(own) > 1 else 0]
        before.append(before[0] if client and len(own) == 1 else accuracy(begun))
        sent = client_round(federation, begun, state.algorithm_state, client, number, key)
        trained = jax.tree.map(lambda x, y: np.asarray(x) + y, begun, to_host(sent.update))
        after.append(accuracy(trained))
    return {
        "steps": experiment.settings.personal.finetune,
        "before": over_clients(before),
        "after": over_clients(after),
    }


def alone(experiment: Experiment) -> Federation:
    """Returns the federation as a client that trains by itself needs it."""
    federation, steps = experiment.federation, experiment.settings.personal.finetune
    algorithm = federation.algorithm
    common = dataclasses.replace(algorithm.common, steps=steps)
    return dataclasses.replace(
        federation,
        algorithm=dataclasses.replace(algorithm, common=common),
        aggregation=Aggregation(),  # nothing is sent, and both factors are trained
        schedule=dataclasses.replace(federation.schedule, warmup=False),
        participation=None,
        ditto=None,
    )


def over_clients(accuracy: list[float]) -> dict[str, Any]:
    """Returns the mean over clients, half of its 95 % interval, and each client's."""
    from spear_jax.analysis import comparison  # here, not above: pandas takes memory

    half = comparison.half_width(accuracy) if len(accuracy) > 1 else 0.0
    return {"accuracy": float(np.mean(accuracy)), "half_width": float(half), "clients": accuracy}
