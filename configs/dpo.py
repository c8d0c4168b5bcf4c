"""DPO on pairs from feedback, a preference dataset, or EAST's groups (arXiv 2305.18290).

    python -m spear_jax.train --config=configs/dpo.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-dpo
    python -m spear_jax.train --config=configs/dpo.py:facts,tiny --workdir=runs/facts-dpo

Learning rates are SPEAR's; TRL's default 1e-6 is for full models. Cost and result of the paper's
sizes: not measured. Of the embedded task: see docs/results/

The same without this file: --config=dpo:arc_challenge,qwen2.5-1.5b. spear_jax/experiment/presets.py
has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("dpo", arg)
