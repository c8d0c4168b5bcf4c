"""OPSD, on-policy self-distillation from a teacher that has read the answer, for every task and
model.

    python -m spear_jax.train --config=configs/opsd.py:arc_challenge,qwen2.5-1.5b
    --workdir=runs/opsd-arc python -m spear_jax.train --config=configs/opsd.py:facts,tiny
    --workdir=runs/opsd

Settings: default is the official code's divergence, ',reference' the baseline published with SPEAR;
batches are SPEAR's. Tasks, models and variants: see configs/common.py. Cost and result of the
paper's sizes: not measured. Of the embedded task: see the README.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("opsd", arg)
