"""Flower's apps beside a simulated run. Needs the extra `flower`."""

import dataclasses
import gzip
import json
import tomllib

import jax
import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install -e .[flower]")

from flwr.app import Array, ConfigRecord
from loopback import Loopback

import spear_jax as sj
from spear_jax.core.errors import UserError
from spear_jax.core.types import Mean
from spear_jax.experiment.run import Run
from spear_jax.federated.local_training import NOT_FINITE
from spear_jax.federated.privacy import central
from spear_jax.federated.privacy.accounting import Account
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.single_client import ClientUpdate
from spear_jax.flower import messages, node, noise, server
from spear_jax.flower.__main__ import main
from spear_jax.flower.terms import Terms, with_own
from spear_jax.models.params import Adapter, LowRank

SMALL = {
    "rounds": 2,
    "record_traces": True,
    "federation.num_clients": 2,
    "federation.clients_per_round": 2,
    "rollout.examples": 4,
    "rollout.max_concurrent_sequences": 16,
    "train.steps": 2,
    "train.batch_size": 4,
    "eval.limit": 4,
    "lora.rank": 2,
    "lora.targets": ("q", "down"),  # each more is time to compile
}

PRIVATE = {
    "privacy.noise_multiplier": 0.5,
    "privacy.clip": 0.02,
    "federation.weighting": "uniform",
}


@pytest.fixture(scope="module")
def config():
    config = sj.preset("spear", task="facts", model="tiny", variants=["small"])
    config.update_from_flattened_dict(SMALL)
    return config


@pytest.fixture(scope="module")
def pair(config, tmp_path_factory):
    """A simulated and a deployed run, each of two rounds; their states after each."""
    folder = tmp_path_factory.mktemp("flower")
    simulated = Run(config, folder / "simulated", quiet=True, devices=jax.devices()[:1])
    real = deployed(config, folder / "real")
    states = [(simulated.state, real.state)]
    lines = []
    for mine, theirs in zip(simulated, real, strict=True):
        states.append((simulated.state, real.state))
        lines.append((mine.metrics, theirs.metrics))
    return folder, states, lines, real.grid.wire


def deployed(config, folder, change=lambda node, kind, reply: reply, **terms):
    """A run on two nodes in this process."""
    terms = {"experiment": json.dumps(config.to_dict()), "workdir": str(folder / "server")} | terms
    nodes = [{"client": c, "folder": str(folder / f"node{c}")} for c in range(2)]
    terms = Terms(**terms)
    return server.DeployedRun(
        Loopback(nodes, vars(terms), change), terms, devices=jax.devices()[:1]
    )


def read(file):
    return list(map(json.loads, gzip.decompress(file.read_bytes()).splitlines()))


def traces(folder, round):
    """(client, example, attempt) -> its tokens or text, verdict and feedback."""
    said = {}
    for file in sorted(folder.glob(f"**/traces/round_{round:05d}.jsonl.gz")):
        for trace in read(file):
            name = trace["client"], trace["example"]
            said[*name, 0] = trace["tokens"]["id"], trace["correct"]
            for number, attempt in enumerate(trace["revisions"], 1):
                said[*name, number] = attempt["text"], attempt["correct"], attempt["feedback"]
    return said


