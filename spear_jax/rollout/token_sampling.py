"""Draws tokens from logits: temperature, top-k, top-p, and inverse-CDF sampling."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

RUN = 256  # tokens of one run of `inverse_cdf_sample`


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Static settings of generation.

    Attributes:
        max_new_tokens: completions are cut there.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens (0: all), applied after temperature.
        top_p: then keep the smallest set of most likely tokens with at least this mass.
        eos_ids: a completion ends with any of them; the EOS is part of it.
        pad_id: fills unused positions.
        max_rows: slots, on all devices together.
        max_tokens: columns of the KV cache over all slots of a device.
        read_tokens: prompt tokens of one prefill on a device.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_ids: tuple[int, ...]
    pad_id: int
    max_rows: int = 64
    max_tokens: int = 1 << 16
    read_tokens: int = 1024


def nucleus_mask(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Marks the tokens that survive top-k and then top-p, without sorting.

    Both thresholds (the k-th largest probability, and the smallest one inside the nucleus) are
    found by bisection over the bit patterns of positive floats. Bit patterns are ordered as the
    floats are, so that 31 halvings are exact.

    Args: logits float32[B, V], already divided by the temperature.
    Returns: bool[B, V]; at least the most likely token of a row. Tokens that tie with the last one
        kept are kept.
    Source: nucleus sampling (arXiv 1904.09751).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    keep = jnp.ones(logits.shape, bool)
    if top_k > 0 and top_k < logits.shape[-1]:
        keep = probs >= _largest_threshold(probs, lambda at_least: at_least.sum(-1) >= top_k)
    if top_p < 1.0:
        probs = jnp.where(keep, probs, 0.0)
        probs = probs / probs.sum(-1, keepdims=True)
        mass = lambda at_least: jnp.where(at_least, probs, 0.0).sum(-1) >= top_p
        keep &= probs >= _largest_threshold(probs, mass)
    return keep


def _largest_threshold(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Finds float32[B, 1], the largest τ for which the set {p >= τ} is enough; the set of τ = 0
    always counts as enough.
    """
    low = jnp.zeros(probs.shape[0], jnp.int32)
    high = jax.lax.bitcast_convert_type(jnp.full(probs.shape[0], 2.0, jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        fits = enough(probs >= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def sample_token(
    logits: jax.Array, keys: jax.Array, step: jax.Array, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args: logits float32[B, V]; keys [B]; step int32[B], folded into each row's key.
    Returns: token int32[B]; its untempered log-probability float32[B].
    """
    if config.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        tempered = logits / config.temperature
        kept = nucleus_mask(tempered, config.top_k, config.top_p)
        share = jnp.where(kept, jnp.exp(tempered - tempered.max(-1, keepdims=True)), 0.0)
        step_keys = jax.vmap(jax.random.fold_in)(keys, step)
        token = inverse_cdf_sample(share, jax.vmap(jax.random.uniform)(step_keys))
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, picked - jax.nn.logsumexp(logits, axis=-1)


def inverse_cdf_sample(share: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws the first token whose running sum of shares exceeds uniform x their sum.

    That takes one random number a row instead of one a token. The running sum is taken over runs of
    RUN tokens first, and then inside the run that was hit.

        share [1 0 2 1], uniform 0.5: sums 1 1 3 4, target 2  ->  token 2

    Args: share float32[B, V], not negative, some positive; uniform float32[B] in [0, 1).
    Returns: int32[B]; never a token without a share.
    """
    rows, vocab = share.shape
    runs = jnp.pad(share, ((0, 0), (0, -vocab % RUN))).reshape(rows, -1, RUN)
    ends = jnp.cumsum(runs.sum(-1), axis=-1)
    run, rest = _first_above(ends, uniform * ends[:, -1])
    inside = jnp.take_along_axis(runs, run[:, None, None], axis=1)[:, 0]
    place, _ = _first_above(jnp.cumsum(inside, axis=-1), rest)
    return (run * RUN + place).astype(jnp.int32)


def _first_above(ends: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds where each row of rising sums [B, N] first exceeds its target, and by how much the
    target exceeds the sum before.
    """
    # rounding must not push the target past the end
    target = jnp.minimum(target, jnp.nextafter(ends[:, -1], 0.0))
    place = jnp.argmax(ends > target[:, None], axis=-1)
    before = jnp.take_along_axis(ends, jnp.maximum(place - 1, 0)[:, None], axis=-1)[:, 0]
    return place, target - jnp.where(place > 0, before, 0.0)
