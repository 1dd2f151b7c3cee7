"""TPM 2.0: what a quote says of the measured boot, and whether its attestation key is one to believe.

A quote is worth what its key is worth. Three ways lead to a key: a certificate of a cloud's vTPM authority
(Azure, Google), a name that somebody enrolled, or confidential hardware that names the key in its own report
(Azure's paravisor, `parse_hcl`). Only a *restricted* key cannot sign a forged quote that it did not make.

Sources: TCG TPM 2.0 Library part 2 for the structures, the TCG PC Client firmware profile for the event log,
Microsoft's description of the HCL report. SHA-1, as signature hash and as PCR bank, is refused everywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ObjectIdentifier

from mimir.attest import certs, rules
from mimir.attest.trail import Anchor, Reader, Step, Trail, read_json
from mimir.config import choice_rule

MAX_QUOTE, MAX_SIGNATURE, MAX_PUBLIC = 1024, 1024, 1024
MAX_LOG, MAX_EVENT = 128 << 10, 64 << 10
MAX_HCL, HCL_HEAD, HCL_REPORT = 8 << 10, 32, 1184
MAX_PCR = 23
MIN_NONCE = 16  # bytes; less can be guessed or repeats

MAGIC, ATTEST_QUOTE = 0xFF544347, 0x8018
RSA, ECC, NULL = 0x0001, 0x0023, 0x0010
RSASSA, RSAPSS, ECDSA = 0x0014, 0x0016, 0x0018
SCHEMES = {RSASSA: "rsassa", RSAPSS: "rsapss", ECDSA: "ecdsa"}
HASHES: Mapping[int, tuple[str, hashes.HashAlgorithm]] = {
    0x000B: ("sha256", hashes.SHA256()),
    0x000C: ("sha384", hashes.SHA384()),
    0x000D: ("sha512", hashes.SHA512()),
}
DIGEST_BYTES = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
CURVES: Mapping[int, ec.EllipticCurve] = {0x0003: ec.SECP256R1(), 0x0004: ec.SECP384R1()}

# Attributes of a key: bound to this TPM and parent, made inside, restricted to what the TPM made, signing.
FIXED_TPM, FIXED_PARENT, MADE_INSIDE, RESTRICTED, DECRYPT, SIGN = (1 << n for n in (1, 4, 5, 16, 17, 18))
WANTED = FIXED_TPM | FIXED_PARENT | MADE_INSIDE | RESTRICTED | SIGN

_TCG_AK, _TCG_EK = ObjectIdentifier("2.23.133.8.3"), ObjectIdentifier("2.23.133.8.1")


@dataclass(frozen=True)
class Root:
    """A vTPM authority, and the key purposes that its attestation certificates have."""

    name: str
    purposes: frozenset[ObjectIdentifier]
    purpose_needed: bool


# By SHA-256 of the root certificate. Google's certificates have no purpose, or the one of an endorsement key.
ROOTS: Mapping[str, Root] = {
    "e6c596b17f8ffefba5c300f714cfb1260c6028704ecf7becc4ab5018efb00e95": Root(
        "Azure Virtual TPM Root 2023", frozenset({_TCG_AK}), True
    ),
    "594759594b9b61524f6c8ef668f7177f7b9066bc0674f2f49fe9e052be78beb2": Root(
        "Google Cloud EK/AK CA Root", frozenset({_TCG_AK, _TCG_EK}), False
    ),
    "9bd5285f8fb18502a7947e621ffd470266f49fcd3b73e19a190f690ad32a7caf": Root(
        "Google Cloud vTPM root signer", frozenset({_TCG_AK, _TCG_EK}), False
    ),
}

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


# --- structures --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attest:
    """TPMS_ATTEST of a quote."""

    qualified_signer: bytes
    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: int
    firmware: int
    selection: tuple[tuple[str, tuple[int, ...]], ...]
    pcr_digest: bytes


def parse_attest(raw: bytes, trail: Trail) -> Attest:
    """Take a TPMS_ATTEST apart; it must be a quote, made by a TPM, over known banks."""
    if len(raw) > MAX_QUOTE:
        trail.refuse("length", f"at most {MAX_QUOTE} bytes", f"{len(raw)} bytes")
    r = Reader(raw, trail)
    magic = r.big(4, "magic")
    trail.require(magic == MAGIC, "magic", f"{MAGIC:#x}", hex(magic))
    kind = r.big(2, "type")
    trail.require(kind == ATTEST_QUOTE, "type", f"{ATTEST_QUOTE:#x} (a quote)", hex(kind))
    signer, extra = r.sized("qualified signer", 80), r.sized("extra data", 64)
    clock, resets, restarts = r.big(8, "clock"), r.big(4, "reset count"), r.big(4, "restart count")
    safe = r.big(1, "safe flag")
    firmware = r.big(8, "firmware version")
    count = r.big(4, "selection count")
    if not 1 <= count <= len(HASHES):
        trail.refuse("selection", f"1 to {len(HASHES)} PCR banks", count)
    selection: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(count):
        bank = _hash(r.big(2, "bank"), trail, "selection")[0]
        bitmap = r.take(r.big(1, "bitmap length"), "bitmap")
        chosen = tuple(
            8 * at + bit for at, octet in enumerate(bitmap) for bit in range(8) if octet >> bit & 1
        )
        if not chosen or chosen[-1] > MAX_PCR or bank in dict(selection):
            trail.refuse("selection", f"each bank once, with PCRs up to {MAX_PCR}", bitmap)
        selection.append((bank, chosen))
    digest = r.sized("PCR digest", 64)
    r.end("the quote")
    return Attest(signer, extra, clock, resets, restarts, safe, firmware, tuple(selection), digest)


def _hash(number: int, trail: Trail, step: str) -> tuple[str, hashes.HashAlgorithm]:
    if number not in HASHES:
        trail.refuse(f"{step}.hash", "SHA-256, SHA-384 or SHA-512", f"algorithm {number:#06x}")
    return HASHES[number]


@dataclass(frozen=True)
class Signature:
    """TPMT_SIGNATURE: for RSA the bytes, for ECDSA (r, s) as DER."""

    scheme: str
    hash: str
    algorithm: hashes.HashAlgorithm
    value: bytes


def parse_signature(raw: bytes, trail: Trail, *, bare: bool = False) -> Signature:
    """Take a TPMT_SIGNATURE apart. `bare` is Azure's form: the RSASSA bytes over SHA-256 and nothing else."""
    step = "signature"
    if not 0 < len(raw) <= MAX_SIGNATURE:
        trail.refuse(step, f"1 to {MAX_SIGNATURE} bytes", f"{len(raw)} bytes")
    if bare:
        return Signature("rsassa", "sha256", hashes.SHA256(), raw)
    r = Reader(raw, trail, step)
    number = r.big(2, "scheme")
    scheme = SCHEMES.get(number)
    if scheme is None:
        trail.refuse(step, "RSASSA, RSAPSS or ECDSA", f"scheme {number:#06x}")
    name, algorithm = _hash(r.big(2, "hash"), trail, step)
    if scheme == "ecdsa":
        first, second = (int.from_bytes(r.sized(part, 66), "big") for part in ("r", "s"))
        value = encode_dss_signature(first, second)
    else:
        value = r.sized("signature", 512)
    r.end("the signature")
    return Signature(scheme, name, algorithm, value)


