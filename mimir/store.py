"""Model shares on disk: received piece by piece, checked, then there all at once; checked again on load.

    <root>/<digest>/manifest.json          public
    <root>/<digest>/<tensor>.a  .b         this party's two components, little-endian 64-bit words, C order
    <root>/.incoming-<digest>/             an upload that is not complete; it can be resumed

Directories are 0700 and files 0600, and anything looser is refused. `_write_at_rest` and `_read_at_rest` are
the only two functions that touch share bytes on disk: encryption at rest goes there.
Everything here blocks; call it from a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from mimir.errors import BadInput, EnvironmentMissing, LocalError, MimirError, ModelError
from mimir.manifest import Manifest, Tensor, is_digest

Words = npt.NDArray[np.uint64]

log = structlog.get_logger("mimir.store")

SIDES = ("a", "b")  # a: component number of the party, b: the next one
MAX_INCOMPLETE = 4  # uploads kept for resuming; older ones go
MAX_MANIFEST_BYTES = 4 << 20
HASH_CHUNK = 4 << 20
SPARE_DISK_BYTES = 64 << 20  # left free after an upload
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


class StoreError(MimirError):
    """Shares on this disk are not what they were; the message names the file and what to do."""

    exit_code = 4


class ComponentsDiffer(MimirError):
    """The two holders of a component do not hold the same: the owner shared wrongly, or a peer lies."""

    exit_code = 6


@dataclass(frozen=True, eq=False, repr=False)
class SharedModel:
    """One party's shares of one model, memory-mapped read-only and verified. Shared by all sessions."""

    digest: str
    manifest: Manifest
    party: int
    _maps: dict[str, tuple[Words, Words]]

    def get(self, name: str) -> tuple[Words, Words]:
        """The two components of a tensor, shaped; (x_i, x_{i+1}) for party i."""
        try:
            return self._maps[name]
        except KeyError:
            raise LocalError(f"model {self.manifest.name} has no tensor {name!r}") from None

    def __repr__(self) -> str:
        return f"<SharedModel {self.manifest.name} {self.digest[:16]}>"


