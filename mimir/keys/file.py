"""A storage key in a file, and a counter in another: for development. Who reads the one reads everything; who
puts back the other can put back the whole disk."""

from __future__ import annotations

import os
from pathlib import Path

from mimir import vault
from mimir.errors import BadInput
from mimir.secret import StorageKey

MAX_FILE = 4096
_MARK = "mimir-storage-v1"


class FileCounter:
    """One decimal number in a file, replaced whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        """The number; 0 if there is no such file."""
        try:
            vault.check_private(self._path)
            text = self._path.read_bytes()[: MAX_FILE + 1]
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise BadInput(f"counter {self._path}: {error.strerror}") from None
        if not text.removesuffix(b"\n").isdigit() or len(text) > 20:
            raise BadInput(f"counter {self._path}: damaged; restore it from your copy")
        return int(text)

    def advance(self) -> int:
        """One more; durable when it returns."""
        number = self.read() + 1
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        vault.replace_file(self._path, b"%d\n" % number)
        return number


class FileSource:
    """The key as 64 hexadecimal digits, mode 0600."""

    protection = "a file beside the configuration: development, protects nothing from who reads this disk"

    def __init__(self, path: Path, counter: FileCounter) -> None:
        self._path = path
        self.counter = counter

    async def obtain(self) -> StorageKey:
        return load(self._path)

    async def create(self) -> None:
        save(self._path, StorageKey.random())


def load(path: Path) -> StorageKey:
    """Read a key file; `BadInput` if it is missing, readable by others, or none."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            raw = bytearray(file.read(MAX_FILE + 1))
    except OSError as error:
        raise BadInput(
            f"storage key {path}: {error.strerror}; `mimir keygen --kind storage --out {path}` makes one"
        ) from None
    try:
        if status.st_mode & 0o077:
            raise BadInput(f"storage key {path}: mode {status.st_mode & 0o777:04o}; run: chmod 600 {path}")
        if status.st_uid not in (os.geteuid(), 0):
            raise BadInput(f"storage key {path}: belongs to another user (uid {status.st_uid})")
        words = raw.split()
        if len(words) != 2 or words[0] != _MARK.encode() or len(words[1]) != 2 * StorageKey.SIZE:
            raise BadInput(f"storage key {path}: not such a file; `mimir keygen --kind storage` makes one")
        try:
            return StorageKey(bytearray.fromhex(words[1].decode("ascii")))
        except ValueError:
            raise BadInput(f"storage key {path}: damaged; restore it from your copy") from None
        finally:
            words[1][:] = bytes(len(words[1]))
    finally:
        raw[:] = bytes(len(raw))


def save(path: Path, key: StorageKey) -> None:
    """Write a key file, mode 0600, never over an existing one."""
    with key.reveal_to_kernel() as view:
        create_file(path, f"{_MARK} {view.hex()}\n".encode())


def create_file(path: Path, content: bytes) -> None:
    """A new file of mode 0600, durable when this returns; `BadInput` if there is one."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise BadInput(f"{path}: exists already; move it away first if it may go") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    vault.sync(path.parent)
