"""The exactness meter: what a round's mean of factors loses against the mean of products.

    E = Σ p a b − (Σ p a)(Σ p b),    P = Σ p a b,    error = ‖E‖_F / ‖P‖_F      (0 / 0 = 0)

of each projection, its layers taken together, and √(Σ ‖E‖² / Σ ‖P‖²) of all. It is 0 for one client, and
where all clients have one a or one b. E is a covariance, so any common reference may be subtracted:
only differences from the start are multiplied, which float32 can hold.

Where every client's factors reach the host, the norms are exact (`low_rank.product_norm`). Where
clients are summed as they train, `Metered` multiplies by q fixed Gaussian probes Z [out, q],

    H = Σ p δa (δb Z) − δã (δb̃ Z),    ‖E‖² ≈ ‖H‖² / q

which is unbiased, with a relative standard deviation of √(2 / q) at most. Memory stays that of an
adapter or two, whatever the cohort.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.core.rng import purpose
from spear_jax.federated.aggregation import low_rank
from spear_jax.federated.aggregation.lora_rules.base import Uploads
from spear_jax.federated.aggregation.reducers import Mean, Reducer
from spear_jax.models.params import Adapter

PROBES = purpose("exactness probes")
Squares = dict[str, tuple[Any, Any]]  # projection -> ‖E‖², ‖P‖² of each layer, float[L']


def squares(uploads: Uploads) -> Squares:
    """Returns the squared norms of a round's uploads, float64."""
    chosen, found = uploads.chosen(), {}
    for name, a, b in chosen.pairs():
        lost = low_rank.product_norm(*low_rank.residual(chosen.shares, a, b))
        whole = low_rank.product_norm(*low_rank.stack(chosen.shares, a, b))
        found[name] = lost**2, whole**2
    return found


def metrics(squares: Squares) -> dict[str, float]:
    """Returns `round/aggregation_error`, and the same of each projection behind an underscore."""
    sums = {name: tuple(float(np.sum(x)) for x in pair) for name, pair in squares.items()}
    lost, whole = np.sum(list(sums.values()), axis=0) if sums else (0.0, 0.0)
    each = {f"_{name}": pair for name, pair in sums.items()}
    ratio = lambda lost, whole: float(np.sqrt(lost / whole)) if whole > 0 else 0.0
    return {
        f"round/aggregation_error{name}": ratio(*pair)
        for name, pair in {"": (lost, whole), **each}.items()
    }


@dataclasses.dataclass(frozen=True)
class Metered(Reducer):
    """A mean with the meter, for clients that are summed as they train.

    Attributes:
        mean: the reducer that the round uses.
        probes: q. An output width of q at most is measured exactly.
    """

    mean: Mean
    probes: int = 32

    @property
    def transforms(self):
        return self.mean.transforms

    def weights(self, weight: np.ndarray, active: np.ndarray) -> np.ndarray:
        return self.mean.weights(weight, active)

    def init(self, start: Adapter) -> Any:
        def zeros(pair):
            wide = (*pair.a.shape[:-1], self._probe(pair.b).shape[-1])
            return jnp.zeros(wide), jnp.zeros(wide)

        pairs = start.by_name().items()
        return self.mean.init(start), start, {name: zeros(pair) for name, pair in pairs}

    def add(self, state: Any, adapters: Adapter, weight: jax.Array) -> Any:
        reduced, start, sketches = state
        moved = jax.tree.map(jnp.subtract, adapters, start)

        def sketched(held, pair, change):
            probe = self._probe(pair.b)
            product = lambda pair: jnp.einsum("k,klmr,klrq->lmq", weight, pair.a, pair.b @ probe)
            return held[0] + product(change), held[1] + product(pair)

        pairs = adapters.by_name()
        sketches = {
            name: sketched(held, pairs[name], getattr(moved, name))
            for name, held in sketches.items()
        }
        return self.mean.add(reduced, adapters, weight), start, sketches

    def merge(self, states: Any) -> Any:
        reduced, start, sketches = states
        first = jax.tree.map(lambda x: x[0], start)
        return self.mean.merge(reduced), first, jax.tree.map(lambda x: x.sum(0), sketches)

    def finish(self, state: Any, start: Adapter) -> tuple[Adapter, jax.Array]:
        return self.mean.finish(state[0], start)

    def squares(self, state: Any, start: Adapter) -> Squares:
        """Returns the squared norms, as far as the probes see them; zeros where nobody trained."""
        update, mass = self.finish(state, start)
        safe, found = jnp.where(mass > 0, mass, 1.0), {}
        for name, (moved, whole) in state[2].items():
            step = getattr(update, name)
            lost = moved / safe - step.a @ (step.b @ self._probe(step.b))
            norm = lambda x: jnp.where(mass > 0, jnp.sum(x * x, (1, 2)), 0.0)
            found[name] = norm(lost), norm(whole / safe)
        return found

    def _probe(self, b: jax.Array) -> jax.Array:
        """Z / √q, float32[out, q], or the identity where that is no larger."""
        width = b.shape[-1]
        if width <= self.probes:
            return jnp.eye(width)
        drawn = jax.random.normal(jax.random.key(PROBES), (width, self.probes))
        return drawn / np.sqrt(self.probes)
