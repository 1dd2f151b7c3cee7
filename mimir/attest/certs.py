"""X.509 as attestation needs it: short chains to a pinned root, revocation lists, and a small DER walker.

A root is trusted by the SHA-256 of its whole certificate, never by its name: Intel's test root has the real
one's name. The walker exists because AMD's chip certificates carry the serial number 0, which RFC 5280
forbids and `cryptography` announces that it will refuse; for everything else that library parses.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from mimir.attest.trail import Reader, Trail

MAX_CERTIFICATE = 8 << 10  # bytes; the longest seen is 2 kB
MAX_CHAIN = 8
MAX_POOL = 64  # certificates among which a chain is looked for
MAX_CRL = 1 << 20
NO_GRACE = timedelta(0)

GOOD_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
# Critical extensions whose meaning is checked here or by the caller; any other one ends the verification.
UNDERSTOOD = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,  # vTPM certificates name the TPM's model there
}


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the whole certificate, hex."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def load_der(trail: Trail, step: str, der: bytes) -> x509.Certificate:
    """One DER certificate and nothing after it."""
    if not 0 < len(der) <= MAX_CERTIFICATE:
        trail.refuse(step, f"a certificate of 1 to {MAX_CERTIFICATE} bytes", f"{len(der)} bytes")
    return trail.guard(step, "a DER certificate", lambda: x509.load_der_x509_certificate(der))


def load_pem(
    trail: Trail, step: str, pem: bytes, *, exact: bool = False, most: int = MAX_CHAIN
) -> list[x509.Certificate]:
    """PEM certificates in their order. `exact` refuses any byte that the encoding does not need."""
    if len(pem) > most * MAX_CERTIFICATE:
        trail.refuse(step, f"at most {most * MAX_CERTIFICATE} bytes of PEM", f"{len(pem)} bytes")
    found = trail.guard(step, "PEM certificates", lambda: x509.load_pem_x509_certificates(pem))
    if len(found) > most:
        trail.refuse(step, f"at most {most} certificates", len(found))
    if exact and b"".join(each.public_bytes(Encoding.PEM) for each in found) != pem:
        trail.refuse(step, "PEM certificates in lines of 64 and nothing else", "other bytes among them")
    return found


def order(
    trail: Trail, step: str, leaf: x509.Certificate, pool: Sequence[x509.Certificate]
) -> list[x509.Certificate]:
    """The chain from a leaf to a self-issued root, out of certificates in any order. Verifies nothing."""

    # Names are compared as they are encoded; reading Google's would warn that they are too long.
    walked = [walk(trail, step, each.public_bytes(Encoding.DER)) for each in (leaf, *pool)]
    chain, last = [leaf], walked[0]
    while last.issuer != last.subject:
        at = next((n for n, each in enumerate(walked[1:]) if each.subject == last.issuer), None)
        if at is None or len(chain) == MAX_CHAIN:
            trail.refuse(step, "every certificate up to a root", f"{len(chain)} of the chain")
        chain.append(pool[at])
        last = walked[at + 1]
    return chain


def verify_chain(
    trail: Trail,
    step: str,
    chain: Sequence[x509.Certificate],
    roots: Collection[str],
    now: datetime,
    *,
    leaf_is_ca: bool = False,
) -> datetime:
    """Verify a chain, leaf first and root last, at `now`; returns when its first certificate ends.

    Every link: names, signature over SHA-256 or better, dates; every issuer: CA, its path length, the right
    to sign certificates. The root must be one of `roots` (SHA-256 of the certificate, hex). A leaf is no CA,
    unless it is asked for as one.
    """
    if not 2 <= len(chain) <= MAX_CHAIN:
        trail.refuse(step, f"a chain of 2 to {MAX_CHAIN} certificates", len(chain))
    root = fingerprint(chain[-1])
    trail.require(root in roots, f"{step}.root", "a pinned root: " + ", ".join(sorted(roots)), root)
    for depth, (certificate, issuer) in enumerate(zip(chain, [*chain[1:], chain[-1]], strict=True)):
        name = subject_of(certificate)
        trail.guard(
            f"{step}.issuer",
            f"{name} signed by {subject_of(issuer)}",
            lambda c=certificate, i=issuer: c.verify_directly_issued_by(i),  # type: ignore[misc]
        )
        _check_role(trail, step, certificate, depth + leaf_is_ca)
        check_dates(trail, f"{step}.dates", certificate, now)
        # Bits said to be unused would be ignored: the same certificate in other bytes.
        whole = Der(certificate.public_bytes(Encoding.DER), trail, step).enter("a certificate", SEQUENCE)
        for what in ("TBSCertificate", "signatureAlgorithm"):
            whole.item(what, SEQUENCE)
        if whole.get("signature", BIT_STRING)[:1] != b"\0":
            trail.refuse(step, f"whole bytes of signature on {name}", "unused bits")
    return min(each.not_valid_after_utc for each in chain)


def check_dates(trail: Trail, step: str, certificate: x509.Certificate, now: datetime) -> None:
    """Require that the certificate is valid at `now`. cryptography loads dates that Python has no time for
    (the year 0), and raises when they are looked at."""
    first, last = trail.guard(
        step,
        "dates that can be read",
        lambda: (certificate.not_valid_before_utc, certificate.not_valid_after_utc),
    )
    trail.within(step, first, now, last)


def _check_role(trail: Trail, step: str, certificate: x509.Certificate, depth: int) -> None:
    """What the extensions allow this certificate to do at its place: 0 is the leaf."""
    name = subject_of(certificate)
    found, algorithm = trail.guard(
        f"{step}.role",
        "extensions and an algorithm that can be read",
        lambda: (certificate.extensions, certificate.signature_hash_algorithm),
    )
    unknown = [e.oid.dotted_string for e in found if e.critical and e.oid not in UNDERSTOOD]
    if unknown:
        trail.refuse(f"{step}.role", "no critical extension that is not understood", unknown)
    good = isinstance(algorithm, GOOD_HASHES)
    if not good:
        trail.refuse(f"{step}.hash", "SHA-256 or better", f"{name}: {certificate.signature_algorithm_oid}")
    basic = usage = None
    for each in found:
        if isinstance(each.value, x509.BasicConstraints):
            basic = each.value
        elif isinstance(each.value, x509.KeyUsage):
            usage = each.value
    if depth == 0:  # else there are at least depth - 1 CAs below
        if basic is not None and basic.ca:
            trail.refuse(f"{step}.role", "a leaf that is no CA", name)
        return
    if basic is None or not basic.ca or usage is None or not usage.key_cert_sign:
        trail.refuse(f"{step}.role", "a CA that may sign certificates", name)
    if basic.path_length is not None and basic.path_length < depth - 1:
        trail.refuse(f"{step}.role", f"room for {depth - 1} CAs below", f"{name}: {basic.path_length}")


def subject_of(certificate: x509.Certificate) -> str:
    """The subject as a text for people."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return certificate.subject.rfc4514_string()
        except Exception:  # whatever reading a stranger's name raises, it is only for a message
            return "(a name that cannot be read)"


