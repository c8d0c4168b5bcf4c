"""Corrections of client drift: clients that train for many steps move apart.

A correction has hooks on both sides. On the device, inside a client's local steps:

    seen = remember(seen, gradient, finite, index)      # after each step
    adapter = upload(start, adapter, done, steps)       # before transforms and the reducer

On the server, `kept` is its `aggregation_state`, part of the checkpoint:

    kept = init(adapter, clients, optimiser)            # before round 1
    correction = corrections(kept, cohort)              # added to the cohort's gradients
    factor = factor(weight, done, steps)                # of the reduced update
    kept = end(kept, cohort, accepted, gathered, adapter, optimiser)

    scaffold    gradients g − c_k + c. The new c_k is the mean of the raw g of the round's steps, and
                c ← c + (C'/K) mean(c_k⁺ − c_k) over the C' clients that arrived (arXiv 1910.06378)
    fednova     g = τ_eff Σ p_k δ_k / τ_k with τ_eff = Σ p_k τ_k, for clients that do τ_k steps
                (arXiv 2007.07481)
    mime_lite   the optimiser's moments are the server's. They are frozen while clients train, and
                move once a round by the clients' mean gradient at the global adapter (arXiv 2008.03606)

Departures:
  1. SCAFFOLD: under SGD the mean of raw gradients is the paper's option II. Under AdamW only the mean
     has a meaning, and the correction enters before clipping and before the moments.
  2. FedNova: an AdamW step counts as one step, whatever its length.
  3. Mime-lite: a local step is the optimiser's next step from the frozen moments, so that the root holds
     the step's own gradient, too. The paper's form would divide by zero in round 1.
  4. Mime-lite: the gradient at the global adapter is that of the first local step's rows, which costs
     nothing; the paper takes all of a client's data.

`prox` of FedProx is a term of the loss, and stands in `local_training.py`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spear_jax.core import pytrees
from spear_jax.models.params import Adapter

Kept = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Drift:
    """A correction; hashable. The hooks here change nothing.

    Class attributes:
        name: of `federation.drift`.
        up, down: trees of the adapter's size that a client sends and receives, its own among them.
        uniform: whether every client that trained weighs the same.
        gradients: whether a client sends a gradient beside its update.
        freezes: whether the moments of a client's optimiser stay as they are.
        one_basis: whether what is kept needs a LoRA rule whose clients train the same factors,
            in one basis, in every round.
    """

    name: ClassVar[str]
    up: ClassVar[int] = 1
    down: ClassVar[int] = 1
    uniform: ClassVar[bool] = False
    gradients: ClassVar[bool] = False
    freezes: ClassVar[bool] = False
    one_basis: ClassVar[bool] = False

    def remember(self, seen: Any, gradient: Adapter, finite: jax.Array, index: jax.Array) -> Any:
        """Returns what a client has seen of its gradients. Args: seen: zeros before the first step;
        index: of the step, int32[].
        """
        return seen

    def sends(self, seen: Any, done: jax.Array) -> Any:
        """Returns the gradient that a client sends. Args: done: steps that it took, float32[]."""
        return seen

    def upload(self, start: Adapter, adapter: Adapter, done: jax.Array, steps: int) -> Adapter:
        """Returns what a client sends in place of its adapter. Args: start: what it received."""
        return adapter

    def init(self, adapter: Adapter, clients: int, optimiser: optax.GradientTransformation) -> Kept:
        """Returns what is kept before round 1. Args: clients: K; optimiser: a client's."""
        return {}

    def corrections(self, kept: Kept, clients: list[int]) -> Adapter | None:
        """Returns what is added to clients' gradients, leaves float32[C, ...]; None: nothing."""
        return None

    def gather(self, held: Any, gradients: Adapter, weight: np.ndarray) -> Any:
        """Adds a chunk's gradients, leaves [n, ...] on the host, to those before (None: none)."""
        return held

    def factor(self, weight: np.ndarray, done: np.ndarray, steps: int) -> float | None:
        """Returns what the reduced update is multiplied by; None: nothing.

        Args: weight: float[C], 0 for clients that do not count; done: steps of each; steps: S.
        """
        return None

    def end(
        self,
        kept: Kept,
        clients: np.ndarray,
        accepted: np.ndarray,
        gathered: Any,
        adapter: Adapter,
        optimiser: optax.GradientTransformation,
    ) -> Kept:
        """Returns what is kept after a round that has not failed.

        Args: clients: int[C]; accepted: bool[C], whose update entered; gathered: as from `gather`;
            adapter: the global one.
        """
        return kept


