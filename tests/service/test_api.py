"""The API as the trainer and people use it, in process."""

import json
import threading
import time

import httpx
import pytest
import sqlalchemy as sa
from serving import Clock, client, service

from spear_jax.service import webhooks


@pytest.fixture
def at(tmp_path):
    with service(tmp_path, people=3, clients=None) as found:
        yield found


def one(id, client=0, round=1, **more):
    return {"id": id, "client": client, "question": f"q {id}", "answer": f"a {id}"} | more


def ask(at, *ids, round=1, run="r", **more):
    body = {"run": run, "round": round, "requests": [one(id, **more) for id in ids]}
    return at.trainer.post("/api/requests", json=body)


def collect(at, after=0, run="r", wait=0):
    return at.trainer.get(f"/api/answers?run={run}&after={after}&wait={wait}").json()


def test_a_request_goes_to_a_person_and_back(at):
    at.open(asks="verdict", show_right=True)
    assert ask(at, "x", "y", right="r", adapter="round 3").json() == {"accepted": 2, "known": 0}
    leased = at.people[0].post("/api/lease").json()
    assert leased.pop("expires") == pytest.approx(time.time() + 120, abs=5)
    assert leased == {
        "id": "x", "run": "r", "round": 1, "client": 0, "attempt": 0, "question": "q x",
        "answer": "a x", "right": "r", "adapter": "round 3", "asks": "verdict",
    }  # fmt: skip
    assert at.people[0].post("/api/lease").json()["id"] == "x"
    assert at.people[1].post("/api/lease").json()["id"] == "y"
    assert at.people[2].post("/api/lease").status_code == 204
    done = at.people[0].put("/api/answers/x", json={"verdict": "wrong", "hint": "look again"})
    assert (done.status_code, done.json()) == (200, {"id": "x"})
    found = collect(at)
    assert found["cursor"] == 1 and found["status"]["answered"] == 1
    (answer,) = found["answers"]
    assert answer.pop("seconds") < 5 and answer.pop("time") == pytest.approx(time.time(), abs=5)
    assert answer == {
        "id": "x", "round": 1, "client": 0, "verdict": "wrong", "hint": "look again",
        "user": "person-0", "cursor": 1, "adapter": "round 3",
    }  # fmt: skip
    assert collect(at, after=1)["answers"] == []


def test_the_same_request_again_is_known_and_another_is_refused(at):
    at.open()
    assert ask(at, "x", "x", "y").json() == {"accepted": 2, "known": 1}
    assert ask(at, "x", "y", "z").json() == {"accepted": 1, "known": 2}
    for other in (dict(answer="b"), dict(round=2), dict(adapter="round 9")):
        assert ask(at, "new", "x", **other).status_code == 409
    assert at.trainer.get("/api/status").json()["waiting"] == 3
    assert ask(at, "x", run="other").status_code == 404
    assert ask(at, "far", client=5).status_code == 422


def test_an_answer_is_written_once(at):
    at.open()
    ask(at, "x", "y")
    person = at.people[0]
    person.post("/api/lease")
    body = {"verdict": "right"}
    assert at.people[1].put("/api/answers/x", json=body).status_code == 403
    assert person.put("/api/answers/nothing", json=body).status_code == 404
    assert [person.put("/api/answers/x", json=body).status_code for _ in range(3)] == [200] * 3
    assert person.put("/api/answers/x", json={"verdict": "wrong"}).status_code == 409
    assert person.put("/api/answers/y", json=body).status_code == 403
    assert len(collect(at)["answers"]) == 1


@pytest.mark.parametrize(
    "asks, body",
    [
        ("verdict", {}),
        ("verdict", {"hint": "no"}),
        ("verdict", {"verdict": "right", "hint": "no"}),
        ("hint", {"verdict": "wrong"}),
        ("hint", {"verdict": "right", "hint": "no"}),
    ],
)
def test_what_is_not_asked_is_refused(at, asks, body):
    at.open(asks=asks)
    ask(at, "x")
    at.people[0].post("/api/lease")
    assert at.people[0].put("/api/answers/x", json=body).status_code == 422


