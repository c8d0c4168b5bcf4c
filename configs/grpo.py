"""GRPO (arXiv 2402.03300), sampled anew at every local step; the paper's tasks and models, and the
embedded tasks.

    python -m spear_jax.train --config=configs/grpo.py:arc_challenge,qwen2.5-1.5b
    --workdir=runs/grpo-arc python -m spear_jax.train --config=configs/grpo.py:facts,tiny
    --workdir=runs/grpo

Settings: group 4 (ARC, HellaSwag) or 2, KL 0.02 (StrategyQA 0.1), 4 prompts x 4 (MATH 2 x 8) as the
baseline published with SPEAR; top-p is 1, since the nucleus is not in the log-probabilities. Tasks,
models and variants: see configs/common.py. Cost and result of the paper's sizes: not measured. Of
the embedded task: see the README.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("grpo", arg)
