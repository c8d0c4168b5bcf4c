"""What only a GPU can show, beside the CPU of the same machine.

    JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/test_gpu.py

`launch/gpu_check.sh` runs these first. Without a GPU they are skipped.
"""

import json
import os
import signal
import subprocess
import sys
import time

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_sizes import SMALL
from small_cohort import C, P, T, close, local_config, make_decoder, spear

from spear_jax.core.mesh import make_mesh, replicate, shard_rows
from spear_jax.core.pytrees import digest
from spear_jax.experiment import builder, presets
from spear_jax.experiment.checkpoint import restore
from spear_jax.federated import local_training
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.models.attention import attend, seen_in_tree
from spear_jax.models.decoder import logits, merge
from spear_jax.rollout.sampler import Sampler
from spear_jax.rollout.token_sampling import SamplingConfig

pytestmark = pytest.mark.gpu
TRAIN = jax.jit(local_training.train_cohort, static_argnums=(0, 1, 2, 3, 4, 5))


@pytest.fixture(scope="module")
def gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU, or JAX without CUDA (pip install -e .[cuda])")


@pytest.fixture(scope="module")
def cpu(gpu):
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        pytest.skip("JAX sees no CPU beside the GPU; set JAX_PLATFORMS=cuda,cpu")


def narrowed(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def apart(left, right):
    """The norm of a difference, over the norm."""
    left, right = (np.asarray(x, np.float64) for x in (left, right))
    return np.linalg.norm(left - right) / np.linalg.norm(right)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_logits_are_those_of_the_cpu(gpu, cpu, model, lora, dtype, bound):
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (4, 33))
    base = narrowed(model.base) if dtype == "bfloat16" else model.base

    def on(device):
        put = lambda tree: jax.device_put(tree, device)
        run = jax.jit(logits, static_argnums=0)
        with jax.default_matmul_precision("highest"):
            mask = put(np.ones(tokens.shape, bool))
            return run(make_decoder(model), put(lora), put(base), put(tokens), mask)

    assert apart(on(gpu), on(cpu)) < bound


def trained(device, model, lora, cohort, at_once=1, dropout=0.0):
    """Σ w θ of the small cohort's clients after local training on a device."""
    mesh, local = make_mesh([device]), local_config(clients_at_once=at_once)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(9), C)))
    work = dense.work(cohort, spear(), P, T)
    members = work, keys, np.arange(1, C + 1, dtype=np.float32), np.ones(C, bool)
    shared = local_training.Broadcast(lora, model.base, (), {}, jnp.float32(1e-2))
    static = spear(), make_decoder(model, dropout), local, mesh, Aggregation(), False
    put = shard_rows(members, mesh)
    return TRAIN(*static, replicate(shared, mesh), None, *put)[0][0]


@pytest.mark.parametrize("at_once", [1, 3])
def test_local_training_gives_the_adapter_of_the_cpu(gpu, cpu, model, lora, cohort, at_once):
    with jax.default_matmul_precision("highest"):
        there = trained(gpu, model, lora, cohort, at_once)
        here = trained(cpu, model, lora, cohort, at_once)
    moved = lambda tree: jax.tree.map(lambda x, y: np.asarray(x) - 21 * np.asarray(y), tree, lora)
    close(moved(there), moved(here), 1e-3)  # of the change that training made, with 21 = Σ w


@pytest.mark.parametrize("at_once", [1, 3])
def test_local_training_repeats_bit_for_bit(gpu, model, lora, cohort, at_once):
    runs = {digest(trained(gpu, model, lora, cohort, at_once, dropout=0.1)) for _ in range(5)}
    assert len(runs) == 1


