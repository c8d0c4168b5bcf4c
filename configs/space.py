"""SPACE: self-play as noise-contrastive estimation, responses unpaired.

    python -m spear_jax.train --config=configs/space.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-space
    python -m spear_jax.train --config=configs/space.py:ultrachat,qwen2.5-1.5b --workdir=runs/ultrachat-space
    python -m spear_jax.train --config=configs/space.py:facts,tiny --workdir=runs/facts-space

Here a round is an iteration of a few AdamW steps; the paper has RMSProp at batch 64, two epochs an
iteration, iterations 0 to 4, Mistral-7B and 50k prompts. --config.space.mu=3 samples three
responses to each prompt. Cost and result: not measured.

The same without this file: --config=space:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("space", arg)
