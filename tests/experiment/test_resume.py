"""Whole runs of `train` as a user starts them: the run folder, resuming, killing, and the commands
that read the folder.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes import environment
from run_sizes import SMALL

from spear_jax import evaluate as evaluate_command
from spear_jax import export as export_command
from spear_jax import report as report_command
from spear_jax import score as score_command
from spear_jax import train as train_command
from spear_jax.analysis import runs, token_tables
from spear_jax.core.errors import UserError
from spear_jax.core.pytrees import digest
from spear_jax.experiment import builder, command_line, presets, run_folder
from spear_jax.experiment.checkpoint import Checkpoints, restore
from spear_jax.models.io import peft

FLAGS = [f"--config.{name}={value}" for name, value in SMALL.items()]


def arguments(workdir):
    return ["--config=configs/quickstart.py", f"--workdir={workdir}", *FLAGS]


def command(workdir):
    return [sys.executable, "-m", "spear_jax.train", *arguments(workdir), "--quiet"]


def run(workdir, *flags, env=None):
    shown = [sys.executable, "-m", "spear_jax.train", *arguments(workdir), *flags]
    done = subprocess.run(shown, env=env or environment(), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Commands that are called in this process see one device, as those that are started do."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)


def homeless():
    """The environment of a user without home and name, a locale that knows ASCII alone, and no
    cache that could be written.
    """
    gone = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "LANG", "LC_CTYPE")
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    caches = ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")
    return (
        {name: value for name, value in environment().items() if name not in gone}
        | ascii_alone
        | {"PYTHONCOERCECLOCALE": "0", "HOME": "/dev/null"}
        | {name: f"/dev/null/{name}" for name in caches}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped, in surroundings that must not matter."""
    workdir = tmp_path_factory.mktemp("runs") / "größer & weiter"
    done = run(workdir, "--quiet", env=homeless())
    return workdir, done


@pytest.fixture(scope="module")
def built():
    """The experiment of these runs."""
    config = presets.quickstart()
    config.update_from_flattened_dict(SMALL)
    return builder.build(config, jax.devices()[:1])


def final_state(built, workdir):
    state, meta = restore(built, workdir, None)
    assert meta["line"]["round"] == int(state.round)
    return digest((state.lora, state.opt_state)), int(state.round)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_contract_names(finished):
    workdir, done = finished
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    for name in (
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "accuracy.png",
        "split.json",
        "split.png",
        "tensorboard",
    ):
        assert (workdir / name).exists(), name
    assert (
        not (workdir / "wandb").exists() and not (workdir / "wandb_id").exists()
    )  # no project was named
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rounds"] == 4 and set(result["eval"]) == {"first", "best", "last"}
    assert [line["round"] for line in lines(workdir)] == [0, 1, 2, 3, 4]
    last = lines(workdir)[-1]
    for name in (
        "eval/accuracy", "eval/count", "eval/stderr", "rollout/first_accuracy", "rollout/fixed", "rollout/wins", "rollout/loses",
        "rollout/tokens", "train/loss", "train/win_nll", "train/unlikelihood", "train/grad_norm", "train/skipped_steps",
        "round/clients", "round/clients_without_wins", "round/bytes_up", "round/bytes_down", "round/update_norm", "time/rollout",
        "time/train", "time/aggregate", "time/eval", "time/checkpoint", "time/round", "memory/peak_bytes", "compile/programs",
    ):  # fmt: skip
        assert np.isfinite(last[name]), name
    assert lines(workdir)[1]["compile/programs"] > 3 and lines(workdir)[1]["compile/seconds"] > 0
    assert last["compile/programs"] == 0.0
    assert [("eval/accuracy" in line) for line in lines(workdir)] == [True, True, True, False, True]


def test_traces_can_be_read_and_their_roles_match_the_metrics(finished):
    workdir, _ = finished
    for line in lines(workdir)[1:]:
        traces = runs.load_traces(workdir, line["round"])
        assert len(traces) == 16
        assert {"client", "example", "prompt", "y0", "revisions", "role", "confidence"} <= set(
            traces[0]
        )
        assert sum(t["role"] == "lose" for t in traces) == line["rollout/loses"]
        right = sum(
            t["correct"] or (t["revisions"] and t["revisions"][-1]["correct"]) for t in traces
        )
        assert right == line["rollout/wins"]
        assert all(r["feedback"] for t in traces for r in t["revisions"])


