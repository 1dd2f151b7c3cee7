"""Intel TDX: what a trust domain's quote says, and whether Intel vouches for the platform that made it.

Two verifiers must agree. Ours takes the quote apart, follows every signature and evaluates the TCB levels, so
that fields and reasons are ours; then `dcap-qvl` (Phala) does the same in its own way, and `Rule.judge`
refuses what it refuses or rates otherwise. Collateral is an argument; nothing here fetches it.

Sources: Intel's DCAP quote format 4 and 5, the TCB info and QE identity of the PCS API version 4, and the
order of checks of Intel's quote verification library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from mimir.attest import certs, rules
from mimir.attest.trail import Anchor, Reader, Step, Trail, read_json
from mimir.config import integer_rule

MAX_QUOTE = 16 << 10
MAX_COLLATERAL = 1 << 20  # of one text; the largest seen has 20 kB
ROOTS = frozenset({"44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"})  # Intel SGX Root CA
INTEL_QE = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
TDX = 0x81
BODY_BYTES = {"td10": 584, "td15": 648}
COMPONENTS = 16

# TD attributes. Bit 0 is debug and 1 to 7 are its kin; of the rest we know these.
SEPT_VE_DISABLE, MIGRATABLE, PROTECTION_KEYS, KEY_LOCKER, PERFMON = 28, 29, 30, 31, 63

# From best to worst; what no level matches is "NotSupported".
STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
    "NotSupported",
)
ALLOWABLE = STATUSES[:-2]

_SGX = "1.2.840.113741.1.13.1"
_SGX_EXTENSION = x509.ObjectIdentifier(_SGX)


@dataclass(frozen=True)
class Quote:
    """The fields of a quote; byte strings as they stand there."""

    version: int
    body_kind: str  # "td10" or "td15"
    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seamattributes: bytes
    tdattributes: bytes
    xfam: bytes
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmr: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    tee_tcb_svn2: bytes  # empty for td10, like the next
    mrservicetd: bytes
    signed: bytes  # header and body
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_signature: bytes
    qe_auth: bytes
    pck_chain: bytes  # PEM
    canonical: bytes  # the quote without padding: what is hashed, cached and handed on
    padding: int

    @property
    def attributes(self) -> int:
        return int.from_bytes(self.tdattributes, "little")

    @property
    def debug(self) -> bool:
        return bool(self.attributes & 1)

    @property
    def sept_ve_disable(self) -> bool:
        return bool(self.attributes >> SEPT_VE_DISABLE & 1)


def parse(raw: bytes, trail: Trail) -> Quote:
    """Take a quote apart. Every length must fit exactly; after the quote only zeros may follow."""
    trail.require(0 < len(raw) <= MAX_QUOTE, "length", f"1 to {MAX_QUOTE} bytes", f"{len(raw)} bytes")
    r = Reader(raw, trail)
    version = r.little(2, "version")
    trail.require(version in (4, 5), "version", "4 or 5", version)
    key_type = r.little(2, "attestation key type")
    trail.require(key_type == 2, "algorithm", "2 (ECDSA P-256)", key_type)
    tee = r.little(4, "TEE type")
    trail.require(tee == TDX, "tee", f"{TDX:#x} (TDX)", hex(tee))
    r.take(4, "reserved")
    vendor = r.take(16, "QE vendor")
    trail.require(vendor == INTEL_QE, "vendor", INTEL_QE, vendor)
    r.take(20, "user data")
    kind = "td10"
    if version == 5:
        number, size = r.little(2, "body type"), r.little(4, "body size")
        kind = {2: "td10", 3: "td15"}.get(number, "")
        fits = size == BODY_BYTES.get(kind)
        trail.require(fits, "body", "type 2 of 584 bytes or type 3 of 648", f"type {number} of {size} bytes")
    tee_tcb_svn = r.take(16, "TEE TCB SVN")
    mrseam, mrsignerseam = r.take(48, "MRSEAM"), r.take(48, "MRSIGNERSEAM")
    seamattributes, tdattributes, xfam = (
        r.take(8, each) for each in ("SEAM attributes", "attributes", "XFAM")
    )
    mrtd, mrconfigid, mrowner, mrownerconfig = (r.take(48, "a measurement") for _ in range(4))
    rtmr = (r.take(48, "RTMR0"), r.take(48, "RTMR1"), r.take(48, "RTMR2"), r.take(48, "RTMR3"))
    report_data = r.take(64, "report data")
    tee_tcb_svn2 = mrservicetd = b""
    if kind == "td15":
        tee_tcb_svn2, mrservicetd = r.take(16, "TEE TCB SVN 2"), r.take(48, "MRSERVICETD")
    signed = raw[: r.at]
    section = Reader(r.take(r.little(4, "signature length"), "signature section"), trail)
    end, padding = r.at, r.rest
    trail.require(not any(padding), "padding", "nothing but zeros after the quote", f"{len(padding)} bytes")
    signature, attestation_key = section.take(64, "signature"), section.take(64, "attestation key")
    outer = section.little(2, "certification type")
    trail.require(outer == 6, "certification", "type 6 (QE report)", outer)
    inner = Reader(section.take(section.little(4, "certification length"), "certification data"), trail)
    section.end("the signature section")
    qe_report, qe_signature = inner.take(384, "QE report"), inner.take(64, "QE signature")
    qe_auth = inner.take(inner.little(2, "authentication length"), "QE authentication data")
    chain_type = inner.little(2, "PCK certification type")
    trail.require(chain_type == 5, "certification", "type 5 (PCK chain)", chain_type)
    pck_chain = inner.take(inner.little(4, "PCK chain length"), "PCK chain").rstrip(b"\0")
    inner.end("the certification data")
    return Quote(
        version,
        kind,
        tee_tcb_svn,
        mrseam,
        mrsignerseam,
        seamattributes,
        tdattributes,
        xfam,
        mrtd,
        mrconfigid,
        mrowner,
        mrownerconfig,
        rtmr,
        report_data,
        tee_tcb_svn2,
        mrservicetd,
        signed,
        signature,
        attestation_key,
        qe_report,
        qe_signature,
        qe_auth,
        pck_chain,
        raw[:end],
        len(padding),
    )


# --- the platform's certificate ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Platform:
    """What Intel's certificate says of the platform."""

    ppid: bytes
    svns: tuple[int, ...]
    pcesvn: int
    pceid: bytes
    fmspc: bytes


