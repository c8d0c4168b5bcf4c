"""Policies: the weights that answer."""

import dataclasses

from spear_jax.models.decoder import merge
from spear_jax.models.lora import LoraConfig


@dataclasses.dataclass
class Policy:
    """Weights that answer: one adapter for everybody, merged into the base or beside it, or every
    client's own beside it.

    Attributes:
        base: decoder parameters.
        lora: None where merged; else an adapter, or several stacked behind the layer axis, leaves
            [L, C, ...].
        slots: {client: its place on the stacked axis}.
    """

    base: dict
    lora: dict | None = None
    slots: dict[int, int] = dataclasses.field(default_factory=dict)


def as_policy(base: dict, lora: dict, settings: LoraConfig, quantize: str) -> Policy:
    """The adapter beside the base; merged into a copy of it where a copy is needed anyhow: decoding
    reads weights layer by layer, which a CPU has as views of the stacked ones (`devices.layer_of`),
    and nothing is added to quantised ones.
    """
    merged = quantize == "none" and next(iter(base["embed"].devices())).platform != "cpu"
    return Policy(merge(base, lora, settings)) if merged else Policy(base, lora)
