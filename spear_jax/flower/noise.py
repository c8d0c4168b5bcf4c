"""Noise and cohorts that nobody can draw again.

The config's seed is known to all nodes. Who knew a round's cohort could not be told that sampling
protects, and who knew the noise could take it off. So a private server of real clients draws both from
a secret: Gaussian numbers from ChaCha20's stream, two of each pair of uniform ones (Box and Muller,
1958), with a key for each round.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from spear_jax.federated.federation import Federation
from spear_jax.federated.privacy.central import CentralPrivacy, Normal
from spear_jax.flower.masks import derived, open_stream


@dataclasses.dataclass(frozen=True)
class SecretPrivacy(CentralPrivacy):
    """Central privacy whose noise is drawn from a secret. Attributes: secret: 32 bytes."""

    secret: bytes = dataclasses.field(default=b"", repr=False)

    def normal(self, use: int, round: int) -> Normal:
        stream = open_stream(derived(self.secret, "noise", use, round))

        def draw(shape: Any) -> np.ndarray:
            size = math.prod(shape)
            half = (size + 1) // 2
            bits = np.frombuffer(stream.update(bytes(16 * half)), "<u8") >> 11
            first, second = np.split((bits + 0.5) * 2.0**-53, 2)  # in (0, 1)
            radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
            both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
            return both[:size].reshape(shape)

        return draw


def with_secret(federation: Federation, secret: bytes) -> Federation:
    """Returns a private federation whose cohorts and noise are drawn from a secret."""
    privacy = federation.aggregation.privacy
    assert privacy is not None
    own = {field.name: getattr(privacy, field.name) for field in dataclasses.fields(privacy)}
    private = SecretPrivacy(**own, secret=secret)
    aggregation = dataclasses.replace(federation.aggregation, privacy=private)
    seed = int.from_bytes(derived(secret, "cohorts"), "little")
    return dataclasses.replace(federation, seed=seed, aggregation=aggregation)
