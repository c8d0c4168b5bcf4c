"""What becomes of every key of the published SPEAR code's YAML files: one table, from which the guide's is generated.

Source: the code published with SPEAR (arXiv 2605.07977), its config dataclasses, their defaults, and what its functions read.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

METHODS = ("spear", "feedback_sft", "grpo", "opsd", "rltf_sd")
DATASETS = ("arc_challenge", "hellaswag", "math_mcqa", "strategy_qa")
WINS = ("spear", "feedback_sft")
GROUPS = ("grpo", "rltf_sd")
LAYERS = {"Qwen/Qwen2.5-1.5B": 28, "meta-llama/Llama-3.2-3B": 28}  # of the models that its files name
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
TARGETS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}

Values = Mapping[str, Any]  # every published key's value, and "preset"


class Refused(Exception):
    """Why a value cannot be used: the rule and the remedy."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What becomes of one published key.

    Attributes:
        default: the published dataclass's.
        read: checks the YAML's value and returns it as a Python value; raises Refused.
        fields: (value, all values) -> {our field: value}; raises Refused.
        here: the guide's words: our fields, or why it has no effect, or why other values are refused.
        methods: the methods whose published code reads the key; for the others it has no effect there, nor here.
    """

    default: Any
    read: Callable[[Any], Any]
    fields: Callable[[Any, Values], dict[str, Any]]
    here: str
    methods: tuple[str, ...] = METHODS


def _refuse(why: str) -> NoReturn:
    raise Refused(why)


def integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused("it must be a whole number")
    return value


def at_least_one(value: Any) -> int:
    """A whole number; the published code takes 1 for less."""
    return max(1, integer(value))


def real(value: Any) -> float:
    # YAML 1.1 reads 1e-5, without a point, as text
    try:
        return float("no" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise Refused("it must be a number") from None


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused("it must be true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Refused("it must be text")
    return value


def maybe(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def among(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
            raise Refused(f"it must be one of {', '.join(names)}{f' (did you mean {near[0]!r}?)' if near else ''}")
        return value

    return read


def anything(value: Any) -> Any:
    return value


def to(default: Any, read: Callable[[Any], Any], *names: str, methods: tuple[str, ...] = METHODS, note: str = "") -> Key:
    """A key whose value our fields of these names take as it is."""
    here = ", ".join(f"`{name}`" for name in names) + (f"; {note}" if note else "")
    return Key(default, read, lambda value, _: dict.fromkeys(names, value), here, methods)


def fixed(default: Any, why: str, methods: tuple[str, ...] = METHODS, also: tuple = ()) -> Key:
    """A key of which only the default (or what else is in `also`) can be had."""

    def fields(value: Any, _: Values) -> dict[str, Any]:
        if value != default and value not in also:
            raise Refused(why)
        return {}

    return Key(default, anything, fields, f"refused if anything else: {why}", methods)


def free(default: Any, why: str) -> Key:
    """A key without effect here."""
    return Key(default, anything, lambda *_: {}, f"no effect: {why}")


def _prompt_room(value: int, values: Values) -> dict[str, Any]:
    room = value - max(values["gen.max_new_tokens_y0"], values["gen.max_new_tokens_y1"])
    if room < 8:
        raise Refused("it must exceed gen.max_new_tokens_y0 and _y1 by at least 8 tokens, the room for a prompt")
    return {"data.max_prompt_tokens": room}


def _last_layers(value: int, values: Values) -> dict[str, Any]:
    depth = LAYERS.get(values["model.model_name"])
    return {"lora.last_layers": 0 if depth and value >= depth else value}


def _targets(value: Any, _: Values) -> dict[str, Any]:
    if not isinstance(value, list) or any(name not in TARGETS for name in value):
        raise Refused(f"it must be a list of {', '.join(TARGETS)}; [] means all of them")
    return {"lora.targets": tuple(TARGETS[name] for name in value or TARGETS)}


def _aggregation(value: str, values: Values) -> dict[str, Any]:
    if values["preset"] == "reference" and value != "fedavg":
        raise Refused(
            "with variant reference clients share storage (A1), which is repeated for fedavg alone; leave ,reference out"
        )
    if value == "fedavg":
        return {} if values["preset"] == "reference" else {"federation.aggregation": "fedavg"}
    # its server's own numbers, which no key of its files can change
    return {"federation.aggregation": value, "federation.server_rate": 1e-2, "federation.beta1": 0.9} | {
        "federation.beta2": 0.99,
        "federation.tau": 5e-3,
    }


def _temperature(value: float, values: Values) -> dict[str, Any]:
    if values["algorithm.name"] in GROUPS:
        return {"rollout.temperature": max(0.7, value)}
    return {"rollout.temperature": value if values["gen.do_sample"] else 0.0}


def _samples(value: int, values: Values) -> dict[str, Any]:
    return {"grpo.group" if values["algorithm.name"] == "grpo" else "rltf_sd.samples": value}


def _kl_weight(value: float, values: Values) -> dict[str, Any]:
    return {f"{values['algorithm.name']}.kl_weight": value}


def _reward_scale(value: float, values: Values) -> dict[str, Any]:
    if values["algorithm.name"] == "rltf_sd":
        if value != 1.0:
            raise Refused("rltf_sd has rewards of 0 and 1 here; set it to 1 and scale rltf_sd.sd_coeff and rl_coeff")
        return {}
    clip = values["grpo.reward_clip"]
    return {"grpo.reward_scale": value if clip is None else min(value, clip)}


def _scaling(value: bool, values: Values) -> dict[str, Any]:
    return {"grpo.scaling": ("std" if values["preset"] == "reference" else "group") if value else "none"}


def _eval_split(value: str | None, values: Values) -> dict[str, Any]:
    reads = values["data.dataset"] in ("math_mcqa", "strategy_qa")
    if value not in (None, "test") and reads:
        raise Refused("evaluation takes the split `test`; leave it out, and name your own file with --config.data.path")
    return {}


def _classes(value: int, values: Values) -> dict[str, Any]:
    if value < 4 and values["data.dataset"] != "strategy_qa":
        raise Refused("fewer classes than answer letters merge labels before the split, which is not done here; set 4")
    return {}


_ELSEWHERE = "the published code reads it nowhere"
_CACHE = "caches are set by the environment; leave it out and set"

KEYS: dict[str, Key] = {
    "output_dir": free("runs/exp", "`--workdir` names the run folder"),
    "algorithm.name": to("spear", among(*METHODS), "algorithm.name"),
    "model.model_name": to("Qwen/Qwen2.5-1.5B", text, "model"),
    "model.tokenizer_name": Key(
        None,
        maybe(text),
        lambda value, all: {} if value in (None, all["model.model_name"]) else _refuse("the model's own is used"),
        "refused if another than the model's: a model and its tokenizer are one folder",
    ),
    "model.trust_remote_code": free(True, "no code of a model's repository is ever run"),
    "model.max_seq_len": Key(
        2048,
        integer,
        _prompt_room,
        "`data.max_prompt_tokens`: what the longest completion leaves; longer questions are refused, not cut",
    ),
    "model.dtype": Key(
        "bf16",
        among("bf16", "fp16", "fp32"),
        lambda value, _: {"dtype": DTYPES[value]} if value in DTYPES else _refuse("float16 is not there; take bf16"),
        "`dtype`; fp16 is refused",
    ),
    "model.device_map": free("auto", "JAX takes all devices; `devices.model` shares a base among several"),
    "model.load_in_4bit": fixed(
        False, "its 4-bit format is bitsandbytes' fp4; for a 4-bit base set --config.quantize=nf4 instead"
    ),
    "model.gradient_checkpointing": Key(
        True,
        flag,
        lambda value, _: {"train.remat": "layers" if value else "nothing"},
        "`train.remat`: layers or nothing",
    ),
    "lora.r": to(16, integer, "lora.rank"),
    "lora.alpha": to(32, real, "lora.alpha"),
    "lora.dropout": to(0.05, real, "lora.dropout"),
    "lora.bias": fixed("none", "adapters have no biases here"),
    "lora.last_n_layers": Key(
        6,
        at_least_one,
        _last_layers,
        "`lora.last_layers`; 0 (all) where the two published models, of 28 layers each, have no more",
    ),
    "lora.target_modules": Key([], anything, _targets, "`lora.targets`; [] is all seven"),
    "data.dataset": to("arc_challenge", among(*DATASETS), "task"),
    "data.split": fixed("train", "training takes the split `train`; name your own file with --config.data.path"),
    "data.eval_split": Key(
        None, maybe(text), _eval_split, "no effect where empty or `test`; for the two reasoned tasks refused otherwise"
    ),
    "data.eval_fraction": free(0.02, "all four datasets have a split to evaluate on"),
    "data.max_attempts": free(3, _ELSEWHERE),
    "data.num_clients": to(20, integer, "federation.num_clients"),
    "data.dirichlet_alpha": to(0.3, real, "federation.dirichlet_alpha"),
    "data.dirichlet_num_classes": Key(
        10, integer, _classes, "no effect from 4 up (labels modulo it); less is refused where answers are letters"
    ),
    "data.max_examples_per_client": Key(
        500,
        maybe(integer),
        lambda value, _: {"federation.max_examples_per_client": value or 0},
        "`federation.max_examples_per_client`; null is 0, all",
    ),
    "data.seed": to(42, integer, "seed"),
    "data.eval_every": to(5, integer, "eval.every"),
    "data.eval_every_round_up_to": to(10, integer, "eval.first_rounds"),
    "fl.rounds": to(20, integer, "rounds"),
    "fl.clients_per_round": Key(
        5,
        integer,
        lambda value, all: {"federation.clients_per_round": min(value, all["data.num_clients"])},
        "`federation.clients_per_round`, at most all clients",
    ),
    "fl.local_train_steps": to(50, at_least_one, "train.steps"),
    "fl.local_rollout_steps": to(25, at_least_one, "rollout.examples", note="of grpo without effect, there and here"),
    "fl.aggregation": Key(
        "fedavg",
        among("fedavg", "fedadam", "fedyogi"),
        _aggregation,
        "`federation.aggregation`; fedadam and fedyogi with its server's constants (`server_rate` 0.01, `beta1` 0.9, "
        "`beta2` 0.99, `tau` 0.005). With `,reference` fedavg is `last`, the others are refused",
    ),
    "fl.fedprox_mu": fixed(0.0, f"{_ELSEWHERE}; set it to 0, and --config.federation.prox for FedProx"),
    "gen.max_new_tokens_y0": to(
        256, integer, "rollout.max_new_tokens", "eval.max_new_tokens", "data.max_response_tokens"
    ),
    "gen.max_new_tokens_y1": to(256, integer, "rollout.max_new_tokens_revision"),
    "gen.num_revisions": to(1, at_least_one, "rollout.num_revisions", note="rltf_sd revises once, there and here"),
    "gen.do_sample": Key(
        False, flag, lambda *_: {}, "false: `rollout.temperature` 0 (greedy); grpo and rltf_sd always sample"
    ),
    "gen.temperature": Key(0.7, real, _temperature, "`rollout.temperature`; of grpo and rltf_sd at least 0.7, as there"),
    "gen.top_p": to(0.95, real, "rollout.top_p"),
    "gen.rollout_batch_size": to(8, at_least_one, "rollout.max_rows", note="speed and memory only"),
    "gen.eval_batch_size": to(8, at_least_one, "eval.rows", note="speed and memory only"),
    "spear.lambda_win": Key(
        1.0, real, lambda value, all: {f"{all['algorithm.name']}.win_weight": value}, "`METHOD.win_weight`", WINS
    ),
    "spear.lambda_lose": to(0.3, real, "spear.lose_weight", methods=("spear",)),
    "spear.lambda_anchor": to(0.01, real, "train.anchor_weight", methods=WINS),
    "spear.unlikelihood_margin": to(0.1, real, "spear.margin", methods=("spear",)),
    "spear.ema_decay": to(0.0, real, "train.ema_decay", methods=WINS),
    "spear.ul_answer_only": Key(
        False,
        flag,
        lambda value, all: {
            "spear.answer_only": "always" if value and all["data.dataset"] != "strategy_qa" else "never"
        },
        "`spear.answer_only`: always or never; of strategy_qa never, as there",
        ("spear",),
    ),
    "spear.ul_tail_tokens": to(0, integer, "spear.tail", methods=("spear",)),
    "spear.ul_skip_math_ops": to(False, flag, "spear.skip_math_ops", methods=("spear",)),
    "spear.max_lose_ratio": to(2.0, real, "spear.max_lose_ratio", methods=("spear",)),
    "grpo.num_generations": Key(4, integer, _samples, "`grpo.group`, `rltf_sd.samples`", GROUPS),
    "grpo.beta_kl": Key(0.02, real, _kl_weight, "`grpo.kl_weight`, `rltf_sd.kl_weight`", GROUPS),
    "grpo.clip_range": to(0.2, real, "grpo.clip_low", "grpo.clip_high", methods=("grpo",)),
    "grpo.normalize_advantage": Key(
        True, flag, _scaling, "`grpo.scaling`: group (std with `,reference`), or none", ("grpo",)
    ),
    "grpo.reward_scale": Key(
        1.0, real, _reward_scale, "`grpo.reward_scale`; of rltf_sd refused if not 1, since its rewards are 0 and 1", GROUPS
    ),
    "grpo.reward_clip": Key(
        None, maybe(real), lambda *_: {}, "`grpo.reward_scale` is the lower of both: rewards are 0 or the scale", ("grpo",)
    ),
    "rltf_sd.gamma": to(1.0, real, "rltf_sd.discount", methods=("rltf_sd",)),
    "rltf_sd.sd_coeff": to(0.1, real, "rltf_sd.sd_weight", methods=("rltf_sd",)),
    "rltf_sd.rl_coeff": to(1.0, real, "rltf_sd.rl_weight", methods=("rltf_sd",)),
    "rltf_sd.early_termination": fixed(True, "a conversation that was right at once ends here", ("rltf_sd",)),
    "distill.temperature": Key(
        2.0,
        real,
        lambda value, _: {"opsd.temperature": value, "opsd.divergence": "forward_kl"},
        "`opsd.temperature`, with `opsd.divergence=forward_kl`, the divergence whose temperature it is",
        ("opsd",),
    ),
    "distill.kl_weight": free(1.0, _ELSEWHERE),
    "distill.anchor_weight": free(0.0, _ELSEWHERE),
    "distill.priv_max_chars": fixed(2000, "a teacher's privileged text has at most 2000 characters here", ("opsd",)),
    "distill.feedback_max_chars": free(800, "feedback is not cut here"),
    "distill.num_demos": free(1, _ELSEWHERE),
    "distill.demo_max_chars": free(1800, _ELSEWHERE),
    "optim.lr": to(2e-4, real, "train.rate"),
    "optim.weight_decay": to(1e-3, real, "train.weight_decay"),
    "optim.batch_size": to(1, at_least_one, "train.batch_size"),
    "optim.grad_accum_steps": to(4, at_least_one, "train.accumulation"),
    "optim.max_grad_norm": to(1.0, real, "train.clip"),
    "optim.warmup_ratio": to(0.1, real, "train.warmup_ratio"),
    "optim.lr_min": to(1e-5, real, "train.rate_min"),
    "optim.use_warmup": to(False, flag, "train.warmup"),
    "optim.micro_batch_size": free(None, "`train.block_tokens` bounds the memory of a step"),
    "feedback.provider": fixed("oracle", "it knows no other; set --config.rollout.feedback for none or human"),
    "feedback.mc_hint_words": to(3, integer, "rollout.hint_words"),
    "hf.offline": fixed(False, "leave it out and give `--offline` to the command"),
    "hf.hf_home": fixed(None, f"{_CACHE} HF_HOME"),
    "hf.model_cache_dir": fixed(None, f"{_CACHE} HF_HUB_CACHE"),
    "hf.dataset_cache_dir": fixed(None, f"{_CACHE} HF_DATASETS_CACHE"),
    "hf.hub_cache_dir": fixed(None, f"{_CACHE} HF_HUB_CACHE"),
}
