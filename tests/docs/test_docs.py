"""What the pages say is so: every command is one that its program takes, the cheap ones run, and
every metric is explained.
"""

import argparse
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from pages import (
    GENERATED,
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    checked_commands,
    commands,
    scripts,
)
from processes import environment

import spear_jax as sj
from spear_jax import __main__ as entry
from spear_jax import train
from spear_jax.algorithms import ALGORITHMS
from spear_jax.analysis import runs
from spear_jax.core.errors import UserError
from spear_jax.experiment import command_line, presets
from spear_jax.experiment.config import parse
from spear_jax.experiment.run import personal_metrics
from spear_jax.federated import cohort_training, local_training
from spear_jax.federated.aggregation.attacks import Attack
from spear_jax.federated.aggregation.compression.blocks import Int8
from spear_jax.federated.aggregation.compression.uplink import Uplink
from spear_jax.federated.aggregation.pipeline import Aggregation, end_round, init_server
from spear_jax.federated.asynchronous import Flight, Played, Queue, metrics_of_clock
from spear_jax.federated.participation import Participation
from spear_jax.federated.privacy.accounting import Account
from spear_jax.federated.privacy.central import CentralPrivacy
from spear_jax.feedback.registry import get_feedback
from spear_jax.models.lora import TARGETS
from spear_jax.models.params import Adapter, LowRank
from spear_jax.tasks import get_task

CONFIGURED = ("train", "benchmark")  # what is left of their arguments is a config
# Programs of others: what a page may do with them is not ours to check.
OUTSIDE = tuple(
    "git cd pip jupyter pytest source . tensorboard ruff gcloud export lm_eval vllm flwr"
    " flower-superlink flower-supernode openssl ssh-keygen".split()
)
# Files of the published code, which are not here.
PUBLISHED = re.compile(r"(?:(?<=from_yaml:)|(?<=from_yaml\.py:))[\w.]+\.yaml")


class Parsed(Exception):
    """Ends a program's `main` as soon as it has read its arguments."""

    def __init__(self, args: argparse.Namespace, rest: list[str]):
        self.given, self.rest = args, rest


