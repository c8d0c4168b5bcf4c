"""Every field of an experiment with its default and its range.

Configs are `ml_collections.ConfigDict`s, made by `default_config` from the dataclasses below and
changed by config files and `--config.a.b=VALUE`. `parse` turns one into `Settings`: frozen, typed
and checked. It is the first thing that building an experiment does; nothing behind it reads a
ConfigDict.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from spear_jax.algorithms import ALGORITHMS
from spear_jax.core import settings
from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.settings import choice, group, number, one_of, positive
from spear_jax.federated import partition
from spear_jax.federated.aggregation.attacks import ON_MODELS
from spear_jax.federated.aggregation.compression import KINDS as COMPRESSIONS
from spear_jax.federated.aggregation.server_optimizer import RULES
from spear_jax.federated.aggregation.weighting import KINDS as WEIGHTINGS
from spear_jax.federated.drift import DRIFTS
from spear_jax.federated.participation import STALENESS
from spear_jax.feedback.attacks import ON_FEEDBACK
from spear_jax.feedback.recorded import FeedbackSettings
from spear_jax.models.attention import KERNELS
from spear_jax.models.decoder import REMAT
from spear_jax.models.quantization import KINDS


@dataclasses.dataclass(frozen=True)
class AlgorithmChoice:
    """The method; its own numbers stand in the group of its name."""

    name: str = "spear"  # a key of spear_jax.algorithms.ALGORITHMS
    preset: str = "default"  # where the method's switches were set from; kept for the record


@dataclasses.dataclass(frozen=True)
class Budget:
    """A run ends after the round that reaches a limit; 0 means no limit."""

    tokens: int = number(0, 0, 2**63 - 1)  # generated tokens
    seconds: float = number(0.0, 0)  # of rounds, without evaluation and checkpoints


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters."""

    rank: int = number(16, 1, 8192)
    alpha: float = positive(32.0)
    dropout: float = number(0.1, 0, below=1)
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    last_layers: int = number(0, 0)  # adapters in the last n layers; 0 means all
    ranks: str = ""  # "4,8,16": the clients' ranks, over and over; "" is lora.rank for all
    init_from: str = ""  # a PEFT adapter folder to start from


@dataclasses.dataclass(frozen=True)
class Columns:
    """The file's column names, for tasks qa, mcqa, pairs and preferences; "" keeps the task's own.

    `answer_base` is no column. It says how answers are read: as an index from 0 or 1 where they are
    whole numbers, or always as a letter or a text. "" takes what fits.
    """

    question: str = ""
    options: str = ""
    answer: str = ""
    answers: str = ""
    hint: str = ""
    answer_base: str = one_of("", "0", "1", "letter", "text")
    prompt: str = ""
    response: str = ""
    chosen: str = ""
    rejected: str = ""


