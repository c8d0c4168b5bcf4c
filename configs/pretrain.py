"""The embedded tiny model, from scratch, in passes that restart the learning rate.

    python -m spear_jax.pretrain --config=configs/pretrain.py --out=models/tiny1 python -m
    spear_jax.pretrain --config=configs/pretrain.py --out=models/tiny2
    --config.start_from=models/tiny1 \\
        --config.copy_steps=0 --config.steps=1500 --config.rate=1e-3 --config.seed=1
    python -m spear_jax.pretrain --config=configs/pretrain.py --out=models/tiny3
    --config.start_from=models/tiny2 \\
        --config.copy_steps=0 --config.steps=250 --config.rate=1e-3 --config.seed=2

Reaches: the README says what was measured, and how the weights of the package came about.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe of the model that the package carries."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.width = 128  # model width; heads are 32 wide
    config.layers = 4
    config.vocab_size = 2048  # upper bound of the tokenizer's size
    config.rate = 2e-3  # peak learning rate, cosine decay after 100 warm-up steps
    config.copy_steps = 600  # steps on looking options up, before the tasks come in
    config.steps = 2000  # all steps
    config.start_from = ""  # a folder of an earlier pretraining to go on from
    config.log_every = 100
    return config.lock()
