"""AMD SEV-SNP: what a guest's attestation report says, and whether AMD's keys vouch for it.

`verify` answers whether the report is genuine: signed by a chip key that AMD certified for that very firmware
version and chip. `Rule.judge` answers whether the guest is one that we want. Sources: AMD 56860 (SEV-SNP
firmware ABI) for the report, AMD 57230 (VCEK and VLEK certificates) for the extensions.

Milan's chip keys can be extracted by software alone (arXiv 2605.12990): its reports are labelled so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID

from mimir.attest import certs, rules
from mimir.attest.trail import Anchor, Reader, Step, Trail
from mimir.config import choice_rule, integer_rule

REPORT_BYTES = 1184
SIGNED_BYTES = 0x2A0
P384_ORDER = (
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
)
MAX_HWID = 64

# SHA-256 of AMD's self-signed root certificates (ARK), the only trust anchors.
ROOTS: Mapping[str, str] = {
    "milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    "genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
    "turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
}
# Where each firmware component's version stands in the eight bytes of a TCB version.
TCB_LAYOUT: Mapping[str, Mapping[str, int]] = {
    "milan": {"bl": 0, "tee": 1, "snp": 6, "ucode": 7},
    "genoa": {"bl": 0, "tee": 1, "snp": 6, "ucode": 7},
    "turin": {"fmc": 0, "bl": 1, "tee": 2, "snp": 3, "ucode": 7},
}
HWID_BYTES = {"milan": 64, "genoa": 64, "turin": 8}
CAUTIONS = {
    "milan": "Milan: software alone can extract chip keys, and forge reports of any TCB (arXiv 2605.12990)"
}

_ARC = "1.3.6.1.4.1.3704.1."
_PRODUCT, _HWID, _CSP_ID, _STRUCT = (certs.encode_oid(_ARC + end) for end in ("2", "4", "5", "1"))
_TCB_OIDS = {
    name: certs.encode_oid(_ARC + end)
    for name, end in (("bl", "3.1"), ("tee", "3.2"), ("snp", "3.3"), ("ucode", "3.8"), ("fmc", "3.9"))
}
_COMMON_NAME = certs.encode_oid("2.5.4.3")
# AlgorithmIdentifier of RSASSA-PSS with SHA-384, MGF1 over SHA-384 and 48 bytes of salt, with the default
# trailer written out or left out: AMD uses no other.
_PSS_SHA384 = {
    bytes.fromhex(
        "304606092a864886f70d01010a3039a00f300d06096086480165030402020500a11c301a06092a864886f70d010108"
        "300d06096086480165030402020500a203020130a303020101"
    ),
    bytes.fromhex(
        "304106092a864886f70d01010a3034a00f300d06096086480165030402020500a11c301a06092a864886f70d010108"
        "300d06096086480165030402020500a203020130"
    ),
}

# --- the report --------------------------------------------------------------------------------------------

SMT, MUST_BE_ONE, MIGRATE, DEBUG, SINGLE_SOCKET, CIPHERTEXT_HIDING = 16, 17, 18, 19, 20, 24
POLICY_BITS = 26  # bits beyond are of firmware that we do not know
KNOWN_PLATFORM = 0xFF  # SMT, TSME, ECC, RAPL off, ciphertext hiding, alias check, IOMMU write safe, TIO
ALIAS_CHECK = 5  # the firmware looked for aliased memory (Battering RAM)


@dataclass(frozen=True)
class Report:
    """The fields of an attestation report; integers are decoded, the rest is as it stands there."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    platform_info: int
    author_key_en: bool
    mask_chip_key: bool
    signing_key: str  # "vcek" or "vlek"
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    reported_tcb: bytes
    cpuid: tuple[int, int, int] | None  # family, model, stepping; from version 3
    chip_id: bytes
    committed_tcb: bytes
    launch_tcb: bytes
    current_version: str
    committed_version: str
    mitigations: tuple[int, int] | None  # at launch and now; version 5
    signature: tuple[int, int]

    @property
    def debug(self) -> bool:
        return bool(self.policy >> DEBUG & 1)