def test_hints_alone(at):
    at.open(asks="hint")
    ask(at, "x", "y")
    for id, hint in (("x", "look"), ("y", None)):
        assert at.people[0].post("/api/lease").json()["id"] == id
        assert at.people[0].put(f"/api/answers/{id}", json={"hint": hint}).status_code == 200
    said = [(one["id"], one["verdict"], one["hint"]) for one in collect(at)["answers"]]
    assert said == [("x", None, "look"), ("y", None, None)]


def test_what_is_skipped_comes_back_when_nothing_else_is_left(at):
    at.open()
    ask(at, "x", "y")
    person = at.people[0]
    assert person.post("/api/requests/x/skip").status_code == 403
    assert person.post("/api/lease").json()["id"] == "x"
    assert [person.post("/api/requests/x/skip").status_code for _ in range(2)] == [200, 200]
    assert at.people[1].post("/api/lease").json()["id"] == "x"  # others get it at once
    assert person.post("/api/lease").json()["id"] == "y"
    at.people[1].post("/api/requests/x/skip")
    person.put("/api/answers/y", json={"verdict": "right"})
    assert person.post("/api/lease").json()["id"] == "x"


def test_undo_takes_the_last_answer_back_until_the_trainer_has_it(at):
    at.open()
    ask(at, "x", "y")
    person = at.people[0]
    assert person.post("/api/undo").status_code == 409
    person.post("/api/lease")
    person.put("/api/answers/x", json={"verdict": "right"})
    person.post("/api/lease")  # y, which goes back
    assert [person.post("/api/undo").json()["id"] for _ in range(2)] == ["x", "x"]
    assert at.people[1].post("/api/lease").json()["id"] == "y"
    assert person.put("/api/answers/x", json={"verdict": "wrong"}).status_code == 200
    said = [(one["id"], one["verdict"], one.get("undone")) for one in collect(at)["answers"]]
    assert said == [("x", "right", True), ("x", "wrong", None)]
    assert person.post("/api/undo").status_code == 409  # collected
    assert at.trainer.get("/api/status").json()["answered"] == 1


def test_an_answer_waits_for_its_undo(tmp_path):
    with service(tmp_path, undo=0.3) as at:
        at.open()
        ask(at, "x")
        at.people[0].post("/api/lease")
        at.people[0].put("/api/answers/x", json={"verdict": "right"})
        assert collect(at)["answers"] == []
        start = time.monotonic()
        assert len(collect(at, wait=5)["answers"]) == 1 and time.monotonic() - start < 2
        assert at.people[0].post("/api/undo").status_code == 409


def test_the_end_of_a_round_waits_for_no_undo(tmp_path):
    with service(tmp_path, undo=60) as at:
        at.open()
        ask(at, "x")
        at.people[0].post("/api/lease")
        at.people[0].put("/api/answers/x", json={"verdict": "right"})
        for phase, count in (("asking", 0), ("training", 1)):
            at.trainer.post("/api/rounds", json={"run": "r", "round": 1, "phase": phase})
            assert len(collect(at)["answers"]) == count


def test_a_lease_ends(at):
    at.open()
    ask(at, "x")
    clock = at.app.state.service.store.clock = Clock()
    at.people[0].post("/api/lease")
    assert at.people[1].post("/api/lease").status_code == 204
    clock.now += 121
    assert at.people[1].post("/api/lease").json()["id"] == "x"
    assert at.people[0].put("/api/answers/x", json={"verdict": "right"}).status_code == 403
    clock.now += 121  # nobody else asked: what took long is not lost
    assert at.people[1].put("/api/answers/x", json={"verdict": "right"}).status_code == 200


def test_people_get_their_client_s_requests_of_the_oldest_round(tmp_path):
    with service(tmp_path, people=2, clients=2) as at:
        at.open()
        ask(at, "b", client=1, round=2)
        ask(at, "a", client=1, round=1)
        assert at.people[0].post("/api/lease").status_code == 204
        assert at.people[1].post("/api/lease").json()["id"] == "a"


def test_a_closed_round_leases_nothing_and_takes_what_is_leased(at):
    at.open()
    ask(at, "x", "y")
    at.people[0].post("/api/lease")
    body = {"run": "r", "round": 1, "phase": "training", "close": True}
    assert at.trainer.post("/api/rounds", json=body).status_code == 200
    assert at.people[1].post("/api/lease").status_code == 204
    at.people[0].put("/api/answers/x", json={"verdict": "right"})
    (answer,) = collect(at)["answers"]
    assert answer["late"] is True and answer["id"] == "x"