def parse_platform(certificate: x509.Certificate, trail: Trail) -> Platform:
    """Read the SGX extension of a PCK certificate."""
    step = "pck"

    def raw() -> bytes:
        found = certificate.extensions.get_extension_for_oid(_SGX_EXTENSION).value
        if not isinstance(found, x509.UnrecognizedExtension):
            raise ValueError("another kind of extension")
        return found.value

    outer = certs.Der(trail.guard(step, f"the extension {_SGX}", raw), trail, step)
    fields = _pairs(outer, "", trail)
    outer.end("the extension")
    tcb_at = certs.encode_oid(f"{_SGX}.2")
    if tcb_at not in fields:
        trail.refuse(step, "a TCB", "none")
    nested = _pairs(certs.Der(fields[tcb_at], trail, step), f"{_SGX}.2", trail)

    def whole(source: Mapping[bytes, bytes], end: str) -> int:
        item = certs.Der(source.get(certs.encode_oid(f"{_SGX}.{end}"), b""), trail, step)
        value = item.whole(f"field {end}")
        item.end(f"field {end}")
        return value

    def octets(end: str, size: int) -> bytes:
        item = certs.Der(fields.get(certs.encode_oid(f"{_SGX}.{end}"), b""), trail, step)
        value = item.get(f"field {end}", certs.OCTET_STRING)
        item.end(f"field {end}")
        if len(value) != size:
            trail.refuse(step, f"{size} bytes in field {end}", value)
        return value

    svns = tuple(whole(nested, f"2.{index}") for index in range(1, COMPONENTS + 1))
    return Platform(octets("1", 16), svns, whole(nested, "2.17"), octets("3", 2), octets("4", 6))


def peek_fmspc(quote: Quote, trail: Trail) -> str:
    """The platform family that an unverified quote names: says which collateral to take, and nothing else."""
    chain = certs.load_pem(trail, "chain", quote.pck_chain, exact=True)  # at least one
    return parse_platform(chain[0], trail).fmspc.hex()


