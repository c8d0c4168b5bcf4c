"""A tiny model learns facts from feedback alone, without any download.

    bash launch/quickstart.sh
    python -m spear_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m spear_jax.train --config=configs/quickstart.py:reasoned --workdir=runs/reasoned

Reaches, on held-out phrasings and options: see docs/results/quickstart.md. Costs minutes on
a CPU.

The same without this file: --config=quickstart, --config=quickstart:reasoned.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "facts" or "reasoned", then ",reference" for the published code's behaviour."""
    return presets.quickstart(arg)