def test_recorded_tokens_have_the_probability_that_their_own_adapter_gives_them(finished):
    workdir, _ = finished
    table = token_tables.load_tokens(workdir, 4)
    traces = runs.load_traces(workdir, 4)
    assert table["trace"].nunique() == len(traces) == 16
    for number, own in table.groupby("trace"):
        shown = "".join(own["token"])
        assert (
            shown.startswith(traces[number]["y0"]) and traces[number]["role"] == own["role"].iloc[0]
        )
        assert own["touched"].isna().all() == (own["role"].iloc[0] != "lose")
    found = score_command.main([f"--workdir={workdir}", "--traces=4", "--rounds=3,4", "--quiet"])
    assert found["traces"] == 16 and found["rounds"] == [3, 4]
    scores = token_tables.load_scores(workdir, 4).merge(
        table, on=["trace", "position"], suffixes=("", "_sampled")
    )
    assert len(scores) == 2 * len(table)
    difference = (
        (scores["probability"] - scores["probability_sampled"])
        .abs()
        .groupby(scores["adapter"])
        .max()
    )
    assert difference[3] < 1e-3 < difference[4]  # round 4 was sampled from the adapter of round 3


def test_scores_of_what_is_not_there_are_a_users_mistake(finished, tmp_path):
    workdir, _ = finished
    with pytest.raises(UserError, match="score --workdir"):
        token_tables.load_scores(workdir, 1)
    with pytest.raises(UserError, match="no checkpoint of round 77"):
        score_command.main([f"--workdir={workdir}", "--rounds=77", "--quiet"])
    with pytest.raises(UserError, match="whole numbers"):
        score_command.main([f"--workdir={workdir}", "--rounds=a", "--quiet"])


def test_a_run_from_before_a_field_existed_takes_its_default(finished, tmp_path):
    workdir, _ = finished
    config = json.loads((workdir / "config.json").read_text())
    del config["imports"], config["train"]["learning_rate"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = run_folder.read_run_config(tmp_path)
    assert found.imports == () and found.train.learning_rate == 5e-5 and found.rounds == 4


def test_bytes_count_float32_adapters_of_the_clients(finished, built):
    workdir, _ = finished
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(built.initial_state().lora))
    for line in lines(workdir)[1:]:
        assert line["round/bytes_down"] == 2 * size
        assert line["round/bytes_up"] == (2 - line["round/clients_without_wins"]) * size