def _pairs(outer: certs.Der, what: str, trail: Trail) -> dict[bytes, bytes]:
    """A SEQUENCE of (OID, value) pairs: OID contents to the value's DER."""
    found: dict[bytes, bytes] = {}
    listed = outer.enter(f"the extension {what}", certs.SEQUENCE)
    while listed.more:
        pair = listed.enter("a pair", certs.SEQUENCE)
        oid = pair.get("its name", certs.OID)
        value = pair.item(
            "its value", certs.INTEGER, certs.OCTET_STRING, certs.SEQUENCE, certs.ENUMERATED, certs.BOOLEAN
        )[2]
        pair.end("a pair")
        if oid in found:
            trail.refuse("pck", "each field once", oid)
        found[oid] = value
    return found


# --- collateral --------------------------------------------------------------------------------------------

COLLATERAL_KEYS = frozenset(
    {
        "pck_crl_issuer_chain",
        "root_ca_crl",
        "pck_crl",
        "tcb_info_issuer_chain",
        "tcb_info",
        "tcb_info_signature",
        "qe_identity_issuer_chain",
        "qe_identity",
        "qe_identity_signature",
    }
)


@dataclass(frozen=True)
class Level:
    """One TCB level that matched."""

    status: str
    date: str
    advisories: tuple[str, ...]


NO_LEVEL = Level("NotSupported", "", ())


def read_collateral(raw: bytes, trail: Trail) -> dict[str, str]:
    """The nine texts of one platform family's collateral (JSON); CRLs and signatures in hex."""
    step = "collateral"
    if len(raw) > MAX_COLLATERAL:
        trail.refuse(step, f"at most {MAX_COLLATERAL} bytes", f"{len(raw)} bytes")
    found = read_json(trail, step, raw, "the collateral")
    if not isinstance(found, dict) or not COLLATERAL_KEYS <= set(found) <= COLLATERAL_KEYS | {
        "pck_certificate_chain"
    }:
        trail.refuse(step, "the keys " + ", ".join(sorted(COLLATERAL_KEYS)), type(found).__name__)
    if not all(isinstance(found[key], str) for key in COLLATERAL_KEYS):
        trail.refuse(step, "nothing but texts", "another type")
    return {key: found[key] for key in COLLATERAL_KEYS}


def _signed_json(
    trail: Trail,
    step: str,
    found: Mapping[str, str],
    name: str,
    identity: str,
    root: x509.Certificate,
    now: datetime,
) -> tuple[dict[str, Any], datetime, x509.Certificate]:
    """(contents, nextUpdate, signer) of a signed JSON, verified over its exact bytes up to the root."""
    chain = certs.load_pem(trail, f"{step}.chain", found[f"{name}_issuer_chain"].encode())
    certs.verify_chain(trail, f"{step}.chain", chain, {certs.fingerprint(root)}, now)
    signature = trail.guard(step, "a signature in hex", lambda: bytes.fromhex(found[f"{name}_signature"]))
    _ecdsa(trail, f"{step}.signature", chain[0].public_key(), signature, found[name].encode())
    contents = read_json(trail, step, found[name], name)
    if not isinstance(contents, dict):
        trail.refuse(step, "a table", type(contents).__name__)
    trail.require(contents.get("id") == identity, f"{step}.id", identity, contents.get("id"))
    issued, until = (_json_time(trail, step, contents, key) for key in ("issueDate", "nextUpdate"))
    trail.within(f"{step}.dates", issued, now, until)
    return contents, until, chain[0]


@dataclass(frozen=True)
class _Opened:
    """Verified collateral."""

    lists: tuple[certs.Revocations, certs.Revocations]  # the root's, the PCK CA's
    info: dict[str, Any]
    identity: dict[str, Any]
    evaluation: int
    until: datetime