class ModelStore:
    """The models of one party. One process at a time may use a root."""

    def __init__(self, root: Path, party: int, identities: tuple[str, ...]) -> None:
        """`identities` are the three parties' public keys: models shared for others are refused."""
        self.root = root
        self.party = party
        self._identities = tuple(identities)
        self._lock = threading.Lock()
        self._open: dict[str, SharedModel] = {}
        self._manifests: dict[str, Manifest] = {}
        self._uploads: set[str] = set()
        try:
            root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentMissing(f"{root}: cannot be made: {error.strerror}; check data_dir") from None
        _check_private(root)
        self._guard = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._guard)
            raise BadInput(f"{root}: in use by another process; is a party already running here?") from None

    def close(self) -> None:
        """Let another process use the root. Models already opened stay mapped."""
        os.close(self._guard)

    def models(self) -> dict[str, Manifest]:
        """Every complete model by digest. Reads manifests only; `open` checks the shares."""
        found = {}
        for entry in sorted(self.root.iterdir()):
            if is_digest(entry.name):
                try:
                    found[entry.name] = self.manifest(entry.name)
                except StoreError as error:  # one damaged model must not hide the others
                    log.warning("a model cannot be used", why=str(error))
        return found

    def manifest(self, digest: str) -> Manifest:
        """The public description of a model that is here; `BadInput` if it is not."""
        home = self._home(digest)
        with self._lock:
            if digest not in self._manifests:
                self._manifests[digest] = self._manifest(home)
            return self._manifests[digest]

    def open(self, digest: str) -> SharedModel:
        """Map a model's shares after checking every byte against the manifest; the same object next time."""
        with self._lock:
            if digest in self._open:
                return self._open[digest]
            home = self._home(digest)
            manifest = self._manifest(home)  # read again: the file may have changed since
            maps = {}
            for tensor in manifest.tensors:
                sides = []
                for side, name in enumerate(SIDES):
                    path = home / f"{tensor.name}.{name}"
                    words = _read_at_rest(path, tensor)
                    expected = tensor.sha256[(self.party + side) % 3]
                    if hashlib.sha256(words.reshape(-1).data).hexdigest() != expected:
                        raise StoreError(
                            f"{path}: damaged: its hash is not the manifest's; "
                            f"remove {home} and provision the model again"
                        )
                    sides.append(words)
                maps[tensor.name] = (sides[0], sides[1])
            model = SharedModel(digest, manifest, self.party, maps)
            self._open[digest] = model
            return model

    def begin(self, data: Any) -> Incoming:
        """Start or resume an upload. `data` is a manifest as received; it is checked here."""
        manifest = Manifest.from_public(data)
        if manifest.parties != self._identities:
            raise BadInput(f"model {manifest.name} was shared for other parties than these three")
        digest = manifest.digest()
        with self._lock:
            if digest in self._uploads:
                raise BadInput(f"model {manifest.name} is being uploaded by somebody else right now")
            complete = (self.root / digest).is_dir()
            staging = self.root / f".incoming-{digest}"
            if not complete:
                self._make_room(staging, 2 * manifest.nbytes)
                staging.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
                _check_private(staging)
            self._uploads.add(digest)
        return Incoming(self, manifest, digest, staging, complete)

    def remove(self, digest: str) -> None:
        """Delete a model's shares. Sessions that have it mapped keep their mapping."""
        home = self._home(digest)
        with self._lock:
            self._open.pop(digest, None)
            self._manifests.pop(digest, None)
            shutil.rmtree(home)

    def _home(self, digest: str) -> Path:
        if not is_digest(digest) or not (self.root / digest).is_dir():
            raise BadInput(f"model {str(digest)[:16]} is not here; provision it first (mimir provision)")
        return self.root / digest

    def _manifest(self, home: Path) -> Manifest:
        _check_private(home)
        path = home / "manifest.json"
        try:
            with open(path, "rb") as file:
                data = json.loads(file.read(MAX_MANIFEST_BYTES))
            manifest = Manifest.from_public(data)
        except (OSError, ValueError, BadInput, ModelError) as error:
            raise StoreError(f"{path}: cannot be used: {error}; remove {home} and provision again") from None
        if manifest.digest() != home.name:
            raise StoreError(f"{path}: damaged: it is not the manifest of {home.name[:16]}; provision again")
        if manifest.parties != self._identities:
            raise StoreError(f"{home}: shared for other parties than those of this configuration; remove it")
        return manifest

    def _make_room(self, staging: Path, need: int) -> None:
        """Drop the oldest unfinished uploads beyond the limit, then see that the disk can take this one."""
        waiting = [
            entry
            for entry in self.root.iterdir()
            if entry.name.startswith(".incoming-")
            and entry != staging
            and entry.name.removeprefix(".incoming-") not in self._uploads
        ]
        waiting.sort(key=lambda entry: entry.stat().st_mtime)
        for entry in waiting[: max(0, len(waiting) + 1 - MAX_INCOMPLETE)]:
            shutil.rmtree(entry)
        have = sum(entry.stat().st_size for entry in staging.iterdir()) if staging.is_dir() else 0
        free = shutil.disk_usage(self.root).free
        if free - (need - have) < SPARE_DISK_BYTES:
            raise EnvironmentMissing(
                f"{self.root}: {need - have} bytes are needed for this model, {free} are free; make room"
            )

    def _end_upload(self, digest: str) -> None:
        with self._lock:
            self._uploads.discard(digest)


