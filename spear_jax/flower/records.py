"""Records of messages, as every part of the apps checks them. It imports no JAX."""

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from spear_jax.flower import PROTOCOL


class Refused(Exception):
    """A message that is not taken; says why, without any text of a client."""


def check_protocol(records: RecordDict, name: str) -> None:
    """Raises Refused where the record `name` is missing or of another protocol."""
    there = record_of(records, name, ConfigRecord).get("protocol")
    if there != PROTOCOL:
        raise Refused(
            f"it speaks protocol {there!r} and this side {PROTOCOL}; install the same version of "
            "spear-jax on server and nodes"
        )


def record_of(records: Mapping[str, Any], name: str, kind: type) -> Any:
    """Returns a record of that kind. Raises: Refused where there is none."""
    if name not in records or not isinstance(records[name], kind):
        raise Refused(f"it has no {kind.__name__} {name!r}")
    return records[name]


def check_answer(records: RecordDict) -> None:
    """Raises Refused for an answer of another protocol, and for one that refuses."""
    check_protocol(records, "answer")
    if "refused" in records["answer"]:
        raise Refused(str(records["answer"]["refused"])[:300])


def write_refusal(reason: str) -> RecordDict:
    """Returns the answer of a node that does not do it. Args: reason: holds no client's text."""
    return RecordDict({"answer": ConfigRecord({"protocol": PROTOCOL, "refused": reason})})
