"""SFT on gold responses, a privileged upper reference.

    python -m spear_jax.train --config=configs/sft.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-sft
    python -m spear_jax.train --config=configs/sft.py:facts,tiny --workdir=runs/facts-sft

Learning rates are SPEAR's. Cost and result of the paper's sizes: not measured. Of the embedded
task: see docs/results/

The same without this file: --config=sft:arc_challenge,qwen2.5-1.5b. spear_jax/experiment/presets.py
has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("sft", arg)
