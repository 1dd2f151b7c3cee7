"""Stores for tests: one storage key for all, and for each directory a counter that remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimir.secret import StorageKey
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
