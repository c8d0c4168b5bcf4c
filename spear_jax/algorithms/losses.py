"""Losses on per-token log-probabilities: arrays in, arrays out.

A reduction is a sum and a count, which `ratio` divides once. So a caller who accumulates over
micro-batches divides by the count of the whole optimiser step.
"""

import math

import jax
import jax.numpy as jnp

from spear_jax.core.types import Mean

WEIGHTINGS = ("per_token", "batch_mean", "per_trace", "normalised")
DENOMINATORS = ("masked", "active")


def nll(logprobs: jax.Array, mask: jax.Array) -> Mean:
    """Returns the negative log-likelihood of the masked tokens: total = −Σ m lp, count = Σ m.

        >>> nll(jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[1, 1, 0]])).value()
        1.5

    Args:
        logprobs: float[B, T], nats.
        mask: [B, T] in {0, 1}.
    Source: maximum likelihood; L_win of SPEAR (arXiv 2605.07977).
    """
    return Mean(-(logprobs * mask).sum(), mask.sum())


def sequence_nll(logprobs: jax.Array, mask: jax.Array) -> Mean:
    """Returns the mean over sequences of their token means of −lp.

    total = −Σ_i (Σ_t m lp) / max(1, Σ_t m), count = B. A short sequence weighs as much as a long
    one:

        >>> logprobs, mask = jnp.array([[-1.0, -2.0], [-4.0, -9.0]]), jnp.array([[1, 1], [1, 0]])
        >>> sequence_nll(logprobs, mask).value(), round(nll(logprobs, mask).value(), 4)
        (2.75, 2.3333)

    Args: as `nll`.
    """
    means = (logprobs * mask).sum(-1) / jnp.maximum(1, mask.sum(-1))
    return Mean(-means.sum(), jnp.asarray(logprobs.shape[0], logprobs.dtype))


def unlikelihood(
    logprobs: jax.Array, margin: float, eps: float = 1e-8, p_max: float = 1 - 1e-7
) -> tuple[jax.Array, jax.Array]:
    """Returns the per-token unlikelihood u = 1[p > ξ] · (−log(1 − p + eps)).

    p = min(exp(lp), p_max). With ξ = 0.3, the tokens of probability 0.5 and 0.9 are pushed down,
    0.2 is left alone:

        >>> u, active = unlikelihood(jnp.log(jnp.array([[0.2, 0.5, 0.9]])), margin=0.3)
        >>> print(u.round(2), active)
        [[0.   0.69 2.3 ]] [[False  True  True]]

    Args:
        logprobs: float[B, T], nats.
        margin: ξ; a token at or below it is left alone.
    Returns: u, float[B, T]; active, bool[B, T], where p > ξ.
    Source: Welleck et al. (arXiv 1908.04319), with the sampled wrong token as the one negative
        candidate; SPEAR.

    Departures:
        1. 1 − p is −expm1(lp): float32 resolves it near p = 1, where 1 − exp(lp) cancels.
        2. The clamp acts on lp (lp <= log p_max). The value is the same, and so is the zero
           gradient above p_max.
    """
    clamped = jnp.minimum(logprobs, math.log(p_max))
    active = jnp.exp(clamped) > margin
    safe = jnp.where(
        active, clamped, -1.0
    )  # the unused branch stays away from log 0, so its gradient is never NaN
    return jnp.where(active, -jnp.log(-jnp.expm1(safe) + eps), 0.0), active


