"""Loads an experiment's task and splits its examples among clients."""

import ml_collections
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.federated import partition
from spear_jax.tasks import get_task
from spear_jax.tasks.base import Task
from spear_jax.tasks.published import extract_loosely

OURS = (
    "gsm8k",
    "ultrachat",
    "pairs",
    "preferences",
)  # tasks that the published code knows nothing like


def build_task(config: ml_collections.ConfigDict) -> Task:
    """The config's task, with its wording and extractor."""
    task = get_task(config.task, dict(config.data.templates), dict(config.data.columns))
    if (
        "published" in (config.data.extractor, config.rollout.feedback.removeprefix("oracle_"))
        and task.name in OURS
    ):
        raise UserError(
            f"the published extractor and feedback read option letters and yes or no, which task "
            f"{task.name!r} has not; set "
            "--config.data.extractor=bounded and --config.rollout.feedback=oracle."
        )
    if config.data.extractor == "published":
        task.extract = extract_loosely
    return task


def split_clients(config: ml_collections.ConfigDict, examples: list) -> list[np.ndarray]:
    """The examples of each client, as positions in the training set."""
    fed = config.federation
    return partition.partition(
        np.array([example.gold for example in examples]),
        fed.num_clients,
        fed.partition,
        config.seed,
        alpha=fed.dirichlet_alpha,
        min_size=fed.min_examples,
        max_examples_per_client=fed.max_examples_per_client,
        labels_per_client=fed.labels_per_client,
    )
