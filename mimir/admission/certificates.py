"""Certificates of an hour: who vouches that an identity holds a TLS key, and on which evidence.

One profile and no other. A certificate is a set of facts and one encoding of them; what is received is taken
apart, encoded again, and refused unless that gives the same bytes. So nothing can be in it that was not read.

    issuer      O=Mimir, OU=issuer, CN=<identity, hex>      its Ed25519 identity key signs
    subject     O=Mimir, OU=node,   CN=<identity, hex>      another name even where a node vouches for itself
    key         Ed25519, fresh in each process
    life        an hour at most, and no longer than the verdict it rests on
    basicConstraints CA:FALSE, keyUsage digitalSignature    critical
    extendedKeyUsage serverAuth, clientAuth
    subjectAltName   DNS:<identity in two halves>.mimir.invalid, URI:mimir:<node>
    ARC.1       the subject's identity key                  OCTET STRING, 32 bytes
    ARC.2       evidence: kind, digest, measurements        SEQUENCE of UTF8String, OCTET STRING, SEQUENCE OF
    ARC.3       entry of the policy, simulated              SEQUENCE of UTF8String, BOOLEAN
    ARC.4       WireGuard public key                        OCTET STRING, 32 bytes
    ARC.5       digest of the policy                        OCTET STRING, 32 bytes

ARC.2 to ARC.5 are there exactly if issuer and subject are different identities. A node that vouches for
itself (a client; a party that nobody has admitted yet) proves who it is and nothing about what it runs.

What is signed begins with 30, the tag of a SEQUENCE; everything else that an identity signs begins with the
letters of a label. X.509 is RFC 5280, Ed25519 in it RFC 8410.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

import nacl.bindings as sodium

from mimir.admission.revocation import Revocations
from mimir.attest.certs import (
    BIT_STRING,
    BOOLEAN,
    EXTENSIONS,
    GENERALIZED_TIME,
    INTEGER,
    MAX_CERTIFICATE,
    OCTET_STRING,
    OID,
    SEQUENCE,
    UTC_TIME,
    VERSION,
    Der,
    encode_oid,
    walk,
)
from mimir.attest.evidence import identity_hash
from mimir.attest.trail import Trail
from mimir.errors import LocalError
from mimir.net.identity import BadSignature, Identity, verify
from mimir.secret import TlsPrivateKey

if TYPE_CHECKING:  # clients know nothing of the verifiers behind it, which take a second to load
    from mimir.attest.appraisal import Verdict

ARC = (
    f"2.25.{uuid.UUID('5987d1c9-0a9a-4557-ba49-3e071400dab1').int}"  # of our own: X.667 gives every UUID one
)
IDENTITY, EVIDENCE, ENTRY, TUNNEL, POLICY = (f"{ARC}.{n}" for n in range(1, 6))
ORGANISATION = "Mimir"
MAX_LIFE = timedelta(hours=1)
SKEW = timedelta(minutes=1)  # a certificate begins so long before it is made: clocks differ
RENEW_AFTER = 2 / 3  # of its life
MAX_MEASUREMENTS = 96
MAX_TEXT = 128
KEY_BYTES = HASH_BYTES = 32
SERIAL_BYTES = 16

_UTF8_STRING, _SET = 0x0C, 0x31
_DNS, _URI = 0x82, 0x86  # of a GeneralName
_ATTRIBUTES = ("2.5.4.10", "2.5.4.11", "2.5.4.3")  # O, OU, CN
_BASIC, _USAGE, _PURPOSES, _ALTERNATIVE = "2.5.29.19", "2.5.29.15", "2.5.29.37", "2.5.29.17"
_SERVER, _CLIENT = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"


@dataclass(frozen=True)
class Grounds:
    """On which evidence an issuer vouches for another."""

    kind: str  # of evidence
    evidence: str  # SHA-256 of the envelope, hex
    measurements: tuple[str, ...]  # hex, sorted
    entry: str  # of the policy
    simulated: bool
    tunnel: str  # WireGuard public key, hex
    policy: str  # digest, hex


@dataclass(frozen=True)
class Certificate:
    """One certificate that was read; `verify_certificate` alone says that it holds."""

    issuer: str  # identity, hex
    identity: str  # of the subject, hex
    node: str
    key: bytes  # Ed25519, of TLS
    serial: int
    not_before: datetime
    not_after: datetime
    grounds: Grounds | None
    fingerprint: str  # SHA-256 of the whole, hex: what a revocation names

    @property
    def renew_at(self) -> datetime:
        """When its successor is due."""
        return self.not_before + (self.not_after - self.not_before) * RENEW_AFTER

    def public(self) -> dict[str, object]:
        """Plain values, for JSON."""
        grounds = (
            None
            if self.grounds is None
            else vars(self.grounds) | {"measurements": list(self.grounds.measurements)}
        )
        return {
            "issuer": self.issuer,
            "identity": self.identity,
            "node": self.node,
            "key": self.key.hex(),
            "not_before": self.not_before.isoformat(),
            "not_after": self.not_after.isoformat(),
            "sha256": self.fingerprint,
            "grounds": grounds,
        }


# --- keys --------------------------------------------------------------------------------------------------


class TlsKey:
    """An Ed25519 key for TLS, made in memory and gone with the process. `public` is 32 bytes."""

    __slots__ = ("_seed", "public")

    public: bytes

    def __init__(self) -> None:
        self._seed = TlsPrivateKey.random()
        with self._seed.reveal_to_kernel() as view:
            self.public = sodium.crypto_sign_seed_keypair(bytes(view))[0]

    @contextmanager
    def in_file(self, certificate: bytes) -> Iterator[str]:
        """The path of a PEM file with this key and its certificate, in memory only and wiped afterwards.

        OpenSSL's own copies, and those of the base64 library, are not ours to wipe.
        """
        handle = os.memfd_create("mimir-tls", os.MFD_CLOEXEC)
        size = 0
        try:
            with self._seed.reveal_to_kernel() as view:
                private = tlv(
                    SEQUENCE,
                    tlv(INTEGER, b"\0"),
                    _ALGORITHM,
                    tlv(OCTET_STRING, tlv(OCTET_STRING, bytes(view))),
                )
            for label, der in (("PRIVATE KEY", private), ("CERTIFICATE", certificate)):
                size += os.write(handle, pem(label, der))
            yield f"/proc/self/fd/{handle}"
        finally:
            os.pwrite(handle, bytes(size), 0)
            os.close(handle)

    def wipe(self) -> None:
        """Forget the key."""
        self._seed.wipe()

    def __repr__(self) -> str:
        return f"<TlsKey {self.public.hex()[:16]}>"


def pem(label: str, der: bytes) -> bytes:
    """RFC 7468."""
    text = base64.b64encode(der)
    lines = b"\n".join(text[at : at + 64] for at in range(0, len(text), 64))
    return b"-----BEGIN %s-----\n%s\n-----END %s-----\n" % (label.encode(), lines, label.encode())


def server_name(identity: str) -> str:
    """The DNS name by which TLS libraries can ask for an identity; it resolves nowhere (RFC 6761)."""
    return f"{identity[:32]}.{identity[32:]}.mimir.invalid"


# --- issuing -----------------------------------------------------------------------------------------------


def issue(
    issuer: Identity,
    subject: str,
    tls_key: bytes,
    verdict: Verdict,
    now: datetime,
    until: datetime | None = None,
) -> bytes:
    """Vouch for a peer whose evidence was just admitted: its identity (hex) holds this TLS key. DER.

    Lives for an hour at most, no longer than the verdict, and not past `until`.
    """
    claims = verdict.claims
    if identity_hash(bytes.fromhex(subject)) != claims.identity:
        raise LocalError("a certificate for an identity that the verdict is not about")
    if subject == issuer.public_hex:
        raise LocalError("nobody is admitted by itself")
    grounds = Grounds(
        verdict.kind,
        verdict.evidence,
        tuple(sorted(verdict.measurements)),
        verdict.entry,
        verdict.simulated,
        claims.tunnel.hex(),
        verdict.policy,
    )
    last = verdict.valid_until if until is None else min(until, verdict.valid_until)
    return _issue(issuer, subject, claims.node, tls_key, last, grounds, now)


def issue_own(identity: Identity, node: str, tls_key: bytes, now: datetime) -> bytes:
    """Vouch for oneself: proves who, not what. For clients, and for a party that nobody has admitted. DER."""
    return _issue(identity, identity.public_hex, node, tls_key, now + MAX_LIFE, None, now)


def _issue(
    issuer: Identity,
    subject: str,
    node: str,
    tls_key: bytes,
    until: datetime,
    grounds: Grounds | None,
    now: datetime,
) -> bytes:
    first = (now - SKEW).astimezone(UTC).replace(microsecond=0)
    last = min(first + MAX_LIFE, until.astimezone(UTC).replace(microsecond=0))
    if last <= now:
        raise LocalError("a certificate that would be over already")
    serial = int.from_bytes(b"\x40" + secrets.token_bytes(SERIAL_BYTES - 1), "big")
    made = Certificate(issuer.public_hex, subject, node, tls_key, serial, first, last, grounds, "")
    body = _encode(made)
    der = tlv(SEQUENCE, body, _ALGORITHM, tlv(BIT_STRING, b"\0", issuer.sign(body)))
    if len(der) > MAX_CERTIFICATE:
        raise LocalError(f"a certificate of {len(der)} bytes; {MAX_CERTIFICATE} is the limit")
    _read(der, Trail("certificate"))  # what we could not read ourselves is not to leave us
    return der


# --- verifying ---------------------------------------------------------------------------------------------


def verify_certificate(
    der: bytes,
    issuers: Collection[str],
    now: datetime,
    revocations: Revocations | None,
    *,
    subject: str | None = None,
) -> Certificate:
    """The certificate, if one of `issuers` vouches for `subject` at `now` and nothing in it is revoked.

    `issuers` and `subject` are identities in hex, the latter None for whoever it names. Raises
    `AttestationError` at `certificate.*` or `revoked.*`.
    """
    trail = Trail("certificate")
    made, body, signature = _read(der, trail)
    trail.require(made.issuer in issuers, "issuer", "one of " + _several(issuers), made.issuer)
    if subject is not None:
        trail.require(made.identity == subject, "identity", subject, made.identity)
    try:
        verify(bytes.fromhex(made.issuer), body, signature)
    except BadSignature:
        trail.refuse("signature", f"one by {made.issuer}", "one that does not verify")
    life = made.not_after - made.not_before
    trail.require(timedelta(0) < life <= MAX_LIFE, "life", f"at most {MAX_LIFE}", life)
    trail.within("dates", made.not_before, now, made.not_after)
    if revocations is not None:
        revocations.check(identity=made.issuer)
        revocations.check(identity=made.identity, certificate=made.fingerprint)
        if made.grounds is not None:
            revocations.check(tunnel=made.grounds.tunnel, measurements=made.grounds.measurements)
    return made


def verify_own(
    der: bytes, identities: Collection[str], now: datetime, revocations: Revocations | None
) -> Certificate:
    """The same for one who vouches for itself, and is one of `identities`: a client, an owner."""
    made = verify_certificate(der, identities, now, revocations)
    Trail("certificate").require(
        made.identity == made.issuer, "issuer", f"{made.identity} itself", made.issuer
    )
    return made


def _several(identities: Collection[str]) -> str:
    shown = sorted(each[:16] + "..." for each in identities)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "") or "nobody"


def _read(der: bytes, trail: Trail) -> tuple[Certificate, bytes, bytes]:
    """(facts, what is signed, signature) of a certificate in our profile; the signature is not looked at."""
    found = walk(trail, "format", der)
    trail.require(found.algorithm == _ALGORITHM, "profile", "Ed25519", found.algorithm)
    values: dict[str, bytes] = {}
    for name in (IDENTITY, EVIDENCE, ENTRY, TUNNEL, POLICY):
        value = found.extensions.get(encode_oid(name))
        if value is not None:
            values[name] = value[1]
    if IDENTITY not in values:
        trail.refuse("profile", "the subject's identity", "no such extension")
    identity = _octets(values[IDENTITY], trail, "the identity", KEY_BYTES)
    grounds = None
    if len(values) > 1:
        if len(values) != 5:
            trail.refuse("profile", "all of our extensions, or the identity alone", f"{len(values)} of 5")
        grounds = _read_grounds(values, trail)
    made = Certificate(
        _common_name(found.issuer, trail),
        identity.hex(),
        _node(found.extensions, trail),
        found.spki[-KEY_BYTES:],
        found.serial,
        found.not_before,
        found.not_after,
        grounds,
        hashlib.sha256(der).hexdigest(),
    )
    own = made.issuer == made.identity
    trail.require(
        own == (grounds is None), "profile", "grounds exactly for another's certificate", made.issuer
    )
    again = trail.guard("profile", "values of their kinds and lengths", lambda: _encode(made))
    trail.require(again == found.signed, "profile", "exactly our profile", "another encoding, or more")
    return made, found.signed, found.signature


def _octets(raw: bytes, trail: Trail, what: str, *sizes: int) -> bytes:
    walker = Der(raw, trail, "profile")
    value = walker.get(what, OCTET_STRING)
    walker.end(what)
    if len(value) not in sizes:
        trail.refuse("profile", f"{what} of {sizes} bytes", len(value))
    return value


def _text(walker: Der, what: str, trail: Trail) -> str:
    raw = walker.get(what, _UTF8_STRING)
    text: str = trail.guard("profile", f"{what} as UTF-8", raw.decode)
    if not 0 < len(text) <= MAX_TEXT or not text.isprintable():
        trail.refuse("profile", f"{what} of 1 to {MAX_TEXT} printable characters", text)
    return text


def _read_grounds(values: dict[str, bytes], trail: Trail) -> Grounds:
    outer = Der(values[EVIDENCE], trail, "profile")
    evidence = outer.enter("the evidence", SEQUENCE)
    outer.end("the evidence")
    kind = _text(evidence, "the kind", trail)
    digest = evidence.get("the evidence's digest", OCTET_STRING)
    listed = evidence.enter("the measurements", SEQUENCE)
    evidence.end("the evidence")
    measurements = []
    while listed.more:
        measurements.append(listed.get("a measurement", OCTET_STRING).hex())
    outer = Der(values[ENTRY], trail, "profile")
    inner = outer.enter("the entry", SEQUENCE)
    outer.end("the entry")
    entry = _text(inner, "the entry", trail)
    simulated = inner.get("simulated", BOOLEAN)
    inner.end("the entry")
    return Grounds(
        kind,
        digest.hex(),
        tuple(measurements),
        entry,
        simulated == b"\xff",
        _octets(values[TUNNEL], trail, "the tunnel's key", KEY_BYTES).hex(),
        _octets(values[POLICY], trail, "the policy's digest", HASH_BYTES).hex(),
    )


def _common_name(name: bytes, trail: Trail) -> str:
    """The last attribute of a name; that the rest is ours is seen when it is encoded again."""
    text: str = trail.guard("profile", "an issuer that is an identity", name[-2 * KEY_BYTES :].decode)
    key: bytes = trail.guard("profile", "an issuer that is an identity", lambda: bytes.fromhex(text))
    if len(key) != KEY_BYTES:
        trail.refuse("profile", "an issuer that is an identity", text)
    return key.hex()


def _node(extensions: dict[bytes, tuple[bool, bytes]], trail: Trail) -> str:
    """The node in the second of the subject's alternative names, with its escapes undone."""
    outer = Der(extensions.get(encode_oid(_ALTERNATIVE), (False, b""))[1], trail, "profile")
    names = outer.enter("subjectAltName", SEQUENCE)
    outer.end("subjectAltName")
    names.get("the name", _DNS)
    raw = names.get("the node", _URI)
    names.end("subjectAltName")
    return trail.guard(
        "profile", "a node", lambda: unquote(raw.decode("ascii"), errors="strict").removeprefix("mimir:")
    )