@dataclasses.dataclass(frozen=True)
class PromptTemplates:
    """Wording in place of the task's own; "" keeps it."""

    question: str = ""
    revision: str = ""
    header: str = ""
    format: str = ""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from and how they become prompts."""

    path: str = ""  # a file or folder instead of the Hub
    columns: Columns = group(Columns)
    templates: PromptTemplates = group(PromptTemplates)
    chat_template: str = one_of("auto", "always", "never")
    chat_template_kwargs: str = ""  # the template's arguments as JSON: '{"enable_thinking": false}'
    date: str = "2024-07-26"  # what templates that ask for today's date are told
    max_prompt_tokens: int = number(1024, 8)
    max_response_tokens: int = number(256, 1)  # gold responses are cut there, then without an EOS
    train_limit: int = number(0, 0, 2**31 - 1)  # first n training examples; 0 means all
    extractor: str = one_of("bounded", "published")  # published: without word boundaries (A5)


@dataclasses.dataclass(frozen=True)
class Federation:
    """Clients, cohorts and the server."""

    num_clients: int = number(10, 1, 1_000_000)
    clients_per_round: int = number(5, 1, 1_000_000)
    # weighted: by number of examples; poisson: each client by itself, clients_per_round on average
    sampling: str = one_of("uniform", "weighted", "poisson")
    partition: str = choice("dirichlet", partition.SCHEMES)  # resample: clients share examples
    dirichlet_alpha: float = positive(1.0)
    labels_per_client: int = number(1, 1)  # of by_label
    min_examples: int = number(10, 1)  # dirichlet redraws until every client has as many
    max_examples_per_client: int = number(0, 0)  # 0 means all
    aggregation: str = choice("fedavg", RULES)  # last: A1; local: clients are never averaged
    reducer: str = "mean"  # clients' adapters to one: mean, norm_clip, median, trimmed_mean, krum,
    # multi_krum, bulyan, geometric_median, centred_clip, fltrust, last, or one of your own
    lora_rule: str = "mean"  # mean, ffa, fedsa, rolora, flora, fedex, fedex_truncated, flexlora,
    # hetlora, fair, fedper, or one of your own: which factor travels, and how factors become an adapter
    weighting: str = choice("method", WEIGHTINGS)  # method: wins; capped: at weight_cap
    weight_cap: float = number(0.0, 0)
    clip_bound: float = number(0.0, 0)  # c of norm_clip, the norm of an update
    byzantine: int = number(0, 0)  # f, the attackers that krum, multi_krum and bulyan assume
    exactness_meter: bool = False  # measure what averaging factors loses, where clients stream
    server_rate: float = positive(1.0)
    beta1: float = number(0.9, 0, below=1)
    beta2: float = number(0.99, 0, below=1)
    tau: float = positive(5e-3)
    prox: float = number(0.0, 0)  # FedProx's μ
    drift: str = choice("none", ("none", *DRIFTS))  # of clients; how it is corrected
    secure_sum: bool = False  # the server sees the sum of updates alone
    clients_at_once: int = number(0, 0)  # on a device; 0: on a CPU one, else as many as fit
    colliding_streams: bool = False  # A7: client streams keyed by round + client


@dataclasses.dataclass(frozen=True)
class AggregationRules:
    """Numbers of single reducers and LoRA rules; the others do not read them."""

    weighted: bool = False  # median, geometric_median, centred_clip: by weight, not each once
    trim: float = number(0.1, 0, 0.5)  # β of trimmed_mean, dropped at each end
    selected: int = number(0, 0)  # m of multi_krum; 0: n - f - 2
    iterations: int = number(0, 0)  # of geometric_median and centred_clip; 0: 10 and 1
    smoothing: float = positive(1e-6)  # ν of geometric_median
    radius: float = positive(1.0)  # τ of centred_clip
    root_examples: int = number(32, 1)  # questions that the server of fltrust keeps to itself
    residual_rank: int = number(8, 1)  # of fedex_truncated
    form: str = one_of("delta", "value")  # flexlora, hetlora: of updates, or of adapters
    normalise: str = one_of("diluted", "per_rank")  # hetlora: a rank that not all clients have
    weights: str = one_of("norms", "method")  # of hetlora
    gamma: float = number(0.99, above=0, high=1)  # of hetlora: a client prunes to γ of its rank
    penalty: float = number(5e-3, 0)  # λ of hetlora's regulariser
    min_rank: int = number(1, 1)  # of hetlora
    ridge: float = number(0.01, 0)  # ρ of fair
    personal_layers: int = number(1, 1)  # of fedper, the last ones of the adapter
    secure_bound: float = positive(4.0)  # c of secure_sum: numbers are clipped there
    secure_bits: int = number(16, 0, 30)  # f of secure_sum: bits behind the point
    state_gb: float = positive(4.0)  # the most that clients' own factors may take, in memory


@dataclasses.dataclass(frozen=True)
class Compression:
    """How clients compress what they send."""

    kind: str = choice("none", ("none", *COMPRESSIONS))
    share: float = number(0.01, above=0, high=1)  # ρ of topk and randk
    levels: int = number(127, 1, 2**16)  # s of qsgd
    block: int = number(256, 1)  # numbers that share a step, of int8 and int4
    rank: int = number(4, 1)  # r' of rank
    error_feedback: bool = False  # clients add what was lost to their next update


@dataclasses.dataclass(frozen=True)
class Privacy:
    """Differential privacy of whole clients."""

    noise_multiplier: float = number(0.0, 0)  # z of the server's noise; 0: none
    local_noise: float = number(0.0, 0)  # z of the noise that every client adds; 0: none
    clip: float = positive(0.1)  # S, the largest norm of an update
    adaptive: bool = False  # S follows a quantile of the updates' norms
    quantile: float = number(0.5, 0, 1)  # γ of adaptive
    clip_rate: float = positive(0.2)  # η of adaptive
    sigma_b: float = number(0.0, 0)  # noise of adaptive's count; 0: a twentieth of the cohort
    delta: float = number(0.0, 0, below=1)  # δ of ε; 0: num_clients^-1.1
    cohort_limit: int = number(0, 0)  # the largest cohort under sampling=poisson; 0: none


@dataclasses.dataclass(frozen=True)
class ParticipationSettings:
    """Who of a cohort reports back, on a simulated clock; without one all do."""

    clock: bool = False  # simulate a clock; all below but its own numbers do so, too
    mode: str = one_of("sync", "fedbuff", "fedasync")  # the last two without cohorts
    buffer: int = number(0, 0)  # B of fedbuff; 0: federation.clients_per_round
    max_staleness: int = number(0, 0)  # versions; an older update is dropped; 0 means none is
    staleness: str = choice("polynomial", STALENESS)  # how age shortens a step
    mix: float = number(0.6, above=0, high=1)  # α of fedasync
    dropout: float = number(0.0, 0, 1)  # the chance that a client is lost in a round
    over_selection: float = number(1.0, 1, 100)  # asks so many times as many clients as it wants
    deadline: float = number(0.0, 0)  # simulated seconds; 0 means none
    min_reports: int = number(1, 1)  # with fewer the round fails
    partial: bool = False  # a client that is lost in the middle of training sends what it has
    speed: float = positive(5e11)  # FLOP/s, the median of devices
    up: float = positive(5e5)  # bytes/s, likewise
    down: float = positive(1e6)
    spread: float = number(0.5, 0, 10)  # σ of all three, of their logarithm
    latency: float = number(0.05, 0)  # seconds each way


@dataclasses.dataclass(frozen=True)
class Personal:
    """Adapters of single clients, beside the global one."""

    ditto: bool = False  # every client trains one of its own, pulled towards the global one
    pull: float = number(1.0, 0)  # λ of ditto
    finetune: int = number(0, 0)  # steps that each client trains by itself after the last round


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """Clients that attack, for studies."""

    kind: str = choice("none", ("none", *ON_MODELS, *ON_FEEDBACK))
    fraction: float = number(0.2, 0, 1)  # of all clients
    strength: float = positive(1.0)  # γ of sign_flip and scale, σ of gaussian, ε of ipm
    target: int = number(0, 0)  # push_target, mislead: the place of the option they want


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What clients ask, and how answers are sampled."""

    examples: int = number(32, 1)  # per client and round
    max_new_tokens: int = number(64, 1)  # of first answers
    max_new_tokens_revision: int = number(64, 1)
    temperature: float = number(0.8, 0, 10)  # 0 is greedy
    top_p: float = number(0.95, above=0, high=1)
    top_k: int = number(0, 0)  # 0 means all
    num_revisions: int = number(2, 0)
    # oracle, none, human, service, judge, reward, simulated, mixture, replay, oracle_published (A4),
    # or one of your own
    feedback: str = "oracle"
    hint_words: int = number(3, 0)
    # that generate at once, on all devices; 0: as many as kv_cache_mb holds, on a CPU 64
    max_concurrent_sequences: int = number(0, 0)
    kv_cache_mb: int = number(0, 0)  # on a device; 0: 272 on a CPU, else a quarter of its memory


