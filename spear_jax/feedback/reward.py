"""Verdicts of a Python function of one's own."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from spear_jax.core.errors import UserError, shown
from spear_jax.feedback.base import Request
from spear_jax.feedback.recorded import DEFAULTS, Answer, FeedbackSettings, Recorded
from spear_jax.tasks.base import Task


class Reward(Recorded):
    """`feedback.reward`, a "module:function", scores each answer; 0.5 and more is right.

        def score(question, answer, example):
            return 1.0 if "because" in answer else (0.0, "Give a reason.")

    It gets the question as asked, the answer's text and the Example. It returns a score from 0 to
    1, or a pair of score and hint (a text or None).

    Raises: UserError for a function that is not there, and for a score that is none.
    """

    def __init__(self, task: Task, hint_words: int = 3, settings: FeedbackSettings = DEFAULTS):
        super().__init__(task, hint_words, settings)
        self.score = _function(settings.reward)

    def ask(self, requests: list[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            question, answer = self.task.question(request.example), request.answer.strip()
            found = self.score(question, answer, request.example)
            score, hint = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
            number = isinstance(score, (int, float)) and math.isfinite(score) and 0 <= score <= 1
            if not number or not (hint is None or isinstance(hint, str)):
                raise UserError(
                    f"feedback.reward {self.settings.reward} gave {shown(found)} for the answer "
                    f"{shown(answer)}; it must give a number from 0 to 1, or a pair of that and a hint."
                )
            right = score >= 0.5
            verdict = right if self.judges else None
            yield request, Answer(verdict, None if right else hint, self.settings.reward)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(
            f"rollout.feedback is 'reward', but feedback.reward is {shown(name)}; give "
            "--config.feedback.reward=MODULE:FUNCTION."
        )
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        why = f"the module {module!r} is not there; start from its folder, or put it on PYTHONPATH"
    except AttributeError:
        why = f"module {module!r} has no {function!r}"
    raise UserError(f"feedback.reward is {shown(name)}, but {why}.")
