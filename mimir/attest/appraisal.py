"""From an envelope to a verdict: take apart, verify, bind, judge. The one way in for those who admit peers.

`appraise` needs to know what is expected of the peer; without that there is no admission. `examine` is for
people: it says what evidence is and which entries it satisfies, and its result cannot be taken for a verdict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from mimir.attest import azure, nitro, snp, tdx, tpm
from mimir.attest.collateral import AUTHORITIES, Collateral, Item, vek_name
from mimir.attest.evidence import Claims, Envelope, expect
from mimir.attest.policy import Facts, Policy
from mimir.attest.trail import Anchor, Step, Trail, stamp
from mimir.errors import AttestationError


@dataclass(frozen=True)
class Anchors:
    """The roots that are believed, as SHA-256 of their certificates. The defaults are the real ones."""

    amd: Mapping[str, str] = field(default_factory=lambda: snp.ROOTS)
    intel: Collection[str] = tdx.ROOTS
    nitro: Collection[str] = nitro.ROOTS
    tpm: Mapping[str, tpm.Root] = field(default_factory=lambda: tpm.ROOTS)


REAL = Anchors()


@dataclass(frozen=True)
class Verdict:
    """A peer is admitted by this entry of this policy, until then, for these reasons."""

    kind: str
    simulated: bool
    entry: str
    claims: Claims
    tcb: str
    advisories: tuple[str, ...]
    cautions: tuple[str, ...]
    policy: str  # digest, hex
    policy_version: int
    evidence: str  # SHA-256 of the envelope, hex
    valid_until: datetime
    steps: tuple[Step, ...]
    anchor: Anchor
    fetched: datetime | None  # when the oldest collateral that was used came from its authority
    measurements: tuple[str, ...]  # that the evidence shows, hex: what a revocation may name
    machine: tuple[tuple[str, str], ...]  # what tells it from others: "ak_spki", "chip_ids" and their values

    def public(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "verdict": "accept",
            "kind": self.kind,
            "simulated": self.simulated,
            "entry": self.entry,
            "tcb": self.tcb,
            "advisories": list(self.advisories),
            "cautions": list(self.cautions),
            "policy": self.policy,
            "policy_version": self.policy_version,
            "evidence": self.evidence,
            "valid_until": stamp(self.valid_until),
            "anchor": vars(self.anchor),
            "fetched": None if self.fetched is None else stamp(self.fetched),
            "measurements": list(self.measurements),
            "steps": [vars(each) for each in self.steps],
        }


def appraise(
    raw: bytes,
    policy: Policy,
    collateral: Collateral,
    expected: Claims,
    now: datetime,
    anchors: Anchors = REAL,
) -> Verdict:
    """Admit a peer by its evidence, or raise `AttestationError` that names the first step that does not hold.

    `expected` is what the verifier itself knows: the peer's keys, the nonce it sent, the digests of policy
    and configuration; its times are not looked at. An error's `passed` are all steps before it.
    """
    trail = Trail("claims")
    facts: Facts | None = None
    try:
        policy.check_time(now, Trail("policy"))
        trail.same("policy", policy.digest(), expected.policy)
        envelope = Envelope.decode(raw)
        own = expect(Claims.decode(envelope.claims, trail), expected, now, trail)
        denied = {("identities", own.identity.hex()), ("tunnels", own.tunnel.hex())}
        policy.check_deny(denied, Trail("policy"))
        facts, fetched = verify(envelope, collateral, now, policy.grace, anchors)
        bind(facts, own, trail)
        entry, judged = policy.judge(facts, now, fetched)
    except AttestationError as error:
        before = [*(facts.steps if facts is not None else ()), *trail.steps]
        more = [each for each in error.passed if each not in before]
        raise AttestationError(error.step, error.expected, error.got, (*before, *more)) from None
    ends = [policy.not_after, now + timedelta(seconds=policy.freshness.reattest_s)]
    ends += [facts.until] if facts.until is not None else []
    return Verdict(
        facts.kind,
        envelope.simulated,
        entry.id,
        own,
        facts.tcb_text,
        facts.advisories,
        facts.cautions,
        policy.digest().hex(),
        policy.version,
        hashlib.sha256(raw).hexdigest(),
        min(ends),
        (*facts.steps, *trail.steps, *judged),
        facts.anchor,
        fetched,
        tuple(sorted(value for kind, value in facts.names() if kind == "measurements")),
        tuple(sorted(name for name in facts.names() if name[0] in ("ak_spki", "chip_ids"))),
    )


def bind(facts: Facts, claims: Claims, trail: Trail) -> None:
    """Require that the evidence was made for exactly these claims."""
    if facts.kind in ("snp", "tdx"):
        trail.same("binding", claims.report_data(), facts.binding)
    elif isinstance(facts, nitro.Facts):
        trail.same("binding", claims.report_data(), facts.binding)
        trail.same("nonce", claims.nonce, facts.document.nonce)
    else:
        trail.same("binding", claims.qualifying_data(), facts.binding)


# --- verification by kind ----------------------------------------------------------------------------------


class _Used:
    """Takes collateral, and remembers the age of the oldest item that may tell of a revocation."""

    def __init__(self, collateral: Collateral) -> None:
        self._collateral = collateral
        self.oldest: datetime | None = None

    def take(self, name: str, *, ages: bool = False) -> bytes | None:
        item: Item | None = self._collateral.get(name)
        if item is None:
            return None
        if not ages:  # certificates do not change
            return item.data
        self.oldest = item.fetched if self.oldest is None else min(self.oldest, item.fetched)
        return item.data


def verify(
    envelope: Envelope, collateral: Collateral, now: datetime, grace: timedelta, anchors: Anchors = REAL
) -> tuple[Facts, datetime | None]:
    """The facts that evidence establishes, and when the oldest collateral used for them was fetched."""
    used = _Used(collateral)
    kind = envelope.kind
    facts: Facts
    if kind == "snp":
        facts = _snp(envelope.evidence, envelope, used, now, grace, anchors)
    elif kind == "tdx":
        facts = _tdx(envelope.evidence, envelope.log, used, now, grace, anchors)
    elif kind == "nitro":
        facts = nitro.verify(envelope.evidence, now, roots=anchors.nitro)
    else:
        facts = _parts(envelope, used, now, grace, anchors)
    return facts, used.oldest


def _snp(
    report: bytes, envelope: Envelope, used: _Used, now: datetime, grace: timedelta, anchors: Anchors
) -> snp.Facts:
    """The chip's certificate comes with the evidence or from the store, the list from the store alone."""
    trail = Trail("snp")
    parsed = snp.parse(report, trail)
    vek = envelope.endorsements.get("vek")
    if vek is None:
        names = [vek_name(parsed, product) for product in snp.ROOTS]
        vek = next((found for name in names if (found := used.take(name)) is not None), None)
    if vek is None:
        trail.refuse("vek", "the chip's certificate, with the evidence or in the store", "none")
    key = snp.parse_vek(vek, trail)
    chain = envelope.endorsements.get("chain") or used.take(f"amd/{key.product}/{key.kind}.pem")
    if chain is None:
        trail.refuse("chain", f"AMD's chain for {key.product}, with the evidence or in the store", "none")
    crl = used.take(f"amd/{key.product}/crl.der", ages=True)
    return snp.verify(report, vek, chain, now, roots=anchors.amd, crl=crl, grace=grace)