@dataclasses.dataclass(frozen=True)
class Scaffold(Drift):
    """SCAFFOLD. Keeps `control`, c, and `controls`, c_k: leaves float32[K, ...]."""

    name: ClassVar[str] = "scaffold"
    up: ClassVar[int] = 2
    down: ClassVar[int] = 2
    uniform: ClassVar[bool] = True
    gradients: ClassVar[bool] = True
    one_basis: ClassVar[bool] = True

    def remember(self, seen: Any, gradient: Adapter, finite: jax.Array, index: jax.Array) -> Any:
        return jax.tree.map(lambda s, g: s + jnp.where(finite, g, 0.0), seen, gradient)

    def sends(self, seen: Any, done: jax.Array) -> Any:
        return jax.tree.map(lambda s: s / jnp.maximum(done, 1.0), seen)

    def init(self, adapter: Adapter, clients: int, optimiser: optax.GradientTransformation) -> Kept:
        zeros = lambda *lead: jax.tree.map(
            lambda x: np.zeros((*lead, *x.shape), np.float32), adapter
        )
        return {"control": zeros(), "controls": zeros(clients)}

    def corrections(self, kept: Kept, clients: list[int]) -> Adapter:
        less = lambda c, own: c - own[np.asarray(clients)]
        return jax.tree.map(less, kept["control"], kept["controls"])

    def gather(self, held: Any, gradients: Adapter, weight: np.ndarray) -> Any:
        return [*(held or ()), gradients]

    def end(
        self,
        kept: Kept,
        clients: np.ndarray,
        accepted: np.ndarray,
        gathered: Any,
        adapter: Adapter,
        optimiser: optax.GradientTransformation,
    ) -> Kept:
        ids = clients[accepted]
        own = lambda *parts: np.concatenate(parts)[: len(clients)][accepted]
        new = jax.tree.map(own, *gathered)
        share = lambda c, old, n: c + np.float32(np.sum(n - old[ids], 0) / len(old))
        control = jax.tree.map(share, kept["control"], kept["controls"], new)
        controls = jax.tree.map(np.array, kept["controls"])  # a checkpoint may be writing the old
        jax.tree.map(lambda old, n: old.__setitem__(ids, n), controls, new)
        return kept | {"control": control, "controls": controls}


@dataclasses.dataclass(frozen=True)
class FedNova(Drift):
    """FedNova. A client sends S δ / τ, and the server multiplies by τ_eff / S."""

    name: ClassVar[str] = "fednova"

    def upload(self, start: Adapter, adapter: Adapter, done: jax.Array, steps: int) -> Adapter:
        scale = steps / jnp.maximum(done, 1.0)
        longer = lambda old, new: jnp.where(scale == 1.0, new, old + scale * (new - old))
        return jax.tree.map(longer, start, adapter)

    def factor(self, weight: np.ndarray, done: np.ndarray, steps: int) -> float | None:
        mass = np.sum(weight, dtype=np.float64)
        return float(np.sum(weight * done, dtype=np.float64) / mass / steps) if mass else None


@dataclasses.dataclass(frozen=True)
class MimeLite(Drift):
    """Mime-lite. Keeps `moments`: the state of a client's optimiser."""

    name: ClassVar[str] = "mime_lite"
    up: ClassVar[int] = 2
    down: ClassVar[int] = 3  # with both moments
    gradients: ClassVar[bool] = True
    freezes: ClassVar[bool] = True
    one_basis: ClassVar[bool] = True

    def remember(self, seen: Any, gradient: Adapter, finite: jax.Array, index: jax.Array) -> Any:
        return pytrees.where((index == 0) & finite, gradient, seen)

    def init(self, adapter: Adapter, clients: int, optimiser: optax.GradientTransformation) -> Kept:
        return {"moments": jax.tree.map(np.asarray, optimiser.init(adapter))}

    def gather(self, held: Any, gradients: Adapter, weight: np.ndarray) -> Any:
        total = jax.tree.map(
            lambda g: np.tensordot(weight, np.asarray(g, np.float64), 1), gradients
        )
        mass = weight.sum(dtype=np.float64)
        return (total, mass) if held is None else jax.tree.map(np.add, held, (total, mass))

    def end(
        self,
        kept: Kept,
        clients: np.ndarray,
        accepted: np.ndarray,
        gathered: Any,
        adapter: Adapter,
        optimiser: optax.GradientTransformation,
    ) -> Kept:
        total, mass = gathered
        mean = jax.tree.map(lambda x: jnp.asarray(x / mass, jnp.float32), total)
        _, moments = optimiser.update(mean, kept["moments"], adapter)
        return kept | {"moments": jax.tree.map(np.asarray, moments)}


DRIFTS: dict[str, Drift] = {one.name: one for one in (Scaffold(), FedNova(), MimeLite())}