# --- revocation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Revocations:
    """A verified revocation list: who issued it, and from when to when it speaks."""

    issuer: str
    issued: datetime
    until: datetime
    listed: x509.CertificateRevocationList

    def require_absent(self, trail: Trail, step: str, serial: int, who: str) -> None:
        """Refuse a certificate that is listed."""
        found = self.listed.get_revoked_certificate_by_serial_number(serial)
        trail.require(
            found is None, step, f"{who} not revoked by {self.issuer}", "revoked" if found else "not listed"
        )


def verify_crl(
    trail: Trail,
    step: str,
    raw: bytes,
    issuer: x509.Certificate,
    now: datetime,
    grace: timedelta = NO_GRACE,
) -> Revocations:
    """Verify a list (DER) signed by `issuer`, issued by `now` and not stale for longer than `grace`."""
    if not 0 < len(raw) <= MAX_CRL:
        trail.refuse(step, f"a revocation list of 1 to {MAX_CRL} bytes", f"{len(raw)} bytes")

    def load() -> tuple[
        x509.CertificateRevocationList, bool, list[str], tuple[datetime, datetime | None, datetime | None]
    ]:
        listed = x509.load_der_x509_crl(raw)
        good = listed.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
        critical = [e.oid.dotted_string for e in listed.extensions if e.critical]
        for each in listed:  # reads every entry once, so that no later look-up can fail
            each.extensions  # noqa: B018
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        good = good and usage.crl_sign and listed.issuer == issuer.subject
        until = listed.next_update_utc  # it and the others may be times that Python has not
        return listed, good, critical, (listed.last_update_utc, until, until and until + grace)

    listed, good, critical, (issued, until, last) = trail.guard(step, "a DER revocation list", load)
    name = subject_of(issuer)
    trail.require(
        good, f"{step}.signature", f"a list signed by {name}", "as expected" if good else "not signed by it"
    )
    if critical or not isinstance(listed.signature_hash_algorithm, GOOD_HASHES):
        trail.refuse(step, "a whole list, signed over SHA-256 or better", critical or "a weaker hash")
    if until is None or last is None:
        trail.refuse(step, "a list that says when the next one comes", "no nextUpdate")
    trail.within(f"{step}.dates", issued, now, last)
    return Revocations(name, issued, until, listed)