def test_several_voices_are_one_answer(tmp_path):
    with service(tmp_path, people=3, voices=3) as at:
        at.open()
        ask(at, "x", "y")
        for person, verdict, hint in zip(
            at.people, ("right", "wrong", "wrong"), (None, "a", "b"), strict=True
        ):
            assert person.post("/api/lease").json()["id"] == "x"
            person.put("/api/answers/x", json={"verdict": verdict, "hint": hint})
        for person, verdict in zip(at.people, ("right", "wrong"), strict=False):
            assert person.post("/api/lease").json()["id"] == "y"
            person.put("/api/answers/y", json={"verdict": verdict})
        (answer,) = collect(at)["answers"]
        assert (answer["verdict"], answer["hint"]) == ("wrong", "a\n\nb")
        assert answer["user"] == "person-0, person-1, person-2"
        at.trainer.post(
            "/api/rounds", json={"run": "r", "round": 1, "phase": "training", "close": True}
        )
        found = collect(at, after=1)["answers"]
        assert [(one["id"], one["verdict"]) for one in found] == [("y", "wrong")]  # a tie
        told = at.admin.get("/api/agreement?run=r").json()
        # x: right wrong wrong, y: right wrong. Coincidences: right-wrong 1+1, wrong-wrong 1; n = 5
        # (2 right, 3 wrong). Do = 4/5, De = 2*2*3/(5*4) = 3/5; alpha = 1 - Do/De.
        assert told.pop("alpha") == pytest.approx(1 - (4 / 5) / (3 / 5))
        assert told == {"run": "r", "answers": 5, "people": 3, "requests": 2, "unanimous": 0}


def test_a_chat_with_a_revision(at):
    at.open(clients=2)
    person = at.people[0]
    id = person.post("/api/chats", json={"question": "why?"}).json()["id"]
    assert person.post("/api/chats", json={"question": "why?"}).json()["id"] == id  # waits still
    (job,) = at.trainer.get("/api/jobs?run=r&wait=5").json()["jobs"]
    assert (job["chat"], job["question"], job["answer"]) == (id, "why?", None)
    assert person.put(f"/api/chats/{id}", json={"verdict": "wrong"}).status_code == 409
    done = {"answer": "so", "adapter": "round 1"}
    url = f"/api/jobs/{job['id']}"
    assert [at.trainer.post(url, json=done).status_code for _ in range(2)] == [200, 200]
    assert at.trainer.post(url, json={"error": "no"}).status_code == 409
    assert at.trainer.get("/api/chats?run=r").json() == {"chats": [], "cursor": 0}
    judged = {"verdict": "wrong", "hint": "think"}
    assert at.people[1].put(f"/api/chats/{id}", json=judged).status_code == 403
    assert [person.put(f"/api/chats/{id}", json=judged).status_code for _ in range(2)] == [200] * 2
    (revise,) = at.trainer.get("/api/jobs?run=r").json()["jobs"]
    assert (revise["answer"], revise["feedback"]) == ("so", "think") and revise["id"] != job["id"]
    at.trainer.post(f"/api/jobs/{revise['id']}", json={"answer": "better", "adapter": "round 1"})
    shown = person.get(f"/api/chats/{id}?wait=5").json()
    assert shown["answer"] == "so" and shown["revision"]["answer"] == "better"
    before = at.trainer.get("/api/chats?run=r").json()["cursor"]
    person.put(f"/api/chats/{id}", json={"verdict": "right", "revision": True})
    (row,) = at.trainer.get(f"/api/chats?run=r&after={before}").json()["chats"]
    assert row["revision"]["verdict"] == "right" and row["job"] == job["id"]
    assert row["client"] == 0 and row["user"] == "person-0" and row["hint"] == "think"


def test_at_most_fifty_jobs_wait(at):
    at.open()
    codes = [
        at.people[0].post("/api/chats", json={"question": f"q{n}"}).status_code for n in range(51)
    ]
    assert codes == [200] * 50 + [503]


