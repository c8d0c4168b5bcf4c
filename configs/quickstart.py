"""The embedded default: a tiny model learns facts from feedback alone, in minutes on a CPU and
without any download.

    bash launch/quickstart.sh
    python -m spear_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m spear_jax.train --config=configs/quickstart.py:reasoned --workdir=runs/reasoned

Reaches, on held-out phrasings and options: see the README's table of three seeds.
"""

import ml_collections

from spear_jax.core.errors import unknown
from spear_jax.experiment import presets


def get_config(arg: str = "facts") -> ml_collections.ConfigDict:
    """Args: arg: "facts" (multiple choice) or "reasoned" (a reasoned answer with an answer line),
    then ",reference" for the published code's behaviour.
    """
    task, *variants = arg.split(",")
    if task not in presets.EMBEDDED:
        raise unknown("embedded task", task, presets.EMBEDDED)
    return presets.method_config("spear", ",".join([task, "tiny", *variants]))
