"""Tasks by name."""

from collections.abc import Callable, Mapping

from spear_jax.core.errors import unknown
from spear_jax.core.types import Example
from spear_jax.tasks.agnews import AgNews
from spear_jax.tasks.arc_challenge import ArcChallenge, ArcEasy
from spear_jax.tasks.base import Answer, Task
from spear_jax.tasks.facts import Facts, FewFacts
from spear_jax.tasks.gsm8k import Gsm8k
from spear_jax.tasks.hellaswag import HellaSwag
from spear_jax.tasks.math_mcqa import MathMcqa
from spear_jax.tasks.mcqa import Mcqa
from spear_jax.tasks.pairs import Pairs
from spear_jax.tasks.preferences import Preferences
from spear_jax.tasks.qa import Qa
from spear_jax.tasks.reasoned import Reasoned
from spear_jax.tasks.strategy_qa import StrategyQa
from spear_jax.tasks.ultrachat import UltraChat

TASKS: dict[str, type[Task]] = {
    "arc_challenge": ArcChallenge,
    "arc_easy": ArcEasy,
    "hellaswag": HellaSwag,
    "agnews": AgNews,
    "math_mcqa": MathMcqa,
    "strategy_qa": StrategyQa,
    "gsm8k": Gsm8k,
    "mcqa": Mcqa,
    "qa": Qa,
    "ultrachat": UltraChat,
    "pairs": Pairs,
    "preferences": Preferences,
    "facts": Facts,
    "few_facts": FewFacts,
    "reasoned": Reasoned,
}


def get_task(
    name: str,
    templates: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    extract: Callable[[str, Example], Answer | None] | None = None,
) -> Task:
    """Builds a task by name; the other arguments are those of `Task`.

    Raises: UserError for an unknown task, template or column key, or a template with wrong fields.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name](columns, templates, extract)
