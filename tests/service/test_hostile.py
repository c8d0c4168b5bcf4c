"""Three hundred requests that nobody should send: each is refused with the right status in one
sentence, and the service goes on.
"""

import json
import random

import pytest
from serving import client, service
from starlette.testclient import TestClient

from spear_jax.service import security

SCRIPT = '<script>window.hacked=1</script><img src=x onerror="hacked=1"> & \'" \u202e\U0001f600'
DEEP = b'{"hint": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    with service(tmp_path_factory.mktemp("hostile"), people=3) as found:
        found.open(asks="verdict")
        rows = [{"id": f"x{n}", "client": 0, "question": "q", "answer": "a"} for n in range(9)]
        body = {"run": "r", "round": 1, "requests": rows}
        assert found.trainer.post("/api/requests", json=body).status_code == 200
        assert [person.post("/api/lease").json()["id"] for person in found.people] == [
            "x0", "x1", "x2",
        ]  # fmt: skip
        chat = found.people[1].post("/api/chats", json={"question": "mine"}).json()["id"]
        found.chat = f"/api/chats/{chat}"
        yield found


def bad(at, rng):
    """(status, client, method, path, what it sends) of one bad request of each kind."""
    mine, trainer, admin = at.people[0], at.trainer, at.admin
    wrong = client(at, rng.choice(["", "x" * 5000, "0" * 32, at.tokens["person-0"][:-1]]) or "-")
    odd = rng.choice([None, [], 7, 0.5, True, {"a": 1}, "maybe"])
    number = rng.choice([-1, 2**31, 2**70, 1.5, "1", None, True])
    size = rng.randrange(security.BODY_BYTES + 1, 3 * security.BODY_BYTES)
    path = rng.choice(
        ["../app.py", "%2e%2e/app.py", "..%2fstore.py", "....//x", "index.html", "/etc/passwd", "%00", "x" * 3000]
    )  # fmt: skip
    raw = rng.choice(
        [b"\xff\xfe{}", b'{"verdict": "\xc3\x28"}', b"{", b"", b"verdict=right", b"[]", b"null", b'"x"', DEEP,
         b'{"verdict": NaN}', b'{"verdict": Infinity}', b'{"verdict": "right", "verdict": "no"}', b"1" * 60_000]
    )  # fmt: skip
    one = {"id": "new", "client": 0, "question": "q", "answer": "a"}
    requests = lambda **more: {"run": "r", "round": 1, "requests": [one | more]}
    answer, answers = "/api/answers/x0", "/api/answers?run=r"
    yield 413, mine, "PUT", answer, dict(content=b"x" * size, headers=JSON)
    yield 413, trainer, "POST", "/api/requests", dict(content=b" " * ((8 << 20) + 1), headers=JSON)
    yield 401, wrong, "POST", "/api/lease", {}
    yield 401, wrong, "PUT", answer, dict(content=b"x" * size)
    yield 401, at.nobody, rng.choice(["GET", "POST", "DELETE"]), "/api/" + path.strip("./%"), {}
    yield 403, mine, "PUT", "/api/answers/x1", dict(json={"verdict": "right"})
    yield 403, mine, "POST", "/api/requests/x2/skip", {}
    yield 403, mine, "GET", at.chat, {}
    yield 403, mine, "PUT", at.chat, dict(json={"verdict": "right"})
    yield 403, mine, "POST", "/api/requests", dict(json=requests())
    yield 403, mine, "GET", rng.choice(["/api/export?run=r", "/api/audit", answers]), {}
    yield 403, trainer, "POST", rng.choice(["/api/lease", "/api/undo"]), {}
    yield 403, admin, "POST", "/api/runs", dict(json={})
    yield 404, mine, "PUT", "/api/answers/nothing", dict(json={"verdict": "right"})
    yield 404, mine, "GET", "/api/chats/999", {}
    yield (
        404,
        trainer,
        "POST",
        "/api/jobs/" + rng.choice(["7r", "x", "99999999999a", "-1a"]),
        dict(json={"error": "e"}),
    )
    yield 404, mine, "GET", f"/static/{path}", {}
    yield (
        404,
        trainer,
        "GET",
        "/api/answers?run=" + rng.choice(["no", "'; DROP TABLE runs; --"]),
        {},
    )
    yield 405, mine, "DELETE", answer, {}
    yield 409, trainer, "POST", "/api/requests", dict(json=requests(id="x3", answer="another"))
    yield (
        409,
        trainer,
        "POST",
        "/api/requests",
        dict(json={"run": "r", "round": 1, "requests": [one, one | {"answer": "b"}]}),
    )
    yield 409, mine, "POST", "/api/undo", {}
    yield 422, mine, "PUT", answer, dict(content=raw, headers=JSON)
    yield 422, mine, "PUT", answer, dict(content=b'{"verdict": "right"}')  # no content type
    yield 422, mine, "PUT", answer, dict(json={"verdict": odd, "hint": None})
    yield (
        422,
        mine,
        "PUT",
        answer,
        dict(
            json={"verdict": "wrong", "hint": odd or 1}
            if not isinstance(odd, str)
            else {"verdict": odd}
        ),
    )
    yield (
        422,
        mine,
        "PUT",
        answer,
        dict(json={"verdict": "wrong", "hint": "x" * rng.randrange(501, 9000)}),
    )
    yield 422, mine, "PUT", answer, dict(json={"verdict": "wrong", "hint": "a\0b"})
    yield (
        422,
        mine,
        "PUT",
        answer,
        dict(content=b'{"verdict": "wrong", "hint": "\\ud800"}', headers=JSON),
    )
    yield 422, mine, "PUT", answer, dict(json={"verdict": "right", "user": "admin"})
    yield (
        422,
        mine,
        "PUT",
        "/api/answers/" + rng.choice(["%00", "a%00b", "x" * 65, "%0a"]),
        dict(json={"verdict": "right"}),
    )
    yield (
        422,
        mine,
        "POST",
        "/api/chats",
        dict(json={"question": rng.choice(["", "  ", "x" * 2001, 7, None, ["x"]])}),
    )
    yield 422, mine, "GET", f"/api/status?seen={rng.choice(['-2', 'x', '1e9', '9' * 30])}", {}
    yield (
        422,
        trainer,
        "GET",
        f"{answers}&wait={rng.choice(['nan', 'inf', '-1', '26', 'x', '1e400'])}",
        {},
    )
    yield 422, trainer, "GET", f"{answers}&after={rng.choice(['-1', 'x', '1.5', '9' * 40, ''])}", {}
    yield 422, trainer, "GET", "/api/answers", {}
    yield 422, trainer, "POST", "/api/requests", dict(json=requests(client=number))
    yield 422, trainer, "POST", "/api/requests", dict(json=requests(client=2))
    yield (
        422,
        trainer,
        "POST",
        "/api/requests",
        dict(json=requests(id=rng.choice(["", "x" * 65, "a\nb", "..", "a/../b", 7, "\0"]))),
    )
    yield (
        422,
        trainer,
        "POST",
        "/api/rounds",
        dict(json={"run": "r", "round": number, "phase": "asking"}),
    )
    yield (
        422,
        trainer,
        "POST",
        "/api/rounds",
        dict(json={"run": "r", "round": 1, "phase": rng.choice(["", "Done", 1, None])}),
    )
    yield (
        422,
        trainer,
        "POST",
        "/api/rounds",
        dict(content=b'{"run": "r", "round": 1, "phase": "done", "accuracy": NaN}', headers=JSON),
    )
    yield (
        422,
        trainer,
        "POST",
        "/api/runs",
        dict(json={"run": "z", "task": "t", "clients": 0, "rounds": 1}),
    )
    yield (
        422,
        admin,
        "POST",
        "/api/webhooks",
        dict(json={"url": rng.choice(["", "x", "file:///etc/passwd", "javascript:alert(1)"])}),
    )


