"""DPO (arXiv 2305.18290) on pairs from feedback, a preference dataset, or EAST's groups, for every
task and model.

    python -m spear_jax.train --config=configs/dpo.py:arc_challenge,qwen2.5-1.5b
    --workdir=runs/dpo-arc python -m spear_jax.train --config=configs/dpo.py:facts,tiny
    --workdir=runs/dpo

Settings: learning rates are SPEAR's; TRL's default 1e-6 is for full models. Tasks, models and
variants: see configs/common.py. Cost and result of the paper's sizes: not measured. Of the embedded
task: see the README.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("dpo", arg)