@dataclass(frozen=True)
class AttestationKey:
    """The key that signs quotes. `name` is the TPM's name of it, where its TPMT_PUBLIC was given."""

    public: PublicKey
    name: bytes

    @property
    def spki_digest(self) -> str:
        """SHA-256 of the public key, hex."""
        return hashlib.sha256(_spki(self.public)).hexdigest()


def _spki(public: PublicKey) -> bytes:
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def parse_public(raw: bytes, trail: Trail) -> AttestationKey:
    """Take a TPMT_PUBLIC apart; it must be a restricted signing key that cannot leave its TPM."""
    step = "ak"
    if not 0 < len(raw) <= MAX_PUBLIC:
        trail.refuse(step, f"1 to {MAX_PUBLIC} bytes", f"{len(raw)} bytes")
    r = Reader(raw, trail, step)
    kind, named = r.big(2, "type"), r.big(2, "name algorithm")
    name_hash, _ = _hash(named, trail, step)
    attributes = r.big(4, "attributes")
    good = attributes & WANTED == WANTED and not attributes & DECRYPT
    trail.require(good, "ak.attributes", "a restricted signing key fixed to its TPM", hex(attributes))
    r.sized("policy", 64)
    if r.big(2, "symmetric algorithm") != NULL:
        trail.refuse(step, "a key that only signs", "a symmetric algorithm")
    scheme = r.big(2, "scheme")
    if scheme != NULL:
        _hash(r.big(2, "scheme hash"), trail, step)
    public: PublicKey
    if kind == RSA:
        bits, exponent = r.big(2, "key bits"), r.big(4, "exponent") or 65537
        modulus = int.from_bytes(r.sized("modulus", 512), "big")
        public = trail.guard(step, "an RSA key", lambda: rsa.RSAPublicNumbers(exponent, modulus).public_key())
        if public.key_size != bits:
            trail.refuse(step, f"a modulus of {bits} bits", public.key_size)
    elif kind == ECC:
        curve = CURVES.get(r.big(2, "curve"))
        if curve is None:
            trail.refuse(step, "P-256 or P-384", "another curve")
        if r.big(2, "key derivation") != NULL:
            trail.refuse(step, "a key that only signs", "a key derivation scheme")
        x, y = (int.from_bytes(r.sized(part, 48), "big") for part in ("x", "y"))
        public = trail.guard(
            step, "a point on the curve", lambda: ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
        )
    else:
        trail.refuse(step, "an RSA or ECC key", f"type {kind:#06x}")
    r.end("the public key")
    check_strength(public, trail)
    digest = hashlib.new(name_hash, raw).digest()
    return AttestationKey(public, named.to_bytes(2, "big") + digest)


