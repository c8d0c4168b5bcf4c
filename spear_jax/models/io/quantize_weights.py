"""Quantises a base's weights while they are loaded."""

import importlib.util
import math
from typing import Any

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.models.io.tensor_map import Placer
from spear_jax.models.lora import TARGETS

TILE = 64  # inputs that share a scale in NF4


def quantiser(kind: str, place: Placer) -> Placer:
    """Makes a placer that quantises projections on this host's CPU, and then puts their parts on
    the devices with `place`.

    Args: kind: one of quantization.KINDS; "none" gives `place` itself.
    Raises: UserError where qwix is missing.
    """
    if kind == "none":
        return place
    if importlib.util.find_spec("qwix") is None:
        raise UserError(
            f'quantize={kind} needs qwix; `pip install "spear-jax[quantize]"`, or set '
            f"--config.quantize=none."
        )
    import qwix  # here, because only quantised bases need it

    cpu = jax.local_devices(backend="cpu")[0]

    def put(name: str, leaf: np.ndarray) -> Any:
        if name not in TARGETS:
            return place(name, leaf)
        tiles = {1: math.gcd(TILE, leaf.shape[1])} if kind == "nf4" else None
        small = qwix.quantize(
            jax.device_put(leaf, cpu), kind, channelwise_axes=(0, 2), tiled_axes=tiles
        )
        return jax.tree.map(lambda part: place(name, np.asarray(part)), small)

    return put
