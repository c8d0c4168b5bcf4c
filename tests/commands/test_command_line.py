"""Names on the command line: commands, presets, files, and modules of one's own."""

import pathlib
import subprocess
import sys

import pytest
from processes import environment

import spear_jax
from spear_jax import __main__ as entry
from spear_jax import pretrain, train
from spear_jax.algorithms import ALGORITHMS
from spear_jax.core.errors import UserError
from spear_jax.experiment import command_line, presets
from spear_jax.experiment.config import default_config, describe, flatten

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = "benchmark compare doctor evaluate export fetch flower pretrain published report score serve sweep train"


def run_main(capsys, *argv):
    """The exit code, stdout and stderr of `spear-jax ARGV`."""
    with pytest.raises(SystemExit) as ended:
        entry.main(list(argv))
    return ended.value.code, *capsys.readouterr()


@pytest.fixture
def typed(monkeypatch):
    """As if started by the console script."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/spear-jax"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_help_lists_every_command_with_one_line(typed, capsys):
    code, shown, told = run_main(capsys, "--help")
    assert code == 0 and not told and shown.startswith("usage: spear-jax COMMAND")
    assert list(entry.commands()) == COMMANDS.split()
    lines = shown[shown.index("commands:") : shown.index("examples:")].splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == COMMANDS.split()
    assert all(len(line) <= 100 and line.endswith(".") and len(line.split()) > 3 for line in lines)


def test_the_version_is_told(typed, capsys):
    assert run_main(capsys, "--version") == (0, f"spear-jax {spear_jax.__version__}\n", "")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'"),
        ([], "no command; give one of benchmark, compare"),
        (["train", "--workdir=x", "--config=speer:facts,tiny"], "no config 'speer'. Did you mean"),
        (["report", "--workdir=nothing/here", "--out=x"], "nothing/here"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    typed, capsys, monkeypatch, tmp_path, argv, words
):
    monkeypatch.chdir(tmp_path)
    code, shown, told = run_main(capsys, *argv)
    assert (code, shown) == (2, "") and told.count("\n") == 1
    assert told.startswith("error: ") and words in told


@pytest.mark.parametrize("name", COMMANDS.split())
def test_help_shows_what_the_user_typed(typed, capsys, name):
    code, shown, _ = run_main(capsys, name, "--help")
    assert code == 0 and shown.startswith(f"usage: spear-jax {name} ")
    assert f"spear-jax {name}" in shown[shown.index("examples:") :] and "python -m" not in shown


def test_help_of_a_module_shows_the_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/spear_jax/train.py"])
    with pytest.raises(SystemExit):
        command_line.parser("train", "", "python -m spear_jax.train --quiet").parse_args(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m spear_jax.train ")
    assert shown.endswith("examples:\n  python -m spear_jax.train --quiet\n")


def test_the_package_is_a_command_and_hands_over_flags_and_exit_codes(tmp_path):
    command = [sys.executable, "-m", "spear_jax", "evaluate", "--model=tiny"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --model needs --task")
    done = subprocess.run(
        [*command[:3], "--help"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: python -m spear_jax COMMAND")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--workdir=x", "--model=tiny"], "give either --workdir"),
        (["--workdir=x", "--adapter=y"], "'--adapter' does nothing beside --workdir"),
        (["--workdir=x", "--dtype=bfloat16"], "'--dtype' does nothing beside --workdir"),
        (["--workdir=x", "--config.eval.rows=4"], "'--config.eval.rows=4' does nothing beside"),
        (["--model=tiny", "--task=facts", "--round=3"], "--round=3 does nothing beside --model"),
        (["--model=tiny", "--task=facts", "--config.task=x"], "give --task"),
        (["--model=tiny", "--task=facts", "--config.rounds=3"], "does not read this field"),
        (["--model=tiny", "--task=facts", "--config.eval.every=3"], "does not read this field"),
        (["--model=tiny", "--task=facts", "--config.eval.row=3"], "Did you mean 'eval.rows'"),
        (["--model=tiny", "--task=x", "--config.imports=('no_such',)"], "'no_such', which is not"),
    ],
)
def test_evaluate_refuses_what_would_do_nothing(typed, capsys, argv, words):
    code, shown, told = run_main(capsys, "evaluate", *argv)
    assert (code, shown) == (2, "") and words in told


def test_every_method_is_a_preset_and_so_are_quickstart_and_from_yaml():
    assert set(presets.named_presets()) == {*ALGORITHMS, "quickstart", "from_yaml"}


@pytest.mark.parametrize("method", ALGORITHMS)
def test_a_preset_is_what_the_file_of_its_name_gives(method, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arg in ("facts,tiny,small", "arc_challenge,qwen2.5-1.5b"):
        named = command_line.load_config(f"{method}:{arg}")
        assert named.is_locked and named.algorithm.name == method
        assert named.to_dict() == command_line.load_config(f"configs/{method}.py:{arg}").to_dict()


@pytest.mark.parametrize("arg", ["", ":reasoned", ":facts,reference"])
def test_quickstart_is_what_its_file_gives(arg, monkeypatch):
    monkeypatch.chdir(ROOT)
    named = command_line.load_config(f"quickstart{arg}")
    assert named.to_dict() == command_line.load_config(f"configs/quickstart.py{arg}").to_dict()


def test_from_yaml_is_what_its_file_gives(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "published.yaml"
    file.write_text("fl: {rounds: 7, clients_per_round: 3}\n")
    for variant in ("", ",reference"):
        named = command_line.load_config(f"from_yaml:{file}{variant}")
        same = command_line.load_config(f"configs/from_yaml.py:{file}{variant}")
        assert named.rounds == 7 and named.to_dict() == same.to_dict()
        assert named.algorithm.preset == (variant[1:] or "default")


def test_pretrain_takes_its_recipe_by_name_from_a_file_and_by_default(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pretrain, "pretrain", lambda config, out: config.to_dict())
    found = [
        pretrain.main([*config, "--config.steps=170", "--out=x"])
        for config in ([], ["--config=pretrain"], ["--config=configs/pretrain.py"])
    ]
    assert found[0] == found[1] == found[2] == {**pretrain.recipe().to_dict(), "steps": 170}
    with pytest.raises(UserError, match="no config 'spear'.* Presets: pretrain"):
        pretrain.main(["--config=spear:facts,tiny", "--out=x"])
    with pytest.raises(UserError, match="steps is 100; it must exceed the 100 steps"):
        pretrain.main(["--config.steps=100", "--out=x"])
    with pytest.raises(UserError, match="takes no argument, got 'large'"):
        pretrain.main(["--config=pretrain:large", "--out=x"])


@pytest.mark.parametrize(
    "source, words",
    [
        ("speer:facts,tiny", "no config 'speer'. Did you mean 'spear'"),
        ("configs/speer.py:facts,tiny", "no config file 'configs/speer.py'. Did you mean 'spear'"),
        ("xyzzy", "no config 'xyzzy'. Presets: spear, "),
        ("quikstart", "no config 'quikstart'. Did you mean 'quickstart'"),
    ],
)
def test_a_name_that_is_neither_preset_nor_file_is_a_user_error_with_both_forms(source, words):
    with pytest.raises(UserError) as caught:
        command_line.load_config(source)
    told = str(caught.value)
    assert told.startswith(words) and "\n" not in told
    assert "--config=NAME[:ARG]" in told and "--config=FILE.py[:ARG]" in told


@pytest.mark.parametrize(
    "source, words",
    [
        ("spear", "'spear' takes TASK,MODEL behind a colon, for example --config=spear:"),
        ("spear:fact,tiny", "Did you mean 'facts'"),
        ("quickstart:gsm8k", "unknown embedded task 'gsm8k'"),
        ("from_yaml", "give --config=from_yaml:PATH.yaml"),
    ],
)
def test_an_argument_that_a_preset_does_not_take_is_a_user_error(source, words):
    with pytest.raises(UserError) as caught:
        command_line.load_config(source)
    assert words in str(caught.value)


def test_a_file_of_one_s_own_may_lie_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from spear_jax.experiment import presets\n\n\ndef get_config(arg='5'):\n"
        "    config = presets.quickstart()\n    config.rounds = int(arg)\n    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    assert command_line.load_config(f"{tmp_path}/mine.py:9").rounds == 9
    assert command_line.read_config(["--config=mine.py", "--config.seed=3"]).rounds == 5
    # an existing file comes before a preset of that name
    (tmp_path / "mine.py").rename(tmp_path / "spear.py")
    assert command_line.load_config("spear.py").rounds == 5
    assert command_line.load_config("spear:facts,tiny").rounds == 12


def test_a_method_of_a_module_of_one_s_own_is_a_preset(tmp_path, monkeypatch):
    (tmp_path / "own_preset.py").write_text(
        "from spear_jax.algorithms import ALGORITHMS\nfrom spear_jax.algorithms.sft import Sft\n\n\n"
        "class Own(Sft):\n    name = 'own'\n\n\nALGORITHMS['own'] = Own\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="no config 'own'"):
        command_line.read_config(["--config=own:facts,tiny"])
    monkeypatch.setitem(ALGORITHMS, "own", None)  # taken away again after the test
    config = command_line.read_config(["--config=own:facts,tiny", "--config.imports=own_preset"])
    assert config.algorithm.name == "own" and config.imports == ("own_preset",)
    assert "own" in config  # the group of its settings
    del sys.modules["own_preset"]


def test_fields_are_listed_with_their_defaults_and_named_in_help(capsys):
    fields = flatten(default_config())
    told = describe()
    assert told.keys() == fields.keys()
    shown = lambda value: repr(tuple(value) if isinstance(value, list) else value)
    assert all(told[name].startswith(f"{shown(value)}; ") for name, value in fields.items())
    assert told["lora.dropout"] == "0.1; in [0, 1)"
    with pytest.raises(SystemExit, match="0"):
        train.main(["--fields"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fields) and lines[0].startswith("--config.seed ")
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert all(name.rpartition(".")[2] in text for name in fields)