def _open_collateral(
    trail: Trail,
    found: Mapping[str, str],
    root: x509.Certificate,
    authority: x509.Certificate,
    now: datetime,
    grace: timedelta,
) -> _Opened:
    """Verify every signature and date of collateral, and that its signers are not revoked."""

    def revocations(name: str, key: str, issuer: x509.Certificate) -> certs.Revocations:
        listed = trail.guard(f"crl.{name}", "a list in hex", lambda: bytes.fromhex(found[key]))
        return certs.verify_crl(trail, f"crl.{name}", listed, issuer, now, grace)

    by_root = revocations("root", "root_ca_crl", root)
    by_root.require_absent(trail, "crl.root", authority.serial_number, "the PCK CA")
    by_authority = revocations("pck", "pck_crl", authority)
    info, info_until, info_signer = _signed_json(trail, "tcb_info", found, "tcb_info", "TDX", root, now)
    identity, qe_until, qe_signer = _signed_json(
        trail, "qe_identity", found, "qe_identity", "TD_QE", root, now
    )
    for signer in (info_signer, qe_signer):
        by_root.require_absent(trail, "crl.root", signer.serial_number, "the TCB signer")

    def evaluation() -> int:
        return min(_whole(each["tcbEvaluationDataNumber"]) for each in (info, identity))

    number = trail.guard("tcb_info", "a tcbEvaluationDataNumber", evaluation)
    until = min(info_until, qe_until, by_root.until + grace, by_authority.until + grace)
    return _Opened((by_root, by_authority), info, identity, number, until)


def verify_collateral(
    raw: bytes, now: datetime, *, roots: Collection[str] = ROOTS, grace: timedelta = certs.NO_GRACE
) -> tuple[str, datetime]:
    """Verify collateral without a quote, as it comes from Intel; returns its FMSPC and when it ends."""
    trail = Trail("tdx")
    found = read_collateral(raw, trail)
    chain = certs.load_pem(trail, "crl.chain", found["pck_crl_issuer_chain"].encode())
    trail.require(len(chain) == 2, "crl.chain", "the PCK CA, the root", f"{len(chain)} certificates")
    certs.verify_chain(trail, "crl.chain", chain, roots, now, leaf_is_ca=True)
    opened = _open_collateral(trail, found, chain[1], chain[0], now, grace)
    return str(opened.info.get("fmspc", "")).lower(), opened.until


def _json_time(trail: Trail, step: str, contents: Mapping[str, Any], key: str) -> datetime:
    def parse() -> datetime:
        return datetime.strptime(contents[key], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)

    return trail.guard(step, f"{key} as a time", parse)


def _ecdsa(trail: Trail, step: str, public: Any, signature: bytes, signed: bytes) -> None:
    """Verify r || s, big-endian, by a P-256 key over SHA-256."""
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        trail.refuse(step, "a P-256 key", type(public).__name__)
    if len(signature) != 64:
        trail.refuse(step, "64 bytes of signature", f"{len(signature)} bytes")
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    trail.guard(
        step,
        "a signature that verifies",
        lambda: public.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256())),
    )
    trail.require(True, step, "a signature that verifies", "as expected")


def _level(trail: Trail, step: str, entry: Any) -> Level:
    """The outcome of one matching TCB level, typed."""

    def read() -> Level:
        status, advisories = entry["tcbStatus"], entry.get("advisoryIDs", [])
        if status not in STATUSES or not all(isinstance(each, str) for each in advisories):
            raise ValueError(f"status {status!r}")
        return Level(status, str(entry["tcbDate"]), tuple(advisories))

    return trail.guard(step, "a TCB level of known status", read)


def _platform_level(trail: Trail, quote: Quote, platform: Platform, levels: Any) -> Level:
    """The first level whose every component the platform reaches."""
    # With a module version in byte 1, bytes 0 and 1 are judged by the module's own identity.
    first = 0 if quote.tee_tcb_svn[1] == 0 else 2

    def match() -> Any:
        for entry in levels:
            tcb = entry["tcb"]
            sgx = [_whole(each["svn"]) for each in tcb["sgxtcbcomponents"]]
            tdx = [_whole(each["svn"]) for each in tcb["tdxtcbcomponents"]]
            if len(sgx) != COMPONENTS or len(tdx) != COMPONENTS:
                raise ValueError("not sixteen components")
            if (
                all(have >= need for have, need in zip(platform.svns, sgx, strict=True))
                and platform.pcesvn >= _whole(tcb["pcesvn"])
                and all(quote.tee_tcb_svn[i] >= tdx[i] for i in range(first, COMPONENTS))
            ):
                return entry
        return None

    entry = trail.guard("tcb_info.levels", "levels of sixteen components", match)
    return NO_LEVEL if entry is None else _level(trail, "tcb_info.levels", entry)


