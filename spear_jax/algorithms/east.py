"""EAST: weights of examples by how undecided the model is.

Several answers to each question are grouped by what they conclude. The entropy of the groups, to a
power, is the example's weight in SFT or DPO. Questions that are always or never answered right are
left out.

Source: EAST, entropy-based exploration weighting (published code).

Departures:
    1. The weight multiplies each example's own loss. The published SFT code multiplies the mean of
       the batch by the weights.
    2. Weights are taken anew every round, from the round's policy, over the round's questions. One
       scalar (the mean of H^a) is averaged over the cohort.
    3. Answers that cannot be read are one group.
"""

import dataclasses

import jax
import numpy as np

from spear_jax.core.types import Trace
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutRequest, RolloutWorker


@dataclasses.dataclass
class Weighed:
    """A question that is neither always nor never answered right.

    Attributes:
        weight: H^a / mean(H^a).
        traces: its sampled answers.
        rejected: the traces of the largest group of wrong answers.
    """

    weight: float
    traces: list[Trace]
    rejected: list[Trace]


def sample(
    worker: RolloutWorker,
    policy: Policy,
    requests: list[RolloutRequest],
    count: int,
    power: float,
    key: jax.Array,
) -> dict[RolloutRequest, Weighed]:
    """Asks every question `count` times, and returns the questions that stay, with their weights."""
    traces = worker.answer(
        policy, [request._replace(sample=n) for request in requests for n in range(count)], key
    )
    groups: dict[RolloutRequest, dict[object, list[Trace]]] = {}
    for number, request in enumerate(requests):
        answers = traces[number * count : (number + 1) * count]
        if 0 < sum(trace.first.correct for trace in answers) < count:
            groups[request] = {}
            for trace in answers:
                groups[request].setdefault(_conclusion(worker, trace), []).append(trace)
    if not groups:
        return {}
    _, weights = entropy_weights(
        [[len(group) for group in answers.values()] for answers in groups.values()], power
    )
    return {
        request: Weighed(
            float(weight), [t for group in answers.values() for t in group], _largest_wrong(answers)
        )
        for (request, answers), weight in zip(groups.items(), weights, strict=True)
    }


def _conclusion(worker: RolloutWorker, trace: Trace) -> object:
    answer = worker.task.extract(trace.first.text, trace.example)
    if answer is None:
        return None
    return trace.first.text[answer.start : answer.end] if answer.option < 0 else answer.option


def _largest_wrong(groups: dict[object, list[Trace]]) -> list[Trace]:
    return max((group for group in groups.values() if not group[0].first.correct), key=len)


def entropy_weights(
    sizes: list[list[int]], power: float, base: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns H, the entropy of each question's answer groups, and H^a / mean(H^a).

    Base 2 gives bits. Eight answers that fall 4 : 4 are undecided, 7 : 1 is nearly decided:

        >>> entropy, weights = entropy_weights([[4, 4], [7, 1]], power=1.0)
        >>> entropy.round(3).tolist(), weights.round(3).tolist()
        ([1.0, 0.544], [1.296, 0.704])

    Args: sizes: for each question the sizes of its groups, all positive.
    Returns: float[N], float[N]; where every entropy is 0 the weights are 1.
    """
    shares = [np.asarray(c, float) / sum(c) for c in sizes]
    entropy = np.array([-(p * np.log(p)).sum() / np.log(base) for p in shares])
    raised = entropy**power
    return entropy, raised / raised.mean() if raised.any() else np.ones_like(raised)
