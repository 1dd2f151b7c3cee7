"""What makes evidence of the machine that we run on. One kind each: `open_attester` gives what a party's file
says.

An attester checks what its device gave before it gives it out: signatures where it can, and that it is bound
to these claims. So what a peer refuses, it refuses for what this machine is, and not for a mishap.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from mimir import config
from mimir.attest.evidence import Claims, Envelope
from mimir.attesters.measurement import code_digest
from mimir.attesters.nsm import NsmAttester
from mimir.attesters.tpm import TpmAttester
from mimir.attesters.tsm import TsmAttester
from mimir.errors import BadInput


class Attester(Protocol):
    """Makes evidence of one kind."""

    @property
    def kind(self) -> str:
        """One of `attest.evidence.KINDS`."""

    async def attest(self, claims: Claims) -> Envelope:
        """Fresh evidence that is bound to these claims; `DeviceError` or `EnvironmentMissing` where there is
        none to be had. May be called from several tasks."""


@asynccontextmanager
async def open_attester(settings: config.Attester) -> AsyncIterator[Attester]:
    """The attester that these settings name. Raises at once if its device is absent or of another kind. The
    code is measured here, so that a later change on disk does not show in the evidence of what is running."""
    kind, place = settings.kind, settings.place
    made: TpmAttester | TsmAttester | NsmAttester
    if kind in ("tpm", "swtpm"):
        made = TpmAttester(kind, place, code_digest())
    elif not isinstance(place, Path):
        raise BadInput(f'attester.device {place}: kind "{kind}" is a device of this host, which has a path')
    elif kind == "nitro":
        made = NsmAttester(place)
    else:
        made = TsmAttester(kind, place)
    await made.check()
    yield made