def check_strength(public: Any, trail: Trail) -> None:
    """RSA of at least 2048 bits, or P-256 or P-384."""
    if isinstance(public, rsa.RSAPublicKey):
        trail.require(public.key_size >= 2048, "ak.strength", "at least 2048 bits", public.key_size)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        good = isinstance(public.curve, ec.SECP256R1 | ec.SECP384R1)
        trail.require(good, "ak.strength", "P-256 or P-384", public.curve.name)
    else:
        trail.refuse("ak.strength", "an RSA or ECC key", type(public).__name__)


def load_key(pem: bytes, trail: Trail) -> AttestationKey:
    """A public key alone (PEM): nothing says that it is restricted, so only a certificate or a person can."""
    public = trail.guard("ak", "a public key", lambda: serialization.load_pem_public_key(pem))
    check_strength(public, trail)
    return AttestationKey(public, b"")  # type: ignore[arg-type]


# --- the event log -----------------------------------------------------------------------------------------

EV_NO_ACTION = 3
_SPEC_ID = b"Spec ID Event03\0"
_LOCALITY = b"StartupLocality\0"


@dataclass(frozen=True)
class Event:
    """One measurement: into which register, of what type, with which digest in each bank."""

    register: int
    type: int
    digests: Mapping[str, bytes]


@dataclass(frozen=True)
class Log:
    """A parsed event log."""

    events: tuple[Event, ...]
    locality: int  # at which PCR0 started


