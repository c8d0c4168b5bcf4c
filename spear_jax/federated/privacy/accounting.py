"""What a run's adapters reveal of one client: ε at a given δ, computed by dp-accounting.

Two runs that differ in one client give any adapters with chances p and p' that hold
p ≤ e^ε p' + δ. How they differ depends on how cohorts are drawn:

    poisson    one client more or less; every client is drawn by itself with the chance q = C / K.
               Noise zS on a sum of updates of norm S at most: the Poisson-sampled Gaussian, by its
               privacy loss distribution (arXiv 2207.04380)
    a ceiling  likewise; of more than `limit` clients that many are kept (arXiv 2508.15089)
    uniform    one client's data replaced by other data, in cohorts of C of K. The sum then changes
               by 2S, so that the noise is z/2 times the change: sampling without replacement, by
               Rényi divergences (arXiv 1808.00087). It is the larger ε
    all        C = K: no sampling, the Gaussian mechanism under either way of drawing

Local noise: each upload is clipped to S and gets noise zS. Two uploads differ by 2S, so t of them are
one Gaussian mechanism of σ = z / (2√t), whose ε is exact (arXiv 1805.06530).

This is the one file that imports dp-accounting (the extra `privacy`).
"""

import dataclasses
import functools
from typing import Any

from spear_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Account:
    """The account of central noise.

    Attributes:
        noise_multiplier: z, the noise's σ in units of the clip norm S.
        clients: K; cohort: C, expected under "poisson".
        sampling: "poisson" or "uniform".
        limit: the largest cohort under "poisson"; 0: none.
        delta: δ.
    """

    noise_multiplier: float
    clients: int
    cohort: int
    sampling: str
    limit: int
    delta: float

    def epsilon(self, rounds: int) -> float:
        """Returns ε after so many rounds; infinite where no finite one holds."""
        return _epsilon(self, rounds) if rounds else 0.0


def local_epsilon(noise_multiplier: float, uploads: int, delta: float) -> float:
    """Returns ε of a client's noisy uploads. Args: noise_multiplier: z, in units of S."""
    if not uploads:
        return 0.0
    sigma = noise_multiplier / (2.0 * uploads**0.5)
    return float(library().get_epsilon_gaussian(sigma, delta))


def library() -> Any:
    """Imports dp-accounting; raises UserError where it is not installed."""
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        if error.name != "dp_accounting":
            raise
        raise UserError(
            "privacy.* asks for noise, but dp-accounting, which computes its epsilon, is not "
            "installed; run pip install 'spear-jax[privacy]', or set privacy.noise_multiplier=0 and "
            "privacy.local_noise=0."
        ) from error
    return dp_accounting


@functools.lru_cache(16)
def _epsilon(account: Account, rounds: int) -> float:
    if account.sampling == "uniform" and account.cohort < account.clients:
        return _without_replacement(account, rounds)
    return float(_one_round(account).self_compose(rounds).get_epsilon_for_delta(account.delta))


@functools.lru_cache(4)  # of one round; rounds are composed from it, a tenth of a second each time
def _one_round(account: Account) -> Any:
    library()
    from dp_accounting.pld import privacy_loss_distribution as losses

    z, q = account.noise_multiplier, account.cohort / account.clients
    if 0 < account.limit < account.clients:  # where one is left out, another takes its place
        return losses.from_truncated_subsampled_gaussian_mechanism(
            account.clients, q, account.limit, z
        )
    return losses.from_gaussian_mechanism(z, sampling_prob=q)


def _without_replacement(account: Account, rounds: int) -> float:
    accounting = library()
    from dp_accounting import rdp

    noise = accounting.GaussianDpEvent(account.noise_multiplier / 2)
    drawn = accounting.SampledWithoutReplacementDpEvent(account.clients, account.cohort, noise)
    replaced = accounting.NeighboringRelation.REPLACE_ONE
    books = rdp.RdpAccountant(neighboring_relation=replaced)
    return float(books.compose(drawn, rounds).get_epsilon(account.delta))
