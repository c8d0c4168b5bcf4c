"""Models and tasks that all methods' configs share: a method's config is the task's, with the method's
name and its own numbers.

A preset has a name and an argument, as in `--config=spear:facts,tiny`. The argument of a method is
"<task>,<model>[,variant...]":

- task: any of TASKS. facts and reasoned (embedded) have sizes for minutes on a CPU; arc_challenge,
  arc_easy, hellaswag, math_mcqa, strategy_qa, gsm8k and ultrachat the published ones; qa, mcqa,
  pairs, preferences and tasks of your own the sizes for own data (`own_config`).
- model: qwen2.5-1.5b, llama-3.2-3b, smollm2-135m, tiny (embedded; what the two embedded tasks need);
  or a Hugging Face folder, a .gguf file, or a Hub id.
- variant: reference (the method's published code, defects included, where it has one), cpu (a small
  real model on two cores), small (the embedded tasks at the size that `compare` is documented with),
  smoke (the embedded tasks at the smallest size: seconds, to see that a part of your own runs), live
  (the embedded tasks for a few people at browsers).
"""

import functools
import os
from collections.abc import Callable, Sequence

import ml_collections

from spear_jax.algorithms import ALGORITHMS
from spear_jax.algorithms.base import EMBEDDED, Algorithm
from spear_jax.core.errors import UserError, nearest, shown, unknown
from spear_jax.experiment.config import default_config, set_preset
from spear_jax.experiment.published import yaml_config
from spear_jax.tasks import TASKS
from spear_jax.tasks.base import Task

# name -> (model, dtype)
MODELS = {
    "tiny": ("tiny", "float32"),
    "smollm2-135m": ("models/smollm2-135m-instruct", "float32"),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", "bfloat16"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "bfloat16"),
}

# rounds, clients, examples/client, rollouts, steps, new tokens, hint words, prompt limit
PAPER = {
    "arc_challenge": (100, 3, 400, 160, 5, 256, 3, 2048),
    "hellaswag": (50, 5, 400, 160, 10, 256, 3, 2048),
    "math_mcqa": (50, 3, 500, 80, 5, 512, 10, 2048),
    "strategy_qa": (100, 5, 400, 80, 5, 256, 0, 1024),
}
# Not in the paper: ARC-Easy as ARC-Challenge; the two response datasets with MATH's batch and
# SPIN's lengths.
PAPER["arc_easy"] = PAPER["arc_challenge"]
PAPER["gsm8k"] = PAPER["math_mcqa"]
PAPER["ultrachat"] = (50, 5, 400, 80, 5, 256, 0, 1024)


Preset = Callable[[str], ml_collections.ConfigDict]


def named_presets() -> dict[str, Preset]:
    """Every preset by its name: what makes its config from the argument behind the colon.

    ```
    named_presets()["spear"]("facts,tiny")       # --config=spear:facts,tiny
    named_presets()["quickstart"]("")            # --config=quickstart
    named_presets()["from_yaml"]("run.yaml")     # --config=from_yaml:run.yaml
    ```

    Methods of your own are among them as soon as they stand in ALGORITHMS.
    """
    methods = {name: functools.partial(method_config, name) for name in ALGORITHMS}
    return {**methods, "quickstart": quickstart, "from_yaml": yaml_config.from_argument}


def quickstart(arg: str = "") -> ml_collections.ConfigDict:
    """SPEAR on an embedded task, with the embedded model.

    Args:
        arg: "facts" (multiple choice; taken where there is none) or "reasoned" (a reasoned answer
            with an answer line), and behind it variants, as in "facts,reference".
    Raises: UserError for another task or an unknown variant.
    """
    task, *variants = (arg or "facts").split(",")
    if task not in EMBEDDED:
        raise unknown("embedded task", task, EMBEDDED)
    return method_config("spear", ",".join([task, "tiny", *variants]))


def preset(
    method: str | type[Algorithm] = "spear",
    task: str | Task = "facts",
    model: str = "tiny",
    variants: Sequence[str] = (),
) -> ml_collections.ConfigDict:
    """Returns the config of a method for a task and a model.

    ```
    preset("spear", task="facts", model="tiny", variants=["small"])
    preset("dpo", task="arc_challenge", model="qwen2.5-1.5b")      # the paper's sizes
    preset("spear", task="qa", model="Qwen/Qwen2.5-0.5B-Instruct")  # for data of your own
    ```

    Args:
        method: a name of ALGORITHMS, or a class of your own, which then gets its config group.
        task: a name of TASKS, or a task of your own, to be passed to `Run` as well.
        model: a name of MODELS, a Hugging Face folder, a Hub id, or a .gguf file.
        variants: "reference", and "small", "smoke" or "live" (embedded tasks) or "cpu" (all others).
    Raises: UserError for an unknown name.
    """
    name = method if isinstance(method, str) else register(method)
    if isinstance(task, str) and task not in TASKS:
        raise unknown("task", task, TASKS)
    return _config(name, task if isinstance(task, str) else task.name, model, variants)


