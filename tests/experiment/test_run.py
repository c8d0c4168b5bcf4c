"""The run as an object: rounds, callbacks, resume, own parts, run folders of version 0.10, and rounds
that are laid out in different ways.
"""

import json
import pathlib
import resource
import shutil

import jax
import numpy as np
import optax
import pytest
from run_sizes import SMALL, small

import spear_jax as sj
from spear_jax.algorithms import ALGORITHMS
from spear_jax.experiment import builder, command_line, run_folder
from spear_jax.experiment.config import parse
from spear_jax.experiment.run import is_due
from spear_jax.experiment.run_folder import read_run_config
from spear_jax.federated import round as rounds
from spear_jax.federated.aggregation.robust import CoordinateMedian
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.models.io.peft import load_adapter
from spear_jax.tasks.facts import Facts

FOLDER_0_10 = pathlib.Path(__file__).parents[1] / "fixtures" / "run_0_10"


def open_run(config, folder, **parts):
    return sj.Run(config, folder, quiet=True, devices=jax.devices()[:1], **parts)


class Recorder(sj.Callback):
    """Writes down what it is told, and stops the run after a round."""

    def __init__(self, last=99):
        self.events, self.last = [], last

    def on_train_begin(self, run):
        self.events.append("begin")

    def on_evaluate(self, run, accuracy, round_number):
        self.events.append(("evaluate", round_number, accuracy.count))

    def on_round_end(self, run, round):
        self.events.append(("round", round.number))
        if round.number == self.last:
            run.stop()

    def on_train_end(self, run, summary):
        self.events.append(("end", summary["rounds"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that stopped after two rounds and went on, and what its callbacks were told."""
    folder, first, second = tmp_path_factory.mktemp("run"), Recorder(last=2), Recorder()
    begun = [round.number for round in open_run(small(rounds=3), folder, callbacks=[first])]
    run = open_run(small(rounds=3), folder, callbacks=[second])
    rounds = list(run)
    return folder, begun, rounds, run, first.events, second.events


def test_a_run_gives_its_rounds_and_goes_on_where_it_stopped(trained):
    folder, begun, rounds, run, *_ = trained
    assert begun == [1, 2] and [round.number for round in rounds] == [3]
    assert run.finished_rounds == 3 and list(run) == []
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert rounds[0].metrics == lines[3] and rounds[0].accuracy == lines[3]["eval/accuracy"]
    assert len(rounds[0].traces) == 16 and {x.role for x in rounds[0].traces} <= {
        "win", "lose", "unused",
    }  # fmt: skip


def test_callbacks_hear_of_every_round_and_evaluation(trained):
    *_, first, second = trained
    assert first == [
        "begin", ("evaluate", 0, 40), ("evaluate", 1, 40), ("round", 1), ("evaluate", 2, 40),
        ("round", 2), ("end", 2),
    ]  # fmt: skip
    assert second == ["begin", ("evaluate", 3, 40), ("round", 3), ("end", 3)]


def test_a_run_that_was_stopped_ends_with_the_same_bits_as_one_that_was_not(trained, tmp_path):
    *_, run, _, _ = trained
    whole = open_run(small(rounds=3), tmp_path / "whole")
    assert whole.train()["rounds"] == 3
    jax.tree.map(np.testing.assert_array_equal, whole.state.lora, run.state.lora)


def test_evaluate_measures_the_newest_and_saved_rounds(trained):
    folder, _, rounds, run, *_ = trained
    assert run.evaluate().accuracy == rounds[0].accuracy
    again = sj.load_run(folder, quiet=True, devices=jax.devices()[:1])
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert again.evaluate(2).accuracy == lines[2]["eval/accuracy"]
    low, high = again.evaluate(2).interval
    assert low < again.evaluate(2).accuracy < high
    with pytest.raises(sj.UserError, match="no checkpoint of round 7"):
        again.evaluate(7)


def test_export_writes_the_adapter_as_peft_reads_it(trained, tmp_path):
    *_, run, _, _ = trained
    folder = run.export(tmp_path / "adapter")
    tree, settings = load_adapter(str(folder), run.experiment.model.config)
    assert settings.rank == 2
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(same, tree, jax.tree.map(np.asarray, run.state.lora))
    with pytest.raises(sj.UserError, match="not an empty folder"):
        run.export(tmp_path / "adapter")


def test_a_loop_that_is_left_early_leaves_its_round_on_disk(tmp_path):
    run = open_run(small(rounds=2), tmp_path)
    for _ in run:
        break
    assert sj.load_run(tmp_path, quiet=True, devices=jax.devices()[:1]).finished_rounds == 1
    assert [round.number for round in run] == [2]


def test_a_run_that_is_made_again_goes_on_and_the_one_that_it_left_says_so(tmp_path):
    """As a notebook's cell, run again while the loop of the first time hangs in a traceback."""
    left = iter(open_run(small(rounds=3), tmp_path))
    assert next(left).number == 1
    again = open_run(small(rounds=3), tmp_path, callbacks=[Impatient(2)])
    with pytest.raises(KeyboardInterrupt):
        list(again)
    assert again.finished_rounds == 2  # trained, but not evaluated: not finished
    assert [round.number for round in again] == [2, 3]
    with pytest.raises(sj.UserError, match="another Run of this process has gone on"):
        next(left)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]


def test_a_run_that_another_process_trains_can_be_read_and_not_trained(trained, monkeypatch):
    folder, _, rounds, *_ = trained
    monkeypatch.setattr(run_folder, "_lock", lambda *_: False)
    monkeypatch.setattr(run_folder, "GRACE", 0.0)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    run = sj.load_run(folder, quiet=True, devices=jax.devices()[:1])
    assert run.finished_rounds == 3 and run.evaluate().accuracy == rounds[0].accuracy
    with pytest.raises(sj.UserError, match="in use by process"):
        next(iter(run))
    assert before == {file: file.stat().st_mtime_ns for file in before}


class Impatient(sj.Callback):
    """Ctrl-C in the evaluation of a round, once."""

    def __init__(self, number):
        self.number = number

    def on_evaluate(self, run, accuracy, round_number):
        if round_number == self.number:
            self.number = None
            raise KeyboardInterrupt


class Fills(sj.Callback):
    """After a round, once, the disk takes no file of more than 600 bytes."""

    def __init__(self, number):
        self.number, self.limits = number, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_round_end(self, run, round):
        if round.number == self.number:
            self.number = None
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, self.limits[1]))

    def empty(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def test_a_full_disk_ends_a_run_in_one_message_and_with_space_it_has_the_same_bits(
    trained, tmp_path
):
    *_, whole, _, _ = trained
    disk = Fills(1)
    run = open_run(small(rounds=3), tmp_path, callbacks=[disk])
    try:
        with pytest.raises(sj.UserError) as caught:
            run.train()
    finally:
        disk.empty()
    told = str(caught.value)
    assert str(tmp_path) in told and "cannot be written (File too large)" in told
    assert "Rounds up to " in told and "the same command" in told and "\n" not in told
    assert run.train()["rounds"] == 3
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, whole.state.lora, run.state.lora)


