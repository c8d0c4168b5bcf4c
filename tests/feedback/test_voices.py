"""Other voices: a model behind an HTTP endpoint, a function of one's own, and mixtures by client."""

import http.server
import json
import threading

import pytest

from spear_jax.core.errors import UserError
from spear_jax.feedback.base import NOBODY, Request
from spear_jax.feedback.recorded import FeedbackSettings
from spear_jax.feedback.registry import get_feedback
from spear_jax.tasks import get_task

pytest.importorskip("httpx", reason="judge needs pip install -e .[live]")

TASK = get_task("facts")
EXAMPLES = TASK.generate("train")[:6]


def asked(example, right, id="x", client=0):
    label = example.labels[example.gold if right else example.gold - 1]
    return Request(example, f" {label}", 1, id, client)


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Speaks the chat protocol; what it replies is the server's `script` of (status, content)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        status, content = self.server.script(body, len(self.server.seen))
        raw = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def judge(server, **more):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return get_feedback("judge", TASK, 3, FeedbackSettings(url=url, model="small", **more))


def verdict(right, hint):
    return 200, f"Sure:\n{json.dumps({'right': right, 'hint': hint})}"


def test_a_judge_gets_question_answer_and_gold_and_its_hint_is_used(endpoint, monkeypatch):
    monkeypatch.setenv("SPEAR_FEEDBACK_TOKEN", "key")
    endpoint.script = lambda body, _: verdict(False, "Think of\nthe sea.")
    example = EXAMPLES[0]
    (told,) = judge(endpoint)([asked(example, False)])
    assert told.endswith("Think of the sea.") and TASK.templates.format in told
    ((path, headers, body),) = endpoint.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key"
    assert (body["model"], body["temperature"]) == ("small", 0)
    (message,) = body["messages"]
    for text in (TASK.question(example), example.options[example.gold], '{"right": true or false'):
        assert text in message["content"]


def test_a_judge_is_asked_once_for_the_same_answer_whoever_gave_it(endpoint):
    endpoint.script = lambda body, _: verdict(False, "Look again.")
    one = judge(endpoint)
    some = [asked(EXAMPLES[0], False, f"{i}", i) for i in range(5)] + [
        asked(EXAMPLES[1], False, "y")
    ]
    assert len(set(one(some))) == 1 and len(endpoint.seen) == 2
    one([asked(EXAMPLES[0], False, "z", 9)])
    assert len(endpoint.seen) == 2


def test_verdicts_hints_that_leak_and_replies_that_cannot_be_read(endpoint):
    gold = EXAMPLES[0].options[EXAMPLES[0].gold]
    replies = iter(
        [
            verdict(True, "well done"),
            verdict(False, f"It is {gold}."),
            (200, "I cannot say."),
            (200, '{"right": "yes"}'),
        ]
    )
    endpoint.script = lambda body, _: next(replies)
    said = []
    one = judge(endpoint, asks="verdict")
    requests = [asked(EXAMPLES[0], i == 0, f"{i}") for i in range(2)]
    requests += [asked(x, False, x.id) for x in EXAMPLES[1:3]]
    for request in requests:
        said.append((one.judge([request])[0], one([request])[0]))
    assert [verdict for verdict, _ in said] == [True, False, None, None]
    assert gold not in said[1][1] and "wrong" in said[1][1]
    assert said[2][1] is NOBODY


@pytest.mark.parametrize("status", [429, 503])
def test_a_passing_failure_is_tried_again_and_a_lasting_one_ends_with_a_message(
    endpoint, status, monkeypatch
):
    monkeypatch.setattr("spear_jax.feedback.judge.time.sleep", lambda seconds: None)
    endpoint.script = lambda body, count: (status, "") if count < 3 else verdict(False, "Look.")
    assert judge(endpoint)([asked(EXAMPLES[0], False)])[0].endswith("Look.")
    assert len(endpoint.seen) == 3
    endpoint.script = lambda body, count: (status, "busy")
    with pytest.raises(UserError, match=f"does not answer: {status}.*asks nothing again"):
        judge(endpoint)([asked(EXAMPLES[1], False)])
    assert len(endpoint.seen) == 3 + 5
    endpoint.script = lambda body, count: (401, "no key")
    with pytest.raises(UserError, match="does not answer: 401"):
        judge(endpoint)([asked(EXAMPLES[2], False)])
    assert len(endpoint.seen) == 3 + 5 + 1  # a refusal is not tried again


