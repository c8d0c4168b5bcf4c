"""The tasks by name."""

import dataclasses
from collections.abc import Mapping

from spear_jax.errors import UserError, unknown
from spear_jax.tasks.arc_challenge import ArcChallenge, ArcEasy
from spear_jax.tasks.base import Task, Templates
from spear_jax.tasks.facts import Facts
from spear_jax.tasks.hellaswag import HellaSwag
from spear_jax.tasks.math_mcqa import MathMcqa
from spear_jax.tasks.mcqa import Mcqa
from spear_jax.tasks.reasoned import Reasoned
from spear_jax.tasks.strategy_qa import StrategyQa

TASKS: dict[str, type[Task]] = {
    "arc_challenge": ArcChallenge,
    "arc_easy": ArcEasy,
    "hellaswag": HellaSwag,
    "math_mcqa": MathMcqa,
    "strategy_qa": StrategyQa,
    "mcqa": Mcqa,
    "facts": Facts,
    "reasoned": Reasoned,
}

# The fields that each template may use, and those that it must.
_FIELDS = {
    "question": ({"question": "", "options": ""}, ("question",)),
    "revision": ({"task": "", "answer": "", "feedback": "", "format": ""}, ("task", "feedback")),
}


def get_task(name: str, templates: Mapping[str, str] | None = None, columns: Mapping[str, str] | None = None) -> Task:
    """Builds a task.

    Args:
        name: a key of TASKS.
        templates: wording to use instead of the task's own, by field of `Templates`; "" keeps the task's own.
        columns: the column mapping of `mcqa`; other tasks have fixed columns and do not read it.

    Raises:
        UserError: for an unknown task, template or column key, or a template with wrong fields.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task = Mcqa(columns) if TASKS[name] is Mcqa else TASKS[name]()
    given = {key: text for key, text in (templates or {}).items() if text}
    for key, text in given.items():
        _check_template(key, text)
    task.templates = dataclasses.replace(task.templates, **given)
    return task


def _check_template(key: str, text: str) -> None:
    """Raises UserError for a template that would fail, or lose its content, when it is filled in."""
    known = [field.name for field in dataclasses.fields(Templates)]
    if key not in known:
        raise unknown("template", key, known)
    if key == "header" and text != text.rstrip():
        raise UserError(f"template 'header' {text!r} ends in white space; end it with a mark such as 'Answer:'.")
    if key not in _FIELDS:
        return
    fields, needed = _FIELDS[key]
    try:
        text.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        names = ", ".join(f"{{{field}}}" for field in fields)
        raise UserError(
            f"template {key!r} cannot be filled in ({error!r}); it may use {names}, other braces are doubled."
        ) from error
    for field in needed:
        if f"{{{field}}}" not in text:
            raise UserError(f"template {key!r} lacks {{{field}}}; add it, or the model never sees that text.")
