"""What is stored: nothing is lost or doubled, whatever ends the process and whichever database."""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import serving
import sqlalchemy as sa
from serving import Clock

from spear_jax.core.errors import UserError
from spear_jax.service import rounds
from spear_jax.service.agreement import agreement
from spear_jax.service.database import Refused, User
from spear_jax.service.hub import Settings
from spear_jax.service.rounds import resolve
from spear_jax.service.store import Store

PEOPLE = [User(f"person-{number}", frozenset({"person"})) for number in range(4)]


def described(name="r", **more):
    return {
        "name": name, "task": "t", "clients": 2, "rounds": 3, "asks": "verdict",
        "show_right": False, "examples": [],
    } | more  # fmt: skip


def rows(*ids, **more):
    shared = {"client": 0, "attempt": 0, "question": "q", "answer": "a", "right": None}
    return [shared | {"id": id, "adapter": ""} | more for id in ids]


def opened(url, **settings):
    store = Store(url, **settings)
    store.open_run("trainer", described())
    return store


@pytest.fixture
def store(tmp_path):
    made = opened(f"sqlite:///{tmp_path}/x.db", clock=Clock())
    yield made
    made.close()


def test_sqlite_writes_ahead_and_waits_for_the_disk(store):
    with store.engine.connect() as on:
        pragmas = {
            name: on.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 10_000}


def test_calls_that_share_a_transaction_fail_alone(store):
    store.add_requests("trainer", "r", 1, rows("x", "y"))
    lease, answer = (
        functools.partial(method.within, store) for method in (Store.lease, Store.answer)
    )
    first, second = PEOPLE[:2]
    found = store.write(
        [
            (lease, (first,)),
            (answer, (second, "x", "right", None)),
            (lease, (second,)),
            (answer, (first, "x", "right", None)),
            (answer, (second, "y", "maybe right", "a hint", 7)),
        ]
    )
    assert [type(one) for one in found] == [dict, Refused, dict, bool, TypeError]
    assert found[1].status == 403 and found[2]["id"] == "y"
    assert [one["id"] for one in store.collect("r", 0, 2e9)[0]] == ["x"]
    with pytest.raises(Refused):
        store.answer(second, "x", "right", None)


def test_a_transaction_that_fails_is_made_again_as_if_for_the_first_time(store, monkeypatch):
    store.add_requests("trainer", "r", 1, rows("x"))
    store.lease(PEOPLE[0])
    store.clock.now += 121  # the next lease ends this one
    given, note = [], Store._note

    def fails_once(*args, **values):
        given.append(1)
        if len(given) == 1:
            raise sa.exc.OperationalError("x", {}, Exception("lost"))
        note(*args, **values)

    monkeypatch.setattr(Store, "_note", fails_once)
    assert store.lease(PEOPLE[1])["id"] == "x" and len(given) == 2
    with store.engine.connect() as on:
        assert on.exec_driver_sql("SELECT who FROM leases").scalars().all() == ["person-1"]


def test_a_run_that_asks_other_things_is_another_run(store):
    store.open_run("trainer", described(rounds=5))
    with pytest.raises(Refused, match="began with asks='verdict'"):
        store.open_run("trainer", described(asks="hint"))
    assert store.current["rounds"] == 5 and store.current["asks"] == "verdict"


def test_the_newest_run_is_current_after_a_restart(store, tmp_path):
    store.open_run("trainer", described("a"))
    store.clock.now += 1
    store.open_run("trainer", described("r"))
    again = Store(f"sqlite:///{tmp_path}/x.db")
    assert again.current["name"] == "r" and again.run("a")["task"] == "t"
    again.close()


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a?b=c#d %20 ü"
    folder.mkdir()
    store = Store(Settings(folder).url)
    store.close()
    assert (folder / "feedback.db").stat().st_size


def test_a_new_run_takes_people_from_the_old_one(store):
    store.add_requests("trainer", "r", 1, rows("old"))
    store.lease(PEOPLE[0])
    store.clock.now += 1
    store.open_run("trainer", described("new"))
    assert store.lease(PEOPLE[0]) is None
    store.add_requests("trainer", "new", 1, rows("fresh"))
    assert store.lease(PEOPLE[0])["id"] == "fresh"


def test_requests_are_bounded(store, monkeypatch):
    monkeypatch.setattr(rounds, "OPEN_REQUESTS", 3)
    assert store.add_requests("trainer", "r", 1, rows("a", "b")) == (2, 0)
    with pytest.raises(Refused) as caught:
        store.add_requests("trainer", "r", 1, rows("c", "d"))
    assert caught.value.status == 503
    assert store.add_requests("trainer", "r", 1, rows("a", "c")) == (1, 1)
    assert store.add_requests("trainer", "r", 1, rows("a", "b", "c")) == (0, 3)


