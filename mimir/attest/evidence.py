"""What a peer sends: evidence of one kind in an envelope, and the claims that the evidence is bound to.

Claims say who the peer is, which tunnel key carries its traffic, for which nonce, policy and configuration,
and when. The evidence signs a hash of them, so it is of no use with another peer's key or another question:

    SNP, TDX      report data     SHA-512(TAG || 0 || claims)
    Nitro         user data       the same; and the document's nonce is the claims' nonce
    TPM, Azure    extra data      SHA-256(TAG || 0 || claims)

A verifier never believes carried claims: it writes down what it expects, takes the validity times alone from
the peer, and compares the hash of that. Both encodings are deterministic CBOR (RFC 8949, 4.2.1); a key that
is not known, a longer field or another encoding of the same is refused before anything is verified.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import cbor2

from mimir.attest.trail import Trail, read_canonical_cbor
from mimir.errors import LocalError

TAG = b"mimir-attest-1"
VERSION = 1
MAX_ENVELOPE = 256 << 10
MAX_CLAIMS = 4 << 10
MAX_EVIDENCE = 32 << 10
MAX_ENDORSEMENT = 64 << 10
MAX_LOG = 128 << 10
MAX_TEXT = 128
HASH = 32
_ED25519_SPKI = bytes.fromhex("302a300506032b6570032100")  # RFC 8410: what stands before the key
MAX_LIFE = timedelta(hours=24)

SIMULATED = frozenset({"swtpm"})  # proves the protocol, not the machine: the host owns the key
# Which endorsements may come with evidence of each kind: certificates that lead to a pinned root.
KINDS: dict[str, frozenset[str]] = {
    "snp": frozenset({"vek", "chain"}),
    "tdx": frozenset(),
    "nitro": frozenset(),
    "tpm": frozenset({"ak_certificate", "ak_authorities"}),
    "swtpm": frozenset({"ak_certificate", "ak_authorities"}),
    "az-snp-vtpm": frozenset({"vek", "chain", "ak_certificate", "ak_authorities"}),
    "az-tdx-vtpm": frozenset({"ak_certificate", "ak_authorities"}),
}
# Evidence of these kinds has several parts: a CBOR table of byte strings, and of PCR values by bank.
PARTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # needed, optional
    "tpm": (frozenset({"quote", "signature", "pcrs"}), frozenset({"ak"})),
    "swtpm": (frozenset({"quote", "signature", "pcrs"}), frozenset({"ak"})),
    "az-snp-vtpm": (frozenset({"hcl", "quote", "signature", "pcrs"}), frozenset()),
    "az-tdx-vtpm": (frozenset({"hcl", "td_quote", "quote", "signature", "pcrs"}), frozenset()),
}


# --- claims ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claims:
    """What evidence is bound to. Hashes are SHA-256; times are whole seconds since 1970."""

    role: str  # "party", "client" or "owner"
    node: str
    identity: bytes  # hash of the identity key's SubjectPublicKeyInfo
    tunnel: bytes  # WireGuard public key
    kem: bytes | None  # hash of the key-encapsulation public key
    nonce: bytes  # the verifier's, fresh
    nonce_source: str  # who gave it out, and when
    not_before: int
    not_after: int
    policy: bytes  # digest of the policy
    channel: bytes | None  # what binds it to one connection, where there is such a thing
    config: bytes  # digest of what the parties agreed on

    def __post_init__(self) -> None:
        flaw = self._flaw()
        if flaw:
            raise LocalError(f"claims: {flaw}")

    def _flaw(self) -> str | None:
        for name in ("role", "node", "nonce_source"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
                return f"{name}: 1 to {MAX_TEXT} printable characters"
        for name in ("identity", "tunnel", "kem", "nonce", "policy", "channel", "config"):
            value = getattr(self, name)
            if value is None and name in ("kem", "channel"):
                continue
            if not isinstance(value, bytes) or len(value) != HASH:
                return f"{name}: {HASH} bytes"
        for name in ("not_before", "not_after"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < 1 << 33:
                return f"{name}: seconds since 1970"
        return None

    def encode(self) -> bytes:
        """The one encoding: a map from 1 to the tag, and from 2 on to the fields in their order."""
        values = [getattr(self, each.name) for each in fields(self)]
        return cbor2.dumps({1: TAG.decode()} | dict(enumerate(values, 2)), canonical=True)

    @classmethod
    def decode(cls, raw: bytes, trail: Trail) -> Claims:
        """The inverse, strict."""
        if len(raw) > MAX_CLAIMS:
            trail.refuse("format", f"at most {MAX_CLAIMS} bytes", f"{len(raw)} bytes")
        found = read_canonical_cbor(trail, "format", raw, "the claims")
        count = len(fields(cls))
        if not isinstance(found, dict) or set(found) != set(range(1, count + 2)) or found[1] != TAG.decode():
            trail.refuse("format", f"the keys 1 to {count + 1}, 1 being {TAG.decode()}", found)
        return trail.guard(
            "format",
            "fields of their types and lengths",
            lambda: cls(*(found[n] for n in range(2, count + 2))),
        )

    def report_data(self) -> bytes:
        """64 bytes for SNP and TDX reports, and for Nitro's user data."""
        return hashlib.sha512(TAG + b"\0" + self.encode()).digest()

    def qualifying_data(self) -> bytes:
        """32 bytes for a TPM's quote."""
        return hashlib.sha256(TAG + b"\0" + self.encode()).digest()


