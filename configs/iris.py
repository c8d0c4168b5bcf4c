"""IRIS: two tilted risks whose order follows the distribution gap.

    python -m spear_jax.train --config=configs/iris.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc-iris
    python -m spear_jax.train --config=configs/iris.py:ultrachat,qwen2.5-1.5b --workdir=runs/ultrachat-iris
    python -m spear_jax.train --config=configs/iris.py:facts,tiny --workdir=runs/facts-iris

Here a round is an iteration of a few AdamW steps; the paper has five iterations of two epochs on
50k UltraChat prompts at batch 64. The loss is our reconstruction (see
spear_jax/algorithms/iris.py). An optimiser step should hold at least 16 gold responses
(train.batch_size * train.accumulation). Cost and result: not measured.

The same without this file: --config=iris:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("iris", arg)
