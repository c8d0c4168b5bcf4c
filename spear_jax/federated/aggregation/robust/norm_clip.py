"""The mean of clipped updates. Source: Sun et al., "Can you really backdoor federated learning?"
(arXiv 1911.07963).

    δ_k ← δ_k min(1, c / ‖δ_k‖)

A zero update stays zero. Attackers with the share p of the weight move the mean by 2 c p at most.
"""

import dataclasses

import jax
import jax.numpy as jnp

from spear_jax.core import pytrees
from spear_jax.federated.aggregation.reducers import ClientTransform, Mean
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class ClipNorm:
    """Scales an update down to a norm. Attributes: bound: c, over all leaves together."""

    bound: float

    def __call__(self, update: Adapter) -> Adapter:
        norm = pytrees.global_norm(update)
        factor = jnp.where(norm > self.bound, self.bound / jnp.where(norm > 0, norm, 1.0), 1.0)
        # what has no norm is not clipped to nothing: it is to be rejected
        factor = jnp.where(jnp.isfinite(norm), factor, jnp.nan)
        return jax.tree.map(lambda x: x * factor, update)


@dataclasses.dataclass(frozen=True)
class NormClip(Mean):
    """The weighted mean of clipped updates; streams. Attributes: bound: c."""

    bound: float = 1.0

    @property
    def transforms(self) -> tuple[ClientTransform, ...]:
        return (ClipNorm(self.bound),)
