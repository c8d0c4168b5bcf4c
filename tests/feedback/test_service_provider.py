"""A run that is taught through the service: two people, kills, and late people."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import environment
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.core.errors import UserError
from spear_jax.feedback.recorded import FILE, FeedbackSettings
from spear_jax.feedback.registry import get_feedback
from spear_jax.feedback.service import Service

pytest.importorskip("httpx", reason="live feedback needs pip install -e .[live]")
pytest.importorskip("uvicorn", reason="live feedback needs pip install -e .[live]")

import httpx
from people import TASK, Person, serve


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The service in a process of its own, at a free port: (url, tokens by name)."""
    flags = ("--people=2", "--clients=2")
    with serve(tmp_path_factory.mktemp("service"), *flags) as (url, tokens):
        yield url, tokens


def config(url, **fields):
    made = sj.preset("spear", task="few_facts", model="tiny", variants=["live"])
    made.update_from_flattened_dict(
        SMALL
        | {"rounds": 2, "federation.num_clients": 2, "federation.clients_per_round": 2}
        | {"feedback.url": url, "rollout.feedback": "service"}
        | fields
    )
    return made


@pytest.fixture
def people(service, monkeypatch):
    url, tokens = service
    monkeypatch.setenv("SPEAR_FEEDBACK_TOKEN", tokens["trainer"])
    started = []

    def start(count=2, **given):
        for i in range(count):
            person = Person(url, tokens[f"person-{i}"], TASK.generate("train"), **given)
            person.start()
            started.append(person)
        return started

    yield start
    for person in started:
        person.done.set()
        person.join(30)


def lines(folder, file):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def said_in(folder):
    """What was asked of people, without the chat's answers."""
    return [line for line in lines(folder, FILE) if "answered" in line]


def test_two_people_teach_a_run_and_a_replay_gives_the_same_bits(service, people, tmp_path):
    url, tokens = service
    both = people()
    run = sj.Run(config(url, **{"feedback.asks": "verdict"}), tmp_path / "taught", quiet=True)
    run.train()
    said = said_in(tmp_path / "taught")
    assert {line["user"] for line in said} == {"person-0", "person-1"}
    assert all(line["answered"] and int(line["user"][-1]) == line["client"] for line in said)
    assert sorted(line["id"] for line in said) == sorted(both[0].ids + both[1].ids)
    fields = {"rollout.feedback": "replay", "feedback.replay": str(tmp_path / "taught")}
    again = sj.Run(
        config(url, **fields, **{"feedback.asks": "verdict"}), tmp_path / "again", quiet=True
    )
    again.train()
    for one, other in zip(
        lines(tmp_path / "taught", "metrics.jsonl"),
        lines(tmp_path / "again", "metrics.jsonl"),
        strict=True,
    ):
        same = [x for x in one if not x.startswith(("time", "memory", "compile", "budget/sec"))]
        assert [one[name] for name in same] == [other[name] for name in same]
    status = httpx.get(
        f"{url}/api/status", headers={"Authorization": f"Bearer {tokens['person-0']}"}
    ).json()
    assert status["run"] == "taught" and status["phase"] == "done"
    assert [round for round, _ in status["curve"]] == [0, 1, 2]
    assert [sample["round"] for sample in status["samples"]] == [0, 1, 2]


def test_a_run_that_is_killed_among_people_asks_nobody_again(service, people, tmp_path):
    url, tokens = service
    folder = tmp_path / "killed"
    fields = {"feedback.asks": "hint", "federation.num_clients": 2}
    flags = [f"--config.{name}={value}" for name, value in (SMALL | fields).items()]
    command = [sys.executable, "-m", "spear_jax.train", "--config=spear:few_facts,tiny,live"]
    command += [*flags, "--config.rounds=1", "--config.federation.clients_per_round=2"]
    command += [f"--config.feedback.url={url}", f"--workdir={folder}", "--quiet"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}  # the second start is faster
    env = environment() | cache | {"SPEAR_FEEDBACK_TOKEN": tokens["trainer"]}
    process = subprocess.Popen(command, env=env)
    some = people(most=2)
    until = time.monotonic() + 120
    while sum(len(person.ids) for person in some) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {x for person in some for x in person.ids}
    assert len(before) == 4
    people()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = said_in(folder)
    ids = [line["id"] for line in said]
    assert len(set(ids)) == len(ids) and before <= set(ids) and len(ids) > 4
    assert all(line["answered"] for line in said)


