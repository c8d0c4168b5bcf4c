"""Every field of an experiment, its default and its range. Config files start from `default_config`
and change what differs.

A config is read once, when the experiment is built; `check_config` has then refused every value
that could not run.
"""

import importlib
from collections.abc import Sequence

import ml_collections

from spear_jax.algorithms import ALGORITHMS
from spear_jax.core.errors import UserError, unknown
from spear_jax.core.settings import check_fields, defaults
from spear_jax.federated import partition
from spear_jax.models.attention import KERNELS
from spear_jax.models.decoder import REMAT
from spear_jax.models.quantization import KINDS

COLUMNS = ("question", "options", "answer", "hint", "prompt", "response", "chosen", "rejected")


def default_config() -> ml_collections.ConfigDict:
    """All fields. Locked: a new or mistyped name is refused."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = "facts"  # a key of spear_jax.tasks.TASKS
    config.model = "tiny"  # "tiny" (embedded), a Hugging Face folder, a Hub id, or a .gguf file
    config.dtype = "float32"  # of the base: float32 or bfloat16; adapters are float32
    config.quantize = (
        "none"  # of the base's projections: none, int8, nf4; dtype is then that of everything else
    )
    config.attention = (
        "xla"  # or cudnn: its flash attention for training and prompts (NVIDIA GPUs, bfloat16)
    )
    config.rounds = 10
    config.record_traces = True  # write every rollout to traces/
    # modules of your own, imported first: they add to TASKS, PROVIDERS or ALGORITHMS
    config.imports = ()
    config.wandb = ""  # a Weights & Biases project that gets the metrics too; "" is none

    config.algorithm = algorithm = ml_collections.ConfigDict()
    # a key of spear_jax.algorithms.ALGORITHMS; its own numbers stand in the group of its name
    algorithm.name = "spear"
    algorithm.preset = "default"  # what the method's switches were set from; kept for the record
    for name, method in ALGORITHMS.items():
        config[name] = ml_collections.ConfigDict(defaults(method.Settings))

    config.budget = budget = (
        ml_collections.ConfigDict()
    )  # a run ends after the round that reaches it; 0 means no limit
    budget.tokens = 0  # generated tokens
    budget.seconds = 0  # of rounds, without evaluation and checkpoints

    config.lora = lora = ml_collections.ConfigDict()
    lora.rank = 16
    lora.alpha = 32.0
    lora.dropout = 0.1
    lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    lora.last_layers = 0  # adapters in the last n layers; 0 means all
    lora.init_from = ""  # a PEFT adapter folder to start from

    config.data = data = ml_collections.ConfigDict()
    data.path = ""  # a file or folder instead of the Hub
    data.columns = ml_collections.ConfigDict(
        dict.fromkeys(COLUMNS, "")
    )  # of tasks mcqa, pairs, preferences
    data.templates = ml_collections.ConfigDict(
        {"question": "", "revision": "", "header": "", "format": ""}
    )
    data.chat_template = "auto"  # auto, always, never
    data.max_prompt_tokens = 1024
    data.max_response_tokens = 256  # gold responses are cut there, then without an EOS
    data.train_limit = 0  # first n training examples; 0 means all
    data.extractor = "bounded"  # or published: upper-casing, without word boundaries (A5)

    config.federation = federation = ml_collections.ConfigDict()
    federation.num_clients = 10
    federation.clients_per_round = 5
    federation.sampling = "uniform"  # or weighted: by number of examples
    federation.partition = (
        "dirichlet"  # dirichlet, iid, by_label, quantity, resample (clients share examples)
    )
    federation.dirichlet_alpha = 1.0
    federation.labels_per_client = 1  # by_label
    federation.min_examples = 10  # dirichlet redraws until every client has as many
    federation.max_examples_per_client = 0  # 0 means all
    federation.aggregation = (
        "fedavg"  # fedavg, fedavgm, fedadam, fedyogi, fedadagrad, last (A1), local (none)
    )
    federation.server_rate = 1.0
    federation.beta1 = 0.9
    federation.beta2 = 0.99
    federation.tau = 5e-3
    federation.prox = 0.0  # FedProx's μ
    federation.clients_at_once = (
        0  # clients trained together on a device; 0: on a CPU one, else as many as fit
    )
    federation.colliding_streams = False  # A7: client streams keyed by round + client

    config.rollout = rollout = ml_collections.ConfigDict()
    rollout.examples = 32  # per client and round
    rollout.max_new_tokens = 64  # first answers
    rollout.max_new_tokens_revision = 64
    rollout.temperature = 0.8
    rollout.top_p = 0.95
    rollout.top_k = 0  # 0 means all
    rollout.num_revisions = 2
    rollout.feedback = "oracle"  # oracle, none, human, oracle_published (A4)
    rollout.hint_words = 3
    rollout.max_rows = 64  # rows of one generation batch
    # of its keys and values, on a device; 0: 272 on a CPU, else a quarter of the device's memory
    rollout.cache_mb = 0

    config.train = train = ml_collections.ConfigDict()
    train.steps = 5  # optimiser steps per client and round
    train.accumulation = 1
    train.batch_size = (
        16  # of a micro-batch: wins and as many loses, pairs, or prompts, as the method says
    )
    train.rate = 5e-5
    train.rate_min = 1e-5
    train.warmup = True
    train.warmup_ratio = 0.1
    train.weight_decay = 0.0
    train.clip = 1.0
    train.normalize = "global"  # or micro: mean of micro-batch means
    train.anchor_weight = 0.0
    train.anchor_gradient = True  # False: the published anchor, without gradient (A3)
    train.ema_decay = 0.0
    train.block_tokens = (
        4096  # distinct tokens that go through the model together; more where one item has more
    )
    train.remat = "attention"  # what the backward pass computes again: nothing, attention, layers
    train.head_chunk = 0  # positions per LM-head block; 0: as many as take 256 MB

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.every = (
        5  # rounds; the base model, the first and the last round are always evaluated
    )
    evaluation.first_rounds = 1  # each of the first n rounds is evaluated too
    evaluation.method = "auto"  # the task's own; or choice, generate
    evaluation.limit = 0  # first n test examples; 0 means all
    evaluation.rows = 32  # questions in one forward pass
    evaluation.max_new_tokens = 64

    config.devices = devices = ml_collections.ConfigDict()
    devices.model = 1  # devices that share one copy of the base; the others take clients

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.keep_last = 3
    checkpoint.keep_best = 1
    return config.lock()


# name -> (lowest, highest, lowest allowed itself, highest allowed itself)
_RANGES = {
    "rounds": (1, None),
    "budget.tokens": (0, None),
    "budget.seconds": (0, None),
    "data.max_prompt_tokens": (8, None),
    "data.max_response_tokens": (1, None),
    "data.train_limit": (0, None),
    "federation.num_clients": (1, None),
    "federation.clients_per_round": (1, None),
    "federation.labels_per_client": (1, None),
    "federation.min_examples": (1, None),
    "federation.max_examples_per_client": (0, None),
    "federation.prox": (0, None),
    "federation.clients_at_once": (0, None),
    "rollout.examples": (1, None),
    "rollout.max_new_tokens": (1, None),
    "rollout.max_new_tokens_revision": (1, None),
    "rollout.temperature": (0, 10),
    "rollout.top_k": (0, None),
    "rollout.num_revisions": (0, None),
    "rollout.hint_words": (0, None),
    "rollout.max_rows": (1, None),
    "rollout.cache_mb": (0, None),
    "train.steps": (1, None),
    "train.accumulation": (1, None),
    "train.batch_size": (1, None),
    "train.rate_min": (0, None),
    "train.warmup_ratio": (0, 1),
    "train.weight_decay": (0, None),
    "train.anchor_weight": (0, None),
    "train.block_tokens": (1, None),
    "train.head_chunk": (0, None),
    "eval.every": (1, None),
    "eval.first_rounds": (0, None),
    "eval.limit": (0, None),
    "eval.rows": (1, None),
    "eval.max_new_tokens": (1, None),
    "devices.model": (1, None),
    "checkpoint.keep_last": (1, None),
    "checkpoint.keep_best": (0, None),
}
_POSITIVE = ("federation.dirichlet_alpha", "rollout.top_p", "train.rate", "train.clip")
_BELOW_ONE = ("train.ema_decay",)
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "quantize": KINDS,
    "attention": KERNELS,
    "data.chat_template": ("auto", "always", "never"),
    "data.extractor": ("bounded", "published"),
    "federation.sampling": ("uniform", "weighted"),
    "federation.partition": partition.SCHEMES,
    "train.normalize": ("global", "micro"),
    "train.remat": REMAT,
    "eval.method": ("auto", "choice", "generate", "likelihood"),
}


def import_own(names: Sequence[str]) -> None:
    """Imports the modules of config.imports; raises UserError for one that is not there."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UserError(
                f"imports names the module {name!r}, which is not there; start from the folder "
                f"of {name}.py, or put that "
                "folder on PYTHONPATH."
            ) from error


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a value out of range or not among its choices: the value, the rule, the
    remedy.
    """
    flat = flatten(config)
    for name, (low, high) in _RANGES.items():
        value = flat[name]
        if value < low or (high is not None and value > high):
            rule = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{name} is {value}; it must be {rule}. Set --config.{name}.")
    for name in _POSITIVE:
        if not flat[name] > 0:
            raise UserError(f"{name} is {flat[name]}; it must be positive. Set --config.{name}.")
    for name in _BELOW_ONE:
        if not 0 <= flat[name] < 1:
            raise UserError(f"{name} is {flat[name]}; it must lie in [0, 1). Set --config.{name}.")
    if flat["rollout.top_p"] > 1:
        raise UserError(
            f"rollout.top_p is {flat['rollout.top_p']}; it must lie in (0, 1]. Set "
            f"--config.rollout.top_p."
        )
    for name, known in _CHOICES.items():
        if flat[name] not in known:
            raise unknown(f"value of {name}:", str(flat[name]), known)
    if flat["federation.clients_per_round"] > flat["federation.num_clients"]:
        raise UserError(
            f"federation.clients_per_round is {flat['federation.clients_per_round']}, but there "
            f"are "
            f"{flat['federation.num_clients']} clients; ask for at most that many, or raise "
            f"federation.num_clients."
        )
    for name, method in ALGORITHMS.items():
        if name in config:
            check_fields(method.Settings, config[name].to_dict(), name)
        elif name == config.algorithm.name:
            raise UserError(
                f"the config has no group {name!r} for the method's settings; import its module "
                f"in the config file, before "
                "the config is made."
            )
    if flat["train.rate_min"] > flat["train.rate"]:
        raise UserError(
            f"train.rate_min {flat['train.rate_min']} exceeds train.rate {flat['train.rate']}; "
            f"lower it."
        )


def set_preset(config: ml_collections.ConfigDict, preset: str) -> None:
    """Sets the switches of the config's method: "default" leaves the fixes on, "reference" repeats
    its published code.

    Every switch is a field of its own, so a config can also turn on a single one.
    """
    name = config.algorithm.name
    if preset not in ("default", "reference"):
        raise unknown("preset", preset, ("default", "reference"))
    config.algorithm.preset = preset
    if preset == "reference":
        if not ALGORITHMS[name].reference:
            known = ", ".join(name for name, method in ALGORITHMS.items() if method.reference)
            raise UserError(f"method {name!r} has no preset 'reference'; those with one: {known}.")
        config.update_from_flattened_dict(dict(ALGORITHMS[name].reference))


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"a.b": value} of all leaves; tuples become lists, as JSON has them."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