def test_running_again_repeats_nothing(finished, built):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    state = final_state(built, workdir)
    train_command.main(arguments(workdir))
    assert (workdir / "metrics.jsonl").read_text() == before and final_state(
        built, workdir
    ) == state


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(finished, built, tmp_path, seed):
    whole, _ = finished
    workdir, rng = tmp_path / "killed", random.Random(seed)
    kills = 0
    while kills < 2:
        process = subprocess.Popen(
            command(workdir),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 240
        # Wait for some progress first, so that the moments fall into rounds and not into imports.
        wanted = len(lines(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        while time.time() < deadline and process.poll() is None:
            if (workdir / "metrics.jsonl").exists() and len(
                (workdir / "metrics.jsonl").read_text().splitlines()
            ) > wanted:
                break
            time.sleep(0.02)
        time.sleep(rng.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills
    run(workdir, "--quiet")
    assert final_state(built, workdir) == final_state(built, whole)
    assert [line["round"] for line in lines(workdir)] == [0, 1, 2, 3, 4]
    drop = lambda line: {
        k: v
        for k, v in line.items()
        if not k.startswith(("time", "memory", "compile", "budget/seconds"))
    }
    assert [drop(line) for line in lines(workdir)] == [drop(line) for line in lines(whole)]


def corrupt(folder):
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > 200 and "state" in str(file):
            data = bytearray(file.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            file.write_bytes(bytes(data))


def test_a_corrupt_newest_checkpoint_falls_back_to_the_one_before(finished, built, tmp_path):
    whole, _ = finished
    workdir = tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    corrupt(workdir / "checkpoints" / "4")
    # In a process of its own: bits are compared with a process that sees as many devices.
    told = run(workdir).stderr
    assert "checkpoint of round 4 is corrupt" in told and "going on after round 3" in told
    assert final_state(built, workdir) == final_state(built, whole)
    assert [line["round"] for line in lines(workdir)] == [0, 1, 2, 3, 4]


def test_only_corrupt_checkpoints_are_a_user_error(finished, tmp_path, capsys):
    workdir = tmp_path / "ruined"
    shutil.copytree(finished[0], workdir)
    for folder in (workdir / "checkpoints").iterdir():
        corrupt(folder)
    with pytest.raises(SystemExit) as ended:
        command_line.run(train_command.main, arguments(workdir))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "no whole checkpoint" in told and "Traceback" not in told


def test_the_last_and_the_best_rounds_are_kept(built, tmp_path):
    state = built.initial_state()
    checkpoints = Checkpoints(tmp_path / "c", keep_last=2, keep_best=1)
    for number, accuracy in enumerate([0.1, 0.9, None, 0.3, None, 0.2]):
        line = {"round": number} | ({} if accuracy is None else {"eval/accuracy": accuracy})
        checkpoints.save(state.replace(round=np.int32(number)), line, {})
    checkpoints.close()
    assert Checkpoints(tmp_path / "c", 2, 1, read_only=True).rounds() == [1, 4, 5]


def test_a_checkpoint_with_unreadable_metrics_is_set_aside_and_can_still_be_read(
    built, tmp_path, capsys
):
    state = built.initial_state()
    checkpoints = Checkpoints(tmp_path / "c", keep_last=2, keep_best=1)
    for number in (1, 2):
        line = {"round": number, "eval/accuracy": 0.5}
        checkpoints.save(state.replace(round=np.int32(number)), line, {})
    checkpoints.close()
    (tmp_path / "c" / "2" / "metrics" / "metrics").write_text("{")
    found, _ = Checkpoints(tmp_path / "c", 2, 1, read_only=True).restore(state)
    assert int(found.round) == 2  # its state is whole
    found, _ = Checkpoints(tmp_path / "c", 2, 1).restore(state)
    assert int(found.round) == 1 and (tmp_path / "c" / "2.corrupt").is_dir()
    assert "a checkpoint is corrupt: " in capsys.readouterr().err


def test_evaluate_export_and_report_work_on_the_run(finished, tmp_path):
    workdir, _ = finished
    accuracy = evaluate_command.main([f"--workdir={workdir}", "--quiet"])
    assert accuracy["accuracy"] == lines(workdir)[-1]["eval/accuracy"]
    low, high = accuracy["interval"]
    assert low < accuracy["accuracy"] < high
    export_command.main([f"--workdir={workdir}", f"--out={tmp_path / 'adapter'}", "--quiet"])
    export_command.main(
        [f"--workdir={workdir}", f"--out={tmp_path / 'model'}", "--merge", "--quiet"]
    )
    beside = evaluate_command.main(
        [
            "--model=tiny",
            f"--adapter={tmp_path / 'adapter'}",
            "--task=facts",
            "--limit=40",
            "--quiet",
        ]
    )
    merged = evaluate_command.main(
        [f"--model={tmp_path / 'model'}", "--task=facts", "--limit=40", "--quiet"]
    )
    assert beside["correct"] == merged["correct"] == accuracy["correct"]
    with pytest.raises(UserError, match="not an empty folder"):
        export_command.main([f"--workdir={workdir}", f"--out={tmp_path / 'model'}"])
    found = report_command.main([f"--workdir={workdir}", f"--out={tmp_path / 'report'}", "--quiet"])
    assert all((tmp_path / "report" / name).stat().st_size > 0 for name in found["files"])
    with pytest.raises(UserError, match="saved rounds"):
        evaluate_command.main([f"--workdir={workdir}", "--round=77"])


def test_the_exported_adapter_is_the_servers(finished, built, tmp_path):
    workdir, _ = finished
    export_command.main([f"--workdir={workdir}", f"--out={tmp_path / 'adapter'}", "--quiet"])
    tree, _ = peft.load_adapter(tmp_path / "adapter", built.model.config)
    assert digest(tree) == digest(restore(built, workdir, None)[0].lora)
    raw = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert raw["base_model_name_or_path"] == str(
        builder.TINY
    )  # "tiny" is no name that PEFT could load


def test_a_run_folder_of_before_a_field_existed_has_its_default(tmp_path):
    config = presets.quickstart()
    old = json.loads(json.dumps(config.to_dict()))
    del old["wandb"], old["eval"]["first_rounds"], old["spear"]["answer_only"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert run_folder.open_workdir(str(tmp_path), config, "must") == (tmp_path, True)
    old["rollout"]["segment"] = 32  # a retired field that changed no result
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert run_folder.open_workdir(str(tmp_path), config, "must") == (tmp_path, True)
    old["federation"]["rule"] = "fedavg"  # a field that is no longer there is told
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="federation.rule"):
        run_folder.open_workdir(str(tmp_path), config, "must")
