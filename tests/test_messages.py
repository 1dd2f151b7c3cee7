"""Whatever bytes arrive, a decoder answers with a message of exactly one known form or a `MessageError`."""

from __future__ import annotations

import copy
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir.errors import BadInput
from mimir.net.messages import (
    FROM_CLIENT,
    FROM_PARTY,
    MAX_CHUNK,
    MAX_MESSAGE,
    MAX_SLOTS,
    Message,
    MessageError,
    Open,
    Sampler,
    check,
    pack,
    unpack,
)

KEY = "ab" * 32
TERMS = Open(bytes(range(16)), "cd" * 32, (KEY, "ef" * 32), (8, 16), 4, Sampler("sample", 0.5, 7), True)
CLIENT: list[Message] = [
    {"t": "hello"},
    {"t": "status"},
    TERMS.message(),
    {"t": "turn", "turn": 1, "buckets": [8], "max_new": 4},
    {"t": "offsets", "turn": 0, "names": {"token": bytes(64)}},
    {"t": "close"},
    {"t": "put_model", "manifest": {"anything": [1]}, "seeds": [bytes(32), bytes(32)]},
    {"t": "chunk", "tensor": "0.o", "offset": 0, "data": b"x"},
    {"t": "commit"},
    {"t": "attest", "nonce": bytes(32)},
    {"t": "revocations"},
    {"t": "revoke", "statement": b"x"},
]
PEER: Message = {
    "party": 1,
    "state": "refused",
    "entry": None,
    "kind": "snp",
    "simulated": False,
    "valid_until": "2026-11-26T12:00:00Z",
    "evidence": KEY,
    "tunnel_key": None,
    "attempts": 3,
    "refusal": {"step": "snp.chain", "expected": "a", "got": "b", "by": "us"},
    "seconds": 1.5,
}
ADMISSION: Message = {
    "mode": "required",
    "policy": {"name": "mesh", "version": 1, "digest": KEY},
    "kind": "snp",
    "simulated": False,
    "peers": [PEER],
    "revocation_epoch": 0,
}
EVIDENCE: Message = {
    "t": "evidence",
    "envelope": b"x",
    "tunnel": bytes(32),
    "kem": bytes(1216),
    "config": KEY,
    "terms": {"topk": 40, "buckets": [1, 2]},
    "admission": ADMISSION,
    "shown": [{"party": 2, "evidence": [KEY]}],
    "certificates": [{"issuer": 1, "certificate": b"x"}],
    "rotations": [{"party": 1, "epoch": 3, "age": 0.5}, {"party": 2, "epoch": None, "age": None}],
}
PARTY: list[Message] = [
    {"t": "status", "status": {}},
    {"t": "opened"},
    {"t": "masks", "turn": 0, "bits": {"token": 9}, "names": {"token": bytes(128)}},
    {"t": "progress", "phase": "decode", "done": 1, "total": 2, "rounds": 3, "sent": 4, "seconds": 0.5},
    {"t": "token", "step": 0, "components": [0, 2**24 - 1]},
    {"t": "done", "stats": {}},
    {"t": "error", "code": "aborted", "message": "x"},
    {"t": "have", "tensors": {"0.o": 8}, "complete": False},
    {"t": "committed", "model": "cd" * 32},
    EVIDENCE,
    {"t": "revoked", "epoch": 3, "statement": b""},
]
ALL = [(message, FROM_CLIENT) for message in CLIENT] + [(message, FROM_PARTY) for message in PARTY]

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=8,
)


def test_every_message_is_listed_here_and_survives_the_way() -> None:
    assert {message["t"] for message in CLIENT} == set(FROM_CLIENT)
    assert {message["t"] for message in PARTY} == set(FROM_PARTY)
    for message, rules in ALL:
        assert unpack(pack(message, rules), rules) == message


def test_what_one_side_says_the_other_may_not() -> None:
    for message, rules in ALL:
        other = FROM_PARTY if rules is FROM_CLIENT else FROM_CLIENT
        if message["t"] != "status":
            with pytest.raises(MessageError, match="unknown type"):
                unpack(msgpack.packb(message), other)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(raw: bytes) -> None:
    for rules in (FROM_CLIENT, FROM_PARTY):
        with pytest.raises(MessageError):
            unpack(raw, rules)


@given(plain)
def test_random_values_are_refused(value: Any) -> None:
    if isinstance(value, dict) and value.get("t") in FROM_CLIENT:
        return
    with pytest.raises(MessageError):
        check(value, FROM_CLIENT)


@settings(max_examples=300)
@given(st.integers(0, len(ALL) - 1), st.integers(0, 10**6), plain)
def test_one_field_replaced_is_accepted_only_if_it_still_fits(index: int, which: int, value: Any) -> None:
    """Never another exception, and never a value of another type than the original."""
    message, rules = copy.deepcopy(ALL[index])
    name = list(message)[which % len(message)]
    before = message[name]
    message[name] = value
    try:
        check(message, rules)
    except MessageError:
        return
    assert type(value) is type(before) or {type(value), type(before)} == {int, float}
    assert unpack(pack(message, rules), rules) == message


@given(st.integers(0, len(ALL) - 1), st.data())
def test_altered_bytes_give_a_message_or_an_error(index: int, data: Any) -> None:
    message, rules = ALL[index]
    raw = bytearray(pack(message, rules))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] = data.draw(st.integers(0, 255))
    for tail in (b"", b"\x00"):
        try:
            check(unpack(bytes(raw) + tail, rules), rules)
        except MessageError:
            pass
        else:
            assert not tail


