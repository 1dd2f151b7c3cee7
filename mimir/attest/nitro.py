"""AWS Nitro Enclaves: an attestation document, signed by the hypervisor under AWS's root.

The document is an untagged COSE_Sign1 (RFC 9052) with ES384 whose payload is verified as the bytes that came:
since 2025 it may be an indefinite-length map, and encoding it anew would change it. A genuine document says
little: debug enclaves get one too, with PCR0 to PCR2 all zero, and nothing but `Rule.judge` keeps them out.
Source: the attestation process described beside AWS's NSM API.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from mimir.attest import certs, rules
from mimir.attest.trail import Anchor, Step, Trail, read_cbor

MAX_DOCUMENT = 16 << 10
PROTECTED = bytes.fromhex("a1013822")  # {1: -35}: ES384
ROOTS = frozenset({"641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"})  # AWS Nitro root G1
MAX_PUBLIC_KEY, MAX_USER_DATA, MAX_NONCE = 1024, 512, 512
MAX_PCR = 31
HALF = 48  # bytes of r and of s

_MANDATORY = {"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"}
_OPTIONAL = {"public_key": MAX_PUBLIC_KEY, "user_data": MAX_USER_DATA, "nonce": MAX_NONCE}


@dataclass(frozen=True)
class Document:
    """The payload's fields. What is optional is empty when absent."""

    module_id: str
    timestamp: datetime
    pcrs: dict[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes
    user_data: bytes
    nonce: bytes
    payload: bytes
    signature: bytes

    @property
    def debug(self) -> bool:
        """PCR0 to PCR2 are zero in debug mode. A missing one counts as zero."""
        return not any(any(self.pcrs.get(index, b"")) for index in (0, 1, 2))


def parse(raw: bytes, trail: Trail) -> Document:
    """Take a document apart: every field typed and bounded, no key twice, nothing after the end."""
    trail.require(0 < len(raw) <= MAX_DOCUMENT, "length", f"1 to {MAX_DOCUMENT} bytes", f"{len(raw)} bytes")
    outer = read_cbor(trail, "format", raw, "the document")
    if not isinstance(outer, list) or len(outer) != 4:
        trail.refuse("format", "an untagged COSE_Sign1 of four parts", type(outer).__name__)
    protected, unprotected, payload, signature = outer
    trail.require(protected == PROTECTED, "algorithm", f"ES384: {PROTECTED.hex()}", protected)
    trail.require(unprotected == {}, "format", "no unprotected headers", unprotected)
    if not isinstance(payload, bytes) or not isinstance(signature, bytes) or len(signature) != 2 * HALF:
        trail.refuse("format", f"a payload and {2 * HALF} bytes of signature", "other types or lengths")
    # The frame around the signed payload is signed by nobody: it has exactly one encoding.
    if cbor2.dumps(outer, canonical=True) != raw:
        trail.refuse("format", "the shortest encoding of the frame", "another one")
    return _parse_payload(payload, signature, trail)


def _parse_payload(payload: bytes, signature: bytes, trail: Trail) -> Document:
    step = "payload"
    found = read_cbor(trail, step, payload, "the payload")
    if not isinstance(found, dict) or not _MANDATORY <= set(found) <= _MANDATORY | set(_OPTIONAL):
        trail.refuse(step, "a map of the documented keys", type(found).__name__)

    def blob(value: Any, low: int, high: int, what: str) -> bytes:
        if not isinstance(value, bytes) or not low <= len(value) <= high:
            trail.refuse(step, f"{what} of {low} to {high} bytes", value)
        return value

    module_id, timestamp, pcrs, bundle = (found[k] for k in ("module_id", "timestamp", "pcrs", "cabundle"))
    if not isinstance(module_id, str) or not 0 < len(module_id) <= 256:
        trail.refuse(step, "a module id", module_id)
    if found["digest"] != "SHA384":
        trail.refuse(step, "digest SHA384", found["digest"])
    if type(timestamp) is not int or not 0 < timestamp < 1 << 43:
        trail.refuse(step, "a time in milliseconds", timestamp)
    if not isinstance(pcrs, dict) or not 1 <= len(pcrs) <= MAX_PCR + 1:
        trail.refuse(step, "1 to 32 PCRs", type(pcrs).__name__)
    for index, value in pcrs.items():
        if type(index) is not int or not 0 <= index <= MAX_PCR:
            trail.refuse(step, f"PCR numbers from 0 to {MAX_PCR}", index)
        if not isinstance(value, bytes) or len(value) not in (32, 48, 64):
            trail.refuse(step, "PCRs of 32, 48 or 64 bytes", value)
    if not isinstance(bundle, list) or not 1 <= len(bundle) < certs.MAX_CHAIN:
        trail.refuse(step, f"1 to {certs.MAX_CHAIN - 1} CA certificates", type(bundle).__name__)
    optional = {
        name: blob(found[name], 0, limit, name) if found.get(name) is not None else b""
        for name, limit in _OPTIONAL.items()
    }
    return Document(
        module_id,
        datetime.fromtimestamp(timestamp / 1000, UTC),
        dict(sorted(pcrs.items())),
        blob(found["certificate"], 1, certs.MAX_CERTIFICATE, "certificate"),
        tuple(blob(each, 1, certs.MAX_CERTIFICATE, "CA certificate") for each in bundle),
        optional["public_key"],
        optional["user_data"],
        optional["nonce"],
        payload,
        signature,
    )


@dataclass(frozen=True)
class Facts:
    """What a verified document establishes."""

    document: Document
    root: str
    until: datetime  # the leaf lives three hours
    steps: tuple[Step, ...]
    kind = "nitro"
    lists: tuple[None, ...] = ()  # leaves live for hours; their CRLs are not looked at
    cautions: tuple[str, ...] = ()
    advisories: tuple[str, ...] = ()
    tcb_text = "not stated by Nitro"

    @property
    def made(self) -> datetime:
        return self.document.timestamp

    @property
    def binding(self) -> bytes:
        """What the enclave asked to have signed, for `evidence`: its user_data."""
        return self.document.user_data

    @property
    def anchor(self) -> Anchor:
        """What the chain ends in."""
        return Anchor("AWS Nitro Enclaves Root G1", self.root)

    def names(self) -> frozenset[tuple[str, str]]:
        """By what a deny list may call this evidence."""
        values = (each for each in self.document.pcrs.values() if any(each))
        return frozenset(("measurements", value.hex()) for value in values)


def verify(raw: bytes, now: datetime, *, roots: Collection[str] = ROOTS) -> Facts:
    """Verify that AWS's hypervisor made this document and its certificates are valid at `now`."""
    trail = Trail("nitro")
    document = parse(raw, trail)
    leaf = certs.load_der(trail, "chain", document.certificate)
    _check_signature(document, leaf, trail)
    bundle = [certs.load_der(trail, "chain", each) for each in document.cabundle]
    until = certs.verify_chain(trail, "chain", [leaf, *reversed(bundle)], roots, now)
    return Facts(document, certs.fingerprint(bundle[0]), until, tuple(trail.steps))


def _check_signature(document: Document, leaf: x509.Certificate, trail: Trail) -> None:
    public = trail.guard("chain", "a public key", leaf.public_key)
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP384R1):
        trail.refuse("signature", "a P-384 key in the leaf", type(public).__name__)
    r, s = (int.from_bytes(document.signature[at : at + HALF], "big") for at in (0, HALF))
    signed = cbor2.dumps(["Signature1", PROTECTED, b"", document.payload])
    trail.guard(
        "signature",
        "the payload signed by the leaf",
        lambda: public.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384())),
    )
    trail.require(True, "signature", "the payload signed by the leaf", "as expected")


@dataclass(frozen=True)
class Rule:
    """[[allow]] kind = "nitro". Which PCRs are wanted: 0 is the image, 8 who signed it."""

    pcrs: Annotated[dict[int, tuple[str, ...]], rules.pcrs_rule(MAX_PCR, 48)]

    def flaw(self) -> str | None:
        """What no single key can tell, or None."""
        if not {0, 8} & set(self.pcrs):
            return "pcrs: 0 (the image) or 8 (who signed the image) must be among them"
        if any(not any(bytes.fromhex(value)) for values in self.pcrs.values() for value in values):
            return "pcrs: a value of zeros says nothing"
        return None

    def judge(self, facts: Facts, trail: Trail) -> None:
        """Require that these facts satisfy the whole rule."""
        document = facts.document
        check_debug(document, trail)
        for index, allowed in sorted(self.pcrs.items()):
            trail.one_of(f"pcr{index}", allowed, document.pcrs.get(index, b""))


def check_debug(document: Document, trail: Trail) -> None:
    """What no policy can allow."""
    trail.require(
        not document.debug,
        "debug",
        "PCR0 to PCR2 not all zero",
        "zero: a debug enclave" if document.debug else "set",
    )
