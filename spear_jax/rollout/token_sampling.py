"""Draws tokens from logits: temperature, top-k, top-p, and inverse-CDF sampling."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

RUN = 256  # tokens that are summed in a first step
PATTERN = 30  # bits of the patterns below that of 2.0, which no probability reaches


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
        steps_per_check: decode steps after which it is asked which sequences go on. No part of the
            repr, which names shapes in a run's checkpoints, as no shape depends on it.
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
    steps_per_check: int = dataclasses.field(default=1, repr=False)


def nucleus_mask(share: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Marks the tokens that survive top-k and then top-p, without sorting.

    Args: share: float32[B, V] in [0, 1], proportional to the tokens' probabilities.
    Returns: bool[B, V]; at least the most likely token of a row. Tokens that tie with the last one
        kept are kept.
    Source: nucleus sampling (arXiv 1904.09751).
    """
    keep = jnp.ones(share.shape, bool)
    if top_k > 0 and top_k < share.shape[-1]:
        count = jnp.full(share.shape[0], top_k, jnp.float32)
        keep = share >= _largest_threshold(share, jnp.ones_like, count)
    if top_p < 1.0:
        share = jnp.where(keep, share, 0.0)
        keep &= share >= _largest_threshold(share, lambda share: share, top_p * share.sum(-1))
    return keep


def _largest_threshold(
    share: jax.Array, worth: Callable[[jax.Array], jax.Array], least: jax.Array
) -> jax.Array:
    """Finds float32[B, 1], the largest τ for which the tokens of share >= τ are worth `least`
    together.

    The bit patterns of positive floats are ordered as the floats are, so that a search for the
    pattern of τ, digit after digit from the highest, is exact. A digit of d bits takes one pass
    over the shares, which sums for all 2^d - 1 thresholds at once. A GPU or TPU is bound by the
    passes, and XLA:GPU sums at most eight things in one; a CPU is bound by the sums.

    Args: worth: shares -> what each token counts; least: float32[B].
    """
    runs = _in_runs(share)
    by_bits = lambda bits: lambda: _search_digits(runs, worth, least, bits)
    return jax.lax.platform_dependent(cpu=by_bits(1), default=by_bits(3))[:, None]


def _search_digits(
    runs: jax.Array, worth: Callable[[jax.Array], jax.Array], least: jax.Array, bits: int
) -> jax.Array:
    """Finds the τ float32[B] of `_largest_threshold` by digits of so many bits.

    Args: runs: the shares, as `_in_runs` lays them.
    """
    digits = PATTERN // bits

    def next_digit(number, low):
        shift = bits * (digits - 1 - number)
        tries = low + (jnp.arange(1, 1 << bits, dtype=jnp.int32) << shift)[:, None]
        thresholds = jax.lax.bitcast_convert_type(tries, jnp.float32)[:, :, None, None]
        # a sum for each threshold, and not one of an array of all: they are one kernel then
        sums = jnp.stack([jnp.where(runs >= t, worth(runs), 0.0).sum(-1) for t in thresholds])
        return low + ((sums.sum(-1) >= least).sum(0, dtype=jnp.int32) << shift)

    low = jax.lax.fori_loop(0, digits, next_digit, jnp.zeros(runs.shape[0], jnp.int32))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _in_runs(x: jax.Array) -> jax.Array:
    """Lays x [B, V] in runs [B, runs, RUN], the last one filled up with zeros."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % RUN))).reshape(x.shape[0], -1, RUN)


def sample_token(
    logits: jax.Array, keys: jax.Array, step: jax.Array, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args: logits float32[B, V]; keys [B]; step int32[B], folded into each row's key.
    Returns: token int32[B]; its untempered log-probability float32[B].
    """
    most = logits.max(-1, keepdims=True)
    if config.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        tempered = logits / config.temperature
        share = jnp.exp(tempered - most / config.temperature)  # division keeps the order
        share = jnp.where(nucleus_mask(share, config.top_k, config.top_p), share, 0.0)
        step_keys = jax.vmap(jax.random.fold_in)(keys, step)
        token = inverse_cdf_sample(share, jax.vmap(jax.random.uniform)(step_keys))
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)
    total = jnp.log(jnp.exp(logits - most).sum(-1, keepdims=True)) + most
    return token, (picked - total)[:, 0]


def inverse_cdf_sample(share: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws the first token whose running sum of shares exceeds uniform x their sum.

    That takes one random number a row instead of one a token. The running sum is taken over runs of
    RUN tokens first, and then inside the run that was hit.

        share [1 0 2 1], uniform 0.5: sums 1 1 3 4, target 2  ->  token 2

    Args: share float32[B, V], not negative, some positive; uniform float32[B] in [0, 1).
    Returns: int32[B]; never a token without a share.
    """
    runs = _in_runs(share)
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
