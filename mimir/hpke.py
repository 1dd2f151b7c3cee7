"""Sealing to a key of another node: HPKE (RFC 9180) over X25519 and ML-KEM-768 side by side (X-Wing).

The key is made in the process that uses it and dies with it; evidence names its hash, so what is sealed to it
can be opened by attested code alone. One shot, no sender authentication: `info` must bind whatever the
meaning depends on, such as the transcript of the exchange that it belongs to.

The private halves are objects of `cryptography` and cannot be wiped; they are let go on `wipe`.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from mimir.errors import EnvironmentMissing, LocalError, MimirError

KEM_BYTES, CURVE_BYTES = 1184, 32
PUBLIC_BYTES = KEM_BYTES + CURVE_BYTES
OVERHEAD = 1088 + 32 + 16  # ciphertext of the key, fresh curve key, tag
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


class SealedToAnother(MimirError):
    """What was to be opened is damaged, for another key, or bound to something else."""

    exit_code = 6


class HpkeKey:
    """A private key; `public` is its public half, `digest` the SHA-256 of that, as claims name it."""

    __slots__ = ("_private", "digest", "public")

    def __init__(self) -> None:
        try:
            kem, curve = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        except UnsupportedAlgorithm:
            raise EnvironmentMissing(
                "ML-KEM-768 is not in this build of the Python package cryptography; install its wheel of "
                "version 50 or later"
            ) from None
        self._private: hpke.MLKEM768X25519PrivateKey | None = hpke.MLKEM768X25519PrivateKey(kem, curve)
        self.public: bytes = kem.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
        self.digest = digest(self.public)

    def open(self, sealed: bytes, info: bytes) -> bytearray:
        """The inverse of `seal` for this key and the same `info`; raises `SealedToAnother`."""
        if self._private is None:
            raise LocalError("HpkeKey: already wiped")
        try:
            return bytearray(_SUITE.decrypt(sealed, self._private, info))
        except (InvalidTag, ValueError):
            raise SealedToAnother("damaged, sealed to another key, or bound to something else") from None

    def wipe(self) -> None:
        """Let the private half go."""
        self._private = None

    def __repr__(self) -> str:
        return f"<HpkeKey {self.digest.hex()[:16]}>"


def digest(public: bytes) -> bytes:
    """The hash by which claims name a public key."""
    return hashlib.sha256(public).digest()


def seal(public: bytes, secret: bytes | bytearray | memoryview, info: bytes) -> bytes:
    """`secret` for the holder of `public` alone, OVERHEAD bytes longer. `SealedToAnother` if it is no key."""
    if len(public) != PUBLIC_BYTES:
        raise SealedToAnother(f"a public key has {PUBLIC_BYTES} bytes, not {len(public)}")
    try:
        kem = MLKEM768PublicKey.from_public_bytes(public[:KEM_BYTES])
        key = hpke.MLKEM768X25519PublicKey(kem, X25519PublicKey.from_public_bytes(public[KEM_BYTES:]))
        return _SUITE.encrypt(secret, key, info)
    except ValueError:
        raise SealedToAnother("that is no public key") from None