def parse(raw: bytes, trail: Trail) -> Report:
    """Take a report apart: exact length, known version, reserved fields zero."""
    trail.require(len(raw) == REPORT_BYTES, "length", f"{REPORT_BYTES} bytes", f"{len(raw)} bytes")
    r = Reader(raw, trail)

    def zero(size: int, what: str) -> None:
        got = r.take(size, what)
        if any(got):
            trail.refuse("reserved", f"zeros in the {size} bytes of {what}", got)

    version = r.little(4, "version")
    trail.require(version in (2, 3, 4, 5), "version", "2, 3, 4 or 5", version)
    guest_svn = r.little(4, "guest SVN")
    policy = r.little(8, "policy")
    family_id, image_id = r.take(16, "family id"), r.take(16, "image id")
    vmpl = r.little(4, "VMPL")
    algorithm = r.little(4, "signature algorithm")
    trail.require(algorithm == 1, "algorithm", "1 (ECDSA P-384 with SHA-384)", algorithm)
    current_tcb = r.take(8, "current TCB")
    platform_info = r.little(8, "platform info")
    key_info = r.little(4, "key info")
    zero(4, "reserved at 0x4c")
    report_data = r.take(64, "report data")
    measurement = r.take(48, "measurement")
    host_data = r.take(32, "host data")
    id_key_digest, author_key_digest = r.take(48, "id key"), r.take(48, "author key")
    report_id = r.take(32, "report id")
    r.take(32, "migration agent's report id")
    reported_tcb = r.take(8, "reported TCB")
    cpuid = None
    if version >= 3:
        family, model, stepping = r.take(3, "CPUID")
        cpuid = family, model, stepping
        zero(21, "reserved at 0x18b")
    else:
        zero(24, "reserved at 0x188")
    chip_id = r.take(64, "chip id")
    committed_tcb = r.take(8, "committed TCB")
    current_version = _firmware(r.take(3, "current version"))
    zero(1, "reserved at 0x1eb")
    committed_version = _firmware(r.take(3, "committed version"))
    zero(1, "reserved at 0x1ef")
    launch_tcb = r.take(8, "launch TCB")
    mitigations = None
    if version >= 5:
        mitigations = r.little(8, "launch mitigations"), r.little(8, "current mitigations")
    else:
        zero(16, "reserved at 0x1f8")
    zero(SIGNED_BYTES - r.at, "reserved before the signature")
    signature = r.little(72, "signature r"), r.little(72, "signature s")
    zero(REPORT_BYTES - r.at, "reserved after the signature")
    kind = {0: "vcek", 1: "vlek"}.get(key_info >> 2 & 7)
    if kind is None or key_info >> 5:
        trail.refuse("signing_key", "VCEK (0) or VLEK (1), other bits zero", hex(key_info))
    return Report(
        version,
        guest_svn,
        policy,
        family_id,
        image_id,
        vmpl,
        current_tcb,
        platform_info,
        bool(key_info & 1),
        bool(key_info >> 1 & 1),
        kind,
        report_data,
        measurement,
        host_data,
        id_key_digest,
        author_key_digest,
        report_id,
        reported_tcb,
        cpuid,
        chip_id,
        committed_tcb,
        launch_tcb,
        current_version,
        committed_version,
        mitigations,
        signature,
    )


def _firmware(raw: bytes) -> str:
    build, minor, major = raw
    return f"{major}.{minor}.{build}"


def product_of(report: Report, trail: Trail) -> str:
    """The product by CPU family and model, from version 3; one whose root is not pinned is refused."""
    family, model, _ = report.cpuid or (0, 0, 0)
    if family == 0x19 and model >> 4 == 0:
        return "milan"
    if family == 0x19 and model >> 4 in (0x1, 0xA):
        return "genoa"
    if family == 0x1A and model <= 0x11:
        return "turin"
    trail.refuse("product", "Milan, Genoa or Turin by CPUID", f"family {family:#x}, model {model:#x}")


# --- the chip's certificate --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vek:
    """What a VCEK or VLEK certificate says."""

    kind: str  # "vcek" or "vlek"
    product: str  # as in ROOTS
    product_name: str  # as it stands there: "Milan-B0"
    tcb: Mapping[str, int]
    hwid: bytes  # empty for a VLEK
    csp_id: str  # empty for a VCEK
    walked: certs.Walked

    @property
    def spki_digest(self) -> str:
        """SHA-256 of its public key: how a deny list names a chip's key, since its serial number is 0."""
        return hashlib.sha256(self.walked.spki).hexdigest()


