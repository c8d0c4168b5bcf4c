"""SPEAR (arXiv 2605.07977) with the published settings: four datasets, two models.

    python -m spear_jax.train --config=configs/spear.py:arc_challenge,qwen2.5-1.5b --workdir=runs/arc
    python -m spear_jax.train --config=configs/spear.py:arc_challenge,qwen2.5-1.5b,reference --workdir=runs/arc-reference
    python -m spear_jax.train --config=configs/spear.py:arc_challenge,smollm2-135m,cpu --workdir=runs/arc-cpu \\
        --config.data.path=PATH_TO_PARQUET_FOLDER

Tasks: arc_challenge, hellaswag, math_mcqa, strategy_qa. Models: qwen2.5-1.5b, llama-3.2-3b, smollm2-135m, tiny.
Variants: reference (the published code's behaviour, defects included), cpu (about 20 minutes on two cores).
Cost and result of the paper's sizes: not measured. Of the cpu variant: see the README.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "<task>,<model>[,reference][,cpu]"."""
    task, model, variants = common.parse_arg(arg, "spear")
    return common.apply_variants(common.paper_config(task, model), variants, {"cpu": cpu})


def cpu(config: ml_collections.ConfigDict) -> None:
    """A few clients and rounds, short answers: real questions and a real model in about 20 minutes on two cores."""
    config.rounds = 8
    config.federation.num_clients = 10
    config.federation.clients_per_round = 3
    config.federation.max_examples_per_client = 100
    config.rollout.examples = 24
    config.rollout.num_revisions = 1
    config.rollout.max_new_tokens = config.rollout.max_new_tokens_revision = config.eval.max_new_tokens = 8
    config.rollout.max_rows = 32
    config.federation.clients_at_once = 1
    config.train.remat = False
    config.train.steps = 2
    config.train.batch_size, config.train.accumulation = 4, 1
    config.lora.dropout = 0.0
    config.train.rate, config.train.rate_min = (
        5e-4,
        1e-4,
    )  # 16 optimiser steps in all: the published rate would not show
    config.eval.every = 4
    config.eval.limit = 200
    config.eval.rows = 16