def _svn_level(trail: Trail, step: str, svn: int, levels: Any) -> Level:
    """The first level whose single version is reached."""

    def match() -> Any:
        return next((each for each in levels if svn >= _whole(each["tcb"]["isvsvn"])), None)

    entry = trail.guard(step, "levels of one version", match)
    return NO_LEVEL if entry is None else _level(trail, step, entry)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("not a whole number")
    return value


def _module_level(trail: Trail, quote: Quote, info: Mapping[str, Any]) -> Level:
    """Who signed the TDX module, and how current it is."""
    version = quote.tee_tcb_svn[1]
    step = "tdx_module"

    def find() -> tuple[bytes, bytes, bytes, Any]:
        if version == 0:
            source, levels = info["tdxModule"], None
        else:
            name = f"TDX_{version:02X}"
            source = next(each for each in info["tdxModuleIdentities"] if each["id"].upper() == name)
            levels = source["tcbLevels"]
        fixed = (bytes.fromhex(source[key]) for key in ("mrsigner", "attributes", "attributesMask"))
        return (*fixed, levels)  # type: ignore[return-value]

    try:
        signer, attributes, mask, levels = find()
    except StopIteration:
        trail.refuse(step, f"an identity for module version {version}", "none")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        trail.refuse(step, "module identities that can be read", f"{type(error).__name__}: {error}")
    trail.same(f"{step}.signer", signer, quote.mrsignerseam)
    trail.same(f"{step}.attributes", attributes, _masked(trail, step, quote.seamattributes, mask))
    if levels is None:
        return Level("UpToDate", "", ())
    return _svn_level(trail, step, quote.tee_tcb_svn[0], levels)


def _masked(trail: Trail, step: str, value: bytes, mask: bytes) -> bytes:
    if len(value) != len(mask):
        trail.refuse(step, f"a mask of {len(value)} bytes", mask)
    return bytes(a & b for a, b in zip(value, mask, strict=True))


def _qe_level(trail: Trail, quote: Quote, identity: Mapping[str, Any]) -> Level:
    """Whether the quoting enclave is Intel's, and how current it is."""
    report, step = quote.qe_report, "qe"

    def read(key: str, size: int) -> bytes:
        raw: bytes = trail.guard(step, f"{key} in hex", lambda: bytes.fromhex(identity[key]))
        if len(raw) != size:
            trail.refuse(step, f"{size} bytes of {key}", raw)
        return raw

    trail.same(f"{step}.signer", read("mrsigner", 32), report[128:160])
    product = int.from_bytes(report[256:258], "little")
    trail.require(identity.get("isvprodid") == product, f"{step}.product", identity.get("isvprodid"), product)
    # MISCSELECT is written as a number, so its bytes stand the other way round in the report.
    misc = _masked(trail, step, report[16:20][::-1], read("miscselectMask", 4))
    trail.same(f"{step}.miscselect", read("miscselect", 4), misc)
    attributes = _masked(trail, step, report[48:64], read("attributesMask", 16))
    trail.same(f"{step}.attributes", read("attributes", 16), attributes)
    return _svn_level(trail, step, int.from_bytes(report[258:260], "little"), identity.get("tcbLevels"))


def worst(platform: Level, module: Level, qe: Level) -> str:
    """The status of all three together."""
    found = max((platform.status, module.status, qe.status), key=STATUSES.index)
    configured = platform.status in ("ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded")
    return "OutOfDateConfigurationNeeded" if found == "OutOfDate" and configured else found