def parse_log(raw: bytes, trail: Trail) -> Log:
    """Take a crypto-agile TCG event log (binary_bios_measurements, or a CCEL table) apart."""
    step = "log"
    if len(raw) > MAX_LOG:
        trail.refuse(step, f"at most {MAX_LOG} bytes", f"{len(raw)} bytes")
    r = Reader(raw, trail, step)

    def data() -> bytes:
        size = r.little(4, "event length")
        if size > MAX_EVENT:
            trail.refuse(step, f"at most {MAX_EVENT} bytes of an event", size)
        return r.take(size, "event")

    r.little(4, "register")
    first = r.little(4, "event type")
    r.take(20, "digest")
    head = Reader(data(), trail, step)
    if first != EV_NO_ACTION or head.take(16, "signature") != _SPEC_ID:
        trail.refuse(step, "a crypto-agile log that begins with its specification", "another first event")
    head.take(8, "platform and version")
    count = head.little(4, "number of algorithms")
    if not 1 <= count <= 8:
        trail.refuse(step, "1 to 8 digest algorithms", count)
    names = {0x0004: "sha1"} | {number: name for number, (name, _) in HASHES.items()}
    sizes = {}
    for _ in range(count):
        number, size = head.little(2, "algorithm"), head.little(2, "digest length")
        if number in names and size != DIGEST_BYTES[names[number]]:
            trail.refuse(step, f"the true length of {names[number]}", size)
        if not 1 <= size <= 64 or number in sizes:
            trail.refuse(step, "each algorithm once, of 1 to 64 bytes", size)
        sizes[number] = size
    head.take(head.little(1, "vendor length"), "vendor")
    head.end("the specification")

    events: list[Event] = []
    locality = 0
    while r.rest:
        register, kind = r.little(4, "register"), r.little(4, "event type")
        digests = {}
        for _ in range(_digest_count(r, len(sizes), trail)):
            number = r.little(2, "algorithm")
            if number not in sizes or number in digests:
                trail.refuse(step, "a digest of each algorithm of this log", f"{number:#06x}")
            digests[number] = r.take(sizes[number], "digest")
        body = data()
        if kind == EV_NO_ACTION:  # measured into nothing
            if register == 0 and body.startswith(_LOCALITY) and len(body) == len(_LOCALITY) + 1:
                locality = body[-1]
            continue
        events.append(Event(register, kind, {names[n]: v for n, v in digests.items() if n in names}))
    return Log(tuple(events), locality)


def _digest_count(r: Reader, algorithms: int, trail: Trail) -> int:
    count = r.little(4, "digest count")
    if count != algorithms:
        trail.refuse("log", f"{algorithms} digests in an event", count)
    return count


def replay(events: Sequence[Event], bank: str, trail: Trail, locality: int = 0) -> dict[int, bytes]:
    """What the registers that the events name must hold: each starts at zero and is extended in order."""
    size = DIGEST_BYTES[bank]
    registers: dict[int, bytes] = {}
    for event in events:
        if bank not in event.digests:
            trail.refuse("log", f"a digest in bank {bank}", ", ".join(event.digests))
        start = bytes(size - 1) + bytes((locality,)) if event.register == 0 else bytes(size)
        held = registers.get(event.register, start)
        registers[event.register] = hashlib.new(bank, held + event.digests[bank]).digest()
    return registers


# --- verification ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a verified quote establishes. `ak_root` is empty where no certificate vouches for the key."""

    attest: Attest
    signature: Signature
    key: AttestationKey
    pcrs: Mapping[str, Mapping[int, bytes]]  # the quoted ones alone
    ak_root: str
    events: tuple[Event, ...] | None
    until: datetime | None  # of the key's certificates
    steps: tuple[Step, ...]
    kind: str = "tpm"
    ak_root_name: str = ""
    made: None = None  # a quote has the TPM's own clock alone
    lists: tuple[None, ...] = ()
    cautions: tuple[str, ...] = ()
    advisories: tuple[str, ...] = ()

    @property
    def tcb_text(self) -> str:
        return f"TPM firmware {self.attest.firmware:#x}"

    @property
    def binding(self) -> bytes:
        """What was asked to be signed along: the nonce or a hash."""
        return self.attest.extra_data

    @property
    def anchor(self) -> Anchor:
        """What vouches for the key: its certificates' root, or its enrolment alone."""
        if self.ak_root:
            return Anchor(self.ak_root_name, self.ak_root)
        return Anchor("the attestation key itself, enrolled by name", self.key.spki_digest)

    def names(self) -> frozenset[tuple[str, str]]:
        """By what a deny list may call this evidence."""
        values = {each.hex() for bank in self.pcrs.values() for each in bank.values() if any(each)}
        named = {("measurements", each) for each in values} | {("ak_spki", self.key.spki_digest)}
        if self.key.name:
            named.add(("ak_names", self.key.name.hex()))
        return frozenset(named)