def read_arguments(monkeypatch, main, argv: list[str]) -> Parsed:
    """The arguments as the program's own parser reads them."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_known(parser, args=None, namespace=None):
        raise Parsed(*known(parser, args, namespace))

    def parse(parser, args=None, namespace=None):
        found, rest = known(parser, args, namespace)
        assert not rest, f"unknown arguments {rest}"
        raise Parsed(found, [])

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed) as caught:
            main(argv)
    return caught.value


def check_program(monkeypatch, name: str, argv: list[str]) -> None:
    """`python -m spear_jax.NAME ARGV`: flags, config file, fields and values are ones that it
    takes.
    """
    folder = (pathlib.Path(sj.__file__).parent / name).is_dir()
    module = importlib.import_module(
        f"spear_jax.{name}.__main__" if folder else f"spear_jax.{name}"
    )
    found = read_arguments(monkeypatch, module.main, argv)
    if any(
        "..." in arg for arg in argv
    ):  # an ellipsis for the reader to fill in: the flags are all there is to check
        return
    if name in CONFIGURED and any(arg.startswith("--config=") for arg in found.rest):
        parse(command_line.read_config(found.rest))
    elif name == "compare":
        entries = module.read_entries(
            found.given,
            [int(seed) for seed in found.given.seeds.split(",")],
            module.read_budget(found.given.budget),
            found.rest,
        )
        for entry in entries:
            for config in entry.configs.values():
                parse(config)
    else:
        assert not [arg for arg in found.rest if not arg.startswith("--config")], found.rest


def check_sweep(monkeypatch, name: str, argv: list[str], folder: pathlib.Path) -> None:
    """A sweep's arguments; with --dry-run it makes and checks every cell's config."""
    main = importlib.import_module(name).main
    assert read_arguments(monkeypatch, main, argv).given.workdir
    if "--dry-run" in argv and not any("..." in arg for arg in argv):
        moved = [re.sub("^--workdir=", f"--workdir={folder}/", arg) for arg in argv]
        assert main(moved)["cells"] > 1


def check_launch(file: str, argv: list[str], folder: pathlib.Path) -> None:
    """`bash FILE ARGV`: what takes --dry-run is run so, what does not is at least a script that
    bash can read.
    """
    subprocess.run(["bash", "-n", file], cwd=ROOT, check=True)
    text = (ROOT / file).read_text()
    if "--dry-run" not in text or any("..." in arg for arg in argv):
        return
    dry = [
        re.sub("^--workdir=(?!/)", f"--workdir={folder}/", arg)
        for arg in argv
        if arg != "--dry-run"
    ]
    env = environment() | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", file, "--dry-run", *dry], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.replace("\\", "")  # quoted once more for another shell
    assert all(arg in said for arg in dry if arg.startswith(("--config", "--workdir=")))


@pytest.mark.parametrize(
    "where, words", [pytest.param(*found, id=found[0]) for found in checked_commands()]
)
def test_a_command_is_one_that_its_program_takes(monkeypatch, tmp_path, where, words):
    check_command(monkeypatch, tmp_path, where, words)


@pytest.mark.parametrize("name", entry.commands())
def test_the_examples_of_help_are_commands_that_it_takes(name, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        entry.main([name, "--help"])
    _, found, below = capsys.readouterr().out.partition("examples:\n")
    text = textwrap.dedent(below.partition("\n\n")[0])
    text = text.replace("experiments/mine.py", "configs/quickstart.py")  # a file of the reader's
    examples = commands(Block(ROOT / "README.md", 0, "", "bash", text))
    assert found and any(words[2] == f"spear_jax.{name}" for words in examples)
    for words in examples:
        if words[0] == "sbatch":  # of a file that the line before writes
            continue
        check_command(monkeypatch, tmp_path, f"{name} --help", words)


def check_command(monkeypatch, tmp_path, where: str, words: list[str]) -> None:
    """A command's flags, config, fields and values are ones that its program takes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "published.yaml").write_text("fl: {rounds: 50, clients_per_round: 3}\n")
    words = [PUBLISHED.sub(str(tmp_path / "published.yaml"), word) for word in words]
    if words[:3] == ["python", "-m", "spear_jax.sweep"]:
        check_sweep(monkeypatch, "spear_jax.sweep", words[3:], tmp_path)
    elif words[:2] == ["python", "-m"] and words[2].startswith("spear_jax."):
        check_program(monkeypatch, words[2].removeprefix("spear_jax."), words[3:])
    elif words[0] == "python" and words[1].startswith("launch/"):
        module = words[1].removesuffix(".py").replace("/", ".")
        check_sweep(monkeypatch, module, words[2:], tmp_path)
    elif words[0] in ("bash", "sbatch"):
        file = next(word for word in words[1:] if not word.startswith("-"))
        check_launch(file, words[words.index(file) + 1 :], tmp_path)
    elif words[:2] == ["python", "-m"]:
        assert words[2] in ("pytest", "sphinx", "venv", "pip"), words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in OUTSIDE, (
            f"{where}: no rule for {shlex.join(words)}; add one, or the program to OUTSIDE"
        )


def test_extras_that_pages_install_exist():
    extras = re.search(r"extras_require=\{(.*?)\n    \}", (ROOT / "setup.py").read_text(), re.S)[1]
    named = {
        name
        for page in PAGES
        for found in re.findall(r"pip install [^\n`]*?\[([\w,]+)\]", page.read_text())
        for name in found.split(",")
    }
    assert named and not {name for name in named if f'"{name}":' not in extras}


