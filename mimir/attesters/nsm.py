"""Evidence of an AWS Nitro enclave: a document that the hypervisor signs, by /dev/nsm.

One ioctl carries a CBOR request there and a CBOR answer back. Source: Linux, include/uapi/linux/nsm.h, and
the request and response types of AWS's NSM API.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import trio

from mimir.attest import nitro
from mimir.attest.evidence import Claims, Envelope
from mimir.attest.trail import Trail, read_cbor
from mimir.errors import AttestationError, DeviceError, EnvironmentMissing

MAX_REQUEST, MAX_RESPONSE = 0x1000, 0x3000
SECONDS = 30.0


class _Part(ctypes.Structure):
    """struct nsm_iovec"""

    _fields_ = (("address", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Message(ctypes.Structure):
    """struct nsm_raw"""

    _fields_ = (("request", _Part), ("response", _Part))


IOCTL = 3 << 30 | ctypes.sizeof(_Message) << 16 | 0x0A << 8 | 0  # _IOWR(0x0A, 0, struct nsm_raw)


class NsmAttester:
    """Documents of the enclave that we run in. `ioctl` is the kernel's."""

    kind = "nitro"

    def __init__(self, device: Path, ioctl: Callable[[int, int, Any], Any] = fcntl.ioctl) -> None:
        self._device, self._ioctl = device, ioctl

    async def check(self) -> None:
        """Raise unless the device can be opened."""
        os.close(self._open())

    async def attest(self, claims: Claims) -> Envelope:
        """A document whose user data is the hash of the claims, with their nonce beside it. `DeviceError`
        where it cannot be had."""
        document = await self.document(claims.report_data(), claims.nonce)
        return Envelope(self.kind, document, claims.encode())

    async def document(self, user_data: bytes, nonce: bytes, public_key: bytes = b"") -> bytes:
        """A document that carries these; checked for it, not verified. `DeviceError` where it cannot be
        had."""
        request = {"user_data": user_data, "nonce": nonce, "public_key": public_key or None}
        answer = None
        with trio.move_on_after(SECONDS):
            answer = await trio.to_thread.run_sync(
                self._ask, cbor2.dumps({"Attestation": request}), abandon_on_cancel=True
            )
        if answer is None:
            raise DeviceError(f"{self._device}: no document within {SECONDS:g} s")
        trail = Trail("nitro")
        try:
            document = _document(answer, self._device, trail)
            parsed = nitro.parse(document, trail)
            trail.same("binding", user_data, parsed.user_data)
            trail.same("nonce", nonce, parsed.nonce)
            if public_key:
                trail.same("public_key", public_key, parsed.public_key)
        except AttestationError as error:
            raise DeviceError(f"{self._device}: its document is of no use: {error}") from None
        return document

    def _open(self) -> int:
        try:
            return os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentMissing(
                f"{self._device}: {error.strerror}; it exists inside Nitro enclaves alone"
            ) from None

    def _ask(self, request: bytes) -> bytes:
        """One request to the device and its answer, as bytes."""
        given = ctypes.create_string_buffer(request, len(request))
        room = ctypes.create_string_buffer(MAX_RESPONSE)
        message = _Message(
            _Part(ctypes.addressof(given), len(request)), _Part(ctypes.addressof(room), MAX_RESPONSE)
        )
        fd = self._open()
        try:
            self._ioctl(fd, IOCTL, message)
        except OSError as error:
            raise DeviceError(f"{self._device}: {error.strerror}") from None
        finally:
            os.close(fd)
        size = message.response.length
        if not 0 < size <= MAX_RESPONSE:
            raise DeviceError(f"{self._device}: an answer of {size} bytes")
        return room.raw[:size]


def _document(answer: bytes, device: Path, trail: Trail) -> bytes:
    found = read_cbor(trail, "answer", answer, "the answer")
    if isinstance(found, dict) and set(found) == {"Error"}:
        raise DeviceError(f"{device}: the request was refused: {str(found['Error'])[:60]!r}")
    inner = found.get("Attestation") if isinstance(found, dict) and len(found) == 1 else None
    document = inner.get("document") if isinstance(inner, dict) and len(inner) == 1 else None
    if not isinstance(document, bytes):
        trail.refuse("answer", "an attestation document", type(found).__name__)
    return document
