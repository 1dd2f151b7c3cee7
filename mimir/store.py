"""Model shares on disk: received piece by piece, checked, then there all at once; checked again on load.

    <root>/<digest>/manifest.json          public
    <root>/<digest>/seeds                  of this party's two components, i and i+1: 32 bytes each
    <root>/<digest>/<tensor>.words         its explicit component, if this party holds it: little-endian
                                           words of 8 or 4 bytes, C order
    <root>/.incoming-<digest>/             an upload that is not complete; it can be resumed

The rest of its shares are key streams of the seeds (see mimir.manifest), and are never on disk.
Share files are encrypted and listed as `mimir.vault` does it; a model is here from the moment its files are
listed. Directories are 0700 and files 0600, and anything looser is refused.
Everything here blocks; call it from a thread.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from mimir import kernels
from mimir import vault as at_rest
from mimir.errors import BadInput, EnvironmentMissing, LocalError, MimirError, ModelError
from mimir.manifest import (
    COMPONENTS,
    Manifest,
    Tensor,
    component_hash,
    is_digest,
    seed_commitment,
)
from mimir.mpc.weights import KeyStream, Matrix, Stored
from mimir.secret import KEY_BYTES, Pages, ShareSeed
from mimir.vault import DIRECTORY_MODE, StoreError, Vault, Writer, check_private

Words = npt.NDArray[Any]

log = structlog.get_logger("mimir.store")

Pair = tuple[Matrix, Matrix]  # a party's two components: the one with its number, and the next one

PURPOSE = "shares"
SEEDS, SEEDS_BYTES = "seeds", 2 * KEY_BYTES
MAX_INCOMPLETE = 4  # uploads kept for resuming; older ones go
MAX_MANIFEST_BYTES = 4 << 20
SPARE_DISK_BYTES = 64 << 20  # left free after an upload
KEPT_BYTES = 4 << 30  # of shares in memory, all models together


class ComponentsDiffer(MimirError):
    """The two holders of a component do not hold the same: the owner shared wrongly, or a peer lies."""

    exit_code = 6


class WrongShare(BadInput):
    """What an owner sent is not what its manifest promises this party."""


def kept(tensors: Iterable[Tensor], party: int, room: int) -> frozenset[tuple[str, int]]:
    """Which shares stay in memory if they may fill `room` bytes, as (tensor, 0 or 1 of the pair).

    Explicit components first, which would have to be decrypted at each use, then key streams, each in the
    order of the tensors. One that does not fit any more is passed over.
    """
    found = set()
    each = [
        (tensor, number, (party + number) % COMPONENTS == tensor.explicit)
        for tensor in tensors
        for number in (0, 1)
    ]
    for wanted in (True, False):
        for tensor, number, explicit in each:
            if explicit == wanted and tensor.nbytes <= room:
                found.add((tensor.name, number))
                room -= tensor.nbytes
    return frozenset(found)


class SharedModel:
    """One party's shares of one model, every byte authenticated. Shared by all sessions.

    As many components as the store may keep are arrays in memory of their own, wiped when the last array over
    them is gone. The others are decrypted or expanded at each use, some rows at a time.
    """

    def __init__(self, digest: str, manifest: Manifest, party: int, pairs: Mapping[str, Pair]) -> None:
        self.digest = digest
        self.manifest = manifest
        self.party = party
        self._pairs = pairs

    def get(self, name: str) -> Pair:
        """The two components of a tensor, shaped, read-only; (x_i, x_{i+1}) for party i. Reads nothing."""
        try:
            return self._pairs[name]
        except KeyError:
            raise LocalError(f"model {self.manifest.name} has no tensor {name!r}") from None

    @property
    def kept_bytes(self) -> int:
        """Of shares in memory."""
        return sum(w.nbytes for pair in self._pairs.values() for w in pair if isinstance(w, np.ndarray))

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

        At most `keep` bytes of shares stay in memory; `lock` keeps all shares there out of swap.
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
        """Read a model's shares, which authenticates every byte; the same object next time."""
        with self._lock:
            if digest in self._open:
                return self._open[digest]
            home = self._home(digest)
            manifest = self._manifest(home)  # read again: the file may have changed since
            seeds = self._seeds(home)
            room = self._keep - sum(model.kept_bytes for model in self._open.values())
            keep = kept(manifest.tensors, self.party, room)
            pairs: dict[str, Pair] = {}
            for index, tensor in enumerate(manifest.tensors):
                pair: list[Matrix] = []
                for number in (0, 1):
                    held = (tensor.name, number) in keep
                    if (self.party + number) % COMPONENTS == tensor.explicit:
                        pair.append(self._explicit(home, tensor, held))
                    else:
                        pair.append(self._expanded(seeds[number], index, tensor, held))
                pairs[tensor.name] = pair[0], pair[1]
            model = self._open[digest] = SharedModel(digest, manifest, self.party, pairs)
            return model

    def _explicit(self, home: Path, tensor: Tensor, held: bool) -> Matrix:
        """An explicit component, decrypted once at least."""

        def pieces() -> Iterator[memoryview]:
            return self._reader(home, tensor).pieces()

        if not held:
            for _ in pieces():
                pass
            return Stored(pieces, tensor.shape, tensor.dtype, lock=self._locked)
        pages = Pages(tensor.nbytes, lock=self._locked)
        self._reader(home, tensor).into(memoryview(pages)[: tensor.nbytes])
        return _words(pages, tensor)

    def _expanded(self, seed: ShareSeed, index: int, tensor: Tensor, held: bool) -> Matrix:
        """A component that is the key stream of a seed."""
        if not held:
            return KeyStream(seed, index, tensor.shape, tensor.dtype, lock=self._locked)
        pages = Pages(tensor.nbytes, lock=self._locked)
        with seed.reveal_to_kernel() as key:
            kernels.prg(key, index, np.frombuffer(pages, np.uint8, tensor.nbytes))
        return _words(pages, tensor)

    def _reader(self, home: Path, tensor: Tensor) -> at_rest.Reader:
        name = self._name(home.name, tensor.name)
        return self.vault.reader(PURPOSE, name, home / f"{tensor.name}.words", tensor.nbytes)

    def _seeds(self, home: Path) -> tuple[ShareSeed, ShareSeed]:
        raw = bytearray(SEEDS_BYTES)
        name = f"{self.party}/{home.name}/{SEEDS}"
        self.vault.reader(PURPOSE, name, home / SEEDS, len(raw)).into(memoryview(raw))
        halves = [bytearray(raw[:KEY_BYTES]), bytearray(raw[KEY_BYTES:])]
        raw[:] = bytes(len(raw))
        return ShareSeed(halves[0]), ShareSeed(halves[1])

    def _name(self, digest: str, tensor: str) -> str:
        """By what the register knows a file. Not its path: staged files are the same files."""
        return f"{self.party}/{digest}/{tensor}.words"

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

    def begin(self, data: Any, seeds: tuple[ShareSeed, ShareSeed]) -> Incoming:
        """Start or resume an upload. `data` is a manifest as received, `seeds` are those of this party's two
        components, and taken over; both are checked here.
        """
        manifest = Manifest.from_public(data)
        if manifest.parties != self._identities:
            raise BadInput(f"model {manifest.name} was shared for other parties than these three")
        for number, seed in enumerate(seeds):
            component = (self.party + number) % COMPONENTS
            if seed_commitment(component, seed) != manifest.seeds[component]:
                raise WrongShare(
                    f"model {manifest.name}: the seed of component {component} is not the manifest's"
                )
        digest = manifest.digest()
        with self._lock:
            if digest in self._uploads:
                raise BadInput(f"model {manifest.name} is being uploaded by somebody else right now")
            complete = self._here(digest)
            staging = self.root / f".incoming-{digest}"
            if not complete:
                self._make_room(staging, manifest.stored(self.party))
                staging.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
                check_private(staging)
            self._uploads.add(digest)
        return Incoming(self, manifest, seeds, digest, staging, complete)

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
    """One upload: explicit components are appended in order, each in pieces; `verify` and `accept` make it a
    model.

    `close` ends the upload and keeps what came; `discard` throws it away. The seeds are not kept before
    `accept`: whoever resumes the upload brings them again.
    """

    def __init__(
        self,
        store: ModelStore,
        manifest: Manifest,
        seeds: tuple[ShareSeed, ShareSeed],
        digest: str,
        staging: Path,
        complete: bool,
    ) -> None:
        self.manifest = manifest
        self.digest = digest
        self.complete = complete  # the model is already here: nothing to send
        self._store = store
        self._seeds = seeds
        self._staging = staging
        self._tensors = manifest.held(store.party)
        self._writers: dict[str, Writer] = {}
        self._verified = complete
        if not complete:
            for tensor in self._tensors.values():
                self._begin(tensor)

    def have(self) -> dict[str, int]:
        """Per tensor whose explicit component this party holds, the bytes that are already here."""
        return {name: self._size(tensor) for name, tensor in self._tensors.items()}

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Append a piece; it must start where the last one ended."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise BadInput(f"model {self.manifest.name}: no words of {name!r} belong to this party")
        size = self._size(tensor)
        if self.complete or offset != size or size + len(data) > tensor.nbytes:
            raise BadInput(f"{name}: {len(data)} bytes at {offset} do not follow the {size} that are here")
        self._writers[name].write(data)

    def verify(self) -> dict[int, str]:
        """Hash everything; returns {component: digest} for the comparison with its other holder.

        On a wrong hash the bad file is thrown away, so that a resumed upload sends it again.
        """
        party = self._store.party
        for index, tensor in enumerate(self.manifest.tensors):
            if self.complete or tensor.name not in self._tensors:
                continue
            size = self._size(tensor)
            if size != tensor.nbytes:
                raise BadInput(f"{tensor.name}: {size} of {tensor.nbytes} bytes have arrived")
            if self._hash(index, tensor) != tensor.sha256:
                self._path(tensor.name).unlink()
                self._begin(tensor)
                raise WrongShare(f"{tensor.name}: what arrived has not the manifest's hash; send again")
        self._verified = True
        held = [(party + number) % COMPONENTS for number in (0, 1)]
        return {component: self.manifest.component_digest(component) for component in held}

    def accept(self) -> None:
        """Make the verified upload a model, atomically: after a crash it is there whole or not at all."""
        if not self._verified:
            raise LocalError("accept called before verify")
        if self.complete:
            return
        for name in self._writers:
            at_rest.sync(self._path(name))
        versions = {
            self._store._name(self.digest, name): w.header.version for name, w in self._writers.items()
        }
        versions[f"{self._store.party}/{self.digest}/{SEEDS}"] = self._keep_seeds()
        at_rest.replace_file(self._staging / "manifest.json", self.manifest.canonical())
        at_rest.rename(self._staging, self._store.root / self.digest)
        at_rest.sync(self._store.root)
        # From here on it counts. Had we crashed before, `_tidy` would make it an upload again.
        self._store.vault.change(versions)
        self.complete = True

    def close(self) -> None:
        """End the upload; what arrived stays for a resumption, in whole chunks. Safe to call twice."""
        for writer in self._writers.values():
            writer.close()
        for seed in self._seeds:
            seed.wipe()
        self._store._end_upload(self.digest)

    def discard(self) -> None:
        """End the upload and delete what arrived: the owner or a peer lied about it."""
        if not self.complete:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.close()

    def _keep_seeds(self) -> bytes:
        """Write the seeds beside the words; the version of their file."""
        path = self._staging / SEEDS
        path.unlink(missing_ok=True)  # of an acceptance that a crash cut short
        name = f"{self._store.party}/{self.digest}/{SEEDS}"
        writer = self._store.vault.writer(PURPOSE, name, path, SEEDS_BYTES)
        for seed in self._seeds:
            with seed.reveal_to_kernel() as view:
                writer.write(view)
        at_rest.sync(path)
        return writer.header.version

    def _path(self, tensor: str) -> Path:
        return self._staging / f"{tensor}.words"

    def _begin(self, tensor: Tensor) -> None:
        name = self._store._name(self.digest, tensor.name)
        path = self._path(tensor.name)
        self._writers[tensor.name] = self._store.vault.writer(PURPOSE, name, path, tensor.nbytes)

    def _size(self, tensor: Tensor) -> int:
        return tensor.nbytes if self.complete else self._writers[tensor.name].size

    def _hash(self, index: int, tensor: Tensor) -> str:
        """Hash of what lies there, read back; of nothing if it does not open."""
        name = self._store._name(self.digest, tensor.name)
        number = (tensor.explicit - self._store.party) % COMPONENTS
        whole = component_hash(tensor.explicit, index, self._seeds[number])
        try:
            reader = self._store.vault.reader(
                PURPOSE, name, self._path(tensor.name), tensor.nbytes, listed=False
            )
            for piece in reader.pieces():
                whole.update(piece)
        except StoreError as error:
            log.warning("an upload was damaged on disk", why=str(error))
            return ""
        return whole.hexdigest()


def _words(pages: Pages, tensor: Tensor) -> Words:
    words = np.frombuffer(pages, tensor.dtype, tensor.elements).reshape(tensor.shape)
    words.flags.writeable = False
    return words
