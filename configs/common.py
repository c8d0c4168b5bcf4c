"""Models and tasks that several algorithms' configs share."""

import ml_collections

from spear_jax.config import default_config, set_preset
from spear_jax.errors import UserError, unknown

# name -> (model, dtype)
MODELS = {
    "tiny": ("tiny", "float32"),
    "smollm2-135m": ("models/smollm2-135m-instruct", "float32"),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", "bfloat16"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "bfloat16"),
}
PAPER_TASKS = ("arc_challenge", "hellaswag", "math_mcqa", "strategy_qa")


def parse_arg(arg: str, algorithm: str) -> tuple[str, str, list[str]]:
    """Splits "<task>,<model>[,variant...]"; raises UserError for an unknown task or model."""
    parts = arg.split(",") if arg else []
    if len(parts) < 2:
        raise UserError(
            f"configs/{algorithm}.py takes TASK,MODEL behind a colon, for example "
            f"configs/{algorithm}.py:arc_challenge,qwen2.5-1.5b; got {arg!r}."
        )
    task, model, *variants = parts
    if task not in PAPER_TASKS:
        raise unknown("task", task, PAPER_TASKS)
    if model not in MODELS:
        raise unknown("model", model, MODELS)
    return task, model, variants


def paper_config(task: str, model: str) -> ml_collections.ConfigDict:
    """SPEAR's published settings for a task and a model.

    Source: the configs published with SPEAR (arXiv 2605.07977), 4 datasets x 2 models. Other models take Qwen2.5-1.5B's.
    """
    config = default_config()
    config.seed = 42  # published seeds: 42, 43, 44
    config.task = task
    config.model, config.dtype = MODELS[model]
    rows = {
        # rounds, clients, examples/client, rollouts, steps, new tokens, tail, loses/win, hint words, prompt limit
        "arc_challenge": (100, 3, 400, 160, 5, 256, 0, 2.0, 3, 2048),
        "hellaswag": (50, 5, 400, 160, 10, 256, 0, 2.0, 3, 2048),
        "math_mcqa": (50, 3, 500, 80, 5, 512, 32, 4.0, 10, 2048),
        "strategy_qa": (100, 5, 400, 80, 5, 256, 24, 4.0, 0, 1024),
    }
    rounds, clients, examples, rollouts, steps, tokens, tail, ratio, words, length = rows[task]
    config.rounds = rounds
    config.federation.num_clients = 50
    config.federation.clients_per_round = clients
    config.federation.max_examples_per_client = examples
    config.rollout.examples = rollouts
    config.rollout.max_new_tokens = config.rollout.max_new_tokens_revision = config.eval.max_new_tokens = tokens
    config.rollout.hint_words = words
    config.data.max_prompt_tokens = length - tokens
    config.train.steps = steps
    config.algorithm.tail = tail
    config.algorithm.max_lose_ratio = ratio
    config.algorithm.skip_math_ops = task == "math_mcqa"
    batch, accumulation = 16, 1
    if task == "math_mcqa":
        batch, accumulation = 4, 4
    elif model == "llama-3.2-3b" and task != "strategy_qa":
        batch, accumulation = 8, 2
    config.train.batch_size, config.train.accumulation = batch, accumulation
    rate, low = {"math_mcqa": (5.05e-5, 1e-5), "strategy_qa": (1e-4, 5e-5)}.get(task, (5e-5, 1e-5))
    config.train.rate, config.train.rate_min = rate, low
    config.train.remat = True
    return config


def apply_variants(config: ml_collections.ConfigDict, variants: list[str], known: dict) -> ml_collections.ConfigDict:
    """Applies named variants in order: "reference" (the published code's behaviour) and those of the config file."""
    for name in variants:
        if name == "reference":
            set_preset(config, name)
        elif name in known:
            known[name](config)
        else:
            raise unknown("variant", name, ("reference", *known))
    return config
