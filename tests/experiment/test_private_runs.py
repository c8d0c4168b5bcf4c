"""Runs with differential privacy: cohorts of any size, resumption, and the numbers that are told."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.core import pytrees
from spear_jax.experiment import dry_run
from spear_jax.experiment.builder import build
from spear_jax.experiment.checkpoint import _as_tree
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed

pytest.importorskip("dp_accounting")
FEW = {
    "federation.num_clients": 3, "federation.clients_per_round": 1, "rollout.examples": 6,
    "train.steps": 1, "train.batch_size": 4, "eval.limit": 8, "lora.rank": 2,
    "lora.targets": ("q", "down"), "train.learning_rate": 1e-2, "train.learning_rate_min": 1e-2,
    "train.warmup": False, "rounds": 3, "lora.dropout": 0.0, "federation.aggregation": "fedavg",
    "federation.server_rate": 1.0, "federation.weighting": "uniform",
}  # fmt: skip
PRIVATE = {
    "federation.sampling": "poisson", "privacy.noise_multiplier": 1.0, "privacy.adaptive": True,
    "privacy.sigma_b": 2.0, "privacy.delta": 1e-3,
}  # fmt: skip


def config_of(**changes):
    config = sj.preset("spear", task="facts", model="tiny", variants=["small"])
    config.update_from_flattened_dict(SMALL | FEW | changes)
    return config


def open_run(config, workdir):
    return sj.Run(config, workdir, quiet=True, devices=jax.devices()[:1])


def empty_second_round():
    """A seed whose cohorts of rounds 1 to 3 are some, none and some."""
    federation = build(config_of(**PRIVATE), jax.devices()[:1]).federation
    for seed in range(100):
        federation = dataclasses.replace(federation, seed=seed)
        if [bool(federation.cohort(number).clients) for number in (1, 2, 3)] == [True, False, True]:
            return seed
    raise AssertionError("no seed")


def test_a_private_run_goes_on_with_the_same_bits_over_an_empty_round(tmp_path):
    config = config_of(seed=empty_second_round(), **PRIVATE)
    with open_run(config, tmp_path / "whole") as whole:
        lines = [round.metrics for round in whole]
        digest = pytrees.digest(_as_tree(whole.state))
    for _ in range(2):  # killed after each round
        with open_run(config, tmp_path / "parts") as part:
            next(iter(part))
    with open_run(config, tmp_path / "parts") as part:
        assert part.finished_rounds == 2 and int(part.state.aggregation_state["noisy_rounds"]) == 2
        last = next(iter(part)).metrics
        assert pytrees.digest(_as_tree(part.state)) == digest
    assert last["privacy/epsilon"] == lines[2]["privacy/epsilon"]
    account = whole.experiment.federation.aggregation.privacy.account
    assert [x["privacy/epsilon"] for x in lines] == [account.epsilon(t) for t in (1, 2, 3)]
    assert lines[1]["round/clients"] == 0 and lines[1]["round/update_norm"] > 0
    bounds = [x["privacy/clip"] for x in lines]
    assert bounds[0] == 0.1 and len(set(bounds)) == 3
    written = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert written[2]["privacy/epsilon"] == lines[1]["privacy/epsilon"]
    assert (tmp_path / "whole/summary.json").exists()
    told = dry_run.privacy_of(whole.experiment)
    assert told["privacy_epsilon"] == lines[2]["privacy/epsilon"]
    assert 0 < told["privacy_snr"] < 1


def test_capped_weights_are_of_examples():
    capped = {"federation.weighting": "capped", "federation.weight_cap": 1200.0}
    federation = build(config_of(**PRIVATE | capped), jax.devices()[:1]).federation
    sizes = [len(own) for own in federation.clients]
    assert max(sizes) > 1200 > min(sizes)
    wanted = [min(size / 1200, 1.0) for size in sizes]
    privacy = federation.aggregation.privacy
    assert list(privacy.client_weights) == wanted
    assert privacy.denominator == pytest.approx(sum(wanted) / 3)


def test_local_noise_is_in_what_is_sent():
    changes = {"seed": 3, "federation.sampling": "poisson", "privacy.local_noise": 2.0}
    experiment = build(config_of(**changes), jax.devices()[:1])
    federation, state = experiment.federation, experiment.initial_state()
    cohort = federation.cohort(1).clients
    after, metrics, _ = run_round(federation, state, BudgetUsed())
    assert list(np.flatnonzero(after.aggregation_state["uploads"])) == cohort
    each = federation.aggregation.bytes_of_clients(after.lora, {}, [0], 1)[0][0]
    assert metrics["round/bytes_up"] == len(cohort) * each
    # noise of 2 x 0.1 in every number of four bytes; beside it an update of 0.1 is nothing
    noise = 0.2 * np.sqrt(each / 4 / len(cohort))
    assert metrics["round/update_norm"] == pytest.approx(noise, rel=0.05)
    assert metrics["privacy/epsilon"] > 0
