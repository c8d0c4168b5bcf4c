"""Settings as frozen dataclasses: each field stands beside its default, its range and its choices.

One mechanism serves the whole config. `defaults` turns a dataclass into a nested dict for the
ConfigDict; `parse` turns such values back into the dataclass, types and ranges checked.

    @dataclasses.dataclass(frozen=True)
    class Lora:
        rank: int = number(16, 1)                       # at least 1
        dropout: float = number(0.1, 0, below=1)        # in [0, 1)
        kind: str = one_of("plain", "rslora")           # the first is the default

    parse(Lora, {"rank": 0, "dropout": 0.1, "kind": "plain"}, "lora")
    # UserError: lora.rank is 0; it must be at least 1. Set --config.lora.rank.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from spear_jax.core.errors import UserError, shown, unknown

_LARGEST = 1_000_000  # of whole numbers without a bound of their own: more takes all memory
_LARGEST_FLOAT = 3.4e38  # of float32
_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number, in float32",
    str: "a text",
    tuple: "a list of texts",
}


def number(
    default: float,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declares a number in [low, high].

    `above` and `below` leave the bound itself out. None leaves a side open.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def positive(default: float) -> Any:
    """Declares a number above zero."""
    return number(default, above=0)


def one_of(default: str, *others: str) -> Any:
    """Declares a name among a few."""
    return choice(default, (default, *others))


def choice(default: str, names: Sequence[str]) -> Any:
    """Declares a name among `names`."""
    return dataclasses.field(default=default, metadata={"choices": tuple(names)})


def group(kind: type) -> Any:
    """Declares a group of settings, itself a dataclass."""
    return dataclasses.field(default_factory=kind)


def defaults(kind: type) -> dict[str, Any]:
    """Returns {field: default} of a settings dataclass, groups as dicts of their own."""
    values = {field.name: _default(field) for field in dataclasses.fields(kind)}
    return {name: as_dict(x) if dataclasses.is_dataclass(x) else x for name, x in values.items()}


def as_dict(settings: Any) -> dict[str, Any]:
    """Returns the fields of settings, groups as dicts of their own."""
    return dataclasses.asdict(settings)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def parse(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Builds a settings dataclass from values.

    Args:
        kind: the dataclass.
        values: {field: value}; a group is a mapping of its own, a tuple may come as a list.
        prefix: the config group, for messages ("lora").
    Raises: UserError for a field that is unknown or missing, a value of the wrong type, and a value
        out of range, NaN and infinity among them.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"{prefix} is {shown(values)}; it must be a group of settings "
            f"({', '.join(field.name for field in dataclasses.fields(kind))}). Leave it out, or set "
            "its fields one by one."
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise unknown("config field", _path(prefix, name), [_path(prefix, x) for x in fields])
    parsed = {}
    for name, field in fields.items():
        path = _path(prefix, name)
        if name not in values:
            raise UserError(f"the config has no {path}; start from spear_jax's default_config.")
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            parsed[name] = parse(field.type, values[name], path)
        else:
            parsed[name] = _checked(field, values[name], path)
    return kind(**parsed)


def describe(kind: type, prefix: str = "") -> dict[str, str]:
    """Returns {field: its default and its rule, in words} of a settings dataclass and its groups.

    describe(Lora, "lora")["lora.rank"]     # "16; at least 1"
    """
    told: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        path, default = _path(prefix, field.name), _default(field)
        if dataclasses.is_dataclass(default):
            told |= describe(type(default), path)
        else:
            told[path] = f"{default!r}; {_rule(field)}"
    return told


def _rule(field: dataclasses.Field) -> str:
    if field.metadata.get("choices"):
        return f"one of {', '.join(name or '(empty)' for name in field.metadata['choices'])}"
    bounds = field.metadata.get("bounds")
    kind: Any = typing.get_origin(field.type) or field.type
    return _range(**bounds) if bounds else _KINDS.get(kind, "any value")


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _checked(field: dataclasses.Field, value: Any, path: str) -> Any:
    """Returns the value in its field's type; raises UserError for a wrong type, range or choice."""
    kind: Any = typing.get_origin(field.type) or field.type
    if kind is Any:
        return value
    value = _as_kind(kind, value, path)
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value)[:200], choices, n=1, cutoff=0.4)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"{path} is {shown(value)}. {guess}It must be one of {', '.join(choices)}. Set "
            f"--config.{path}."
        )
    rule = _broken_rule(value, **field.metadata.get("bounds", {}))
    if rule:
        raise UserError(f"{path} is {shown(value)}; it must be {rule}. Set --config.{path}.")
    return value


def _as_kind(kind: type, value: Any, path: str) -> Any:
    """Returns the value as its kind: an int is a number, too, and a list of texts a tuple.

    Raises: UserError for any other kind, for NaN and infinity, and for a text with a NUL.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (whole or isinstance(value, float)) and abs(value) <= _LARGEST_FLOAT:
        return float(value)
    if kind is int and whole:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and "\0" not in value:
        return value
    listed = kind is tuple and isinstance(value, (list, tuple))
    if listed and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UserError(f"{path} is {shown(value)}; it must be {_KINDS[kind]}. Set --config.{path}.")


def _broken_rule(
    value: Any,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> str:
    """Returns how the range reads where the value lies outside of it, else ""."""
    if isinstance(value, int) and high is None and value > _LARGEST:
        return f"at most {_LARGEST:,}"
    inside = (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    return "" if inside else _range(low, high, above, below)


def _range(
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> str:
    """How a range reads."""
    if above == 0 and high is None and below is None:
        return "positive"
    left = f"[{low}" if low is not None else f"({above}" if above is not None else "(-inf"
    right = f"{high}]" if high is not None else f"{below})" if below is not None else "inf)"
    if right == "inf)" and low is not None:
        return f"at least {low}"
    if low is not None and high is not None:
        return f"between {low} and {high}"
    return f"in {left}, {right}"
