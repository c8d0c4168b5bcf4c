"""RLTF-SD: reinforcement learning from text feedback with self-distillation.

    python -m spear_jax.train --config=configs/rltf_sd.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-rltf_sd
    python -m spear_jax.train --config=configs/rltf_sd.py:facts,tiny --workdir=runs/facts-rltf_sd

4 samples a prompt (ARC, HellaSwag) or 2, as the baseline published with SPEAR. Cost and result of
the paper's sizes: not measured. Of the embedded task: see docs/results/

The same without this file: --config=rltf_sd:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("rltf_sd", arg)
