"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors.

Source: PEFT's LoRA checkpoint format (`peft.utils.save_and_load`, `peft.tuners.lora`). A file holds
A [R, in] and B [out, R] of each layer; an `Adapter` holds [L', in, R] and [L', R, out].

Departures from PEFT:
  1. Tensors that PEFT would leave out with a warning, or not at all, are refused: names of another
     tool, modules and layers that the config does not target.
  2. Where `target_modules` is a pattern, the tensors alone say what is adapted.
  3. One rank and one alpha serve all modules, and a layer set is all layers or the last n.
"""

import json
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import read_json_object
from spear_jax.models.config import ModelConfig
from spear_jax.models.io.safetensors import write_safetensors
from spear_jax.models.io.tensor_map import MODULES
from spear_jax.models.lora import TARGETS, LoraConfig, check_lora, lora_layers, projection_shapes
from spear_jax.models.params import Adapter, LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGET_OF = {module: target for target, module in MODULES.items()}
_KEY = re.compile(
    r"base_model\.model\.(model\.layers\.([0-9]{1,9})\.(\w+\.\w+))\.lora_([AB])\.weight"
)
_DTYPES = ("F64", "F32", "F16", "BF16")
# Keys of rank_pattern and alpha_pattern are regular expressions; those of more than names are refused.
_PLAIN_PATTERN = re.compile(r"[\w.\\^$]+")
# Settings that change an adapter's arithmetic in a way that is not computed here; each must be
# absent or falsy. (PEFT turns `fan_in_fan_out` off for the projections of these models.)
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
)
# the other schemes change the base's weights, too
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    folder: str | os.PathLike,
    adapter: Adapter,
    lora: LoraConfig,
    model: ModelConfig,
    base_name: str,
) -> pathlib.Path:
    """Writes an adapter folder that PEFT loads.

    Args:
        adapter: written in its own dtype.
        base_name: the folder or Hub id of the base model, for `base_model_name_or_path`.
    Returns: the folder.
    Raises: UserError where the settings do not fit the model.
    """
    check_lora(lora, model)
    folder = pathlib.Path(folder)
    count = lora_layers(lora, model)
    numbers = range(model.layers - count, model.layers)
    tensors = {}
    pairs = adapter.by_name()
    for target, pair in pairs.items():
        for side, stack in (("A", np.asarray(pair.a)), ("B", np.asarray(pair.b))):
            for number, matrix in zip(numbers, stack, strict=True):
                tensors[_key(number, target, side)] = np.ascontiguousarray(matrix.T)
    modules = [MODULES[target].split(".")[1] for target in TARGETS if target in pairs]
    layers = list(numbers) if lora.last_layers else None
    return write_adapter(
        folder, tensors, lora.rank, lora.alpha, lora.dropout, modules, base_name, layers
    )


def write_adapter(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    rank: int,
    alpha: float,
    dropout: float,
    modules: list[str],
    base_name: str,
    layers: list[int] | None = None,
) -> pathlib.Path:
    """Writes tensors under PEFT's names as an adapter folder.

    Args:
        modules: `target_modules`; layers: `layers_to_transform`, None for wherever `modules` match.
    Returns: the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, tensors)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": modules,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(folder: str | os.PathLike, model: ModelConfig) -> tuple[Adapter, LoraConfig]:
    """Reads a PEFT LoRA folder.

    The tensors say which projections and layers carry an adapter, however `target_modules` is
    spelled (names, paths, patterns, "all-linear"); names in it that match nothing do no harm. Alpha
    of rank-stabilised LoRA comes back as alpha * sqrt(r), which plain LoRA scales alike.

    Returns: the adapter in float32, and its settings.
    Raises: UserError where the folder is incomplete, the adapter is not plain LoRA, has numbers that
        are none, or does not fit the model.
    """
    folder = pathlib.Path(folder)
    raw = _read_config(folder)
    tensors = _read_tensors(folder)
    layers_of: dict[str, set[int]] = {}  # target -> numbers of the layers that carry it
    modules = {}  # name of an adapted module -> its layer
    for name in tensors:
        match = _KEY.fullmatch(name)
        if match is None or match[3] not in _TARGET_OF:
            raise UserError(
                f"{folder / WEIGHTS}: tensor {shown(name, 120)} belongs to no projection of a "
                f"layer as PEFT names it ({_key(0, 'q', 'A')!r}); only adapters on "
                f"{', '.join(MODULES.values())} are supported. Save the adapter with PEFT's "
                f"`save_pretrained`."
            )
        modules[match[1]] = int(match[2])
        layers_of.setdefault(_TARGET_OF[match[3]], set()).add(int(match[2]))
    if not layers_of:
        raise UserError(f"{folder / WEIGHTS} holds no LoRA tensors; export the adapter again.")
    last_layers = _last_layers(folder, layers_of, model)
    _check_targeted(folder / CONFIG, raw, modules)
    _check_patterns(folder / CONFIG, raw, modules)
    stable = math.sqrt(raw["r"]) if raw.get("use_rslora") else 1.0
    lora = LoraConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]) * stable,
        dropout=float(raw.get("lora_dropout", 0.0)),
        targets=tuple(target for target in TARGETS if target in layers_of),
        last_layers=last_layers,
    )
    check_lora(lora, model)
    shapes = projection_shapes(model)
    numbers = range(model.layers - lora_layers(lora, model), model.layers)
    pairs = {}
    for target in lora.targets:
        inputs, outputs = shapes[target]
        sides = {"A": (lora.rank, inputs), "B": (outputs, lora.rank)}
        pair = {
            side: [_take(folder, tensors, _key(i, target, side), shape) for i in numbers]
            for side, shape in sides.items()
        }
        pairs[target] = LowRank(_stack(pair["A"]), _stack(pair["B"]))
    return Adapter(**pairs), lora