def parse_vek(raw: bytes, trail: Trail) -> Vek:
    """Take a VCEK or VLEK certificate (DER, or one PEM) apart. Nothing is verified yet."""
    step = "vek"
    walked = certs.walk(trail, step, _der_of(raw, trail))
    kind = {b"SEV-VCEK": "vcek", b"SEV-VLEK": "vlek"}.get(_common_name(walked.subject, trail))
    if kind is None:
        trail.refuse(step, "common name SEV-VCEK or SEV-VLEK", walked.subject)
    found = walked.extensions

    def field(oid: bytes, what: str) -> certs.Der:
        if oid not in found:
            trail.refuse(step, f"an extension with the {what}", "none")
        return certs.Der(found[oid][1], trail, step)

    if any(critical for critical, _ in found.values()):
        trail.refuse(step, "no critical extension", "one")
    name = field(_PRODUCT, "product name")
    product_name = name.get("product name", certs.IA5_STRING).decode("ascii", "replace")
    name.end("product name")
    product = product_name.split("-")[0].lower()
    if product not in ROOTS:
        trail.refuse("product", "one of " + ", ".join(ROOTS), product_name)
    tcb = {}
    for component in TCB_LAYOUT[product]:
        value = field(_TCB_OIDS[component], f"{component} version")
        tcb[component] = value.whole(f"{component} version")
        value.end(f"{component} version")
    if (_HWID in found) == (_CSP_ID in found) or (_HWID in found) != (kind == "vcek"):
        trail.refuse(step, "a HWID in a VCEK, a CSP_ID in a VLEK, never both", kind)
    hwid, csp_id = b"", ""
    if kind == "vcek":
        hwid = found[_HWID][1]
        size = HWID_BYTES[product]
        if len(hwid) != size:  # some certificates wrap it in an OCTET STRING
            wrapped = certs.Der(hwid, trail, step)
            hwid = wrapped.get("HWID", certs.OCTET_STRING)
            wrapped.end("HWID")
        if len(hwid) != size:
            trail.refuse(step, f"a HWID of {size} bytes", hwid)
    else:
        provider = field(_CSP_ID, "CSP_ID")
        csp_id = provider.get("CSP_ID", certs.IA5_STRING, 0x0C).decode("ascii", "replace")
        provider.end("CSP_ID")
    return Vek(kind, product, product_name, tcb, hwid, csp_id, walked)


def _der_of(raw: bytes, trail: Trail) -> bytes:
    """DER from DER or from exactly one PEM certificate, without loading a certificate of serial 0."""
    import base64

    head, foot = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    if not raw.lstrip().startswith(head):
        return raw
    if len(raw) > 2 * certs.MAX_CERTIFICATE or raw.count(head) != 1 or not raw.rstrip().endswith(foot):
        trail.refuse("vek", "one PEM certificate", f"{len(raw)} bytes")
    body = b"".join(raw.strip()[len(head) : -len(foot)].split())
    return trail.guard("vek", "base64", lambda: base64.b64decode(body, validate=True))


def _common_name(name: bytes, trail: Trail) -> bytes:
    sets = certs.Der(name, trail, "vek").enter("a name", certs.SEQUENCE)
    found = b""
    while sets.more:
        pairs = sets.enter("a name", 0x31)
        while pairs.more:
            pair = pairs.enter("a name", certs.SEQUENCE)
            kind = pair.get("an attribute", certs.OID)
            value = pair.get("an attribute", 0x0C, 0x13, 0x14, 0x16, 0x1E)
            pair.end("an attribute")
            if kind == _COMMON_NAME:
                if found:
                    trail.refuse("vek", "one common name", "two")
                found = value
    return found


def verify_vek(
    vek: Vek,
    chain: bytes,
    now: datetime,
    trail: Trail,
    *,
    roots: Mapping[str, str] = ROOTS,
    crl: bytes | None = None,
    grace: timedelta = certs.NO_GRACE,
) -> tuple[datetime, certs.Revocations | None]:
    """Verify a chip's certificate up to AMD's root of its product; returns when the first of the chain ends.

    `chain` is the PEM that AMD's key server gives: ASK (or ASVK), then ARK. `crl` is the ARK's list, DER.
    """
    signer, root = verify_authorities(chain, vek.product, vek.kind, now, trail, roots)
    expected = certs.subject_of(signer)
    walked = vek.walked
    public = signer.public_key()
    if walked.algorithm not in _PSS_SHA384 or not isinstance(public, rsa.RSAPublicKey):
        trail.refuse("chain.vek", "RSASSA-PSS with SHA-384", walked.algorithm)
    same_name = walked.issuer == signer.subject.public_bytes()
    trail.require(
        same_name,
        "chain.vek",
        f"a certificate issued by {expected}",
        "as expected" if same_name else walked.issuer,
    )
    trail.guard(
        "chain.vek",
        f"the signature of {expected}",
        lambda: public.verify(walked.signature, walked.signed, _pss(), hashes.SHA384()),
    )
    trail.within("chain.dates", walked.not_before, now, walked.not_after)
    revocations = None
    if crl is not None:
        revocations = certs.verify_crl(trail, "crl", crl, root, now, grace)
        revocations.require_absent(trail, "crl.signer", signer.serial_number, expected)
        revocations.require_absent(trail, "crl.vek", walked.serial, vek.kind.upper())
    return min(walked.not_after, signer.not_valid_after_utc, root.not_valid_after_utc), revocations


