"""Where a party's storage key comes from, and the counter that shows when its disk was put back.

A `KeySource` gives one 32-byte key, from which `mimir.vault` derives every key of what lies on disk:

    file        the key lies beside the configuration: development, and nothing else
    tpm         sealed to this machine's TPM and its boot registers
    kms         AWS KMS, which encrypts it to a key that an enclave's evidence names
    threshold   t of n brokers, each of which appraises this machine's evidence by its own policy
    oci         OCI Vault, for a broker's own share; nothing is attested

The counter is in the TPM where there is one. The others keep it in a file outside `data_dir`: whoever can put
that file back as well can put back everything, unnoticed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Protocol

import trio

from mimir import config
from mimir.errors import BadInput, LocalError, MimirError
from mimir.keys.file import FileCounter, FileSource
from mimir.keys.tpm import TpmSource
from mimir.net.identity import Identity, is_sealed
from mimir.secret import StorageKey
from mimir.vault import Counter


class KeySource(Protocol):
    """One place that a storage key comes from."""

    @property
    def protection(self) -> str:
        """What guards the key, in one line, for people."""

    @property
    def counter(self) -> Counter:
        """Outside `data_dir`. To be called from a thread that Trio started."""

    async def obtain(self) -> StorageKey:
        """The key; raises an error of ours that says what is missing or who refused."""

    async def create(self) -> None:
        """Make a fresh key and keep it where the source has it, never over one that is there."""


def open_source(keys: config.Keys, attester: config.Attester | None = None) -> KeySource:
    """The source that the settings name. `attester` makes the evidence that brokers ask for."""
    file, counter = keys.file, keys.counter
    if file is None or counter is None:
        raise LocalError("settings of keys that were never placed")
    if keys.source == "file":
        return FileSource(file, FileCounter(counter))
    if keys.source == "tpm":
        return TpmSource(file, keys.tpm)
    # Each loads what it needs, and no other: a party that is about to confine itself may have no threads yet.
    outside = FileCounter(counter)
    if keys.source == "kms" and keys.kms is not None:
        from mimir.keys.kms import KmsSource

        return KmsSource(file, outside, keys.kms)
    if keys.source == "oci" and keys.oci is not None:
        from mimir.keys.oci import OciSource

        return OciSource(file, outside, keys.oci)
    if keys.source == "threshold" and keys.threshold is not None:
        from mimir.keys.threshold import ThresholdSource

        return ThresholdSource(file, outside, keys.threshold, attester)
    raise LocalError(f"settings of keys that were never checked: {keys.source}")


#: Sources that reach out for the key: to other hosts, with credentials, from an enclave by vsock.
REMOTE = frozenset({"kms", "oci", "threshold"})
_MAX_WORDS = 4096


class NotObtained(MimirError):
    """The source did not give the key; the text and the exit code are those of its own error."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = code


def obtain_apart(keys: config.Keys, attester: config.Attester | None = None) -> StorageKey:
    """The key, fetched by a child process, so that this one never needs what fetching does: it can give up
    those hosts, credentials and kinds of sockets before it begins. Call it before there are threads. Raises
    `NotObtained`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code, said = 70, b"the process that fetches the storage key broke off"
        try:
            os.close(reading)
            with trio.run(open_source(keys, attester).obtain) as key, key.reveal_to_kernel() as view:
                code, said = 0, bytes(view)
        except MimirError as error:
            code, said = error.exit_code, str(error).encode()[:_MAX_WORDS]
        finally:
            with suppress(OSError):
                os.write(writing, bytes((code,)) + said)
            os._exit(0)
    os.close(writing)
    heard = bytearray()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while len(heard) <= _MAX_WORDS and (piece := pipe.read(_MAX_WORDS)):
            heard += piece
    os.waitpid(child, 0)
    if not heard or heard[0]:
        text = heard[1:].decode(errors="replace") or "the process that fetches the storage key died"
        raise NotObtained(heard[0] if heard else 70, text)
    del heard[0]
    return StorageKey(heard)


def load_identity(settings: config.Config, key: StorageKey) -> Identity:
    """A party's identity. In the clear it may lie only where the storage key does as well."""
    path = settings.identity_key
    if settings.keys.source != "file" and path.exists() and not is_sealed(path):
        raise BadInput(
            f'identity {path}: lies in the clear, which keys.source = "{settings.keys.source}" forbids; '
            f"run: mimir seal --config {settings.source}"
        )
    return Identity.load(path, key)
