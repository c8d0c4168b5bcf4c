"""The messages of a secure sum (`masks`): what a node answers, and what the server asks.

    "train"          the round's request; the node trains, and answers with its public keys
    "train.share"    down the cohort's keys; up a sealed share for each other client
    "train.mask"     down the sealed shares for this client; up its numbers behind masks
    "train.reveal"   down who has arrived; up a share of each client

Between messages a node keeps its keys and numbers in FOLDER/RUN/secure/, which nobody but its user
can read. They are gone after the last message, and each message of a round is answered once. It
imports no JAX: Flower starts a process for every message.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from spear_jax.core.errors import UserError
from spear_jax.core.files import writing
from spear_jax.flower import PROTOCOL, STAGES
from spear_jax.flower.masks import (
    SHARE,
    Coded,
    Member,
    Shares,
    decode_totals,
    encode_totals,
    threshold_of,
    unmask,
)
from spear_jax.flower.records import Refused, check_answer, check_protocol, record_of

SEALED = 2 * SHARE + 16  # bytes

Totals = dict[str, tuple[float, float]]  # by name (total, count)
Reader = Callable[[int, RecordDict], Any]  # a client and its answer to what is read; raises Refused


class Keys(NamedTuple):
    """What a client sends in place of its update. Attributes: public: its keys; names: of totals."""

    public: bytes
    names: list[str]


class NoSum(UserError):
    """A sum that cannot be had, since too few clients are there."""


class SecureTotal(NamedTuple):
    """What the server learns.

    Attributes: clients: whose numbers are in; update: uint32[d], the sum of their codes; totals: sums
        of their weights and metrics.
    """

    clients: set[int]
    update: np.ndarray
    totals: Totals


# On a node


def begin(
    folder: pathlib.Path, client: int, round: int, update: np.ndarray, totals: Totals
) -> RecordDict:
    """Puts a client's numbers away, and returns its keys.

    Args: folder: of the run, on the node; update: codes, uint32[d].
    """
    member = Member.new(client, f"{folder.name}/{round}")
    _put_away(folder, member, round, "share", totals)
    with _private(folder / "secure/update.npy") as out:
        np.save(out, update)
    keys = ConfigRecord({"public": member.keys(), "names": sorted(totals)})
    return RecordDict({"answer": ConfigRecord({"protocol": PROTOCOL}), "keys": keys})


def answer(stage: str, records: RecordDict, folder: pathlib.Path) -> RecordDict:
    """Answers a message of a secure sum. Args: folder: of the node.

    Raises: Refused for a message that is not the next one of the round that was trained.
    """
    check_protocol(records, "asked")
    asked = record_of(records, "asked", ConfigRecord)
    run, round = str(asked["run"]), int(asked["round"])
    if not re.fullmatch(r"[0-9a-f]{8,64}", run):
        raise Refused(f"{run[:80]!r} is no name of a run")
    folder = folder / run
    try:
        kept = json.loads((folder / "secure/state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused("this node has nothing to send") from None
    if (round, stage) != (kept["round"], kept["next"]):
        raise Refused(f"{stage} of round {round} is asked, not {kept['next']} of {kept['round']}")
    member, following = Member.from_text(kept["member"]), STAGES[STAGES.index(stage) + 1 :]
    # noted before anything is said, so that no message is answered twice
    _put_away(folder, member, round, "", {})
    if stage == "share":
        shares = member.share(read_shares(records), int(asked["threshold"]))
        member.sealed = {member.client: shares.pop(member.client)}
        told = _write_shares(shares)
    elif stage == "mask":
        names = list(map(str, asked["names"]))
        none = [0.0, 0.0]
        totals = encode_totals(x for name in names for x in kept["totals"].get(name, none))
        coded = Coded(np.load(folder / "secure/update.npy"), totals)
        told = _write_coded(member.mask(member.sealed | read_shares(records), coded))
    else:
        told = _write_shares(member.reveal(set(map(int, asked["arrived"]))))
    if following:
        _put_away(folder, member, round, following[0], kept["totals"])
    else:
        for name in ("state.json", "update.npy"):
            (folder / "secure" / name).unlink()
    return told


def _put_away(folder: pathlib.Path, member: Member, round: int, following: str, totals) -> None:
    kept = {"round": round, "next": following, "totals": totals, "member": member.as_text()}
    target = folder / "secure/state.json"
    with writing(target):
        with _private(target.with_suffix(".tmp")) as out:
            out.write(json.dumps(kept).encode())
            out.flush()
            os.fsync(out.fileno())
        os.replace(target.with_suffix(".tmp"), target)


def _private(file: pathlib.Path) -> Any:
    """Opens a new file that its user alone can read."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


# On the server


def read_keys(records: RecordDict) -> Keys:
    """Reads what a node answers to a round's request. Raises: Refused."""
    check_answer(records)
    keys = record_of(records, "keys", ConfigRecord)
    public, names = keys.get("public"), keys.get("names")
    if not isinstance(public, bytes) or len(public) != 64:
        raise Refused("its keys are none")
    if not isinstance(names, list) or not all(isinstance(x, str) and x for x in names):
        raise Refused("its metrics have no names")
    return Keys(public, names)