def register(method: type[Algorithm]) -> str:
    """Makes a method of your own known by its name, and returns the name."""
    known = ALGORITHMS.get(method.name, method)
    if known.__module__.startswith("spear_jax.") and known is not method:
        raise UserError(
            f"method {method.name!r} has the name of one of ours; give {method.__name__}.name "
            "another one."
        )
    ALGORITHMS[method.name] = method
    return method.name


def method_config(method: str, arg: str) -> ml_collections.ConfigDict:
    """The config of a method for "<task>,<model>[,variant...]"; raises UserError for an unknown
    name.
    """
    parts = arg.split(",") if arg else []
    if len(parts) < 2:
        raise UserError(
            f"the config {method!r} takes TASK,MODEL behind a colon, for example "
            f"--config={method}:arc_challenge,qwen2.5-1.5b; got {arg!r}."
        )
    task, model, *variants = parts
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    return _config(method, task, model, variants)


def _config(
    method: str, task: str, model: str, variants: Sequence[str]
) -> ml_collections.ConfigDict:
    """The config of a method, a task and a model at the task's sizes, with its variants."""
    if method not in ALGORITHMS:
        raise unknown("algorithm", method, ALGORITHMS)
    if task in EMBEDDED and model != "tiny":
        raise UserError(
            f"task {task!r} is about facts that only the embedded model lacks; give {task},tiny "
            f"instead of model {model!r}."
        )
    known = {"small": small, "smoke": smoke, "live": live} if task in EMBEDDED else {"cpu": cpu}
    config = default_config()
    config.task = task
    config.model, config.dtype = _model(model)
    if task in EMBEDDED:
        embedded_config(config)
    elif task in PAPER:
        paper_config(config)
    else:
        own_config(config)
    config.algorithm.name = method
    _recommend(config, task)
    for name in variants:
        if name == "reference":
            set_preset(config, name)
        elif name in known:
            known[name](config)
        else:
            raise unknown("variant", name, ("reference", *known))
    return config


def _model(name: str) -> tuple[str, str]:
    """Returns the model that a name of MODELS, a path or a Hub id stands for, and its dtype."""
    if name in MODELS:
        return MODELS[name]
    if not (os.sep in name or os.path.exists(name)):
        raise UserError(
            f"unknown model {shown(name)}.{nearest(name[:200], MODELS)} Give one of "
            f"{', '.join(MODELS)}, a model folder, a .gguf file, or a Hub id (owner/name)."
        )
    return name, "bfloat16"


def _recommend(config: ml_collections.ConfigDict, task: str, variant: str = "") -> None:
    """Sets what the config's method recommends for a task."""
    fields = ALGORITHMS[config.algorithm.name].recommended(task, variant)
    config.update_from_flattened_dict(dict(fields))


def paper_config(config: ml_collections.ConfigDict) -> None:
    """SPEAR's published settings for a config's task and model.

    Source: the configs published with SPEAR (arXiv 2605.07977), 4 datasets x 2 models. Other models
        take Qwen2.5-1.5B's.
    """
    task = config.task
    config.seed = 42  # published seeds: 42, 43, 44
    rounds, clients, examples, rollouts, steps, tokens, words, length = PAPER[task]
    config.rounds = rounds
    config.federation.num_clients = 50
    config.federation.clients_per_round = clients
    config.federation.max_examples_per_client = examples
    config.rollout.examples = rollouts
    config.rollout.max_new_tokens = config.rollout.max_new_tokens_revision = (
        config.eval.max_new_tokens
    ) = tokens
    config.rollout.hint_words = words
    config.data.max_prompt_tokens = length - tokens
    config.data.max_response_tokens = tokens
    config.train.steps = steps
    batch, accumulation = 16, 1
    if task == "math_mcqa":
        batch, accumulation = 4, 4
    elif config.model == MODELS["llama-3.2-3b"][0] and task != "strategy_qa":
        batch, accumulation = 8, 2
    config.train.batch_size, config.train.accumulation = batch, accumulation
    rate, low = {"math_mcqa": (5.05e-5, 1e-5), "strategy_qa": (1e-4, 5e-5)}.get(task, (5e-5, 1e-5))
    config.train.learning_rate, config.train.learning_rate_min = rate, low
    config.train.remat = "auto"


