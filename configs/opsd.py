"""OPSD: on-policy self-distillation from a teacher that has read the answer.

    python -m spear_jax.train --config=configs/opsd.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-opsd
    python -m spear_jax.train --config=configs/opsd.py:facts,tiny --workdir=runs/facts-opsd

The default is the official code's divergence; the variant reference is the baseline published with
SPEAR. Batches are SPEAR's. Cost and result of the paper's sizes: not measured. Of the embedded
task: see docs/results/

The same without this file: --config=opsd:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("opsd", arg)
