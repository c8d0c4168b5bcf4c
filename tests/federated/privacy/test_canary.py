"""Membership: does the final adapter tell which secrets one client has trained on?

One client of three holds questions with random wrong answers, which nobody else has. Whoever sees the
final adapter ranks them by likelihood among other such secrets, which no client has.

    python -m pytest -m slow tests/federated/privacy/test_canary.py
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

pytest.importorskip("dp_accounting")
ROUNDS, SECRETS = 4, 24


def config_of(**changes):
    config = sj.preset("sft", task="facts", model="tiny")
    few = {
        "federation.num_clients": 3, "federation.clients_per_round": 3, "rounds": ROUNDS,
        "federation.weighting": "uniform", "rollout.examples": SECRETS, "train.steps": 24,
        "train.batch_size": 12, "train.learning_rate": 5e-3, "train.learning_rate_min": 5e-3,
        "train.warmup": False, "lora.rank": 8, "lora.dropout": 0.0, "data.train_limit": 240,
        "federation.aggregation": "fedavg", "federation.server_rate": 1.0,
    }  # fmt: skip
    config.update_from_flattened_dict(SMALL | few | changes)
    return config


def with_secrets(federation):
    """The federation whose first client has secrets alone; (it, theirs, others')."""
    seen, unseen, rest = np.split(np.concatenate(federation.clients), [SECRETS, 2 * SECRETS])
    responses, rng = federation.worker.data.responses, np.random.default_rng(0)
    for index in (*seen, *unseen):  # another letter than the right one
        others = [responses[i] for i in rest if responses[i] != responses[index]]
        responses[index] = others[rng.integers(len(others))]
    clients = [seen, *np.array_split(rest, 2)]
    return dataclasses.replace(federation, clients=clients), seen, unseen


def attack(**changes):
    """Trains, then ranks. Returns the area under the curve, 0.5 where nothing is told; ε."""
    experiment = build(config_of(**changes), jax.devices()[:1])
    federation, seen, unseen = with_secrets(experiment.federation)
    state, metrics = experiment.initial_state(), {}
    for _ in range(ROUNDS):
        state, metrics, _ = run_round(federation, state, BudgetUsed())
    (policy,), worker = experiment.policies(state), federation.worker
    rows = lambda some: [row(worker, index, 1.0) for index in some]
    told, new = (
        np.array([x.sum() for x in worker.score(policy, rows(some))]) for some in (seen, unseen)
    )
    return np.mean(told[:, None] > new), metrics.get("privacy/epsilon")


@pytest.mark.slow
def test_noise_hides_the_secrets_that_an_adapter_tells_without_it():
    area, _ = attack()
    assert area > 0.85
    # 24 against 24: the area of chance has a standard deviation of 0.084
    private, epsilon = attack(
        **{"privacy.noise_multiplier": 8.0, "privacy.clip": 1.0, "privacy.delta": 1e-3}
    )
    assert epsilon < 1 and abs(private - 0.5) < 0.2
    print(f"areas {area:.3f} and, at an epsilon of {epsilon:.2f}, {private:.3f}")
