"""The embedded tiny model, from scratch, in passes that restart the learning rate.

    python -m spear_jax.pretrain --config=configs/pretrain.py --out=models/tiny1
    python -m spear_jax.pretrain --config=configs/pretrain.py --out=models/tiny2 --config.start_from=models/tiny1 \\
        --config.copy_steps=0 --config.steps=1500 --config.rate=1e-3 --config.seed=1
    python -m spear_jax.pretrain --config=configs/pretrain.py --out=models/tiny3 --config.start_from=models/tiny2 \\
        --config.copy_steps=0 --config.steps=250 --config.rate=1e-3 --config.seed=2

docs/results/quickstart.md says what was measured.

The same without this file: --config=pretrain.
"""

import ml_collections

from spear_jax import pretrain


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: none is taken."""
    return pretrain.recipe(arg)
