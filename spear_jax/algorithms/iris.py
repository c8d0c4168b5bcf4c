"""IRIS: two independent risks, one of real and one of synthetic responses.

Each risk is an exponentially tilted mean of the log-ratio r. The order α sets how sharply the tilts
look at single responses. The real side has order α − 1, the synthetic side α. The order follows the
gap between data and opponent. The data's distribution is the optimum at every order.

Source: IRIS, its public abstract and readers' notes. The loss is the one form that we know to be
    consistent with all of them: the Rényi variational formula with r as test function.

Departures (see also `self_play`):
    1. The paper's prefactor is not known: 1, or α (`scale`), with which the minimum is minus the
       Rényi divergence.
    2. The schedule's direction is the paper's. Its formula, range and the estimate of the gap are
       ours. Every client measures the gap on the opponent's new responses, the server averages by
       number of examples, and the round trains with the α that follows.
    3. Weights are normalised over the optimiser step, not over a micro-batch, at the price of one
       forward pass more (train.normalize=micro gives that up). They are computed from clipped r
       without gradient and act on r itself. The reported loss is that of the clipped r.
    4. λ is 0.1: at 1 the log-ratios of whole responses collapse the weights onto one of them
       (`real_ess`, `synthetic_ess`).
"""

import dataclasses
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import Scoring
from spear_jax.algorithms.self_play import SelfPlay, real_row, reward_metrics
from spear_jax.core.errors import UserError
from spear_jax.core.settings import number, one_of, positive
from spear_jax.core.types import Example, Mean, Trace
from spear_jax.models.params import Adapter
from spear_jax.packing.arrays import Batch
from spear_jax.rollout.policy import Policy
from spear_jax.rollout.worker import RolloutRequest, RolloutWorker
from spear_jax.tasks.base import Task

SMALL = 1e-3  # below this |order| a tilted mean is its expansion
EXPONENT = 80.0  # float32 holds e^80 times as many rows as a step may have


@dataclasses.dataclass(frozen=True)
class IrisSettings:
    """Settings of IRIS."""

    # Where α comes from: the gap on the opponent's responses, `alpha`, or the running difference of
    # mean r and mean r'.
    order: str = one_of("adaptive", "fixed", "per_step")
    alpha: float = number(1.0, 0)  # of "fixed"
    alpha_min: float = number(0.5, 0)  # α at gap 0
    alpha_max: float = number(2.0, 0)  # α at an infinite gap
    # τ, the gap's scale: nats per token ("adaptive"), or of r ("per_step")
    tau: float = positive(1.0)
    ema: float = number(0.9, 0, 1)  # of "per_step": how much of the running gap a step keeps
    lam: float = positive(0.1)  # λ of r = λ (s_θ − s_t)
    scale: str = one_of("one", "alpha")  # the loss's factor
    clip: float = positive(20.0)  # weights are computed from r clipped to [−clip, clip], nats
    refresh_rounds: int = number(1, 1)  # rounds of an iteration