def identity_hash(public: bytes) -> bytes:
    """How claims name an Ed25519 public key: the hash of its SubjectPublicKeyInfo."""
    return hashlib.sha256(_ED25519_SPKI + public).digest()


def expect(carried: Claims, expected: Claims, now: datetime, trail: Trail) -> Claims:
    """What the evidence must be bound to: `expected`, valid when the peer says. Raises where they differ.

    The times of `expected` are not looked at. Those carried must contain `now` and span at most MAX_LIFE.
    """
    own = replace(expected, not_before=carried.not_before, not_after=carried.not_after)
    for each in fields(Claims):
        want, got = getattr(own, each.name), getattr(carried, each.name)
        same = hmac.compare_digest(cbor2.dumps(want), cbor2.dumps(got))
        trail.require(same, each.name, want, got)
    first, last = (datetime.fromtimestamp(each, UTC) for each in (own.not_before, own.not_after))
    trail.require(last - first <= MAX_LIFE, "life", f"at most {MAX_LIFE}", last - first)
    trail.within("dates", first, now, last)
    return own


# --- the envelope ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """One piece of evidence as it travels. `claims` is their encoding."""

    kind: str
    evidence: bytes
    claims: bytes
    endorsements: dict[str, bytes] = field(default_factory=dict)
    log: bytes = b""

    @property
    def simulated(self) -> bool:
        return self.kind in SIMULATED

    def encode(self) -> bytes:
        """The one encoding; at most MAX_ENVELOPE bytes."""
        values = {
            1: VERSION,
            2: self.kind,
            3: self.evidence,
            4: self.endorsements,
            5: self.log,
            6: self.claims,
        }
        raw = cbor2.dumps(values, canonical=True)
        if len(raw) > MAX_ENVELOPE:
            raise LocalError(f"an envelope of {len(raw)} bytes; {MAX_ENVELOPE} is the limit")
        return raw

    @classmethod
    def decode(cls, raw: bytes) -> Envelope:
        """The inverse, strict: raises `AttestationError` for anything else than exactly this."""
        trail = Trail("envelope")
        if not 0 < len(raw) <= MAX_ENVELOPE:
            trail.refuse("length", f"1 to {MAX_ENVELOPE} bytes", f"{len(raw)} bytes")
        found = read_canonical_cbor(trail, "format", raw, "the envelope")
        if not isinstance(found, dict) or set(found) != set(range(1, 7)):
            trail.refuse("format", "a map with the keys 1 to 6", type(found).__name__)
        trail.require(found[1] == VERSION and type(found[1]) is int, "version", VERSION, found[1])
        kind = found[2]
        if not isinstance(kind, str) or kind not in KINDS:
            trail.refuse("kind", "one of " + ", ".join(KINDS), kind)
        for number, low, high in ((3, 1, MAX_EVIDENCE), (5, 0, MAX_LOG), (6, 1, MAX_CLAIMS)):
            _blob(found[number], low, high, f"field {number}", trail)
        endorsements = found[4]
        if not isinstance(endorsements, dict) or not set(endorsements) <= KINDS[kind]:
            trail.refuse("endorsements", "among " + (", ".join(sorted(KINDS[kind])) or "none"), endorsements)
        for name, value in endorsements.items():
            _blob(value, 1, MAX_ENDORSEMENT, name, trail)
        return cls(kind, found[3], found[6], endorsements, found[5])

    def parts(self) -> dict[str, Any]:
        """The parts of evidence that has several: byte strings by name, "pcrs" by bank and number."""
        trail = Trail("envelope")
        needed, optional = PARTS[self.kind]
        found = read_canonical_cbor(trail, "parts", self.evidence, "the evidence")
        if not isinstance(found, dict) or not needed <= set(found) <= needed | optional:
            trail.refuse("parts", "a map with " + ", ".join(sorted(needed)), type(found).__name__)
        for name, value in found.items():
            if name != "pcrs":
                _blob(value, 1, MAX_EVIDENCE, name, trail)
        banks = found["pcrs"]
        good = (
            isinstance(banks, dict)
            and len(banks) <= 4
            and all(
                isinstance(bank, str)
                and isinstance(values, dict)
                and all(
                    type(n) is int and 0 <= n < 24 and isinstance(v, bytes) and len(v) <= 64
                    for n, v in values.items()
                )
                for bank, values in banks.items()
            )
        )
        if not good:
            trail.refuse("parts", "PCR values by bank and number", type(banks).__name__)
        return found


def _blob(value: Any, low: int, high: int, what: str, trail: Trail) -> None:
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        trail.refuse("format", f"{what} of {low} to {high} bytes", value)
