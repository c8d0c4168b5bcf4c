"""Runs whose aggregation keeps something: a changed base, clients' own factors, the server's own
client.
"""

import jax
import numpy as np
import pytest
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.core import pytrees
from spear_jax.experiment.builder import build
from spear_jax.experiment.checkpoint import _as_tree
from spear_jax.experiment.export import chosen_adapter
from spear_jax.federated.aggregation.lora_rules.base import rank_of
from spear_jax.federated.round import run_round
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.models.io.huggingface import load_model
from spear_jax.models.io.peft import load_adapter
from spear_jax.models.lora import merge_lora
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy

FEW = {
    "federation.num_clients": 3, "federation.clients_per_round": 3, "rollout.examples": 6,
    "train.steps": 1, "train.batch_size": 4, "eval.limit": 8, "lora.rank": 2,
    "lora.targets": ("q", "down"), "train.learning_rate": 1e-2, "train.learning_rate_min": 1e-2,
    "train.warmup": False, "rounds": 2, "lora.dropout": 0.0, "federation.aggregation": "fedavg",
    "federation.server_rate": 1.0,
}  # fmt: skip


def config_of(**changes):
    config = sj.preset("spear", task="facts", model="tiny", variants=["small"])
    config.update_from_flattened_dict(SMALL | FEW | changes)
    return config


def open_run(config, workdir):
    return sj.Run(config, workdir, quiet=True, devices=jax.devices()[:1])


def digest(run):
    return pytrees.digest(_as_tree(run.state))


def scores(run, policy):
    """Log-probabilities of some completions, one after the other."""
    worker = run.experiment.federation.worker
    rows = [
        TrainingRow(worker.data.prompts[i], worker.data.prompts[i][:2], np.ones(2, bool), 1.0, 1)
        for i in sorted({int(own[0]) for own in run.experiment.federation.clients})
    ]
    return np.concatenate(worker.score(policy, rows))


@pytest.fixture(scope="module")
def fedex(tmp_path_factory):
    """A finished run of two rounds under FedEx-LoRA."""
    folder = tmp_path_factory.mktemp("fedex")
    run = open_run(config_of(**{"federation.lora_rule": "fedex"}), folder / "run")
    metrics = [round.metrics for round in run]
    return run, metrics, folder


def test_a_run_whose_base_changes_goes_on_with_the_same_bits(fedex):
    run, _, folder = fedex
    config = config_of(**{"federation.lora_rule": "fedex"})
    with open_run(config, folder / "again") as first:
        next(iter(first))
        halfway = first.state.aggregation_state["base"]["q"].copy()
    second = open_run(config, folder / "again")
    assert second.finished_rounds == 1
    np.testing.assert_array_equal(second.state.aggregation_state["base"]["q"], halfway)
    second.train()
    assert digest(second) == digest(run)
    assert np.abs(run.state.aggregation_state["base"]["q"] - halfway).max() > 0


def test_the_exported_model_is_the_one_that_was_trained(fedex):
    run, _, folder = fedex
    (policy,) = run.experiment.policies(run.state)
    wanted = scores(run, policy)
    merged = load_model(str(run.export(folder / "merged", merge=True)), "float32")
    np.testing.assert_allclose(scores(run, Policy(merged.base)), wanted, atol=1e-4)
    # the adapter on the base as it was is another model
    apart = Policy(run.experiment.federation.base, policy.lora)
    assert np.abs(scores(run, apart) - wanted).max() > 1e-4
    with pytest.raises(sj.UserError, match=r"round 2 has changed the base.*--merge, or --rank=64"):
        run.export(folder / "adapter")
    # of rank 2 R (n - 1) + R the adapter holds all of it, and it is no more than an adapter
    out = run.export(folder / "wide", rank=10)
    adapter, lora = load_adapter(out, run.experiment.model.config)
    assert lora.scale == pytest.approx(run.experiment.federation.decoder.lora.scale)
    whole = merge_lora(run.experiment.federation.base, adapter, lora)
    np.testing.assert_allclose(scores(run, Policy(whole)), wanted, atol=1e-4)
    with pytest.raises(sj.UserError, match="--rank=3 does nothing beside --merge"):
        run.export(folder / "both", merge=True, rank=3)


