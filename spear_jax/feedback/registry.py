"""Feedback providers by name."""

from spear_jax.core.errors import unknown
from spear_jax.feedback.base import Feedback
from spear_jax.feedback.console import Human, Silent
from spear_jax.feedback.mixture import Mixture, read_mixture
from spear_jax.feedback.oracle import Oracle
from spear_jax.feedback.recorded import DEFAULTS, FeedbackSettings, Replay
from spear_jax.tasks.base import Task

PROVIDERS: dict[str, type[Feedback]] = {"oracle": Oracle, "none": Silent, "human": Human}


def providers() -> dict[str, type[Feedback]]:
    """Returns the providers by name; `oracle_published` repeats the published code's leaks (A4)."""
    from spear_jax.feedback.judge import Judge
    from spear_jax.feedback.published import PublishedOracle  # they build on this file
    from spear_jax.feedback.reward import Reward
    from spear_jax.feedback.service import Service
    from spear_jax.feedback.simulated import Simulated

    return PROVIDERS | {
        "service": Service,
        "replay": Replay,
        "simulated": Simulated,
        "judge": Judge,
        "reward": Reward,
        "oracle_published": PublishedOracle,
    }


def get_feedback(
    name: str, task: Task, hint_words: int, settings: FeedbackSettings = DEFAULTS
) -> Feedback:
    """Builds the provider of that name; raises UserError for an unknown one."""
    if name == "mixture":
        parts = read_mixture(settings.mixture)
        names = dict.fromkeys(named for *_, named in parts)
        made = {named: get_feedback(named, task, hint_words, settings) for named in names}
        return Mixture(task, [(first, last, made[named]) for first, last, named in parts])
    known = providers()
    if name not in known:
        raise unknown("feedback", name, [*known, "mixture"])
    return known[name].build(task, hint_words, settings)
