"""T-SPIN: triplets of gold, latest and very first response; no reference policy.

    python -m spear_jax.train --config=configs/tspin.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-tspin
    python -m spear_jax.train --config=configs/tspin.py:ultrachat,qwen2.5-1.5b --workdir=runs/ultrachat-tspin
    python -m spear_jax.train --config=configs/tspin.py:facts,tiny --workdir=runs/facts-tspin

Here a round is an iteration of a few AdamW steps; the paper has Zephyr-7B and Mistral-7B, 50k
prompts, iterations 0 to 4. α and β are not in our sources: 0.1 and 1. Watch tspin/real_length and
tspin/synthetic_length: sums favour short answers. Cost and result: not measured.

The same without this file: --config=tspin:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("tspin", arg)