def test_status_tells_the_round(at):
    at.open(task="facts", rounds=3, examples=["2 + 2?"])
    at.trainer.post(
        "/api/rounds",
        json={"run": "r", "round": 1, "phase": "done", "accuracy": 0.5, "sample": {"question": "q", "answer": "a"}},
    )  # fmt: skip
    at.trainer.post("/api/rounds", json={"run": "r", "round": 1, "phase": "done"})
    at.trainer.post(
        "/api/rounds", json={"run": "r", "round": 2, "phase": "asking", "deadline": 9e9}
    )
    ask(at, "x", "y", "z", round=2, adapter="round 1")
    at.people[0].post("/api/lease")
    at.people[0].put("/api/answers/x", json={"verdict": "right"})
    at.people[0].post("/api/lease")
    told = at.people[0].get("/api/status").json()
    version = told.pop("version")
    assert told == {
        "run": "r", "task": "facts", "asks": "verdict", "examples": ["2 + 2?"], "round": 2,
        "rounds": 3, "phase": "asking", "deadline": 9e9, "wanted": None, "waiting": 1, "leased": 1,
        "answered": 1, "mine": 1, "curve": [[1, 0.5]],
        "samples": [{"round": 1, "question": "q", "answer": "a"}], "adapter": "round 1",
    }  # fmt: skip
    start = time.monotonic()
    again = at.people[0].get(f"/api/status?seen={version}&wait=0.2").json()
    assert again["version"] == version and time.monotonic() - start > 0.15
    at.people[0].put("/api/answers/y", json={"verdict": "right"})
    assert at.people[0].get(f"/api/status?seen={version}&wait=9").json()["version"] > version


def test_news_end_a_long_poll(at):
    at.open()
    ask(at, "x")
    at.people[0].post("/api/lease")
    found = []
    waiting = threading.Thread(target=lambda: found.append(collect(at, wait=20)))
    start = time.monotonic()
    waiting.start()
    time.sleep(0.2)
    at.people[0].put("/api/answers/x", json={"verdict": "right"})
    waiting.join(10)
    assert found[0]["answers"][0]["id"] == "x" and time.monotonic() - start < 5


def test_export_and_audit(at):
    at.open()
    ask(at, *(f"x{n}" for n in range(600)))
    person = at.people[0]
    person.post("/api/lease")
    person.post("/api/requests/x0/skip")
    person.post("/api/lease")
    person.put("/api/answers/x1", json={"verdict": "right"})
    person.post("/api/undo")
    person.put("/api/answers/x1", json={"verdict": "wrong", "hint": "ü\u2028\n<script>"})
    person.post("/api/chats", json={"question": "why?"})
    person.post("/api/runs", json={})
    rows = [json.loads(line) for line in at.admin.get("/api/export?run=r").text.split("\n") if line]
    assert [row["kind"] for row in rows] == ["request"] * 600 + ["chat"]
    assert [one["user"] for one in rows[0]["skips"]] == ["person-0"]
    said = [(one["verdict"], one["hint"], one["undone"]) for one in rows[1]["answers"]]
    assert said == [("right", None, True), ("wrong", "ü\u2028\n<script>", False)]
    found = at.admin.get("/api/audit").json()
    lines = [(one["who"], one["what"], one.get("note")) for one in found["audit"]]
    assert ("person-0", "refused", "1 with status 403") in lines
    assert {"lease", "answer", "skip", "undo", "export"} <= {what for _, what, _ in lines}
    assert not any(token in json.dumps(found) for token in at.tokens.values())
    assert at.admin.get(f"/api/audit?after={found['cursor']}").json()["audit"] == []


def test_webhooks_tell_of_new_rounds_and_try_again(at, monkeypatch):
    got, done = [], threading.Event()

    def reply(request):
        got.append(request)
        if len(got) > 1:
            done.set()
        return httpx.Response(503 if len(got) == 1 else 200)

    kind = httpx.AsyncClient
    monkeypatch.setattr(
        webhooks.httpx, "AsyncClient", lambda **_: kind(transport=httpx.MockTransport(reply))
    )
    monkeypatch.setattr(at.app.state.service.webhooks, "_pause", 0.01)
    assert at.admin.post("/api/webhooks", json={"url": "file:///etc/passwd"}).status_code == 422
    hook = at.admin.post("/api/webhooks", json={"url": "http://hook.example/x"}).json()
    at.open()
    for _ in range(2):  # the second is not new
        at.trainer.post("/api/rounds", json={"run": "r", "round": 1, "phase": "asking"})
    assert done.wait(5)
    body = got[1].content
    assert json.loads(body) == {"event": "round", "run": "r", "round": 1, "phase": "asking"}
    assert got[1].headers["X-Spear-Signature"] == webhooks.signature(hook["secret"], body)
    url = {"url": "http://hook.example/x"}
    assert at.admin.get("/api/webhooks").json() == {"webhooks": [url["url"]]}
    codes = [at.admin.request("DELETE", "/api/webhooks", json=url).status_code for _ in range(2)]
    assert codes == [200, 404]
    time.sleep(0.05)
    assert len(got) == 2


