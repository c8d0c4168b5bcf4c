"""`compare`: its arguments, its table and figure from hand-made cells, and a grid that is killed
and goes on.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from grid_cells import POINTS, SMALL, finished, write_cell
from processes import environment

from spear_jax import compare
from spear_jax.algorithms import ALGORITHMS
from spear_jax.analysis import comparison, runs
from spear_jax.core.errors import UserError
from spear_jax.experiment import command_line, processes, run_folder
from spear_jax.experiment import grid as grid_module
from spear_jax.experiment.config import default_config


def write_request(folder, kind="tokens", amount=200, **golds):
    comparison.write_request(
        folder,
        {
            "budget": {"kind": kind, "amount": amount},
            "labels": {label: {"gold": gold} for label, gold in golds.items()},
        },
    )


@pytest.fixture
def grid(tmp_path):
    write_request(tmp_path, three="", two="pairs", one="responses", never="")
    for seed, last in enumerate((0.6, 0.7, 0.8)):
        write_cell(tmp_path, "three", seed, [0.2, 0.4, last])
    for seed, last in enumerate((0.5, 0.7)):
        write_cell(tmp_path, "two", seed, [0.2, last], tokens=50.0 * (seed + 1))
    write_cell(tmp_path, "two", 2, [0.2, 0.9], finished=False)
    write_cell(tmp_path, "one", 7, [0.2, 0.9], tokens=0.0)
    write_cell(tmp_path, "never", 0, [0.2], finished=False)
    return tmp_path


def test_t_quantiles_are_those_of_printed_tables():
    for freedom, point in POINTS.items():
        assert comparison.t_quantile(freedom) == pytest.approx(point, abs=5e-5)
    # closed forms: tan(0.95 pi / 2) for 1; for 2, P = t / sqrt(2 + t^2), so t^2 = 2 * 0.95^2 / (1 -
    # 0.95^2)
    assert comparison.t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert comparison.t_quantile(2) == pytest.approx(math.sqrt(2 * 0.9025 / 0.0975), rel=1e-12)


@pytest.mark.parametrize("freedom", range(1, 30))
def test_t_quantiles_enclose_95_percent_of_the_density(freedom):
    t = comparison.t_quantile(freedom)
    x = np.linspace(0, t, 200_001)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-7)


def test_the_table_has_hand_computed_means_and_half_widths(grid):
    table = comparison.grid_table(grid)
    # by final accuracy: 0.9, 0.7, 0.6; unfinished cells are out
    assert list(table["method"]) == ["one", "three", "two"]
    assert list(table["seeds"]) == [1, 3, 2] and list(table["gold"]) == ["responses", "", "pairs"]
    one, three, two = (row for _, row in table.iterrows())
    # 0.6, 0.7, 0.8: mean 0.7, s = 0.1, half width t(2) * 0.1 / sqrt(3)
    assert three["accuracy"] == pytest.approx(0.7)
    assert three["half_width"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-5)
    # 0.5, 0.7: mean 0.6, s = sqrt(2 * 0.1^2 / 1) = 0.1 sqrt(2), half width t(1) * s / sqrt(2) =
    # t(1) * 0.1
    assert two["accuracy"] == pytest.approx(0.6) and two["half_width"] == pytest.approx(
        1.27062, abs=1e-5
    )
    assert math.isnan(one["half_width"]) and one["tokens"] == 0
    # two rounds of 100 tokens, 1e9 FLOPs, 2 s and 30 bytes; and one round of 50 or 100 tokens
    assert tuple(three[["tokens", "flops", "seconds", "bytes", "rounds"]]) == (200, 2e9, 4, 60, 2)
    assert (
        two["tokens"] == 75
        and two["bytes"] == 30
        and list(table["before"]) == pytest.approx([0.2] * 3)
    )
    assert comparison.short_of_budget(grid) == ["two/seed0", "two/seed1"]


def test_the_shown_table_has_a_dash_for_one_seed(grid):
    shown = comparison.show_table(comparison.grid_table(grid))
    assert list(shown["± 95 %"]) == ["-", "0.248", "1.271"] and list(shown["gold text"]) == [
        "responses",
        "none",
        "pairs",
    ]
    lines = comparison.to_markdown(shown).splitlines()
    assert (
        len(lines) == 5
        and set(lines[1]) <= set("| -")
        and all(line.count("|") == 12 for line in lines)
    )


def test_paired_differences_are_those_of_common_seeds(grid):
    """two less three: -0.1 and 0.0; mean -0.05, s = 0.1 / sqrt 2, half width t(1) * s / sqrt 2."""
    assert comparison.paired_table(grid).empty  # the best one has a seed of its own
    shutil.rmtree(grid / "one")
    (row,) = comparison.paired_table(grid).to_dict("records")
    assert (row["method"], row["against"], row["seeds"]) == ("two", "three", 2)
    assert row["difference"] == pytest.approx(-0.05)
    assert row["half_width"] == pytest.approx(12.7062 * 0.05, abs=1e-5)
    shown = comparison.show_paired(comparison.paired_table(grid))
    assert list(shown.iloc[0]) == ["two", "three", "2", "-0.050", "0.635"]


def test_load_grid_is_tidy_and_holds_unfinished_cells(grid):
    tidy = comparison.load_grid(grid)
    assert list(tidy.columns) == ["label", "seed", "round", "metric", "value"]
    row = tidy[(tidy["label"] == "two") & (tidy["seed"] == 2) & (tidy["round"] == 1)].set_index(
        "metric"
    )["value"]
    assert row["eval/accuracy"] == 0.9 and row["budget/tokens"] == 100 and "time" not in row
    assert "never" in set(tidy["label"])


def test_a_folder_without_cells_is_a_user_error(tmp_path):
    for read in (comparison.load_grid, comparison.grid_table):
        with pytest.raises(UserError, match="compare"):
            read(tmp_path)


def test_the_mean_curve_interpolates_as_far_as_all_seeds_reach():
    one = (np.array([0.0, 10.0, 20.0]), np.array([0.2, 0.4, 0.6]))
    two = (np.array([0.0, 20.0, 30.0]), np.array([0.2, 0.4, 0.8]))
    x, mean, half = comparison.mean_curve([one, two])
    # at 10 the second is half-way between 0.2 and 0.4; differences of 0, 0.1 and 0.2 have s = d /
    # sqrt(2), half = t(1) d / 2
    assert list(x) == [0, 10, 20] and mean == pytest.approx([0.2, 0.35, 0.5])
    assert half == pytest.approx([0, 12.7062 * 0.05, 12.7062 * 0.1], abs=1e-4)
    x, mean, half = comparison.mean_curve([one])
    assert list(mean) == [0.2, 0.4, 0.6] and np.isnan(half).all()


@pytest.mark.parametrize("kind", ["tokens", "rounds", "seconds"])
def test_the_figure_names_every_method_and_what_generates_nothing(grid, kind):
    write_request(grid, kind=kind, one="", two="", three="")
    comparison.plot_grid(grid, grid / "compare.png")
    assert (grid / "compare.png").stat().st_size > 0
    text = (grid / "compare.svg").read_text()
    assert ("<!-- one (no generation) -->" in text) == (kind == "tokens")
    assert all(
        f"<!-- {name} -->" in text
        for name in ("two", "three", "before training", comparison.AXES[kind][0])
    )


def test_overrides_reach_a_config_with_their_types():
    config = command_line.apply_overrides(
        default_config(),
        [
            "--config.rounds=3",
            "--config.train.learning_rate=1",
            "--config.lora.targets=('q','v')",
            "--config.record_traces=False",
        ],
    )
    assert (
        config.rounds,
        config.train.learning_rate,
        config.lora.targets,
        config.record_traces,
    ) == (
        3,
        1.0,
        ("q", "v"),
        False,
    )


@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.federation.num_client=4", "Did you mean 'federation.num_clients'"),
        ("--config.rounds=many", "rounds"),
        ("--config.rounds", "no value"),
        ("--jbos=2", "unknown argument"),
        ("--config=configs/spear.py", "unknown argument"),
        ("--config.train=3", "unknown config field"),
    ],
)
def test_a_bad_override_is_a_user_error(override, words):
    with pytest.raises(UserError, match=words):
        command_line.apply_overrides(default_config(), [override])


def arguments(folder, *more, methods="spear,sft", seeds="0,1", budget="rounds:2"):
    given = [
        f"--methods={methods}",
        "--task=facts",
        f"--seeds={seeds}",
        f"--budget={budget}",
        f"--workdir={folder}",
    ]
    return [*given, *more]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"methods": "spaer"}, "unknown method 'spaer'. Did you mean 'spear'"),
        ({"methods": "quickstart"}, "unknown method"),
        ({"methods": "spear,spear"}, "taken"),
        ({"seeds": "0,x"}, "--seeds"),
        ({"seeds": "1,01"}, "--seeds"),
        ({"budget": "token:3"}, "Did you mean 'tokens'"),
        ({"budget": "tokens"}, "whole number"),
        ({"budget": "rounds:0"}, "whole number"),
        ({"more": "--variant=short:spear"}, "LABEL:METHOD:key=value"),
        ({"more": "--variant=short:spera:train.steps=2"}, "unknown method"),
        ({"more": "--variant=sft:spear:train.steps=2"}, "taken"),
        ({"more": "--variant=../x:spear:train.steps=2"}, "no folder name"),
        ({"more": "--variant=short:spear:train.step=2"}, "Did you mean 'train.steps'"),
        ({"more": "--config.train.step=2"}, "Did you mean 'train.steps'"),
        ({"more": "--config.seed=3"}, "--config.seed"),
        ({"more": "--config.rounds=3"}, "--config.rounds"),
        ({"more": "--task=fact"}, "fact"),
        ({"more": "--jobs=0"}, "--jobs"),
        ({"more": "--jbos=2"}, "unknown argument"),
    ],
)
def test_a_bad_request_is_a_user_error_before_anything_is_written(
    tmp_path, monkeypatch, change, words
):
    monkeypatch.setattr(processes, "ask_all", None)  # nothing is built either
    more = [change.pop("more")] if "more" in change else []
    with pytest.raises(UserError, match=words):
        compare.main(arguments(tmp_path / "grid", *more, **change))
    assert not (tmp_path / "grid").exists()


def test_a_config_that_cannot_run_is_a_user_error_of_its_label(monkeypatch):
    monkeypatch.setattr(processes, "ask_all", lambda work, questions: list(map(work, questions)))
    args = compare_args(
        "--methods=spear", "--variant=greedy:spear:federation.num_clients=100000", "--task=facts"
    )
    entries = compare.read_entries(args, [0], {"kind": "rounds", "amount": 1}, [])
    with pytest.raises(UserError, match="^greedy: "):
        grid_module.check_rows(entries[1:], 2)


def compare_args(*args):
    parser = command_line.parser("compare", "", "")
    parser.add_argument("--methods")
    parser.add_argument("--task")
    parser.add_argument("--variant", action="append", default=[])
    return parser.parse_args(args)


def test_rows_have_their_budget_seed_and_overrides_and_variants_win():
    args = compare_args(
        "--methods=spear",
        "--task=facts",
        "--variant=v2:spear:lora.targets=('q','v'),train.steps=3,train.learning_rate=0.5",
    )
    plain, variant = compare.read_entries(
        args,
        [4, 6],
        {"kind": "tokens", "amount": 900},
        ["--config.train.steps=7", "--config.rounds=5"],
    )
    assert (plain.label, plain.method, plain.overrides) == ("spear", "spear", [])
    assert (variant.label, variant.method, len(variant.overrides)) == ("v2", "spear", 3)
    for entry in (plain, variant):
        assert [config.seed for config in entry.configs.values()] == list(entry.configs) == [4, 6]
        assert all(
            c.budget.tokens == 900 and c.rounds == 5 and c.model == "tiny"
            for c in entry.configs.values()
        )
    assert plain.configs[4].train.steps == 7
    assert (variant.configs[6].train.steps, variant.configs[6].train.learning_rate) == (3, 0.5)
    assert tuple(variant.configs[4].lora.targets) == ("q", "v")


def test_a_method_of_a_module_of_one_s_own_is_compared_too(tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(
        "from spear_jax.algorithms import ALGORITHMS\nfrom spear_jax.algorithms.sft import Sft\n\n\n"
        "class Own(Sft):\n    name = 'own'\n\n\nALGORITHMS['own'] = Own\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ALGORITHMS, "own", None)  # taken away again after the test
    (entry,) = compare.read_entries(
        compare_args("--methods=own", "--task=facts,tiny"),
        [0],
        {"kind": "seconds", "amount": 9},
        ["--config.imports=own_method"],
    )
    config = entry.configs[0]
    assert config.budget.seconds == 9 and config.imports == ("own_method",)
    assert config.algorithm.name == "own" and "own" in config
    del sys.modules["own_method"]


def run_here(work, tasks, jobs):
    """In place of `processes.run`: everything in this process."""
    for name, items in tasks:
        yield from ((name, key, error) for key, error in work(name, items))


@pytest.fixture
def fake(monkeypatch):
    """Cells that are written by hand, in this process, instead of being trained. Returns the names
    of those that were.
    """
    made = []

    def train_cell(cell, config):
        made.append(f"{cell.parent.name}/{cell.name}")
        if config.train.steps == 13 and config.seed == 1:
            raise ValueError("thirteen\nsecond line")
        run_folder.open_workdir(str(cell), config, "auto")
        write_cell(
            cell.parent.parent, cell.parent.name, config.seed, [0.2, 0.4 + 0.1 * config.seed]
        )

    monkeypatch.setattr(grid_module, "train_cell", train_cell)
    monkeypatch.setattr(processes, "run", run_here)
    monkeypatch.setattr(
        processes,
        "ask_all",
        lambda work, shares: [{label: "pairs" for label, _ in share} for share in shares],
    )
    return made


def test_finished_cells_are_not_repeated_and_methods_and_seeds_can_be_added(fake, tmp_path, capsys):
    found = compare.main(arguments(tmp_path, methods="spear", budget="tokens:100"))
    assert fake == ["spear/seed0", "spear/seed1"] and found["failed"] == []
    told = capsys.readouterr()
    assert (
        "spear seed 1: 0.500 after 1 rounds, 100 tokens, 2 s (2 of 2)" in told.err
        and "short" not in told.err
    )
    assert found["table"] == json.loads(json.dumps(found["table"]))
    assert set(found["files"]) <= {file.name for file in tmp_path.iterdir()}
    assert pd.read_csv(tmp_path / "table.csv")["accuracy"].tolist() == pytest.approx([0.45])
    fake.clear()
    found = compare.main(arguments(tmp_path, "--quiet", budget="tokens:100", seeds="0,3"))
    assert fake == ["spear/seed3", "sft/seed0", "sft/seed3"] and capsys.readouterr() == ("", "")
    assert [(row["method"], row["seeds"]) for row in found["table"]] == [
        ("sft", 2),
        ("spear", 3),
    ]  # 0.4, 0.7 and 0.4, 0.5, 0.7
    request = runs.read_request(tmp_path)
    assert (
        set(request["labels"]) == {"spear", "sft"} and request["labels"]["spear"]["gold"] == "pairs"
    )
    assert request["cores"] == os.cpu_count() and "jax" in request["versions"]


def test_another_task_budget_or_config_in_the_same_folder_is_a_user_error(fake, tmp_path):
    compare.main(arguments(tmp_path, "--quiet", methods="spear"))
    for args, words in (
        (arguments(tmp_path, budget="rounds:3"), "compares with budget"),
        (arguments(tmp_path, "--task=reasoned"), "compares with task"),
        (arguments(tmp_path, "--config.train.steps=3"), "compares with overrides"),
        (arguments(tmp_path, "--variant=spear:spear:train.steps=3", methods="sft"), "train.steps"),
        (arguments(tmp_path / "spear" / "seed0"), "run folder of a `train`"),
    ):
        with pytest.raises(UserError, match=words):
            compare.main(args)


def test_a_failing_cell_is_named_and_the_others_go_on(fake, tmp_path, capsys):
    args = arguments(tmp_path, "--variant=bad:spear:train.steps=13", "--quiet", budget="rounds:1")
    with pytest.raises(SystemExit) as ended:
        command_line.run(compare.main, args)
    assert ended.value.code == 1
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert (
        result["failed"] == ["bad/seed1"]
        and {row["method"]: row["seeds"] for row in result["table"]}["bad"] == 1
    )
    assert (
        told.err.startswith("bad seed 1 failed: ValueError: thirteen (")
        and told.err.count("\n") == 1
    )
    assert "second line" in (tmp_path / "bad" / "seed1" / "error.txt").read_text()
    assert fake == [f"{label}/seed{seed}" for label in ("spear", "sft", "bad") for seed in (0, 1)]


def test_a_dry_run_writes_nothing(fake, tmp_path):
    found = compare.main(arguments(tmp_path / "grid", "--dry-run"))
    assert (
        (found["cells"], found["waiting"]) == (4, 4)
        and not (tmp_path / "grid").exists()
        and not fake
    )


def command(workdir):
    flags = ["--jobs=2", *(f"--config.{name}={value}" for name, value in SMALL.items())]
    return [sys.executable, "-m", "spear_jax.compare", *arguments(workdir, *flags)]


def test_a_grid_killed_in_the_middle_goes_on_without_repeating_finished_cells(tmp_path):
    """That a run which was killed ends with the same bits: test_resume.py."""
    process = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 240
    while not finished(tmp_path) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(tmp_path)
    assert 1 <= len(before) < 4
    done = subprocess.run(command(tmp_path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == [] and "(4 of 4)" in done.stderr
    after = finished(tmp_path)
    assert len(after) == 4 and all(after[cell] == told for cell, told in before.items())
    table = pd.read_csv(tmp_path / "table.csv").set_index("method")
    assert list(table["seeds"]) == [2, 2] and table["tokens"]["sft"] == 0
    for method in ("spear", "sft"):
        cells = [runs.load_metrics(tmp_path / method / f"seed{seed}") for seed in (0, 1)]
        assert all(list(cell["round"]) == [0, 1, 2] for cell in cells)
        mean = np.mean([cell["eval/accuracy"].iloc[-1] for cell in cells])
        assert table["accuracy"][method] == pytest.approx(mean)
    request = runs.read_request(tmp_path)
    assert request["labels"]["sft"]["gold"] == "responses" and request["budget"] == {
        "kind": "rounds",
        "amount": 2,
    }
