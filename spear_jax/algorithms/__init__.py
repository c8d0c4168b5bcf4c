"""Methods by name."""

from typing import Any

from spear_jax.algorithms.base import Algorithm, CommonHyperparams
from spear_jax.algorithms.dpo import Dpo
from spear_jax.algorithms.feedback_sft import FeedbackSft
from spear_jax.algorithms.grpo import Grpo
from spear_jax.algorithms.iris import Iris
from spear_jax.algorithms.opsd import Opsd
from spear_jax.algorithms.rltf_sd import RltfSd
from spear_jax.algorithms.sft import Sft
from spear_jax.algorithms.space import Space
from spear_jax.algorithms.spear import Spear
from spear_jax.algorithms.spif import Spif
from spear_jax.algorithms.spin import Spin
from spear_jax.algorithms.tpaw import Tpaw
from spear_jax.algorithms.tspin import Tspin

METHODS: tuple[type[Algorithm], ...] = (
    Spear,
    FeedbackSft,
    Grpo,
    Opsd,
    RltfSd,
    Sft,
    Dpo,
    Spin,
    Tpaw,
    Iris,
    Space,
    Spif,
    Tspin,
)
ALGORITHMS: dict[str, type[Algorithm]] = {method.name: method for method in METHODS}


def build_algorithm(settings: Any, eos_ids: tuple[int, ...]) -> Algorithm:
    """Builds the settings' method.

    Args:
        settings: a parsed experiment (`experiment.config.Settings`).
        eos_ids: the token ids that end a completion.
    """
    train, rollout = settings.train, settings.rollout
    common = CommonHyperparams(
        examples=rollout.examples,
        steps=train.steps,
        accumulation=train.accumulation,
        batch_size=train.batch_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        eos_ids=eos_ids,
    )
    return ALGORITHMS[settings.algorithm.name](settings.method, common)