def collect(
    ask: Callable[[str, dict[int, RecordDict], Reader], dict[int, Any]],
    keys: Mapping[int, Keys],
    run: str,
    round: int,
    size: int,
) -> SecureTotal:
    """Has the clients that sent keys add up their numbers.

    Args:
        ask: sends each client its request of a message type, and returns what is read of the answers
            that can be taken.
        size: d.
    Raises: NoSum where fewer clients are there than hide one of them.
    """
    public, least = {client: one.public for client, one in keys.items()}, threshold_of(len(keys))
    names, label = sorted({name for one in keys.values() for name in one.names}), f"{run}/{round}"

    def stage(kind: str, asked: dict[str, Any], shares: Mapping[int, Shares], read) -> dict:
        head = {"protocol": PROTOCOL, "run": run, "round": round} | asked
        records = {
            client: RecordDict({"asked": ConfigRecord(head)} | _shares(own))
            for client, own in shares.items()
        }
        answers = ask(f"train.{kind}", records, read) if len(records) >= max(2, least) else {}
        if len(answers) < max(2, least):
            raise NoSum(
                f"round {round}: {len(answers)} of the {len(keys)} clients that have trained are there "
                f"to {kind}, and with fewer than {max(2, least)} a sum would not hide each of them."
            )
        return answers

    read: Reader = lambda client, records: _shares_of(records, keys.keys() - {client}, SEALED)
    sealed = stage("share", {"threshold": least}, dict.fromkeys(keys, public), read)
    own = {to: {by: sealed[by][to] for by in sealed if by != to} for to in sealed}
    read = lambda client, records: read_coded(records, size, 2 * len(names))
    masked = stage("mask", {"names": names}, own, read)
    arrived = sorted(masked)
    read = lambda client, records: _shares_of(records, sealed.keys(), SHARE)
    revealed = stage("reveal", {"arrived": arrived}, dict.fromkeys(arrived, {}), read)
    total = masked[arrived[0]]
    for client in arrived[1:]:
        total = total.plus(masked[client])
    try:
        total = unmask(total, label, least, public, set(sealed), set(arrived), revealed)
    except Refused as refused:
        raise NoSum(f"round {round}: the sum cannot be read: {refused}.") from refused
    found = decode_totals(total.totals)
    pairs = zip(names, found[::2], found[1::2], strict=True)
    return SecureTotal(set(arrived), total.update, {name: (x, n) for name, x, n in pairs})


def _shares_of(records: RecordDict, clients: Set[int], size: int) -> Shares:
    """Reads shares of these clients, or for them. Raises: Refused. Args: size: bytes of each."""
    check_answer(records)
    shares = read_shares(records)
    if shares.keys() != clients or any(len(share) != size for share in shares.values()):
        raise Refused("its shares are not those of the cohort")
    return shares


def read_coded(records: RecordDict, size: int, totals: int) -> Coded:
    """Reads numbers behind masks. Raises: Refused."""
    check_answer(records)
    update = record_of(records, "masked", ArrayRecord).get("update")
    told = record_of(records, "totals", ConfigRecord).get("totals")
    if update is None or tuple(update.shape) != (size,) or update.dtype != "uint32":
        raise Refused(f"its numbers are not uint32({size},)")
    if not isinstance(told, bytes) or len(told) != 16 * totals:
        raise Refused(f"its metrics are not {totals} numbers")
    try:
        array = update.numpy()
    except ValueError as error:
        raise Refused("its numbers cannot be read") from error
    if array.shape != (size,) or array.dtype != np.uint32:
        raise Refused("its numbers are not what they say")
    parts = [told[i : i + 16] for i in range(0, len(told), 16)]
    return Coded(array, tuple(int.from_bytes(part, "little") for part in parts))


def _write_coded(coded: Coded) -> RecordDict:
    told = b"".join(x.to_bytes(16, "little") for x in coded.totals)
    return RecordDict(
        {
            "answer": ConfigRecord({"protocol": PROTOCOL}),
            "masked": ArrayRecord({"update": Array(coded.update)}),
            "totals": ConfigRecord({"totals": told}),
        }
    )


def _write_shares(shares: Shares) -> RecordDict:
    return RecordDict({"answer": ConfigRecord({"protocol": PROTOCOL})} | _shares(shares))


def _shares(shares: Shares) -> dict[str, ConfigRecord]:
    return {"shares": ConfigRecord({str(client): share for client, share in shares.items()})}


def read_shares(records: RecordDict) -> Shares:
    """Reads what stands by clients. Raises: Refused."""
    shares = record_of(records, "shares", ConfigRecord)
    if not all(name.isdecimal() and isinstance(x, bytes) for name, x in shares.items()):
        raise Refused("its shares are none")
    return {int(client): share for client, share in shares.items()}