# --- verification ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a verified quote establishes. `status` may be bad: a genuine quote of an outdated platform."""

    quote: Quote
    platform: Platform
    authority: str  # "platform" or "processor": which of Intel's CAs certified it
    root: str
    status: str
    levels: tuple[Level, Level, Level]  # of platform, module and quoting enclave
    evaluation: int  # the lower tcbEvaluationDataNumber of the two signed texts
    second: str  # what dcap-qvl says: a status, or "refused: ..."
    until: datetime
    lists: tuple[certs.Revocations, ...]
    steps: tuple[Step, ...]
    kind = "tdx"
    made: None = None  # such evidence carries no time: the nonce makes it fresh
    cautions: tuple[str, ...] = ()

    @property
    def binding(self) -> bytes:
        """What the guest asked to have signed: 64 bytes."""
        return self.quote.report_data

    @property
    def anchor(self) -> Anchor:
        """What the chain ends in."""
        return Anchor("Intel SGX Root CA", self.root)

    @property
    def advisories(self) -> tuple[str, ...]:
        return tuple(sorted({each for level in self.levels for each in level.advisories}))

    @property
    def tcb_text(self) -> str:
        return f"{self.status}, evaluation {self.evaluation}, FMSPC {self.platform.fmspc.hex()}"

    def names(self) -> frozenset[tuple[str, str]]:
        """By what a deny list may call this evidence."""
        measured = {("measurements", each.hex()) for each in (self.quote.mrtd, *self.quote.rtmr) if any(each)}
        return frozenset(
            measured | {("chip_ids", self.platform.ppid.hex()), ("fmspcs", self.platform.fmspc.hex())}
        )


def verify(
    raw: bytes,
    collateral: bytes,
    now: datetime,
    *,
    roots: Collection[str] = ROOTS,
    grace: timedelta = certs.NO_GRACE,
) -> Facts:
    """Verify that Intel vouches for this quote at `now`; say nothing of whether the guest is wanted.

    `collateral` is JSON with the nine texts of `COLLATERAL_KEYS`, for the quote's FMSPC. `grace` prolongs the
    revocation lists alone, and only for our verifier: dcap-qvl knows none.
    """
    trail = Trail("tdx")
    quote = parse(raw, trail)
    _check_quote_signature(quote, trail)
    chain = certs.load_pem(trail, "chain", quote.pck_chain, exact=True)
    trail.require(len(chain) == 3, "chain", "PCK, its CA, the root", f"{len(chain)} certificates")
    leaf, authority, root = chain
    until = certs.verify_chain(trail, "chain", chain, roots, now)
    pck = trail.guard("pck", "a key", leaf.public_key)
    _ecdsa(trail, "qe.signature", pck, quote.qe_signature, quote.qe_report)
    platform = parse_platform(leaf, trail)

    found = read_collateral(collateral, trail)
    opened = _open_collateral(trail, found, root, authority, now, grace)
    opened.lists[1].require_absent(trail, "crl.pck", leaf.serial_number, "the PCK")
    info, identity = opened.info, opened.identity
    for key, want in (("fmspc", platform.fmspc), ("pceId", platform.pceid)):
        got = str(info.get(key, "")).lower()
        trail.require(got == want.hex(), f"tcb_info.{key.lower()}", f"the platform's {want.hex()}", got)
    levels = (
        _platform_level(trail, quote, platform, info.get("tcbLevels")),
        _module_level(trail, quote, info),
        _qe_level(trail, quote, identity),
    )
    return Facts(
        quote,
        platform,
        "processor" if "Processor" in certs.subject_of(authority) else "platform",
        certs.fingerprint(root),
        worst(*levels),
        levels,
        opened.evaluation,
        second_opinion(quote, found, root, now),
        min(until, opened.until),
        opened.lists,
        tuple(trail.steps),
    )


def _check_quote_signature(quote: Quote, trail: Trail) -> None:
    """The quote by its attestation key, and that key by the quoting enclave's report."""

    def key() -> ec.EllipticCurvePublicKey:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + quote.attestation_key)

    public = trail.guard("signature", "an attestation key on P-256", key)
    _ecdsa(trail, "signature", public, quote.signature, quote.signed)
    named = hashlib.sha256(quote.attestation_key + quote.qe_auth).digest() + bytes(32)
    trail.same("qe.key", named, quote.qe_report[320:384])