def test_load_run_wants_a_run_folder(tmp_path):
    with pytest.raises(sj.UserError, match="no run folder"):
        sj.load_run(tmp_path / "nothing")


# Own parts


def plain(**changes):
    """A round of plain averaging of one step each: later ones of AdamW enlarge the last bits."""
    fields = {"rounds": 1, "train.steps": 1}
    server = {"federation.aggregation": "fedavg", "federation.server_rate": 1.0}
    return small(**fields | server | changes)


def moved(run):
    """What the run's rounds added to the first adapter."""
    start = run.experiment.initial_state().lora
    return jax.tree.map(lambda x, old: np.asarray(x) - np.asarray(old), run.state.lora, start)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A finished round of plain averaging."""
    run = open_run(plain(), tmp_path_factory.mktemp("averaged"))
    run.train()
    return run


def test_a_reducer_of_ones_own_is_passed_as_an_object(tmp_path):
    class Quarter(sj.Reducer):
        """A quarter of the median's way, in numpy."""

        collects = True

        def finish(self, state, start):
            adapters, weight = state
            there = np.asarray(weight) > 0
            median = lambda x, old: (np.median(x[there], axis=0) - np.asarray(old)) / 4
            return jax.tree.map(median, adapters, start), there.sum()

    config = plain(**{"federation.clients_per_round": 3})
    whole = open_run(config, tmp_path / "whole", reducer=CoordinateMedian())
    quarter = open_run(config, tmp_path / "quarter", reducer=Quarter())
    for run in (whole, quarter):
        run.train()
    near = lambda a, b: np.testing.assert_allclose(a / 4, b, rtol=1e-4, atol=1e-8)
    jax.tree.map(near, moved(whole), moved(quarter))
    assert read_run_config(tmp_path / "quarter").federation.reducer == "Quarter"
    with pytest.raises(sj.UserError, match="unknown reducer.*'Quarter'"):
        sj.load_run(tmp_path / "quarter")


