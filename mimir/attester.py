"""What `mimir attester` does: enrol this machine in a policy, and show the evidence that it makes."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from pathlib import Path

import trio

from mimir import config
from mimir.attest import policy
from mimir.attest.evidence import Claims, Envelope
from mimir.attesters import open_attester
from mimir.attesters.enrolment import enrol
from mimir.attesters.tpm import Endorsement, TpmAttester
from mimir.client.terminal import Terminal
from mimir.errors import BadInput

LIFE = 3600  # seconds: of evidence that is shown
_SPKI = bytes.fromhex("302a300506032b6570032100")  # before the 32 bytes of an Ed25519 key


def enroll(options: argparse.Namespace, terminal: Terminal) -> int:
    """Print this machine's names and measurements, and the entry that admits it."""
    envelope, keys = trio.run(_make, *_given(options))
    found = enrol(envelope, options.id, configured=options.config is not None)
    terminal.event(
        "enrolment",
        kind=found.kind,
        simulated=found.simulated,
        ak_name=found.ak_name,
        ek_certificates={f"{each.index:#010x}": each.sha256 for each in keys},
        values=dict(found.values),
        entry=found.entry,
    )
    terminal.note(
        f"kind     {found.kind}{'  SIMULATED: proves nothing of the machine' if found.simulated else ''}"
    )
    if found.ak_name:
        terminal.note(f"AK name  {found.ak_name}")
        for each in keys:
            terminal.note(f"EK cert  {each.index:#x} sha256 {each.sha256}")
        if not keys:
            terminal.note("EK cert  none in this TPM")
    for name, value in found.values.items():
        terminal.note(f"{name:8} {value}")
    terminal.text(found.entry)
    return 0


def show(options: argparse.Namespace, terminal: Terminal) -> int:
    """Make evidence for a nonce of our own, and write the envelope for `mimir policy explain` to read."""
    envelope, _ = trio.run(_make, *_given(options))
    raw = envelope.encode()
    if options.out:
        try:
            Path(options.out).write_bytes(raw)
        except OSError as error:
            raise BadInput(f"{options.out}: {error.strerror}") from None
    terminal.event(
        "evidence",
        kind=envelope.kind,
        simulated=envelope.simulated,
        bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        envelope=raw.hex(),
    )
    terminal.note(
        f"evidence of kind {envelope.kind}, {len(raw)} bytes, sha256 {hashlib.sha256(raw).hexdigest()}"
    )
    if not options.out:
        terminal.text(raw.hex() + "\n")
    return 0


def _given(options: argparse.Namespace) -> tuple[config.Attester, Claims]:
    """Which attester, and the claims: those of the party whose file is given, else of nobody."""
    given = config.load(options.config) if options.config is not None else None
    settings = given.attester if given is not None else None
    if options.kind is not None:
        device = None
        if options.device is not None:
            try:
                device = config.device_rule(options.device, Path.cwd())
            except ValueError as error:
                raise BadInput(f"--device {options.device}: must be {error}") from None
        settings = config.Attester(options.kind, device)
    elif options.device is not None:
        raise BadInput("--device needs --kind as well")
    if settings is None:
        raise BadInput("which attester? --kind and --device, or --config with a file that has [attester]")
    wanted = policy.load(options.policy).digest() if getattr(options, "policy", None) else bytes(32)
    now = int(time.time())
    return settings, Claims(
        role="party",
        node=given.me.name if given else "nobody",
        identity=hashlib.sha256(_SPKI + bytes.fromhex(given.me.identity)).digest() if given else bytes(32),
        tunnel=bytes(32),
        kem=None,
        nonce=os.urandom(32),
        nonce_source="mimir attester",
        not_before=now,
        not_after=now + LIFE,
        policy=wanted,
        channel=None,
        config=given.digest() if given else bytes(32),
    )


async def _make(settings: config.Attester, claims: Claims) -> tuple[Envelope, tuple[Endorsement, ...]]:
    async with open_attester(settings) as attester:
        envelope = await attester.attest(claims)
        keys = await attester.endorsements() if isinstance(attester, TpmAttester) else ()
    return envelope, keys