def verify(
    quote: bytes,
    signature: bytes,
    key: AttestationKey,
    pcrs: Mapping[str, Mapping[int, bytes]],
    now: datetime,
    *,
    certificate: bytes = b"",
    authorities: bytes = b"",
    roots: Mapping[str, Root] = ROOTS,
    log: bytes = b"",
    bare: bool = False,
    kind: str = "tpm",
) -> Facts:
    """Verify that `key` signed this quote over exactly these PCR values.

    `pcrs` are values by bank and number; those that the quote does not cover are dropped. `certificate` (PEM,
    or DER with padding as read from the TPM) is followed over `authorities` (PEM) to one of `roots`. `log` is
    replayed and must give the quoted values of every register that it names.
    """
    trail = Trail(kind)
    attest = parse_attest(quote, trail)
    signed = parse_signature(signature, trail, bare=bare)
    _check_signature(key.public, signed, quote, trail)
    kept: dict[str, dict[int, bytes]] = {}
    whole = hashlib.new(signed.hash)
    for bank, chosen in attest.selection:
        kept[bank] = {}
        for index in chosen:
            value = pcrs.get(bank, {}).get(index)
            if value is None or len(value) != DIGEST_BYTES[bank]:
                trail.refuse(
                    "pcrs", f"a value of PCR {index} in bank {bank}", "none" if value is None else value
                )
            kept[bank][index] = value
            whole.update(value)
    trail.same("pcr_digest", attest.pcr_digest, whole.digest())
    events = None
    if log:
        parsed = parse_log(log, trail)
        for bank, values in kept.items():
            for index, value in replay(parsed.events, bank, trail, parsed.locality).items():
                if index in values:
                    trail.same(f"log.pcr{index}", value, values[index])
        events = parsed.events
    root, name, until = "", "", None
    if certificate:
        root, until = verify_key(key, certificate, authorities, now, trail, roots)
        name = roots[root].name
    return Facts(attest, signed, key, kept, root, events, until, tuple(trail.steps), kind, name)


def _check_signature(public: PublicKey, signed: Signature, quote: bytes, trail: Trail) -> None:
    def check() -> None:
        if isinstance(public, ec.EllipticCurvePublicKey):
            if signed.scheme != "ecdsa":
                raise ValueError(f"{signed.scheme} by an ECC key")
            public.verify(signed.value, quote, ec.ECDSA(signed.algorithm))
        elif signed.scheme == "rsassa":
            public.verify(signed.value, quote, padding.PKCS1v15(), signed.algorithm)
        elif signed.scheme == "rsapss":
            scheme = padding.PSS(padding.MGF1(signed.algorithm), signed.algorithm.digest_size)
            public.verify(signed.value, quote, scheme, signed.algorithm)
        else:
            raise ValueError("ECDSA by an RSA key")

    trail.guard("signature", "the quote signed by the attestation key", check)
    trail.require(True, "signature", "the quote signed by the attestation key", "as expected")


