"""Keys of the tunnel: X25519 private keys, in owner-only files or in memory alone, and pre-shared keys.

The file format is that of `wg genkey`: one line of base64. A key owns its bytes and can be wiped; Python may
still hold copies that the cryptography library or the netlink library made on the way, so wiping shortens the
life of a key in memory and does not promise its absence.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wg.errors import KeyFileError

KEY_BYTES = 32
#: A key file holds 44 characters and a newline; anything much longer is not a key file.
KEY_FILE_LIMIT = 128


@dataclass(frozen=True, order=True)
class PublicKey:
    """The 32 bytes by which a peer is known."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise KeyFileError(f"a public key has {KEY_BYTES} bytes, not {len(self.raw)}")

    @classmethod
    def from_base64(cls, text: str) -> PublicKey:
        return cls(_decode_base64(text.strip().encode("ascii", "replace"), "public key"))

    @classmethod
    def from_hex(cls, text: str) -> PublicKey:
        try:
            return cls(bytes.fromhex(text))
        except ValueError:
            raise KeyFileError("a public key in hexadecimal has 64 digits 0-9 and a-f") from None

    @classmethod
    def from_text(cls, text: str) -> PublicKey:
        """From either spelling: 64 hexadecimal digits or 44 characters of base64."""
        return cls.from_hex(text) if len(text.strip()) == 2 * KEY_BYTES else cls.from_base64(text)

    def base64(self) -> str:
        return base64.b64encode(self.raw).decode()

    def hex(self) -> str:
        return self.raw.hex()

    def __str__(self) -> str:
        return self.base64()[:8] + "…"


class _KeyMaterial:
    """32 secret bytes. Never prints, compares, copies or pickles them; `wipe()` zeroes them."""

    __slots__ = ("_bytes",)

    def __init__(self, raw: bytes | bytearray) -> None:
        if len(raw) != KEY_BYTES:
            raise KeyFileError(f"a {self._what()} has {KEY_BYTES} bytes, not {len(raw)}")
        self._bytes = bytearray(raw)

    @classmethod
    def _what(cls) -> str:
        return "key"

    def hex(self) -> bytearray:
        """The key as lowercase hexadecimal, in a buffer that the caller wipes."""
        self._alive()
        return bytearray(binascii.hexlify(self._bytes))

    def base64(self) -> bytearray:
        """The key as base64, in a buffer that the caller wipes."""
        self._alive()
        return bytearray(base64.b64encode(self._bytes))

    def wipe(self) -> None:
        """Zero the bytes; any later use raises. Wiping twice is allowed."""
        self._bytes[:] = bytes(len(self._bytes))
        self._bytes = bytearray()

    def same(self, other: _KeyMaterial) -> bool:
        """Whether both hold the same bytes; the time it takes does not tell where they differ."""
        self._alive()
        other._alive()
        return hmac.compare_digest(self._bytes, other._bytes)

    def _alive(self) -> None:
        if not self._bytes:
            raise KeyFileError(f"this {self._what()} has been wiped")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'wiped' if not self._bytes else f'{KEY_BYTES} bytes'})"

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(f"a {self._what()} cannot be compared, hashed, copied, formatted or pickled")

    __eq__ = _refuse
    __ne__ = _refuse
    __hash__ = _refuse  # type: ignore[assignment]
    __bytes__ = _refuse
    __copy__ = _refuse
    __deepcopy__ = _refuse
    __reduce__ = _refuse
    __reduce_ex__ = _refuse  # type: ignore[assignment]
    __format__ = _refuse
    __iter__ = _refuse
    __bool__ = _refuse


class PrivateKey(_KeyMaterial):
    """An X25519 private key."""

    __slots__ = ()

    def __init__(self, raw: bytes | bytearray) -> None:
        super().__init__(raw)
        # Clamped once here (RFC 7748, section 5), so that every consumer shows the same public key and text.
        self._bytes[0] &= 248
        self._bytes[31] = (self._bytes[31] & 127) | 64

    @classmethod
    def _what(cls) -> str:
        return "private key"

    def public(self) -> PublicKey:
        self._alive()
        return PublicKey(X25519PrivateKey.from_private_bytes(self._bytes).public_key().public_bytes_raw())


class PresharedKey(_KeyMaterial):
    """What WireGuard mixes into a handshake beside the two key pairs; the same 32 bytes at both ends."""

    __slots__ = ()

    @classmethod
    def _what(cls) -> str:
        return "pre-shared key"


class ChainKey(_KeyMaterial):
    """What one exchange of keys leaves for the next, so that the next depends on it (see `wg.exchange`)."""

    __slots__ = ()

    @classmethod
    def _what(cls) -> str:
        return "chain key"

    def copy_into(self, buffer: bytearray) -> None:
        """Overwrite `buffer`, which the caller wipes."""
        self._alive()
        buffer[:] = self._bytes


def generate() -> PrivateKey:
    """A fresh private key from the operating system's generator."""
    return PrivateKey(X25519PrivateKey.generate().private_bytes_raw())


def save_private(path: str | os.PathLike[str], key: PrivateKey) -> None:
    """Write `key` to a new file with mode 0600. Refuses to replace a file: a lost key cannot be had back."""
    text = key.base64()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyFileError(f"{path}: exists already; remove it first if its key may be lost") from None
    except OSError as problem:
        raise KeyFileError(f"{path}: cannot be created: {problem.strerror}") from None
    try:
        os.fchmod(handle, 0o600)  # whatever the umask
        _write_all(handle, text)
        _write_all(handle, b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)
        text[:] = bytes(len(text))


def _given_by_systemd(where: Path, facts: os.stat_result) -> bool:
    """Whether this is a credential of our unit: root's, with an access list that lets our user read it, which
    shows as a right of root's group and lets nobody else in."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    ours = folder is not None and where.absolute().parent == Path(folder)
    return ours and (facts.st_uid, facts.st_gid) == (0, 0) and not facts.st_mode & 0o037


def load_private(path: str | os.PathLike[str]) -> PrivateKey:
    """Read a key from a file that only its owner may read. Else raises `KeyFileError` naming it."""
    where = Path(path)
    try:
        handle = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        raise KeyFileError(f"{where}: cannot be read: {problem.strerror}; make one with keygen") from None
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise KeyFileError(f"{where}: is not a regular file")
        if facts.st_uid not in (os.geteuid(), 0):
            raise KeyFileError(
                f"{where}: belongs to another user (uid {facts.st_uid}), who can read and change it"
            )
        if facts.st_mode & 0o077 and not _given_by_systemd(where, facts):
            raise KeyFileError(
                f"{where}: others may read or change this key (mode {stat.S_IMODE(facts.st_mode):04o}); "
                "chmod 600 it, and make a new key if anybody could have read it"
            )
        text = bytearray(KEY_FILE_LIMIT + 1)
        size = os.readv(handle, [text])
    finally:
        os.close(handle)
    try:
        if size > KEY_FILE_LIMIT:
            raise KeyFileError(f"{where}: is too long for a key file")
        return PrivateKey(_decode_base64(bytes(text[:size]).strip(), str(where)))
    finally:
        text[:] = bytes(len(text))


def _decode_base64(text: bytes, name: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise KeyFileError(f"{name}: is not base64") from None
    if len(raw) != KEY_BYTES:
        raise KeyFileError(f"{name}: a key has {KEY_BYTES} bytes, this has {len(raw)}")
    return raw


def _write_all(handle: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
