"""Plainly padded arithmetic beside the packed one, and rows packed as a round packs them."""

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.federated.local_training import LocalBatches
from spear_jax.models.decoder import logits
from spear_jax.packing.blocks import choose_block_shape, choose_small, pack_step, stack_blocks
from spear_jax.packing.rows import groups_of


def padded(rows, width, length):
    """tokens int32[B, width + length] and mask bool, prompts of at most `width` tokens end there; a
    None row is empty.
    """
    tokens = np.zeros((len(rows), width + length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        if row:
            span = slice(width - len(row.prompt), width + len(row.completion))
            tokens[i, span], mask[i, span] = [*row.prompt, *row.completion], True
    return tokens, mask


def token_logprobs(decoder, lora, base, tokens, mask, length):
    """float32[B, T] of completions under their prompts, of rows as `padded` has them; 0 at padding."""
    width = tokens.shape[1] - length
    every = jax.nn.log_softmax(logits(decoder, lora, base, tokens, mask))[:, width - 1 : -1]
    picked = jnp.take_along_axis(every, tokens[:, width:, None], axis=-1)[..., 0]
    return jnp.where(mask[:, width:], picked, 0.0)


def work(
    cohort,
    algorithm,
    prompt,
    length,
    normalize="global",
    limit=64,
    padded=0,
    small=False,
    shared_prefix=(),
):
    """[C][S][A] lists of rows -> LocalBatches [C, S, ...], with empty clients up to `padded`.

    Args:
        small: blocks that fit a smaller shape go through the model in it.
        shared_prefix: what all prompts begin with, read once a block.
    """
    micros = [
        [[groups_of(m, algorithm.layout.rows_per_group) for m in step] for step in client]
        for client in cohort
    ]
    steps = [step for client in micros for step in client]
    if normalize == "global" and not algorithm.scoring.per_micro_batch:
        steps = [[sum(step, [])] for step in steps]
    shape = choose_block_shape(
        steps,
        algorithm.layout.rows_per_group,
        algorithm.layout.num_packs,
        prompt,
        length,
        limit,
        shared_prefix=shared_prefix,
    )
    blocks = [pack_step(step, shape) for step in steps]
    per_client, clients = len(cohort[0]), max(padded, len(cohort))
    blocks += [[]] * (clients * per_client - len(blocks))
    smaller = choose_small(steps, shape) if small else shape
    smaller = None if smaller == shape else smaller
    work = LocalBatches(*stack_blocks(blocks, shape, max(1, *map(len, blocks)), smaller), smaller)
    return jax.tree.map(lambda x: x.reshape(clients, per_client, *x.shape[1:]), work)
