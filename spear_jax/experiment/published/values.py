"""Readers of published YAML values, and the fields of ours that take them."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

METHODS = ("spear", "feedback_sft", "grpo", "opsd", "rltf_sd")
DATASETS = ("arc_challenge", "hellaswag", "math_mcqa", "strategy_qa")
WINS = ("spear", "feedback_sft")
GROUPS = ("grpo", "rltf_sd")
# of the models that the published files name
LAYERS = {"Qwen/Qwen2.5-1.5B": 28, "meta-llama/Llama-3.2-3B": 28}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
TARGETS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}

Values = Mapping[str, Any]  # every published key's value, and "preset"


class Refused(Exception):
    """A value that cannot be used; the message gives the rule and the remedy."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Entry of one published key in the table.

    Attributes:
        default: the published dataclass's.
        read: checks the YAML's value and returns it as a Python value; raises Refused.
        fields: (value, all values) -> {our field: value}; raises Refused.
        here: the guide's words: our fields, or why it has no effect, or why other values are
            refused.
        methods: the methods whose published code reads the key; for the others it has no effect
            there, nor here.
    """

    default: Any
    read: Callable[[Any], Any]
    fields: Callable[[Any, Values], dict[str, Any]]
    here: str
    methods: tuple[str, ...] = METHODS


def refuse(why: str) -> NoReturn:
    """Raises Refused."""
    raise Refused(why)


def integer(value: Any) -> int:
    """Reads a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused("it must be a whole number")
    return value


def at_least_one(value: Any) -> int:
    """Reads a whole number; the published code takes 1 for less."""
    return max(1, integer(value))


def real(value: Any) -> float:
    # YAML 1.1 reads 1e-5, without a point, as text
    """Reads a number."""
    try:
        return float("no" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise Refused("it must be a number") from None


def flag(value: Any) -> bool:
    """Reads true or false."""
    if not isinstance(value, bool):
        raise Refused("it must be true or false")
    return value


def text(value: Any) -> str:
    """Reads a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise Refused("it must be text")
    return value


def maybe(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a reader that lets None through."""
    return lambda value: None if value is None else read(value)


def among(*names: str) -> Callable[[Any], str]:
    """Returns a reader of one of the names."""

    def read(value: Any) -> str:
        if value not in names:
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
            raise Refused(
                f"it must be one of "
                f"{', '.join(names)}{f' (did you mean {near[0]!r}?)' if near else ''}"
            )
        return value

    return read


def anything(value: Any) -> Any:
    """Returns the value as it is."""
    return value


def to(
    default: Any,
    read: Callable[[Any], Any],
    *names: str,
    methods: tuple[str, ...] = METHODS,
    note: str = "",
) -> Key:
    """Returns a key whose value our fields of these names take as it is."""
    here = ", ".join(f"`{name}`" for name in names) + (f"; {note}" if note else "")
    return Key(default, read, lambda value, _: dict.fromkeys(names, value), here, methods)


def fixed(default: Any, why: str, methods: tuple[str, ...] = METHODS, also: tuple = ()) -> Key:
    """Returns a key of which only the default, or a value in `also`, is accepted."""

    def fields(value: Any, _: Values) -> dict[str, Any]:
        if value != default and value not in also:
            raise Refused(why)
        return {}

    return Key(default, anything, fields, f"refused if anything else: {why}", methods)


def free(default: Any, why: str) -> Key:
    """Returns a key without effect here."""
    return Key(default, anything, lambda *_: {}, f"no effect: {why}")


def prompt_shape(value: int, values: Values) -> dict[str, Any]:
    """Returns the longest prompt: the published length without the longest completion."""
    longest = value - max(values["gen.max_new_tokens_y0"], values["gen.max_new_tokens_y1"])
    if longest < 8:
        raise Refused(
            "it must exceed gen.max_new_tokens_y0 and _y1 by at least 8 tokens, the room for a "
            "prompt"
        )
    return {"data.max_prompt_tokens": longest}


def last_layers(value: int, values: Values) -> dict[str, Any]:
    """Returns the number of adapted layers, 0 (all) where the model has no more."""
    depth = LAYERS.get(values["model.model_name"])
    return {"lora.last_layers": 0 if depth and value >= depth else value}


def targets(value: Any, _: Values) -> dict[str, Any]:
    """Returns the adapted projections by our names."""
    if not isinstance(value, list) or any(name not in TARGETS for name in value):
        raise Refused(f"it must be a list of {', '.join(TARGETS)}; [] means all of them")
    return {"lora.targets": tuple(TARGETS[name] for name in value or TARGETS)}


def aggregation(value: str, values: Values) -> dict[str, Any]:
    """Returns the aggregation, with its server's own numbers."""
    if values["preset"] == "reference" and value != "fedavg":
        raise Refused(
            "with variant reference clients share storage (A1), which is repeated for fedavg "
            "alone; leave ,reference out"
        )
    if value == "fedavg":
        return {} if values["preset"] == "reference" else {"federation.aggregation": "fedavg"}
    # its server's own numbers, which no key of its files can change
    return {
        "federation.aggregation": value,
        "federation.server_rate": 1e-2,
        "federation.beta1": 0.9,
    } | {
        "federation.beta2": 0.99,
        "federation.tau": 5e-3,
    }


def temperature(value: float, values: Values) -> dict[str, Any]:
    """Returns the sampling temperature, with the published floor and its greedy switch."""
    if values["algorithm.name"] in GROUPS:
        return {"rollout.temperature": max(0.7, value)}
    return {"rollout.temperature": value if values["gen.do_sample"] else 0.0}


def samples(value: int, values: Values) -> dict[str, Any]:
    """Returns the completions a prompt, of grpo or rltf_sd."""
    return {"grpo.group" if values["algorithm.name"] == "grpo" else "rltf_sd.samples": value}


def kl_weight(value: float, values: Values) -> dict[str, Any]:
    """Returns the method's weight of the KL term."""
    return {f"{values['algorithm.name']}.kl_weight": value}


def reward_scale(value: float, values: Values) -> dict[str, Any]:
    """Returns the lower of scale and clip, since rewards are 0 or the scale."""
    if values["algorithm.name"] == "rltf_sd":
        if value != 1.0:
            raise Refused(
                "rltf_sd has rewards of 0 and 1 here; set it to 1 and scale rltf_sd.sd_coeff and "
                "rl_coeff"
            )
        return {}
    clip = values["grpo.reward_clip"]
    return {"grpo.reward_scale": value if clip is None else min(value, clip)}


def scaling(value: bool, values: Values) -> dict[str, Any]:
    """Returns the scaling of advantages."""
    return {
        "grpo.scaling": ("std" if values["preset"] == "reference" else "group") if value else "none"
    }


def eval_split(value: str | None, values: Values) -> dict[str, Any]:
    """Returns no field; raises Refused for another split than `test`."""
    reads = values["data.dataset"] in ("math_mcqa", "strategy_qa")
    if value not in (None, "test") and reads:
        raise Refused(
            "evaluation takes the split `test`; leave it out, and name your own file with "
            "--config.data.path"
        )
    return {}


def classes(value: int, values: Values) -> dict[str, Any]:
    """Returns no field; raises Refused where fewer classes than letters would merge labels."""
    if value < 4 and values["data.dataset"] != "strategy_qa":
        raise Refused(
            "fewer classes than answer letters merge labels before the split, which is not done "
            "here; set 4"
        )
    return {}
