"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors.

Source: PEFT's LoRA checkpoint format. A file holds A [R, in] and B [out, R] of each layer; an
`Adapter` holds [L', in, R] and [L', R, out].
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
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight")
# Settings that change an adapter's arithmetic in a way that is not computed here; each must be
# absent or falsy.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
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

    The tensors say which projections and layers carry an adapter, as PEFT loads them: names in
    `target_modules` that match nothing there, exclusions and patterns change nothing. An adapter
    with `use_rslora`, whose scale is alpha / √r, is given the alpha √r times as large.

    Returns: the adapter in float32, and its settings.
    Raises: UserError where the folder is incomplete, the adapter is not plain LoRA, or it does not
        fit the model.
    """
    folder = pathlib.Path(folder)
    raw = _read_config(folder)
    rank, alpha, dropout = _read_numbers(folder / CONFIG, raw)
    tensors = _read_tensors(folder)
    layers_of: dict[str, set[int]] = {}  # target -> numbers of the layers that carry it
    for name in tensors:
        match = _KEY.fullmatch(name)
        if match is None or match[2] not in _TARGET_OF:
            raise UserError(
                f"{folder / WEIGHTS}: tensor {name!r} belongs to no projection of a layer; only "
                f"adapters on "
                f"{', '.join(MODULES.values())} are supported."
            )
        layers_of.setdefault(_TARGET_OF[match[2]], set()).add(int(match[1]))
    if not layers_of:
        raise UserError(f"{folder / WEIGHTS} holds no LoRA tensors; export the adapter again.")
    last_layers = _last_layers(folder, layers_of, model)
    lora = LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
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
    if raw.get("peft_type") != "LORA":
        raise UserError(
            f"{file} has the peft_type {shown(raw.get('peft_type'))}; only 'LORA' is supported."
        )
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
            f"{file} sets init_lora_weights={shown(raw['init_lora_weights'])}, which changes the base "
            f"weights too; convert "
            "the adapter to plain LoRA with PEFT (`path_initial_model_for_weight_conversion`)."
        )
    return raw


def _read_numbers(file: pathlib.Path, raw: dict[str, Any]) -> tuple[int, float, float]:
    """Returns rank, alpha and dropout; raises UserError for a value that is none of these."""
    rules = {
        "r": ("a whole number from 1 to 65536", int, lambda x: 1 <= x <= 65536),
        "lora_alpha": ("a positive number", (int, float), lambda x: 0 < x < 3.4e38),
        "lora_dropout": ("a number in [0, 1)", (int, float), lambda x: 0 <= x < 1),
        "use_rslora": ("true or false", (bool, type(None)), lambda x: True),
    }
    defaults = {"lora_dropout": 0.0, "use_rslora": False}
    for name, (rule, kind, holds) in rules.items():
        value = raw.get(name, defaults.get(name))
        numeric = name != "use_rslora"
        if not isinstance(value, kind) or (numeric and isinstance(value, bool)) or not holds(value):
            raise UserError(
                f"{file} has {name} {shown(value)}; it must be {rule}. Export the adapter again."
            )
    rank, alpha = raw["r"], float(raw["lora_alpha"])
    for name, plain in (("rank_pattern", rank), ("alpha_pattern", raw["lora_alpha"])):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or any(value != plain for value in pattern.values()):
            raise UserError(
                f"{file} sets {name}={shown(pattern)}, other than the adapter's {plain}; only one "
                "rank and one alpha for all modules are supported."
            )
    alpha = alpha * math.sqrt(rank) if raw.get("use_rslora") else alpha
    return rank, alpha, float(raw.get("lora_dropout", 0.0))


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
            held = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        raise UserError(
            f"{str(file)!r} is truncated or damaged ({error}); export the adapter again."
        ) from error
    for name, tensor in held.items():
        values = np.asarray(tensor, np.float32) if tensor.dtype.kind not in "iub" else None
        if values is None or not np.isfinite(values).all():
            problem = f"is {tensor.dtype.name}" if values is None else "holds NaN or infinity"
            raise UserError(
                f"{file}: tensor {name!r} {problem}; an adapter holds finite numbers. Export it "
                "again."
            )
    return held


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
            f"{str(folder)!r} adapts layers {sorted(numbers)} of {model.layers}; only all "
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
