"""Loads an experiment's task and splits its examples among clients."""

from typing import Any

import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.core.rng import path_rng, purpose
from spear_jax.core.types import Example
from spear_jax.federated.partition import partition
from spear_jax.feedback.base import Feedback
from spear_jax.feedback.mixture import Mixture
from spear_jax.feedback.oracle import Oracle
from spear_jax.tasks import get_task
from spear_jax.tasks.base import Task
from spear_jax.tasks.published import extract_loosely

ROOT = purpose("root")
UNPUBLISHED = (
    "gsm8k",
    "qa",
    "ultrachat",
    "pairs",
    "preferences",
)  # the published code has none like it


def build_task(settings: Any) -> Task:
    """Builds the settings' task, with its wording and extractor.

    Args: settings: `experiment.config.Settings`.
    Raises: UserError for an unknown task, and where the published code's reading does not fit it.
    """
    data, name = settings.data, settings.task
    published = data.extractor == "published"
    if name in UNPUBLISHED and (published or settings.rollout.feedback == "oracle_published"):
        raise UserError(
            "the published extractor and feedback read option letters and yes or no, which task "
            f"{name!r} has not; set --config.data.extractor=bounded and "
            "--config.rollout.feedback=oracle."
        )
    templates, columns = vars(data.templates), vars(data.columns)
    return get_task(name, templates, columns, extract_loosely if published else None)


def split_root(settings: Any, clients: list[np.ndarray]) -> list[np.ndarray]:
    """Takes the questions that the server trusts away from the clients, and makes them a last one.

    Raises: UserError where a client would be left without any.
    """
    wanted, owned = settings.aggregation.root_examples, np.unique(np.concatenate(clients))
    drawn = path_rng(settings.seed, ROOT).permutation(owned)
    root = np.sort(drawn[:wanted])
    left = [own[~np.isin(own, root)] for own in clients]
    if min(map(len, left)) == 0:
        raise UserError(
            f"aggregation.root_examples is {wanted}, which leaves a client without any of the "
            f"{len(owned)} examples; lower it, or take fewer clients."
        )
    return [*left, root]


def with_oracle(settings: Any, feedback: Feedback) -> Feedback:
    """Returns the feedback with the oracle for the server's own client, behind all others."""
    root, oracle = (
        settings.federation.num_clients,
        Oracle(feedback.task, settings.rollout.hint_words),
    )
    return Mixture(feedback.task, [(root, float(root), oracle), (0, float("inf"), feedback)])


def split_clients(
    settings: Any, examples: list[Example], only: int | None = None
) -> list[np.ndarray]:
    """Returns the examples of each client, as positions in the training set.

    Args: only: the client that has them all; None: they are split among the clients.
    """
    fed = settings.federation
    if only is not None:
        everything = np.arange(len(examples))
        return [everything if c == only else everything[:0] for c in range(fed.num_clients)]
    return partition(
        np.array([example.gold for example in examples]),
        fed.num_clients,
        fed.partition,
        settings.seed,
        alpha=fed.dirichlet_alpha,
        min_size=fed.min_examples,
        max_examples_per_client=fed.max_examples_per_client,
        labels_per_client=fed.labels_per_client,
    )
