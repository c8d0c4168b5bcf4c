"""SPEAR (arXiv 2605.07977) with the published settings: four datasets, two models; and the embedded
tasks.

    python -m spear_jax.train --config=configs/spear.py:arc_challenge,qwen2.5-1.5b
    --workdir=runs/arc python -m spear_jax.train
    --config=configs/spear.py:arc_challenge,qwen2.5-1.5b,reference --workdir=runs/arc-reference
    python -m spear_jax.train --config=configs/spear.py:arc_challenge,smollm2-135m,cpu
    --workdir=runs/arc-cpu \\
        --config.data.path=PATH_TO_PARQUET_FOLDER
    python -m spear_jax.train --config=configs/spear.py:facts,tiny --workdir=runs/facts

Tasks, models and variants: see configs/common.py. Cost and result of the paper's sizes: not
measured. Of the cpu variant and of the embedded tasks: see the README.
"""

import ml_collections

from spear_jax.experiment import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,variant...]"."""
    return presets.method_config("spear", arg)
