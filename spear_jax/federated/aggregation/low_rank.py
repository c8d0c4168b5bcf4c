"""Sums of products of low-rank factors, without the sum: norms, singular values, best adapters.

A sum of K products p_k a_k b_k is one product X Y of stacked factors:

    X = [p_1 a_1 | p_2 a_2 | ...]   [..., in, K R]        Y = [b_1; b_2; ...]   [..., K R, out]

Everything here is numpy in float64, on the host, for all layers of a projection at once: leading
axes `...` are layers. No matrix [in, out] is made.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

Factors = tuple[np.ndarray, np.ndarray]  # X [..., in, R], Y [..., R, out]


def stack(shares: Iterable[float], a: Iterable[Any], b: Iterable[Any]) -> Factors:
    """Returns X, Y with X Y = Σ p_k a_k b_k; the share goes into one factor, ranks may differ.

    Args: a: of each client [..., in, r_k]; b: [..., r_k, out].
    """
    scaled = [p * np.asarray(x, np.float64) for p, x in zip(shares, a, strict=True)]
    return np.concatenate(scaled, -1), np.concatenate([np.asarray(y, np.float64) for y in b], -2)


def mean(shares: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns Σ p_k x_k in float64. Args: x: [K, ...]."""
    return np.tensordot(shares, np.asarray(x, np.float64), 1)


def residual(shares: np.ndarray, a: np.ndarray, b: np.ndarray) -> Factors:
    """Returns X, Y of rank (K − 1) R with X Y = Σ p a b − (Σ p a)(Σ p b), the error of averaging.

    Σ p_k (a_k − ã) = 0, so the last client's a is minus the sum of the others', and
    X Y = Σ_{k<K} p_k (a_k − ã)(b_k − b_K). The form is centred: it takes no difference of large
    products, and any common reference may be subtracted from all a, and from all b.

    Args: shares: float64[K], all above 0. a: [K, ..., in, R]; b: [K, ..., R, out].
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) == 1:
        return np.zeros((*a.shape[1:-1], 0)), np.zeros((*b.shape[1:-2], 0, b.shape[-1]))
    return stack(shares[:-1], a[:-1] - mean(shares, a), b[:-1] - b[-1])


def product_norm(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns ‖X Y‖_F, float64[...], by ‖X Y‖² = Σ_ij (XᵀX)_ij (Y Yᵀ)_ij: two matrices [R, R]."""
    grams = np.swapaxes(x, -1, -2) @ x, y @ np.swapaxes(y, -1, -2)
    return np.sqrt(np.maximum(0.0, np.sum(grams[0] * grams[1], (-2, -1))))


def factor_svd(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns u [..., in, r], σ [..., r], v [..., out, r] with X Y = u diag(σ) vᵀ.

    QR of both factors, then the SVD of the small core R_x R_yᵀ. (Eigenvalues of Gram matrices would
    square the condition number.) In each column of u the entry of largest modulus is positive.
    """
    qx, rx = np.linalg.qr(x)
    qy, ry = np.linalg.qr(np.swapaxes(y, -1, -2))
    u, sigma, vt = np.linalg.svd(rx @ np.swapaxes(ry, -1, -2), full_matrices=False)
    u, v = qx @ u, qy @ np.swapaxes(vt, -1, -2)
    largest = np.take_along_axis(u, np.abs(u).argmax(-2, keepdims=True), -2)
    sign = np.where(largest < 0, -1.0, 1.0)
    return u * sign, sigma, v * sign


def best_adapter(x: np.ndarray, y: np.ndarray, rank: int) -> Factors:
    """Returns the a [..., in, rank], b [..., rank, out] whose product is nearest to X Y.

    a has orthonormal columns, b carries the singular values; both are zero behind the rank of X Y.
    """
    return truncate(x, y, rank)[:2]


def truncate(x: np.ndarray, y: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `best_adapter` and the norm of what it drops, √Σ σ_dropped², float64[...]."""
    u, sigma, v = factor_svd(x, y)
    kept = min(rank, sigma.shape[-1])
    a = np.zeros((*u.shape[:-1], rank))
    b = np.zeros((*v.shape[:-2], rank, v.shape[-2]))
    a[..., :kept] = u[..., :kept]
    b[..., :kept, :] = sigma[..., :kept, None] * np.swapaxes(v[..., :kept], -1, -2)
    return a, b, np.sqrt(np.sum(sigma[..., rank:] ** 2, -1))