def _tdx(
    quote: bytes, log: bytes, used: _Used, now: datetime, grace: timedelta, anchors: Anchors
) -> tdx.Facts:
    trail = Trail("tdx")
    parsed = tdx.parse(quote, trail)
    fmspc = tdx.peek_fmspc(parsed, trail)
    found = used.take(f"intel/{fmspc}.json", ages=True)
    if found is None:
        trail.refuse("collateral", f"Intel's collateral for FMSPC {fmspc} in the store", "none")
    facts = tdx.verify(quote, found, now, roots=anchors.intel, grace=grace)
    if log:
        # Registers are numbered from 1 in a CCEL table, of which RTMR0 is the first.
        for index, value in tpm.replay(tpm.parse_log(log, trail).events, "sha384", trail).items():
            held = facts.quote.rtmr[index - 1] if 1 <= index <= 4 else b""
            trail.same(f"log.rtmr{index - 1}", value, held)
    return facts


def _parts(
    envelope: Envelope, used: _Used, now: datetime, grace: timedelta, anchors: Anchors
) -> tpm.Facts | azure.Facts:
    parts, trail = envelope.parts(), Trail(envelope.kind)
    certificate = envelope.endorsements.get("ak_certificate", b"")
    authorities = envelope.endorsements.get("ak_authorities", b"") + (used.take(AUTHORITIES) or b"")
    hcl = None
    if "hcl" in parts:
        hcl = tpm.parse_hcl(parts["hcl"], trail)
        key = hcl.key
    elif "ak" in parts:
        key = tpm.parse_public(parts["ak"], trail)
    elif certificate:
        key = tpm.certified_key(certificate, trail)
    else:
        trail.refuse("ak", "the key's TPMT_PUBLIC, or its certificate", "neither")
    vtpm = tpm.verify(
        parts["quote"],
        parts["signature"],
        key,
        parts["pcrs"],
        now,
        certificate=certificate,
        authorities=authorities,
        roots=anchors.tpm,
        log=envelope.log,
        bare=hcl is not None,
        kind=envelope.kind if hcl is None else "tpm",
    )
    if hcl is None:
        return vtpm
    hardware: snp.Facts | tdx.Facts
    if "td_quote" in parts:
        hardware = _tdx(parts["td_quote"], b"", used, now, grace, anchors)
    else:
        hardware = _snp(hcl.report, envelope, used, now, grace, anchors)
    return azure.verify(hcl, hardware, vtpm)


