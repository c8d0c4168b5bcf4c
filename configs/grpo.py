"""GRPO, sampled anew at every local step (arXiv 2402.03300).

    python -m spear_jax.train --config=configs/grpo.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-grpo
    python -m spear_jax.train --config=configs/grpo.py:facts,tiny --workdir=runs/facts-grpo

Group 4 (ARC, HellaSwag) or 2, KL 0.02 (StrategyQA 0.1), 4 prompts x 4 (MATH 2 x 8) as the baseline
published with SPEAR. Top-p is 1, since the nucleus is not in the log-probabilities. Cost and result
of the paper's sizes: not measured. Of the embedded task: see docs/results/

The same without this file: --config=grpo:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("grpo", arg)
