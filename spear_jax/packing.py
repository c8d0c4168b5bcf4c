"""Rows of token ids -> static-shape batches: prompts left-padded, completions right-padded."""

import dataclasses

import jax
import numpy as np

from spear_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Row:
    """One training row; host only.

    Attributes:
        prompt: token ids the completion is scored under.
        completion: the sampled token ids, EOS included when it was generated.
        loss_mask: bool[len(completion)], the positions that a loss may use.
        weight: the trace's confidence, or the example's weight.
        label: +1 win (or real), -1 lose (or synthetic); a method may use further kinds.
        advantage: of the completion.
    """

    prompt: list[int]
    completion: list[int]
    loss_mask: np.ndarray
    weight: float
    label: int
    advantage: float = 0.0


def pack(rows: list[Row | None], prompt_length: int, length: int, pad_id: int) -> Batch:
    """One micro-batch of numpy arrays; a None row is all padding (label 0).

    Args:
        rows: B rows.
        prompt_length: P; no prompt is longer.
        length: T; no completion is longer.
    """
    size = len(rows)
    batch = Batch(
        prompt=np.full((size, prompt_length), pad_id, np.int32),
        prompt_mask=np.zeros((size, prompt_length), bool),
        completion=np.full((size, length), pad_id, np.int32),
        completion_mask=np.zeros((size, length), bool),
        loss_mask=np.zeros((size, length), bool),
        weight=np.zeros((size, length), np.float32),
        advantage=np.zeros(size, np.float32),
        label=np.zeros(size, np.int32),
    )
    for index, row in enumerate(rows):
        if row is None:
            continue
        start, end = prompt_length - len(row.prompt), len(row.completion)
        batch.prompt[index, start:] = row.prompt
        batch.prompt_mask[index, start:] = True
        batch.completion[index, :end] = row.completion
        batch.completion_mask[index, :end] = True
        batch.loss_mask[index, :end] = row.loss_mask
        batch.weight[index] = row.weight
        batch.advantage[index] = row.advantage
        batch.label[index] = row.label
    return batch


def stack(batches: list, axes: int) -> Batch:
    """Stacks nested lists of batches (`axes` deep) into leading axes."""
    if axes == 0:
        return batches
    inner = [stack(batch, axes - 1) for batch in batches]
    return jax.tree.map(lambda *parts: np.stack(parts), *inner)


def draw(pool: list, count: int, rng: np.random.Generator) -> list:
    """`count` members of a pool: without replacement where it is large enough, else with. An empty pool gives Nones.

    Source: the shared federated shell of the published SPEAR code (independent for every micro-step).
    """
    if not pool:
        return [None] * count
    chosen = rng.choice(len(pool), size=count, replace=len(pool) < count)
    return [pool[i] for i in chosen]
