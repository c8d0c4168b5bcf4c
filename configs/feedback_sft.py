"""Feedback-SFT: SPEAR's rollout, its wins alone.

    python -m spear_jax.train --config=configs/feedback_sft.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-feedback_sft
    python -m spear_jax.train --config=configs/feedback_sft.py:facts,tiny --workdir=runs/facts-feedback_sft

The published settings are SPEAR's, batch for batch. Cost and result of the paper's sizes: not
measured. Of the embedded task: see docs/results/

The same without this file: --config=feedback_sft:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("feedback_sft", arg)
