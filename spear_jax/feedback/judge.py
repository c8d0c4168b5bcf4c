"""Feedback from a language model behind an OpenAI-compatible HTTP endpoint, such as vLLM's or
llama.cpp's server.
"""

import concurrent.futures
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.feedback.base import Request
from spear_jax.feedback.recorded import (
    DEFAULTS,
    LONGEST_HINT,
    Answer,
    FeedbackSettings,
    Recorded,
    check_url,
    http,
)
from spear_jax.tasks.base import Task

AT_ONCE = 16  # calls that are under way together; the endpoint batches them
TRIES = 5
TIMEOUT = 120.0  # seconds of one call
LONGEST_REPLY = 300  # tokens

SYSTEM = (
    "You check answers and help whoever gave them. Judge the answer to the question"
    "{gold}. Then hint at what is wrong in one short sentence. Never state the right answer, its "
    'letter or its words. Reply with one JSON object and nothing else: {{"right": true or false, '
    '"hint": "..."}}'
)


class Judge(Recorded):
    """A model at `feedback.url` that says right or wrong and hints; `feedback.model` names it.

    It is told the gold answer where the task has one. Hints that state the right answer are left
    out. A reply that cannot be read counts as none.

    Raises: UserError without a url, and where the endpoint refuses, or fails five times in a row.
    """

    def __init__(self, task: Task, hint_words: int = 3, settings: FeedbackSettings = DEFAULTS):
        super().__init__(task, hint_words, settings)
        check_url(settings.url, "judge", "http://127.0.0.1:8000/v1")
        self.failures: Any = ()  # of the network, as httpx names them
        self.cache: dict[str, Answer | None] = {}  # by what is asked

    def ask(self, requests: list[Request]) -> Iterator[tuple[Request, Answer]]:
        asked = {self._question(request.example, request.answer): request for request in requests}
        new = [text for text in asked if text not in self.cache]
        with self._client() as client, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            calls = {pool.submit(self._call, client, text, asked[text]): text for text in new}
            for call in concurrent.futures.as_completed(calls):
                self.cache[calls[call]] = call.result()
        for request in requests:
            answer = self.cache[self._question(request.example, request.answer)]
            if answer is not None:
                yield request, answer

    def _client(self) -> Any:
        httpx = http(self.settings.url, "judge", "http://127.0.0.1:8000/v1")
        self.failures = httpx.TransportError
        token = os.environ.get(self.settings.token, "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(timeout=TIMEOUT, headers=headers)

    def _question(self, example: Example, answer: str) -> str:
        gold = example.options[example.gold] if example.options else example.response.strip()
        told = SYSTEM.format(gold=f" against the right one, which is: {gold}" if gold else "")
        return f"{told}\n\nQUESTION\n{self.task.question(example)}\n\nANSWER\n{answer.strip()}"

    def _call(self, client: Any, text: str, request: Request) -> Answer | None:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": LONGEST_REPLY,
        }
        began = time.perf_counter()
        reply = self._post(client, f"{self.settings.url.rstrip('/')}/chat/completions", body)
        found = _read(reply)
        if found is None:
            return None
        right, hint = found
        if right or (hint and self.task.leaks(hint, request.example)):
            hint = None
        seconds = time.perf_counter() - began
        return Answer(right if self.judges else None, hint, "judge", seconds)

    def _post(self, client: Any, url: str, body: dict[str, Any]) -> Any:
        for number in range(TRIES):
            try:
                reply = client.post(url, json=body)
                if reply.status_code < 400:
                    return reply.json()
                why = f"{reply.status_code} {reply.text[:300]}"
                if reply.status_code != 429 and reply.status_code < 500:
                    break
            except self.failures as error:
                why = f"{type(error).__name__}: {str(error)[:200]}"
            except ValueError:
                why = "the reply is no JSON"
                break
            time.sleep(0.2 * 2**number)
        raise UserError(
            f"the judge at {url} does not answer: {why}. Check feedback.url, feedback.model and the key in "
            f"{self.settings.token}; the same command then goes on, and asks nothing again."
        )


def _read(reply: Any) -> tuple[bool, str | None] | None:
    """Returns the verdict and the hint of a reply; None where there is no verdict in it."""
    try:
        text = reply["choices"][0]["message"]["content"]
        held = json.loads(re.search(r"\{.*\}", text, re.DOTALL)[0])  # type: ignore[index]
        right, hint = held["right"], held.get("hint")
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    if not isinstance(right, bool):
        return None
    hint = " ".join(hint.split())[:LONGEST_HINT] if isinstance(hint, str) else ""
    return right, hint or None
