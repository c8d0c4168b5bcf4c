"""Simulated people: they answer sometimes, err sometimes, and hint sometimes."""

import zlib
from collections.abc import Iterator

import numpy as np

from spear_jax.feedback.base import Request
from spear_jax.feedback.recorded import Answer, Recorded


class Simulated(Recorded):
    """People who know the gold answer, with the rates of `config.feedback`.

    One answers at all with `reply_rate`, after an exponential time of mean `delay` seconds, which is
    not waited for: it is late where it exceeds `deadline`. With `error_rate` one takes a wrong answer
    for right, and where verdicts are asked for, a right one for wrong. About an answer that is taken
    for wrong one hints with `hint_rate`, as the oracle does. Draws depend on the request's id alone.
    """

    def ask(self, requests: list[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            rng = np.random.default_rng(zlib.crc32(f"{request.id}/simulated".encode()))
            replies, errs, hints = rng.random(3) < (
                self.settings.reply_rate,
                self.settings.error_rate,
                self.settings.hint_rate,
            )
            seconds = float(rng.exponential(self.settings.delay)) if self.settings.delay else 0.0
            deadline = self.settings.deadline
            if not replies or (deadline and seconds > deadline):
                continue
            right = self.task.grade(request.answer, request.example) != bool(errs)
            hint = None
            if not right and hints:
                hint = self.task.hint(request.example, self.hint_words)
            user = f"simulated {request.client}"
            yield request, Answer(right if self.judges else None, hint, user, seconds)
