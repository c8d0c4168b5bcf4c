"""Scores completions under frozen policies."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core import pytrees
from spear_jax.models.decoder import Decoder
from spear_jax.models.lm_head import head_logits, head_weight
from spear_jax.models.params import Adapter, DecoderParams
from spear_jax.models.token_logprobs import TokenLogprobs, block_positions, over_chunks, unpack_rows
from spear_jax.packing.arrays import Block
from spear_jax.packing.blocks import choose_block_shape, pack_single_rows
from spear_jax.packing.rows import TrainingRow
from spear_jax.packing.shape_buckets import BlockShape
from spear_jax.rollout.policy import Policy


def scorer(evaluator: Any, prompt_shape: int, length: int, max_rows: int) -> Callable:
    """(policy, rows) -> log-probabilities of each row's completion, about `max_rows` rows at a
    time.
    """
    decoder = evaluator.decoder

    def choose(rows: list[TrainingRow]) -> BlockShape:
        mean = sum(len(row.prompt) + len(row.completion) for row in rows) // len(rows)
        items = [(row,) for row in rows]
        return choose_block_shape([[items]], 1, 1, prompt_shape, length, max_rows * mean)

    def score(policy: Policy, rows: list[TrainingRow]) -> list[np.ndarray]:
        shape = evaluator.sampler.shapes.shape("score", lambda: choose(rows))
        blocks, places = pack_single_rows(rows, shape)
        one = lambda blocks: _score_rows(decoder, 0, policy.lora, policy.base, blocks)
        scores = evaluator.over_devices(one, blocks, shape)
        return [
            scores[block, slot, : len(row.completion)]
            for (block, slot), row in zip(places, rows, strict=True)
        ]

    return score


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_rows(decoder, chunk, lora, base, blocks):
    """float32[G, B, T] of blocks with a leading axis."""
    return pytrees.vmap_or_single(lambda block: score_rows(decoder, chunk, lora, base, block))(
        blocks
    )


def score_rows(
    decoder: Decoder, chunk: int, lora: Adapter | None, base: DecoderParams, block: Block
) -> jax.Array:
    """float32[B, T]: log-probabilities of rows under a frozen policy."""
    return unpack_rows(block, TokenLogprobs(decoder, base, chunk).logprobs(lora, block))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_scores(decoder, chunk, lora, base, blocks, shared_prefix=None):
    """float32[G, B, T] log-probability of each completion token, and whether it is the most likely
    one; 0 at padding.

    Logits are held for `chunk` positions at a time (0: as `block_positions`).
    """
    head = head_weight(base)
    chunk = block_positions(chunk, head.shape[0])

    def score(states, target):
        logits = head_logits(states, head)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), (
            jnp.argmax(logits, axis=-1) == target
        ).astype(jnp.float32)

    def one(block):
        hidden = TokenLogprobs(decoder, base, chunk, shared_prefix=shared_prefix).states(
            lora, block
        )
        return [unpack_rows(block, x) for x in over_chunks(score, (hidden, block.target), chunk)]

    return pytrees.vmap_or_single(one)(blocks)