# --- for people --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examination:
    """What evidence is and how each entry takes it. Nothing was expected of the peer: this admits nobody."""

    kind: str
    simulated: bool
    claims: Claims | None
    steps: tuple[Step, ...]
    failed: AttestationError | None  # where verification ended, if it did
    bound: AttestationError | None  # why the carried claims are not what the evidence signs
    entries: tuple[tuple[str, AttestationError | None], ...]  # each entry of this kind, and why not
    judged: AttestationError | None
    tcb: str = ""
    advisories: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def satisfied(self) -> bool:
        """Whether a verifier that expects these very claims would be satisfied."""
        return self.failed is None and self.bound is None and self.judged is None


def examine(
    raw: bytes, policy: Policy, collateral: Collateral, now: datetime, anchors: Anchors = REAL
) -> Examination:
    """Everything that can be said of evidence without knowing whose it should be."""
    envelope = Envelope.decode(raw)
    kind, simulated = envelope.kind, envelope.simulated
    claims: Claims | None = None
    trail = Trail("claims")
    try:
        claims = Claims.decode(envelope.claims, trail)
        facts, fetched = verify(envelope, collateral, now, policy.grace, anchors)
    except AttestationError as error:
        return Examination(kind, simulated, claims, error.passed, error, None, (), None)
    bound = judged = None
    try:
        bind(facts, expect(claims, claims, now, trail), trail)
    except AttestationError as error:
        bound = error
    entries = []
    for entry in policy.allow:
        if entry.kind == facts.kind:
            failed = None
            try:
                entry.rule.judge(facts, Trail("policy"))  # type: ignore[arg-type]
            except AttestationError as error:
                failed = error
            entries.append((entry.id, failed))
    steps = facts.steps
    try:
        denied = {("identities", claims.identity.hex()), ("tunnels", claims.tunnel.hex())}
        policy.check_deny(denied, Trail("policy"))
        _, found = policy.judge(facts, now, fetched)
        steps += found
    except AttestationError as error:
        judged = error
    return Examination(
        kind,
        simulated,
        claims,
        (*steps, *(trail.steps if bound is None else ())),
        None,
        bound,
        tuple(entries),
        judged,
        facts.tcb_text,
        facts.advisories,
        facts.cautions,
    )
