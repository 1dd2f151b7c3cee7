"""A sealed, mutually authenticated connection between a client and one party. No I/O.

The handshake is Noise IK (Noise_IK_25519_ChaChaPoly_SHA256, revision 34 of the Noise framework, section 7.5):
the client knows the party's static key beforehand, says who it is under encryption, and both mix in keys made
for this connection alone. So a relay learns neither who the client is nor a byte of what is said, and a later
theft of either static key does not open what was recorded. A replayed first message gets an answer but no
session: the replayer cannot seal anything afterwards, so act only on sealed messages.

    client:  first = Handshake.initiator(own, party_key); send(first.start())
    party:   second = Handshake.responder(own); client_key = second.accept(message); send(second.answer())
    client:  seal = first.finish(message)          party:  seal = second.seal

Every later message goes through `Seal.close` and `Seal.open`: ChaCha20-Poly1305, one key per direction, the
message's number as the nonce. A lost, repeated, reordered or altered message fails, and the seal is broken.

`Seal.channel` is the hash of the whole handshake: equal at both ends of one connection and at no other, since
both put fresh keys into it. Evidence that names it is of no use on another connection (Noise, section 11.2).

Python's cipher library hands out `bytes` for shared secrets; those cannot be wiped. Ours are.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mimir.errors import LocalError, MimirError
from mimir.secret import ExchangeKey, SealKey

NOISE_NAME = b"Noise_IK_25519_ChaChaPoly_SHA256"  # 32 bytes: used as the first hash as it is
PROLOGUE = b"mimir control 1"
KEY = 32
TAG = 16
START_BYTES = KEY + (KEY + TAG) + TAG  # e | sealed s | sealed empty payload
ANSWER_BYTES = KEY + TAG
MAX_MESSAGES = 1 << 48  # far below the 2^64 - 1 that Noise allows


class SealError(MimirError):
    """The other end does not hold the key it should, or the bytes are not what it sent."""

    exit_code = 8


def _hkdf(chain: bytes, material: bytes) -> tuple[bytes, bytes]:
    """Noise's HKDF with two outputs: HMAC-SHA256, extract and expand."""
    root = hmac.digest(chain, material, "sha256")
    first = hmac.digest(root, b"\x01", "sha256")
    return first, hmac.digest(root, first + b"\x02", "sha256")


class _Direction:
    """One key and the number of the next message under it."""

    def __init__(self, key: bytes) -> None:
        self._key = SealKey(key)
        self._count = 0

    def nonce(self) -> bytes:
        if self._count >= MAX_MESSAGES:
            raise SealError("too many messages on one connection; open a new one")
        value = bytes(4) + self._count.to_bytes(8, "little")
        self._count += 1
        return value

    def encrypt(self, plain: bytes, bound: bytes) -> bytes:
        with self._key.reveal_to_kernel() as key:
            return ChaCha20Poly1305(key).encrypt(self.nonce(), plain, bound)

    def decrypt(self, sealed: bytes, bound: bytes) -> bytes:
        with self._key.reveal_to_kernel() as key:
            return ChaCha20Poly1305(key).decrypt(self.nonce(), sealed, bound)

    def wipe(self) -> None:
        self._key.wipe()


class Seal:
    """An established connection's two directions, and `channel`, its 32 bytes of channel binding."""

    def __init__(self, sending: bytes, receiving: bytes, channel: bytes) -> None:
        self.channel = channel
        self._sending = _Direction(sending)
        self._receiving = _Direction(receiving)
        self._broken = False

    def close(self, plain: bytes) -> bytes:
        """Seal the next outgoing message."""
        if self._broken:
            raise LocalError("this seal is broken")
        return self._sending.encrypt(plain, b"")

    def open(self, sealed: bytes) -> bytes:
        """Open the next incoming message, or break the seal for good and raise `SealError`."""
        if self._broken:
            raise LocalError("this seal is broken")
        try:
            return self._receiving.decrypt(sealed, b"")
        except (InvalidTag, ValueError):
            self.wipe()
            raise SealError("a message was altered, lost or repeated on its way") from None

    def wipe(self) -> None:
        """Forget the keys."""
        self._broken = True
        self._sending.wipe()
        self._receiving.wipe()


