"""Evidence of AMD SEV-SNP and Intel TDX, by the kernel's one interface for both: configfs-tsm (Linux 6.7).

A report is a directory: made, its `inblob` written, its `outblob` read, removed. Each call has a directory of
its own, and `generation` must have risen by exactly our writes: so nobody else wrote meanwhile. The kernel
gives the chip's certificate for SNP in `auxblob`, where the host has put it there: a table of GUIDs (GHCB,
4.1.8.1).

Source: Documentation/ABI/testing/configfs-tsm-report of Linux.
"""

from __future__ import annotations

import base64
import os
import secrets
import textwrap
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import trio

from mimir.attest import snp, tdx
from mimir.attest.evidence import MAX_ENDORSEMENT, MAX_EVIDENCE, Claims, Envelope
from mimir.attest.trail import Trail
from mimir.errors import AttestationError, DeviceError, EnvironmentMissing

PROVIDERS = {"snp": "sev_guest", "tdx": "tdx_guest"}
SECONDS = 120.0  # the firmware may make guests wait, and a quote goes by way of the host
MAX_TEXT = 64
MAX_LEVEL = 3  # of VMPLs
MAX_ENTRIES = 32
ENTRY = 24  # bytes: GUID, offset, length
# GUIDs of certificates, in the byte order of RFC 4122 as AMD's tools write them.
VCEK = UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes
VLEK = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1").bytes
ASK = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782").bytes
ARK = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae").bytes


@dataclass(frozen=True)
class Report:
    """What the kernel gave: the report or quote, and what came beside it."""

    outblob: bytes
    auxblob: bytes


