"""Files at rest: encrypted, authenticated, in place, and the newest.

Everything that a party writes is sealed under keys derived from its one storage key. One file:

    magic 8 | version 32 | length 8 | chunk size 4                     the header, little endian
    nonce 12 | ciphertext | tag 16                                     chunk 0; the last one may be shorter
    ...

Its key is HMAC-SHA256 of purpose, name, version, length and chunk size under the storage key (one block of
HKDF-Expand, RFC 5869), so a header that was changed, another name or an older version give another key and
nothing opens. A chunk is AES-256-GCM with its number as associated data. The length is known beforehand: how
many chunks there are, and how long, is never taken from what is found. The version is random, made with the
file, and nonces are random too: a file that an upload goes on with after a crash repeats none.

`Vault` adds what a file alone cannot tell, that it is the newest: a register, itself such a file, lists the
version of every file, and carries a number that follows a monotonic counter outside the disk. A change writes
the register whole beside the old one, syncs, renames, syncs the directory, and then advances the counter. So
after a crash at any point the register is the old or the new one; an old register put back is behind the
counter, an old file is not the version listed. Whenever it is opened two more are written: a crash may have
left a register that was written and never counted, and with the second none of its number is good any more.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mimir.errors import BadInput, EnvironmentMissing, LocalError, MimirError
from mimir.secret import StorageKey

MAGIC = b"mimir@1\n"
CHUNK = 64 << 10
MAX_CHUNK = 1 << 20
NONCE, TAG, VERSION = 12, 16, 32
AROUND = NONCE + TAG
READ_CHUNKS = 16  # read at once
MAX_SMALL = 16 << 20  # of what is read whole
REGISTER = "register"
LOCK = ".lock"
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_HEADER = Struct("<8s32sQI")
_PURPOSE = re.compile(r"[a-z]{1,32}")
_SMALL = re.compile(r"[a-z]+\.[0-9a-f]{16}")


class StoreError(MimirError):
    """What lies on this disk is not what was put there; the message names the file and what to do."""

    exit_code = 4


class Counter(Protocol):
    """A number that only grows, and that whoever owns the disk cannot turn back. Blocks."""

    def read(self) -> int:
        """The number now; 0 before the first `advance`."""

    def advance(self) -> int:
        """One more, durable when it returns."""


# --- one file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a file says of itself, unproven until a chunk opens."""

    version: bytes
    length: int  # of the content
    chunk: int

    @classmethod
    def fresh(cls, length: int) -> Header:
        return cls(os.urandom(VERSION), length, CHUNK)

    def encode(self) -> bytes:
        return _HEADER.pack(MAGIC, self.version, self.length, self.chunk)

    @classmethod
    def decode(cls, raw: bytes, path: Path) -> Header:
        if len(raw) < _HEADER.size or not raw.startswith(MAGIC):
            raise StoreError(
                f"{path}: not encrypted, or not a file of this version; move it away and provision or make "
                "it again"
            )
        _magic, version, length, chunk = _HEADER.unpack(raw[: _HEADER.size])
        if not 0 < chunk <= MAX_CHUNK:
            raise StoreError(f"{path}: damaged: chunks of {chunk} bytes")
        return cls(version, length, chunk)

    @property
    def chunks(self) -> int:
        """An empty file has one chunk, which is empty, so that there is something to authenticate."""
        return max(1, -(-self.length // self.chunk))

    @property
    def size(self) -> int:
        """Bytes of the whole file on disk."""
        return _HEADER.size + self.length + self.chunks * AROUND

    def place(self, index: int) -> int:
        """Where a chunk begins on disk."""
        return _HEADER.size + index * (self.chunk + AROUND)

    def span(self, index: int) -> int:
        """Bytes of content in a chunk."""
        return min(self.chunk, self.length - index * self.chunk)


def derive(key: StorageKey, purpose: str, context: bytes) -> bytearray:
    """32 bytes for one purpose and context. The purpose is of few letters, so nothing else reads the same."""
    if not _PURPOSE.fullmatch(purpose):
        raise LocalError(f"a purpose of lower-case letters, not {purpose!r}")
    with key.reveal_to_kernel() as view:
        info = b"mimir at rest 1\0" + purpose.encode() + b"\0" + context
        return bytearray(hmac.digest(view, info + b"\x01", "sha256"))


class _Cipher:
    """The cipher of one version of one file. The library copies its key and does not wipe it."""

    def __init__(self, key: StorageKey, purpose: str, name: str, header: Header) -> None:
        material = derive(key, purpose, header.encode() + name.encode())
        self._box = AESGCM(material)
        material[:] = bytes(len(material))

    def close(self, index: int, content: bytes | bytearray | memoryview) -> bytes:
        nonce = os.urandom(NONCE)
        return nonce + self._box.encrypt(nonce, content, index.to_bytes(8, "little"))

    def open(self, index: int, stored: memoryview, out: memoryview) -> None:
        aad = index.to_bytes(8, "little")
        self._box.decrypt_into(bytes(stored[:NONCE]), stored[NONCE:], aad, out)


def seal(
    key: StorageKey, purpose: str, name: str, content: bytes | bytearray | memoryview
) -> tuple[bytes, bytes]:
    """(version, the whole file) of a small content."""
    header = Header.fresh(len(content))
    cipher, view = _Cipher(key, purpose, name, header), memoryview(content)
    parts = [header.encode()]
    for index in range(header.chunks):
        parts.append(cipher.close(index, view[index * CHUNK : index * CHUNK + header.span(index)]))
    return header.version, b"".join(parts)


def unseal(key: StorageKey, purpose: str, name: str, path: Path, version: bytes | None) -> bytearray:
    """The content of a small file; `StoreError` names it. None takes any version: only where an old one harms
    nobody."""
    try:
        header = peek(path)
        if header.length > MAX_SMALL:
            raise StoreError(f"{path}: damaged: {header.length} bytes are too many for such a file")
        out = bytearray(header.length)
        reader = Reader(key, purpose, name, path, version, header.length)
        reader.into(memoryview(out))
        return out
    except FileNotFoundError:
        raise StoreError(f"{path}: is gone") from None


def peek(path: Path) -> Header:
    """The header of a file, unproven. `StoreError` if there is none, `FileNotFoundError`."""
    with _opened(path) as handle:
        return Header.decode(os.pread(handle, _HEADER.size, 0), path)


class Reader:
    """Reads one file of known length, authenticating all that it hands out."""

    def __init__(
        self, key: StorageKey, purpose: str, name: str, path: Path, version: bytes | None, length: int
    ) -> None:
        self._path = path
        self.header = header = peek(path)
        if version is not None and not hmac.compare_digest(header.version, version):
            raise StoreError(
                f"{path}: not the version that the register lists: an old one was put back, or it is "
                "damaged; provision or make it again"
            )
        if header.length != length:
            raise StoreError(f"{path}: {header.length} bytes of content, {length} expected; damaged")
        size = path.stat().st_size
        if size != header.size:
            raise StoreError(f"{path}: {size} bytes, {header.size} expected: cut short or grown")
        self._cipher = _Cipher(key, purpose, name, header)

    def into(self, out: memoryview) -> None:
        """Decrypt all of it into `out`, of exactly the content's length. On error `out` is zeroed."""
        at = 0
        try:
            for index, stored in self._stored():
                span = self.header.span(index)
                self._open(index, stored, out[at : at + span])
                at += span
        except BaseException:
            out[:] = bytes(len(out))  # the library writes a chunk before it knows whether the tag holds
            raise

    def pieces(self) -> Iterator[memoryview]:
        """The content in order, chunk by chunk; each view is good until the next is asked for."""
        room = bytearray(self.header.chunk)
        try:
            for index, stored in self._stored():
                piece = memoryview(room)[: self.header.span(index)]
                self._open(index, stored, piece)
                yield piece
        finally:
            room[:] = bytes(len(room))

    def _open(self, index: int, stored: memoryview, out: memoryview) -> None:
        try:
            self._cipher.open(index, stored, out)
        except InvalidTag:
            raise StoreError(
                f"{self._path}: damaged at chunk {index}, of another file, or under another storage key; "
                "provision or make it again"
            ) from None

    def _stored(self) -> Iterator[tuple[int, memoryview]]:
        header = self.header
        step = header.chunk + AROUND
        room = bytearray(READ_CHUNKS * step)
        with _opened(self._path) as handle:
            for first in range(0, header.chunks, READ_CHUNKS):
                count = min(READ_CHUNKS, header.chunks - first)
                last = header.span(first + count - 1) + AROUND
                wanted = memoryview(room)[: (count - 1) * step + last]
                got = 0
                while got < len(wanted):
                    done = os.preadv(handle, [wanted[got:]], header.place(first) + got)
                    if done == 0:
                        raise StoreError(f"{self._path}: cut short while it was read")
                    got += done
                for each in range(count):
                    yield first + each, wanted[each * step : each * step + header.span(first + each) + AROUND]


class Writer:
    """Appends to one file of known length; chunks are on disk as soon as they are full. It can be resumed.

    `size` counts what was given. What does not fill a chunk waits in memory and is lost on `close`.
    """

    def __init__(self, key: StorageKey, purpose: str, name: str, path: Path, length: int) -> None:
        """Go on with the file at `path` if it is one of this name's, else begin it anew."""
        self._path = path
        header = self._resume(length)
        self._fresh = header is None
        self.header = header or Header.fresh(length)
        self._cipher = _Cipher(key, purpose, name, self.header)
        self._full = 0 if header is None else self._whole(path.stat().st_size)
        self._tail = bytearray()

    @property
    def size(self) -> int:
        return min(self._full * self.header.chunk, self.header.length) + len(self._tail)

    def write(self, data: bytes | memoryview) -> None:
        """Append; not more than the length."""
        header = self.header
        if self.size + len(data) > header.length:
            raise LocalError(f"{self._path}: more than its {header.length} bytes")
        view, out = memoryview(data), []
        first = self._full
        while self._full < header.chunks:
            span = header.span(self._full)
            need = span - len(self._tail)
            if len(view) < need:
                break
            piece = view[:need] if not self._tail else bytes(self._tail + view[:need])
            out.append(self._cipher.close(self._full, piece))
            self._drop_tail()
            view = view[need:]
            self._full += 1
        self._tail += view
        if self._fresh:
            write_at(self._path, 0, header.encode())
            self._fresh = False
        if out:
            write_at(self._path, header.place(first), b"".join(out))

    def close(self) -> None:
        """Let go of what fills no chunk."""
        self._drop_tail()

    def _drop_tail(self) -> None:
        self._tail[:] = bytes(len(self._tail))
        self._tail = bytearray()

    def _resume(self, length: int) -> Header | None:
        try:
            header = peek(self._path)
            if header.length == length and self._path.stat().st_size <= header.size:
                return header
        except FileNotFoundError:
            return None
        except StoreError:
            pass
        self._path.unlink()  # of another version, or without encryption: it is sent again
        return None

    def _whole(self, size: int) -> int:
        """Chunks that are there whole; a torn one after them is overwritten."""
        count = min((size - _HEADER.size) // (self.header.chunk + AROUND), self.header.chunks - 1)
        return self.header.chunks if size == self.header.size else count


# --- the disk ----------------------------------------------------------------------------------------------
# Every change of the disk goes through these; a test stops at each of them.


def write_at(path: Path, offset: int, data: bytes | memoryview) -> None:
    """Write into a file of mode 0600, which is made if need be. Not durable before `sync`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, FILE_MODE)
        try:
            view = memoryview(data)
            while view:
                done = os.pwrite(handle, view, offset)
                view, offset = view[done:], offset + done
        finally:
            os.close(handle)
    except OSError as error:
        raise EnvironmentMissing(f"{path}: cannot be written: {error.strerror}") from None


def sync(path: Path) -> None:
    """Return once the content of a file, or the names in a directory, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    """Replace `new`. Not durable before the directory is synced."""
    os.rename(old, new)


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file so that after a crash it is the old or the new one. Durable when it returns."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    write_at(fresh, 0, data)
    sync(fresh)
    rename(fresh, path)
    sync(path.parent)


def check_private(path: Path) -> None:
    """Refuse what others may read or replace."""
    facts = os.stat(path, follow_symlinks=False)
    if stat.S_ISLNK(facts.st_mode):
        raise StoreError(f"{path}: is a link; the store wants its own files")
    if facts.st_mode & 0o077:
        mode = stat.S_IMODE(facts.st_mode)
        raise StoreError(f"{path}: open to others (mode {mode:04o}); chmod go-rwx it, and doubt its content")
    if facts.st_uid != os.geteuid():
        raise StoreError(f"{path}: belongs to user {facts.st_uid}, the party runs as {os.geteuid()}")


class _opened:
    """A file descriptor of a private file, for reading. `FileNotFoundError` passes, other errors name it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        try:
            check_private(self._path)
            self._handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be read: {error.strerror}") from None
        return self._handle

    def __exit__(self, *exc: object) -> None:
        os.close(self._handle)


# --- a directory of them -----------------------------------------------------------------------------------


class Vault:
    """A directory whose files are encrypted, and the newest. One process at a time may use it.

    Blocks; call it from a thread.
    """

    def __init__(
        self, root: Path, key: StorageKey, counter: Counter, beside: Collection[str] = frozenset()
    ) -> None:
        """Takes the key over. `StoreError` for a store without encryption, under another key, or put back.
        `beside`: files in `root` that are somebody else's."""
        self.root = root
        self._beside = frozenset(beside)
        self._key = key
        self._counter = counter
        self._busy = threading.Lock()
        self._broken = False
        self._listed: dict[str, bytes] = {}
        try:
            root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentMissing(f"{root}: cannot be made: {error.strerror}; check data_dir") from None
        check_private(root)
        self._guard = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            try:
                fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BadInput(
                    f"{root}: in use by another process; is a party already running here?"
                ) from None
            self._load()
        except BaseException:
            os.close(self._guard)
            raise

    def close(self) -> None:
        """Let another process use the directory, and wipe the key. Safe to call twice."""
        self._key.wipe()
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    def __contains__(self, name: str) -> bool:
        return name in self._listed

    def names(self) -> frozenset[str]:
        """Everything listed."""
        return frozenset(self._listed)

    def reader(self, purpose: str, name: str, path: Path, length: int, *, listed: bool = True) -> Reader:
        """Read a file of known length. Before it is listed (`listed` False) its version is not compared."""
        version = None
        if listed and (version := self._listed.get(name)) is None:
            raise StoreError(f"{path}: not in the register of {self.root}: put back, or never finished")
        try:
            return Reader(self._key, purpose, name, path, version, length)
        except FileNotFoundError:
            raise StoreError(f"{path}: is gone; provision or make it again") from None

    def writer(self, purpose: str, name: str, path: Path, length: int) -> Writer:
        """Begin a file, or go on with it. It counts once it is listed."""
        return Writer(self._key, purpose, name, path, length)

    def change(self, listed: Mapping[str, bytes | None]) -> None:
        """List these versions, and forget names with None: all at once, durable when it returns."""
        with self._busy:
            after = {**self._listed, **{name: each for name, each in listed.items() if each is not None}}
            for name, version in listed.items():
                if version is None:
                    after.pop(name, None)
            self._write(self._number + 1, after)

    def get(self, purpose: str, name: str) -> bytearray | None:
        """A small file of this directory; None if there is none."""
        if name not in self._listed:
            return None
        return unseal(self._key, purpose, name, self._small(name), self._listed[name])

    def put(self, purpose: str, name: str, content: bytes) -> None:
        """Replace a small file: after a crash it is the old or the new one. Durable when it returns."""
        version, whole = seal(self._key, purpose, name, content)
        old = self._listed.get(name)
        path = self._small(name, version)
        write_at(path, 0, whole)
        sync(path)
        sync(self.root)
        self.change({name: version})
        if old is not None:
            self._small(name, old).unlink(missing_ok=True)

    def _small(self, name: str, version: bytes | None = None) -> Path:
        # Old and new lie side by side until the register has changed.
        return self.root / f"{name}.{(version or self._listed[name])[:8].hex()}"

    # --- the register ---

    def _load(self) -> None:
        path = self.root / REGISTER
        count = self._counter.read()
        if not path.exists():
            known = {LOCK, f"{REGISTER}.new", *self._beside}
            others = [each.name for each in self.root.iterdir() if each.name not in known]
            if others:
                raise StoreError(
                    f"{self.root}: has {sorted(others)[0]} but no register: written by a version without "
                    "encryption, or its register was taken away; move the directory away and provision again"
                )
            self._write(count + 1, {})
            return
        raw = unseal(self._key, "register", REGISTER, path, None)
        try:
            found = json.loads(raw)
            number, listed = int(found["number"]), {k: bytes.fromhex(v) for k, v in found["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LocalError(f"{path}: authentic, but not a register") from None
        if number < count:
            raise StoreError(
                f"{path}: number {number}, but the counter of the key source says {count}: {self.root} was "
                "put back to an earlier state; restore the newest, or move it away and provision again"
            )
        if number > count + 1:
            raise StoreError(
                f"{path}: number {number}, but the counter of the key source says {count}: the counter was "
                "lost or put back; restore it, or move the directory away and provision again"
            )
        self._write(count + 1, listed)
        self._write(count + 2, listed)
        for each in self.root.iterdir():  # what a crash left of small files
            if _SMALL.fullmatch(each.name) and each not in {self._small(name) for name in listed}:
                each.unlink()

    def _write(self, number: int, listed: dict[str, bytes]) -> None:
        if self._broken:
            raise StoreError(f"{self.root}: a change of the register failed before; start the party again")
        self._broken = True  # until it is done: after a failure nobody knows which register is there
        body = {"number": number, "files": {name: each.hex() for name, each in sorted(listed.items())}}
        _version, whole = seal(self._key, "register", REGISTER, json.dumps(body).encode())
        replace_file(self.root / REGISTER, whole)
        while self._counter.read() < number:
            self._counter.advance()
        self._number = number
        self._listed = listed
        self._broken = False