# --- DER by hand -------------------------------------------------------------------------------------------

SEQUENCE, INTEGER, BIT_STRING, OCTET_STRING, OID, BOOLEAN = 0x30, 0x02, 0x03, 0x04, 0x06, 0x01
ENUMERATED = 0x0A
IA5_STRING, UTC_TIME, GENERALIZED_TIME, VERSION, EXTENSIONS = 0x16, 0x17, 0x18, 0xA0, 0xA3


class Der:
    """DER items one after another: definite lengths in their shortest form, within the given bytes."""

    def __init__(self, raw: bytes, trail: Trail, step: str) -> None:
        self._reader, self._raw = Reader(raw, trail, step), raw
        self._trail, self._step = trail, step

    @property
    def more(self) -> bool:
        """Whether anything follows."""
        return bool(self._reader.rest)

    def peek(self) -> int:
        """The next item's tag, 0 at the end."""
        rest = self._reader.rest
        return rest[0] if rest else 0

    def item(self, what: str, *tags: int) -> tuple[int, bytes, bytes]:
        """(tag, contents, whole item) of the next item, which has one of `tags`."""
        start = self._reader.at
        tag = self._reader.little(1, what)
        if tag not in tags:
            self._trail.refuse(
                self._step, f"{what} as DER tag {'/'.join(f'{t:02x}' for t in tags)}", f"{tag:02x}"
            )
        size = self._reader.little(1, what)
        if size >= 0x80:
            count = size - 0x80
            if not 1 <= count <= 3:
                self._trail.refuse(self._step, f"a definite length of {what}", f"{size:02x}")
            size = self._reader.big(count, what)
            if size < (0x80 if count == 1 else 1 << 8 * (count - 1)):
                self._trail.refuse(self._step, f"the shortest length of {what}", size)
        contents = self._reader.take(size, what)
        return tag, contents, self._raw[start : self._reader.at]

    def get(self, what: str, *tags: int) -> bytes:
        """The contents of the next item."""
        return self.item(what, *tags)[1]

    def enter(self, what: str, *tags: int) -> Der:
        """A walker over the contents of the next item."""
        return Der(self.get(what, *tags), self._trail, self._step)

    def whole(self, what: str) -> int:
        """A small INTEGER that is not negative."""
        raw = self.get(what, INTEGER)
        if not raw or raw[0] & 0x80 or len(raw) > 32 or (len(raw) > 1 and raw[0] == 0 and not raw[1] & 0x80):
            self._trail.refuse(self._step, f"{what} as a whole number", raw)
        return int.from_bytes(raw, "big")

    def end(self, what: str) -> None:
        """Nothing may follow."""
        self._reader.end(what)