def verify_authorities(
    chain: bytes, product: str, kind: str, now: datetime, trail: Trail, roots: Mapping[str, str] = ROOTS
) -> tuple[x509.Certificate, x509.Certificate]:
    """(ASK or ASVK, ARK) out of PEM: the pinned root of the product, and the signer of this kind of key."""
    found = certs.load_pem(trail, "chain", chain)
    trail.require(len(found) == 2, "chain", "ASK or ASVK, then ARK", f"{len(found)} certificates")
    signer, root = found
    _check_authority(trail, root, root, now)
    want, got = roots.get(product, "none is trusted"), certs.fingerprint(root)
    trail.require(want == got, "chain.root", f"AMD's root for {product}: {want}", got)
    _check_authority(trail, signer, root, now)
    # The key that signs VCEKs must not vouch for VLEKs, nor the other way round.
    names = [str(a.value) for a in signer.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    family = product.capitalize()
    expected = f"SEV-{family}" if kind == "vcek" else f"SEV-VLEK-{family}"
    trail.require(names == [expected], "chain.signer", expected, ", ".join(names))
    return signer, root


def _check_authority(
    trail: Trail, certificate: x509.Certificate, root: x509.Certificate, now: datetime
) -> None:
    def check() -> bool:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        certificate.verify_directly_issued_by(root)
        return (
            basic.ca
            and usage.key_cert_sign
            and isinstance(certificate.signature_hash_algorithm, hashes.SHA384)
        )

    good = trail.guard("chain.authority", "signed by the ARK", check)
    trail.require(good, "chain.authority", "a CA signed over SHA-384", "as expected" if good else "another")
    certs.check_dates(trail, "chain.dates", certificate, now)


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA384()), 48)


# --- verification ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a verified report establishes."""

    report: Report
    vek: Vek
    product: str
    root: str  # SHA-256 of the trust anchor
    until: datetime  # when the first certificate, or the revocation list, ends
    crl: certs.Revocations | None
    steps: tuple[Step, ...]
    kind = "snp"

    @property
    def binding(self) -> bytes:
        """What the guest asked to have signed: 64 bytes."""
        return self.report.report_data

    @property
    def lists(self) -> tuple[certs.Revocations | None, ...]:
        """The revocation lists that a policy may demand, None where one was not given."""
        return (self.crl,)

    @property
    def anchor(self) -> Anchor:
        """What the chain ends in."""
        return Anchor(f"AMD root key for {self.product}", self.root)

    @property
    def cautions(self) -> tuple[str, ...]:
        caution = CAUTIONS.get(self.product)
        return (caution,) if caution else ()

    def tcb(self, which: str = "reported") -> dict[str, int]:
        """A TCB version by component: "reported", "committed", "launch" or "current"."""
        raw: bytes = getattr(self.report, f"{which}_tcb")
        return {name: raw[at] for name, at in TCB_LAYOUT[self.product].items()}

    @property
    def tcb_text(self) -> str:
        return " ".join(f"{name} {value}" for name, value in self.tcb().items())

    advisories: tuple[str, ...] = ()
    made: None = None  # a report carries no time: the nonce makes it fresh

    def names(self) -> frozenset[tuple[str, str]]:
        """By what a deny list may call this evidence."""
        report = self.report
        named = {("measurements", report.measurement), ("vek_spki", bytes.fromhex(self.vek.spki_digest))}
        if any(report.chip_id):
            named.add(("chip_ids", report.chip_id))
        for digest in (report.id_key_digest, report.author_key_digest):
            if any(digest):
                named.add(("id_keys", digest))
        return frozenset((kind, raw.hex()) for kind, raw in named)


