"""Training rows on the host, before they are packed."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from spear_jax.packing.arrays import Batch


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """A completion under a prompt, with what a loss needs to know of it; host only.

    Attributes:
        prompt: token ids the completion is scored under.
        completion: the sampled token ids, EOS included when it was generated.
        loss_mask: bool[len(completion)], the positions that a loss may use.
        weight: the trace's confidence, or the example's weight.
        label: +1 win (or real), -1 lose (or synthetic); a method may use other numbers.
        advantage: of the completion.
    """

    prompt: list[int]
    completion: list[int]
    loss_mask: np.ndarray
    weight: float
    label: int
    advantage: float = 0.0


RowGroup = tuple[TrainingRow, ...]  # rows that a loss needs together


def batch(rows: Sequence[TrainingRow | None], length: int) -> Batch:
    """Lays rows out as numpy arrays [B, T]; a None row is all padding (label 0).

    Args: length: T; no completion is longer.
    """
    size = len(rows)
    arrays = Batch(
        completion_mask=np.zeros((size, length), bool),
        loss_mask=np.zeros((size, length), bool),
        weight=np.zeros((size, length), np.float32),
        advantage=np.zeros(size, np.float32),
        label=np.zeros(size, np.int32),
    )
    for index, row in enumerate(rows):
        if row is not None:
            end = len(row.completion)
            arrays.completion_mask[index, :end] = True
            arrays.loss_mask[index, :end] = row.loss_mask
            arrays.weight[index] = row.weight
            arrays.advantage[index] = row.advantage
            arrays.label[index] = row.label
    return arrays


def prompts(steps: Iterable[Iterable[Iterable[RowGroup]]]) -> list[list[int]]:
    """Lists the prompts of all rows; a list that several rows hold stands once.

    Args: steps: optimiser steps, each its micro-batches, each its groups.
    """
    rows = (row for step in steps for micro in step for group in micro for row in group)
    return list({id(row.prompt): row.prompt for row in rows}.values())


def groups_of(rows: Sequence[TrainingRow | None], rows_per_group: int) -> list[RowGroup]:
    """Groups a micro-batch's rows: row i of each of its `rows_per_group` equal parts.

    With rows_per_group = 2, the rows [w0, w1, l0, l1] are the groups (w0, l0) and (w1, l1). A group
    with a None row is left out.
    """
    size = len(rows) // rows_per_group
    parts = [rows[part * size : (part + 1) * size] for part in range(rows_per_group)]
    return [group for group in zip(*parts, strict=True) if None not in group]


def draw(pool: list, count: int, rng: np.random.Generator) -> list:
    """Draws `count` members of a pool: without replacement where the pool is large enough, else
    with. An empty pool gives Nones.

    Source: the shared federated shell of the published SPEAR code (independent for every
        micro-step).
    """
    if not pool:
        return [None] * count
    chosen = rng.choice(len(pool), size=count, replace=len(pool) < count)
    return [pool[i] for i in chosen]
