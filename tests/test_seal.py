"""The sealed channel is Noise IK, and refuses every altered, lost, repeated or foreign message."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mimir.errors import LocalError
from mimir.net.seal import ANSWER_BYTES, START_BYTES, Handshake, Seal, SealError
from mimir.secret import ExchangeKey

# Public test vector of the cacophony project for Noise_IK_25519_ChaChaPoly_SHA256.
PROLOGUE = b"John Galt"
INIT_STATIC = "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1"
INIT_EPHEMERAL = "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a"
RESP_STATIC = "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893"
RESP_EPHEMERAL = "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b"
TRANSCRIPT = "0b0f68fb0c27e03ce9b97565995ed4838cc0581b762ef72b062f6a546419fad7"
MESSAGES = [
    (
        "4c756477696720766f6e204d69736573",
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944718da798efbcd91528520204f904b9bd"
        "6c7413dccdc214d951e15253e39987f18146e8cd0873654207148333479d4d16c289f0294b29960a72f48e0b7bba2e89"
        "083169825e59642148d492020664ccf7",
    ),
    (
        "4d757272617920526f746862617264",
        "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f1448088435361e70b2ed446e6c9ec387d1d6b3b84"
        "0f194e373979d241b203c4acafccf5",
    ),
    ("462e20412e20486179656b", "050e9f3c8fac16b68dbce8f8c4bfbf6617c897f9ada4aa29aa19c8"),
    ("4361726c204d656e676572", "344233a6cabb7141d80f3da2fedc311d9646bbb0f505afe403a667"),
    (
        "4a65616e2d426170746973746520536179",
        "62cdeeb172ad7ade7aa7d9e069da5790f12331bfa00177787a1d0810c67dc3b2b4",
    ),
    (
        "457567656e2042f6686d20766f6e2042617765726b",
        "029bead1b40992327044d409d9a1f3ad8f36c3c452775d557e18bbeb2e8dfcead32d514024",
    ),
]


def key(hexadecimal: str) -> ExchangeKey:
    return ExchangeKey(bytearray.fromhex(hexadecimal))


def public(private: str) -> bytes:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(private)).public_key().public_bytes_raw()


def established() -> tuple[Seal, Seal]:
    client = Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC))
    party = Handshake.responder(key(RESP_STATIC))
    assert party.accept(client.start()) == public(INIT_STATIC)
    client_seal = client.finish(party.answer())
    assert client.transcript == party.transcript
    return client_seal, party.seal


def test_public_vector() -> None:
    client = Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC), PROLOGUE)
    party = Handshake.responder(key(RESP_STATIC), PROLOGUE)
    client._ephemeral, party._ephemeral = key(INIT_EPHEMERAL), key(RESP_EPHEMERAL)
    first = client.start(bytes.fromhex(MESSAGES[0][0]))
    assert first.hex() == MESSAGES[0][1]
    party.accept(first)
    assert party.payload.hex() == MESSAGES[0][0]
    second = party.answer(bytes.fromhex(MESSAGES[1][0]))
    assert second.hex() == MESSAGES[1][1]
    ends = [client.finish(second), party.seal]
    assert client.payload.hex() == MESSAGES[1][0]
    assert client.transcript.hex() == party.transcript.hex() == TRANSCRIPT
    assert ends[0].channel.hex() == ends[1].channel.hex() == TRANSCRIPT
    for index, (plain, sealed) in enumerate(MESSAGES[2:]):
        assert ends[index % 2].close(bytes.fromhex(plain)).hex() == sealed
        assert ends[1 - index % 2].open(bytes.fromhex(sealed)).hex() == plain


def test_sizes_are_as_declared() -> None:
    client = Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC))
    party = Handshake.responder(key(RESP_STATIC))
    first = client.start()
    party.accept(first)
    assert len(first) == START_BYTES and len(party.answer()) == ANSWER_BYTES


def test_two_connections_share_no_key_stream() -> None:
    first, second = established()[0].close(bytes(64)), established()[0].close(bytes(64))
    assert first != second


def test_the_channel_is_known_at_its_two_ends_and_is_never_another() -> None:
    """A party that serves as client at another sees two values, so it cannot pass evidence on."""
    pairs = [established() for _ in range(3)]
    assert all(client.channel == party.channel for client, party in pairs)
    assert len({client.channel for client, _ in pairs}) == 3


def test_a_party_with_another_key_is_refused() -> None:
    client = Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC))
    party = Handshake.responder(key(RESP_EPHEMERAL))
    with pytest.raises(SealError, match="does not hold the expected key"):
        party.accept(client.start())


def test_a_man_in_the_middle_cannot_answer_for_the_party() -> None:
    client = Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC))
    real, forger = Handshake.responder(key(RESP_STATIC)), Handshake.responder(key(RESP_STATIC))
    first = client.start()
    real.accept(first)
    forger.accept(Handshake.initiator(key(RESP_EPHEMERAL), public(RESP_STATIC)).start())
    with pytest.raises(SealError):
        client.finish(forger.answer())


@given(st.integers(0, START_BYTES - 1), st.integers(1, 255))
def test_every_byte_of_the_first_message_counts(position: int, flip: int) -> None:
    message = bytearray(Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC)).start())
    message[position] ^= flip
    party = Handshake.responder(key(RESP_STATIC))
    with pytest.raises(SealError):
        party.accept(bytes(message))


def test_the_bit_that_x25519_ignores_is_in_the_transcript() -> None:
    message = bytearray(Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC)).start())
    message[31] ^= 0x80
    with pytest.raises(SealError):
        Handshake.responder(key(RESP_STATIC)).accept(bytes(message))


@given(st.binary(max_size=START_BYTES + 8))
def test_garbage_never_passes(garbage: bytes) -> None:
    with pytest.raises(SealError):
        Handshake.responder(key(RESP_STATIC)).accept(garbage)
    client = Handshake.initiator(key(INIT_STATIC), public(RESP_STATIC))
    client.start()
    with pytest.raises(SealError):
        client.finish(garbage)


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_points_of_small_order_are_refused(point: bytes) -> None:
    with pytest.raises(SealError):
        Handshake.responder(key(RESP_STATIC)).accept(point + bytes(START_BYTES - 32))
    with pytest.raises(SealError):
        Handshake.initiator(key(INIT_STATIC), point).start()


def test_altered_lost_repeated_and_reflected_messages_break_the_seal() -> None:
    def faults(sealed: list[bytes], reflected: bytes) -> dict[str, list[bytes]]:
        altered = bytearray(sealed[0])
        altered[3] ^= 1
        return {
            "altered": [bytes(altered)],
            "truncated": [sealed[0][:-1]],
            "empty": [b""],
            "lost": [sealed[1]],
            "repeated": [sealed[0], sealed[0]],
            "reflected": [reflected],
        }

    for name in faults([b"1234", b""], b""):
        client, party = established()
        messages = [client.close(b"one"), client.close(b"two")]
        for index, message in enumerate(case := faults(messages, party.close(b"own"))[name]):
            if index < len(case) - 1:
                assert party.open(message) == b"one"
            else:
                with pytest.raises(SealError):
                    party.open(message)
        with pytest.raises(LocalError, match="broken"):
            party.open(messages[0])


def test_steps_out_of_order_are_our_bug() -> None:
    party = Handshake.responder(key(RESP_STATIC))
    with pytest.raises(LocalError):
        party.answer()
    with pytest.raises(LocalError):
        _ = party.seal
