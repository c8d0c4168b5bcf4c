"""Policies: the weights that generate."""

import dataclasses

from spear_jax.models.decoder import merge
from spear_jax.models.lora import LoraConfig
from spear_jax.models.params import Adapter, DecoderParams


@dataclasses.dataclass
class Policy:
    """Weights that generate: a base, and beside it one adapter for all clients or one for each.

    Attributes:
        base: decoder parameters; with a merged adapter where `lora` is None.
        lora: an adapter, or several stacked behind the layer axis, leaves [L', C, ...].
        slots: {client: its place on the axis C}.
    """

    base: DecoderParams
    lora: Adapter | None = None
    slots: dict[int, int] = dataclasses.field(default_factory=dict)


def as_policy(base: DecoderParams, lora: Adapter, settings: LoraConfig, quantize: str) -> Policy:
    """Makes the policy of one adapter: merged into a copy of the base, or beside it.

    A copy is worth its memory on a GPU or TPU, where every step of decoding would pay for the
    adapter's small products. On a CPU the adapter stays beside the base, and where the base is
    quantised.
    """
    merged = quantize == "none" and next(iter(base.embed.devices())).platform != "cpu"
    return Policy(merge(base, lora, settings)) if merged else Policy(base, lora)