def _key(number: int, target: str, side: str) -> str:
    return f"base_model.model.model.layers.{number}.{MODULES[target]}.lora_{side}.weight"


def _stack(matrices: list[np.ndarray]) -> jax.Array:
    return jnp.asarray(np.stack([matrix.T.astype(np.float32) for matrix in matrices]))


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"no {CONFIG} in {str(folder)!r}; give a PEFT adapter folder.")
    raw = read_json_object(file, "export the adapter again")
    if "peft_type" not in raw:
        raise UserError(
            f"{file} has no 'peft_type', so PEFT did not write it (MLX and others have formats of "
            f"their own); convert the adapter to PEFT's format."
        )
    if raw["peft_type"] != "LORA":
        raise UserError(
            f"{file} holds a {shown(raw['peft_type'])} adapter (peft_type); only 'LORA' is "
            f"supported."
        )
    for name in ("r", "lora_alpha"):
        if name not in raw:
            raise UserError(f"{file} lacks {name!r}; export the adapter again.")
    _check_numbers(file, raw)
    for name in _UNSUPPORTED:
        if raw.get(name):
            raise UserError(
                f"{file} sets {name}={shown(raw[name])}, which is not supported; train or convert "
                f"to plain LoRA."
            )
    if raw.get("bias", "none") != "none":
        raise UserError(f"{file} sets bias={shown(raw['bias'])}; only 'none' is supported.")
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise UserError(
            f"{file} sets init_lora_weights={shown(raw['init_lora_weights'])}, which changes the "
            f"base weights too; convert "
            "the adapter to plain LoRA with PEFT (`path_initial_model_for_weight_conversion`)."
        )
    return raw


def _check_numbers(file: pathlib.Path, raw: dict[str, Any]) -> None:
    """Raises UserError for settings of another type, or numbers that are none."""
    rank, alpha, dropout = raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0)
    rules = {
        "r": (type(rank) is int and 1 <= rank < 1 << 31, "a count of 1 or more"),
        "lora_alpha": (_is_finite(alpha) and alpha > 0, "a number above 0"),
        "lora_dropout": (_is_finite(dropout) and 0 <= dropout < 1, "a number in [0, 1)"),
    }
    for name in ("use_rslora", "use_dora"):
        rules[name] = (raw.get(name) in (None, False, True), "true or false")
    for name in ("target_modules", "exclude_modules"):
        value = raw.get(name)
        names = isinstance(value, list) and all(isinstance(item, str) for item in value)
        rules[name] = (value is None or isinstance(value, str) or names, "names or a pattern")
    for name in ("rank_pattern", "alpha_pattern"):
        rules[name] = (isinstance(raw.get(name) or {}, dict), "an object")
    layers = raw.get("layers_to_transform")
    whole = type(layers) is int or (
        isinstance(layers, list) and all(type(item) is int for item in layers)
    )
    rules["layers_to_transform"] = (layers is None or whole, "numbers of layers")
    for name, (holds, rule) in rules.items():
        if not holds:
            raise UserError(
                f"{file}: {name} is {shown(raw.get(name))}; it must be {rule}. Export the adapter "
                f"again."
            )


