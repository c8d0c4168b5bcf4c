"""Fine-tuning at the end of a run: a client by itself, and the file that tells of it."""

import json

import numpy as np
import pytest
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.analysis.comparison import half_width
from spear_jax.core import pytrees
from spear_jax.experiment.builder import check_finetuning
from spear_jax.experiment.config import parse
from spear_jax.experiment.finetune import NAME, alone
from spear_jax.feedback.oracle import Oracle
from spear_jax.tasks import get_task


@pytest.fixture(scope="module")
def config():
    """A method without rollouts, which compile for longer than all the rest."""
    config = sj.preset("sft", task="facts", model="tiny", variants=["small"])
    few = {
        "rounds": 1, "federation.num_clients": 3, "lora.targets": ("q",), "personal.finetune": 6,
        "personal.ditto": True, "train.learning_rate": 0.01,
    }  # fmt: skip
    config.update_from_flattened_dict(SMALL | few)
    return config


def test_every_client_trains_on_and_the_run_stays_as_it_was(config, tmp_path):
    run = sj.Run(config, tmp_path / "run", quiet=True)
    summary = run.train()
    state, digest = run.state, pytrees.digest(pytrees.to_dicts(run.state))
    found = json.loads((tmp_path / "run" / NAME).read_text())
    assert summary["personal"] == found and found["steps"] == 6
    line, before = run.line, found["before"]["clients"]  # of their own adapters
    assert len(before) == 3 and np.mean(before) == pytest.approx(line["eval/accuracy"])
    assert min(before) == line["personal/worst_accuracy"]
    assert max(before) == line["personal/best_accuracy"]
    whole = run.experiment.policy_of(run.state.lora, run.state)
    assert line["personal/global_accuracy"] == run.experiment.evaluator(whole).accuracy
    each = found["after"]["clients"]
    assert len(each) == 3 and found["after"]["accuracy"] == pytest.approx(np.mean(each))
    assert found["after"]["half_width"] == pytest.approx(half_width(each))
    assert each != before  # of this seed
    assert alone(run.experiment).algorithm.common.steps == 6
    # a later start finds the file, and the state is the one of the last round
    again = sj.Run(config, tmp_path / "run", quiet=True)
    changed = (tmp_path / "run" / NAME).stat().st_mtime_ns
    assert again.train() == summary
    assert (tmp_path / "run" / NAME).stat().st_mtime_ns == changed
    assert pytrees.digest(pytrees.to_dicts(again.state)) == digest and int(state.round) == 1


def test_people_are_not_asked_after_the_last_round(config):
    class Person(Oracle):
        asks_people = True

    task = get_task("facts")
    check_finetuning(parse(config), Oracle(task, 3))
    with pytest.raises(sj.UserError, match="'Person' asks nobody any more"):
        check_finetuning(parse(config), Person(task, 3))
