"""Evidence of a TPM 2.0: a quote over boot registers and over PCR 16, where this party states its code.

"swtpm" is the same over a software TPM, and simulated by its name: nothing here can make it anything else.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import cbor2
import trio

from mimir.attest import tpm as verifier
from mimir.attest.evidence import MAX_ENDORSEMENT, Claims, Envelope
from mimir.attest.trail import Trail
from mimir.attesters import measurement, tpm2
from mimir.config import Address
from mimir.errors import AttestationError, BadInput, DeviceError

# Every register but 10: Linux measures each file that it opens there, so that it never stands still.
QUOTED = tuple(index for index in range(tpm2.PCRS) if index != 10)
# A TPM that lost its power does not vouch for its clock until it has passed what was last stored, and
# verifiers refuse it as long: four seconds with swtpm. With others it may be an hour, for which nobody waits
# here.
CLOCK_SECONDS, CLOCK_PAUSE = 10.0, 0.5
ATTEMPTS = 5  # another program may change a register between our commands
# Where a cloud that certifies its vTPM's key keeps the certificate, and the template of the key (Google's).
CERTIFIED = ((0x01C10002, 0x01C10003), (0x01C10000, 0x01C10001))
# Certificates of the endorsement keys, by the TCG's profile: RSA 2048, P-256; then the high range, P-384 and
# others.
EK_CERTIFICATES = (0x01C00002, 0x01C0000A, 0x01C00012, 0x01C00014, 0x01C00016, 0x01C00018, 0x01C0001C)
_LOGS = Path("/sys/kernel/security")


@dataclass(frozen=True)
class Endorsement:
    """A certificate of the TPM's endorsement key, as its maker left it: for people who enrol the TPM."""

    index: int
    sha256: str
    certificate: bytes


class TpmAttester:
    """Quotes of one TPM. `kind` is "tpm" for a TPM that the kernel has, "swtpm" for swtpm."""

    def __init__(self, kind: str, device: Path | Address, code: bytes, logs: Path = _LOGS) -> None:
        self.kind, self._device, self._code, self._logs = kind, device, code, logs
        self._turn = trio.Lock()

    async def check(self) -> None:
        """Raise unless there is a TPM that may have this kind."""
        if self.kind == "tpm" and not tpm2.is_device(self._device):
            raise BadInput(
                f'attester.device {self._device}: a TPM behind a socket is a program: its kind is "swtpm"'
            )
        async with tpm2.open_tpm(self._device) as tpm:
            await tpm.properties()

    async def attest(self, claims: Claims) -> Envelope:
        """State code and configuration in PCR 16, and quote it with the boot registers, bound to the claims.

        Each call connects anew, so that others may use the TPM in between, and a TPM that was restarted is
        measured into again. The quote is verified before it is given out. `DeviceError` where it cannot be
        had.
        """
        end = trio.current_time() + CLOCK_SECONDS
        async with self._turn:
            while True:
                envelope, safe = await self._quote(claims)
                if safe or trio.current_time() >= end:
                    return envelope
                await trio.sleep(CLOCK_PAUSE)

    async def _quote(self, claims: Claims) -> tuple[Envelope, bool]:
        """The evidence, and whether the TPM vouches for its clock."""
        async with tpm2.open_tpm(self._device) as tpm:
            template, certificate = await self._key(tpm)
            expected = measurement.code_pcr(self._code, claims.config)
            for _ in range(ATTEMPTS):
                await tpm.reset_pcr(measurement.CODE_PCR)
                for each in measurement.statements(self._code, claims.config):
                    await tpm.extend_pcr(measurement.CODE_PCR, each)
                quote = await tpm.quote(claims.qualifying_data(), QUOTED, template)
                pcrs = await tpm.read_pcrs(QUOTED)
                facts = self._verify(quote, pcrs, certificate, claims)
                if facts is not None and pcrs[measurement.CODE_PCR] == expected:
                    break
            else:
                raise DeviceError(f"TPM {self._device}: registers change faster than they can be quoted")
        parts = {
            "quote": quote.attest,
            "signature": quote.signature,
            "pcrs": {"sha256": pcrs},
            "ak": quote.public,
        }
        envelope = Envelope(
            self.kind,
            cbor2.dumps(parts, canonical=True),
            claims.encode(),
            {"ak_certificate": certificate} if certificate else {},
            self._log(),
        )
        return envelope, facts.attest.safe == 1

    def _verify(
        self, quote: tpm2.Quote, pcrs: dict[int, bytes], certificate: bytes, claims: Claims
    ) -> verifier.Facts | None:
        """What the quote says; None where registers changed meanwhile."""
        trail = Trail(self.kind)
        try:
            key = verifier.parse_public(quote.public, trail)
            facts = verifier.verify(
                quote.attest, quote.signature, key, {"sha256": pcrs}, datetime.now(UTC), kind=self.kind
            )
            trail.same("binding", claims.qualifying_data(), facts.binding)
            if certificate:
                own = verifier.certified_key(certificate, trail)
                trail.same("certificate", bytes.fromhex(own.spki_digest), bytes.fromhex(key.spki_digest))
        except AttestationError as error:
            if error.step == f"{self.kind}.pcr_digest":
                return None
            raise DeviceError(f"TPM {self._device}: its own quote does not verify: {error}") from None
        return facts

    async def _key(self, tpm: tpm2.Tpm) -> tuple[bytes, bytes]:
        """The template of the key to quote with, and its certificate if there is one."""
        if self.kind == "tpm":
            for certificate_at, template_at in CERTIFIED:
                certificate, template = await tpm.nv_read(certificate_at), await tpm.nv_read(template_at)
                if certificate and template and len(certificate) <= MAX_ENDORSEMENT:
                    return template, certificate
        return tpm2.AK_TEMPLATE, b""

    def _log(self) -> bytes:
        """The firmware's event log, if the kernel has one of this TPM and it is short enough to be sent."""
        found = re.fullmatch(r"/dev/tpm(?:rm)?([0-9]+)", str(self._device))
        if self.kind != "tpm" or found is None:
            return b""
        try:
            with open(self._logs / f"tpm{found[1]}" / "binary_bios_measurements", "rb") as file:
                raw = file.read(verifier.MAX_LOG + 1)
        except OSError:
            return b""
        return raw if len(raw) <= verifier.MAX_LOG else b""

    async def endorsements(self) -> tuple[Endorsement, ...]:
        """The certificates of endorsement keys that this TPM holds; none is verified here."""
        found = []
        async with tpm2.open_tpm(self._device) as tpm:
            for index in EK_CERTIFICATES:
                raw = await tpm.nv_read(index)
                if raw:
                    der = _exact(raw)
                    found.append(Endorsement(index, hashlib.sha256(der).hexdigest(), der))
        return tuple(found)


def _exact(raw: bytes) -> bytes:
    """A certificate without the padding behind it, where it is DER; else all of it."""
    if raw[:2] == b"\x30\x82":
        return raw[: 4 + int.from_bytes(raw[2:4], "big")]
    return raw