def test_undo_of_a_voice_and_of_a_late_answer(tmp_path):
    store = opened(f"sqlite:///{tmp_path}/v.db", voices=2)
    store.add_requests("trainer", "r", 1, rows("x", "y"))
    for person in PEOPLE[:2]:
        assert store.lease(person)["id"] == "x"
    assert store.lease(PEOPLE[2])["id"] == "y"
    store.answer(PEOPLE[0], "x", "right", None)
    assert store.undo(PEOPLE[0])["id"] == "x"  # nothing was delivered
    assert store.collect("r", 0, 2e9) == ([], None)
    store.set_round("trainer", "r", {"round": 1, "phase": "training"}, True)
    store.answer(PEOPLE[1], "x", "wrong", "late")
    store.answer(PEOPLE[0], "x", "right", None)  # the first late one was delivered already
    store.answer(PEOPLE[2], "y", "right", None)
    assert store.undo(PEOPLE[2])["id"] == "y"
    found = [
        (one["id"], one["verdict"], one["late"], one.get("undone"))
        for one in store.collect("r", 0, 2e9)[0]
    ]
    assert found == [
        ("x", "wrong", True, None), ("y", "right", True, True),
    ]  # fmt: skip
    assert store.lease(PEOPLE[3]) is None
    store.close()


@pytest.mark.parametrize(
    "votes, told",
    [
        ([("right", None)], ("right", None)),
        ([("right", None), ("wrong", "a")], ("wrong", "a")),
        ([("right", None), ("wrong", "a"), ("right", None)], ("right", None)),
        ([("wrong", "a"), ("wrong", None), ("wrong", "b")], ("wrong", "a\n\nb")),
        ([(None, "a"), (None, None)], (None, "a")),
        ([(None, None)], (None, None)),
    ],
)
def test_several_verdicts_are_one(votes, told):
    assert resolve(votes) == told


def test_agreement_by_hand():
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section A: two observers,
    # ten units, binary data; alpha = 0.095.
    first, second = "0100000000", "1110010100"
    votes = [
        (unit, who, ("wrong", "right")[int(values[unit])])
        for who, values in (("a", first), ("b", second))
        for unit in range(10)
    ]
    found = agreement(votes)
    assert found.pop("alpha") == pytest.approx(0.095, abs=5e-4)
    assert found == {"answers": 20, "people": 2, "requests": 10, "unanimous": 6}
    same = [(unit, who, "right") for unit in range(3) for who in "ab"]
    assert agreement(same)["alpha"] is None and agreement([])["alpha"] is None


