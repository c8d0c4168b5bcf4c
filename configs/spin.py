"""SPIN: gold responses against the model's own earlier ones (arXiv 2401.01335).

    python -m spear_jax.train --config=configs/spin.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-spin
    python -m spear_jax.train --config=configs/spin.py:ultrachat,qwen2.5-1.5b --workdir=runs/ultrachat-spin
    python -m spear_jax.train --config=configs/spin.py:facts,tiny --workdir=runs/facts-spin

Here a round is an iteration of a few AdamW steps on the examples that a client draws. The paper has
four iterations of several epochs on 50k UltraChat prompts, RMSProp at 5e-7 then 1e-7, and λ = 5 in
the last one (--config.spin.lam=5). Cost and result: not measured.

The same without this file: --config=spin:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("spin", arg)
