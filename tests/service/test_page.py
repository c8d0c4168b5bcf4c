"""The page in a real browser, against a real service that the tests feed as a trainer would."""

import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import httpx
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs chromium on the PATH", allow_module_level=True)

playwright.expect.set_options(timeout=15_000)  # of a busy machine

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<a href='javascript:window.hacked = 3'>&amp;</a>\nsecond line {{ 7 * 7 }}"
)


@contextlib.contextmanager
def serve(folder: pathlib.Path):
    """A service of two people on a free port: its address, and the tokens by user."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "spear_jax.serve", f"--folder={folder}", f"--port={port}"]
    command += ["--people=2", "--undo=0", "--quiet"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/healthz").raise_for_status()
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        users = json.loads((folder / "tokens.json").read_text())["users"]
        yield url, {user["name"]: user["token"] for user in users}
    finally:
        process.terminate()
        process.wait(10)


class Trainer:
    """What a run says to the service, and reads from it."""

    def __init__(self, url: str, token: str, run: str, **about):
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30
        )
        self.run = run
        usual = {"task": "facts", "clients": 1, "rounds": 3, "asks": "verdict", "show_right": True}
        self.post("/api/runs", **usual | {"examples": ["Where does Ben live?"]} | about)

    def post(self, path: str, **body):
        return self.send(path, {"run": self.run} | body)

    def send(self, path: str, body: dict):
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def ask(self, *questions: str, round: int = 1, answer: str = "Paris", right: str = "Rome"):
        rows = [
            {
                "id": f"{round}-{i}",
                "client": 0,
                "attempt": 0,
                "question": question,
                "answer": answer,
                "right": right,
                "adapter": f"round {round - 1}",
            }
            for i, question in enumerate(questions)
        ]
        self.post("/api/requests", round=round, requests=rows)
        self.phase(round, "asking")

    def phase(self, round: int, phase: str, **more):
        usual = {"deadline": None, "wanted": None, "accuracy": None, "sample": None}
        self.post("/api/rounds", **usual | {"round": round, "phase": phase} | more)

    def answers(self, count: int) -> list[tuple]:
        """The verdict and hint of so many answers, in the order of the questions."""
        for _ in range(150):
            reply = self.http.get("/api/answers", params={"run": self.run, "after": 0, "wait": 0})
            newest = {row["id"]: row for row in reply.json()["answers"]}
            kept = [newest[name] for name in sorted(newest) if not newest[name].get("undone")]
            if len(kept) >= count:
                return [(row["verdict"], row["hint"]) for row in kept]
            time.sleep(0.1)
        raise AssertionError(f"{len(kept)} answers in place of {count}")

    def job(self, **answer):
        """Answers the next chat job; returns it."""
        [job] = self.http.get("/api/jobs", params={"run": self.run, "wait": 10}).json()["jobs"]
        self.send(f"/api/jobs/{job['id']}", answer)
        return job


@pytest.fixture(scope="module")
def browser():
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def trainer(service, request):
    """A run of this test's own; what it leaves open is closed, so that no other test is asked it."""
    url, tokens = service
    run = Trainer(url, tokens["trainer"], request.node.name)
    yield run
    run.phase(9, "done", close=True)


