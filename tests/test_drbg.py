"""HMAC_DRBG: public vectors, the limits of SP 800-90A, and the rules of a secret.

Supports the claim that public coins come from HMAC_DRBG(SHA-256) exactly as SP 800-90A Rev. 1 writes it.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mimir.errors import LocalError
from mimir.mpc import drbg
from mimir.mpc.drbg import HmacDrbg

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "vectors.json").read_text())[
    "hmac_drbg_sha256"
]["vectors"]

ENTROPY = bytes(range(32))
NONCE = bytes(range(100, 116))


def fresh() -> HmacDrbg:
    return HmacDrbg(ENTROPY, NONCE, b"test")


def _name(vector: dict[str, Any]) -> str:
    with_personalisation = "p" if vector["personalisation"] else "-"
    with_additional = "a" if vector["calls"][0]["additional"] else "-"
    return f"{vector['file']}:{with_personalisation}{with_additional}:{vector['count']}"


def _replay(vector: dict[str, Any]) -> bytes:
    size = len(vector["returned"]) // 2
    seed = (bytes.fromhex(vector[key]) for key in ("entropy", "nonce", "personalisation"))
    generator = HmacDrbg(*seed)
    if "reseed" in vector:
        generator.reseed(*(bytes.fromhex(vector["reseed"][key]) for key in ("entropy", "additional")))
    out = b""
    for call in vector["calls"]:
        additional = bytes.fromhex(call["additional"])
        if "entropy" in call:
            generator.reseed(bytes.fromhex(call["entropy"]), additional)
            out = generator.generate(size)
        else:
            out = generator.generate(size, additional)
    return out


@pytest.mark.parametrize("vector", VECTORS, ids=_name)
def test_cavp(vector: dict[str, Any]) -> None:
    """Every committed NIST vector: without reseed, with reseed, with prediction resistance."""
    assert _replay(vector).hex() == vector["returned"]


def test_vectors_cover_every_kind() -> None:
    """The selection keeps at least two vectors of each of the twelve parameter sets of the three files."""
    sets: dict[str, int] = {}
    for vector in VECTORS:
        key = _name(vector).rpartition(":")[0]
        sets[key] = sets.get(key, 0) + 1
    assert len(sets) == 12 and min(sets.values()) >= 2


@pytest.mark.parametrize("field", ["entropy", "nonce", "personalisation"])
def test_every_input_matters(field: str) -> None:
    """One flipped bit of any seed part, or of the additional input, gives another stream."""
    parts = {"entropy": ENTROPY, "nonce": NONCE, "personalisation": b"test"}
    before = HmacDrbg(**parts).generate(32)
    parts[field] = bytes([parts[field][0] ^ 1]) + parts[field][1:]
    assert HmacDrbg(**parts).generate(32) != before
    assert fresh().generate(32, b"x") != before


def test_stream_is_deterministic_and_moves_on() -> None:
    """Equal seeds give equal coins at every party; one generator never repeats itself."""
    left, right = fresh(), fresh()
    seen = [left.generate(n) for n in (1, 31, 32, 33, 1000, 1000)]
    assert seen == [right.generate(n) for n in (1, 31, 32, 33, 1000, 1000)]
    assert seen[4] != seen[5]
    assert [len(part) for part in seen] == [1, 31, 32, 33, 1000, 1000]


def test_bytes_like_inputs() -> None:
    """Seeds may come as bytearray or as a view of wider items; the caller's buffer is left alone."""
    entropy = bytearray(ENTROPY)
    wide = memoryview(NONCE).cast("Q")
    assert HmacDrbg(entropy, wide, b"test").generate(40) == fresh().generate(40)
    assert entropy == ENTROPY


