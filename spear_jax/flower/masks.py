"""Secure aggregation between clients and a server: it learns the sum of their numbers alone.

    1  keys    every client makes two key pairs for the round; the server passes the public halves on
    2  share   it splits a seed b_u and its masking key into shares, of which any t give them back
               and fewer tell nothing, and seals one of each for every client
    3  mask    it sends  y_u = x_u + G(b_u) + Σ_{v > u} G(s_uv) − Σ_{v < u} G(s_uv)
    4  reveal  of each client whose y came, the others send their share of its b; of each that was
               lost behind stage 2, their share of its masking key. Never both of one client

s_uv is what u and v agree on by their masking keys, G a stream cipher. In the sum the masks of pairs
cancel. The server takes the G(b_u) off, and what was masked against lost clients.

Source: Bonawitz et al., "Practical secure aggregation" (CCS 2017; arXiv 1611.04482), sections 4 and 6.
Departures:
  1. X25519, HKDF with SHA-256, ChaCha20 as G and ChaCha20-Poly1305 as the seal. Every derived key is
     of one run, round, pair and use.
  2. Shares are of the field of 2^521 − 1, with t = n // 2 + 1 of the n clients that sent keys.
  3. Numbers of updates are summed modulo 2^32, weights and metrics modulo 2^128.
  4. Keys are not signed, and clients do not compare notes on who is there (the paper's additions for
     a server that lies): this is the protocol for a server that keeps to it, and looks.
"""

import base64
import dataclasses
import hashlib
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spear_jax.flower.records import Refused

KEY = 32  # bytes
FIELD = 2**521 - 1  # a prime
SHARE = 66  # bytes of a number of it
WIDE_BITS, WIDE_POINT = 128, 32  # of weights and metrics: all bits, and those behind the point
LARGEST = 2.0**64  # of them; more is cut off

Shares = dict[int, bytes]  # by client


@dataclasses.dataclass(frozen=True)
class Coded:
    """Numbers in fixed point. Attributes: update: uint32[d]; totals: integers modulo 2^128."""

    update: np.ndarray
    totals: tuple[int, ...]

    def plus(self, other: "Coded", sign: int = 1) -> "Coded":
        """Returns the sum, or the difference."""
        update = self.update + other.update if sign > 0 else self.update - other.update
        pairs = zip(self.totals, other.totals, strict=True)
        return Coded(update, tuple((x + sign * y) % 2**WIDE_BITS for x, y in pairs))

    def mask(self, key: bytes, sign: int = 1) -> "Coded":
        """Returns these numbers with the stream of a key added, or taken off."""
        wide, count = WIDE_BITS // 8, self.update.size
        stream = keystream(key, 4 * count + wide * len(self.totals))
        rest = stream[4 * count :]
        totals = [rest[i : i + wide] for i in range(0, len(rest), wide)]
        update = np.frombuffer(stream, "<u4", count).astype(np.uint32)
        return self.plus(Coded(update, tuple(int.from_bytes(x, "little") for x in totals)), sign)


def encode_totals(numbers: Iterable[float]) -> tuple[int, ...]:
    """Returns finite numbers in fixed point, each right to 2^-33."""
    cut = (min(max(float(x), -LARGEST), LARGEST) for x in numbers)
    return tuple(round(x * 2**WIDE_POINT) % 2**WIDE_BITS for x in cut)


def decode_totals(totals: Iterable[int]) -> list[float]:
    """Returns the numbers of a sum of codes."""
    half = 2 ** (WIDE_BITS - 1)
    return [((x + half) % 2**WIDE_BITS - half) / 2**WIDE_POINT for x in totals]


def threshold_of(clients: int) -> int:
    """Returns t, how many clients must be there until the end: more than half, and two."""
    return clients // 2 + 1