def unlikelihood_weights(
    mask: jax.Array,
    active: jax.Array | None,
    confidence: jax.Array,
    rows: jax.Array,
    weighting: str,
    denominator: str,
) -> tuple[jax.Array, jax.Array]:
    """Returns the token weights w and the count n of L_lose = Σ w u / n.

    Each weighting is one reading of "confidence-weighted":

        per_token    Σ c M u / Σ M
        batch_mean   c̄ Σ M u / Σ M, the published code
        per_trace    mean over traces of c (Σ_t M u) / Σ_t M
        normalised   Σ c M u / Σ c M

    A trace of confidence 1 with two tokens in M, and one of confidence 0.5 with one:

        >>> mask = jnp.array([[1, 1], [0, 1]])
        >>> confidence = jnp.array([[1.0, 1.0], [0.5, 0.5]])
        >>> w, n = unlikelihood_weights(mask, None, confidence, jnp.ones(2), "per_token", "masked")
        >>> w.tolist(), float(n)
        ([[1.0, 1.0], [0.0, 0.5]], 3.0)
        >>> w, n = unlikelihood_weights(mask, None, confidence, jnp.ones(2), "per_trace", "masked")
        >>> w.tolist(), float(n)
        ([[0.5, 0.5], [0.0, 0.5]], 2.0)

    Args:
        mask: [B, T], the positions M.
        active: bool[B, T], where p > ξ; read only with denominator "active".
        confidence: float[B, T], a trace's confidence, the same along its row.
        rows: bool[B], the rows that hold a trace.
        weighting: one of WEIGHTINGS.
        denominator: "masked" takes M before the margin test, "active" after it.
    Returns: w float[B, T]; n float[]. Both add over micro-batches. batch_mean's c̄ stays each
        micro-batch's own.
    Source: SPEAR (arXiv 2605.07977); batch_mean as published in code.
    """
    mask = mask.astype(confidence.dtype)
    counted = mask * active if denominator == "active" else mask
    rows = rows.astype(confidence.dtype)
    if weighting == "per_token":
        return confidence * mask, counted.sum()
    if weighting == "normalised":
        return confidence * mask, (confidence * counted).sum()
    if weighting == "batch_mean":
        mean_confidence = (confidence[:, 0] * rows).sum() / jnp.maximum(1, rows.sum())
        return mean_confidence * mask, counted.sum()
    return confidence * mask / jnp.maximum(1, counted.sum(-1, keepdims=True)), rows.sum()


def anchor(theta: dict, reference: dict) -> jax.Array:
    """Returns L_anchor = Σ over tensors of mean((θ − sg θ_ref)²).

    A tensor is one layer's matrix. A leaf [L', in, R] holds L' of them, and its part is the sum of
    L' means.

        >>> stack = {"a": jnp.ones((2, 3, 4))}
        >>> float(anchor(stack, {"a": jnp.zeros((2, 3, 4))}))
        2.0

    Source: SPEAR. Departure: the gradient flows to θ. The published code reads detached tensors, so
        its anchor has no gradient.
    """

    def mean_squares(leaf: jax.Array, start: jax.Array) -> jax.Array:
        tensor = tuple(range(leaf.ndim)[-2:])
        return jnp.mean((leaf - jax.lax.stop_gradient(start)) ** 2, axis=tensor).sum()

    return sum(jax.tree.leaves(jax.tree.map(mean_squares, theta, reference)))


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    """Returns total / count, and 0 with a finite gradient where nothing was counted."""
    return total / jnp.maximum(1e-12, count)


def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the k3 estimate of KL(π ‖ π_ref) under samples of π, elementwise.

    It is e^δ − δ − 1 with δ = lp_ref − lp.

        >>> estimate = k3(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.25])))
        >>> [round(x, 4) for x in estimate.tolist()]
        [0.0, 0.1931]

    Source: Schulman, "Approximating KL divergence"; as used by GRPO (arXiv 2402.03300).
    """
    delta = reference - logprobs
    return jnp.exp(delta) - delta - 1.0


def published_k3(new: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns e^d − 1 − d with d = clamp(new − ref, ±5), elementwise.

    Source: the orientation of the GRPO and RLTF-SD published with SPEAR.
    """
    d = jnp.clip(new - reference, -5.0, 5.0)
    return jnp.exp(d) - 1.0 - d


def sequence_sum(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns s_i = Σ_t m lp, float[..., B]."""
    return (logprobs * mask).sum(-1)


def sequence_mean(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns s̄_i = s_i / max(1, Σ_t m), float[..., B]."""
    return sequence_sum(logprobs, mask) / jnp.maximum(1, mask.sum(-1))


def pair_loss(margin: jax.Array, kind: str, smoothing: float = 0.0) -> jax.Array:
    """Returns the loss of a preferred-minus-dispreferred margin z, elementwise.

        sigmoid  (1 − e) sp(−z) + e sp(z), sp(z) = log(1 + e^z), e the label smoothing
        hinge    max(0, 1 − z)

        >>> pair_loss(jnp.array([-1.0, 0.0, 2.0]), "hinge").tolist()
        [2.0, 1.0, 0.0]

    Source: DPO (arXiv 2305.18290), conservative DPO (Mitchell 2023), SLiC (arXiv 2305.10425), SPIN
        (arXiv 2401.01335).
    """
    if kind == "hinge":
        return jax.nn.relu(1.0 - margin)
    return (1.0 - smoothing) * jax.nn.softplus(-margin) + smoothing * jax.nn.softplus(margin)
