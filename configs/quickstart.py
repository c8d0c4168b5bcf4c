"""The embedded default: a tiny model learns facts from feedback alone, in minutes on a CPU and without any download.

    bash launch/quickstart.sh
    python -m spear_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m spear_jax.train --config=configs/quickstart.py:reasoned --workdir=runs/reasoned

Reaches, on held-out phrasings and options: see the README's table of three seeds.
"""

import ml_collections

from spear_jax.config import default_config, set_preset
from spear_jax.errors import unknown

TASKS = ("facts", "reasoned")


def get_config(arg: str = "facts") -> ml_collections.ConfigDict:
    """Args: arg: "facts" (multiple choice) or "reasoned" (a reasoned answer with an answer line), then ",reference" for the
    published code's behaviour."""
    task, *variants = arg.split(",")
    if task not in TASKS:
        raise unknown("embedded task", task, TASKS)
    config = default_config()
    config.task = task
    config.model = "tiny"
    config.rounds = 12

    config.federation.num_clients = 8
    config.federation.clients_per_round = 8
    config.rollout.examples = 112
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0
    config.rollout.max_rows = 256
    config.rollout.max_new_tokens = 3
    config.rollout.max_new_tokens_revision = 3
    config.eval.every = 2
    config.eval.rows = 128

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.0
    config.train.steps = 10
    config.train.batch_size = 32
    config.train.rate = 5e-3
    config.train.rate_min = 1e-3
    if task == "reasoned":
        config.rollout.max_new_tokens = 24
        config.rollout.max_new_tokens_revision = 24
        config.eval.max_new_tokens = 24
        config.algorithm.tail = 8
    for name in variants:
        set_preset(config, name)
    return config
