"""The tasks by name."""

import dataclasses
from collections.abc import Mapping

from spear_jax.core.errors import UserError, unknown
from spear_jax.tasks.arc_challenge import ArcChallenge, ArcEasy
from spear_jax.tasks.base import Task, Templates
from spear_jax.tasks.facts import Facts
from spear_jax.tasks.gsm8k import Gsm8k
from spear_jax.tasks.hellaswag import HellaSwag
from spear_jax.tasks.math_mcqa import MathMcqa
from spear_jax.tasks.mcqa import Mcqa
from spear_jax.tasks.pairs import Pairs
from spear_jax.tasks.preferences import Preferences
from spear_jax.tasks.reasoned import Reasoned
from spear_jax.tasks.strategy_qa import StrategyQa
from spear_jax.tasks.ultrachat import UltraChat

TASKS: dict[str, type[Task]] = {
    "arc_challenge": ArcChallenge,
    "arc_easy": ArcEasy,
    "hellaswag": HellaSwag,
    "math_mcqa": MathMcqa,
    "strategy_qa": StrategyQa,
    "gsm8k": Gsm8k,
    "mcqa": Mcqa,
    "ultrachat": UltraChat,
    "pairs": Pairs,
    "preferences": Preferences,
    "facts": Facts,
    "reasoned": Reasoned,
}

# The fields that each template may use, and those that it must.
_FIELDS = {
    "question": ({"question": "", "options": ""}, ("question",)),
    "revision": ({"task": "", "answer": "", "feedback": "", "format": ""}, ("task", "feedback")),
}


def get_task(
    name: str, templates: Mapping[str, str] | None = None, columns: Mapping[str, str] | None = None
) -> Task:
    """Builds a task.

    Args:
        name: a key of TASKS.
        templates: wording to use instead of the task's own, by field of `Templates`; "" keeps the
            task's own.
        columns: the file's column names, by the keys of the task's `mapping`; "" keeps the task's
            own.

    Raises:
        UserError: for an unknown task, template or column key, or a template with wrong fields.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task = TASKS[name](columns)
    given = {key: text for key, text in (templates or {}).items() if text}
    for key, text in given.items():
        _check_template(key, text)
    task.templates = dataclasses.replace(task.templates, **given)
    return task


def _check_template(key: str, text: str) -> None:
    """Raises UserError for a template that would fail, or lose its content, when it is filled
    in.
    """
    known = [field.name for field in dataclasses.fields(Templates)]
    if key not in known:
        raise unknown("template", key, known)
    if key == "header" and text != text.rstrip():
        raise UserError(
            f"template 'header' {text!r} ends in white space; end it with a mark such as 'Answer:'."
        )
    if key not in _FIELDS:
        return
    fields, needed = _FIELDS[key]
    try:
        text.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        names = ", ".join(f"{{{field}}}" for field in fields)
        raise UserError(
            f"template {key!r} cannot be filled in ({error!r}); it may use {names}, other braces "
            f"are doubled."
        ) from error
    for field in needed:
        if f"{{{field}}}" not in text:
            raise UserError(
                f"template {key!r} lacks {{{field}}}; add it, or the model never sees that text."
            )