def test_missing_and_additional_fields_are_refused() -> None:
    for message, rules in ALL:
        with pytest.raises(MessageError):
            check(message | {"more": 1}, rules)
        for name in message:
            with pytest.raises(MessageError):
                check({key: value for key, value in message.items() if key != name}, rules)


def test_bombs_are_refused_before_they_grow() -> None:
    deep = b"\x91" * 100_000
    wide_array, wide_map = b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"
    long_text, long_bytes = b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"
    for raw in (
        deep,
        wide_array,
        wide_map,
        long_text,
        long_bytes,
        b"\xc1",
        b"\xd4\x01\x00",
        bytes(MAX_MESSAGE + 1),
    ):
        with pytest.raises(MessageError):
            unpack(raw, FROM_CLIENT)


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (CLIENT[2], "session", bytes(15)),
        (CLIENT[2], "clients", []),
        (CLIENT[2], "clients", [KEY] * 9),
        (CLIENT[2], "clients", [KEY.upper()]),
        (CLIENT[2], "max_new", 0),
        (CLIENT[2], "max_new", True),
        (CLIENT[2], "buckets", [MAX_SLOTS + 1]),
        (CLIENT[2], "deterministic_seed", 1),
        (CLIENT[2], "sampler", {"kind": "sample", "temperature": float("nan"), "topk": 1}),
        (CLIENT[2], "sampler", {"kind": "sample", "temperature": 0.0, "topk": 1}),
        (CLIENT[2], "sampler", {"kind": "beam", "temperature": 1.0, "topk": 1}),
        (CLIENT[4], "names", {"token": bytes(63)}),
        (CLIENT[4], "names", {"token": bytes(8 * MAX_SLOTS + 8)}),
        (CLIENT[4], "names", {str(i): b"" for i in range(17)}),
        (CLIENT[6], "manifest", {"a": {1: 2}}),
        (CLIENT[7], "data", b""),
        (CLIENT[7], "data", bytes(MAX_CHUNK + 1)),
        (CLIENT[6], "seeds", [bytes(32)]),
        (CLIENT[6], "seeds", [bytes(32), bytes(31)]),
        (CLIENT[7], "offset", -1),
        (PARTY[2], "names", {"token": bytes(8)}),
        (PARTY[2], "bits", {"token": 65}),
        (PARTY[2], "bits", {"token": 0}),
        (PARTY[4], "components", [0]),
        (PARTY[4], "components", [0, -1]),
        (PARTY[4], "components", [0, 2**24]),
        (PARTY[3], "seconds", float("inf")),
        (PARTY[3], "phase", "thinking"),
        (PARTY[6], "message", "x" * 501),
        (CLIENT[9], "nonce", bytes(31)),
        (CLIENT[9], "nonce", "0" * 32),
        (EVIDENCE, "envelope", b""),
        (EVIDENCE, "envelope", bytes((256 << 10) + 1)),
        (EVIDENCE, "tunnel", bytes(31)),
        (EVIDENCE, "kem", bytes(1215)),
        (EVIDENCE, "config", "ab"),
        (EVIDENCE, "terms", {"a": {1: 2}}),
        (EVIDENCE, "admission", ADMISSION | {"mode": "maybe"}),
        (EVIDENCE, "admission", ADMISSION | {"more": 1}),
        (EVIDENCE, "admission", ADMISSION | {"peers": [PEER] * 3}),
        (EVIDENCE, "admission", ADMISSION | {"peers": [PEER | {"party": 3}]}),
        (EVIDENCE, "admission", ADMISSION | {"peers": [PEER | {"evidence": "no digest"}]}),
        (EVIDENCE, "admission", ADMISSION | {"peers": [PEER | {"refusal": {"step": "x"}}]}),
        (EVIDENCE, "admission", ADMISSION | {"policy": {"name": "x", "version": -1, "digest": KEY}}),
        (EVIDENCE, "shown", [{"party": 1, "evidence": [KEY] * 5}]),
        (EVIDENCE, "shown", [{"party": 1, "evidence": []}] * 3),
        (EVIDENCE, "certificates", [{"issuer": 0, "certificate": bytes(8193)}]),
        (EVIDENCE, "certificates", [{"issuer": True, "certificate": b"x"}]),
        (EVIDENCE, "rotations", [{"party": 1, "epoch": -1, "age": 0.0}]),
        (EVIDENCE, "rotations", [{"party": 1, "epoch": 1, "age": float("nan")}]),
    ],
)
def test_values_at_the_bounds(message: Message, field: str, value: Any) -> None:
    rules = FROM_CLIENT if message in CLIENT else FROM_PARTY
    with pytest.raises(MessageError, match=f"field {field}"):
        check(message | {field: value}, rules)


def test_terms_come_back_as_they_were_and_contradictions_are_refused() -> None:
    message = unpack(pack(TERMS.message(), FROM_CLIENT), FROM_CLIENT)
    assert Open.from_message(message) == TERMS
    with pytest.raises(BadInput, match="named twice"):
        Open.from_message(message | {"clients": [KEY, KEY]})
    with pytest.raises(BadInput, match="prompt buckets for 1"):
        Open.from_message(message | {"buckets": [8]})


def test_the_digest_of_terms_covers_each_of_them() -> None:
    seen = {TERMS.digest()}
    message = TERMS.message()
    for name, value in {
        "session": bytes(16),
        "model": "00" * 32,
        "clients": ["ef" * 32, KEY],
        "buckets": [16, 8],
        "max_new": 5,
        "sampler": {"kind": "greedy", "temperature": 0.5, "topk": 7},
        "deterministic_seed": False,
    }.items():
        seen.add(Open.from_message(message | {name: value}).digest())
    assert len(seen) == len(message)
