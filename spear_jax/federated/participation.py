"""Who of a cohort reports back, and how long a round takes: a simulated clock.

Every client has a device, drawn once: speed, uplink and downlink are median · e^(σ g), g ~ N(0, 1).

    seconds = 2 · latency + bytes down / down + FLOP / speed + bytes up / up

A client may be lost in a round: after its download, in the middle of training, or before its upload.
The server asks o times as many clients as it wants, and takes the first of them that report, up to a
deadline. What was spent counts; what did not arrive does not enter.

Draws depend on (seed, round, client) alone, and precede training, so that a lost client is not trained
at all. Source: over-selection and deadlines, Bonawitz et al. (arXiv 1902.01046). Departures:
  1. FLOPs are counted by the client's own tokens, prompts and completions each in full: they do not
     depend on how rows are packed.
  2. Without a deadline the server waits for a lost client until it would have reported.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spear_jax.core.rng import path_rng, purpose

DEVICE = purpose("device")
DROPOUT = purpose("dropout")
MOMENTS = ("after_download", "mid_training", "before_upload")


STALENESS = ("polynomial", "constant", "hinge")


@dataclasses.dataclass(frozen=True)
class Asynchronous:
    """Settings of rounds without a cohort (`federated/asynchronous.py`).

    Attributes:
        mode: "fedbuff" or "fedasync".
        buffer: B of fedbuff; 0: as many as are at work.
        oldest: the age of the oldest update that is taken; 0: any.
        mix: α of fedasync.
        staleness: s(τ): "polynomial" (1 + τ)^(−a), "constant" 1, "hinge" 1 up to b, then
            1 / (a (τ − b) + 1).
        power: a of polynomial; slope, flat: a and b of hinge.
    """

    mode: str
    buffer: int = 0
    oldest: int = 0
    mix: float = 0.6
    staleness: str = "polynomial"
    power: float = 0.5
    slope: float = 10.0
    flat: int = 4

    @property
    def mixes(self) -> bool:
        """Returns whether clients' adapters are mixed in, not their updates."""
        return self.mode == "fedasync"

    def size(self, at_work: int) -> int:
        """Returns B."""
        return 1 if self.mixes else self.buffer or at_work

    def shrink(self, age: np.ndarray) -> np.ndarray:
        """Returns what updates of these ages are multiplied by, float64[n]."""
        age = np.asarray(age, np.float64)
        s = {
            "polynomial": (1 + age) ** -self.power,
            "constant": np.ones_like(age),
            "hinge": 1 / (self.slope * np.maximum(age - self.flat, 0) + 1),
        }[self.staleness]
        return s * self.mix if self.mixes else s


class Device(NamedTuple):
    """A client's device: FLOP/s, bytes/s up, bytes/s down."""

    speed: float
    up: float
    down: float


