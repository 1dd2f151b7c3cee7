"""Model shares on disk: received piece by piece, checked, then there all at once; checked again on load.

    <root>/<digest>/manifest.json          public
    <root>/<digest>/<tensor>.a  .b         this party's two components, little-endian 64-bit words, C order
    <root>/.incoming-<digest>/             an upload that is not complete; it can be resumed

Share files are encrypted and listed as `mimir.vault` does it; a model is here from the moment its files are
listed. Directories are 0700 and files 0600, and anything looser is refused.
Everything here blocks; call it from a thread.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from mimir import vault as at_rest
from mimir.errors import BadInput, EnvironmentMissing, LocalError, MimirError, ModelError
from mimir.manifest import Manifest, Tensor, is_digest
from mimir.secret import Pages
from mimir.vault import DIRECTORY_MODE, StoreError, Vault, Writer, check_private

Words = npt.NDArray[np.uint64]

log = structlog.get_logger("mimir.store")

SIDES = ("a", "b")  # a: component number of the party, b: the next one
PURPOSE = "shares"
MAX_INCOMPLETE = 4  # uploads kept for resuming; older ones go
MAX_MANIFEST_BYTES = 4 << 20
SPARE_DISK_BYTES = 64 << 20  # left free after an upload
KEPT_BYTES = 4 << 30  # of decrypted shares, all models together


class ComponentsDiffer(MimirError):
    """The two holders of a component do not hold the same: the owner shared wrongly, or a peer lies."""

    exit_code = 6


class SharedModel:
    """One party's shares of one model, every byte authenticated. Shared by all sessions.

    Tensors are decrypted into memory of their own. As many as the store may keep stay there; the others are
    decrypted anew each time, and wiped when the last array over them is gone.
    """

    def __init__(
        self,
        digest: str,
        manifest: Manifest,
        party: int,
        kept: dict[str, tuple[Words, Words]],
        load: Callable[[Tensor], tuple[Words, Words]],
    ) -> None:
        self.digest = digest
        self.manifest = manifest
        self.party = party
        self._kept = kept
        self._load = load
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}

    def get(self, name: str) -> tuple[Words, Words]:
        """The two components of a tensor, shaped, read-only; (x_i, x_{i+1}) for party i."""
        try:
            return self._kept[name] if name in self._kept else self._load(self._tensors[name])
        except KeyError:
            raise LocalError(f"model {self.manifest.name} has no tensor {name!r}") from None

    @property
    def kept_bytes(self) -> int:
        """Decrypted and kept."""
        return sum(words.nbytes for pair in self._kept.values() for words in pair)

    def __repr__(self) -> str:
        return f"<SharedModel {self.manifest.name} {self.digest[:16]}>"


class ModelStore:
    """The models of one party, in the directory of its vault."""

    def __init__(
        self,
        vault: Vault,
        party: int,
        identities: tuple[str, ...],
        keep: int = KEPT_BYTES,
        lock: bool = False,
    ) -> None:
        """`identities` are the three parties' public keys: models shared for others are refused.

        At most `keep` bytes of decrypted shares stay in memory; `lock` keeps what is decrypted out of swap.
        """
        self.root = vault.root
        self.vault = vault
        self.party = party
        self._keep = keep
        self._locked = lock
        self._identities = tuple(identities)
        self._lock = threading.Lock()
        self._open: dict[str, SharedModel] = {}
        self._manifests: dict[str, Manifest] = {}
        self._uploads: set[str] = set()
        self._tidy()

    def close(self) -> None:
        """Let another process use the directory. Of models already opened, what is kept stays."""
        self.vault.close()

    def models(self) -> dict[str, Manifest]:
        """Every complete model by digest. Reads manifests only; `open` checks the shares."""
        found = {}
        for entry in sorted(self.root.iterdir()):
            if is_digest(entry.name) and self._here(entry.name):
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
        """Decrypt a model's shares, which authenticates every byte; the same object next time."""
        with self._lock:
            if digest in self._open:
                return self._open[digest]
            home = self._home(digest)
            manifest = self._manifest(home)  # read again: the file may have changed since
            room = self._keep - sum(model.kept_bytes for model in self._open.values())
            kept = {}
            for tensor in manifest.tensors:
                pair = self._load(home, tensor)
                if 2 * tensor.nbytes <= room:
                    kept[tensor.name] = pair
                    room -= 2 * tensor.nbytes
            model = SharedModel(digest, manifest, self.party, kept, lambda tensor: self._load(home, tensor))
            self._open[digest] = model
            return model

    def _load(self, home: Path, tensor: Tensor) -> tuple[Words, Words]:
        """Decrypt both components of a tensor into memory that is wiped when nobody has it any more."""
        sides = []
        for side in SIDES:
            name = self._name(home.name, tensor.name, side)
            reader = self.vault.reader(PURPOSE, name, home / f"{tensor.name}.{side}", tensor.nbytes)
            pages = Pages(tensor.nbytes, lock=self._locked)
            reader.into(memoryview(pages)[: tensor.nbytes])
            words = np.frombuffer(pages, "<u8", tensor.elements).reshape(tensor.shape)
            words.flags.writeable = False
            sides.append(words)
        return sides[0], sides[1]

    def _name(self, digest: str, tensor: str, side: str) -> str:
        """By what the register knows a file. Not its path: staged files are the same files."""
        return f"{self.party}/{digest}/{tensor}.{side}"

    def _tidy(self) -> None:
        """A directory that is not listed is an upload whose last step did not happen, or a removal's."""
        listed = {name.split("/")[1] for name in self.vault.names() if "/" in name}
        for entry in sorted(self.root.iterdir()):
            if is_digest(entry.name) and entry.name not in listed:
                staging = self.root / f".incoming-{entry.name}"
                if staging.exists():
                    shutil.rmtree(entry)
                else:
                    at_rest.rename(entry, staging)

    def begin(self, data: Any) -> Incoming:
        """Start or resume an upload. `data` is a manifest as received; it is checked here."""
        manifest = Manifest.from_public(data)
        if manifest.parties != self._identities:
            raise BadInput(f"model {manifest.name} was shared for other parties than these three")
        digest = manifest.digest()
        with self._lock:
            if digest in self._uploads:
                raise BadInput(f"model {manifest.name} is being uploaded by somebody else right now")
            complete = self._here(digest)
            staging = self.root / f".incoming-{digest}"
            if not complete:
                self._make_room(staging, 2 * manifest.nbytes)
                staging.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
                check_private(staging)
            self._uploads.add(digest)
        return Incoming(self, manifest, digest, staging, complete)

    def remove(self, digest: str) -> None:
        """Delete a model's shares. Sessions that have it keep what is decrypted already."""
        home = self._home(digest)
        with self._lock:
            self._open.pop(digest, None)
            self._manifests.pop(digest, None)
            gone = [name for name in self.vault.names() if name.split("/")[1:2] == [digest]]
            self.vault.change(dict.fromkeys(gone))
            shutil.rmtree(home)

    def _here(self, digest: str) -> bool:
        prefix = f"{self.party}/{digest}/"
        return (self.root / digest).is_dir() and any(name.startswith(prefix) for name in self.vault.names())

    def _home(self, digest: str) -> Path:
        if not is_digest(digest) or not self._here(digest):
            raise BadInput(f"model {str(digest)[:16]} is not here; provision it first (mimir provision)")
        return self.root / digest

    def _manifest(self, home: Path) -> Manifest:
        check_private(home)
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
        self._writers: dict[tuple[str, str], Writer] = {}
        self._verified = complete
        if not complete:
            for tensor in manifest.tensors:
                for side in SIDES:
                    self._begin(tensor, side)

    def have(self) -> dict[str, list[int]]:
        """Per tensor, the bytes of sides a and b that are already here."""
        return {name: [self._size(tensor, side) for side in SIDES] for name, tensor in self._tensors.items()}

    def write(self, name: str, side: str, offset: int, data: bytes) -> None:
        """Append a piece; it must start where the last one ended."""
        tensor = self._tensors.get(name)
        if tensor is None or side not in SIDES:
            raise BadInput(f"model {self.manifest.name} has no {name!r}, side {side!r}")
        size = self._size(tensor, side)
        if self.complete or offset != size or size + len(data) > tensor.nbytes:
            raise BadInput(
                f"{name}.{side}: {len(data)} bytes at {offset} do not follow the {size} that are here"
            )
        self._writers[name, side].write(data)

    def verify(self) -> dict[int, str]:
        """Hash everything; returns {component: digest} for the comparison with its other holder.

        On a wrong hash the bad file is thrown away, so that a resumed upload sends it again.
        """
        party = self._store.party
        if not self.complete:
            for tensor in self.manifest.tensors:
                for number, side in enumerate(SIDES):
                    path = self._staging / f"{tensor.name}.{side}"
                    size = self._size(tensor, side)
                    if size != tensor.nbytes:
                        raise BadInput(f"{tensor.name}.{side}: {size} of {tensor.nbytes} bytes have arrived")
                    if self._hash(tensor, side, path) != tensor.sha256[(party + number) % 3]:
                        path.unlink()
                        self._begin(tensor, side)
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
        for name, side in self._writers:
            at_rest.sync(self._staging / f"{name}.{side}")
        at_rest.replace_file(self._staging / "manifest.json", self.manifest.canonical())
        at_rest.rename(self._staging, self._store.root / self.digest)
        at_rest.sync(self._store.root)
        # From here on it counts. Had we crashed before, `_tidy` would make it an upload again.
        versions = {self._name(*each): writer.header.version for each, writer in self._writers.items()}
        self._store.vault.change(versions)
        self.complete = True

    def close(self) -> None:
        """End the upload; what arrived stays for a resumption, in whole chunks. Safe to call twice."""
        for writer in self._writers.values():
            writer.close()
        self._store._end_upload(self.digest)

    def discard(self) -> None:
        """End the upload and delete what arrived: the owner or a peer lied about it."""
        if not self.complete:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.close()

    def _name(self, tensor: str, side: str) -> str:
        return self._store._name(self.digest, tensor, side)

    def _begin(self, tensor: Tensor, side: str) -> None:
        path = self._staging / f"{tensor.name}.{side}"
        name = self._name(tensor.name, side)
        self._writers[tensor.name, side] = self._store.vault.writer(PURPOSE, name, path, tensor.nbytes)

    def _size(self, tensor: Tensor, side: str) -> int:
        return tensor.nbytes if self.complete else self._writers[tensor.name, side].size

    def _hash(self, tensor: Tensor, side: str, path: Path) -> str:
        """SHA-256 of what lies there, read back; of nothing if it does not open."""
        name, whole = self._name(tensor.name, side), hashlib.sha256()
        try:
            reader = self._store.vault.reader(PURPOSE, name, path, tensor.nbytes, listed=False)
            for piece in reader.pieces():
                whole.update(piece)
        except StoreError as error:
            log.warning("an upload was damaged on disk", why=str(error))
            return ""
        return whole.hexdigest()