def distribution_gap(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Returns the gap D = max(0, mean NLL_t(y) − mean NLL_t(y')), nats per token.

    Args: real, synthetic: one number a response, under the opponent.
    """
    return max(0.0, float(np.mean(real) - np.mean(synthetic)))


def adaptive_order(gap: jax.Array, low: float, high: float, tau: float) -> jax.Array:
    """Returns the order α = α_min + (α_max − α_min)(1 − e^{−D/τ})."""
    return low + (high - low) * (1.0 - jnp.exp(-gap / tau))


def tilt_sums(
    reward: jax.Array, valid: jax.Array, order: jax.Array, clip: float
) -> dict[str, jax.Array]:
    """Returns the sums of a tilted mean over some rows; they add over micro-batches.

    Args:
        reward: float[...].
        valid: bool[...].
        order: float[], d.
    Returns: Σ e^{d z}, Σ z, Σ z², n, of z = sg clip(r).
    """
    z = _clipped(reward, clip)
    held = {"weight": jnp.exp(order * z), "total": z, "square": z**2, "count": jnp.ones_like(z)}
    return {name: jnp.where(valid, x, 0.0).sum() for name, x in held.items()}


def tilted_mean(
    reward: jax.Array,
    valid: jax.Array,
    order: jax.Array,
    sums: Mapping[str, jax.Array],
    clip: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns this micro-batch's share of M_d(r) = (1/d) log mean e^{d r}, and its weights.

    Where |d| < SMALL, M is mean r + (d/2) var r. The gradient with respect to r_i is w_i =
    softmax_i(d z) over the whole step, whatever the shares. With order 1, a higher reward weighs
    more:

        >>> reward, valid, order = jnp.array([0.0, 1.0]), jnp.ones(2, bool), jnp.float32(1)
        >>> mean, weight = tilted_mean(reward, valid, order, tilt_sums(reward, valid, order, 20), 20)
        >>> round(float(mean), 3), [round(w, 3) for w in weight.tolist()]
        (0.62, [0.269, 0.731])

    Args: sums: `tilt_sums` of the whole step.
    Returns: float[]; w, float[...].
    """
    z, count = _clipped(reward, clip), sums["count"]
    small = jnp.abs(order) < SMALL
    mean = losses.ratio(sums["total"], count)
    mass = jnp.where(count > 0, sums["weight"], 1.0)
    # w = e^{d z} / Σ e^{d z}, or (1 + d (z − mean z)) / n
    weight = jnp.where(
        small, losses.ratio(1.0 + order * (z - mean), count), jnp.exp(order * z) / mass
    )
    weight = jnp.where(valid, weight, 0.0)
    tilted = jnp.log(mass / jnp.maximum(1, count)) / jnp.where(small, 1.0, order)
    value = jnp.where(
        small, mean + order / 2 * (losses.ratio(sums["square"], count) - mean**2), tilted
    )
    share = losses.ratio(valid.sum(), count) * value
    return share + (weight * (reward - jax.lax.stop_gradient(reward))).sum(), weight


def iris_loss(
    real: jax.Array,
    synthetic: jax.Array,
    valid: tuple,
    alpha: jax.Array,
    sums: Mapping[str, Mapping],
    clip: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns this micro-batch's share of L_α = M_α(r') − M_{α−1}(r), and the weights.

    Args:
        real, synthetic: float[...], r of either side.
        valid: bool, of either side.
        sums: `iris_sums` of the whole step.
    Returns: float[]; the weights w of either side.
    """
    low, real_weight = tilted_mean(real, valid[0], alpha - 1, sums["real"], clip)
    high, synthetic_weight = tilted_mean(synthetic, valid[1], alpha, sums["synthetic"], clip)
    return high - low, (real_weight, synthetic_weight)


def iris_sums(
    real: jax.Array, synthetic: jax.Array, valid: tuple, alpha: jax.Array, clip: float
) -> dict[str, dict[str, jax.Array]]:
    """Returns `tilt_sums` of both sides; arguments as `iris_loss`."""
    return {
        "real": tilt_sums(real, valid[0], alpha - 1, clip),
        "synthetic": tilt_sums(synthetic, valid[1], alpha, clip),
    }


def _clipped(reward: jax.Array, clip: float) -> jax.Array:
    return jnp.clip(jax.lax.stop_gradient(reward), -clip, clip)


class Iris(SelfPlay):
    """IRIS; real and synthetic rows are not paired.

    The algorithm's state beside that of `SelfPlay`: `gap`, float32[], the last measured D.
    """

    name = "iris"
    Settings = IrisSettings

    scoring = Scoring(dropout=False, two_pass=True)

    def check(self, task: Task, examples: list[Example], feedback: str) -> None:
        super().check(task, examples, feedback)
        config, rows = self.settings, self.common.batch_size * self.common.accumulation
        if rows < 2:
            raise UserError(
                f"iris has {rows} real response in an optimiser step, where its order has no "
                f"effect; it needs at least 2. "
                "Set --config.train.batch_size or --config.train.accumulation (16 in all is "
                "enough)."
            )
        if rows < 16:
            print(
                f"warning: iris weighs {rows} responses a side; estimates are biased below about "
                f"16.",
                file=sys.stderr,
            )
        if config.alpha_min > config.alpha_max:
            raise UserError(
                f"iris.alpha_min is {config.alpha_min}, above iris.alpha_max {config.alpha_max}; "
                f"set --config.iris.alpha_min."
            )
        orders = (
            (config.alpha,) if config.order == "fixed" else (config.alpha_min, config.alpha_max)
        )
        if config.scale == "alpha" and min(orders) == 0:
            raise UserError(
                "iris.scale is 'alpha' and the order can be 0, where the loss vanishes. Set "
                "--config.iris.scale=one."
            )
        steepest = max(max(abs(alpha), abs(alpha - 1)) for alpha in orders)
        if steepest * config.clip > EXPONENT:
            raise UserError(
                f"iris.clip is {config.clip} and the order reaches {max(orders)}: weights up to "
                f"e^{steepest * config.clip:g} "
                f"overflow; their exponent may be {EXPONENT:g}. Set "
                f"--config.iris.clip={EXPONENT / steepest:g} or lower."
            )

    @property
    def measures_cohort(self) -> str:  # the gap, averaged over clients
        return "iris.order=per_step" if self.settings.order == "adaptive" else ""

    def init_state(self, lora: Adapter, examples: int, length: int) -> dict:
        return super().init_state(lora, examples, length) | {"gap": np.zeros((), np.float32)}

    def measure(
        self,
        worker: RolloutWorker,
        author: Policy,
        records: list[tuple[RolloutRequest, Trace]],
        algorithm_state: dict,
    ) -> dict:
        """Returns D of the clients on the opponent, averaged by their numbers of examples."""
        if self.settings.order != "adaptive":
            return {}
        scored = worker.score(author, [real_row(worker, index) for (_, index, *_), _ in records])
        clients: dict[int, list[tuple[float, float]]] = {}
        for ((client, *_), trace), real in zip(records, scored, strict=True):
            clients.setdefault(client, []).append((-np.mean(real), -np.mean(trace.first.logprobs)))
        gaps = [distribution_gap(*np.transpose(pairs)) for pairs in clients.values()]
        return {
            "gap": np.asarray(
                np.average(gaps, weights=[len(p) for p in clients.values()]), np.float32
            )
        }

    def loss_scalars(self, algorithm_state: dict, now: int) -> dict[str, np.ndarray]:
        """Returns α, float32[]; with "per_step" the running gap, 0 where a round begins."""
        config = self.settings
        if config.order == "per_step":
            return {"gap": np.zeros((), np.float32)}
        if config.order == "fixed":
            return {"alpha": np.asarray(config.alpha, np.float32)}
        return {"alpha": np.asarray(self._schedule(algorithm_state["gap"]), np.float32)}

    def _schedule(self, gap: jax.Array) -> jax.Array:
        return adaptive_order(
            gap, self.settings.alpha_min, self.settings.alpha_max, self.settings.tau
        )

    def _alpha(self, loss_scalars) -> jax.Array:
        return (
            self._schedule(jnp.maximum(0, loss_scalars["gap"]))
            if "gap" in loss_scalars
            else loss_scalars["alpha"]
        )

    def denominators(
        self, batch: Batch, logprobs: jax.Array, loss_scalars
    ) -> dict[str, dict[str, jax.Array]]:
        real, synthetic = self.rewards(batch, logprobs)[0]
        return iris_sums(
            real, synthetic, self.valid(batch), self._alpha(loss_scalars), self.settings.clip
        )

    def update_loss_scalars(self, loss_scalars, denominators):
        """Returns the running gap: gap ← e gap + (1 − e)(mean r − mean r')."""
        if "gap" not in loss_scalars:
            return loss_scalars
        mean = {
            side: losses.ratio(sums["total"], sums["count"]) for side, sums in denominators.items()
        }
        ema = self.settings.ema
        return {"gap": ema * loss_scalars["gap"] + (1 - ema) * (mean["real"] - mean["synthetic"])}

    def loss(
        self, batch: Batch, logprobs: jax.Array, denominators, loss_scalars
    ) -> tuple[jax.Array, dict[str, Mean]]:
        (real, synthetic), valid, alpha = (
            self.rewards(batch, logprobs)[0],
            self.valid(batch),
            self._alpha(loss_scalars),
        )
        loss, weights = iris_loss(real, synthetic, valid, alpha, denominators, self.settings.clip)
        loss *= alpha if self.settings.scale == "alpha" else 1.0
        metrics = reward_metrics(real, synthetic[None], valid) | {
            "alpha": Mean(jnp.asarray(alpha, jnp.float32), jnp.float32(1)),
            "real_ess": _ess(weights[0], valid[0], denominators["real"]["count"]),
            "synthetic_ess": _ess(weights[1], valid[1], denominators["synthetic"]["count"]),
        }
        return loss, metrics

    def end_round(
        self, algorithm_state: dict, lora: Adapter, metrics: Mapping[str, float], round: int
    ) -> dict:
        for side in ("real", "synthetic"):
            share = metrics.get(f"{self.name}/{side}_ess", 0.0)  # none where nobody trained
            if 0 < share < 0.1:
                print(
                    f"warning: iris's {side} weights of round {round} rest on {share:.0%} of the "
                    f"responses; "
                    "a lower --config.iris.lam or --config.iris.alpha_max spreads them.",
                    file=sys.stderr,
                )
        return super().end_round(algorithm_state, lora, metrics, round)


def _ess(weight: jax.Array, valid: jax.Array, count: jax.Array) -> Mean:
    """Returns the effective share of the step's n responses, 1 / (n Σ w²).

    Over steps it is the harmonic mean, exact as a ratio of sums.
    """
    return Mean(losses.ratio(valid.sum(), count), count * (weight**2).sum())