def second_opinion(quote: Quote, found: Mapping[str, str], root: x509.Certificate, now: datetime) -> str:
    """What dcap-qvl says of the same quote, without its padding, under the same root."""
    try:
        given = dcap_qvl.QuoteCollateralV3(
            **{k: bytes.fromhex(v) if k.endswith(("_crl", "_signature")) else v for k, v in found.items()}
        )
        der = root.public_bytes(Encoding.DER)
        status = dcap_qvl.verify_with_root_ca(quote.canonical, given, der, int(now.timestamp())).status
    except ValueError as error:
        return f"refused: {error}"
    except BaseException as error:  # a panic in its Rust code derives from BaseException alone
        if type(error).__name__ != "PanicException":
            raise
        return "refused: it panicked"
    return str(status)


# --- judgement ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """[[allow]] kind = "tdx". Which trust domains on which platforms are wanted."""

    mrtd: Annotated[tuple[str, ...], rules.hexes_rule(48)]
    rtmr0: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(48)]
    rtmr1: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(48)]
    rtmr2: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(48)]
    rtmr3: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(48)]
    mrconfigid: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(48)]
    ppids: Annotated[tuple[str, ...] | None, rules.hexes_or_any_rule(16)]
    tcb_eval_min: Annotated[int, integer_rule(0, 1 << 16)]  # least tcbEvaluationDataNumber
    tcb_status: Annotated[tuple[str, ...], rules.words_rule(*ALLOWABLE)] = ("UpToDate",)
    advisories_allowed: Annotated[tuple[str, ...], rules.words_rule()] = ()
    mrseam: Annotated[tuple[str, ...] | None, rules.hexes_rule(48)] = None
    xfam: Annotated[tuple[str, ...] | None, rules.hexes_rule(8)] = None
    perfmon: Annotated[bool, rules.flag_rule] = False  # accept a guest that may use performance counters

    def flaw(self) -> str | None:
        """What no single key can tell, or None."""
        return None

    def judge(self, facts: Facts, trail: Trail) -> None:
        """Require that these facts satisfy the whole rule, and that dcap-qvl agrees."""
        quote = facts.quote
        check_attributes(quote, trail)
        perfmon = bool(quote.attributes >> PERFMON & 1)
        trail.require(self.perfmon or not perfmon, "perfmon", "no performance counters", quote.tdattributes)
        trail.one_of("mrtd", self.mrtd, quote.mrtd)
        for index, allowed in enumerate((self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3)):
            if allowed is not None:
                trail.one_of(f"rtmr{index}", allowed, quote.rtmr[index])
        for step, allowed, got in (
            ("mrconfigid", self.mrconfigid, quote.mrconfigid),
            ("ppid", self.ppids, facts.platform.ppid),
            ("mrseam", self.mrseam, quote.mrseam),
            ("xfam", self.xfam, quote.xfam),
        ):
            if allowed is not None:
                trail.one_of(step, allowed, got)
        trail.require(facts.status in self.tcb_status, "tcb", ", ".join(self.tcb_status), facts.status)
        strange = [each for each in facts.advisories if each not in self.advisories_allowed]
        trail.require(not strange, "advisories", "none but those allowed", ", ".join(strange) or "none")
        least = self.tcb_eval_min
        trail.require(facts.evaluation >= least, "tcb_evaluation", f"at least {least}", facts.evaluation)
        trail.require(facts.second == facts.status, "second_opinion", facts.status, facts.second)


def check_attributes(quote: Quote, trail: Trail) -> None:
    """What no policy can allow: debug, migration, a service TD, attributes that we do not know."""
    bits = quote.attributes
    trail.require(not quote.debug, "debug", "a guest that cannot be debugged", quote.tdattributes)
    trail.require(
        not bits >> MIGRATABLE & 1, "migration", "a guest that cannot be migrated", quote.tdattributes
    )
    trail.require(quote.sept_ve_disable, "sept_ve_disable", "set", quote.tdattributes)
    known = sum(1 << bit for bit in (SEPT_VE_DISABLE, PROTECTION_KEYS, KEY_LOCKER, PERFMON))
    trail.require(not bits & ~known, "attributes", "known bits", quote.tdattributes)
    trail.require(not any(quote.mrservicetd), "service_td", "none", quote.mrservicetd)