class Handshake:
    """One run of the handshake, by either side; each method once, in the order shown above."""

    def __init__(self, own: ExchangeKey, remote: bytes | None, prologue: bytes) -> None:
        self._own = own
        self._ephemeral = ExchangeKey(bytearray(X25519PrivateKey.generate().private_bytes_raw()))
        self._remote = remote  # the other's static public key
        self._remote_ephemeral = b""
        self._chain = self._hash = NOISE_NAME
        self._direction: _Direction | None = None
        self._due = "start" if remote is not None else "accept"
        self._seal: Seal | None = None
        self.payload = b""  # what the other side put into its handshake message
        self._mix_hash(prologue)
        self._mix_hash(remote if remote is not None else _public(own))

    @classmethod
    def initiator(cls, own: ExchangeKey, party: bytes, prologue: bytes = PROLOGUE) -> Self:
        """The client's side; `party` is the X25519 public key that the party must prove to hold."""
        if len(party) != KEY:
            raise LocalError(f"a public key has {KEY} bytes")
        return cls(own, party, prologue)

    @classmethod
    def responder(cls, own: ExchangeKey, prologue: bytes = PROLOGUE) -> Self:
        """The party's side."""
        return cls(own, None, prologue)

    # -- the client

    def start(self, payload: bytes = b"") -> bytes:
        """The first message: e, es, s, ss."""
        self._turn("start", "finish")
        assert self._remote is not None
        ephemeral = _public(self._ephemeral)
        self._mix_hash(ephemeral)
        self._mix_key(self._ephemeral, self._remote)
        sealed_static = self._encrypt(_public(self._own))
        self._mix_key(self._own, self._remote)
        return ephemeral + sealed_static + self._encrypt(payload)

    def finish(self, message: bytes) -> Seal:
        """Read the party's answer: only the holder of its key can have written it."""
        self._turn("finish", "over")
        if len(message) < ANSWER_BYTES:
            raise SealError("the answer to the handshake is too short")
        self._remote_ephemeral, sealed = message[:KEY], message[KEY:]
        self._mix_hash(self._remote_ephemeral)
        self._mix_key(self._ephemeral, self._remote_ephemeral)
        self._mix_key(self._own, self._remote_ephemeral)
        self.payload = self._decrypt(sealed)
        first, second = _hkdf(self._chain, b"")
        self._forget()
        return Seal(first, second, self._hash)

    # -- the party

    def accept(self, message: bytes) -> bytes:
        """Read the first message; returns the client's X25519 public key, which it has proved to hold unless
        the message is a replay: trust it once something sealed arrives."""
        self._turn("accept", "answer")
        if len(message) < START_BYTES:
            raise SealError("the first message of the handshake is too short")
        self._remote_ephemeral = message[:KEY]
        self._mix_hash(self._remote_ephemeral)
        self._mix_key(self._own, self._remote_ephemeral)
        self._remote = self._decrypt(message[KEY : KEY + KEY + TAG])
        self._mix_key(self._own, self._remote)
        self.payload = self._decrypt(message[KEY + KEY + TAG :])
        return self._remote

    def answer(self, payload: bytes = b"") -> bytes:
        """The second message: e, ee, se. Afterwards `seal` is ready."""
        self._turn("answer", "over")
        assert self._remote is not None
        ephemeral = _public(self._ephemeral)
        self._mix_hash(ephemeral)
        self._mix_key(self._ephemeral, self._remote_ephemeral)
        self._mix_key(self._ephemeral, self._remote)
        message = ephemeral + self._encrypt(payload)
        first, second = _hkdf(self._chain, b"")
        self._forget()
        self._seal = Seal(second, first, self._hash)
        return message

    @property
    def seal(self) -> Seal:
        """The party's seal, once it has answered."""
        if self._seal is None:
            raise LocalError("the handshake has not been answered")
        return self._seal

    @property
    def transcript(self) -> bytes:
        """Hash of everything both sides said; equal at both ends of an undisturbed handshake."""
        return self._hash

    # -- Noise's symmetric state

    def _turn(self, due: str, then: str) -> None:
        if self._due != due:
            raise LocalError(f"handshake: {due} called when {self._due} was due")
        self._due = then

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix_key(self, private: ExchangeKey, public: bytes) -> None:
        try:
            with private.reveal_to_kernel() as raw:
                shared = X25519PrivateKey.from_private_bytes(raw).exchange(
                    X25519PublicKey.from_public_bytes(public)
                )
        except ValueError:  # a point of small order: the result would not depend on our key
            raise SealError("the other end sent a public key that nobody can hold") from None
        self._chain, key = _hkdf(self._chain, shared)
        if self._direction is not None:
            self._direction.wipe()
        self._direction = _Direction(key)

    def _encrypt(self, plain: bytes) -> bytes:
        assert self._direction is not None
        sealed = self._direction.encrypt(plain, self._hash)
        self._mix_hash(sealed)
        return sealed

    def _decrypt(self, sealed: bytes) -> bytes:
        assert self._direction is not None
        try:
            plain = self._direction.decrypt(sealed, self._hash)
        except (InvalidTag, ValueError):
            self._forget()
            raise SealError(
                "the handshake failed: the other end does not hold the expected key, or something in between "
                "altered it"
            ) from None
        self._mix_hash(sealed)
        return plain

    def _forget(self) -> None:
        self._due = "over"
        self._ephemeral.wipe()
        if self._direction is not None:
            self._direction.wipe()
        self._chain = b""


def _public(private: ExchangeKey) -> bytes:
    with private.reveal_to_kernel() as raw:
        return X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()