class Incoming:
    """One upload: pieces are appended in order per tensor and side; `verify` and `accept` make it a model.

    `close` ends the upload and keeps what came; `discard` throws it away.
    """

    def __init__(
        self, store: ModelStore, manifest: Manifest, digest: str, staging: Path, complete: bool
    ) -> None:
        self.manifest = manifest
        self.digest = digest
        self.complete = complete  # the model is already here: nothing to send
        self._store = store
        self._staging = staging
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._sizes: dict[tuple[str, str], int] = {}
        self._verified = complete
        for tensor in manifest.tensors:
            for side in SIDES:
                self._sizes[tensor.name, side] = tensor.nbytes if complete else self._size(tensor, side)

    def have(self) -> dict[str, list[int]]:
        """Per tensor, the bytes of sides a and b that are already here."""
        return {name: [self._sizes[name, side] for side in SIDES] for name in self._tensors}

    def write(self, name: str, side: str, offset: int, data: bytes) -> None:
        """Append a piece; it must start where the last one ended."""
        tensor = self._tensors.get(name)
        if tensor is None or side not in SIDES:
            raise BadInput(f"model {self.manifest.name} has no {name!r}, side {side!r}")
        size = self._sizes[name, side]
        if self.complete or offset != size or size + len(data) > tensor.nbytes:
            raise BadInput(
                f"{name}.{side}: {len(data)} bytes at {offset} do not follow the {size} that are here"
            )
        _write_at_rest(self._staging / f"{name}.{side}", offset, data)
        self._sizes[name, side] = size + len(data)

    def verify(self) -> dict[int, str]:
        """Hash everything; returns {component: digest} for the comparison with its other holder.

        On a wrong hash the bad file is thrown away, so that a resumed upload sends it again.
        """
        party = self._store.party
        if not self.complete:
            for tensor in self.manifest.tensors:
                for number, side in enumerate(SIDES):
                    path = self._staging / f"{tensor.name}.{side}"
                    size = self._sizes[tensor.name, side]
                    if size != tensor.nbytes:
                        raise BadInput(f"{tensor.name}.{side}: {size} of {tensor.nbytes} bytes have arrived")
                    if _hash_file(path) != tensor.sha256[(party + number) % 3]:
                        path.unlink()
                        self._sizes[tensor.name, side] = 0
                        raise BadInput(
                            f"{tensor.name}.{side}: what arrived has not the manifest's hash; send again"
                        )
        self._verified = True
        return {
            (party + number) % 3: self.manifest.component_digest((party + number) % 3) for number in (0, 1)
        }

    def accept(self) -> None:
        """Make the verified upload a model, atomically: after a crash it is there whole or not at all."""
        if not self._verified:
            raise LocalError("accept called before verify")
        if self.complete:
            return
        for name, side in self._sizes:
            _sync(self._staging / f"{name}.{side}")
        path = self._staging / "manifest.json"
        path.unlink(missing_ok=True)
        _write_at_rest(path, 0, self.manifest.canonical())
        _sync(path)
        _sync(self._staging)
        os.rename(self._staging, self._store.root / self.digest)
        _sync(self._store.root)
        self.complete = True

    def close(self) -> None:
        """End the upload; what arrived stays for a resumption. Safe to call twice."""
        self._store._end_upload(self.digest)

    def discard(self) -> None:
        """End the upload and delete what arrived: the owner or a peer lied about it."""
        if not self.complete:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.close()

    def _size(self, tensor: Tensor, side: str) -> int:
        path = self._staging / f"{tensor.name}.{side}"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return 0
        if size > tensor.nbytes:
            path.unlink()
            return 0
        return size


def _write_at_rest(path: Path, offset: int, data: bytes) -> None:
    """Write share bytes. Encryption under a key released only to an attested party belongs here."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, FILE_MODE)
    try:
        view = memoryview(data)
        while view:
            done = os.pwrite(handle, view, offset)
            view, offset = view[done:], offset + done
    except OSError as error:
        raise EnvironmentMissing(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        os.close(handle)


def _read_at_rest(path: Path, tensor: Tensor) -> Words:
    """Map share bytes read-only. Decryption belongs here; it would return memory instead of a mapping."""
    try:
        _check_private(path)
        if path.stat().st_size != tensor.nbytes:
            raise StoreError(
                f"{path}: {path.stat().st_size} bytes, {tensor.nbytes} expected; provision again"
            )
        return np.memmap(path, dtype="<u8", mode="r", shape=tensor.shape)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; provision the model again") from None


def _check_private(path: Path) -> None:
    """Refuse what others may read or replace."""
    facts = os.stat(path, follow_symlinks=False)
    if stat.S_ISLNK(facts.st_mode):
        raise StoreError(f"{path}: is a link; the store wants its own files")
    if facts.st_mode & 0o077:
        mode = stat.S_IMODE(facts.st_mode)
        raise StoreError(f"{path}: open to others (mode {mode:04o}); chmod go-rwx it, and doubt its content")
    if facts.st_uid != os.geteuid():
        raise StoreError(f"{path}: belongs to user {facts.st_uid}, the party runs as {os.geteuid()}")


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
