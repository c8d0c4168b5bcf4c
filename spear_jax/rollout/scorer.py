"""Scores completions under frozen policies."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core import pytrees
from spear_jax.models.decoder import Decoder, head_weight
from spear_jax.models.token_logprobs import Scorer, block_positions, by_row, over_chunks
from spear_jax.packing.arrays import Block
from spear_jax.packing.blocks import choose_room, fold_rows
from spear_jax.packing.rows import Row
from spear_jax.packing.shape_buckets import Room
from spear_jax.rollout.policy import Policy


def scorer(evaluator: Any, prompt_room: int, length: int, max_rows: int) -> Callable:
    """(policy, rows) -> log-probabilities of each row's completion, about `max_rows` rows at a time."""
    decoder = evaluator.decoder

    def choose(rows: list[Row]) -> Room:
        mean = sum(len(row.prompt) + len(row.completion) for row in rows) // len(rows)
        items = [(row,) for row in rows]
        return choose_room([[items]], 1, 1, prompt_room, length, max_rows * mean)

    def score(policy: Policy, rows: list[Row]) -> list[np.ndarray]:
        room = evaluator.sampler.shapes.room("score", lambda: choose(rows))
        blocks, places = fold_rows(rows, room)
        one = lambda blocks: _score_rows(decoder, 0, policy.lora, policy.base, blocks)
        scores = evaluator.over_devices(one, blocks, room)
        return [scores[block, slot, : len(row.completion)] for (block, slot), row in zip(places, rows, strict=True)]

    return score


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_rows(decoder, chunk, lora, base, blocks):
    """float32[G, B, T] of blocks with a leading axis."""
    return pytrees.each(lambda block: score_rows(decoder, chunk, lora, base, block))(blocks)


def score_rows(decoder: Decoder, chunk: int, lora: dict | None, base: dict, block: Block) -> jax.Array:
    """float32[B, T]: log-probabilities of rows under a frozen policy."""
    return by_row(block, Scorer(decoder, base, chunk).logprobs(lora, block))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_scores(decoder, chunk, lora, base, blocks, opening=None):
    """float32[G, B, T] log-probability of each completion token, and whether it is the most likely one; 0 at padding.

    Logits are held for `chunk` positions at a time (0: as `block_positions`).
    """
    head = head_weight(base)
    chunk = block_positions(chunk, head.shape[0])

    def score(states, target):
        logits = jnp.einsum("md,vd->mv", states, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)

    def one(block):
        hidden = Scorer(decoder, base, chunk, opening=opening).states(lora, block)
        return [by_row(block, x) for x in over_chunks(score, (hidden, block.target), chunk)]

    return pytrees.each(one)(blocks)