def verify(
    report: bytes,
    vek: bytes,
    chain: bytes,
    now: datetime,
    *,
    roots: Mapping[str, str] = ROOTS,
    crl: bytes | None = None,
    grace: timedelta = certs.NO_GRACE,
) -> Facts:
    """Verify that a genuine AMD chip made this report; say nothing of whether the guest is wanted.

    `report` is 1184 bytes; `vek` the chip's certificate, DER or PEM; `chain` as for `verify_vek`. Without
    `crl` the facts say that revocation was not looked at, and a policy that demands a list refuses.
    """
    trail = Trail("snp")
    parsed = parse(report, trail)
    key = parse_vek(vek, trail)
    trail.require(parsed.signing_key == key.kind, "signing_key", parsed.signing_key, key.kind)
    if parsed.cpuid is not None:
        by_cpu = product_of(parsed, trail)
        trail.require(by_cpu == key.product, "product", f"{by_cpu} by CPUID", key.product)
    else:
        trail.require(
            key.product in ("milan", "genoa"), "product", "Milan or Genoa in version 2", key.product
        )
    until, revocations = verify_vek(key, chain, now, trail, roots=roots, crl=crl, grace=grace)
    _check_signature(report, parsed, key, trail)
    layout = TCB_LAYOUT[key.product]
    got = {name: parsed.reported_tcb[at] for name, at in layout.items()}
    trail.require(got == dict(key.tcb), "tcb", f"the certificate's TCB {dict(key.tcb)}", got)
    unused = [parsed.reported_tcb[at] for at in range(8) if at not in layout.values()]
    trail.require(not any(unused), "tcb", "zeros in unused TCB bytes", unused)
    if parsed.mask_chip_key:
        trail.require(not any(parsed.chip_id), "chip", "a masked chip id", parsed.chip_id)
    elif key.kind == "vcek":
        size = len(key.hwid)
        trail.same("chip", key.hwid, parsed.chip_id[:size])
        trail.require(not any(parsed.chip_id[size:]), "chip", "zeros after the HWID", parsed.chip_id[size:])
    if revocations is not None:
        until = min(until, revocations.until + grace)
    return Facts(parsed, key, key.product, roots[key.product], until, revocations, tuple(trail.steps))


def _check_signature(raw: bytes, report: Report, key: Vek, trail: Trail) -> None:
    public = trail.guard("vek", "a public key", lambda: serialization.load_der_public_key(key.walked.spki))
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP384R1):
        trail.refuse("vek", "a P-384 key", type(public).__name__)
    r, s = report.signature
    if not (0 < r < P384_ORDER and 0 < s < P384_ORDER):
        trail.refuse("signature", "r and s below the order of P-384", "out of range")
    trail.guard(
        "signature",
        f"the report signed by the {key.kind.upper()}",
        lambda: public.verify(encode_dss_signature(r, s), raw[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384())),
    )
    trail.require(True, "signature", f"signed by the {key.kind.upper()}", "as expected")


# --- judgement ---------------------------------------------------------------------------------------------

_version = integer_rule(0, 255)


@dataclass(frozen=True)
class Product:
    """[[allow.product]] An allowed processor family, and the least version of each of its firmwares."""

    name: Annotated[str, choice_rule(*ROOTS)]
    bl: Annotated[int, _version]
    tee: Annotated[int, _version]
    snp: Annotated[int, _version]
    ucode: Annotated[int, _version]
    fmc: Annotated[int | None, _version] = None  # Turin only


