"""SPEAR with the published settings: four datasets, two models (arXiv 2605.07977).

    python -m spear_jax.train --config=configs/spear.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc
    python -m spear_jax.train --config=configs/spear.py:arc_challenge,qwen2.5-1.5b,reference --workdir=runs/arc-reference
    python -m spear_jax.train --config=configs/spear.py:arc_challenge,smollm2-135m,cpu --workdir=runs/arc-cpu \\
        --config.data.path=PATH_TO_PARQUET_FOLDER
    python -m spear_jax.train --config=configs/spear.py:agnews,smollm2-135m,cpu --workdir=runs/news
    python -m spear_jax.train --config=configs/spear.py:facts,tiny --workdir=runs/facts

Cost and result of the paper's sizes: not measured. Of the variant cpu and of the embedded tasks:
see docs/results/

The same without this file: --config=spear:arc_challenge,qwen2.5-1.5b.
spear_jax/experiment/presets.py has the tasks, models and variants.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("spear", arg)
