"""HMAC_DRBG with SHA-256: a short seed in, reproducible uniform bytes out.

Implements SP 800-90A Rev. 1, section 10.1.2 (the mechanism) inside the envelope of section 9 (the checks),
at its full security strength of 256 bits. Public coins use it with entropy = every party's opened seed,
nonce = the transcript hash and personalisation = session and phase: same inputs, same coins, at every party.
Bulk randomness does not come from here; a generator of the kernels is keyed by a few bytes of this one.

Prediction resistance (section 9.3.1) is `reseed(fresh entropy, additional)` followed by `generate(n)`: the
additional input then goes into the reseed and nowhere else, which is what the standard prescribes.

The state lives in two byte arrays that `wipe` overwrites. The digests that CPython hands out on the way are
immutable and cannot be overwritten: they are dropped at once, and their memory is reused, not cleared.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NoReturn

from mimir.errors import LocalError

DIGEST_BYTES = hashlib.sha256().digest_size
SECURITY_BYTES = 32  # table 2: SHA-256 supports every strength up to 256 bits
ENTROPY_MIN_BYTES = SECURITY_BYTES  # table 2: min_length of the entropy input = the strength
NONCE_MIN_BYTES = SECURITY_BYTES // 2  # section 8.6.7: at least half the strength
INPUT_MAX_BYTES = (1 << 35) // 8  # table 2: entropy, personalisation and additional input, each
REQUEST_MAX_BYTES = (1 << 19) // 8  # table 2: bits per request
RESEED_INTERVAL = 1 << 48  # table 2: requests between reseeds

Bytes = bytes | bytearray | memoryview


def _input(name: str, value: Bytes, least: int = 0) -> memoryview:
    """`value` as a flat byte view, its length within [least, INPUT_MAX_BYTES]; never echoes the value."""
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise LocalError(f"HmacDrbg: {name} must be bytes, not {type(value).__name__}")
    view = memoryview(value)
    if not view.c_contiguous:
        raise LocalError(f"HmacDrbg: {name} must be contiguous")
    if not least <= view.nbytes <= INPUT_MAX_BYTES:
        raise LocalError(f"HmacDrbg: {name} of {view.nbytes} bytes; allowed: {least} to {INPUT_MAX_BYTES}")
    return view.cast("B")


class HmacDrbg:
    """One instantiation of HMAC_DRBG(SHA-256); owned by one task, never copied, compared or shown."""

    __slots__ = ("_key", "_reseed_counter", "_value", "_wiped")

    def __init__(self, entropy: Bytes, nonce: Bytes, personalisation: Bytes) -> None:
        """Instantiate (sections 9.1, 10.1.2.3) with entropy of >= 32 bytes and a nonce of >= 16."""
        parts = (
            _input("entropy", entropy, ENTROPY_MIN_BYTES),
            _input("nonce", nonce, NONCE_MIN_BYTES),
            _input("personalisation", personalisation),
        )
        self._wiped = False
        self._key = bytearray(DIGEST_BYTES)
        self._value = bytearray(b"\x01" * DIGEST_BYTES)
        self._update(*parts)
        self._reseed_counter = 1

    def reseed(self, entropy: Bytes, additional: Bytes = b"") -> None:
        """Mix in fresh entropy (>= 32 bytes) and optional additional input (sections 9.2, 10.1.2.4)."""
        self._live()
        parts = (_input("entropy", entropy, ENTROPY_MIN_BYTES), _input("additional input", additional))
        self._update(*parts)
        self._reseed_counter = 1

    def generate(self, n: int, additional: Bytes = b"") -> bytes:
        """The next `n` bytes, 1 to 65536 (sections 9.3, 10.1.2.5); every call moves the state on.

        Raises LocalError, with the state untouched, when the request is out of bounds or a reseed is due.
        """
        self._live()
        if isinstance(n, bool) or not isinstance(n, int):
            raise LocalError(f"HmacDrbg: the number of bytes must be an int, not {type(n).__name__}")
        if not 1 <= n <= REQUEST_MAX_BYTES:
            raise LocalError(f"HmacDrbg: asked for {n} bytes; a request takes 1 to {REQUEST_MAX_BYTES}")
        extra = _input("additional input", additional)
        if self._reseed_counter > RESEED_INTERVAL:
            raise LocalError(f"HmacDrbg: {RESEED_INTERVAL} requests since the last seed; reseed first")
        if extra.nbytes:
            self._update(extra)
        out = bytearray()
        while len(out) < n:
            self._value[:] = self._mac(self._value)
            out += self._value
        self._update(extra)
        self._reseed_counter += 1
        result = bytes(memoryview(out)[:n])
        out[:] = bytes(len(out))
        return result

    def wipe(self) -> None:
        """Overwrite the state; any later call but `wipe` raises LocalError."""
        self._wiped = True
        self._key[:] = bytes(DIGEST_BYTES)  # same length, so the array is overwritten where it lies
        self._value[:] = bytes(DIGEST_BYTES)
        self._reseed_counter = 0

    def _update(self, *parts: memoryview) -> None:
        """HMAC_DRBG_Update (section 10.1.2.2) with the concatenation of `parts` as provided data."""
        provided = any(part.nbytes for part in parts)
        for separator in (b"\x00", b"\x01") if provided else (b"\x00",):
            self._key[:] = self._mac(self._value, separator, *parts)
            self._value[:] = self._mac(self._value)

    def _mac(self, *parts: Bytes) -> bytes:
        """HMAC-SHA-256 under the present key of the concatenation of `parts`."""
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in parts:
            mac.update(part)
        return mac.digest()

    def _live(self) -> None:
        if self._wiped:
            raise LocalError("HmacDrbg: used after wipe")

    def __repr__(self) -> str:
        return "<HmacDrbg>"

    def __eq__(self, other: object) -> NoReturn:
        raise LocalError("HmacDrbg: generators cannot be compared")

    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuses pickling and, with it, both kinds of copying: a copied generator repeats its coins."""
        raise LocalError("HmacDrbg: generators cannot be copied or pickled")
