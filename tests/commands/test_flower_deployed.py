"""A superlink and three supernodes on this machine, beside a simulated run: minutes a method."""

import gzip
import json
import time

import jax
import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install -e .[flower]")

from deployment import Deployment

import spear_jax as sj
from spear_jax.experiment.checkpoint import restore
from spear_jax.experiment.run import Run

pytestmark = pytest.mark.slow
SMALL = {
    "rounds": 3,
    "record_traces": True,
    "federation.num_clients": 4,
    "federation.clients_per_round": 3,
    "rollout.examples": 4,
    "rollout.max_concurrent_sequences": 16,
    "train.steps": 2,
    "train.batch_size": 4,
    "eval.limit": 4,
    "lora.rank": 2,
    "lora.targets": ("q", "down"),
    "checkpoint.keep_last": 4,
}


def config_of(method):
    config = sj.preset(method, task="facts", model="tiny", variants=["small"])
    config.update_from_flattened_dict(SMALL)
    return config


def traces(folder, round):
    """(client, example) -> its first tokens, revisions and verdicts, as text."""
    said = {}
    for file in folder.glob(f"**/traces/round_{round:05d}.jsonl.gz"):
        for trace in map(json.loads, gzip.decompress(file.read_bytes()).splitlines()):
            what = trace["tokens"]["id"], trace["correct"], trace["revisions"], trace["role"]
            said.setdefault((trace["client"], trace["example"]), []).append(what)
    return said


def adapter_of(run, folder, round):
    state, _ = restore(run.experiment, folder, round)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.lora)])


@pytest.mark.parametrize(
    "method, secure",
    [("spear", False), ("spear", True), ("feedback_sft", False), ("grpo", False), ("spin", False)],
)
def test_three_rounds_on_supernodes_are_the_simulated_ones(method, secure, tmp_path):
    config = config_of(method)
    simulated = Run(config, tmp_path / "simulated", quiet=True, devices=jax.devices()[:1])
    simulated.train()
    config.federation.secure_sum = secure
    config.aggregation.secure_bits = 24  # rounds less than a node does
    with Deployment(tmp_path / "real", nodes=4) as there:
        there.run(config, tmp_path / "server", deadline=600.0)
    start = adapter_of(simulated, tmp_path / "simulated", 0)
    # AdamW divides by the gradient, so that rounding of a gradient near zero moves a number as far as
    # any gradient does: at these sizes one number in 200 at most
    for round, bound in ((1, 1e-5), (2, 1e-3), (3, 1e-3)):
        said = traces(tmp_path / "real", round)
        assert len({client for client, _ in said}) == 3
        assert said == traces(tmp_path / "simulated", round)
        mine, theirs = (adapter_of(simulated, tmp_path / x, round) for x in ("simulated", "server"))
        apart, moved = np.sort(np.abs(mine - theirs)), np.linalg.norm(mine - start)
        nearest = np.linalg.norm(apart[: len(apart) * 199 // 200]) / moved
        whole = np.linalg.norm(apart) / moved
        print(f"{method} round {round}: {whole:.1e} of the update's norm, {nearest:.1e} of most")
        assert nearest < bound and whole < 1e-3
    lines = [json.loads(x) for x in (tmp_path / "server/clients.jsonl").read_text().splitlines()]
    assert [x["result"] for x in lines] == ["ok"] * 9


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def lines_of(file):
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def test_a_node_dies_in_a_round_and_the_server_between_rounds(tmp_path):
    config, server = config_of("spear"), tmp_path / "server"
    config.federation.num_clients = 3
    with Deployment(tmp_path / "real") as there:
        there.run(config, server, wait=False, deadline=600.0)
        log = tmp_path / "real/node2.log"
        wait_for(lambda: "ROUND 1" in log.read_text())
        began = time.monotonic()
        there.kill("node2")
        wait_for((server / "checkpoints/1").exists)
        print(f"round 1 ended {time.monotonic() - began:.0f} s after its node was killed")
        assert there.kill_started("flwr-serverapp")
        there.start_node(2)
        there.run(config, server, deadline=600.0)
    results = [(x["round"], x["client"], x["result"]) for x in lines_of(server / "clients.jsonl")]
    last = {(round, client): result for round, client, result in results}
    assert last == {
        (r, c): "lost" if (r, c) == (1, 2) else "ok" for r in (1, 2, 3) for c in range(3)
    }
    lines = lines_of(server / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert [line.get("participation/lost") for line in lines] == [None, 1, 0, 0]
    assert [line.get("round/clients") for line in lines] == [None, 2, 3, 3]
    assert json.loads((server / "summary.json").read_text())["rounds"] == 3