@pytest.fixture
def open_page(service, browser):
    """Opens the page as a person; at its end, no script of it has failed."""
    url, tokens = service
    opened = []

    def open_as(person="person-0", width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.set_default_timeout(15_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
        page.goto(f"{url}/?token={tokens[person]}")
        opened.append((context, faults))
        return page

    yield open_as
    for context, _ in opened:
        context.close()
    assert [fault for _, faults in opened for fault in faults] == []


def shows(page, selector: str, text: str):
    playwright.expect(page.locator(selector)).to_have_text(text)


def focused(page) -> str:
    return page.evaluate("document.activeElement.id")


def test_three_answers_by_keyboard_alone(trainer, open_page):
    trainer.ask("first?", "second?\nsecond line", "third?")
    page = open_page()
    shows(page, "#question", "first?")
    shows(page, "#right-answer", "Rome")
    shows(page, "#round", "Round 1 of 3")
    shows(page, "#counts", "0 of 3 answered · 0 by you")
    page.keyboard.press("r")
    shows(page, "#question", "second?\nsecond line")
    assert page.locator("#question").evaluate("node => getComputedStyle(node).whiteSpace") in (
        "pre-wrap",
        "preserve wrap",
    )
    assert focused(page) == "card-title"
    shows(page, "#live", "New question: second?\nsecond line")
    page.keyboard.press("h")
    page.keyboard.type("It is wrong, see rhs")  # r, w, s, n and u are letters in a field
    page.keyboard.press("Escape")
    assert focused(page) == "card-title"
    page.keyboard.press("r")  # a hint goes with wrong alone
    playwright.expect(page.locator("#problem")).to_contain_text("A hint goes with Wrong")
    page.keyboard.press("h")
    page.keyboard.press("Enter")
    shows(page, "#question", "third?")
    playwright.expect(page.locator("#hint")).to_have_value("")
    page.keyboard.press("w")
    playwright.expect(page.locator("#idle-title")).to_be_focused()
    shows(page, "#counts", "3 of 3 answered · 3 by you")
    assert trainer.answers(3) == [
        ("right", None),
        ("wrong", "It is wrong, see rhs"),
        ("wrong", None),
    ]
    trainer.ask("of the next round?", round=2)  # comes by itself
    shows(page, "#question", "of the next round?")


def test_skip_and_undo(trainer, open_page):
    trainer.ask("first?", "second?")
    page = open_page()
    shows(page, "#question", "first?")
    page.keyboard.press("s")
    shows(page, "#question", "second?")
    page.keyboard.press("h")
    page.keyboard.type("not kept for another question")
    page.keyboard.press("Enter")
    shows(page, "#question", "first?")
    page.keyboard.press("u")
    shows(page, "#question", "second?")
    playwright.expect(page.locator("#hint")).to_have_value("not kept for another question")
    page.fill("#hint", "")
    page.click("#right")
    shows(page, "#question", "first?")
    page.click("#wrong")
    playwright.expect(page.locator("#idle")).to_be_visible()
    assert trainer.answers(2) == [("wrong", None), ("right", None)]
    page.click("#undo")  # the trainer has them now
    playwright.expect(page.locator("#problem")).to_be_visible()


def test_hints_alone_are_asked_for(service, open_page, request):
    url, tokens = service
    run = Trainer(url, tokens["trainer"], request.node.name, asks="hint", show_right=False)
    run.ask("first?", "second?")
    page = open_page()
    shows(page, "#question", "first?")
    playwright.expect(page.locator("#right-part")).to_be_hidden()
    for key in "rw":  # no verdict is asked for
        page.keyboard.press(key)
    page.keyboard.press("h")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#problem")).to_contain_text("The hint is empty")
    page.keyboard.type("look north")
    page.keyboard.press("Enter")
    shows(page, "#question", "second?")
    page.keyboard.press("n")
    playwright.expect(page.locator("#idle")).to_be_visible()
    assert run.answers(2) == [(None, "look north"), (None, None)]


def test_what_models_and_people_write_is_text_and_stays_on_this_host(service, open_page, request):
    url, tokens = service
    run = Trainer(url, tokens["trainer"], request.node.name, task=HOSTILE, examples=[HOSTILE])
    run.ask(HOSTILE, "second?", answer=HOSTILE, right=HOSTILE)
    run.phase(1, "asking", accuracy=0.5, sample={"question": HOSTILE, "answer": HOSTILE})
    page = open_page()
    hosts = set()
    page.on("request", lambda sent: hosts.add(sent.url.split("/")[2]))
    page.reload()
    for place in (
        "#question",
        "#answer",
        "#right-answer",
        "#sample-question",
        "#sample-answers dd",
    ):
        playwright.expect(page.locator(place)).to_have_text(HOSTILE)
    page.fill("#hint", HOSTILE)
    page.click("#wrong")
    shows(page, "#question", "second?")
    page.keyboard.press("u")
    playwright.expect(page.locator("#hint")).to_have_value(HOSTILE)
    page.click("#tab-chat")
    page.select_option("#examples", index=1)
    page.click("#ask")
    run.job(answer=HOSTILE, adapter=HOSTILE)
    page.fill("#history textarea", HOSTILE)
    page.keyboard.press("Enter")
    assert run.job(error=HOSTILE)["feedback"] == HOSTILE
    playwright.expect(page.locator("#history .said.is-wrong").last).to_contain_text("onerror")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, body script, main a").count() == 0
    assert hosts == {url.split("/")[2]}
    policy = httpx.get(url, cookies={}).headers["Content-Security-Policy"]
    assert "'unsafe" not in policy


def test_chat_with_a_revision(trainer, open_page):
    page = open_page()
    page.focus("#tab-queue")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "tab-chat"
    page.select_option("#examples", label="Where does Ben live?")
    playwright.expect(page.locator("#chat-question")).to_have_value("Where does Ben live?")
    page.click("#ask")
    assert trainer.job(answer="In a ball.", adapter="round 0")["question"] == "Where does Ben live?"
    shows(page, "#history .answer", "In a ball.")
    page.fill("#history textarea", "A town.")
    page.click("#history .wrong")
    job = trainer.job(answer="In Oslo.", adapter="round 0")
    assert (job["answer"], job["feedback"]) == ("In a ball.", "A town.")
    playwright.expect(page.locator("#history .answer").last).to_have_text("In Oslo.")
    page.click("#history .right")
    playwright.expect(page.locator("#history .said.is-right")).to_be_visible()
    told = trainer.http.get("/api/chats", params={"run": trainer.run, "after": 0}).json()["chats"]
    assert [(chat["verdict"], chat["hint"], chat["revision"]["verdict"]) for chat in told] == [
        ("wrong", "A town.", "right")
    ]
    page.reload()  # the session's history stays
    page.click("#tab-chat")
    playwright.expect(page.locator("#history .answer")).to_have_count(2)
    page.fill("#chat-question", "And Ada?")
    page.keyboard.press("Enter")
    trainer.job(error="The model is busy.")
    playwright.expect(page.locator("#history")).to_contain_text("The model is busy.")


def test_the_curve_and_the_sample_after_a_round(trainer, open_page):
    trainer.ask("first?")
    page = open_page()
    playwright.expect(page.locator("#no-curve")).to_be_visible()
    for round, accuracy in ((1, 0.125), (2, 0.75)):
        answer = {"question": "Who?", "answer": f"answer {round}"}
        trainer.phase(round, "evaluating", accuracy=accuracy, sample=answer)
        shows(page, f"#curve tbody tr:nth-child({round})", f"{round}{100 * accuracy:g} %")
    playwright.expect(page.locator("#live")).to_contain_text("Accuracy after round 2: 75 %.")
    shows(page, "#curve desc", "After round 1: 12.5 %; After round 2: 75 %")
    shows(page, "#sample-answers .before dd", "answer 1")
    shows(page, "#sample-answers .after dd", "answer 2")
    heights = page.locator("#curve circle").evaluate_all(
        "dots => dots.map(dot => +dot.getAttribute('cy'))"
    )
    marks = page.locator("#curve .grid").evaluate_all(
        "lines => lines.map(line => +line.getAttribute('y1'))"
    )
    share = [(marks[0] - height) / (marks[0] - marks[-1]) for height in heights]
    assert share == pytest.approx([0.125, 0.75])  # the axis ends at 100 %


def test_two_people_teach_for_three_rounds(trainer, open_page):
    pages = [open_page("person-0"), open_page("person-1")]
    for round in (1, 2, 3):
        trainer.ask("first?", "second?", "third?", "fourth?", round=round)
        for key in "rw":  # each holds a question before one answers, and so answers two
            for page in pages:
                playwright.expect(page.locator("#card")).not_to_have_attribute("aria-busy", "true")
                playwright.expect(page.locator("#question")).to_be_visible()
            for page in pages:
                page.keyboard.press(key)
        told = [verdict for verdict, _ in trainer.answers(4 * round)[-4:]]
        assert sorted(told) == ["right", "right", "wrong", "wrong"]
        trainer.phase(round, "done" if round == 3 else "training", accuracy=round / 4)
    for page in pages:
        shows(page, "#idle-text", "The last round is over. Thank you.")
        shows(page, "#counts", "4 of 4 answered · 2 by you")
        playwright.expect(page.locator("#curve tbody tr")).to_have_count(3)


def test_an_outage_loses_nothing_that_was_typed(trainer, open_page):
    trainer.ask("first?", "second?")
    page = open_page()
    shows(page, "#question", "first?")
    page.context.set_offline(True)
    page.fill("#hint", "kept")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#banner")).to_contain_text("cannot be reached")
    playwright.expect(page.locator("#hint")).to_have_value("kept")
    page.context.set_offline(False)
    shows(page, "#question", "second?")
    playwright.expect(page.locator("#banner")).to_be_hidden()
    assert trainer.answers(1) == [("wrong", "kept")]


def test_a_lease_that_runs_out_is_taken_anew(trainer, open_page):
    trainer.ask("first?")
    page = open_page()
    shows(page, "#question", "first?")
    over = {"expires": time.time() - 5}
    changes = over | {"id": "other", "question": "of somebody else?"}

    def change(route):
        lease = route.fetch()
        route.fulfill(response=lease, json=lease.json() | changes)

    page.route("**/api/lease", change)
    page.reload()
    shows(page, "#question", "of somebody else?")
    page.fill("#hint", "for that question alone")
    changes = over
    shows(page, "#question", "first?")
    playwright.expect(page.locator("#problem")).to_contain_text("ran out")
    playwright.expect(page.locator("#hint")).to_have_value("")
    page.fill("#hint", "half a hint")
    with page.expect_response("**/api/lease"):
        changes = {}
    playwright.expect(page.locator("#lease")).to_contain_text("Yours for 1:")
    playwright.expect(page.locator("#hint")).to_have_value("half a hint")


def states(trainer, page):
    """Shows the page in each of its states, one after the other."""
    long = "a question without a break " + "x" * 120
    playwright.expect(page.locator("#card")).to_be_visible()
    yield "card"
    page.click("#help")
    yield "keys"
    page.keyboard.press("Escape")
    page.click("#tab-chat")
    yield "empty chat"
    page.fill("#chat-question", long)
    page.click("#ask")
    trainer.job(answer=long, adapter="round 0")
    page.fill("#history textarea", long)
    yield "chat with an answer"
    page.click("#history .wrong")
    trainer.job(answer=long, adapter="round 0")
    playwright.expect(page.locator("#history .right")).to_be_visible()
    yield "chat with a revision"
    page.click("#tab-queue")
    page.fill("#hint", "a hint")
    page.click("#right")
    yield "a problem"
    page.click("#wrong")
    playwright.expect(page.locator("#idle")).to_be_visible()
    yield "idle"


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_every_state_is_accessible_and_fits(trainer, open_page, width, scheme):
    package = pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python")
    axe = (pathlib.Path(package.__file__).parent / "axe.min.js").read_text()
    trainer.ask("w" * 150, answer="<b>" + "m" * 150)
    for round in (1, 2):
        sample = {"question": "q" * 90, "answer": "a" * 90}
        trainer.phase(round, "asking", accuracy=round / 4, sample=sample, deadline=time.time() + 99)
    page = open_page(width=width, scheme=scheme)
    small = """() => [...document.querySelectorAll("button, select, textarea, label.check")]
        .filter((node) => node.checkVisibility())
        .map((node) => [node.id || node.textContent, node.getBoundingClientRect()])
        .filter(([, box]) => box.width < 44 || box.height < 44).map(([name]) => name)"""
    page.evaluate(axe)
    for state in states(trainer, page):
        found = page.evaluate("axe.run()")["violations"]
        serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
        assert [(fault["id"], fault["nodes"][0]["html"]) for fault in serious] == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state
        assert page.evaluate(small) == [], state