class TsmAttester:
    """Reports of the machine that this guest runs in. `kind` is "snp" or "tdx"."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self._folder = kind, folder

    async def check(self) -> None:
        """Raise unless the kernel can make reports of this kind."""
        await trio.to_thread.run_sync(self._check)

    async def attest(self, claims: Claims) -> Envelope:
        """A report whose data is the hash of the claims. `DeviceError` where it cannot be had."""
        report = None
        with trio.move_on_after(SECONDS):
            # Left to itself if it takes longer: the thread removes its directory when the kernel lets it.
            report = await trio.to_thread.run_sync(self._report, claims.report_data(), abandon_on_cancel=True)
        if report is None:
            raise DeviceError(f"{self._folder}: no report within {SECONDS:g} s")
        trail = Trail(self.kind)
        try:
            if self.kind == "snp":
                parsed = snp.parse(report.outblob, trail)
                trail.same("binding", claims.report_data(), parsed.report_data)
                endorsements = _certificates(report.auxblob, parsed.signing_key, self._folder)
            else:
                trail.same("binding", claims.report_data(), tdx.parse(report.outblob, trail).report_data)
                endorsements = {}
        except AttestationError as error:
            raise DeviceError(f"{self._folder}: the kernel's report is of no use: {error}") from None
        return Envelope(self.kind, report.outblob, claims.encode(), endorsements)

    # --- in a thread: configfs blocks ---

    def _check(self) -> None:
        entry = self._make()
        try:
            self._check_provider(entry)
        except OSError as error:
            raise DeviceError(f"{self._folder}: {error.strerror}") from None
        finally:
            self._remove(entry)

    def _report(self, data: bytes) -> Report:
        entry = self._make()
        try:
            return self._ask(entry, data)
        except OSError as error:
            raise DeviceError(f"{self._folder}: no report: {error.strerror}") from None
        finally:
            self._remove(entry)

    def _make(self) -> Path:
        entry = self._folder / f"mimir-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            entry.mkdir()
        except OSError as error:
            raise EnvironmentMissing(
                f"{self._folder}: {error.strerror}; evidence of kind {self.kind} needs Linux 6.7 with "
                "CONFIG_TSM_REPORTS and the guest driver, configfs mounted, and the right to write there"
            ) from None
        return entry

    def _remove(self, entry: Path) -> None:
        try:
            entry.rmdir()
        except OSError as error:
            raise DeviceError(f"{entry}: cannot be removed: {error.strerror}") from None

    def _ask(self, entry: Path, data: bytes) -> Report:
        self._check_provider(entry)
        generation = self._number(entry, "generation")
        floor = entry / "privlevel_floor"
        if floor.exists():  # SNP, where a paravisor below us may have the lower levels
            level = self._number(entry, "privlevel_floor")
            if level > MAX_LEVEL:
                raise DeviceError(f"{floor}: {level}, at most {MAX_LEVEL} expected")
            if level:
                (entry / "privlevel").write_bytes(b"%d" % level)
                generation += 1
        # Unbuffered and in one piece: the kernel takes an attribute as a whole.
        with (entry / "inblob").open("wb", buffering=0) as file:
            if file.write(data) != len(data):
                raise DeviceError(f"{entry}/inblob: taken in part")
        generation += 1
        outblob = self._read(entry / "outblob", MAX_EVIDENCE)
        auxiliary = entry / "auxblob"
        auxblob = self._read(auxiliary, MAX_ENDORSEMENT) if auxiliary.exists() else b""
        now = self._number(entry, "generation")
        if now != generation:
            raise DeviceError(f"{entry}: somebody else wrote there: generation {now}, {generation} expected")
        if not outblob:
            raise DeviceError(f"{entry}/outblob: empty")
        return Report(outblob, auxblob)

    def _check_provider(self, entry: Path) -> None:
        provider, wanted = self._text(entry, "provider"), PROVIDERS[self.kind]
        if provider != wanted:
            raise DeviceError(
                f'{self._folder}: this machine\'s reports are of "{provider}"; attester.kind = "{self.kind}" '
                f"is for {wanted}"
            )

    def _number(self, entry: Path, name: str) -> int:
        text = self._text(entry, name)
        if not text.isascii() or not text.isdigit():
            raise DeviceError(f"{entry / name}: a number expected")
        return int(text)

    def _text(self, entry: Path, name: str) -> str:
        text = self._read(entry / name, MAX_TEXT).decode("ascii", "replace").strip()
        if not text.isprintable():
            raise DeviceError(f"{entry / name}: a word expected")
        return text

    @staticmethod
    def _read(path: Path, limit: int) -> bytes:
        raw = b""
        with path.open("rb", buffering=0) as file:
            while len(raw) <= limit:
                piece = file.read(limit + 1 - len(raw))
                if not piece:
                    return raw
                raw += piece
        raise DeviceError(f"{path}: more than {limit} bytes")


def _certificates(table: bytes, signing_key: str, folder: Path) -> dict[str, bytes]:
    """What an SNP certificate table has for a report that this kind of key signed. An empty table, or one
    without our certificate, gives nothing: the verifier then takes it from its own store."""
    found = parse_table(table, folder)
    vek = found.get(VCEK if signing_key == "vcek" else VLEK, b"")
    if not vek:
        return {}
    made = {"vek": vek}
    # The table's ASK is the signer of VCEKs; that of VLEKs has no place there.
    if signing_key == "vcek" and ASK in found and ARK in found:
        made["chain"] = _pem(found[ASK]) + _pem(found[ARK])
    return made


def parse_table(table: bytes, folder: Path) -> dict[bytes, bytes]:
    """The certificates of a table by GUID. `DeviceError` for one that points out of itself or has no end."""
    if not any(table):
        return {}
    found: dict[bytes, bytes] = {}
    for at in range(0, ENTRY * MAX_ENTRIES, ENTRY):
        entry = table[at : at + ENTRY]
        if len(entry) < ENTRY:
            break
        guid = entry[:16]
        offset, length = (int.from_bytes(entry[a : a + 4], "little") for a in (16, 20))
        if not any(guid):
            return found
        if offset + length > len(table) or guid in found:
            raise DeviceError(f"{folder}: a certificate table that points out of itself, or repeats itself")
        found[guid] = table[offset : offset + length]
    raise DeviceError(f"{folder}: a certificate table without an end")


def _pem(certificate: bytes) -> bytes:
    if certificate.lstrip().startswith(b"-----BEGIN"):
        return certificate.strip() + b"\n"
    body = "\n".join(textwrap.wrap(base64.b64encode(certificate).decode(), 64))
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n".encode()