@dataclasses.dataclass
class Member:
    """One client in one round.

    Attributes:
        label: run and round.
        seed, sealing, masking: b_u and the private keys.
        public: of the clients that sent keys, sealing and masking key behind each other.
        threshold: t.
        sealed: the shares that others have sealed for this client.
    """

    client: int
    label: str
    seed: bytes
    sealing: bytes
    masking: bytes
    threshold: int = 0
    public: Shares = dataclasses.field(default_factory=dict)
    sealed: Shares = dataclasses.field(default_factory=dict)

    @classmethod
    def new(cls, client: int, label: str) -> "Member":
        """Returns a client with a new seed and new keys."""
        return cls(client, label, *(secrets.token_bytes(KEY) for _ in range(3)))

    def keys(self) -> bytes:
        """Returns its public keys."""
        return _public(self.sealing) + _public(self.masking)

    def share(self, public: Shares, threshold: int) -> Shares:
        """Returns a sealed share of the seed and of the masking key for each other client.

        Args: public: the clients' keys, its own among them.
        Raises: Refused where a share would tell too much, or keys are not what they should be.
        """
        if public.get(self.client) != self.keys() or len(set(public.values())) < len(public):
            raise Refused("the keys of the cohort are not one pair for each client")
        if len(public) < 2 or not len(public) / 2 < threshold <= len(public):
            raise Refused(f"{threshold} of {len(public)} clients do not hide one of them")
        self.public, self.threshold = public, threshold
        at = [client + 1 for client in public]
        pairs = zip(*(split(x, threshold, at) for x in (self.seed, self.masking)), strict=True)
        shares = {client: b"".join(both) for client, both in zip(public, pairs, strict=True)}
        return {client: self._seal(client).encrypt(bytes(12), share, None) if client != self.client
                else share for client, share in shares.items()}  # fmt: skip

    def mask(self, sealed: Shares, numbers: Coded) -> Coded:
        """Returns the numbers behind masks. Args: sealed: for this client, its own share among them.

        Raises: Refused for shares of too few clients.
        """
        if not self.threshold <= len(sealed) or not sealed.keys() <= self.public.keys():
            raise Refused(f"shares of {len(sealed)} clients are too few, or not of the cohort")
        if self.client not in sealed:
            raise Refused("its own share is missing")
        self.sealed = sealed
        masked = numbers.mask(_seed_key(self.seed, self.label))
        for other in sealed:
            if other != self.client:
                masked = masked.mask(self._pair(other), 1 if other > self.client else -1)
        return masked

    def reveal(self, arrived: set[int]) -> Shares:
        """Returns a share of the seed of each client that arrived, of the masking key of each other.

        Raises: Refused where too few have arrived, or this client has not; and for a share that is
            not its author's.
        """
        there = arrived <= self.sealed.keys() and self.client in arrived
        if not there or len(arrived) < self.threshold:
            raise Refused(f"{len(arrived)} clients are too few, or not those that were masked")
        return {
            client: self._open(client)[:SHARE] if client in arrived else self._open(client)[SHARE:]
            for client in self.sealed
        }

    def _open(self, author: int) -> bytes:
        if author == self.client:
            return self.sealed[author]
        try:
            return self._seal(author, inward=True).decrypt(bytes(12), self.sealed[author], None)
        except InvalidTag as error:
            raise Refused(f"the share of client {author} is not its own") from error

    def _seal(self, other: int, inward: bool = False) -> ChaCha20Poly1305:
        """The cipher of shares to another client, or from it; a key seals one message."""
        way = (other, self.client) if inward else (self.client, other)
        agreed = _agreed(self.sealing, self.public[other][:KEY])
        return ChaCha20Poly1305(derived(agreed, "seal", self.label, *way))

    def _pair(self, other: int) -> bytes:
        return _pair_key(self.masking, self.public[other][KEY:], self.label, self.client, other)

    def as_text(self) -> dict[str, Any]:
        """Returns what `from_text` reads, for JSON."""
        text = lambda x: base64.b64encode(x).decode()
        fields = {name: text(x) if isinstance(x, bytes) else x for name, x in vars(self).items()}
        for name in ("public", "sealed"):
            fields[name] = {str(client): text(x) for client, x in getattr(self, name).items()}
        return fields

    @classmethod
    def from_text(cls, fields: Mapping[str, Any]) -> "Member":
        """Reads a client that was put away between two messages."""
        read = dict(fields)
        for name in ("seed", "sealing", "masking"):
            read[name] = base64.b64decode(read[name])
        for name in ("public", "sealed"):
            read[name] = {int(client): base64.b64decode(x) for client, x in read[name].items()}
        return cls(**read)


