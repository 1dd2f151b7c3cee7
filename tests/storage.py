"""Stores for tests: one storage key for all, for each directory a counter that remembers; and models to fill
them with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mimir import kernels
from mimir.manifest import (
    COMPONENTS,
    Manifest,
    component_hash,
    seed_commitment,
    tensors_of,
)
from mimir.model.checkpoint import PlanSpec
from mimir.secret import ShareSeed, StorageKey
from mimir.store import ModelStore
from mimir.vault import Vault

KEY = bytes(range(32))
_counters: dict[Path, MemoryCounter] = {}


class MemoryCounter:
    """What a TPM would count."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def read(self) -> int:
        return self.count

    def advance(self) -> int:
        self.count += 1
        return self.count


def counter_of(root: Path) -> MemoryCounter:
    return _counters.setdefault(root, MemoryCounter())


def open_vault(root: Path, key: bytes = KEY, counter: Any = None) -> Vault:
    return Vault(root, StorageKey(key), counter or counter_of(root))


def open_store(root: Path, party: int, identities: Any, **options: Any) -> ModelStore:
    return ModelStore(open_vault(root), party, identities, **options)


@dataclass(frozen=True)
class Shared:
    """A sharing: its manifest, its three seeds, and per tensor the bytes of all three components."""

    manifest: Manifest
    raw_seeds: tuple[bytes, bytes, bytes]
    components: dict[str, list[bytes]]

    def seeds(self, party: int) -> tuple[ShareSeed, ShareSeed]:
        """Fresh copies of those that this party is sent."""
        return ShareSeed(self.raw_seeds[party]), ShareSeed(self.raw_seeds[(party + 1) % COMPONENTS])

    def words(self, name: str) -> bytes:
        """What is sent of a tensor: its explicit component."""
        explicit = {tensor.name: tensor.explicit for tensor in self.manifest.tensors}
        return self.components[name][explicit[name]]


def share(model: PlanSpec, parties: tuple[str, str, str], name: str = "toy", seed: int = 1) -> Shared:
    """Random components; explicit ones are as random as the others, so the weights are too."""
    rng = np.random.default_rng(seed)
    raw = (rng.bytes(32), rng.bytes(32), rng.bytes(32))
    tensors, components = [], {}
    for index, tensor in enumerate(tensors_of(model)):
        parts = []
        for component in range(COMPONENTS):
            words = np.empty(tensor.shape, tensor.dtype)
            kernels.prg(raw[component], index, words)
            parts.append(words.tobytes())
        parts[tensor.explicit] = rng.bytes(tensor.nbytes)
        whole = component_hash(tensor.explicit, index, ShareSeed(raw[tensor.explicit]))
        whole.update(parts[tensor.explicit])
        tensors.append(replace(tensor, sha256=whole.hexdigest()))
        components[tensor.name] = parts
    a, b, c = (seed_commitment(component, ShareSeed(each)) for component, each in enumerate(raw))
    manifest = Manifest(name, model, 16, parties, (a, b, c), tuple(tensors))
    return Shared(manifest, raw, components)


def upload(
    store: ModelStore, made: Shared, piece: int = 1 << 20, words: Mapping[str, bytes] | None = None
) -> None:
    """Have a store take its part of a sharing, from where it stands; `words` replace some of its own."""
    incoming = store.begin(made.manifest.public(), made.seeds(store.party))
    for name, have in incoming.have().items():
        data = (words or {}).get(name, made.words(name))
        for at in range(have, len(data), piece):
            incoming.write(name, at, data[at : at + piece])
    incoming.verify()
    incoming.accept()
    incoming.close()
