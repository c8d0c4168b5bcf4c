"""SPIF (derived): log-ratios regressed towards bounded χ² targets.

    python -m spear_jax.train --config=configs/spif.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-spif
    python -m spear_jax.train --config=configs/spif.py:ultrachat,qwen2.5-1.5b --workdir=runs/ultrachat-spif
    python -m spear_jax.train --config=configs/spif.py:facts,tiny --workdir=runs/facts-spif

The paper's full text was not available. The loss is our derivation from its abstract (see
spear_jax/algorithms/spif.py), and λ and c are ours. --config.spif.form=pearson takes the unbounded
form. Cost and result: not measured.

The same without this file: --config=spif:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("spif", arg)