# --- encoding ----------------------------------------------------------------------------------------------


def tlv(tag: int, *parts: bytes) -> bytes:
    """One DER item."""
    contents = b"".join(parts)
    size = len(contents)
    if size < 0x80:
        return bytes((tag, size)) + contents
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + contents


def _oid(dotted: str) -> bytes:
    return tlv(OID, encode_oid(dotted))


_ALGORITHM = tlv(SEQUENCE, _oid("1.3.101.112"))  # Ed25519, of keys and of signatures


def _spki(key: bytes) -> bytes:
    return tlv(SEQUENCE, _ALGORITHM, tlv(BIT_STRING, b"\0", key))


def _name(unit: str, identity: str) -> bytes:
    values = (ORGANISATION, unit, identity)
    return tlv(
        SEQUENCE,
        *(
            tlv(_SET, tlv(SEQUENCE, _oid(kind), tlv(_UTF8_STRING, value.encode())))
            for kind, value in zip(_ATTRIBUTES, values, strict=True)
        ),
    )


def _moment(when: datetime) -> bytes:
    if when.year < 2050:
        return tlv(UTC_TIME, when.strftime("%y%m%d%H%M%SZ").encode())
    return tlv(GENERALIZED_TIME, when.strftime("%Y%m%d%H%M%SZ").encode())