def verify_key(
    key: AttestationKey,
    certificate: bytes,
    authorities: bytes,
    now: datetime,
    trail: Trail,
    roots: Mapping[str, Root] = ROOTS,
) -> tuple[str, datetime]:
    """Follow the key's certificate to a root; returns the root's SHA-256 and when the chain ends."""
    step = "ak_chain"
    leaf = load_certificate(certificate, trail, step)
    own = certified_key(certificate, trail)
    trail.same(f"{step}.key", _spki(own.public), _spki(key.public))
    pool = certs.load_pem(trail, step, authorities, most=certs.MAX_POOL)
    chain = certs.order(trail, step, leaf, pool)
    until = certs.verify_chain(trail, step, chain, set(roots), now)
    found = certs.fingerprint(chain[-1])
    root = roots[found]
    purposes: Collection[ObjectIdentifier] | None = None
    for each in leaf.extensions:
        if isinstance(each.value, x509.ExtendedKeyUsage):
            purposes = list(each.value)
    good = not root.purpose_needed if purposes is None else bool(root.purposes & set(purposes))
    trail.require(good, f"{step}.purpose", f"an attestation key of {root.name}", _dotted(purposes))
    return found, until


def certified_key(certificate: bytes, trail: Trail) -> AttestationKey:
    """The key of a certificate, which is yet to be verified. Its name is not known, only its public half."""
    leaf = load_certificate(certificate, trail, "ak_chain")
    public = trail.guard("ak_chain", "a public key", leaf.public_key)
    check_strength(public, trail)
    return AttestationKey(public, b"")  # type: ignore[arg-type]


def _dotted(purposes: Collection[ObjectIdentifier] | None) -> str:
    return "no purpose" if purposes is None else ", ".join(each.dotted_string for each in purposes)


def load_certificate(raw: bytes, trail: Trail, step: str) -> x509.Certificate:
    """One certificate: PEM, or DER with whatever padding the TPM's memory had behind it."""
    if raw.lstrip().startswith(b"-----BEGIN"):
        found = certs.load_pem(trail, step, raw)
        trail.require(len(found) == 1, step, "one certificate", len(found))
        return found[0]
    der = certs.Der(raw, trail, step).item("the certificate", certs.SEQUENCE)[2]
    return certs.load_der(trail, step, der)


# --- Azure -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hcl:
    """What Azure's paravisor adds: a hardware report, and the runtime data that the report's data hashes."""

    report: bytes  # an SNP report; for TDX an unsigned TDREPORT that must not be believed
    hardware: str  # "snp" or "tdx"
    runtime: bytes
    key: AttestationKey
    user_data: bytes

    @property
    def digest(self) -> bytes:
        """What the hardware's report data must be: SHA-256 of the runtime data, then zeros."""
        return hashlib.sha256(self.runtime).digest() + bytes(32)


def parse_hcl(raw: bytes, trail: Trail) -> Hcl:
    """Take an HCL report apart. Its header is signed by nobody, so every byte of it is fixed here."""
    step = "hcl"
    if len(raw) > MAX_HCL:
        trail.refuse(step, f"at most {MAX_HCL} bytes", f"{len(raw)} bytes")
    r = Reader(raw, trail, step)
    magic, version, size = r.take(4, "magic"), r.little(4, "version"), r.little(4, "size")
    trail.require(magic == b"HCLA" and version in (1, 2), step, "HCLA of version 1 or 2", magic)
    request, rest = r.little(4, "request type"), r.take(16, "status")
    report = r.take(HCL_REPORT, "hardware report")
    total, one, kind, hash_kind, length = (r.little(4, "runtime header") for _ in range(5))
    hardware = {2: "snp", 4: "tdx"}.get(kind)
    if hardware is None or one != 1 or hash_kind != 1 or request != 2 or any(rest):
        trail.refuse(step, "a report of SNP (2) or TDX (4) with SHA-256", f"type {kind}, hash {hash_kind}")
    if total != length + 20 or size != HCL_HEAD + HCL_REPORT + total:
        trail.refuse(step, "lengths that fit", f"{size}, {total}, {length}")
    runtime = r.take(length, "runtime data")
    if any(r.rest):
        trail.refuse(step, "nothing but zeros after the runtime data", f"{len(r.rest)} bytes")
    found = read_json(trail, step, runtime, "the runtime data")
    return Hcl(report, hardware, runtime, _hcl_key(found, trail), _hcl_user_data(found, trail))


