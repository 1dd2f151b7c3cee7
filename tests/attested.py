"""Parties that attest themselves by machines of ours, and may lie about anything. Tests only.

A `Machine` says what an honest party's admission would say; `lie` changes one thing of it. Its evidence is
genuine evidence of the authorities in attest_pki, so that what refuses a liar is the check in question.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from attest_pki import NOW, Tpm
from test_policy import ANCHORS, HEAD, RSA_TPM, TPM, entry, evidence_for, stored

from mimir import config
from mimir.admission import certificates
from mimir.attest import policy as policies
from mimir.attest.appraisal import Verdict, appraise
from mimir.attest.collateral import Collateral
from mimir.attest.evidence import Claims, Envelope, identity_hash
from mimir.attest.policy import SIGNATURE_SUFFIX, Policy, Signature, format_signatures, signed_message
from mimir.attest.trail import stamp
from mimir.attesters import Attester
from mimir.client.attestation import Answer, Basis, judge
from mimir.client.federation import Party
from mimir.hpke import HpkeKey
from mimir.net.identity import Identity
from mimir.net.messages import Message, nonce_source

NAMES = ("alpha", "beta", "gamma")


def digest_of(what: str) -> bytes:
    return hashlib.sha256(what.encode()).digest()


@dataclass
class Machine:
    """One party's evidence (`mimir.net.control.Evidence`)."""

    number: int
    identity: str  # hexadecimal
    policy: Policy
    config: bytes
    kind: str = "swtpm"
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    kem: HpkeKey = field(default_factory=HpkeKey)
    changes: dict[str, Any] = field(default_factory=dict)  # of the evidence's statement
    claim: Callable[[Claims], Claims] = lambda claims: claims
    lie: Callable[[dict[str, Any]], None] = lambda said: None  # changes statement and view in place
    peers: list[Machine] = field(default_factory=list)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None
    attester: Attester | None = None  # a real one, in place of the authorities in attest_pki

    @property
    def tunnel(self) -> bytes:
        return digest_of(f"tunnel of {self.identity}")

    def showed(self, peer: int) -> str:
        """Digest of the evidence that it showed to a peer."""
        return digest_of(f"{self.identity} to {peer}").hex()

    def claims(self, nonce: bytes, source: str, channel: bytes, role: str) -> Claims:
        first = int(self.at.timestamp()) - 60
        return Claims(
            role=role,
            node=f"party{self.number}",
            identity=identity_hash(bytes.fromhex(self.identity)),
            tunnel=self.tunnel,
            kem=self.kem.digest,
            nonce=nonce,
            nonce_source=source,
            not_before=first,
            not_after=first + 3600,
            policy=self.policy.digest(),
            channel=channel,
            config=self.config,
        )

    def envelope(self, nonce: bytes, source: str, channel: bytes, role: str = "party") -> Envelope:
        own = {"own": tpm_of(self.number, self.kind)} if "tpm" in self.kind else {}
        claims = self.claim(self.claims(nonce, source, channel, role))
        return evidence_for(self.kind, claims, **own | self.changes)

    async def evidence_for(self, nonce: bytes, nonce_source: str, channel: bytes, role: str) -> bytes:
        if self.error is not None:
            raise self.error
        if self.attester is not None:
            claims = self.claim(self.claims(nonce, nonce_source, channel, role))
            return (await self.attester.attest(claims)).encode()
        return self.envelope(nonce, nonce_source, channel, role).encode()

    def said(self) -> dict[str, Any]:
        """Statement and view together, with its lies."""
        said: dict[str, Any] = {
            "tunnel": self.tunnel,
            "kem": self.kem.public,
            "shown": [{"party": each.number, "evidence": [self.showed(each.number)]} for each in self.peers],
            "certificates": [dict(each) for each in self.certificates],
            "admission": {
                "mode": "required",
                "policy": {
                    "name": self.policy.name,
                    "version": self.policy.version,
                    "digest": self.policy.digest().hex(),
                },
                "kind": self.kind,
                "simulated": self.kind == "swtpm",
                "peers": [self.sees(each) for each in self.peers],
                "revocation_epoch": 4,
            },
        }
        self.lie(said)
        return said

    def sees(self, peer: Machine) -> dict[str, Any]:
        until = self.at.replace(microsecond=0) + timedelta(minutes=50)
        return {
            "party": peer.number,
            "state": "admitted",
            "entry": "it",
            "kind": peer.kind,
            "simulated": peer.kind == "swtpm",
            "valid_until": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "evidence": peer.showed(self.number),
            "tunnel_key": peer.tunnel.hex(),
            "attempts": 1,
            "refusal": None,
            "seconds": 12.5,
        }

    def statement(self) -> dict[str, Any]:
        said = self.said()
        return {name: said[name] for name in ("tunnel", "kem", "shown", "certificates")}

    def view(self) -> dict[str, Any]:
        view: dict[str, Any] = self.said()["admission"]
        return view


