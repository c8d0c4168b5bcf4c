"""Membership: does the final adapter tell which secrets one client has trained on?

One client of four holds questions with random wrong answers, which nobody else has. Whoever sees the
final adapter ranks them by likelihood among other such secrets, which no client has.
"""

import dataclasses

import jax
import numpy as np
import pytest
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.algorithms.sft import row
from spear_jax.experiment.builder import build
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed

ROUNDS, SECRETS = 12, 24


def config_of(**changes):
    config = sj.preset("sft", task="facts", model="tiny")
    few = {
        "federation.num_clients": 4, "federation.clients_per_round": 4, "rounds": ROUNDS,
        "federation.weighting": "uniform", "rollout.examples": SECRETS, "train.steps": 12,
        "train.batch_size": 12, "train.learning_rate": 2e-2, "train.learning_rate_min": 2e-2,
        "train.warmup": False, "lora.rank": 4, "lora.dropout": 0.0, "data.train_limit": 240,
        "federation.aggregation": "fedavg", "federation.server_rate": 1.0,
    }  # fmt: skip
    config.update_from_flattened_dict(SMALL | few | {"privacy.delta": 1e-3} | changes)
    return config


def attack(**changes):
    """Trains, then ranks: returns the area under the curve of seen against unseen secrets, and ε."""
    experiment = build(config_of(**changes), jax.devices()[:1])
    federation, state = experiment.federation, experiment.initial_state()
    everything = np.concatenate(federation.clients)
    seen, unseen, rest = np.split(everything, [SECRETS, 2 * SECRETS])
    responses, rng = federation.worker.data.responses, np.random.default_rng(0)
    for index in (*seen, *unseen):  # another letter than the right one
        other = [r for r in map(responses.__getitem__, rest) if r != responses[index]]
        responses[index] = other[rng.integers(len(other))]
    federation = dataclasses.replace(federation, clients=[seen, *np.array_split(rest, 3)])
    for _ in range(ROUNDS):
        state, metrics, _ = run_round(federation, state, BudgetUsed())
    policy = experiment.policies(state)[0]
    score = lambda some: [
        x.sum() for x in federation.worker.score(policy, [row(federation.worker, i, 1.0) for i in some])
    ]
    before, after = np.array(score(seen)), np.array(score(unseen))
    return np.mean(before[:, None] > after[None, :]), metrics


if __name__ == "__main__":
    import sys,time
    for more in ({}, {"privacy.noise_multiplier":0.3,"privacy.clip":0.001}, {"privacy.noise_multiplier": 12.0,"privacy.clip":1.0}, {"privacy.noise_multiplier": 12.0,"privacy.clip":0.1}):
        t=time.time(); area, m = attack(**more); print(more, area, {k:v for k,v in m.items() if k.startswith(('privacy','train','round/update'))}, time.time()-t, flush=True)
