"""Meshes, bases split over devices, and runs of several processes."""

import json
import subprocess

import jax
import numpy as np
import pytest
from processes import environment

from spear_jax.analysis.runs import load_traces
from spear_jax.core.errors import UserError
from spear_jax.core.mesh import base_placer, init_distributed, layer_of, make_mesh, to_host
from spear_jax.experiment import builder, presets, run_folder
from spear_jax.experiment.checkpoint import restore
from spear_jax.models.io.huggingface import load_model

SMALL = {
    "rounds": 2,
    "federation.clients_per_round": 2,
    "rollout.examples": 6,
    "train.steps": 1,
    "train.batch_size": 4,
    "eval.limit": 20,
    "lora.rank": 2,
    "lora.targets": "('q', 'down')",  # each more is time to compile
}


@pytest.mark.parametrize("where", ["yes", "host,2,0", "host:1,2", "host:1,2,x"])
def test_a_distributed_flag_of_another_form_is_refused(where):
    with pytest.raises(UserError, match="HOST:PORT,COUNT,NUMBER"):
        init_distributed(where)


def test_processes_are_numbered_below_their_count():
    with pytest.raises(UserError, match="numbered from 0"):
        init_distributed("host:1,2,2")


def test_a_base_is_shared_by_a_number_that_divides_the_devices():
    with pytest.raises(UserError, match="devices.model is 3, which does not divide the 8 devices"):
        make_mesh(jax.devices(), 3)


def test_each_device_holds_its_part_of_a_split_base():
    mesh = make_mesh(jax.devices(), 2)
    base = load_model(str(builder.TINY), "float32", base_placer(mesh)).base
    whole = load_model(str(builder.TINY), "float32").base
    parts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        parts[path[-1].name] = leaf.addressable_shards[0].data.size / leaf.size
    for name in ("q", "k", "v", "o", "gate", "up", "down", "embed"):
        assert parts[name] == 0.5, name
    assert parts["norm"] == parts["attn_norm"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, to_host(base), whole)
    odd = base_placer(mesh)("q", np.zeros((2, 3, 5), np.float32))
    assert odd.addressable_shards[0].data.shape == (2, 3, 5)


def launch(script, *more, devices=1):
    """A launch script's run of the small config, ended."""
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    command = [
        "bash",
        f"launch/{script}",
        "--cpu",
        "--config=configs/quickstart.py",
        "--quiet",
        *flags,
        *more,
    ]
    done = subprocess.run(
        command, env=environment(devices), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def result(workdir):
    """The adapter as one vector, what was said, and the last round's metrics."""
    built = builder.build(run_folder.read_run_config(workdir), jax.devices()[:2])
    state, meta = restore(built, workdir, None)
    said = [
        (t["client"], t["example"], t["y0"], [r["text"] for r in t["revisions"]])
        for number in (1, 2)
        for t in load_traces(workdir, number)
    ]
    adapter = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.lora)])
    return adapter, said, meta["line"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run of one process with two devices, each with a base of its own."""
    folder = tmp_path_factory.mktemp("one") / "run"
    launch("local.sh", f"--workdir={folder}", devices=2)
    return result(folder)


@pytest.mark.parametrize("model", [1, 2])
def test_two_processes_give_what_one_process_with_two_devices_gives(tmp_path, one_process, model):
    split = f"--config.devices.model={model}"
    done = launch("multihost.sh", "--processes=2", f"--workdir={tmp_path / 'two'}", split)
    told = json.loads(done.stdout.splitlines()[-1])
    other = json.loads(
        next(line[4:] for line in done.stderr.splitlines() if line.startswith("[1] {"))
    )
    assert told["rounds"] == 2 and other["process"] == 1
    (two, said_two, line_two), (one, said_one, line_one) = result(tmp_path / "two"), one_process
    assert said_two == said_one and line_two["eval/accuracy"] == line_one["eval/accuracy"]
    assert np.linalg.norm(two - one) <= 1e-5 * np.linalg.norm(one)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]  # one process wrote


def test_a_person_is_asked_by_one_process_only(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    config = presets.quickstart()
    config.rollout.feedback = "human"
    with pytest.raises(UserError, match="each of which would ask"):
        builder.build(config)


@pytest.mark.parametrize("count, split", [(1, 1), (8, 1), (4, 2)])
def test_a_layer_of_a_stacked_array_is_a_view_on_every_device_it_lies_on(count, split):
    whole = np.random.default_rng(0).normal(size=(3, 64, 32)).astype(np.float32)
    place = base_placer(make_mesh(jax.devices()[:count], split))
    for name in ("q", "o", "attn_norm"):  # split over columns, over rows, and whole
        stack = place(name, whole)
        layer = layer_of(stack, 1)
        np.testing.assert_array_equal(np.asarray(layer), whole[1])
        assert layer.sharding.is_equivalent_to(stack[1].sharding, 2)
        for part, of in zip(layer.addressable_shards, stack.addressable_shards, strict=True):
            step = of.data.nbytes // 3
            assert part.data.unsafe_buffer_pointer() == of.data.unsafe_buffer_pointer() + step


def test_a_layer_whose_address_is_not_aligned_is_copied():
    stack = jax.device_put(np.arange(15, dtype=np.float32).reshape(5, 3))
    np.testing.assert_array_equal(np.asarray(layer_of(stack, 2)), [6, 7, 8])