def test_bad_requests_are_refused_in_one_sentence(at):
    rng, count = random.Random(0), 0
    while count < 300:
        for status, who, method, path, sent in bad(at, rng):
            answer = who.request(method, path, **sent)
            what = (
                f"{method} {path[:80]} {str(sent)[:200]}: {answer.status_code} {answer.text[:300]}"
            )
            # TestClient folds dots away itself, as browsers do
            assert answer.status_code == status or (
                status == 401 and answer.status_code == 404 and "/api/" not in str(answer.url)
            ), what
            told = answer.json()["error"]
            assert list(answer.json()) == ["error"] and told.endswith(".") and len(told) < 600, what
            assert "\n" not in told and "Traceback" not in told and "sqlalchemy" not in told, what
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            count += 1
    assert at.nobody.get("/healthz").json() == {"status": "ok"}
    assert at.trainer.get("/api/answers?run=r").json()["answers"] == []
    assert at.trainer.get("/api/status").json()["waiting"] == 6
    assert at.people[0].post("/api/lease").json()["id"] == "x0"  # the lease stands
    noted = [one for one in at.admin.get("/api/audit").json()["audit"] if one["what"] == "refused"]
    statuses = {one["note"].rpartition(" ")[2] for one in noted}
    assert statuses >= {"401", "403", "404", "409", "413", "422"}