def test_a_server_optimizer_of_optax_sees_the_pseudo_gradient(averaged, tmp_path):
    """SGD of rate 1 on the negative update is plain averaging."""
    sgd = open_run(plain(), tmp_path, server_optimizer=optax.sgd(1.0))
    sgd.train()
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    jax.tree.map(same, averaged.state.lora, sgd.state.lora)


def test_a_client_transform_changes_updates_before_they_are_reduced(averaged, tmp_path):
    half = lambda update: jax.tree.map(lambda x: x / 2, update)
    halved = open_run(plain(), tmp_path, transforms=[half])
    halved.train()
    near = lambda a, b: np.testing.assert_allclose(a / 2, b, rtol=1e-4, atol=1e-7)
    jax.tree.map(near, moved(averaged), moved(halved))


def test_a_run_records_each_start(trained):
    """Command, versions, devices, and what they chose; the run of the fixture was started twice."""
    folder = trained[0]
    entries = [json.loads(line) for line in (folder / "environment.jsonl").read_text().splitlines()]
    assert len(entries) == 2
    assert entries[0]["versions"]["jax"] == jax.__version__
    assert entries[0]["devices"] == {"cpu: cpu": 8} and entries[0]["command"]
    assert entries[0]["chosen"] == {"train.remat": "attention", "federation.clients_at_once": 1}


def test_a_run_stops_at_its_last_finite_round(tmp_path):
    """A learning rate at which float32 ends: each client is left out, and nothing is averaged."""
    config = plain(**{"train.learning_rate": 3e38, "train.learning_rate_min": 3e38})
    run = open_run(config, tmp_path)
    with pytest.raises(sj.UserError, match="round 1: the updates of all .* are NaN or infinite"):
        run.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0]
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["0"]


def test_the_servers_step_ends_a_run_where_it_overflows(tmp_path):
    config = plain(**{"federation.server_rate": 3e38})
    with pytest.raises(sj.UserError, match="round 1: the new global adapter is NaN or infinite"):
        open_run(config, tmp_path).train()


def test_a_run_says_once_that_a_secure_sum_cuts_numbers(tmp_path, capsys):
    config = plain(**{"rounds": 2, "federation.secure_sum": True, "aggregation.secure_bound": 1e-5})
    config.aggregation.secure_bits = 24
    open_run(config, tmp_path).train()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["secure/clipped"] <= 1 for line in lines[1:])
    said = [
        x for x in capsys.readouterr().err.splitlines() if "aggregation.secure_bound=1e-05" in x
    ]
    assert len(said) == 1 and "raise it" in said[0]


class Terse(sj.Feedback):
    """Says the same of every answer."""

    def __call__(self, requests):
        return ["Try again."] * len(requests)


def test_feedback_and_task_are_passed_as_objects(tmp_path):
    task = Facts()
    run = open_run(plain(), tmp_path, task=task, feedback=Terse(task))
    (round,) = list(run)
    said = {attempt.feedback for record in round.traces for attempt in record.trace.attempts[1:]}
    assert said == {"Try again."}
    assert read_run_config(tmp_path).rollout.feedback == "Terse"


def test_a_method_of_ones_own_gets_a_config_group(tmp_path):
    spear = ALGORITHMS["spear"]

    class Mine(spear):
        name = "mine"

    try:
        config = sj.preset(Mine, task="facts", model="tiny")
        config.update_from_flattened_dict(SMALL | {"rounds": 1, "mine.lose_weight": 0.0})
        (round,) = list(open_run(config, tmp_path))
        assert round.metrics["rollout/first_accuracy"] >= 0
        assert open_run(config, tmp_path).settings.method.lose_weight == 0.0
    finally:
        del ALGORITHMS["mine"]

    class Thief(spear):
        name = "dpo"

    with pytest.raises(sj.UserError, match="the name of one of ours"):
        sj.preset(Thief)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "speer"}, "Did you mean 'spear'"),
        ({"task": "factz"}, "Did you mean 'facts'"),
        ({"task": "mcqa", "variants": ["small"]}, "unknown variant 'small'.*Known: cpu, reference"),
        ({"task": "qa", "model": "qwen2.5-1.5"}, "unknown model.*Did you mean 'qwen2.5-1.5b'"),
        ({"task": "facts", "model": "qwen2.5-1.5b"}, "only the embedded model lacks"),
    ],
)
def test_a_preset_that_cannot_be_is_a_user_error(arguments, words):
    with pytest.raises(sj.UserError, match=words):
        sj.preset(**arguments)