@pytest.mark.parametrize(
    ("entropy", "nonce", "personalisation"),
    [
        (ENTROPY[:31], NONCE, b""),
        (ENTROPY, NONCE[:15], b""),
        (b"", NONCE, b""),
        ("e" * 32, NONCE, b""),
        (ENTROPY, NONCE, "text"),
        (ENTROPY, None, b""),
        (memoryview(bytes(64))[::2], NONCE, b""),
    ],
)
def test_bad_seed_is_refused(entropy: Any, nonce: Any, personalisation: Any) -> None:
    """Too little entropy, too short a nonce, or not bytes: our misuse, so LocalError."""
    with pytest.raises(LocalError):
        HmacDrbg(entropy, nonce, personalisation)


@pytest.mark.parametrize("n", [0, -1, drbg.REQUEST_MAX_BYTES + 1, 1.0, True, "1", None])
def test_bad_request_is_refused_and_costs_nothing(n: Any) -> None:
    """A refused request leaves the state where it was."""
    generator = fresh()
    with pytest.raises(LocalError):
        generator.generate(n)
    assert generator.generate(16) == fresh().generate(16)


def test_largest_request() -> None:
    """2^19 bits in one request are allowed."""
    assert len(fresh().generate(drbg.REQUEST_MAX_BYTES)) == 65536


def test_input_length_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Additional input, personalisation and reseed entropy above the limit of table 2 are refused."""
    assert drbg.INPUT_MAX_BYTES * 8 == 1 << 35
    monkeypatch.setattr(drbg, "INPUT_MAX_BYTES", 64)
    generator = fresh()
    for call in (
        lambda: generator.generate(1, bytes(65)),
        lambda: generator.reseed(bytes(65)),
        lambda: generator.reseed(ENTROPY, bytes(65)),
        lambda: HmacDrbg(ENTROPY, NONCE, bytes(65)),
    ):
        with pytest.raises(LocalError, match="65 bytes"):
            call()
    generator.generate(1, bytes(64))


def test_reseed_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """After RESEED_INTERVAL requests a reseed is demanded, and a reseed restarts the count."""
    assert drbg.RESEED_INTERVAL == 1 << 48
    monkeypatch.setattr(drbg, "RESEED_INTERVAL", 3)
    generator = fresh()
    for _ in range(2):
        for _ in range(3):
            generator.generate(8)
        with pytest.raises(LocalError, match="reseed"):
            generator.generate(8)
        generator.reseed(ENTROPY)


def test_weak_reseed_is_refused() -> None:
    """A reseed below 256 bits of entropy input is refused and changes nothing."""
    generator = fresh()
    with pytest.raises(LocalError):
        generator.reseed(bytes(31))
    assert generator.generate(16) == fresh().generate(16)


def test_wipe() -> None:
    """`wipe` zeroes the very arrays that held the state; nothing works afterwards but another wipe."""
    generator = fresh()
    key, value = generator._key, generator._value
    assert any(key) and any(value)
    generator.wipe()
    generator.wipe()
    assert not any(key) and not any(value)
    assert generator._key is key and generator._value is value
    for call in (lambda: generator.generate(1), lambda: generator.reseed(ENTROPY)):
        with pytest.raises(LocalError, match="wipe"):
            call()


def test_state_stays_inside() -> None:
    """No repr of state, no comparison, no hash, no copy, no pickle: a copied generator repeats its coins."""
    generator = fresh()
    assert repr(generator) == str(generator) == f"{generator}" == "<HmacDrbg>"
    with pytest.raises(LocalError):
        _ = generator == fresh()
    with pytest.raises(LocalError):
        _ = generator != fresh()
    with pytest.raises(TypeError):
        hash(generator)
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(LocalError):
            copier(generator)
    assert not hasattr(generator, "__dict__")


def test_errors_do_not_quote_input() -> None:
    """An error about a seed names its length and type, never its content."""
    with pytest.raises(LocalError) as caught:
        HmacDrbg(b"\xab" * 31, NONCE, b"")
    assert "ab" not in str(caught.value).replace("HmacDrbg", "") and "31 bytes" in str(caught.value)
