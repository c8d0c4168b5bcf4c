"""Model shapes read from a Hugging Face `config.json`: Llama, Qwen2/2.5 and Qwen3 decoders.

Source: transformers' LlamaConfig, Qwen2Config and Qwen3Config (release 5), whose defaults these are.
"""

import dataclasses
import json
import pathlib
from typing import Any

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.core.files import read_json_object

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MOST_POSITIONS = 1 << 24  # float32 counts no further, and angles are made of float32 positions


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that changes a model's numbers in transformers.

    Attributes:
        kind: what its value must be, one of _KINDS.
        families: those that read it.
        default: {family: value} where the key is absent; a family that is not in it needs the key,
            or works the value out of others.
        built: the values that are built, or () for all of the kind; others are refused. Of layers,
            the entries; of rope, the types.
        null: {family: what null stands for}; other families refuse null.
    """

    kind: str
    families: tuple[str, ...] = tuple(FAMILIES)
    default: dict[str, Any] = dataclasses.field(default_factory=dict)
    built: tuple[Any, ...] = ()
    null: dict[str, Any] = dataclasses.field(default_factory=dict)


def _all(value: Any) -> dict[str, Any]:
    return dict.fromkeys(FAMILIES, value)


ROPE_TYPES = ("default", "linear", "llama3")

# Every key that changes numbers. A key in no row here has no effect on them (UNUSED), or is unknown
# to transformers, too.
KEYS = {
    "vocab_size": Key("count"),
    "hidden_size": Key("count"),
    "num_hidden_layers": Key("count"),
    "num_attention_heads": Key("count"),
    "intermediate_size": Key("count"),
    "num_key_value_heads": Key(
        "count", default={"llama": None, "qwen2": 32, "qwen3": 32}, null=_all(None)
    ),
    "head_dim": Key(
        "count",
        default={"llama": None, "qwen2": None, "qwen3": 128},
        null={"llama": None, "qwen2": None},
    ),
    "max_position_embeddings": Key(
        "count", default={"llama": 2048, "qwen2": 32768, "qwen3": 32768}
    ),
    "rms_norm_eps": Key("number", default=_all(1e-6)),
    "tie_word_embeddings": Key("flag", default=_all(False)),
    "attention_bias": Key("flag", ("llama", "qwen3"), {"llama": False, "qwen3": False}),
    "mlp_bias": Key("flag", ("llama",), _all(False), (False,)),
    "hidden_act": Key("text", default=_all("silu"), built=("silu", "swish")),
    "attention_dropout": Key("number or zero", default=_all(0.0), built=(0,), null=_all(None)),
    "use_sliding_window": Key("flag", default=_all(False), built=(False,)),
    "sliding_window": Key("whole number", ("llama",), _all(None), (None,), _all(None)),
    "layer_types": Key(
        "layers",
        default=_all(None),
        built=("full_attention", "attention"),
        null=_all(None),
    ),
    "attention_chunk_size": Key("whole number", default=_all(None), built=(None,), null=_all(None)),
    "kv_sharing_modes": Key("list", default=_all(None), built=(None,), null=_all(None)),
    "per_layer_config": Key("object", default=_all(None), built=(None,), null=_all(None)),
    "quantization_config": Key("object", default=_all(None), built=(None,), null=_all(None)),
    "rope_theta": Key("base", default=_all(10000.0)),
    "rope_parameters": Key("rope", default=_all(None), built=ROPE_TYPES, null=_all(None)),
    "rope_scaling": Key("rope", default=_all(None), built=ROPE_TYPES, null=_all(None)),
    "partial_rotary_factor": Key("number", default=_all(None), built=(None, 1), null=_all(None)),
    "original_max_position_embeddings": Key("count", default=_all(None), null=_all(None)),
}

# Keys of the three classes that change no number of a base: what it is for each.
UNUSED = {
    "model_type": "names the family",
    "architectures": "the tensors' names tell",
    "dtype": "the run's own `dtype` is used",
    "torch_dtype": "the run's own `dtype` is used",
    "bos_token_id": "the tokenizer's is used",
    "eos_token_id": "ends a completion; checked when the tokenizer is read",
    "pad_token_id": "reaches no loss",
    "max_window_layers": "read where `use_sliding_window` is true, which is refused",
    "pretraining_tp": "the same sums in slices; transformers 5 does not read it",
    "chunk_size_feed_forward": "not read by these decoders",
    "initializer_range": "for new weights",
    "use_cache": "of transformers' generation",
    "is_encoder_decoder": "not read by these decoders",
    "output_hidden_states": "what is returned",
    "output_attentions": "what is returned",
    "return_dict": "what is returned",
    "id2label": "of classifiers",
    "label2id": "of classifiers",
    "problem_type": "of classifiers",
    "transformers_version": "says who wrote the file",
    "_name_or_path": "says where it came from",
}

_KINDS = {
    "count": "a whole number from 1 on",
    "whole number": "a whole number",
    "number": "a finite number above 0",
    "number or zero": "a finite number from 0 on",
    "base": "a finite number from 1 on",
    "flag": "true or false",
    "text": "a text",
    "list": "a list",
    "layers": "a list with a text for each layer",
    "object": "an object",
    "rope": "an object",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling. Source: Llama 3 (arXiv 2407.21783), as in `config.json`'s
    rope_scaling.

    Linear scaling (arXiv 2306.15595) is the one that slows every wavelength by the whole factor:
    original_positions is 0.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static shape of a decoder; hashable, so it can be closed over by jitted functions."""

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int