def generated(device, model, lora, temperature, prompts=40):
    rng = np.random.default_rng(1)
    asked = [
        rng.integers(3, model.config.vocab_size, rng.integers(2, 40)).tolist()
        for _ in range(prompts)
    ]
    keys = np.random.default_rng(2).integers(0, 1 << 32, (prompts, 2), np.uint32)
    how = SamplingConfig(
        max_new_tokens=12, temperature=temperature, top_k=0, top_p=0.9, eos_ids=(2,), pad_id=0,
        max_rows=16, steps_per_check=8,
    )  # fmt: skip
    mesh, decoder = make_mesh([device]), make_decoder(model)
    put = lambda tree: jax.device_put(tree, device)
    base = merge(put(model.base), put(lora), decoder.lora)
    sampler = Sampler(decoder, lambda x: shard_rows(x, mesh), spread=lambda x: replicate(x, mesh))
    return sampler.generate(None, base, asked, keys, how)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_gives_the_tokens_of_the_cpu(gpu, cpu, model, lora, temperature):
    with jax.default_matmul_precision("highest"):
        there = generated(gpu, model, lora, temperature)
        here = generated(cpu, model, lora, temperature)
    for ours, theirs in zip(there, here, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_generation_repeats_bit_for_bit(gpu, model, lora):
    one, other = (generated(gpu, model, lora, 1.0) for _ in range(2))
    assert [x.tokens for x in one] == [x.tokens for x in other]
    assert [x.logprobs for x in one] == [x.logprobs for x in other]


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("queries, keys", [(128, 128), (77, 301)])
def test_flash_attention_and_its_gradient_are_those_of_xla(gpu, clients, queries, keys):
    rng = np.random.default_rng(clients)
    draw = lambda *shape: jax.device_put(rng.normal(size=shape).astype(jnp.bfloat16), gpu)
    q, change = (draw(clients, 4, queries, 12, 128) for _ in range(2))
    key, value = (draw(clients, 4, 2, keys, 128) for _ in range(2))
    branches = jax.device_put(rng.integers(0, 3, (clients, 4, keys)), gpu)
    visible = jax.vmap(seen_in_tree, (0, None))(branches, queries)

    def both(kernel, q, key, value, change):
        attention = jax.vmap(lambda *x: attend(*x, kernel))
        out, pull = jax.vjp(lambda *x: attention(*x, visible), q, key, value)
        return out, *pull(change)

    run = jax.jit(both, static_argnums=0)
    wide = (x.astype(jnp.float32) for x in (q, key, value, change))
    with jax.default_matmul_precision("highest"):
        exact = run("xla", *wide)
    for ours, right in zip(run("cudnn", q, key, value, change), exact, strict=True):
        assert apart(ours, right) < 1e-2


def test_a_run_that_is_killed_ends_with_the_same_bits(gpu, tmp_path):
    sizes = SMALL | {"rounds": 3}
    flags = [f"--config.{name}={value}" for name, value in sizes.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def start(workdir):
        command = [sys.executable, "-m", "spear_jax.train", "--config=configs/quickstart.py"]
        command += [f"--workdir={workdir}", *flags, "--quiet"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, **quiet)

    def finish(workdir):
        process = start(workdir)
        told = process.communicate(timeout=200)[1]
        assert process.returncode == 0, told.decode()[-3000:]

    def lines(workdir):
        text = (workdir / "metrics.jsonl").read_text()
        plain = lambda name: not name.startswith(("time", "memory", "compile", "budget/seconds"))
        return [
            {name: value for name, value in json.loads(line).items() if plain(name)}
            for line in text.splitlines()
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    process = start(killed)
    while process.poll() is None:
        if (killed / "metrics.jsonl").exists() and len(lines(killed)) > 1:
            break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(killed)
    config = presets.quickstart()
    config.update_from_flattened_dict(sizes)
    built = builder.build(config, [gpu])
    states = [restore(built, folder, None)[0] for folder in (whole, killed)]
    assert digest((states[0].lora, states[0].opt_state)) == digest(
        (states[1].lora, states[1].opt_state)
    )
    assert lines(whole) == lines(killed)