class Loss(NamedTuple):
    """How a client is lost: the moment, of MOMENTS, and the local steps that it has done."""

    moment: str
    steps: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A cohort's round on the clock.

    Attributes:
        accepted: bool[C], whose update enters.
        sent: bool[C], who has sent it up, too late perhaps.
        lost: bool[C].
        steps: int[C], the local steps that each has done when it reports or is lost.
        seconds: of the round.
        unrun: FLOP of local training that clients have spent without an effect, and that is
            not run here.
    """

    accepted: np.ndarray
    sent: np.ndarray
    lost: np.ndarray
    steps: np.ndarray
    seconds: float
    unrun: float


@dataclasses.dataclass(frozen=True)
class Participation:
    """Settings of the clock.

    Attributes:
        speed, up, down: medians, in FLOP/s and bytes/s; spread: σ; latency: seconds each way.
        dropout: the chance that a client is lost in a round.
        over_selection: o.
        deadline: seconds; 0 is none.
        min_reports: with fewer the round fails.
        partial: whether a client that is lost in the middle of training sends what it has.
        seed: of all draws.
    """

    speed: float = 5e11
    up: float = 5e5
    down: float = 1e6
    spread: float = 0.5
    latency: float = 0.05
    dropout: float = 0.0
    over_selection: float = 1.0
    deadline: float = 0.0
    min_reports: int = 1
    partial: bool = False
    seed: int = 0

    def asked(self, wanted: int) -> int:
        """Returns how many clients are asked for a cohort of that size."""
        return math.ceil(self.over_selection * wanted - 1e-9)

    def device(self, client: int) -> Device:
        """Returns a client's device."""
        drawn = np.exp(self.spread * path_rng(self.seed, DEVICE, client).standard_normal(3))
        return Device(self.speed * drawn[0], self.up * drawn[1], self.down * drawn[2])

    def loss(self, round: int, client: int, steps: int) -> Loss | None:
        """Returns how a client is lost in a round; None: it is not. Args: steps: S."""
        rng = path_rng(self.seed, DROPOUT, round, client)
        first, second = rng.random(2)
        if first >= self.dropout:
            return None
        moment = MOMENTS[int(second * 3)]
        done = {
            "after_download": 0,
            "mid_training": int(rng.integers(steps)),
            "before_upload": steps,
        }
        return Loss(moment, done[moment])

    def play(
        self,
        round: int,
        clients: Sequence[int],
        wanted: int,
        steps: int,
        bytes_down: np.ndarray,
        bytes_up: np.ndarray,
        rollout: np.ndarray,
        training: np.ndarray,
    ) -> Outcome:
        """Plays a round.

        Args:
            wanted: how many reports end it; steps: S.
            bytes_down, bytes_up: [C], of each client, if it is not lost.
            rollout, training: FLOP of each, likewise.
        """
        losses = [self.loss(round, client, steps) for client in clients]
        done = np.array([steps if loss is None else loss.steps for loss in losses], int)
        some = self.partial & (done > 0) & (done < steps)
        lost = np.array([loss is not None for loss in losses], bool) & ~some
        work = rollout + training * np.where(some, done / steps, 1.0)
        each = zip(bytes_down, bytes_up, work, map(self.device, clients), strict=True)
        report = np.array([round_time(*one, self.latency) for one in each])
        wait = self.deadline or math.inf
        accepted, seconds = accept(np.where(lost, math.inf, report), wanted, wait)
        if not math.isfinite(seconds):  # nobody tells the server that a client is lost
            seconds = float(report.max(initial=0.0))
        if accepted.sum() < self.min_reports:
            accepted = np.zeros_like(accepted)
        share = done / steps
        unrun = float(
            np.sum(training * share * ~accepted - training * (1 - share) * some * accepted)
        )
        return Outcome(accepted, ~lost, lost, done, seconds, unrun)

    def metrics(
        self, outcome: Outcome, clients: Sequence[int], all: int, clock: float
    ) -> dict[str, float]:
        """Returns a round's metrics by name.

        They tell by speed, in thirds of all clients, which share of those asked was accepted.

        Args: clients: the cohort's ids, the server's own left out; all: K; clock: after the round.
        """
        names, accepted = ("slow", "middle", "fast"), outcome.accepted[: len(clients)]
        speeds = [self.device(client).speed for client in clients]
        place = np.searchsorted(self._thirds(all), speeds)
        return {
            "sim/seconds": outcome.seconds,
            "sim/clock": clock,
            "participation/lost": float(outcome.lost.sum()),
            "participation/late": float((outcome.sent & ~outcome.accepted).sum()),
            "round/failed": float(not accepted.any()),
        } | {
            f"participation/{name}": float(np.mean(accepted[place == i]))
            for i, name in enumerate(names)
            if i in place
        }

    @functools.cache  # noqa: B019 (one object a run)
    def _thirds(self, all: int) -> tuple[float, float]:
        speeds = [self.device(client).speed for client in range(all)]
        slow, fast = np.quantile(speeds, (1 / 3, 2 / 3))
        return float(slow), float(fast)


def round_time(
    bytes_down: float, bytes_up: float, flops: float, device: Device, latency: float
) -> float:
    """Returns the seconds until a client's report."""
    travel = bytes_down / device.down + bytes_up / device.up
    return 2 * latency + travel + flops / device.speed


def accept(arrival: np.ndarray, wanted: int, deadline: float) -> tuple[np.ndarray, float]:
    """Returns the first `wanted` arrivals up to the deadline, bool[C], and the round's seconds: of
    the last of them, or the deadline where there are fewer.

    Args: arrival: seconds, float[C]; infinite for a client that never reports. Of equal ones the
        first counts.
    """
    order = np.argsort(arrival, kind="stable")
    intime = order[np.isfinite(arrival[order]) & (arrival[order] <= deadline)][:wanted]
    accepted = np.isin(np.arange(len(arrival)), intime)
    return accepted, float(arrival[intime[-1]] if len(intime) == wanted else deadline)