def _is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a number that float32 holds."""
    return type(value) in (int, float) and abs(value) <= float(np.finfo(np.float32).max)


def _check_targeted(file: pathlib.Path, raw: dict[str, Any], modules: dict[str, int]) -> None:
    """Raises UserError where tensors belong to a module that PEFT would not adapt, by the names and
    layers of the config.
    """
    named, left_out = raw.get("target_modules"), raw.get("exclude_modules")
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    for module, layer in modules.items():
        if isinstance(named, list) and not _is_named(module, named):
            setting = "target_modules"
        elif isinstance(left_out, list) and _is_named(module, left_out):
            setting = "exclude_modules"
        elif layers and layer not in layers:
            setting = "layers_to_transform"
        else:
            continue
        raise UserError(
            f"{file} sets {setting}={shown(raw[setting])}, which leaves {module!r} out, but "
            f"{WEIGHTS} has its tensors; export the adapter again, or mend {setting}."
        )


def _is_named(module: str, names: list[str]) -> bool:
    """PEFT's match of a module with a list: the whole name, or its end behind a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _check_patterns(file: pathlib.Path, raw: dict[str, Any], modules: dict[str, int]) -> None:
    """Raises UserError where rank_pattern or alpha_pattern gives an adapted module another value
    than r or lora_alpha.
    """
    for setting, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        given = raw.get(setting) or {}
        patterns = {}
        for key, value in given.items():
            try:
                if value != raw[default] and not _PLAIN_PATTERN.fullmatch(key):
                    raise re.error("more than a name")
                if _PLAIN_PATTERN.fullmatch(key):
                    patterns[key] = re.compile(rf"(?:.*\.)?({key})$")
            except re.error as error:
                raise UserError(
                    f"{file}: {setting} has the key {shown(key)}, a pattern that is not supported "
                    f"({error}); train or convert to one rank and one alpha."
                ) from error
        for module in modules:
            first = next((key for key, pattern in patterns.items() if pattern.match(module)), None)
            if first is not None and given[first] != raw[default]:
                raise UserError(
                    f"{file} sets {setting}={shown(given)}, which gives {module!r} "
                    f"{shown(given[first])} instead of {default}={raw[default]}; one {default} for "
                    f"all modules is supported. Train or convert to that."
                )


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS
    if not file.is_file():
        old = (
            " It holds adapter_model.bin: save it again with safe_serialization."
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise UserError(f"no {WEIGHTS} in {str(folder)!r}.{old}")
    try:
        with safe_open(file, framework="numpy") as reader:
            return {name: _read_tensor(file, reader, name) for name in reader.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise UserError(
            f"{str(file)!r} is truncated or damaged ({error}); export the adapter again."
        ) from error


def _read_tensor(file: pathlib.Path, reader: Any, name: str) -> np.ndarray:
    """Reads one tensor as float32; raises UserError for whole numbers and numbers that are none."""
    dtype = reader.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
        raise UserError(
            f"{str(file)!r}: tensor {shown(name, 120)} is stored as {dtype}; only "
            f"{', '.join(_DTYPES)} are supported. Save the adapter unquantised."
        )
    with np.errstate(over="ignore"):
        values = reader.get_tensor(name).astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(
            f"{str(file)!r}: tensor {shown(name, 120)} holds NaN or infinity; the training that "
            f"wrote it failed. Take an earlier checkpoint of the adapter."
        )
    return values


def _last_layers(folder: pathlib.Path, layers_of: dict[str, set[int]], model: ModelConfig) -> int:
    """Returns 0 for all layers, else how many of the last ones; raises UserError for any other
    set.
    """
    numbers = set().union(*layers_of.values())
    count = len(numbers)
    if max(numbers) >= model.layers:
        raise UserError(
            f"{str(folder)!r} adapts layer {max(numbers)}, but the model has {model.layers}; it "
            f"is of another model."
        )
    if numbers != set(range(model.layers - count, model.layers)):
        raise UserError(
            f"{str(folder)!r} adapts layers {shown(sorted(numbers))} of {model.layers}; only all "
            f"layers, or the last n, "
            "are supported."
        )
    for target, own in layers_of.items():
        if own != numbers:
            raise UserError(
                f"{str(folder)!r} has no {MODULES[target]} adapter in layer "
                f"{min(numbers - own)}, unlike others; "
                "every adapted layer must have the same targets."
            )
    return 0 if count == model.layers else count


def _take(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int]
) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{folder / WEIGHTS} lacks tensor {name!r}; export the adapter again.")
    if tensors[name].shape != shape:
        raise UserError(
            f"{folder / WEIGHTS}: tensor {name!r} has shape {list(tensors[name].shape)}, but the "
            f"model and r call for "
            f"{list(shape)}; the adapter is of another model."
        )
    return tensors[name]
