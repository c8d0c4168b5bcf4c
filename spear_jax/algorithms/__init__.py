"""The methods by name, and how each is built from a config."""

import ml_collections

from spear_jax.algorithms.base import Algorithm
from spear_jax.algorithms.spear import Spear, SpearConfig
from spear_jax.models.load import LoadedModel
from spear_jax.tasks.base import Task

ALGORITHMS: dict[str, type[Algorithm]] = {"spear": Spear}


def build_algorithm(config: ml_collections.ConfigDict, task: Task, model: LoadedModel) -> Algorithm:
    """The config's method with its numbers."""
    settings, train = config.algorithm, config.train
    strings = task.protected + (task.math_ops if settings.skip_math_ops else ())
    protected = {i for text in strings for i in model.tokenizer.encode(text, add_special_tokens=False)}
    return Spear(
        SpearConfig(
            rollouts=config.rollout.examples,
            batch_size=train.batch_size,
            steps=train.steps,
            accumulation=train.accumulation,
            win_weight=settings.win_weight,
            lose_weight=settings.lose_weight,
            margin=settings.margin,
            tail=settings.tail,
            max_lose_ratio=settings.max_lose_ratio,
            strict_format=settings.strict_format,
            confidence=settings.confidence,
            confidence_weighting=settings.confidence_weighting,
            ul_denominator=settings.ul_denominator,
            answer_window=settings.answer_window,
            skip_weight=settings.skip_weight,
            cap=settings.cap,
            retokenise=settings.retokenise,
            protected_ids=tuple(sorted(protected)),
            eos_ids=model.eos_ids,
        )
    )