@dataclass(frozen=True)
class Rule:
    """[[allow]] kind = "snp". Which guests on which chips are wanted. Debug cannot be allowed."""

    product: tuple[Product, ...]
    measurements: Annotated[tuple[str, ...], rules.hexes_rule(48)]
    host_data: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(32)]
    chip_ids: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(64)]
    signing_key: Annotated[tuple[str, ...], rules.words_rule("vcek", "vlek")] = ("vcek",)
    csp_ids: Annotated[tuple[str, ...], rules.words_rule()] = ()  # providers, needed for a VLEK
    masked_chip: Annotated[bool, rules.flag_rule] = False  # accept a report that hides its chip
    id_key_digests: Annotated[tuple[str, ...] | None, rules.hexes_rule(48)] = None
    author_key_digests: Annotated[tuple[str, ...] | None, rules.hexes_rule(48)] = None
    vmpl_max: Annotated[int, integer_rule(0, 3)] = 0
    guest_svn_min: Annotated[int, integer_rule(0, 2**32 - 1)] = 0
    forbid_smt: Annotated[bool, rules.flag_rule] = False
    require_single_socket: Annotated[bool, rules.flag_rule] = False
    require_ciphertext_hiding: Annotated[bool, rules.flag_rule] = False
    require_alias_check: Annotated[bool, rules.flag_rule] = True  # against Battering RAM

    def flaw(self) -> str | None:
        """What no single key can tell, or None."""
        names = [each.name for each in self.product]
        if not names or len(set(names)) != len(names):
            return "product: at least one, and each only once"
        for each in self.product:
            if (each.fmc is not None) != (each.name == "turin"):
                return f"product {each.name}: fmc is a component of Turin, and needed there"
        if ("vlek" in self.signing_key) != bool(self.csp_ids):
            return 'csp_ids: needed with signing_key "vlek", and only there'
        return None

    def judge(self, facts: Facts, trail: Trail) -> None:
        """Require that these facts satisfy the whole rule."""
        report = facts.report
        check_policy_bits(report, trail)
        allowed = {each.name: each for each in self.product}
        trail.require(facts.product in allowed, "product", ", ".join(allowed), facts.product)
        least = allowed[facts.product]
        for which in ("reported", "committed", "launch"):
            for component, got in facts.tcb(which).items():
                want = getattr(least, component)
                trail.require(got >= want, f"tcb.{which}", f"{component} at least {want}", got)
        trail.one_of("measurement", self.measurements, report.measurement)
        if self.host_data is not None:
            trail.one_of("host_data", self.host_data, report.host_data)
        trail.require(
            report.signing_key in self.signing_key, "signing_key", self.signing_key, report.signing_key
        )
        if report.signing_key == "vlek":
            trail.require(facts.vek.csp_id in self.csp_ids, "csp_id", self.csp_ids, facts.vek.csp_id)
        if report.mask_chip_key or not any(report.chip_id):
            # A VLEK leaves the chip unnamed on purpose; a VCEK's report that does so must be asked for.
            open_ = self.masked_chip or report.signing_key == "vlek"
            trail.require(open_ and self.chip_ids is None, "chip", "a report that names its chip", "masked")
        elif self.chip_ids is not None:
            trail.one_of("chip", self.chip_ids, report.chip_id)
        if self.id_key_digests is not None:
            trail.one_of("id_key", self.id_key_digests, report.id_key_digest)
        if self.author_key_digests is not None:
            # Without the flag the field is not vouched for by anybody.
            trail.require(report.author_key_en, "author_key", "an author key in use", "none")
            trail.one_of("author_key", self.author_key_digests, report.author_key_digest)
        trail.require(report.vmpl <= self.vmpl_max, "vmpl", f"at most {self.vmpl_max}", report.vmpl)
        svn = report.guest_svn
        trail.require(svn >= self.guest_svn_min, "guest_svn", f"at least {self.guest_svn_min}", svn)
        bits, platform = report.policy, report.platform_info
        if self.forbid_smt:
            trail.require(not bits >> SMT & 1 and not platform & 1, "smt", "off", "on or allowed")
        if self.require_single_socket:
            trail.require(
                bool(bits >> SINGLE_SOCKET & 1), "single_socket", "required by the guest", hex(bits)
            )
        if self.require_ciphertext_hiding:
            hidden = bool(bits >> CIPHERTEXT_HIDING & 1)
            trail.require(hidden, "ciphertext_hiding", "required by the guest", hex(bits))
        if self.require_alias_check:
            done = bool(platform >> ALIAS_CHECK & 1)
            trail.require(done, "alias_check", "memory checked for aliases", hex(platform))


def check_policy_bits(report: Report, trail: Trail) -> None:
    """What no policy can allow: debug, migration, bits that mean something we do not know."""
    bits, platform = report.policy, report.platform_info
    trail.require(not report.debug, "debug", "a guest that cannot be debugged", hex(bits))
    trail.require(not bits >> MIGRATE & 1, "migration", "no migration agent", hex(bits))
    trail.require(bool(bits >> MUST_BE_ONE & 1), "policy_bits", "bit 17 set", hex(bits))
    trail.require(not bits >> POLICY_BITS, "policy_bits", f"bits below {POLICY_BITS}", hex(bits))
    trail.require(not platform & ~KNOWN_PLATFORM, "platform_info", "known bits", hex(platform))