def test_a_round_is_evaluated_on_its_own_base(fedex):
    run, _, _ = fedex
    state = run._state_of(1)
    assert int(state.aggregation_state["base_rank"]) == 4  # (3 clients - 1) x R
    assert int(run.state.aggregation_state["base_rank"]) == 8
    one, two = (scores(run, run.experiment.policies(x)[0]) for x in (state, run.state))
    assert np.abs(one - two).max() > 1e-4
    assert run.evaluate(1).count == 8


def test_a_rounds_bytes_are_those_by_hand(fedex):
    """3 clients, R 2, all of the model's layers: a [m, R] and b [R, n] of q and down."""
    run, metrics, _ = fedex
    model = run.experiment.model.config
    q = (model.width, model.heads * model.head_width)
    down = (model.mlp_width, model.width)
    adapter = model.layers * 4 * 2 * (sum(q) + sum(down))
    change = lambda rank: sum(model.layers * 4 * min(rank * (m + n), m * n) for m, n in (q, down))
    active = [3 - x["round/clients_without_wins"] for x in metrics]
    assert active == [3, 3]
    assert [x["round/bytes_up"] for x in metrics] == [3 * adapter, 3 * adapter]
    assert [x["round/bytes_down"] for x in metrics] == [3 * adapter, 3 * (adapter + change(4))]
    assert all(x["round/aggregation_error"] > 0 for x in metrics)


def built(**changes):
    experiment = build(config_of(**changes), jax.devices()[:1])
    return experiment, experiment.initial_state()


def test_fedsas_clients_keep_their_b_and_are_evaluated_with_it():
    experiment, state = built(
        **{
            "federation.lora_rule": "fedsa",
            "federation.clients_per_round": 2,
            "train.steps": 2,  # with b = 0 the first step leaves a
        }
    )
    federation = experiment.federation
    after, metrics, _ = run_round(federation, state, BudgetUsed())
    chosen = set(federation.cohort(1).clients)
    moved = [np.abs(own).max() > 0 for own in after.aggregation_state["b"]["q"]]
    assert moved == [client in chosen for client in range(3)] and not np.any(after.lora.q.b)
    assert np.any(np.asarray(after.lora.q.a) != np.asarray(state.lora.q.a))
    policies = experiment.policies(after)
    assert len(policies) == 3 and rank_of(policies[0].lora) == 2
    again, _, _ = run_round(federation, after, BudgetUsed())  # rollouts with adapters of their own
    assert int(again.round) == 2
    with pytest.raises(sj.UserError, match=r"lora_rule=fedsa leaves every client.*0 to 2"):
        chosen_adapter(experiment, after, None)
    own = chosen_adapter(experiment, after, min(chosen))
    np.testing.assert_array_equal(own.q.b, after.aggregation_state["b"]["q"][min(chosen)])
    with pytest.raises(sj.UserError, match="over aggregation.state_gb=1e-09"):
        built(**{"federation.lora_rule": "fedsa", "aggregation.state_gb": 1e-9})


def test_the_server_of_fltrust_trains_on_questions_of_its_own():
    experiment, state = built(**{"federation.reducer": "fltrust", "aggregation.root_examples": 16})
    federation = experiment.federation
    *own, root = federation.clients
    assert len(own) == 3 and len(root) == 16
    assert not set(np.concatenate(own)) & set(root)
    assert federation.cohort(1).clients[-1] == 3 and federation.aggregation.root == 3
    after, metrics, traces = run_round(federation, state, BudgetUsed())
    assert {record.trace.client for record in traces} == {0, 1, 2, 3}
    assert metrics["round/update_norm"] > 0 and after.aggregation_state == {}
    with pytest.raises(sj.UserError, match="leaves a client without any"):
        built(**{"federation.reducer": "fltrust", "aggregation.root_examples": 1_000_000})


def test_an_approver_of_everything_is_believed():
    experiment, state = built(**{"attack.kind": "approve_wrong", "attack.fraction": 0.34})
    worker = experiment.federation.worker
    (bad,) = [client for client, *_ in worker.feedback.parts[:-1]]
    assert worker.feedback.judges
    _, metrics, traces = run_round(experiment.federation, state, BudgetUsed())
    first = [(x.trace.client == bad, x.trace.first, x.trace.example) for x in traces]
    assert [one.correct for own, one, _ in first if own] == [True] * 6
    assert all(one.correct == worker.task.grade(one.text, x) for own, one, x in first if not own)
    assert metrics["rollout/wins"] >= 6