@dataclass(frozen=True)
class Walked:
    """A certificate taken apart by hand; the names are DER, to be compared as they are."""

    signed: bytes  # TBSCertificate, as signed
    algorithm: bytes  # AlgorithmIdentifier, DER
    signature: bytes
    serial: int
    issuer: bytes
    subject: bytes
    not_before: datetime
    not_after: datetime
    spki: bytes
    extensions: dict[bytes, tuple[bool, bytes]]  # by OID contents: (critical, value)


def walk(trail: Trail, step: str, der: bytes) -> Walked:
    """Take a version-3 certificate apart. Nothing is verified yet."""
    if len(der) > MAX_CERTIFICATE:
        trail.refuse(step, f"a certificate of at most {MAX_CERTIFICATE} bytes", f"{len(der)} bytes")
    outer = Der(der, trail, step)
    whole = outer.enter("the certificate", SEQUENCE)
    outer.end("the certificate")
    _, contents, signed = whole.item("TBSCertificate", SEQUENCE)
    algorithm = whole.item("signatureAlgorithm", SEQUENCE)[2]
    bits = whole.get("signature", BIT_STRING)
    whole.end("the certificate")
    body = Der(contents, trail, step)
    version = body.enter("version", VERSION)
    if version.whole("version") != 2:
        trail.refuse(step, "an X.509 certificate of version 3", "another version")
    version.end("version")
    serial = body.whole("serialNumber")
    inner = body.item("signature", SEQUENCE)[2]
    if inner != algorithm or not bits or bits[0] != 0:
        trail.refuse(step, "one signature algorithm, and whole bytes of signature", inner)
    issuer = body.item("issuer", SEQUENCE)[2]
    validity = body.enter("validity", SEQUENCE)
    not_before, not_after = _time(trail, step, validity), _time(trail, step, validity)
    validity.end("validity")
    subject = body.item("subject", SEQUENCE)[2]
    spki = body.item("subjectPublicKeyInfo", SEQUENCE)[2]
    extensions: dict[bytes, tuple[bool, bytes]] = {}
    if body.more:
        outer = body.enter("extensions", EXTENSIONS)
        listed = outer.enter("extensions", SEQUENCE)
        outer.end("extensions")
        while listed.more:
            entry = listed.enter("an extension", SEQUENCE)
            oid = entry.get("extnID", OID)
            critical = entry.peek() == BOOLEAN and entry.get("critical", BOOLEAN) == b"\xff"
            value = entry.get("extnValue", OCTET_STRING)
            entry.end("an extension")
            if oid in extensions:
                trail.refuse(step, "each extension once", oid)
            extensions[oid] = (critical, value)
    body.end("TBSCertificate")
    return Walked(
        signed, algorithm, bits[1:], serial, issuer, subject, not_before, not_after, spki, extensions
    )


def _time(trail: Trail, step: str, validity: Der) -> datetime:
    tag, raw, _ = validity.item("a time", UTC_TIME, GENERALIZED_TIME)

    def parse() -> datetime:
        text = raw.decode("ascii")
        digits = 12 if tag == UTC_TIME else 14
        if len(text) != digits + 1 or not text[:-1].isdigit() or text[-1] != "Z":
            raise ValueError(text)
        if tag == UTC_TIME:
            text = ("19" if int(text[:2]) >= 50 else "20") + text
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)

    return trail.guard(step, "a time as YYMMDDhhmmssZ or YYYYMMDDhhmmssZ", parse)


def encode_oid(dotted: str) -> bytes:
    """The DER contents of an object identifier."""
    first, second, *rest = (int(part) for part in dotted.split("."))
    out = bytearray()
    for number in (40 * first + second, *rest):
        septets = [number & 0x7F]
        while number := number >> 7:
            septets.append(number & 0x7F | 0x80)
        out += bytes(reversed(septets))
    return bytes(out)
