"""A Secret must not leak by any of Python's usual accidents, and must be zero afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from mimir.errors import LocalError
from mimir.secret import CoinSeed, IdentityKey, PairwiseKey, Secret

ACCIDENTS: dict[str, Callable[[Secret], object]] = {
    "truth": bool,
    "equal": lambda s: s == s,
    "unequal": lambda s: s != b"x",
    "hash": hash,
    "iterate": list,
    "contain": lambda s: 1 in s,  # type: ignore[operator]
    "index": lambda s: s[0],
    "length": len,  # type: ignore[dict-item]
    "format": lambda s: f"{s}",
    "bytes": bytes,  # type: ignore[dict-item]
    "array": lambda s: np.asarray(s),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "pickle 5": lambda s: pickle.dumps(s, protocol=5),
    "reduce": lambda s: s.__reduce_ex__(2),
    "dict key": lambda s: {s: 1},
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_accidents_raise_and_do_not_show_the_value(accident: str) -> None:
    secret = PairwiseKey(bytearray(b"\x5a" * 32))
    with pytest.raises(LocalError) as caught:
        ACCIDENTS[accident](secret)
    assert "Z" * 4 not in str(caught.value) and "5a5a" not in str(caught.value)


def test_text_shows_type_and_size_only() -> None:
    secret = CoinSeed(b"\x5a" * 48)
    for text in (repr(secret), str(secret), "%s" % secret):  # noqa: UP031 - the old way must be safe too
        assert text == "<CoinSeed: 48 bytes>"


def test_the_memory_is_taken_over_and_wiped() -> None:
    memory = bytearray(b"\x5a" * 32)
    with Secret(memory) as secret, secret.reveal_to_kernel() as view:
        assert bytes(view) == b"\x5a" * 32 and view.readonly
    assert memory == bytearray(32)
    assert secret.size == 0 and repr(secret) == "<Secret: wiped>"
    with pytest.raises(LocalError, match="wiped"), secret.reveal_to_kernel():
        pass


def test_a_view_dies_with_its_block_and_wiping_reaches_a_lent_view() -> None:
    secret = Secret(bytearray(b"\x5a" * 8))
    with secret.reveal_to_kernel() as view:
        secret.wipe()
        assert bytes(view) == bytes(8)
    with pytest.raises(ValueError):
        bytes(view)


def test_it_wipes_when_forgotten() -> None:
    memory = bytearray(b"\x5a" * 8)
    secret = Secret(memory)
    del secret
    assert memory == bytearray(8)


def test_kinds_check_their_size() -> None:
    with pytest.raises(LocalError, match="32 needed"):
        IdentityKey(b"short")
    with pytest.raises(LocalError, match="empty"):
        Secret(b"")
    assert IdentityKey.random().size == 32
