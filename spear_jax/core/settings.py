"""How a method declares its numbers: dataclass fields that know their range, so that one check
covers every method.
"""

import dataclasses
from typing import Any

from spear_jax.core.errors import UserError


def number(default: float, low: float | None = None, high: float | None = None) -> Any:
    """A number in [low, high]; None leaves a side open."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def positive(default: float) -> Any:
    """A number above zero."""
    return dataclasses.field(default=default, metadata={"above": 0})


def one_of(default: str, *others: str) -> Any:
    """A name among a few; the first is the default."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def defaults(kind: type) -> dict[str, Any]:
    """{field: default} of a settings dataclass."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def check_fields(kind: type, values: dict[str, Any], prefix: str) -> None:
    """Raises UserError for the first value outside its field's range.

    Args:
        kind: a settings dataclass.
        values: {field: value}.
        prefix: the config group, for the message ("grpo").
    """
    for field in dataclasses.fields(kind):
        value, rule = values[field.name], field.metadata
        name = f"{prefix}.{field.name}"
        if "choices" in rule and value not in rule["choices"]:
            raise UserError(
                f"{name} is {value!r}; it must be one of {', '.join(rule['choices'])}. Set "
                f"--config.{name}."
            )
        if "above" in rule and not value > rule["above"]:
            raise UserError(f"{name} is {value}; it must be positive. Set --config.{name}.")
        low, high = rule.get("low"), rule.get("high")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{name} is {value}; it must be {bounds}. Set --config.{name}.")