def test_a_script_comes_back_as_the_same_text(at):
    hint, question = SCRIPT, SCRIPT + "\r\n\t</textarea>"
    row = {"id": "s", "client": 0, "question": question, "answer": SCRIPT, "adapter": SCRIPT}
    body = {"run": "r", "round": 0, "requests": [row]}
    assert at.trainer.post("/api/requests", json=body).status_code == 200
    at.people[0].put("/api/answers/x0", json={"verdict": "right"})
    found = at.people[0].post("/api/lease")
    assert found.headers["content-type"] == "application/json"
    assert (found.json()["question"], found.json()["answer"]) == (question, SCRIPT)
    assert (
        at.people[0].put("/api/answers/s", json={"verdict": "wrong", "hint": hint}).status_code
        == 200
    )
    said = at.trainer.get("/api/answers?run=r").json()["answers"]
    assert said[-1]["hint"] == hint and said[-1]["adapter"] == SCRIPT
    lines = at.admin.get("/api/export?run=r").text.split("\n")
    assert any(one.get("question") == question for one in map(json.loads, filter(None, lines)))
    at.trainer.post(
        "/api/runs", json={"run": "<script>x</script>", "task": "t", "clients": 1, "rounds": 1}
    )
    browser = TestClient(at.app)
    browser.portal = at.nobody.portal
    page = browser.get(f"/?token={at.tokens['person-0']}")
    assert "&lt;script&gt;x&lt;/script&gt;" in page.text and "<script>x" not in page.text


def test_a_body_is_not_read_of_nobody_and_not_beyond_its_limit(at):
    """As raw ASGI: how much of a body the service asks for."""
    import asyncio

    asked = []

    async def receive():
        asked.append(1)
        return {"type": "http.request", "body": b"x" * (64 << 10), "more_body": True}

    async def send(message):
        if message["type"] == "http.response.start":
            asked.append(message["status"])

    def put(token):
        asked.clear()
        headers = [(b"authorization", b"Bearer " + token.encode())]
        scope = {"type": "http", "method": "PUT", "path": "/api/answers/x0", "headers": headers}
        asyncio.run(
            at.app.middleware_stack(scope | {"query_string": b"", "app": at.app}, receive, send)
        )
        return asked[-1], len(asked) - 1

    assert put("nobody") == (401, 0)
    status, chunks = put(at.tokens["person-0"])
    assert status == 413 and 2 <= chunks <= 18


def test_a_session_that_was_changed_is_none(at):
    good = at.app.state.service.keys.session(at.tokens["person-0"])
    for cookie, status in ((good, 200), (good[:-1], 401), (good[1:], 401), ("x", 401), ("", 401)):
        browser = client(at)
        found = browser.get("/api/status", headers={"Cookie": f"{security.COOKIE}={cookie}"})
        assert found.status_code == status
    mixed = {"Cookie": f"{security.COOKIE}={good}", "Authorization": "Bearer wrong"}
    assert client(at).get("/api/status", headers=mixed).status_code == 401