def distance(left, right, start):
    """‖left − right‖ in units of ‖right − start‖."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    left, right, start = map(flat, (left, right, start))
    return np.linalg.norm(left - right) / np.linalg.norm(right - start)


def test_a_deployed_run_is_the_simulated_one(pair):
    folder, states, lines, _ = pair
    start = states[0][0].lora
    for round, (mine, theirs), bound in zip((1, 2), states[1:], (1e-5, 1e-3), strict=True):
        there = traces(folder / "real", round)
        assert there and there == traces(folder / "simulated", round)
        assert distance(theirs.lora, mine.lora, start) < bound
    for mine, theirs in lines:
        for name in ("rollout/wins", "rollout/first_accuracy", "round/bytes_up", "eval/accuracy"):
            assert theirs[name] == mine[name], name
        assert theirs["train/loss"] == pytest.approx(mine["train/loss"], rel=1e-3)
        assert theirs.keys() - mine.keys() == {
            "participation/lost", "participation/late", "participation/refused",
            "flower/bytes_down", "flower/bytes_up", "flower/seconds", "time/node",
            "time/node_compile",
        }  # fmt: skip


def test_messages_hold_adapters_and_no_text(pair):
    folder, states, lines, wire = pair
    sent = b"".join(wire)
    _, real = states[1]
    for leaf in jax.tree.leaves(real.lora):  # the second request brings it
        assert np.asarray(leaf).tobytes() in sent
    texts, tokens = set(), []
    for file in (folder / "real").glob("**/traces/*.gz"):
        for trace in read(file):
            texts |= {trace["prompt"], trace["y0"], *trace["options"].values()}
            texts |= {text for one in trace["revisions"] for text in (one["feedback"], one["text"])}
            tokens.append(trace["tokens"]["id"])
    texts = {text for text in texts if len(text) > 3}
    assert len(texts) > 20 and not [text for text in texts if text.encode() in sent]
    kinds = (np.uint8, np.int16, np.int32, np.int64, np.float32)
    longer = [ids for ids in tokens if len(ids) > 3]
    assert not [ids for ids in longer for kind in kinds if np.array(ids, kind).tobytes() in sent]
    for _, line in lines:  # what travels is what the metrics count, and a little more
        assert 1 <= line["flower/bytes_up"] / line["round/bytes_up"] < 1.5


def test_a_secure_sum_is_the_simulated_round(pair, config, tmp_path):
    _, states, lines, plain = pair
    config = config.copy_and_resolve_references()
    config.federation.secure_sum = True

    def change(node, kind, reply):
        gone = kind == "train.mask" and reply.metadata.group_id == "2" and node == 2
        return None if gone else reply

    run = deployed(config, tmp_path, change, deadline=20.0)
    rounds = iter(run)
    line, wanted = next(rounds).metrics, lines[0][0]
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    mass = wanted["rollout/wins"]  # of two clients, each right to half a step
    step = 2 / 2**17 / mass
    start = states[0][0].lora
    rounding = 2e-5 * np.linalg.norm(flat(states[1][0].lora) - flat(start))
    np.testing.assert_allclose(flat(run.state.lora), flat(states[1][0].lora), atol=step + rounding)
    assert distance(run.state.lora, states[1][0].lora, start) < 1e-2
    for name in wanted.keys() - {"eval/accuracy"}:
        if not name.startswith(("time/", "budget/seconds", "compile/", "memory/", "aggregation/")):
            assert line[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), name
    assert line["secure/clipped"] == 0
    sent = b"".join(run.grid.wire)
    for name in (b"q.b", b"q.a"):
        assert sent.count(name) < b"".join(plain).count(name)
    assert not list((tmp_path / "node0").rglob("secure/*"))
    with pytest.raises(UserError, match="1 of the 2 clients that have trained are there to mask"):
        run.terms = dataclasses.replace(run.terms, deadline=0.1)
        next(rounds)
    assert run.finished_rounds == 1


def test_noise_is_added_to_a_secure_sum_and_where_there_is_none(config, tmp_path):
    pytest.importorskip("dp_accounting")
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(PRIVATE | {"federation.secure_sum": True})

    def change(node, kind, reply):
        gone = kind == "train.share" and reply.metadata.group_id == "2" and node == 2
        return None if gone else reply

    run = deployed(config, tmp_path, change, deadline=20.0)
    privacy, rounds = run.experiment.federation.aggregation.privacy, iter(run)
    start, line = run.state.lora, next(rounds).metrics
    assert line["round/clients"] == 2 and line["privacy/epsilon"] == privacy.account.epsilon(1)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    drawn = privacy.normal(central.NOISE, 1)
    noisy = flat(jax.tree.map(lambda x: 0.5 * 0.02 * drawn(x.shape), start))
    total = 2 * (flat(run.state.lora) - flat(start)) - noisy  # of two clients, clipped to 0.02
    assert 0.02 < np.linalg.norm(total) < 0.04 + 1e-6
    signal = line["privacy/snr"] * 0.5 * 0.02 * np.sqrt(total.size)
    assert np.linalg.norm(total) == pytest.approx(signal, rel=1e-3)
    before, run.terms = run.state.lora, dataclasses.replace(run.terms, deadline=0.1)
    line = next(rounds).metrics
    counts = [line[f"participation/{x}"] for x in ("lost", "late")]
    assert line["round/clients"] == 0 and counts == [1, 1]
    assert line["privacy/epsilon"] == privacy.account.epsilon(2)
    drawn = privacy.normal(central.NOISE, 2)
    alone = flat(jax.tree.map(lambda x: 0.5 * 0.02 * drawn(x.shape) / 2, start))
    np.testing.assert_allclose(flat(run.state.lora) - flat(before), alone, atol=1e-6)


def test_a_killed_server_goes_on_where_it_was(pair, config, tmp_path):
    folder, states, _, _ = pair
    with deployed(config, tmp_path) as killed:
        next(iter(killed))
        name = killed.run_id
    again = deployed(config, tmp_path)
    assert again.finished_rounds == 1 and again.run_id == name
    assert [round.number for round in again] == [2]
    assert distance(again.state.lora, states[2][1].lora, states[0][1].lora) == 0
    assert json.loads((tmp_path / "server/summary.json").read_text())["rounds"] == 2


def test_a_round_ends_without_those_who_send_nothing_or_nonsense(pair, config, tmp_path):
    def change(node, kind, reply):
        if kind == "train" and node == 2:
            if reply.metadata.group_id == "2":
                return None
            record = reply.content["update"]
            record["q.b"] = Array(np.full_like(record["q.b"].numpy(), np.nan))
        return reply

    run = deployed(config, tmp_path, change, deadline=0.5)
    one, two = [round.metrics for round in run]
    counts = lambda line: [line[f"participation/{x}"] for x in ("lost", "late", "refused")]
    assert counts(one) == [0, 0, 1] and counts(two) == [0, 1, 0]
    assert one["round/clients"] == two["round/clients"] == 1
    lines = [json.loads(x) for x in (tmp_path / "server/clients.jsonl").read_text().splitlines()]
    results = [(x["round"], x["client"], x["result"]) for x in lines]
    assert results == [(1, 0, "ok"), (1, 1, "refused"), (2, 0, "ok"), (2, 1, "late")]
    assert "q.b has numbers that are NaN" in lines[1]["why"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.state.lora))


def test_a_round_without_any_update_says_why(config, tmp_path):
    def change(node, kind, reply):
        if kind == "train":
            reply.content["answer"] = ConfigRecord({"protocol": 2})
        return reply if node == 1 else None

    with pytest.raises(UserError, match="speaks protocol 2 and this side 1; install the same"):
        deployed(config, tmp_path, change, deadline=0.1).train()


def private(config, folder, **parts):
    """A private run on nodes that are not there."""
    pytest.importorskip("dp_accounting")
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(PRIVATE)
    config.federation.num_clients = 40
    terms = Terms(json.dumps(config.to_dict()), str(folder), deadline=0.1)
    return server.DeployedRun(Loopback([], {}), terms, devices=jax.devices()[:1], **parts)


def test_a_private_run_adds_noise_of_its_own_whoever_replies(config, tmp_path):
    run = private(config, tmp_path / "own")
    start, account = run.state.lora, run.experiment.federation.aggregation.privacy.account
    first = next(iter(run))
    run.close()
    again = private(config, tmp_path / "own")  # killed, it goes on with other noise
    assert again.finished_rounds == 1
    second = next(iter(again))
    for number, line in enumerate((first.metrics, second.metrics), 1):
        assert line["participation/lost"] == 2 and line["round/clients"] == 0
        assert line["privacy/epsilon"] == account.epsilon(number)
    whose = [one.experiment.federation for one in (run, again)]
    cohorts = [[one.cohort(r).clients for r in range(20)] for one in whose]
    secret = [one.aggregation.privacy.secret for one in whose]
    assert cohorts[0] != cohorts[1] and secret[0] != secret[1]
    known = private(config, tmp_path / "known", secret=secret[0])
    next(iter(known))
    assert distance(known.state.lora, run.state.lora, start) == 0
    noises = [again.state.lora, known.state.lora]
    assert distance(*noises, start) > 0.5
    for file in (tmp_path / "own").rglob("*"):  # it is kept nowhere
        content = file.read_bytes() if file.is_file() else b""
        for own, seed in zip(secret, (one.seed for one in whose), strict=True):
            assert own not in content and own.hex().encode() not in content
            assert str(seed).encode() not in content


def test_secret_noise_is_normal_and_of_its_round():
    account = Account(1.0, 9, 9, "poisson", 0, 1e-3)
    private = noise.SecretPrivacy(account, 0.5, secret=bytes(range(32)))
    drawn = private.normal(7, 1)
    one, two = drawn((400, 250)), drawn((100_001,))
    for numbers in (one.ravel(), two):
        assert abs(numbers.mean()) < 4.5 / np.sqrt(1e5)
        assert numbers.var() == pytest.approx(1.0, abs=4.5 * np.sqrt(2 / 1e5))
        share = np.mean(np.abs(numbers) < 1.959964)  # 95 %
        assert share == pytest.approx(0.95, abs=4.5 * np.sqrt(0.95 * 0.05 / 1e5))
    others = [private.normal(*path)((400, 250)) for path in ((7, 2), (8, 1))]
    for other in (*others, two[:100_000]):
        assert abs(np.corrcoef(one.ravel(), np.ravel(other))[0, 1]) < 4.5 / np.sqrt(1e5)
    np.testing.assert_array_equal(private.normal(7, 1)((400, 250)), one)


def test_nodes_of_a_private_run_are_told_nothing_of_each_other(config, tmp_path):
    run = private(config, tmp_path)
    run.line = {"budget/tokens": 77.0, "budget/flops": 7e9, "budget/seconds": 7.0}
    run.nodes.node = {3: 1}
    sent = []
    run.grid.push_messages = lambda messages: sent.extend(messages) or ["name"]
    run._ask([3], 1)
    asked = sent[0].content["asked"]
    assert [asked[f"used_{name}"] for name in vars(BudgetUsed())] == [0, 0, 0]


def test_a_private_round_does_not_end_by_quorum(tmp_path):
    pytest.importorskip("dp_accounting")
    fields = [f"--config.{name}={value}" for name, value in PRIVATE.items()]
    argv = ["--config=quickstart", "--app=nowhere", f"--workdir={tmp_path}", *fields]
    with pytest.raises(UserError, match="--quorum is 0.5, .*set --quorum=1"):
        main([*argv, "--quorum=0.5"])


def test_a_node_is_met_by_its_client(capsys):
    def change(node, kind, reply):
        if node == 4:
            reply.content["hello"]["protocol"] = 2
        return reply

    configs = [{"client": 1}, {"client": 1}, {"client": 7}, {"client": 0}, {}]
    grid = Loopback(configs, {}, change)
    nodes = server.Nodes(grid, 3, patience=0.0)
    nodes.find([0, 1])
    assert nodes.node == {1: 1}
    told = capsys.readouterr().err
    for words in (
        "node 2 is refused: it says that it is client 1, and node 1 is that",
        "node 3 is refused: it says that it is client 7, not one of 0 to 2",
        "node 4 is refused: it speaks protocol 2",
        "node 5 is refused: it says that it is client -1",
    ):
        assert words in told
    del grid.nodes[1]  # it was started anew, as node 2
    nodes.find([0, 1])
    assert nodes.node == {1: 2}


# Messages


@pytest.fixture
def adapter():
    return Adapter(q=LowRank(np.ones((1, 3, 2), np.float32), np.zeros((1, 2, 4), np.float32)))


@pytest.fixture
def update(adapter):
    half = jax.tree.map(lambda x: x + np.float32(0.5), adapter)
    counts = {"loss": Mean(3.0, 2.0), NOT_FINITE: Mean(0.0, 1.0)}
    return ClientUpdate(half, 5.0, True, counts, {"rollout/wins": 5.0}, (8, 3), 1e-3, {}, [])


def test_an_update_arrives_as_it_was_sent(adapter, update):
    got = messages.read_update(messages.write_update(update, "ab"), adapter, "ab")
    assert (got.weight, got.active, got.answers, got.learning_rate) == (5.0, True, (8, 3), 1e-3)
    assert got.counts["loss"].value() == 1.5 and got.metrics == {"rollout/wins": 5.0}
    jax.tree.map(np.testing.assert_array_equal, got.update, update.update)


def test_a_factor_that_is_not_sent_is_zero(adapter, update):
    records = messages.write_update(update, "b")
    assert list(records["update"]) == ["q.b"]
    got = messages.read_update(records, adapter, "b").update.q
    assert not got.a.any() and (got.b == 0.5).all()


@pytest.mark.parametrize(
    "record, name, value, why",
    [
        ("update", "q.a", Array(np.ones((1, 3, 3), np.float32)), r"float32\(1, 3, 3\), not"),
        ("update", "q.a", Array(np.ones((1, 3, 2))), "float64"),
        ("update", "q.a", Array(np.full((1, 3, 2), np.inf, np.float32)), "NaN or infinite"),
        ("update", "q.a", Array("float32", (1, 3, 2), "numpy.ndarray", b"nonsense"), "be read"),
        ("update", "k.a", Array(np.ones(1, np.float32)), "arrays are not q.a, q.b"),
        ("own", "weight", -1.0, "below 0"),
        ("own", "weight", float("inf"), "not finite"),
        ("metrics", "rollout/wins", float("nan"), "not finite"),
        ("counts", "loss", [float("nan"), 1.0], "finite total and count"),
        ("answer", "protocol", 2, "protocol 2"),
        ("answer", "refused", "no disk", "no disk"),
    ],
)
def test_nonsense_is_refused(adapter, update, record, name, value, why):
    records = messages.write_update(update, "ab")
    records[record][name] = value
    with pytest.raises(messages.Refused, match=why):
        messages.read_update(records, adapter, "ab")


@pytest.mark.parametrize("record", ["answer", "update", "own", "metrics", "counts"])
def test_a_message_without_a_part_is_refused(adapter, update, record):
    records = messages.write_update(update, "ab")
    del records[record]
    with pytest.raises(messages.Refused):
        messages.read_update(records, adapter, "ab")


def test_a_node_refuses_a_server_of_another_protocol(adapter):
    records = messages.write_request(messages.Request("ab" * 8, 0, 1, adapter, {}, BudgetUsed()))
    records["asked"]["protocol"] = 7
    with pytest.raises(messages.Refused, match="protocol 7"):
        node.answer(records, {"client": 0, "folder": "nowhere"}, {})


def test_a_node_goes_back_where_its_server_does(tmp_path):
    own = node.Node(None, 0, tmp_path)
    for round in (1, 2, 4):
        own._keep(tmp_path, round, {"iteration": np.full(3, round)})
    assert [int(own._state(tmp_path, round)["iteration"][0]) for round in (5, 4, 3)] == [4, 2, 2]
    assert len(list((tmp_path / "state").iterdir())) == 2
    own._keep(tmp_path, 3, {"iteration": np.full(3, 3)})  # round 4 was not saved on the server
    assert int(own._state(tmp_path, 5)["iteration"][0]) == 3


# Settings


def test_the_command_writes_an_app_that_flower_takes(tmp_path):
    from flwr.cli.build import build_fab_from_disk

    argv = ["--config=quickstart", f"--app={tmp_path / 'app'}", f"--workdir={tmp_path / 'run'}"]
    result = main([*argv, "--deadline=30", '--config.data.chat_template_kwargs={"a": "b"}'])
    assert result["clients"] == 8
    app = tomllib.loads((tmp_path / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    terms = Terms.read(app["config"])
    assert (terms.deadline, terms.quorum, terms.workdir) == (30.0, 1.0, str(tmp_path / "run"))
    assert terms.config().data.chat_template_kwargs == '{"a": "b"}'
    assert len(build_fab_from_disk(tmp_path / "app")) < 20_000


def test_a_node_sets_its_data_and_nothing_that_all_must_share(config):
    own = {"client": 0, "folder": "x", "data.path": "mine.jsonl", "rollout.feedback": "none"}
    config = with_own(config, own)
    assert (config.data.path, config.rollout.feedback) == ("mine.jsonl", "none")
    with pytest.raises(UserError, match="cannot set 'train.steps'"):
        with_own(config, {"client": 0, "folder": "x", "train.steps": 3})


def test_a_node_trains_on_its_own_file_however_small(tmp_path):
    rows = [{"question": f"What is {i}?", "answers": str(i)} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = sj.preset("spear", task="qa", model="tiny")
    terms = vars(Terms(json.dumps(config.to_dict()), "elsewhere"))
    own = {"client": 2, "folder": str(tmp_path), "data.path": str(tmp_path)}
    federation = node.build_node(own, terms).experiment.federation
    assert [list(own) for own in federation.clients] == [[], [], [0, 1, 2], []]
    with pytest.raises(UserError, match="client is 4, but federation.num_clients is 4"):
        node.build_node(own | {"client": 4}, terms)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"attack.kind": "sign_flip", "attack.fraction": 0.5}, "attack.kind"),
        ({"compression.kind": "topk"}, "compressed"),
        ({"participation.dropout": 0.1}, "clock"),
        ({"participation.mode": "fedbuff"}, "clock|cohort"),
        ({"federation.drift": "scaffold"}, "drift"),
        ({"federation.secure_sum": True, "federation.sampling": "poisson"}, "may ask one client"),
        (
            PRIVATE
            | {"federation.secure_sum": True, "privacy.adaptive": True, "privacy.sigma_b": 2.0},
            "which federation.secure_sum hides",
        ),
        ({"privacy.local_noise": 1.0, "federation.weighting": "uniform"}, "privacy.local_noise"),
        (PRIVATE | {"budget.tokens": 1000}, "takes? rounds alone"),
        (
            {"federation.secure_sum": True, "federation.clients_per_round": 1},
            "hides a client among",
        ),
        ({"personal.ditto": True}, "personal"),
        ({"personal.finetune": 2}, "personal"),
        ({"federation.lora_rule": "fedsa"}, "fedsa"),
        ({"federation.aggregation": "local"}, "local"),
        ({"rollout.feedback": "simulated"}, "node-config"),
    ],
)
def test_what_holds_in_simulation_alone_is_refused(change, why):
    fields = [f"--config.{name}={value}" for name, value in change.items()]
    with pytest.raises(UserError, match=why):
        main(["--config=quickstart", "--app=nowhere", "--workdir=nowhere", *fields])