@dataclasses.dataclass(frozen=True)
class Train:
    """A client's local training."""

    steps: int = number(5, 1)  # optimiser steps per client and round
    accumulation: int = number(1, 1)
    batch_size: int = number(16, 1)  # of a micro-batch: wins and as many loses, pairs, or prompts
    learning_rate: float = positive(5e-5)
    learning_rate_min: float = number(1e-5, 0)
    warmup: bool = True
    warmup_ratio: float = number(0.1, 0, 1)
    weight_decay: float = number(0.0, 0)
    max_grad_norm: float = positive(1.0)
    normalize: str = one_of("global", "micro")  # micro: mean of micro-batch means
    anchor_weight: float = number(0.0, 0)
    anchor_gradient: bool = True  # False: the published anchor, without gradient (A3)
    ema_decay: float = number(0.0, 0, below=1)
    # distinct tokens; more where a group has more; 0: 4096 on a CPU, what fills another device
    max_tokens_per_block: int = number(0, 0)
    # what the backward pass computes again; auto: the least that half of a device's memory allows
    remat: str = choice("attention", (*REMAT, "auto"))
    head_chunk: int = number(0, 0)  # positions per LM-head block; 0: as many as take 256 MB


@dataclasses.dataclass(frozen=True)
class Eval:
    """Held-out evaluation. The base model, the first and the last round are always evaluated."""

    every: int = number(5, 1)  # rounds
    first_rounds: int = number(1, 0)  # each of the first n rounds is evaluated too
    method: str = one_of("auto", "choice", "generate", "likelihood")  # auto: the task's own
    limit: int = number(0, 0, 2**31 - 1)  # first n test examples; 0 means all
    rows: int = number(32, 1)  # questions in one forward pass
    max_new_tokens: int = number(64, 1)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The mesh."""

    model: int = number(1, 1)  # devices that share one copy of the base; the others take clients


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The checkpoints that stay."""

    keep_last: int = number(3, 1)
    keep_best: int = number(1, 0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """An experiment, parsed.

    Attributes:
        method: the settings of the method that `algorithm` names (its `Settings` dataclass).
    """

    seed: int = number(0, 0, 2**32 - 1)
    task: str = "facts"  # a key of spear_jax.tasks.TASKS
    model: str = "tiny"  # "tiny" (embedded), a Hugging Face folder, a Hub id, or a .gguf file
    dtype: str = one_of("float32", "bfloat16")  # of the base; adapters are float32
    quantize: str = choice("none", KINDS)  # of the base's projections; dtype is then the rest's
    attention_kernel: str = choice("xla", KERNELS)  # cudnn: NVIDIA GPUs, bfloat16
    rounds: int = number(10, 1)
    record_traces: bool = True  # write every rollout to traces/
    imports: tuple[str, ...] = ()  # modules of your own, imported first: tasks, feedback, methods
    wandb: str = ""  # a Weights & Biases project that gets the metrics too; "" is none
    algorithm: AlgorithmChoice = group(AlgorithmChoice)
    budget: Budget = group(Budget)
    lora: Lora = group(Lora)
    data: Data = group(Data)
    federation: Federation = group(Federation)
    aggregation: AggregationRules = group(AggregationRules)
    compression: Compression = group(Compression)
    privacy: Privacy = group(Privacy)
    participation: ParticipationSettings = group(ParticipationSettings)
    personal: Personal = group(Personal)
    attack: AttackSettings = group(AttackSettings)
    rollout: Rollout = group(Rollout)
    feedback: FeedbackSettings = group(FeedbackSettings)
    train: Train = group(Train)
    eval: Eval = group(Eval)
    devices: Devices = group(Devices)
    checkpoint: Checkpoint = group(Checkpoint)
    method: Any = dataclasses.field(default=None, compare=True)


# name until 0.10 -> name now; run folders of 0.10 are read by both
RENAMED = {
    "attention": "attention_kernel",
    "rollout.cache_mb": "rollout.kv_cache_mb",
    "rollout.max_rows": "rollout.max_concurrent_sequences",
    "train.block_tokens": "train.max_tokens_per_block",
    "train.clip": "train.max_grad_norm",
    "train.rate": "train.learning_rate",
    "train.rate_min": "train.learning_rate_min",
}


def default_config() -> ml_collections.ConfigDict:
    """Returns all fields at their defaults. Locked: a new or mistyped name is refused."""
    values = settings.defaults(Settings)
    del values["method"]
    values |= {name: settings.defaults(method.Settings) for name, method in ALGORITHMS.items()}
    return ml_collections.ConfigDict(values).lock()


def describe() -> dict[str, str]:
    """Returns {field: its default and its rule} of every field, the methods' own among them."""
    told = settings.describe(Settings)
    del told["method"]
    for name, method in ALGORITHMS.items():
        told |= settings.describe(method.Settings, name)
    return told


def parse(config: ml_collections.ConfigDict) -> Settings:
    """Turns a config into settings.

    Raises: UserError for a value of the wrong type, out of range or not among its choices, and for
        values that contradict one another: the value, the rule, the remedy.
    """
    values = config.to_dict()
    methods = {name: values.pop(name) for name in ALGORITHMS if name in values}
    parsed = settings.parse(Settings, {**values, "method": None})
    name = parsed.algorithm.name
    if name not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)
    if name not in methods:
        raise UserError(
            f"the config has no group {name!r} for the method's settings; import its module in the "
            "config file, before the config is made."
        )
    own = {
        other: settings.parse(ALGORITHMS[other].Settings, given, other)
        for other, given in methods.items()
    }
    fed, train = parsed.federation, parsed.train
    if fed.clients_per_round > fed.num_clients:
        raise UserError(
            f"federation.clients_per_round is {fed.clients_per_round}, but there are "
            f"{fed.num_clients} clients; ask for at most that many, or raise "
            "federation.num_clients."
        )
    if train.learning_rate_min > train.learning_rate:
        raise UserError(
            f"train.learning_rate_min {train.learning_rate_min} exceeds train.learning_rate "
            f"{train.learning_rate}; lower it."
        )
    return dataclasses.replace(parsed, method=own[name])


def import_own(names: Sequence[str]) -> None:
    """Imports the modules of config.imports; raises UserError for one that is not there."""
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                f"imports names {shown(name)}, which is no module's name; write "
                "--config.imports=\"('my_module',)\"."
            )
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UserError(
                f"imports names the module {name!r}, which is not there; start from the folder of "
                f"{name}.py, or put that folder on PYTHONPATH."
            ) from error


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
    """Returns {"a.b": value} of all leaves; tuples become lists, as JSON has them."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
