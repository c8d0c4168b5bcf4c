"""Feedback-SFT: SPEAR's rollout, its wins alone; the paper's tasks and models, and the embedded
tasks.

    python -m spear_jax.train --config=configs/feedback_sft.py:arc_challenge,qwen2.5-1.5b
    --workdir=runs/feedback_sft-arc python -m spear_jax.train
    --config=configs/feedback_sft.py:facts,tiny --workdir=runs/feedback_sft

Settings: the published settings are SPEAR's, batch for batch. Tasks, models and variants: see
configs/common.py. Cost and result of the paper's sizes: not measured. Of the embedded task: see the
README.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("feedback_sft", arg)
