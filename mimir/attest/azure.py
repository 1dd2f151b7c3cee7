"""Azure's confidential machines: a vTPM whose key the hardware names, so one verdict over two evidences.

The processor (SNP or TDX) signs a report whose data is the hash of the paravisor's runtime data; that names
the vTPM's attestation key; that key signs the quote. The hardware's measurement is of Azure's paravisor, the
PCRs are of the guest. The TDREPORT in the HCL blob is signed by nobody: what is believed is the TD quote.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from mimir.attest import certs, snp, tdx, tpm
from mimir.attest.tpm import Hcl
from mimir.attest.trail import Anchor, Step, Trail


@dataclass(frozen=True)
class Facts:
    """What the two evidences establish together."""

    kind: str  # "az-snp-vtpm" or "az-tdx-vtpm"
    hardware: snp.Facts | tdx.Facts
    tpm: tpm.Facts
    hcl: Hcl
    steps: tuple[Step, ...]
    made: None = None

    @property
    def binding(self) -> bytes:
        return self.tpm.binding

    @property
    def lists(self) -> tuple[certs.Revocations | None, ...]:
        return self.hardware.lists

    @property
    def cautions(self) -> tuple[str, ...]:
        return self.hardware.cautions

    @property
    def advisories(self) -> tuple[str, ...]:
        return self.hardware.advisories

    @property
    def tcb_text(self) -> str:
        return self.hardware.tcb_text

    @property
    def anchor(self) -> Anchor:
        """The processor's: it vouches for the vTPM's key."""
        return self.hardware.anchor

    @property
    def until(self) -> datetime:
        ends = [self.hardware.until] + ([self.tpm.until] if self.tpm.until else [])
        return min(ends)

    def names(self) -> frozenset[tuple[str, str]]:
        """By what a deny list may call this evidence."""
        return self.hardware.names() | self.tpm.names()


def verify(hcl: Hcl, hardware: snp.Facts | tdx.Facts, vtpm: tpm.Facts) -> Facts:
    """Tie a verified hardware report, and a verified quote by the key of `hcl`, to one another."""
    kind = f"az-{hardware.kind}-vtpm"
    trail = Trail(kind)
    trail.require(hcl.hardware == hardware.kind, "hardware", hcl.hardware, hardware.kind)
    trail.same("runtime_data", hcl.digest, hardware.binding)
    trail.same("key", bytes.fromhex(hcl.key.spki_digest), bytes.fromhex(vtpm.key.spki_digest))
    return Facts(kind, hardware, vtpm, hcl, (*hardware.steps, *vtpm.steps, *trail.steps))


@dataclass(frozen=True)
class SnpRule:
    """[[allow]] kind = "az-snp-vtpm". [allow.snp] is of the paravisor, [allow.tpm] of the guest."""

    snp: snp.Rule
    tpm: tpm.Rule

    def flaw(self) -> str | None:
        """What no single key can tell, or None."""
        if self.snp.vmpl_max != 0:
            return "snp.vmpl_max: the paravisor runs at VMPL 0"
        return self.snp.flaw() or self.tpm.flaw(hardware=True)

    def judge(self, facts: Facts, trail: Trail) -> None:
        """Require that these facts satisfy both parts."""
        if not isinstance(facts.hardware, snp.Facts):
            trail.refuse("hardware", "snp", facts.hardware.kind)
        self.snp.judge(facts.hardware, trail)
        self.tpm.judge(facts.tpm, trail, hardware=True)


@dataclass(frozen=True)
class TdxRule:
    """[[allow]] kind = "az-tdx-vtpm". [allow.tdx] is of the paravisor, [allow.tpm] of the guest."""

    tdx: tdx.Rule
    tpm: tpm.Rule

    def flaw(self) -> str | None:
        """What no single key can tell, or None."""
        return self.tdx.flaw() or self.tpm.flaw(hardware=True)

    def judge(self, facts: Facts, trail: Trail) -> None:
        """Require that these facts satisfy both parts."""
        if not isinstance(facts.hardware, tdx.Facts):
            trail.refuse("hardware", "tdx", facts.hardware.kind)
        self.tdx.judge(facts.hardware, trail)
        self.tpm.judge(facts.tpm, trail, hardware=True)
