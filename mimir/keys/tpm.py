"""A storage key sealed to this machine's TPM, and the TPM's own counter.

The TPM gives the key back only while the boot registers hold what they held when it was sealed. After an
update of firmware, boot loader or kernel (what the registers measure) it stays sealed for ever: `create` a
key anew, and have the models provisioned again. Whoever runs code on this machine after the same boot can
unseal as well: the registers say what was booted, not which program asks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from mimir import config
from mimir.attesters.tpm2 import Tpm, open_tpm
from mimir.errors import BadInput
from mimir.keys.file import create_file
from mimir.secret import StorageKey

MAX_BLOB = 4096


class TpmCounter:
    """An NV counter of the TPM. Called from threads that Trio started."""

    def __init__(self, settings: config.TpmKey) -> None:
        self._settings = settings

    def read(self) -> int:
        """The TPM's number; not 0 before the first `advance`, but it only grows."""
        return trio.from_thread.run(self._with, lambda tpm: tpm.counter_read(self._settings.counter))

    def advance(self) -> int:
        return trio.from_thread.run(self._with, lambda tpm: tpm.counter_increment(self._settings.counter))

    async def _with(self, act: Callable[[Tpm], Awaitable[int]]) -> int:
        async with open_tpm(self._settings.device) as tpm:
            await tpm.counter_define(self._settings.counter)
            return await act(tpm)


class TpmSource:
    """The sealed key lies in a file, of no use to any other TPM."""

    def __init__(self, path: Path, settings: config.TpmKey) -> None:
        self._path = path
        self._settings = settings
        self.counter = TpmCounter(settings)

    @property
    def protection(self) -> str:
        named = ", ".join(map(str, self._settings.pcrs))
        return f"the TPM at {self._settings.device}, while PCRs {named} are as they were"

    async def obtain(self) -> StorageKey:
        try:
            blob = self._path.read_bytes()[: MAX_BLOB + 1]
        except OSError as error:
            raise BadInput(
                f"sealed storage key {self._path}: {error.strerror}; `mimir keygen --kind storage "
                "--sealed-by FILE` makes one, FILE being this party's configuration"
            ) from None
        try:
            async with open_tpm(self._settings.device) as tpm:
                return StorageKey(await tpm.unseal(blob))
        except BadInput as error:
            raise BadInput(f"sealed storage key {self._path}: {error}") from None

    async def create(self) -> None:
        key = StorageKey.random()
        async with open_tpm(self._settings.device) as tpm:
            pcrs = await tpm.read_pcrs(self._settings.pcrs)
            with key.reveal_to_kernel() as view:
                blob = await tpm.seal(pcrs, view)
            await tpm.counter_define(self._settings.counter)
        create_file(self._path, blob)
