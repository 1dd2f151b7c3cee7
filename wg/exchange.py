"""The key exchange of one rotation: X25519 and ML-KEM-768 side by side, secret while either of them holds.

The result is what WireGuard mixes into its handshake as a pre-shared key, so that traffic recorded today
stays closed to a quantum computer of tomorrow, although WireGuard itself exchanges keys on a curve alone.

    initiator                                     responder
    offer()   X25519 key, ML-KEM key   ->
                                            <-    accept()   X25519 key, ciphertext

    HKDF-SHA256(salt = chain of the generation before, or zeros,
                secret = ML-KEM secret | X25519 secret,
                info = label | transcript hash)   ->   pre-shared key | chain

Both secrets go in whole, the ML-KEM one first, and the transcript hash covers every byte that was exchanged
(as in X-Wing and the TLS 1.3 hybrids: a secret alone would not bind the keys it came from). The chain stands
for the old pre-shared key: drawn beside it and kept only to feed the next exchange, so whoever missed one
rotation cannot follow the next ones even if he breaks a later exchange. ML-KEM is that of the package
`cryptography`, whose wheels have it from version 48 on (OpenSSL's); its objects and `bytes` cannot be wiped,
so secrets pass through memory that lives until the allocator reuses it.
"""

from __future__ import annotations

from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wg import keys
from wg.errors import NotPossibleHere, WgError
from wg.keys import KEY_BYTES, ChainKey, PresharedKey, PrivateKey

CURVE_BYTES = 32
KEM_KEY_BYTES = 1184
KEM_CIPHERTEXT_BYTES = 1088
OFFER_BYTES = CURVE_BYTES + KEM_KEY_BYTES
REPLY_BYTES = CURVE_BYTES + KEM_CIPHERTEXT_BYTES
_LABEL = b"wg rotation 1: pre-shared key and chain\0"


class ExchangeError(WgError):
    """What the other end sent is no key or no ciphertext."""


class Shared(Protocol):
    """The joint secret before derivation."""

    def wipe(self) -> None: ...


class Offer(Protocol):
    """The initiator's half: what it sends, and what it makes of the answer."""

    public: bytes

    def finish(self, reply: bytes) -> Shared: ...


class Exchange(Protocol):
    """What a rotation needs of cryptography, signatures aside."""

    def key(self) -> PrivateKey:
        """A fresh static key for the next generation."""
        ...

    def offer(self) -> Offer: ...

    def accept(self, public: bytes) -> tuple[bytes, Shared]:
        """The answer to an offer, and the joint secret. Raises `ExchangeError`."""
        ...

    def derive(
        self, shared: Shared, chain: ChainKey | None, transcript: bytes
    ) -> tuple[PresharedKey, ChainKey]:
        """Both ends get the same two keys if secret, chain and transcript are the same, else unrelated ones.
        Wipes `shared`."""
        ...


class _Joint:
    __slots__ = ("secret",)

    def __init__(self, kem: bytes, curve: bytes) -> None:
        self.secret = bytearray(kem + curve)

    def wipe(self) -> None:
        self.secret[:] = bytes(len(self.secret))


class _HybridOffer:
    __slots__ = ("_curve", "_kem", "public")

    def __init__(self) -> None:
        self._curve = X25519PrivateKey.generate()
        try:
            self._kem = MLKEM768PrivateKey.generate()
        except UnsupportedAlgorithm:
            raise NotPossibleHere(
                "rotation needs ML-KEM-768, which this build of the Python package cryptography lacks; "
                "install its wheel of version 48 or later"
            ) from None
        self.public: bytes = (
            self._curve.public_key().public_bytes_raw() + self._kem.public_key().public_bytes_raw()
        )

    def finish(self, reply: bytes) -> _Joint:
        _size(reply, REPLY_BYTES)
        try:
            curve = self._curve.exchange(X25519PublicKey.from_public_bytes(reply[:CURVE_BYTES]))
            return _Joint(self._kem.decapsulate(reply[CURVE_BYTES:]), curve)
        except ValueError:
            raise ExchangeError("the answer holds a point of small order, or no ciphertext") from None


class HybridExchange:
    """X25519 and ML-KEM-768 (FIPS 203)."""

    def key(self) -> PrivateKey:
        return keys.generate()

    def offer(self) -> Offer:
        return _HybridOffer()

    def accept(self, public: bytes) -> tuple[bytes, Shared]:
        _size(public, OFFER_BYTES)
        ours = X25519PrivateKey.generate()
        try:
            curve = ours.exchange(X25519PublicKey.from_public_bytes(public[:CURVE_BYTES]))
            kem, ciphertext = MLKEM768PublicKey.from_public_bytes(public[CURVE_BYTES:]).encapsulate()
        except ValueError:
            raise ExchangeError("the offer holds a point of small order, or no ML-KEM key") from None
        return ours.public_key().public_bytes_raw() + ciphertext, _Joint(kem, curve)

    def derive(
        self, shared: Shared, chain: ChainKey | None, transcript: bytes
    ) -> tuple[PresharedKey, ChainKey]:
        assert isinstance(shared, _Joint)
        salt = bytearray(KEY_BYTES)
        if chain is not None:
            chain.copy_into(salt)
        drawn = bytearray(
            HKDF(SHA256(), 2 * KEY_BYTES, bytes(salt), _LABEL + transcript).derive(shared.secret)
        )
        try:
            return PresharedKey(drawn[:KEY_BYTES]), ChainKey(drawn[KEY_BYTES:])
        finally:
            for spent in (salt, drawn):
                spent[:] = bytes(len(spent))
            shared.wipe()


def _size(data: bytes, wanted: int) -> None:
    if len(data) != wanted:
        raise ExchangeError(f"{len(data)} bytes where {wanted} are due")
