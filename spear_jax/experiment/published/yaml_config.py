"""YAML files of the published SPEAR code as configs of ours, by the table in `keys`.

Its loader drops keys that it does not know. Here they are refused with the nearest name, as is a
key given twice.
"""

import json
import pathlib
from typing import Any

import ml_collections
import yaml

from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.experiment.config import default_config, set_preset
from spear_jax.experiment.published.keys import KEYS
from spear_jax.experiment.published.values import METHODS, Refused

PRESETS = ("default", "reference")
# Its server, rollouts and grading have these faults whatever the method is; preset `reference` of a
# method may leave them out.
SHARED_FAULTS = {
    "federation.aggregation": "last",  # A1
    "rollout.feedback": "oracle_published",  # A4
    "data.extractor": "published",  # A5
    "federation.colliding_streams": True,  # A7
    "train.normalize": "micro",
    "rollout.top_k": 50,
}


def read_yaml(path: str) -> dict[str, Any]:
    """Reads a file as {"section.key": value}.

    Raises: UserError for what is no such file, and for a key given twice.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(
            f"no file {path!r}; give --config=from_yaml:PATH.yaml, a YAML file of the published "
            f"code."
        )
    try:
        text = file.read_text(encoding="utf-8")
        _no_alias(text, path)
        _no_key_twice(yaml.compose(text, yaml.SafeLoader), path)
        nested = yaml.safe_load(text)
        nested = {} if nested is None else nested
    except RecursionError:
        raise UserError(f"{path} nests deeper than any such file; correct it.") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"{path} is no YAML file ({' '.join(str(error).split())[:300]}); correct it."
        ) from error
    return flatten(nested, path)


def flatten(nested: Any, where: str) -> dict[str, Any]:
    """Flattens sections to {"section.key": value}.

        {"fl": {"rounds": 50}}  ->  {"fl.rounds": 50}

    Raises: UserError for sections and keys that the published schema lacks.
    """
    if not isinstance(nested, dict):
        raise UserError(
            f"{where} holds no sections; it must be a mapping, as `fl: {{rounds: 50}}`."
        )
    sections = {name.partition(".")[0] for name in KEYS}
    flat: dict[str, Any] = {}
    for section, inside in nested.items():
        if section not in sections:
            raise unknown(f"section in {where}:", str(section), sections)
        if section in KEYS:
            flat[section] = inside
            continue
        if not isinstance(inside, dict | None):
            raise UserError(f"{where}: {section} is {shown(inside)}; it must be a section of keys.")
        for key, value in (inside or {}).items():
            name = f"{section}.{key}"
            if name not in KEYS:
                raise unknown(f"key in {where}:", name, KEYS)
            flat[name] = value
    return flat


def to_config(
    given: dict[str, Any], where: str, preset: str = "default"
) -> ml_collections.ConfigDict:
    """Returns the config for a file's keys.

    Keys that it leaves out have the published code's defaults, not ours.

    Args:
        given: as from `read_yaml`.
        where: the file, for messages.
        preset: "default" leaves the fixes of the published faults on, "reference" repeats the
            faults.
    Raises: UserError naming the key, its value, the rule and the remedy.
    """
    if preset not in PRESETS:
        raise unknown("variant", preset, PRESETS)
    values: dict[str, Any] = {"preset": preset}
    for name, key in KEYS.items():
        values[name] = _asking(where, name, given.get(name, key.default), key.read)
    method = values["algorithm.name"]
    config = default_config()
    config.algorithm.name = method
    set_preset(config, preset)
    if preset == "reference":
        config.update_from_flattened_dict(SHARED_FAULTS)
    for name, key in KEYS.items():
        if method in key.methods:
            fields = _asking(
                where, name, values[name], lambda value, key=key: key.fields(value, values)
            )
            config.update_from_flattened_dict(fields)
    return config


def from_argument(arg: str) -> ml_collections.ConfigDict:
    """Returns the config of "PATH.yaml" or "PATH.yaml,reference"; see `read_yaml` and `to_config`.

    Raises: UserError for a file, a key or a value that is not of the published schema.
    """
    path, comma, variant = arg.rpartition(",")
    if not comma or variant.endswith((".yaml", ".yml")):
        path, variant = arg, "default"
    return to_config(read_yaml(path), path, variant)


def table() -> str:
    """Returns the guide's table of all keys, in Markdown."""
    lines = ["| key | default there | here |", "| --- | --- | --- |"]
    for name, key in KEYS.items():
        readers = "" if key.methods == METHODS else f" (read by {', '.join(key.methods)} alone)"
        lines.append(f"| `{name}` | {json.dumps(key.default)} | {key.here}{readers} |")
    return "\n".join(lines)


def _asking(where: str, name: str, value: Any, ask: Any) -> Any:
    try:
        return ask(value)
    except Refused as why:
        given = shown(json.dumps(value, default=str)).strip("'")
        raise UserError(f"{where}: {name} is {given}; {why}.") from None


def _no_alias(text: str, path: str) -> None:
    """Raises UserError for an alias: a few lines of them can stand for more values than fit in
    memory.
    """
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(
                f"{path} has the alias *{event.anchor} in line {event.start_mark.line + 1}; aliases "
                "are not read. Write the value out."
            )


def _no_key_twice(node: yaml.Node | None, path: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    names = set()
    for key, inside in node.value:
        name = str(key.value)
        if name in names:
            raise UserError(
                f"{path} gives {shown(name)} twice in one section; the later one would win. Delete "
                "one."
            )
        names.add(name)
        _no_key_twice(inside, path)