def read_config(path: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads `config.json` of a model folder.

    Returns: the static shape, and the raw JSON (kept for export).
    Raises: UserError for a folder without config.json, an unsupported family, or a feature that we
        do not have.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"no config.json in {str(path)!r}: a model folder holds config.json, tokenizer.json "
            f"and *.safetensors. "
            "Give a Hugging Face model folder, a Hub id, or a .gguf file."
        )
    raw = read_json_object(file, "fetch the model again")
    return parse_config(raw), raw


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turns a Hugging Face config into a ModelConfig.

    Every key in KEYS is computed as transformers computes it, or refused by name.

    Raises: UserError for what is not supported, and for values of a wrong type or out of range.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise unknown("model family (config.json's model_type)", str(family), FAMILIES)
    value = {name: _value(name, key, family, raw) for name, key in KEYS.items()}
    width, heads = value["hidden_size"], value["num_attention_heads"]
    if family == "llama" and width % heads:
        raise UserError(
            f"config.json's hidden_size {shown(width)} is no multiple of num_attention_heads "
            f"{shown(heads)}; fetch the model again."
        )
    kv_heads = heads if value["num_key_value_heads"] is None else value["num_key_value_heads"]
    if heads % kv_heads:
        stated = "" if "num_key_value_heads" in raw else f" (the default of {family})"
        raise UserError(
            f"config.json's num_attention_heads {shown(heads)} is no multiple of "
            f"num_key_value_heads {shown(kv_heads)}{stated}; fetch the model again."
        )
    head_width = value["head_dim"] or width // heads
    if head_width % 2 or not head_width:
        raise UserError(
            f"config.json's head_dim {shown(head_width)} (hidden_size by num_attention_heads where "
            "absent) is odd or 0, and RoPE turns pairs; fetch the model again."
        )
    if value["max_position_embeddings"] > MOST_POSITIONS:
        raise UserError(
            f"config.json's max_position_embeddings {shown(value['max_position_embeddings'])} is "
            f"more than {MOST_POSITIONS}, the positions that are told apart; write the model's own."
        )
    theta, scaling = _rope(value)
    bias = bool(value["attention_bias"])  # None for Qwen2, which does not read it
    return ModelConfig(
        family=family,
        vocab_size=value["vocab_size"],
        width=width,
        layers=value["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=value["intermediate_size"],
        norm_eps=value["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or bias,
        o_bias=bias,
        qk_norm=family == "qwen3",
        tied=value["tie_word_embeddings"],
        max_positions=value["max_position_embeddings"],
    )


def _value(name: str, key: Key, family: str, raw: dict[str, Any]) -> Any:
    """A key's value in `raw`, checked; its default where it is absent or not of the family."""
    if family not in key.families or (name not in raw and family in key.default):
        return key.default.get(family)
    value = raw.get(name)
    if value is None and family in key.null:
        return key.null[family]
    _check(name, key.kind, value)
    held = value if key.kind == "layers" else [rope_type(value) if key.kind == "rope" else value]
    other = [one for one in held if key.built and one not in key.built]
    if other:
        built = ", ".join(json.dumps(one) for one in key.built)
        raise UserError(
            f"config.json's {name} {_VERBS.get(key.kind, 'is')} {shown(other[0])}, which is not "
            f"supported for {family}; supported: {built}. {_REMEDIES.get(name, 'Use another model.')}"
        )
    return value


def rope_type(rope: dict[str, Any]) -> Any:
    """The type of a `rope_scaling` or `rope_parameters`, whichever release wrote it."""
    return rope.get("rope_type", rope.get("type", "default"))


_VERBS = {"layers": "has", "rope": "is of type"}
_REMEDIES = {
    "quantization_config": "Use the unquantised model, or a .gguf file.",
    "attention_dropout": "Set it to 0.0: it acts in training alone, where lora.dropout is used.",
    "sliding_window": "Use another model, or set it to null if it is to see all positions.",
    "use_sliding_window": "Use another model, without sliding-window attention.",
}


def _check(name: str, kind: str, value: Any) -> None:
    """Raises UserError for a value that is not of its kind."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = number and isinstance(value, int)
    fits = {
        "count": whole and value >= 1,
        "whole number": whole,
        "number": number and 0 < value < 1e30,
        "number or zero": number and 0 <= value < 1e30,
        "base": number and 1 <= value < 1e30,
        "flag": isinstance(value, bool),
        "text": isinstance(value, str),
        "list": isinstance(value, list),
        "layers": isinstance(value, list) and all(isinstance(one, str) for one in value),
        "object": isinstance(value, dict),
        "rope": isinstance(value, dict),
    }[kind]
    if not fits:
        raise UserError(
            f"config.json's {name!r} is {shown(value)}, not {_KINDS[kind]}; fetch the model again."
        )


def _rope(value: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling.

    transformers 5 writes `rope_parameters`, earlier releases `rope_theta` and `rope_scaling`. Where
    they stand beside one another, transformers takes a `rope_scaling` that is not empty and leaves
    all of `rope_parameters`; a base in the one that it takes goes before `rope_theta`, and
    `rope_type` before `type`.
    """
    name = "rope_scaling" if value["rope_scaling"] else "rope_parameters"
    rope = value[name] or {}
    for key, held in rope.items():
        if isinstance(held, dict):
            raise UserError(
                f"config.json's {name} has an object, {shown(key)}; RoPE that differs between "
                "layers is not supported. Use another model."
            )
    theta = rope.get("rope_theta", value["rope_theta"])
    _check(f"{name}.rope_theta", "base", theta)
    partial = rope.get("partial_rotary_factor", 1)
    if partial not in (None, 1):
        raise UserError(
            f"config.json's {name}.partial_rotary_factor is {shown(partial)}; RoPE of a part of a "
            "head is not supported. Use another model."
        )
    kind = rope_type(rope)
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        factor = _factors(name, kind, rope, ("factor",))["factor"]
        return float(theta), RopeScaling(factor, 1.0, 4.0, 0)
    factors = _factors(name, kind, rope, ("factor", "low_freq_factor", "high_freq_factor"))
    if factors["high_freq_factor"] <= factors["low_freq_factor"]:
        raise UserError(
            f"config.json's {name}: high_freq_factor {factors['high_freq_factor']} is not above "
            f"low_freq_factor {factors['low_freq_factor']}; fetch the model again."
        )
    return float(theta), RopeScaling(
        **factors, original_positions=_original_positions(name, rope, value)
    )


def _factors(
    name: str, kind: str, rope: dict[str, Any], needed: tuple[str, ...]
) -> dict[str, float]:
    """The numbers that a RoPE scaling needs; raises UserError for a missing or a senseless one."""
    for key in needed:
        if key not in rope:
            raise UserError(
                f"config.json's {kind} RoPE scaling ({name}) lacks {key!r}; fetch the model again."
            )
        _check(f"{name}.{key}", "base" if key == "factor" else "number", rope[key])
    return {key: float(rope[key]) for key in needed}


def _original_positions(name: str, rope: dict[str, Any], value: dict[str, Any]) -> int:
    """The positions that a model was trained for before its RoPE was scaled.

    Departure: transformers 5 lets the key beside `rope_parameters` win over the one inside, earlier
    releases did not read it; two that differ are refused.
    """
    key = "original_max_position_embeddings"
    outer = value[key]
    inner = rope.get(key, outer if outer is not None else value["max_position_embeddings"])
    _check(f"{name}.{key}", "count", inner)
    if outer is not None and outer != inner:
        raise UserError(
            f"config.json has {key} twice, {shown(outer)} and, in {name}, {shown(inner)}; keep the "
            "right one."
        )
    return inner
