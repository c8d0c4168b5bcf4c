"""TPAW: SPIN against a team of up to three earlier policies, adaptive weights.

    python -m spear_jax.train --config=configs/tpaw.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-tpaw
    python -m spear_jax.train --config=configs/tpaw.py:gsm8k,qwen2.5-1.5b --workdir=runs/gsm8k-tpaw
    python -m spear_jax.train --config=configs/tpaw.py:facts,tiny --workdir=runs/facts-tpaw

Here a round is an iteration of a few AdamW steps; the paper has 50k UltraChat or GSM8K prompts,
Qwen2.5-1.5B and Llama-3.1-8B. λ is not in our sources and is SPIN's 0.1. Memory on the host: three
adapters, and three responses a prompt. Cost and result: not measured.

The same without this file: --config=tpaw:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("tpaw", arg)