def _hcl_key(found: Any, trail: Trail) -> AttestationKey:
    def refuse(got: Any) -> NoReturn:
        trail.refuse("hcl.key", "one RSA key HCLAkPub", got)

    keys = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(keys, list):
        refuse("none")
    named = [each for each in keys if isinstance(each, dict) and each.get("kid") == "HCLAkPub"]
    if len(named) != 1 or named[0].get("kty") != "RSA" or named[0].get("key_ops") != ["sign"]:
        refuse(f"{len(named)} keys, or of another kind")

    def number(name: str) -> int:
        text = named[0][name]
        return int.from_bytes(base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True), "big")

    public = trail.guard(
        "hcl.key", "an RSA key", lambda: rsa.RSAPublicNumbers(number("e"), number("n")).public_key()
    )
    check_strength(public, trail)
    return AttestationKey(public, b"")


def _hcl_user_data(found: Any, trail: Trail) -> bytes:
    return trail.guard("hcl", "user-data in hex", lambda: bytes.fromhex(found.get("user-data", "")))


# --- judgement ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """[[allow]] kind = "tpm" or "swtpm", or part of an Azure entry. Which boots by which keys are wanted."""

    pcrs: Annotated[dict[int, tuple[str, ...]], rules.pcrs_rule(MAX_PCR, 32, 48, 64)]
    bank: Annotated[str, choice_rule("sha256", "sha384", "sha512")] = "sha256"
    ak_roots: Annotated[tuple[str, ...], rules.maybe_empty_hexes_rule(32)] = ()
    ak_names: Annotated[tuple[str, ...], rules.maybe_empty_hexes_rule(34, 50, 66)] = ()
    events: Annotated[dict[int, tuple[str, ...]] | None, rules.pcrs_rule(MAX_PCR, 32, 48, 64)] = None

    def flaw(self, hardware: bool = False) -> str | None:
        """What no single key can tell, or None. `hardware`: the entry's other part vouches for the key."""
        if not hardware and not self.ak_roots and not self.ak_names:
            return "ak_roots or ak_names: one must say which attestation keys are believed"
        for values in (*self.pcrs.values(), *(self.events or {}).values()):
            if any(len(each) != 2 * DIGEST_BYTES[self.bank] for each in values):
                return f"pcrs, events: values of another length than bank {self.bank} has"
        return None

    def judge(self, facts: Facts, trail: Trail, *, hardware: bool = False) -> None:
        """Require that these facts satisfy the whole rule."""
        attest = facts.attest
        size = len(attest.extra_data)
        trail.require(size >= MIN_NONCE, "nonce", f"at least {MIN_NONCE} bytes of nonce", f"{size} bytes")
        enrolled = facts.key.name.hex() in self.ak_names
        certified = facts.ak_root in self.ak_roots
        believed = hardware or enrolled or certified
        trail.require(
            believed, "ak", "a key that is certified, enrolled, or named by hardware", facts.key.spki_digest
        )
        trail.require(attest.safe == 1, "clock", "a clock that did not go back", attest.safe)
        quoted = facts.pcrs.get(self.bank, {})
        for index, allowed in sorted(self.pcrs.items()):
            if index not in quoted:  # a quote over fewer PCRs proves nothing of the others
                trail.refuse(f"pcr{index}", f"PCR {index} of bank {self.bank} in the quote", "not quoted")
            trail.one_of(f"pcr{index}", allowed, quoted[index])
        for index, allowed in sorted((self.events or {}).items()):
            seen = [each for each in facts.events or () if each.register == index]
            if index not in quoted or not seen:
                trail.refuse(
                    f"events{index}", f"a log with events of PCR {index}, and that PCR quoted", "none"
                )
            for event in seen:
                trail.one_of(f"events{index}", allowed, event.digests[self.bank])