@dataclass
class Three:
    """Three parties, a client, and what it judges by; without a network."""

    machines: list[Machine]
    parties: list[Party]
    terms: list[dict[str, Any]]
    basis: Basis
    client: str
    now: datetime
    identities: list[Identity]
    nonce: bytes = digest_of("nonce")
    silent: set[int] = field(default_factory=set)
    tamper: Callable[[int, Message], None] = lambda number, message: None

    @classmethod
    def make(cls, kind: str = "swtpm", now: datetime = NOW, text: str = "") -> Three:
        basis = replace(basis_of(text or text_for(kind, now + timedelta(days=1))), collateral=stored(now))
        policy = basis.policy
        made = [Identity.generate() for _ in NAMES]
        identities = [each.public_hex for each in made]
        terms = {"parties": identities, "tunnel.mode": "wireguard", "topk": 40}
        digest = config.terms_digest(terms)
        machines = [Machine(n, key, policy, digest, kind, now) for n, key in enumerate(identities)]
        introduce(machines)
        parties = [Party(n, "192.0.2.1", 7100, key) for n, key in zip(NAMES, identities, strict=True)]
        return cls(machines, parties, [dict(terms) for _ in NAMES], basis, "ab" * 32, now, made)

    def certify(self) -> None:
        """Have each issue certificates to the other two, as an admission with TLS would."""
        for of in self.machines:
            verdict = self.verdict_of(of)
            key = certificates.TlsKey()
            of.certificates = [
                {
                    "issuer": by.number,
                    "certificate": certificates.issue(
                        self.identities[by.number],
                        of.identity,
                        key.public,
                        replace(verdict, evidence=of.showed(by.number)),
                        self.now,
                    ),
                }
                for by in of.peers
            ]

    def verdict_of(self, of: Machine) -> Verdict:
        """A peer's of its evidence."""
        claims = of.claims(self.nonce, "admission", self.channel(of.number), "party")
        raw = of.envelope(self.nonce, "admission", self.channel(of.number)).encode()
        return appraise(raw, of.policy, self.basis.collateral, claims, self.now, ANCHORS)

    def channel(self, number: int) -> bytes:
        return digest_of(f"channel {number}")

    def answers(self) -> list[Answer]:
        out = []
        for machine in self.machines:
            n, channel = machine.number, self.channel(machine.number)
            asked = self.now - timedelta(seconds=0.25)
            if n in self.silent:
                out.append(Answer(self.nonce, channel, asked, None, "it said nothing"))
                continue
            envelope = machine.envelope(self.nonce, nonce_source(self.client), channel).encode()
            message = {
                "t": "evidence",
                "envelope": envelope,
                "config": machine.config.hex(),
                "terms": self.terms[n],
                "rotations": [{"party": each.number, "epoch": 3, "age": 7.5} for each in machine.peers],
                **machine.said(),
            }
            self.tamper(n, message)
            out.append(Answer(self.nonce, channel, asked, message))
        return out

    def judge(self, **changes: Any) -> Any:
        given: dict[str, Any] = {
            "answers": self.answers(),
            "parties": self.parties,
            "client": self.client,
            "basis": self.basis,
            "now": self.now,
            "anchors": ANCHORS,
        }
        return judge(**given | changes)


def introduce(machines: Sequence[Machine]) -> None:
    """Have each admit the others."""
    for each in machines:
        each.peers = [peer for peer in machines if peer is not each]


def text_for(kind: str, until: datetime) -> str:
    """A policy file that wants the evidence made here."""
    environment = "simulation" if kind == "swtpm" else "production"
    head = HEAD.format(environment=environment).replace("2027-01-01T00:00:00Z", stamp(until))
    names = ", ".join(f'"{tpm_of(number, kind).name}"' for number in range(3)) if kind.endswith("tpm") else ""
    return head + entry(kind).replace(f'"{TPM.name}"', names)


def tpm_of(number: int, kind: str) -> Tpm:
    """A party's own TPM."""
    return (TPM if kind in ("tpm", "swtpm") else RSA_TPM).with_label(f"ak{number}")


def basis_of(text: str, threshold: int = 2, signers: int = 2, **changes: Any) -> Basis:
    """The policy in a text, signed by the first `signers` of three owners."""
    policy = policies.parse(tomllib.loads(text), Path("policy.toml").absolute())
    owners = [Identity.generate() for _ in range(3)]
    signed = tuple(
        Signature(each.public_hex, each.sign(signed_message(policy)).hex()) for each in owners[:signers]
    )
    keys = tuple(each.public_hex for each in owners)
    return Basis(policy, text, signed, format_signatures(signed), keys, threshold, Collateral(), **changes)


def write_basis(folder: Path, basis: Basis) -> str:
    """Its files, and the table [attestation] that names them."""
    (folder / "policy.toml").write_text(basis.policy_text)
    (folder / f"policy.toml{SIGNATURE_SUFFIX}").write_text(basis.signatures_text)
    owners = ", ".join(f'"{each}"' for each in basis.owners)
    return f'[attestation]\npolicy = "policy.toml"\nowners = [{owners}]\nthreshold = {basis.threshold}\n'