def test_a_link_is_exchanged_for_a_cookie(at):
    browser = client(at)
    assert browser.get("/").status_code == 401
    assert browser.get("/?token=wrong").status_code == 401
    answer = browser.get(f"/?token={at.tokens['person-0']}", follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "./"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    page = browser.get("/")
    assert page.status_code == 200 and "person-0" in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-store"
    assert browser.get("/api/status").status_code == 200
    assert browser.post("/api/lease").status_code == 403  # no CSRF value
    csrf = page.text.partition('name="csrf" content="')[2].partition('"')[0]
    assert browser.post("/api/lease", headers={"X-CSRF-Token": csrf}).status_code == 204
    assert browser.post("/api/lease", headers={"X-CSRF-Token": csrf[:-2]}).status_code == 403


def test_tokens_stay_and_are_the_owner_s(tmp_path):
    with service(tmp_path, people=1) as at:
        first = at.tokens
        assert (tmp_path / "tokens.json").stat().st_mode & 0o777 == 0o600
        database = (tmp_path / "feedback.db").read_bytes() + (
            tmp_path / "feedback.db-wal"
        ).read_bytes()
        assert not any(token.encode() in database for token in first.values())
    with service(tmp_path, people=2, clients=2) as at:
        assert at.tokens.items() > first.items() and len(at.tokens) == 4
        assert at.people[0].get("/api/status").status_code == 200


def test_who_is_taken_out_of_the_file_is_out(tmp_path):
    with service(tmp_path, people=2) as at:
        gone = at.tokens["person-1"]
    file = tmp_path / "tokens.json"
    told = json.loads(file.read_text())
    told["users"] = [one for one in told["users"] if one["name"] != "person-1"]
    file.write_text(json.dumps(told))
    with service(tmp_path, people=1) as at:
        assert client(at, gone).get("/api/status").status_code == 401
        assert at.people[0].get("/api/status").status_code == 200


def test_a_failure_of_ours_is_told_and_ends_nothing(at, monkeypatch):
    monkeypatch.setattr(type(at.app.state.service.store), "mine", lambda *_: 1 / 0)
    answer = at.people[0].get("/api/status")
    assert answer.status_code == 500 and answer.json()["error"].startswith("the service failed")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert at.people[0].post("/api/lease").status_code == 204


def test_a_database_that_is_gone_is_told(at, monkeypatch):
    def broken(*_):
        raise sa.exc.OperationalError("x", {}, Exception("disk full"))

    monkeypatch.setattr(at.app.state.service.store, "make", broken)
    answer = at.people[0].post("/api/lease")
    assert answer.status_code == 503 and "send it again" in answer.json()["error"]
    monkeypatch.undo()
    assert at.people[0].post("/api/lease").status_code == 204


def test_rates_are_limited(tmp_path):
    slow = {"person": 1.0, "trainer": 500.0, "admin": 1.0, "nobody": 1.0}
    with service(tmp_path, people=2, rates=slow) as at:
        codes = [at.people[0].get("/api/status").status_code for _ in range(8)]
        assert codes[:5] == [200] * 5 and 429 in codes[5:]
        assert at.people[1].get("/api/status").status_code == 200
        codes = [at.nobody.get("/api/status").status_code for _ in range(8)]
        assert codes[:5] == [401] * 5 and 429 in codes[5:]


def test_openapi_describes_every_route(at):
    schema = at.nobody.get("/openapi.json").json()
    assert "/api/answers/{id}" in schema["paths"] and "/api/jobs" in schema["paths"]
    for path, methods in schema["paths"].items():
        for method, what in methods.items():
            assert what.get("description"), f"{method} {path}"
            assert ("security" in what) == path.startswith("/api/")
    assert at.nobody.get("/docs").status_code == 404
