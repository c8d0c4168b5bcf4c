"""RLTF-SD: reinforcement learning from text feedback with self-distillation, for every task and
model.

    python -m spear_jax.train --config=configs/rltf_sd.py:arc_challenge,qwen2.5-1.5b
    --workdir=runs/rltf_sd-arc python -m spear_jax.train --config=configs/rltf_sd.py:facts,tiny
    --workdir=runs/rltf_sd

Settings: 4 samples a prompt (ARC, HellaSwag) or 2, as the baseline published with SPEAR. Tasks,
models and variants: see configs/common.py. Cost and result of the paper's sizes: not measured. Of
the embedded task: see the README.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("rltf_sd", arg)