def test_a_database_that_cannot_be_had_is_a_user_error(tmp_path):
    for url, words in (
        ("nothing", "cannot be used"),
        ("nosuch://x/y", "cannot be used"),
        ("sqlite://", "is in memory"),
        (f"sqlite:///{tmp_path}/no/folder/x.db", "cannot be opened"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "cannot be opened"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            Store(url)
        assert "secret" not in str(caught.value)
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(f"sqlite:///{tmp_path}/text.db")


# PostgreSQL


@pytest.fixture(scope="module")
def postgresql():
    with serving.postgresql() as url:
        yield url


def test_people_at_postgresql_at_once_lose_and_double_nothing(postgresql):
    store = opened(postgresql, voices=1)
    ids = [f"x{number}" for number in range(60)]
    assert store.add_requests("trainer", "r", 1, rows(*ids)) == (60, 0)
    assert store.add_requests("trainer", "r", 1, rows(*ids)) == (0, 60)

    def work(person):
        said = []
        while (found := store.lease(person)) is not None:
            for _ in range(2):  # the second changes nothing
                store.answer(person, found["id"], "wrong", "a\u2028\\hint")
            said.append(found["id"])
        return said

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        said = sum(threads.map(work, PEOPLE), [])
    assert sorted(said) == sorted(ids)
    found, later = store.collect("r", 0, 9e9)
    assert sorted(one["id"] for one in found) == sorted(ids) and later is None
    assert [one["cursor"] for one in found] == list(range(1, 61))
    assert {one["hint"] for one in found} == {"a\u2028\\hint"}
    with pytest.raises(Refused, match="already"):
        store.undo(PEOPLE[0])
    assert store.status()["answered"] == 60
    store.close()


def test_all_of_the_store_on_postgresql(postgresql):
    store = Store(postgresql, clock=Clock())
    store.open_run("trainer", described("pg", asks="verdict"))
    store.add_requests("trainer", "pg", 1, rows("a", "b"))
    person, other = PEOPLE[:2]
    assert store.lease(person)["id"] == "a" and store.lease(other)["id"] == "b"
    assert store.skip(other, "b") and not store.skip(other, "b")
    assert store.answer(person, "a", "right", None) and store.undo(person)["id"] == "a"
    store.clock.now += 121
    assert store.lease(other)["id"] == "a"
    store.set_round("trainer", "pg", {"round": 1, "phase": "training", "accuracy": 0.5}, True)
    assert not store.set_round("trainer", "pg", {"round": 1, "phase": "done"}, False)
    assert store.lease(person) is None
    key = store.add_chat(person, "why?")
    store.finish_job("trainer", f"{key}a", {"answer": "so", "adapter": ""})
    store.judge_chat(person, key, "wrong", "hint", False)
    assert [job["id"] for job in store.jobs("pg")] == [f"{key}r"]
    assert store.judged_chats("pg", 0)[0]["id"] == str(key)
    assert [row["kind"] for batch in store.export("pg") for row in batch] == [
        "request", "request", "chat",
    ]  # fmt: skip
    assert store.status()["curve"] == [[1, 0.5]] and store.audit(0) and store.votes("pg") == []
    store.set_users({"d": person})
    assert store.users() == {"d": person}
    assert [store.add_webhook("admin", "http://x", secret) for secret in "st"] == ["s", "s"]
    store.drop_webhook("admin", "http://x")
    store.close()


# Processes that are killed


@contextlib.contextmanager
def served(folder, *flags):
    """`spear-jax serve` as a process, and its tokens' file once it answers."""
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "spear_jax.serve", f"--folder={folder}", "--port=0", *flags]
    tokens = folder / "tokens.json"
    before = tokens.stat().st_mtime_ns if tokens.exists() else 0
    env = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        ends = time.monotonic() + 60
        while not tokens.exists() or tokens.stat().st_mtime_ns == before:
            assert process.poll() is None and time.monotonic() < ends, process.communicate()
            time.sleep(0.02)
        yield process, json.loads(tokens.read_text())
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_service_that_is_killed_loses_and_doubles_nothing(tmp_path):
    ids, said = [f"x{number}" for number in range(40)], {}
    body = {
        "run": "r", "round": 1,
        "requests": [{"id": id, "client": 0, "question": "q", "answer": "a"} for id in ids],
    }  # fmt: skip
    for turn in range(2):
        with served(tmp_path, "--people=2", "--undo=0") as (process, told):
            tokens = {one["name"]: one["token"] for one in told["users"]}

            client = httpx.Client(base_url=told["url"], timeout=30)

            def ask(who, method, path, client=client, tokens=tokens, **more):
                headers = {"Authorization": f"Bearer {tokens[who]}"}
                return client.request(method, path, headers=headers, **more)

            run = {"run": "r", "task": "t", "clients": 1, "rounds": 1}
            assert ask("trainer", "POST", "/api/runs", json=run).status_code == 200
            counts = ask("trainer", "POST", "/api/requests", json=body).json()
            assert counts == (
                {"accepted": 40, "known": 0} if turn == 0 else {"accepted": 0, "known": 40}
            )
            for number in range(20 if turn < 1 else 40):
                who = f"person-{number % 2}"
                found = ask(who, "POST", "/api/lease")
                if found.status_code == 204:
                    break
                id, answer = found.json()["id"], {"verdict": "wrong", "hint": f"{turn} {number}"}
                assert id not in said
                assert ask(who, "PUT", f"/api/answers/{id}", json=answer).status_code == 200
                said[id] = answer["hint"]
            if turn < 1:
                process.send_signal(signal.SIGKILL)
                process.wait()
                client.close()
                continue
            found = ask("trainer", "GET", "/api/answers?run=r").json()["answers"]
            assert {one["id"]: one["hint"] for one in found} == said and len(found) == 40
            waiting = socket.create_connection(("127.0.0.1", int(told["url"].rpartition(":")[2])))
            waiting.sendall(
                b"GET /api/answers?run=r&after=40&wait=25 HTTP/1.1\r\nHost: x\r\n"
                b"Authorization: Bearer %s\r\n\r\n" % tokens["trainer"].encode()
            )
            time.sleep(0.3)
            client.close()
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
            assert time.monotonic() - start < 5 and b'"answers": []' in waiting.recv(10_000)
            waiting.close()
            *links, last = out.splitlines()
            assert process.returncode == 0 and json.loads(last)["answers"] == 40 and not err
            assert [line.split() for line in links] == [
                [one["name"], one["url"]] for one in told["users"]
            ]


def test_what_serve_does_not_take(tmp_path, monkeypatch):
    from spear_jax import serve

    busy = socket.create_server(("127.0.0.1", 0))
    port = busy.getsockname()[1]
    for flags, words in (
        (["--port=70000"], "--port=70000 is out of range"),
        (["--people=-1"], "--people=-1 is out of range"),
        (["--lease=nan"], "--lease=nan is out of range"),
        (["--clients=0"], "--clients=0 is out of range"),
        (["--voices=3", "--people=2"], "--voices=3 asks more people"),
        ([f"--port={port}"], "cannot be listened at"),
        (["--port=0", "--host=no.such.host.invalid"], "cannot be listened at"),
        (["--port=0", "--database=what"], "cannot be used"),
    ):
        with pytest.raises(UserError, match=words):
            serve.main([f"--folder={tmp_path}/x", *flags])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        serve.main([f"--folder={tmp_path}/file", "--port=0"])
    (tmp_path / "x" / "tokens.json").write_text('{"users": [{"name": "a"}], "secret": "s"}')
    with pytest.raises(UserError, match="is not a list of tokens"):
        serve.main([f"--folder={tmp_path}/x", "--port=0"])
    with serve._alone(tmp_path / "x"), pytest.raises(UserError, match="another process"):
        serve.main([f"--folder={tmp_path}/x", "--port=0"])
    busy.close()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r'needs the package uvicorn.*pip install "spear-jax\[live'):
        serve.main([f"--folder={tmp_path}/x", "--port=0"])
