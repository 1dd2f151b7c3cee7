"""Shamir's sharing of a storage key: t of n shares give it back, fewer say nothing (Shamir 1979).

Byte by byte over GF(2^8) with AES's polynomial. Secret bytes are only ever added, and multiplied by public
numbers (the shares' places), with masks instead of branches and without tables, on all bytes at once.

A share carries 32 bytes of blinding, and whoever split the key publishes a hash of each share with its
blinding: a share that is not the one dealt is caught, and its holder named. That is enough with a dealer who
is trusted anyway, since he knew the key; nothing here lets shareholders check the dealer.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from mimir.errors import LocalError
from mimir.secret import KEY_BYTES, Secret, StorageKey

MAX_SHARES = 32
BLINDING = 32
_POLYNOMIAL = 0x11B  # x^8 + x^4 + x^3 + x + 1

Bytes = npt.NDArray[np.uint8]


class KeyShare(Secret):
    """One share of a storage key, and its blinding."""

    SIZE = KEY_BYTES + BLINDING


def times(secret: Bytes, public: int) -> Bytes:
    """Every byte times one public element. Time depends on the public one alone."""
    out, power = np.zeros_like(secret), secret.copy()
    for bit in range(8):
        if public >> bit & 1:
            out ^= power
        power = (power << np.uint8(1)) ^ ((power >> np.uint8(7)) * np.uint8(_POLYNOMIAL & 0xFF))
    return out


def _product(a: int, b: int) -> int:
    """Of public elements: time depends on them."""
    out = 0
    while b:
        out ^= a if b & 1 else 0
        a, b = (a << 1) ^ (_POLYNOMIAL if a & 0x80 else 0), b >> 1
    return out


def _inverse(a: int) -> int:
    """Of a public element that is not 0: its 254th power."""
    out = 1
    for bit in f"{254:b}":
        out = _product(out, out)
        out = _product(out, a) if bit == "1" else out
    return out


def split(key: StorageKey, threshold: int, count: int) -> dict[int, KeyShare]:
    """Shares 1 to `count`, of which any `threshold` give the key back."""
    if not 1 <= threshold <= count <= MAX_SHARES:
        raise LocalError(f"{threshold} of {count} shares: 1 <= t <= n <= {MAX_SHARES}")
    shares = {}
    with key.reveal_to_kernel() as view:
        polynomial = np.empty((threshold, KEY_BYTES), np.uint8)  # constant term first
        polynomial[0] = np.frombuffer(view, np.uint8)
        polynomial[1:] = np.frombuffer(os.urandom((threshold - 1) * KEY_BYTES), np.uint8).reshape(
            threshold - 1, KEY_BYTES
        )
        for number in range(1, count + 1):
            value = np.zeros(KEY_BYTES, np.uint8)
            for coefficient in polynomial[::-1]:
                value = times(value, number) ^ coefficient
            shares[number] = KeyShare(bytearray(value.tobytes() + os.urandom(BLINDING)))
            value[:] = 0
        polynomial[:] = 0
    return shares


def join(shares: Mapping[int, KeyShare]) -> StorageKey:
    """The key of which these are shares, or another if they are not: compare with the check value."""
    if not 1 <= len(shares) <= MAX_SHARES or any(not 1 <= number <= 255 for number in shares):
        raise LocalError("shares have numbers from 1 on")
    value = np.zeros(KEY_BYTES, np.uint8)
    for number, share in shares.items():
        with share.reveal_to_kernel() as view:
            value ^= times(np.frombuffer(view, np.uint8)[:KEY_BYTES], _weight(number, shares))
    key = StorageKey(bytearray(value.tobytes()))
    value[:] = 0
    return key


def _weight(number: int, numbers: Collection[int]) -> int:
    """Lagrange's coefficient at 0. In this field minus is plus, and that is exclusive or."""
    weight = 1
    for other in numbers:
        if other != number:
            weight = _product(weight, _product(other, _inverse(other ^ number)))
    return weight


def commit(key_id: bytes, number: int, share: KeyShare) -> bytes:
    """What is published of a share: it binds to key and number, and hides the share."""
    with share.reveal_to_kernel() as view:
        return hashlib.sha256(b"mimir key share 1\0" + key_id + bytes((number,)) + view).digest()


def check_value(key_id: bytes, key: StorageKey) -> bytes:
    """What is published of the key."""
    with key.reveal_to_kernel() as view:
        return hmac.digest(view, b"mimir key check 1\0" + key_id, "sha256")
