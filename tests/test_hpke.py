"""Sealing to an attested key: only its holder opens it, and only for what it was bound to."""

from __future__ import annotations

import hashlib

import pytest

from mimir import hpke
from mimir.errors import LocalError

SECRET = b"thirty-two bytes of a fresh key."


def test_only_the_holder_opens_and_only_in_its_context() -> None:
    ours, other = hpke.HpkeKey(), hpke.HpkeKey()
    sealed = hpke.seal(ours.public, SECRET, b"context")
    assert len(sealed) == len(SECRET) + hpke.OVERHEAD
    assert ours.open(sealed, b"context") == SECRET
    for key, info in ((other, b"context"), (ours, b"contexu"), (ours, b"")):
        with pytest.raises(hpke.SealedToAnother):
            key.open(sealed, info)


@pytest.mark.parametrize("at", [0, 1087, 1088, 1119, 1120, -1])
def test_a_flipped_bit_anywhere_is_refused(at: int) -> None:
    key = hpke.HpkeKey()
    sealed = bytearray(hpke.seal(key.public, SECRET, b"context"))
    sealed[at] ^= 1
    with pytest.raises(hpke.SealedToAnother):
        key.open(bytes(sealed), b"context")


@pytest.mark.parametrize("size", [0, 1, hpke.OVERHEAD - 1, hpke.OVERHEAD])
def test_what_is_too_short_is_refused(size: int) -> None:
    with pytest.raises(hpke.SealedToAnother):
        hpke.HpkeKey().open(bytes(size), b"context")


def test_both_halves_of_the_key_count() -> None:
    """Whoever holds one half alone, a broken curve or a broken lattice, opens nothing."""
    ours, other = hpke.HpkeKey(), hpke.HpkeKey()
    cut = hpke.KEM_BYTES
    for mixed in (ours.public[:cut] + other.public[cut:], other.public[:cut] + ours.public[cut:]):
        sealed = hpke.seal(mixed, SECRET, b"context")
        for key in (ours, other):
            with pytest.raises(hpke.SealedToAnother):
                key.open(sealed, b"context")


def test_what_is_no_key_is_refused() -> None:
    key = hpke.HpkeKey()
    for bad in (b"", key.public[:-1], key.public + b"\0", b"\xff" * hpke.PUBLIC_BYTES):
        with pytest.raises(hpke.SealedToAnother):
            hpke.seal(bad, SECRET, b"context")


def test_the_digest_is_what_claims_name_and_a_wiped_key_opens_nothing() -> None:
    key = hpke.HpkeKey()
    assert key.digest == hashlib.sha256(key.public).digest() == hpke.digest(key.public)
    sealed = hpke.seal(key.public, SECRET, b"context")
    key.wipe()
    with pytest.raises(LocalError):
        key.open(sealed, b"context")