def test_one_version_is_told_everywhere():
    setup = re.search(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    newest = re.search(r"^## ([\d.]+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    cited = re.search(r"^version: ([\d.]+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert sj.__version__ == setup == newest == cited


def test_local_links_lead_somewhere():
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
            if re.match(r"\w+:", target):
                continue
            there = page.parent / target if target else page
            if GENERATED in there.parents:
                continue
            if not there.exists() or (anchor and anchor not in anchors(there)):
                missing.append(f"{page.name}: {target}#{anchor}")
    assert not missing


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


RUNNABLE = [page for page in PAGES if any(block.mark == "run" for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_a_guide_works_as_it_is_written(page, tmp_path):
    """The page's files are put into a folder of their own, and its blocks marked `run` are run
    there.
    """
    programs = {
        "python": f'exec "{sys.executable}" "$@"',
        "spear-jax": f'exec "{sys.executable}" -m spear_jax "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, line in programs.items():
        shim = tmp_path / "bin" / name
        shim.write_text(f"#!/bin/sh\n{line}\n")
        shim.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = environment() | {"PATH": path, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    for block in blocks(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    for where, language, text in scripts(page):
        command = ["python", "-c", text]
        if language == "bash":
            command = ["bash", "-c", f"set -euo pipefail\n{text}"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {done.stderr[-3000:]}"
    assert list((tmp_path / "runs").glob("*/summary.json"))


def test_the_guide_to_own_data_trains_with_a_qwen2_folder(tmp_path, monkeypatch):
    """Its two files and its train commands; the model is small and random, so one round is enough."""
    page = ROOT / "docs" / "guides" / "own-data.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2-135m-instruct").symlink_to(ROOT / "tests/fixtures/qwen2")
    for block in blocks(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    given = [words for where, words in checked_commands() if where.startswith("docs/guides/own-")]
    trained = [words[3:] for words in given if words[2] == "spear_jax.train"]
    small = ["rounds=1", "lora.targets=('q',)", "train.steps=1", "data.max_response_tokens=128"]
    small = [f"--config.{field}" for field in small]
    results = [train.main([*argv, *small, "--offline"]) for argv in trained]
    looked, asked, replied = results
    assert looked["train_examples"] == 27 and looked["test_examples"] == 3
    assert asked["eval"]["last"]["count"] == 3 and "accuracy" in asked["eval"]["last"]
    assert asked["tokens"]["rollout"] > 0 and replied["tokens"].get("rollout", 0) == 0
    held_out = list(runs.load_metrics(tmp_path / "runs" / "pairs")["eval/nll"])
    assert held_out[-1] != held_out[0] > 0


def test_the_guides_that_bring_code_are_run():
    code = {
        "add-a-dataset", "add-a-feedback-provider", "add-a-method", "add-a-reducer",
        "configs", "python-api", "quickstart", "resume",
    }  # fmt: skip
    assert code <= {page.stem for page in RUNNABLE}


# Every metric is explained

METRICS = (ROOT / "docs" / "guides" / "metrics.md").read_text(encoding="utf-8")
DOCUMENTED = {name for name in re.findall(r"`([\w/]+)`", METRICS) if "/" in name}
ON_DEVICES = {  # tests/commands/test_flower.py runs them
    "participation/refused", "flower/bytes_down", "flower/bytes_up", "flower/seconds", "time/node",
    "time/node_compile", "secure/clipped",
}  # fmt: skip
UNGRADED = {
    "eval/nll"
}  # of tasks that nothing grades; tests/algorithms/test_responses.py runs them


def written_metrics(method: str, monkeypatch, folder: pathlib.Path) -> set[str]:
    """The names of a round of a method: rollouts as they are, local training traced and not
    compiled.
    """

    def trace_alone(*args):
        static, arrays = args[:6], args[6:]
        shapes = jax.eval_shape(
            lambda *arrays: local_training.train_cohort(*static, *arrays), *arrays
        )
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    monkeypatch.setattr(cohort_training, "_train", trace_alone)
    config = presets.method_config(method, "facts,tiny,smoke")
    small = {"rollout.max_concurrent_sequences": 32, "eval.limit": 8, "eval.rows": 8}
    config.update_from_flattened_dict(small | {"lora.rank": 2, "lora.targets": ("q",)})
    with sj.Run(config, folder / method, quiet=True, devices=jax.devices()[:1]) as run:
        return set(next(iter(run)).metrics) - {"round", "time"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    with pytest.MonkeyPatch.context() as patch:
        yield {method: written_metrics(method, patch, folder) for method in ALGORITHMS}


def test_every_metric_that_a_run_writes_is_explained(written):
    missing = {
        name
        for method, names in written.items()
        for name in names
        if name not in DOCUMENTED and name.replace(f"{method}/", "METHOD/") not in DOCUMENTED
    }
    assert not missing


def aggregated() -> set[str]:
    """The names of an aggregation that reads every client, and of the simulated clock."""
    pair = LowRank(np.ones((2, 1, 3, 1), np.float32), np.ones((2, 1, 1, 2), np.float32))
    adapters = Adapter(**dict.fromkeys(TARGETS, pair))
    aggregation = Aggregation(attack=Attack("scale", (0,)), uplink=Uplink(Int8()))
    start = jax.tree.map(lambda x: np.zeros_like(x[0]), adapters)
    state = init_server(aggregation, start, {}, jax.random.key(0), 2)
    found = end_round(aggregation, state, (adapters, np.ones(2)), range(2)).metrics
    noise = CentralPrivacy(Account(1.0, 2, 2, "poisson", 0, 0.1), 1.0)
    aggregation = Aggregation(attack=Attack("none", ()), privacy=noise)
    state = init_server(aggregation, start, {}, jax.random.key(0), 2)
    found |= end_round(aggregation, state, (adapters, np.ones(2)), range(2)).metrics
    clock, clients, some = Participation(), range(30), np.ones(30)
    outcome = clock.play(1, clients, 30, 1, some, some, some, some)
    flights = [Flight(0, 0, 0, 1.0)]
    version = metrics_of_clock(Played(Queue(1.0, 1, 1, ()), flights, [], [], []), 0, 0.0)
    personal = {"personal/loss", *personal_metrics([0.5], 0.5)}  # tests/federated/test_ditto.py
    return {*found, *clock.metrics(outcome, clients, 30, 0.0), *version, *personal}


def test_every_metric_that_is_explained_is_written(written):
    names = {name for method in written.values() for name in method}
    general = {
        name.replace(f"{method}/", "METHOD/") for method, found in written.items() for name in found
    }
    asked = set(get_feedback("simulated", get_task("facts"), 3).take_metrics())
    others = asked | aggregated() | ON_DEVICES
    assert others <= DOCUMENTED and not DOCUMENTED - names - general - UNGRADED - others


def test_a_method_page_names_the_metrics_of_the_method(written):
    common = set.intersection(*written.values())
    for method, names in written.items():
        page = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
        told = set(re.findall(r"^\| `(\w+/\w+)` \| [^|]+ \|$", page, re.M))
        own = {name for name in names - common if name.startswith(("train/", f"{method}/"))}
        assert told == own, method


# The paper's settings, and the reference


def test_the_papers_settings_are_those_of_the_configs():
    text = (ROOT / "docs" / "guides" / "reproduce.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for cells in re.findall(r"^\| (\w+) " + r"\| ([\d.]+) " * 8 + r"\|$", text, re.M)
    }
    assert set(rows) == {"arc_challenge", "hellaswag", "math_mcqa", "strategy_qa"}
    for task, cells in rows.items():
        config = presets.method_config("spear", f"{task},qwen2.5-1.5b")
        fed, rollout = config.federation, config.rollout
        there = (
            config.rounds, fed.clients_per_round, fed.max_examples_per_client, rollout.examples, config.train.steps,
            rollout.max_new_tokens, config.spear.tail, config.spear.max_lose_ratio,
        )  # fmt: skip
        assert tuple(map(float, cells)) == tuple(map(float, there))
        assert fed.num_clients == 50


def test_own_code_that_is_missing_is_a_mistake_of_one_line():
    with pytest.raises(UserError, match="no_such_module.*PYTHONPATH"):
        command_line.read_config(["--config=quickstart", "--config.imports=no_such_module"])
