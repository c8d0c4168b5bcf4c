"""FLTrust: the server trains an update of its own, and trusts clients by their angle to it.

    TS_k = max(0, cos(δ_k, δ_0)),    g = Σ TS_k ‖δ_0‖ δ_k / ‖δ_k‖ / Σ TS_k

with δ_0 trained from the same start on questions that the server trusts. The length of a client's
update has no effect. Where all trust is 0 the round changes nothing. Holds with one honest client,
given an honest root.

Source: Cao et al. (arXiv 2012.13995).
"""

import dataclasses
from typing import Any

import numpy as np

from spear_jax.federated.aggregation import vectors
from spear_jax.federated.aggregation.robust.base import Robust
from spear_jax.models.params import Adapter


@dataclasses.dataclass(frozen=True)
class FLTrust(Robust):
    """Takes the root update δ_0 from `kept["root"]`, where the pipeline puts it."""

    def reduce(
        self, adapters: Adapter, weight: np.ndarray, start: Adapter, kept: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        own = np.asarray(weight) > 0
        updates = vectors.less(vectors.take(adapters, own), start)
        trust, update = self.trusted(updates, kept["root"])
        return update, trust.sum(), kept

    def trusted(self, updates: Any, root: Any) -> tuple[np.ndarray, Any]:
        """Returns TS, float64[n], and g."""
        norms = np.sqrt(vectors.squared_norms(updates))
        length = np.sqrt(vectors.squared_norms(vectors.add_axis(root))[0])
        both = np.where(norms > 0, norms, 1.0) * max(length, 1e-300)
        trust = np.maximum(0.0, vectors.dot(updates, root) / both)
        factors = trust * length / np.where(norms > 0, norms, 1.0) / max(trust.sum(), 1e-300)
        return trust, vectors.weighted_sum(factors, updates)