def unmask(
    total: Coded,
    label: str,
    threshold: int,
    public: Shares,
    shared: set[int],
    arrived: set[int],
    revealed: Mapping[int, Shares],
) -> Coded:
    """Returns the sum of the clients that arrived, without masks.

    Args:
        total: Σ y_u of them.
        shared: the clients behind stage 2.
        revealed: what each of some that arrived has revealed; t of them at least.
    Raises: Refused where shares do not give a lost client's key.
    """
    helpers = sorted(revealed)[:threshold]
    secret = lambda about: join({helper + 1: revealed[helper][about] for helper in helpers})
    for client in sorted(arrived):
        total = total.mask(_seed_key(secret(client), label), -1)
    for lost in sorted(shared - arrived):
        masking = secret(lost)
        if _public(masking) != public[lost][KEY:]:
            raise Refused(f"the shares of client {lost}'s key do not give the key")
        for client in sorted(arrived):  # what the client has added for the lost one
            pair = _pair_key(masking, public[client][KEY:], label, lost, client)
            total = total.mask(pair, -1 if lost > client else 1)
    return total


def split(secret: bytes, threshold: int, at: Iterable[int]) -> list[bytes]:
    """Returns shares of a secret at places above 0, of which any `threshold` give it back.

    Source: Shamir, "How to share a secret" (CACM 1979).
    """
    random = [secrets.randbelow(FIELD) for _ in range(threshold - 1)]
    polynomial = [int.from_bytes(secret, "little"), *random]
    values = (sum(c * pow(x, i, FIELD) for i, c in enumerate(polynomial)) % FIELD for x in at)
    return [value.to_bytes(SHARE, "little") for value in values]


def join(shares: Shares) -> bytes:
    """Returns the secret of as many shares as its threshold. Args: shares: by place.

    Raises: Refused where they give no key.
    """
    secret = 0
    for place, share in shares.items():
        weight = int.from_bytes(share, "little")
        for other in shares.keys() - {place}:
            weight = weight * other * pow(other - place, -1, FIELD) % FIELD
        secret += weight
    if (secret := secret % FIELD) >= 256**KEY:
        raise Refused("the shares of a key do not fit each other")
    return secret.to_bytes(KEY, "little")


def keystream(key: bytes, size: int) -> bytes:
    """Returns that many bytes of ChaCha20's stream; a key is used once."""
    return open_stream(key).update(bytes(size))


def open_stream(key: bytes) -> CipherContext:
    """Returns ChaCha20 at the beginning of a key's stream."""
    return Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()


def derived(secret: bytes, *use: str | int) -> bytes:
    """Returns the key of a use."""
    info = "|".join(map(str, use)).encode()
    return HKDF(SHA256(), KEY, hashlib.sha256(b"spear-jax").digest(), info).derive(secret)


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _agreed(private: bytes, public: bytes) -> bytes:
    """What two agree on. Raises: Refused for a key that agrees with all."""
    try:
        other = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(private).exchange(other)
    except ValueError as error:
        raise Refused("a key is none") from error


def _seed_key(seed: bytes, label: str) -> bytes:
    return derived(seed, "seed", label)


def _pair_key(private: bytes, public: bytes, label: str, one: int, other: int) -> bytes:
    """The key of the mask between two clients, the same for both."""
    return derived(_agreed(private, public), "pair", label, *sorted((one, other)))