def _extension(name: str, value: bytes, critical: bool = False) -> bytes:
    return tlv(SEQUENCE, _oid(name), tlv(BOOLEAN, b"\xff") if critical else b"", tlv(OCTET_STRING, value))


def _sized(text: str, size: int) -> bytes:
    raw = bytes.fromhex(text)
    if len(raw) != size or raw.hex() != text:
        raise ValueError(f"{size} bytes in lower-case hexadecimal are due")
    return raw


def _body(
    issuer: bytes,
    subject: bytes,
    key: bytes,
    serial: int,
    life: tuple[datetime, datetime],
    *extensions: bytes,
) -> bytes:
    """A TBSCertificate."""
    number = serial.to_bytes(serial.bit_length() // 8 + 1, "big")
    return tlv(
        SEQUENCE,
        tlv(VERSION, tlv(INTEGER, b"\2")),
        tlv(INTEGER, number),
        _ALGORITHM,
        issuer,
        tlv(SEQUENCE, *map(_moment, life)),
        subject,
        _spki(key),
        tlv(EXTENSIONS, tlv(SEQUENCE, *extensions)),
    )


def _encode(made: Certificate) -> bytes:
    """The one TBSCertificate of these facts; ValueError for facts that none can have."""
    node, grounds = made.node, made.grounds
    if not 0 < len(node) <= MAX_TEXT or not node.isprintable() or len(made.key) != KEY_BYTES:
        raise ValueError("a node's name and key")
    identity = _sized(made.identity, KEY_BYTES)
    _sized(made.issuer, KEY_BYTES)
    if made.key in (identity, bytes.fromhex(made.issuer)):
        raise ValueError("a TLS key of its own, not an identity's")
    extensions = [
        _extension(_BASIC, tlv(SEQUENCE), critical=True),
        _extension(_USAGE, tlv(BIT_STRING, b"\7\x80"), critical=True),
        _extension(_PURPOSES, tlv(SEQUENCE, _oid(_SERVER), _oid(_CLIENT))),
        _extension(
            _ALTERNATIVE,
            tlv(
                SEQUENCE,
                tlv(_DNS, server_name(made.identity).encode()),
                tlv(_URI, b"mimir:" + quote(node, safe="").encode()),
            ),
        ),
        _extension(IDENTITY, tlv(OCTET_STRING, identity)),
    ]
    if grounds is not None:
        listed = [bytes.fromhex(each) for each in grounds.measurements]
        if len(listed) > MAX_MEASUREMENTS or listed != sorted(set(listed)):
            raise ValueError(f"at most {MAX_MEASUREMENTS} measurements, sorted, each once")
        if any(len(each) not in (32, 48, 64) for each in listed):
            raise ValueError("measurements of 32, 48 or 64 bytes")
        extensions += [
            _extension(
                EVIDENCE,
                tlv(
                    SEQUENCE,
                    tlv(_UTF8_STRING, grounds.kind.encode()),
                    tlv(OCTET_STRING, _sized(grounds.evidence, HASH_BYTES)),
                    tlv(SEQUENCE, *(tlv(OCTET_STRING, each) for each in listed)),
                ),
            ),
            _extension(
                ENTRY,
                tlv(
                    SEQUENCE,
                    tlv(_UTF8_STRING, grounds.entry.encode()),
                    tlv(BOOLEAN, b"\xff" if grounds.simulated else b"\0"),
                ),
            ),
            _extension(TUNNEL, tlv(OCTET_STRING, _sized(grounds.tunnel, KEY_BYTES))),
            _extension(POLICY, tlv(OCTET_STRING, _sized(grounds.policy, HASH_BYTES))),
        ]
    return _body(
        _name("issuer", made.issuer),
        _name("node", made.identity),
        made.key,
        made.serial,
        (made.not_before, made.not_after),
        *extensions,
    )


def anchor(identity: str) -> bytes:
    """An identity in the form in which TLS libraries take what they trust: a CA certificate with its key.

    Made here, from a key that the configuration names, and never sent. Nobody signed it, and nobody looks:
    what is trusted is the key (RFC 5280, 6.1.1: an anchor is a name and a key). DER.
    """
    first = datetime(2020, 1, 1, tzinfo=UTC)
    body = _body(
        _name("nobody", identity),
        _name("issuer", identity),
        bytes.fromhex(identity),
        1,
        (first, datetime(2049, 12, 31, tzinfo=UTC)),
        _extension(_BASIC, tlv(SEQUENCE, tlv(BOOLEAN, b"\xff"), tlv(INTEGER, b"\0")), critical=True),
        _extension(_USAGE, tlv(BIT_STRING, b"\2\x04"), critical=True),
    )
    return tlv(SEQUENCE, body, _ALGORITHM, tlv(BIT_STRING, b"\0", bytes(64)))
