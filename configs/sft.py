"""SFT on gold responses, a privileged upper reference; the paper's tasks and models, and the
embedded tasks.

    python -m spear_jax.train --config=configs/sft.py:arc_challenge,qwen2.5-1.5b
    --workdir=runs/sft-arc python -m spear_jax.train --config=configs/sft.py:facts,tiny
    --workdir=runs/sft

Settings: learning rates are SPEAR's. Tasks, models and variants: see configs/common.py. Cost and
result of the paper's sizes: not measured. Of the embedded task: see the README.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("sft", arg)
