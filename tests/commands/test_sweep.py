"""Sweeps: grids to cells, tables and figures from hand-made cells, job arrays, and a sweep that is
trained.
"""

import importlib.util
import json
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import jax
import pandas as pd
import pytest
from grid_cells import POINTS, SMALL, finished, write_cell
from processes import environment

from spear_jax import sweep as sweep_command
from spear_jax.analysis import comparison, runs, sweeps
from spear_jax.core.errors import UserError
from spear_jax.experiment import command_line, processes, run_folder, sweep
from spear_jax.experiment import grid as grid_module

ROOT = pathlib.Path(__file__).parents[2]


def script(name):
    """A launch script as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


clients_sweep = script("sweep_clients")
train = grid_module.train_cell


def arguments(folder, *more, grid=("lora.rank=4,16", "train.steps=2,3"), seeds="0,1"):
    given = [
        "--config=spear:facts,tiny,small",
        f"--seeds={seeds}",
        f"--workdir={folder}",
    ]
    return [*given, *(f"--grid={text}" for text in grid), *more]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def fake(monkeypatch):
    """Cells that are written by hand, in this process, instead of being trained. Returns the labels
    of those that were.
    """
    made = []

    def train_cell(cell, config):
        made.append(f"{cell.parent.name}/{cell.name}")
        run_folder.open_workdir(str(cell), config, "auto")
        if config.train.steps == 13:
            raise ValueError("thirteen")
        last = 0.4 + 0.01 * config.lora.rank + 0.1 * config.seed
        write_cell(
            cell.parent.parent,
            cell.parent.name,
            config.seed,
            [0.2, last],
            tokens=10.0 * config.train.steps,
        )

    def run(work, tasks, jobs):
        for name, items in tasks:
            yield from ((name, key, error) for key, error in work(name, items))

    monkeypatch.setattr(grid_module, "train_cell", train_cell)
    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(
        processes,
        "ask_all",
        lambda work, shares: [{label: "" for label, _ in share} for share in shares],
    )
    return made


def test_a_grid_is_split_at_commas_outside_brackets():
    found = sweep.read_grid(
        ["lora.rank=4,16", "lora.targets=('q','v'),('q',)", "train.learning_rate=1e-3"]
    )
    assert found == {
        "lora.rank": ["4", "16"],
        "lora.targets": ["('q','v')", "('q',)"],
        "train.learning_rate": ["1e-3"],
    }
    points = sweep.product({"a": ["1", "2"], "b": ["x", "y"]})
    assert [(point["a"], point["b"]) for point in points] == [
        ("1", "x"),
        ("1", "y"),
        ("2", "x"),
        ("2", "y"),
    ]


def test_a_setting_has_its_fields_in_label_config_and_command():
    points = [{"lora.targets": "('q','v')", "train.learning_rate": "1e-2"}]
    (made,) = sweep.make_settings("spear:facts,tiny", points, ["--config.rounds=3"], [0, 5])
    assert made.label == "lora.targets=_q_v_,train.learning_rate=0.01" and list(made.configs) == [
        0,
        5,
    ]
    config = made.configs[5]
    assert (tuple(config.lora.targets), config.train.learning_rate, config.rounds, config.seed) == (
        ("q", "v"),
        0.01,
        3,
        5,
    )
    # the command makes the same config
    command = made.command(pathlib.Path("runs/x"), 5)
    assert command[-1] == f"--workdir=runs/x/{made.label}/seed5"
    assert command_line.read_config(command[:-1]).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"grid": ()}, "no dimension"),
        ({"grid": ["lora.rank"]}, "FIELD=VALUE"),
        ({"grid": ["lora.rank=4,,8"]}, "FIELD=VALUE"),
        ({"grid": ["lora.rank=4", "lora.rank=8"]}, "given twice"),
        ({"grid": ["seed=4"]}, "seeds with --seeds"),
        ({"grid": ["lora.rank=4,4"]}, "lora.rank=4 twice"),
        ({"grid": ["train.learning_rate=1e-2,0.01"]}, "train.learning_rate=0.01 twice"),
        ({"grid": ["lora.rnak=4"]}, "Did you mean 'lora.rank'"),
        ({"grid": ["lora.rank=four"]}, "four"),
        ({"grid": ["train.steps=3,0"]}, "train.steps=0: train.steps is 0; it must be at least 1"),
        (
            {"grid": ["federation.num_clients=8,2"]},
            "federation.num_clients=2: federation.clients_per_round is 4",
        ),
        ({"seeds": "0,x"}, "--seeds"),
        ({"more": "--config.lora.rank=3"}, "--config.lora.rank is what the sweep itself sets"),
        ({"more": "--config.seed=3"}, "--config.seed is what the sweep itself sets"),
        (
            {"more": "--config=configs/speer.py"},
            "no config file 'configs/speer.py'. Did you mean 'spear'",
        ),
        ({"more": "--x=train.learning_rate"}, "unknown field of --x"),
        ({"more": "--jobs=0"}, "--jobs is 0"),
        ({"more": "--jbos=2"}, "unknown argument"),
    ],
)
def test_a_bad_sweep_is_a_user_error_before_anything_is_written(
    tmp_path, monkeypatch, change, words
):
    monkeypatch.setattr(processes, "ask_all", None)  # nothing is built either
    more = [change.pop("more")] if "more" in change else []
    with pytest.raises(UserError, match=words):
        sweep_command.main(arguments(tmp_path / "sweep", *more, **change))
    assert not (tmp_path / "sweep").exists()


def test_finished_cells_are_not_repeated_and_values_and_seeds_can_be_added(fake, tmp_path, capsys):
    found = sweep_command.main(arguments(tmp_path))
    assert len(fake) == 8 and (found["cells"], found["waiting"], found["failed"]) == (8, 8, [])
    assert (
        "lora.rank=16,train.steps=3 seed 1: 0.660 after 1 rounds, 30 tokens, 2 s (8 of 8)"
        in capsys.readouterr().err
    )
    assert set(found["files"]) <= {file.name for file in tmp_path.iterdir()}
    assert found["table"] == json.loads(json.dumps(found["table"]))
    fake.clear()
    more = arguments(tmp_path, "--quiet", grid=("lora.rank=4,16,8", "train.steps=2,3"), seeds="0,2")
    found = sweep_command.main(more)
    assert (
        len(fake) == 8
        and sum("rank=8" in name for name in fake) == 4
        and capsys.readouterr() == ("", "")
    )
    assert runs.read_request(tmp_path, "sweep")["seeds"] == [0, 1, 2]
    (row,) = [row for row in found["table"] if row["lora.rank"] == 4 and row["train.steps"] == 3]
    assert row["seeds"] == 3 and row["accuracy"] == pytest.approx((0.44 + 0.54 + 0.64) / 3)


def test_another_sweep_in_the_same_folder_is_a_user_error(fake, tmp_path):
    sweep_command.main(arguments(tmp_path, "--quiet"))
    (tmp_path / "other").mkdir()
    comparison.write_request(tmp_path / "other", {"labels": {}})
    for args, words in (
        (arguments(tmp_path, grid=["lora.rank=4,16"]), "sweep with fields"),
        (arguments(tmp_path, grid=("lora.rank=4", "train.steps=2,3")), "now without 16"),
        (arguments(tmp_path, "--config=sft:facts,tiny,small"), "sweep with config"),
        (arguments(tmp_path, "--config.rounds=3"), "sweep with overrides"),
        (arguments(tmp_path / "lora.rank=4,train.steps=2" / "seed0"), "run folder of a `train`"),
        (arguments(tmp_path / "other"), "holds a comparison"),
    ):
        with pytest.raises(UserError, match=words):
            sweep_command.main(args)


def test_a_failing_cell_is_named_and_the_others_go_on(fake, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.run(
            sweep_command.main, arguments(tmp_path, "--quiet", grid=["train.steps=13,2"], seeds="0")
        )
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert ended.value.code == 1 and result["failed"] == ["train.steps=13/seed0"]
    assert [row["train.steps"] for row in result["table"]] == [2]
    assert told.err.startswith("train.steps=13 seed 0 failed: ValueError: thirteen (")


@pytest.mark.parametrize("flag", ["--print", "--dry-run"])
def test_a_dry_run_prints_what_is_left_to_do_and_writes_nothing(fake, tmp_path, capsys, flag):
    found = sweep_command.main(arguments(tmp_path / "new", flag))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert (
        (found["cells"], found["waiting"], len(lines)) == (8, 8, 8)
        and not (tmp_path / "new").exists()
        and not fake
    )
    assert lines[0][:3] == ["python", "-m", "spear_jax.train"]
    assert lines[0][-1] == f"--workdir={tmp_path}/new/lora.rank=4,train.steps=2/seed0"
    sweep_command.main(arguments(tmp_path / "new", "--quiet", seeds="0"))
    capsys.readouterr()
    assert sweep_command.main(arguments(tmp_path / "new", flag))["waiting"] == 4
    assert all("--config.seed=1" in line for line in capsys.readouterr().out.splitlines())


def test_the_launch_script_is_the_command():
    assert script("sweep").main is sweep_command.main


def test_a_job_array_has_a_cell_an_index_and_needs_no_other_file(fake, tmp_path, capsys):
    sweep_command.main(arguments(tmp_path / "runs", "--quiet", seeds="0"))
    fake.clear()
    found = sweep_command.main(
        arguments(tmp_path / "runs", f"--slurm={tmp_path / 'array.sbatch'}", "--jobs=3")
    )
    assert found["waiting"] == 4 and not fake
    assert "#SBATCH --array=0-3%3\n" in (tmp_path / "array.sbatch").read_text()
    capsys.readouterr()
    sweep_command.main(arguments(tmp_path / "runs", "--print"))
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    # stands for SLURM's: says what it was asked to run, and where programs are kept
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$JAX_COMPILATION_CACHE_DIR" "${@:2}"\n')
    srun.chmod(0o755)
    slurm = environment() | {"SLURM_JOB_ID": "7"}
    slurm["PATH"] = f"{tmp_path}:{slurm['PATH']}"
    del slurm["JAX_COMPILATION_CACHE_DIR"]
    for index in (0, 3):
        job = subprocess.run(
            ["bash", str(tmp_path / "array.sbatch")],
            env=slurm | {"SLURM_ARRAY_TASK_ID": str(index)}, capture_output=True, text=True,
        )  # fmt: skip
        cache, *command = job.stdout.splitlines()
        assert command == [sys.executable, *commands[index][1:]], job.stderr
        assert cache == str(tmp_path / "runs" / "compiled")
    job = subprocess.run(
        ["bash", str(tmp_path / "array.sbatch")],
        env=slurm | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_NTASKS": "2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert job.stdout.splitlines()[-1] == "--distributed=auto"
    job = subprocess.run(
        ["bash", str(tmp_path / "array.sbatch")], env=slurm | {"SLURM_ARRAY_TASK_ID": "4"}
    )
    assert job.returncode == 2


def test_a_job_array_whose_time_is_nearly_over_goes_back_to_the_queue(fake, tmp_path):
    file = tmp_path / "array.sbatch"
    sweep_command.main(arguments(tmp_path / "runs", f"--slurm={file}"))
    # stand for SLURM's: a step that lasts, and one that ends when its job is requeued
    for name, text in (
        ("srun", f"echo $$ >{tmp_path}/step; exec sleep 60"),
        ("scontrol", f'echo "$@" >{tmp_path}/asked; kill "$(cat {tmp_path}/step)"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = environment() | {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    slurm["PATH"] = f"{tmp_path}:{slurm['PATH']}"
    job = subprocess.Popen(["bash", str(file)], env=slurm, stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while not (tmp_path / "step").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    _, told = job.communicate(timeout=60)
    assert (tmp_path / "asked").read_text() == "requeue 7\n" and b"requeueing job 7" in told
    assert job.returncode == 128 + signal.SIGTERM


@pytest.fixture
def made(tmp_path):
    """A sweep of two fields, one of them a list, with a setting of three seeds, one of one, and an
    unfinished cell.
    """
    fields = ["federation.num_clients", "lora.targets"]
    comparison.write_request(tmp_path, {"fields": fields}, "sweep")
    for clients, targets, seeds in (
        (50, ["q"], (0, 1, 2)),
        (5, ["q"], (0,)),
        (5, ["q", "v"], (0,)),
        (7, ["q"], (0,)),
    ):
        for seed in seeds:
            label = f"{clients}-{len(targets)}"
            write_cell(
                tmp_path,
                label,
                seed,
                [0.2, 0.5 + 0.1 * seed],
                tokens=100.0 * clients,
                finished=clients != 7,
            )
            config = {
                "federation": {"num_clients": clients},
                "lora": {"targets": targets},
                "seed": seed,
            }
            (tmp_path / label / f"seed{seed}" / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_load_sweep_has_a_row_a_finished_cell_with_fields_seed_and_results(made):
    found = runs.load_sweep(made)
    assert list(zip(found["federation.num_clients"], found["lora.targets"], found["seed"], strict=True)) == [
        (5, "q", 0), (5, "q,v", 0), (50, "q", 0), (50, "q", 1), (50, "q", 2),
    ]  # fmt: skip
    last = found.iloc[-1]
    assert (last["accuracy"], last["stderr"], last["count"], last["before"]) == (0.7, 0.05, 40, 0.2)
    assert (last["rounds"], last["tokens"], last["bytes"], last["seconds"]) == (1, 5000, 30, 2)


def test_load_sweep_of_another_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no sweep.json"):
        runs.load_sweep(tmp_path)
    comparison.write_request(tmp_path, {"fields": ["lora.rank"]}, "sweep")
    write_cell(tmp_path, "lora.rank=4", 0, [0.2], finished=False)
    with pytest.raises(UserError, match="no cell of .* has finished"):
        runs.load_sweep(tmp_path)


def test_the_table_has_hand_computed_means_and_intervals(made):
    fields = ["federation.num_clients", "lora.targets"]
    table = sweeps.mean_table(runs.load_sweep(made), fields)
    assert list(table.columns) == [*fields, *sweeps.COLUMNS] and list(table["seeds"]) == [1, 1, 3]
    three, one = table.iloc[2], table.iloc[0]
    # 0.5, 0.6, 0.7: mean 0.6, s = 0.1, half width t(2) * 0.1 / sqrt(3)
    half = POINTS[2] * 0.1 / math.sqrt(3)
    assert (three["accuracy"], three["low"], three["high"]) == pytest.approx(
        (0.6, 0.6 - half, 0.6 + half), abs=1e-5
    )
    # one seed, 20 right of 40: Wilson's interval is 0.5 +- z / (2 sqrt(n + z^2))
    z = 1.959964
    half = z / (2 * math.sqrt(40 + z * z))
    assert (one["low"], one["high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    shown = sweeps.show_table(table, fields)
    assert list(shown["lora.targets"]) == ["q", "q,v", "q"] and list(shown["seeds"]) == [
        "1",
        "1",
        "3",
    ]


def test_lines_are_named_by_what_differs_between_them(made):
    table = sweeps.mean_table(runs.load_sweep(made), ["federation.num_clients", "lora.targets"])
    lines = sweeps.split_lines(table, ["lora.targets"])
    assert [(line.label, list(line.rows["federation.num_clients"])) for line in lines] == [
        ("targets q", [5, 50]), ("targets q,v", [5]),
    ]  # fmt: skip
    (line,) = sweeps.split_lines(table[table["lora.targets"] == "q"], ["lora.targets"])
    assert line.label == "" and len(line.rows) == 2


@pytest.mark.parametrize(
    "x, ticks", [("federation.num_clients", ("5", "50")), ("lora.targets", ("q", "q,v"))]
)
def test_the_figure_has_four_panels_with_units_a_line_a_setting_and_a_tick_a_value(made, x, ticks):
    table = sweeps.mean_table(runs.load_sweep(made), ["federation.num_clients", "lora.targets"])
    other = {"federation.num_clients": "lora.targets", "lora.targets": "federation.num_clients"}[x]
    lines = sweeps.split_lines(table, [other])
    sweeps.plot_sweep(lines, x, "intervals over seeds", made / "figure.png")
    assert (made / "figure.png").stat().st_size > 0
    text = (made / "figure.svg").read_text()
    for words in (
        x,
        *ticks,
        *(unit for unit, _ in sweeps.PANELS.values()),
        *(line.label for line in lines),
    ):
        assert f"<!-- {words} -->" in text, words


@pytest.mark.parametrize(
    "text, clients, size",
    [
        ("10", 5, 5),
        ("10", 100, 10),
        ("10%", 5, 1),
        ("10%", 100, 10),
        ("0.5%", 1000, 5),
        ("100%", 7, 7),
    ],
)
def test_a_cohort_is_a_number_or_a_share(text, clients, size):
    assert clients_sweep.cohort_size(text, clients) == size


@pytest.mark.parametrize(
    "more, words",
    [
        ("--clients=10,0", "--clients has '0'"),
        ("--cohort=0", "--cohort has '0'"),
        ("--cohort=1.5", "--cohort has '1.5'"),
        ("--cohort=101%", "--cohort has '101%'"),
        ("--cohort=all", "--cohort has 'all'"),
        ("--alpha=0", "dirichlet_alpha is 0.0; it must be positive"),
        ("--rank=x", "lora.rank"),
        ("--method=spaer", "Did you mean 'spear'"),
        ("--method=sft,spear,sft", "algorithm.name=sft.* twice"),
        ("--alpha=1,1.0", "dirichlet_alpha=1.0.* twice"),
        ("--task=fact,tiny", "Did you mean 'facts'"),
        ("--config.lora.rank=3", "sweep itself sets"),
    ],
)
def test_a_bad_clients_sweep_is_a_user_error_before_anything_is_written(
    tmp_path, monkeypatch, more, words
):
    monkeypatch.setattr(processes, "ask_all", None)
    with pytest.raises(UserError, match=words):
        clients_sweep.main([f"--workdir={tmp_path / 'sweep'}", more])
    assert not (tmp_path / "sweep").exists()


def test_the_default_clients_sweep_is_one_comparable_grid(tmp_path, capsys):
    found = clients_sweep.main([f"--workdir={tmp_path / 'sweep'}", "--print"])
    commands = [shlex.split(line)[3:-1] for line in capsys.readouterr().out.splitlines()]
    made = [command_line.read_config(command) for command in commands]
    # 8 counts x 2 cohorts x 2 methods, and at 100 clients 10 are 10 %
    assert found["cells"] == len(made) == 30
    assert {c.federation.num_clients for c in made} == {5, 10, 50, 100, 500, 1000, 5000, 10000}
    assert made[0].federation.num_clients == 10000  # the longest do not come last
    for name in ("seed", "rounds", "task", "model"):
        assert len({config[name] for config in made}) == 1
    for group, name in (
        ("federation", "partition"),
        ("federation", "max_examples_per_client"),
        ("train", "steps"),
    ):
        assert len({config[group][name] for config in made}) == 1


def test_a_line_of_the_clients_figure_follows_one_cohort_rule(tmp_path, fake, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweeps, "plot_sweep", lambda lines, x, *rest: drawn.append((lines, x)))
    clients_sweep.main(
        [
            f"--workdir={tmp_path}",
            "--clients=20,100,200",
            "--method=spear,sft",
            "--alpha=1,0.1",
            "--quiet",
        ]
    )
    ((lines, x),) = drawn
    assert x == "federation.num_clients" and len(lines) == 8  # 2 methods x 2 alphas x 2 rules
    for line in lines:
        sizes = dict(zip(line.rows[x], line.rows["federation.clients_per_round"], strict=True))
        assert sizes == (
            {20: 2, 100: 10, 200: 20}
            if line.label.endswith("cohort 10%")
            else {20: 10, 100: 10, 200: 10}
        )
    assert lines[0].label == "method sft, dirichlet_alpha 0.1, cohort 10"


def test_a_trained_clients_sweep_takes_more_counts_later(fake, tmp_path, monkeypatch):
    """The cells are trained, in this process; a grid that is killed: test_compare.py."""
    trained = []

    def train_cell(cell, config):
        trained.append(config.federation.num_clients)
        train(cell, config)

    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.setattr(grid_module, "train_cell", train_cell)
    sizes = [
        f"--config.{name}={value}"
        for name, value in SMALL.items()
        if not name.startswith(("federation", "lora"))
    ]
    given = ["--cohort=2", "--rank=2", "--method=sft", "--config.rounds=2", *sizes]
    given = [f"--workdir={tmp_path}", "--quiet", *given]
    clients_sweep.main(["--clients=4", *given])
    before = finished(tmp_path)
    result = clients_sweep.main(["--clients=4,6", *given])
    assert trained == [4, 6] and result["failed"] == [] and result["waiting"] == 1
    after = finished(tmp_path)
    assert len(after) == 2 and all(after[cell] == told for cell, told in before.items())
    found = runs.load_sweep(tmp_path)
    assert list(found["federation.num_clients"]) == [4, 6]
    assert set(found["algorithm.name"]) == {"sft"}
    assert (found["rounds"] == 2).all() and (found["bytes"] > 0).all()
    assert pd.read_csv(tmp_path / "table.csv")["accuracy"].tolist() == found["accuracy"].tolist()