def test_a_deadline_ends_the_waiting_and_the_rest_counts_for_nothing(service, people, tmp_path):
    url, _ = service
    people(most=1)
    fields = {"feedback.asks": "verdict", "feedback.deadline": 3.0, "rounds": 1}
    run = sj.Run(config(url, **fields), tmp_path / "late", quiet=True)
    (round,) = list(run)
    said = said_in(tmp_path / "late")
    answered = [line for line in said if line["answered"]]
    assert 1 <= len(answered) < len(said)
    assert round.metrics["feedback/answered"] == len(answered)
    assert len(round.traces) == len([line for line in answered if line["attempt"] == 0])


def slow_and_curious(url, tokens, chats):
    """Person 0 answers a request of round 1 after its end; person 1 asks in the chat."""
    clients = [
        httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {tokens[f'person-{i}']}"}, timeout=30
        )
        for i in range(2)
    ]
    example = TASK.generate("train")[0]

    def until(call, held):
        while not held(found := call()):
            time.sleep(0.1)
        return found

    def leases():
        reply = clients[0].post("/api/lease")
        return reply.json() if reply.status_code == 200 else None

    item = until(leases, bool)
    id = clients[1].post("/api/chats", json={"question": TASK.question(example)}).json()["id"]
    chat = until(lambda: clients[1].get(f"/api/chats/{id}").json(), lambda x: x["answer"])
    clients[1].put(f"/api/chats/{id}", json={"verdict": "right", "hint": None}).raise_for_status()
    chats.append((id, chat["answer"]))
    until(lambda: clients[0].get("/api/status").json()["phase"], lambda x: x != "asking")
    body = {"verdict": "right", "hint": None}
    clients[0].put(f"/api/answers/{item['id']}", json=body).raise_for_status()
    chats.append((item["id"], item["answer"]))


def test_late_verdicts_and_chats_are_trained_on_by_their_client(service, people, tmp_path):
    url, tokens = service
    people(count=0)
    chats = []
    given = (url, tokens, chats)
    helper = threading.Thread(target=slow_and_curious, args=given, daemon=True)
    folder = tmp_path / "beside"
    fields = {"feedback.asks": "verdict", "feedback.deadline": 8.0}
    run = sj.Run(config(url, **fields), folder, quiet=True)
    helper.start()
    run.train()
    helper.join(30)
    (chat, said), (late, answer) = chats
    held = {
        line.get("chat") or line["id"]: line for line in lines(folder, FILE) if "beside" in line
    }
    assert set(held) == {chat, late}
    assert (held[chat]["client"], held[late]["client"]) == (1, 0)
    for line, text in ((held[chat], said), (held[late], answer)):
        (attempt,) = line["attempts"]
        assert attempt["correct"] and attempt["text"].strip() == text
    assert held[late]["beside"] == 2 and held[late]["asked_in"] == 1
    told = lines(folder, "metrics.jsonl")
    assert sum(line.get("feedback/beside", 0) for line in told) == 2
    assert sum(line.get("rollout/wins", 0) for line in told) == 2