def test_a_judge_without_an_endpoint_is_refused():
    with pytest.raises(UserError, match="feedback.url is ''"):
        get_feedback("judge", TASK, 3)


# --- a function of one's own ---


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "def score(question, answer, example):\n"
        "    assert question and example.labels\n"
        "    return {'A': 1.0, 'B': 0.5, 'C': (0.2, 'No C.'), 'D': 0}[answer]\n"
        "def broken(question, answer, example):\n"
        "    return {'A': 2.0, 'B': float('nan'), 'C': 'good', 'D': (0.1, 5)}[answer]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_scores:score"


def test_a_functions_score_is_a_verdict_and_may_hint(own):
    reward = get_feedback("reward", TASK, 3, FeedbackSettings(asks="verdict", reward=own))
    some = [Request(EXAMPLES[0], f" {label}", 1, label) for label in "ABCD"]
    assert reward.judge(some) == [True, True, False, False]
    told = reward(some[2:])
    assert told[0].endswith("No C.") and "wrong" in told[1]


@pytest.mark.parametrize("label", "ABCD")
def test_a_score_that_is_none_is_refused(own, label):
    settings = FeedbackSettings(asks="verdict", reward="my_scores:broken")
    reward = get_feedback("reward", TASK, 3, settings)
    with pytest.raises(UserError, match="it must give a number from 0 to 1"):
        reward.judge([Request(EXAMPLES[0], label, 1, "x")])


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "is ''"),
        ("my_scores", "MODULE:FUNCTION"),
        ("no_such_scores:score", "'no_such_scores' is not there"),
        ("my_scores:other", "has no 'other'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(own, name, words):
    with pytest.raises(UserError, match=words):
        get_feedback("reward", TASK, 3, FeedbackSettings(reward=name))


# --- mixtures ---


def mixture(text, **more):
    return get_feedback("mixture", TASK, 3, FeedbackSettings(mixture=text, **more))


def test_each_client_has_the_provider_that_the_mixture_names(own):
    mixed = mixture("0=none, 2-3=reward,*=oracle", reward=own)
    some = [Request(EXAMPLES[0], " C", 1, f"{client}", client) for client in (3, 0, 5, 2)]
    wrong = [request for request in some if not TASK.grade(request.answer, request.example)]
    assert wrong == some or EXAMPLES[0].gold == 2
    told = mixed(some)
    assert told[0].endswith("No C.") and told[3].endswith("No C.")
    assert told[1] is None
    assert told[2] == get_feedback("oracle", TASK, 3)([some[2]])[0]


def test_where_a_part_judges_the_task_grades_the_others(own):
    mixed = mixture("0=reward,*=oracle", reward=own, asks="verdict")
    assert mixed.judges
    example = EXAMPLES[0]
    some = [Request(example, f" {label}", 0, f"{c}{label}", c) for c in (0, 1) for label in "ABCD"]
    wanted = [True, True, False, False]
    wanted += [label == example.labels[example.gold] for label in "ABCD"]
    assert mixed.judge(some) == wanted


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is none"),
        ("0", "is none"),
        ("a=oracle", "is none"),
        ("*=mixture", "is none"),
        ("0=orcale", "Did you mean 'oracle'"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        mixture(text)


def test_a_client_without_a_provider_is_refused():
    with pytest.raises(UserError, match="names no provider for client 4"):
        mixture("0-3=oracle")([Request(EXAMPLES[0], " A", 1, "x", 4)])