def own_config(config: ml_collections.ConfigDict) -> None:
    """Data of your own: four clients that share the examples equally, and a model of 0.1B to 8B.

    The rate is QLoRA's for models up to 13B (arXiv 2305.14314); the other numbers are ours, for
    files from 20 rows on.
    """
    config.rounds = 10
    config.federation.num_clients = config.federation.clients_per_round = 4
    config.federation.partition = "iid"
    config.rollout.examples = 16
    config.data.max_prompt_tokens = 2048
    config.data.max_response_tokens = 512
    config.eval.every = 2
    config.eval.limit = 500
    config.train.steps = 5
    config.train.batch_size = 8
    config.train.learning_rate, config.train.learning_rate_min = 2e-4, 2e-5
    config.train.remat = "auto"  # the model's size is not known here


def embedded_config(config: ml_collections.ConfigDict) -> None:
    """The embedded tasks: a tiny model, eight clients, minutes on a CPU."""
    config.rounds = 12
    config.federation.num_clients = 8
    config.federation.clients_per_round = 8
    config.rollout.examples = 112
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0
    config.rollout.max_concurrent_sequences = 256
    config.rollout.max_new_tokens = 3
    config.rollout.max_new_tokens_revision = 3
    config.eval.every = 2
    config.eval.rows = 128
    config.lora.dropout = 0.0
    config.train.steps = 10
    config.train.batch_size = 32
    config.train.learning_rate = 5e-3
    config.train.learning_rate_min = 1e-3
    if config.task == "reasoned":
        config.rollout.max_new_tokens = 24
        config.rollout.max_new_tokens_revision = 24
        config.eval.max_new_tokens = 24


def small(config: ml_collections.ConfigDict) -> None:
    """Four clients, and fewer questions and steps a round, for grids of many runs."""
    config.rounds = 32
    config.federation.num_clients = config.federation.clients_per_round = 4
    config.rollout.examples = 48
    config.train.steps = 5
    config.train.batch_size = 16
    config.eval.every = 4
    config.record_traces = False
    config.federation.clients_at_once = 1  # on a CPU one client fills the cores and the cache
    _recommend(config, config.task, "small")


def smoke(config: ml_collections.ConfigDict) -> None:
    """Two clients and one round of one step, to see in seconds that a part of your own runs."""
    small(config)
    config.rounds = 1
    config.federation.num_clients = config.federation.clients_per_round = 2
    config.rollout.examples = 8
    config.train.steps = 1
    config.train.batch_size = 4
    config.lora.targets = ("q", "down")  # each more is time to compile
    config.eval.limit = 100


def live(config: ml_collections.ConfigDict) -> None:
    """Two people at browsers, eight questions each a round, who see what is right."""
    config.rounds = 5
    config.federation.num_clients = config.federation.clients_per_round = 2
    config.rollout.feedback = "service"
    config.feedback.show_right = True
    config.rollout.examples = 8
    config.rollout.num_revisions = 1
    config.train.steps = 8
    config.train.batch_size = 8
    config.eval.every = 1


def cpu(config: ml_collections.ConfigDict) -> None:
    """A few clients, questions and rounds: real questions and a small real model on two cores."""
    config.dtype = "float32"
    config.rounds = 8
    config.rollout.num_revisions = 1
    config.rollout.max_concurrent_sequences = 32
    config.federation.clients_at_once = 1
    config.train.steps = 2
    config.train.batch_size, config.train.accumulation = 4, 1
    config.lora.dropout = 0.0
    # 16 optimiser steps in all: the published rate would not show
    config.train.learning_rate, config.train.learning_rate_min = 5e-4, 1e-4
    config.eval.every = 4
    config.eval.limit = 200
    config.eval.rows = 16
    answer = 24
    if config.task in PAPER:
        config.federation.num_clients = 10
        config.federation.clients_per_round = 3
        config.federation.max_examples_per_client = 100
        config.rollout.examples = 24
        answer = 8
    config.rollout.max_new_tokens = config.rollout.max_new_tokens_revision = answer
    config.eval.max_new_tokens = answer
    if config.task == "agnews":
        news(config)


def news(config: ml_collections.ConfigDict) -> None:
    """Topics of news for a 0.1B model: an answer is one token, its letter.

    What a small model writes behind the letter is often another topic's name. It would be most of
    what is trained on.
    """
    config.rounds = 8
    config.data.train_limit = 2000  # more than 8 rounds ask, and read in seconds
    config.federation.num_clients = 10
    config.federation.clients_per_round = 3
    config.rollout.examples = 32
    config.rollout.temperature = config.rollout.top_p = 1.0
    config.rollout.max_new_tokens = config.rollout.max_new_tokens_revision = 1
    config.train.steps = 4
    config.train.batch_size = 8
    config.train.learning_rate, config.train.learning_rate_min = 2e-3, 4e-4
    config.lora.last_layers = 10  # of 30: no backward pass through the others
    config.eval.limit = 800