@pytest.mark.parametrize("task", ["qa", "mcqa", "pairs", "preferences"])
@pytest.mark.parametrize("variant", ["", ",cpu"])
def test_own_data_has_a_preset_that_is_the_same_from_the_command_line(task, variant):
    config = sj.preset("spin", task=task, model="models/mine", variants=variant.split(",")[1:])
    assert config == command_line.load_config(f"spin:{task},models/mine{variant}")
    parse(config)
    assert (config.task, config.model, config.federation.num_clients) == (task, "models/mine", 4)
    assert config.dtype == ("float32" if variant else "bfloat16")
    # what the method recommends
    assert config.rollout.temperature == 1.0 and config.algorithm.name == "spin"


# Run folders of 0.10


def test_a_run_folder_of_0_10_goes_on(tmp_path):
    """Its field names, its checkpoint and its shapes: round 3 is as 0.10 would have had it."""
    folder = tmp_path / "run"
    shutil.copytree(FOLDER_0_10, folder)
    wanted = json.loads((folder / "round_3.json").read_text())
    assert "rate" in json.loads((folder / "config.json").read_text())["train"]
    run = sj.load_run(folder, quiet=True, devices=jax.devices()[:1])
    assert run.finished_rounds == 2 and run.settings.train.learning_rate == 0.01
    assert run.settings.train.max_grad_norm == 0.5
    (round,) = list(run)
    assert round.number == 3
    for name in ("train/loss", "train/grad_norm", "round/update_norm", "round/rate"):
        assert round.metrics[name] == pytest.approx(wanted[name], rel=2e-3), name
    for name in ("rollout/tokens", "rollout/wins", "budget/tokens", "round/bytes_up"):
        assert round.metrics[name] == wanted[name], name


def test_the_first_rounds_and_every_so_many_are_evaluated():
    def due(first, every):
        settings = parse(small(**{"eval.first_rounds": first, "eval.every": every}))
        return [number for number in range(1, 10) if is_due(settings, number)]

    assert due(0, 4) == due(1, 4) == [1, 4, 8]
    assert due(3, 4) == [1, 2, 3, 4, 8]
    assert due(0, 100) == [1]


# One round, laid out in different ways


def first_round(devices, prefix_once=True):
    """The adapter, completions, metrics and shared prefix of a round whose prompts all begin
    alike.
    """
    config = plain(**{"federation.clients_per_round": 3, "train.steps": 2})
    config.data.templates.question = (
        "The traders of the market sell one thing each. A friend asks you what. {question}"
    )
    built = builder.build(config, devices)
    worker = built.federation.worker
    prefix = worker.sampler.shared_prefixes[-1]
    asked = [worker.renderer.prompt(worker.task, example) for example in worker.examples]
    assert len(prefix) >= 16 and all(prompt[: len(prefix)] == prefix for prompt in asked)
    if not prefix_once:
        worker.sampler.shared_prefixes = prefix = []
    state, metrics, traces = rounds.run_round(built.federation, built.initial_state(), BudgetUsed())
    assert metrics["rollout/wins"] > 0 and metrics["rollout/loses"] > 0
    shapes = worker.sampler.shapes.save()["rooms"].values()
    assert shapes and all(shape["shared_prefix"] == tuple(prefix) for shape in shapes)
    said = [[attempt.completion for attempt in record.trace.attempts] for record in traces]
    return jax.tree.map(np.asarray, state.lora), said, metrics


@pytest.fixture(scope="module")
def on_one_device():
    return first_round(jax.devices()[:1])


def distance(one, other):
    """||one - other|| / ||one|| over all numbers of two adapters."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (one, other)]
    return np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0])


def test_a_round_that_reads_what_prompts_open_with_once_equals_one_that_does_not(on_one_device):
    adapter, said, _ = on_one_device
    other, plainly, _ = first_round(jax.devices()[:1], prefix_once=False)
    assert said == plainly and distance(adapter, other) <= 1e-5


def test_a_round_on_eight_devices_equals_the_round_on_one(on_one_device):
    one, said, metrics = on_one_device
    eight, said_eight, metrics_eight = first_round(jax.devices())
    assert said == said_eight and metrics["rollout/wins"] == metrics_eight["rollout/wins"]
    # The adapter agrees to 1e-5. Its B half starts at zero and is all AdamW's first steps, which
    # divide each gradient by its own size and so make the last bits of near-zero gradients visible:
    # there the bound is 1e-3.
    assert distance(one, eight) <= 1e-5
    for target, pair in one.by_name().items():
        a, b = eight.by_name()[target].b, pair.b
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)
