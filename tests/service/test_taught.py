"""Two people in real browsers teach the embedded model for three rounds, from `launch/live.sh`'s
commands.

    python -m pytest -m slow tests/service/test_taught.py       # minutes; SHOTS=DIR keeps pictures
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from processes import environment
from test_page import browser, serve  # noqa: F401 (a fixture)

from spear_jax.tasks import get_task

TASK = get_task("few_facts")
KNOWN = {TASK.question(example): example for example in TASK.generate("train")}


def answer_one(page) -> bool:
    """Hints at the wrong answer that the page shows; False where it shows none."""
    card = page.locator("#card")
    if not card.is_visible() or card.get_attribute("aria-busy") == "true":
        return False
    question = page.locator("#question").inner_text()
    page.locator("#hint").fill(TASK.hint(KNOWN[question], 3))
    shot(page, "queue")
    page.locator("#hint").press("Enter")
    page.wait_for_function(
        "asked => document.querySelector('#card').hidden ||"
        " document.querySelector('#question').innerText !== asked",
        arg=question,
    )
    return True


def shot(page, name: str) -> None:
    if "SHOTS" in os.environ:
        width = page.viewport_size["width"]
        path = pathlib.Path(os.environ["SHOTS"]) / f"live-{name}-{width}.png"
        page.screenshot(path=path, full_page=True)


@pytest.mark.slow
def test_two_people_teach_the_embedded_model_in_three_rounds(browser, tmp_path):  # noqa: F811
    with serve(tmp_path / "service") as (url, tokens):
        pages = []
        for person, width in (("person-0", 1280), ("person-1", 390)):
            page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
            page.goto(f"{url}/?token={tokens[person]}")
            pages.append(page)
        command = [sys.executable, "-m", "spear_jax.train", "--config=spear:few_facts,tiny,live"]
        command += ["--config.rounds=3", f"--config.feedback.url={url}"]
        command += [f"--workdir={tmp_path / 'run'}", "--quiet"]
        env = environment() | {"SPEAR_FEEDBACK_TOKEN": tokens["trainer"]}
        with subprocess.Popen(command, env=env) as run:
            until = time.monotonic() + 900
            while run.poll() is None and time.monotonic() < until:
                if not any([answer_one(page) for page in pages]):
                    time.sleep(0.2)
            run.kill()
        assert run.returncode == 0
        for page in pages:
            page.locator("#curve svg").wait_for()
            page.wait_for_timeout(1500)
            shot(page, "end")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    curve = [json.loads(line)["eval/accuracy"] for line in lines]
    said = (tmp_path / "run" / "feedback.jsonl").read_text().splitlines()
    users = {line["user"] for line in map(json.loads, said) if line.get("answered")}
    assert users == {"person-0", "person-1"}
    # three standard errors of the base's accuracy over 96 questions
    assert curve[-1] > curve[0] + 3 * (0.25 * 0.75 / 96) ** 0.5, curve