def test_a_revision_comes_while_others_think(service, people, tmp_path):
    """Person 0 is given the revision of an answer that they called wrong, while nothing of person 1
    has been answered.
    """
    url, tokens = service
    people(count=0)
    known = {TASK.question(example): example for example in TASK.generate("train")}
    first, second = (
        httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {tokens[f'person-{i}']}"}, timeout=30
        )
        for i in range(2)
    )
    revised = []

    def teach():
        until = time.monotonic() + 120
        while not revised and time.monotonic() < until:
            reply = first.post("/api/lease")
            if reply.status_code != 200:
                time.sleep(0.05)
                continue
            item = reply.json()
            if item["attempt"]:
                revised.append((item, second.get("/api/status").json()["mine"]))
            hint = TASK.hint(known[item["question"]], 3)
            body = {"verdict": "wrong", "hint": hint}
            first.put(f"/api/answers/{item['id']}", json=body).raise_for_status()
        people()  # who answer the rest

    helper = threading.Thread(target=teach, daemon=True)
    fields = {"feedback.asks": "verdict", "rounds": 1}
    run = sj.Run(config(url, **fields), tmp_path / "early", quiet=True)
    helper.start()
    run.train()
    helper.join(30)
    ((item, others),) = revised
    assert item["attempt"] == 1 and others == 0
    waves = [line["wave"] for line in said_in(tmp_path / "early")]
    assert waves == sorted(waves) and waves[0] == 1 and len(set(waves)) > 2


class ChatsWhileTraining(Service):
    """Holds the run where its clients begin to train, until somebody's chat is answered."""

    def end_rollouts(self):
        super().end_rollouts()
        question = {"question": TASK.question(TASK.generate("train")[0])}
        id = self.person.post("/api/chats", json=question).json()["id"]
        until = time.monotonic() + 120
        while time.monotonic() < until and not hasattr(self, "heard"):
            chat = self.person.get(f"/api/chats/{id}").json()
            if chat["answer"]:
                self.heard = chat["answer"], self.person.get("/api/status").json()["phase"]
            time.sleep(0.05)


def test_the_chat_is_answered_while_clients_train(service, people, tmp_path):
    url, tokens = service
    people()
    settings = FeedbackSettings(url=url, asks="verdict", show_right=True)
    voice = ChatsWhileTraining(TASK, 3, settings)
    headers = {"Authorization": f"Bearer {tokens['person-1']}"}
    voice.person = httpx.Client(base_url=url, headers=headers, timeout=30)
    run = sj.Run(
        config(url, **{"feedback.asks": "verdict", "rounds": 1}),
        tmp_path / "chats",
        quiet=True,
        feedback=voice,
    )
    run.train()
    answer, phase = voice.heard
    assert answer.strip() and phase == "training"
    jobs = [line for line in lines(tmp_path / "chats", FILE) if "question" in line]
    assert [line["made"]["text"].strip() for line in jobs] == [answer]


@pytest.mark.parametrize("url", ["", "ftp://here"])
def test_a_service_without_address_is_refused(url):
    with pytest.raises(UserError, match=f"feedback.url is '{url}'"):
        get_feedback("service", TASK, 3, FeedbackSettings(url=url))


def test_a_token_is_needed_to_train_and_not_to_read_the_run(monkeypatch, tmp_path):
    monkeypatch.delenv("SPEAR_FEEDBACK_TOKEN", raising=False)
    with sj.Run(config("http://127.0.0.1:9"), tmp_path / "run", quiet=True) as run:
        assert run.evaluate().count == 40
        with pytest.raises(UserError, match="SPEAR_FEEDBACK_TOKEN, which is empty"):
            run.train()


def test_a_run_goes_on_with_a_service_that_has_moved(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    sj.Run(config("http://127.0.0.1:9"), folder, quiet=True)
    monkeypatch.setenv("OTHER", "token")
    moved = config("http://127.0.0.1:10", **{"feedback.token": "OTHER"})
    run = sj.Run(moved, folder, quiet=True)
    assert run.config.feedback.url == "http://127.0.0.1:10"
    with pytest.raises(UserError, match="another config; differing: feedback.asks"):
        sj.Run(config("http://127.0.0.1:10", **{"feedback.asks": "verdict"}), folder, quiet=True)


def test_a_wrong_token_is_one_message(service, monkeypatch, tmp_path):
    monkeypatch.setenv("SPEAR_FEEDBACK_TOKEN", "nonsense")
    with pytest.raises(UserError, match="does not take POST /api/runs: 401"):
        sj.Run(config(service[0]), tmp_path / "run", quiet=True).train()
