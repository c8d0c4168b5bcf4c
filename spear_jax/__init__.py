"""spear_jax: federated self-play fine-tuning of language models from feedback, in JAX.

    import spear_jax as sj

    config = sj.preset("spear", task="facts", model="tiny")
    run = sj.Run(config, workdir="runs/hello")
    for round in run:
        print(round.number, round.metrics["rollout/first_accuracy"])
    print(run.evaluate().accuracy)
    run.export("runs/hello/adapter")

The names below are the public API. They are imported when they are first used, so that
`import spear_jax` is quick and touches no device.
"""

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spear_jax.algorithms.base import Algorithm as Algorithm
    from spear_jax.core.errors import UserError as UserError
    from spear_jax.core.types import Example as Example
    from spear_jax.core.types import Trace as Trace
    from spear_jax.core.types import TraceRecord as TraceRecord
    from spear_jax.experiment.command_line import load_config as load_config
    from spear_jax.experiment.config import default_config as default_config
    from spear_jax.experiment.evaluator import Accuracy as Accuracy
    from spear_jax.experiment.presets import preset as preset
    from spear_jax.experiment.run import Callback as Callback
    from spear_jax.experiment.run import Round as Round
    from spear_jax.experiment.run import Run as Run
    from spear_jax.experiment.run import load_run as load_run
    from spear_jax.federated.aggregation.lora_rules.base import LoraRule as LoraRule
    from spear_jax.federated.aggregation.reducers import Reducer as Reducer
    from spear_jax.feedback.base import Feedback as Feedback
    from spear_jax.feedback.base import Request as Request
    from spear_jax.tasks.base import Task as Task

__version__ = "0.11.0"

# transformers is used for tokenizers only, and would remark on every start that PyTorch is absent.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# In a notebook it would also ask for ipywidgets, for bars that it never shows.
warnings.filterwarnings("ignore", message="IProgress not found")

# public name -> the module that defines it
_PUBLIC = {
    "Accuracy": "experiment.evaluator",
    "Algorithm": "algorithms.base",
    "Callback": "experiment.run",
    "Example": "core.types",
    "Feedback": "feedback.base",
    "LoraRule": "federated.aggregation.lora_rules.base",
    "Reducer": "federated.aggregation.reducers",
    "Request": "feedback.base",
    "Round": "experiment.run",
    "Run": "experiment.run",
    "Task": "tasks.base",
    "Trace": "core.types",
    "TraceRecord": "core.types",
    "UserError": "core.errors",
    "default_config": "experiment.config",
    "load_config": "experiment.command_line",
    "load_run": "experiment.run",
    "preset": "experiment.presets",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'spear_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spear_jax.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
