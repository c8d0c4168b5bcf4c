"""Secure sums between real clients: keys, shares, masks, and whole rounds. Needs the extra `flower`."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install -e .[flower]")

from flwr.app import Array, ConfigRecord, RecordDict

from spear_jax.core.errors import UserError
from spear_jax.federated.aggregation.secure_sum import SecureSum
from spear_jax.flower import PROTOCOL, masks, secure
from spear_jax.flower.masks import Coded, Member
from spear_jax.flower.records import Refused

RUN, SIZE = "ab" * 8, 5000
HIDING = SecureSum(4.0, 16)


def numbers(client):
    draw = np.random.default_rng(client)
    totals = {"weight": (3.0 + client, 1.0), f"own{client}": (-1e12 * client, 0.5)}
    return draw.normal(size=SIZE) * 0.05, totals


class Cohort:
    """Clients that have trained, and the messages between them and a server.

    Args: lost: client -> the stage that it does not answer; change: (stage, client, answer) ->
        the answer that arrives.
    """

    def __init__(self, folder, clients, lost=None, change=lambda stage, client, answer: answer):
        self.folder, self.lost, self.change, self.seen = folder, lost or {}, change, {}
        self.keys, self.refused = {}, {}
        for client in clients:
            (folder / str(client) / RUN).mkdir(parents=True, exist_ok=True)
            x, totals = numbers(client)
            records = secure.begin(
                folder / str(client) / RUN, client, 1, HIDING.encode(x, 4.0), totals
            )
            self.keys[client] = secure.read_keys(records)

    def ask(self, kind, requests, read):
        stage, answers = kind.removeprefix("train."), {}
        for client, records in requests.items():
            if self.lost.get(client) == stage:
                continue
            answer = secure.answer(stage, records, self.folder / str(client))
            answer = self.change(stage, client, answer)
            self.seen[stage, client] = answer
            try:
                answers[client] = read(client, answer)
            except Refused as refused:
                self.refused[client] = str(refused)
        return answers

    def total(self):
        return secure.collect(self.ask, self.keys, RUN, 1, SIZE)


def check(total, clients):
    """The sum is that of these clients, to half a step each."""
    assert total.clients == set(clients)
    plain = np.sum([numbers(client)[0] for client in clients], 0)
    np.testing.assert_allclose(HIDING.decode(total.update), plain, atol=len(clients) / 2**17)
    assert total.totals["weight"] == (sum(3.0 + c for c in clients), float(len(clients)))
    for client in clients:
        assert total.totals[f"own{client}"] == (-1e12 * client, 0.5)


# A threshold of the clients is enough, whenever the others are lost


@pytest.mark.parametrize("lost", [None, "share", "mask", "reveal"])
def test_the_sum_of_masked_numbers_is_the_plain_sum(tmp_path, lost):
    cohort = Cohort(tmp_path, range(5), {} if lost is None else {1: lost, 4: lost})
    total = cohort.total()
    there = [0, 2, 3] if lost in ("share", "mask") else range(5)
    check(total, there)
    for client in (0, 2, 3):  # keys are thrown away
        assert not [x for x in (tmp_path / str(client)).rglob("*") if x.is_file()]


def test_clients_lost_at_different_stages(tmp_path):
    check(Cohort(tmp_path, range(7), {0: "share", 3: "mask", 6: "reveal"}).total(), [1, 2, 4, 5, 6])


@pytest.mark.parametrize("stage", ["share", "mask", "reveal"])
def test_below_the_threshold_there_is_no_sum(tmp_path, stage):
    with pytest.raises(UserError, match=f"2 of the 5 clients .* are there to {stage}"):
        Cohort(tmp_path, range(5), dict.fromkeys((0, 1, 2), stage)).total()


def test_one_client_has_no_sum(tmp_path):
    with pytest.raises(UserError, match="0 of the 1 clients .* fewer than 2"):
        Cohort(tmp_path, [3]).total()


# What a server, or another client, sees


def test_a_masked_message_is_noise(tmp_path):
    cohort = Cohort(tmp_path / "a", range(3))
    cohort.total()
    again = Cohort(tmp_path / "b", range(3))
    again.total()
    plain = numbers(1)[0]
    first, second = (
        secure.read_coded(x.seen["mask", 1], SIZE, 2 * 4) for x in (cohort, again)
    )  # the same update
    for seen in (first, second):
        digits = np.bincount(seen.update.view(np.uint8), minlength=256)
        expected = 4 * SIZE / 256
        # 255 degrees of freedom: 4.5 standard deviations
        assert abs(np.sum((digits - expected) ** 2 / expected) - 255) < 4.5 * np.sqrt(510)
        assert abs(np.corrcoef(seen.update.view(np.int32), plain)[0, 1]) < 4.5 / np.sqrt(SIZE)
        assert all(x > 2**100 for x in seen.totals)  # of numbers below 2^64 / 2^-32
    assert abs(np.corrcoef(first.update, second.update)[0, 1]) < 4.5 / np.sqrt(SIZE)
    assert not set(first.totals) & set(second.totals)
    # a mask is missing: what is left is no number of a client either
    two = first.plus(secure.read_coded(cohort.seen["mask", 0], SIZE, 8))
    assert abs(np.corrcoef(two.update.view(np.int32), plain)[0, 1]) < 4.5 / np.sqrt(SIZE)


def test_no_share_of_a_client_stands_in_a_message_to_the_server(tmp_path):
    kept = {}

    def change(stage, client, answer):
        if stage == "share":
            file = tmp_path / str(client) / RUN / "secure/state.json"
            kept[client] = Member.from_text(json.loads(file.read_text())["member"])
            assert file.stat().st_mode & 0o77 == 0
        return answer

    cohort = Cohort(tmp_path, range(3), change=change)
    cohort.total()
    said = b"".join(
        x if isinstance(x, bytes) else b""
        for (stage, _), answer in cohort.seen.items()
        for record in answer.values()
        for x in record.values()
        if stage != "reveal"
    )
    for member in kept.values():
        own = member.sealed[member.client]
        for secret in (member.seed, member.sealing, member.masking, own[:66], own[66:]):
            assert secret not in said


def test_a_client_reveals_one_of_two_secrets_once(tmp_path):
    cohort = Cohort(tmp_path, range(3), {2: "mask"})
    cohort.total()
    revealed = secure.read_shares(cohort.seen["reveal", 0])
    assert set(revealed) == {0, 1, 2}
    asked = {"protocol": PROTOCOL, "run": RUN, "round": 1, "arrived": [0, 1, 2]}
    with pytest.raises(Refused, match="nothing to send"):
        secure.answer("reveal", RecordDict({"asked": ConfigRecord(asked)}), tmp_path / "0")


def members(count, threshold):
    those = [Member.new(client, "run/1") for client in range(count)]
    public = {one.client: one.keys() for one in those}
    return those, public, {one.client: one.share(public, threshold) for one in those}


def test_a_member_refuses_what_would_tell():
    those, public, shares = members(4, 3)
    nothing = Coded(np.zeros(2, np.uint32), ())
    inbox = lambda to, by: {one: shares[one][to] for one in by}
    with pytest.raises(Refused, match="2 of 4 clients do not hide"):
        those[0].share(public, 2)
    with pytest.raises(Refused, match="not one pair"):
        those[0].share(public | {3: public[2]}, 3)
    with pytest.raises(Refused, match="not one pair"):
        those[0].share({c: k for c, k in public.items() if c}, 3)
    with pytest.raises(Refused, match="shares of 2 clients are too few"):
        those[0].mask(inbox(0, (0, 1)), nothing)
    those[0].mask(inbox(0, (0, 1, 2)), nothing)
    for arrived in ({0, 1}, {1, 2, 3}, {0, 1, 3}):
        with pytest.raises(Refused, match="too few, or not those"):
            those[0].reveal(arrived)
    swapped = inbox(0, (0, 1, 2, 3)) | {1: shares[2][0], 2: shares[1][0]}
    those[0].mask(swapped, nothing)
    with pytest.raises(Refused, match="share of client 1 is not its own"):
        those[0].reveal({0, 1, 2})
    none = dict(public) | {2: bytes(64)}
    with pytest.raises(Refused, match="a key is none"):
        those[0].share(none, 3)


def test_wrong_shares_of_a_lost_client_give_no_sum(tmp_path):
    def change(stage, client, answer):
        if stage == "reveal" and client == 0:
            answer["shares"]["2"] = bytes([1]) * 66
        return answer

    with pytest.raises(UserError, match="shares"):
        Cohort(tmp_path, range(3), {2: "mask"}, change).total()


@pytest.mark.parametrize(
    "stage, record, name, value, why",
    [
        ("mask", "masked", "update", Array(np.zeros(3, np.uint32)), "not uint32"),
        ("mask", "masked", "update", Array(np.zeros(SIZE)), "not uint32"),
        ("mask", "totals", "totals", b"short", "its metrics"),
        ("share", "shares", "1", b"short", "its shares"),
        ("share", "shares", "9", bytes(148), "its shares"),
        ("mask", "answer", "refused", "no disk", "no disk"),
    ],
)
def test_nonsense_is_left_out(tmp_path, stage, record, name, value, why):
    def change(at, client, answer):
        if (at, client) == (stage, 2):
            answer[record][name] = value
        return answer

    cohort = Cohort(tmp_path, range(3), change=change)
    check(cohort.total(), [0, 1])
    assert why in cohort.refused[2]


# Numbers


def test_any_threshold_of_shares_gives_a_secret_and_fewer_do_not():
    secret = bytes(range(200, 232))
    shares = dict(zip(range(1, 6), masks.split(secret, 3, range(1, 6)), strict=True))
    for some in itertools.combinations(shares, 3):
        assert masks.join({place: shares[place] for place in some}) == secret
    assert masks.join(shares) == secret
    with pytest.raises(Refused):
        masks.join({place: shares[place] for place in (1, 2)})
    # degree 1, by hand: the line through (1, y1) and (2, y2) meets 0 at 2 y1 − y2
    one, two = (int.from_bytes(x, "little") for x in masks.split(secret, 2, (1, 2)))
    assert (2 * one - two) % (2**521 - 1) == int.from_bytes(secret, "little")


def test_totals_have_room():
    given = [0.0, -3.25, 1e15, 2.0**-33, -1e-3, 7e17]
    sums = [sum(x) for x in zip(*[masks.encode_totals(given)] * 100, strict=True)]
    np.testing.assert_allclose(masks.decode_totals(sums), np.multiply(given, 100), atol=100 / 2**33)


def test_the_stream_is_that_of_chacha20():
    # RFC 8439, appendix A.1, test vector 1
    assert masks.keystream(bytes(32), 8).hex() == "76b8e0ada0f13d90"
