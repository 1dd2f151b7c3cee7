"""Authorities of our own for every kind of evidence: to revoke, roll back and lie as the real ones will not.

The formats are written here a second time, from the specifications, so that a parser's mistake does not make
the very evidence that hides it. Keys are fresh in every run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
DAY = timedelta(days=1)
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)


@functools.cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@functools.cache
def ec_key(name: str, curve: str = "p256") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1() if curve == "p384" else ec.SECP256R1())


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def certificate(
    subject: str,
    key: Any,
    issuer: x509.Certificate | None,
    signer: Any,
    *,
    ca: bool,
    path_length: int | None = None,
    serial: int = 0,
    days: tuple[float, float] = (-10, 10),
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    key_cert_sign: bool = True,
    algorithm: Any = None,
) -> x509.Certificate:
    """One certificate; `signer` an RSA key signs as AMD does."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(issuer.subject if issuer else named(subject))
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca, path_length), True)
    )
    if ca:
        usage = x509.KeyUsage(False, False, False, False, False, key_cert_sign, True, False, False)
        builder = builder.add_extension(usage, True)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    if isinstance(signer, rsa.RSAPrivateKey):
        return builder.sign(signer, hashes.SHA384(), rsa_padding=PSS)
    usual = hashes.SHA384() if signer.curve.name == "secp384r1" else hashes.SHA256()
    return builder.sign(signer, algorithm or usual)


def revocations(
    issuer: x509.Certificate,
    signer: Any,
    serials: Sequence[int] = (),
    days: tuple[float, float] = (-1, 1),
    *,
    extension: x509.ExtensionType | None = None,
    algorithm: hashes.HashAlgorithm | None = None,
) -> bytes:
    """A list in DER; `extension` is made critical."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(NOW + days[0] * DAY)
        .next_update(NOW + days[1] * DAY)
        .add_extension(x509.CRLNumber(1), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW + days[0] * DAY)
        builder = builder.add_revoked_certificate(entry.build())
    if extension is not None:
        builder = builder.add_extension(extension, True)
    if isinstance(signer, rsa.RSAPrivateKey):
        made = builder.sign(signer, hashes.SHA384(), rsa_padding=PSS)
    else:
        made = builder.sign(signer, algorithm or hashes.SHA256())  # type: ignore[arg-type]
    return made.public_bytes(Encoding.DER)


def items(raw: bytes) -> list[bytes]:
    """DER items one after another, whole."""
    found = []
    while raw:
        head = 2 if raw[1] < 0x80 else 2 + (raw[1] & 0x7F)
        size = head + (raw[1] if head == 2 else int.from_bytes(raw[2:head], "big"))
        found.append(raw[:size])
        raw = raw[size:]
    return found


def contents(item: bytes) -> bytes:
    return item[2 if item[1] < 0x80 else 2 + (item[1] & 0x7F) :]


def altered(
    signed: x509.Certificate | x509.CertificateRevocationList,
    signer: Any,
    change: Callable[[list[bytes]], list[bytes]],
) -> bytes:
    """The same with other fields, signed again (P-256, or RSA as AMD does), in DER: what cryptography would
    not make."""
    body, algorithm, _ = items(contents(signed.public_bytes(Encoding.DER)))
    body = tlv(0x30, *change(items(contents(body))))
    by_rsa = isinstance(signer, rsa.RSAPrivateKey)
    how: tuple[Any, ...] = (PSS, hashes.SHA384()) if by_rsa else (ec.ECDSA(hashes.SHA256()),)
    return tlv(0x30, body, algorithm, tlv(3, b"\0", signer.sign(body, *how)))


def of_the_year_0(fields: list[bytes]) -> list[bytes]:
    """For `altered`: valid from a time that X.509 can say and Python cannot."""
    validity = tlv(0x30, tlv(0x18, b"00000101000000Z"), tlv(0x18, b"99991231235959Z"))
    return [*fields[:4], validity, *fields[5:]]


def of_no_known_curve(fields: list[bytes]) -> list[bytes]:
    """For `altered`: the P-256 key says that it is on a curve that nobody has."""
    curve = oid("1.2.840.10045.3.1.7")
    return [each.replace(curve, curve[:-1] + b"\x7f") for each in fields]


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def digest(cert: x509.Certificate) -> str:
    return cert.fingerprint(hashes.SHA256()).hex()


def tlv(tag: int, *parts: bytes) -> bytes:
    """One DER item."""
    body = b"".join(parts)
    if len(body) < 0x80:
        return bytes((tag, len(body))) + body
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + body


def number(value: int) -> bytes:
    return tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    out = [40 * first + second]
    for part in rest:
        chunk = [part & 0x7F]
        while part := part >> 7:
            chunk.insert(0, part & 0x7F | 0x80)
        out += chunk
    return tlv(6, bytes(out))


def raw_signature(key: ec.EllipticCurvePrivateKey, signed: bytes, size: int) -> bytes:
    """r || s, big-endian."""
    algorithm = hashes.SHA384() if size == 48 else hashes.SHA256()
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(algorithm)))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


# --- AMD ---------------------------------------------------------------------------------------------------

AMD_ARC = "1.3.6.1.4.1.3704.1."
TCB = {"bl": 10, "tee": 0, "snp": 23, "ucode": 84}


@dataclass
class Amd:
    """A Genoa or Turin of our own: ARK, ASK, ASVK, and chips whose certificates have the serial number 0."""

    ark: x509.Certificate
    ask: x509.Certificate
    asvk: x509.Certificate
    product: str = "Genoa"

    @classmethod
    def make(cls, product: str = "Genoa", **changes: Any) -> Amd:
        """`changes` are of the ASK."""
        ark = certificate(f"ARK-{product}", rsa_key("ark"), None, rsa_key("ark"), ca=True)
        low: dict[str, Any] = {"ca": True, "path_length": 0}
        ask = certificate(f"SEV-{product}", rsa_key("ask"), ark, rsa_key("ark"), serial=7, **low | changes)
        asvk = certificate(f"SEV-VLEK-{product}", rsa_key("ask"), ark, rsa_key("ark"), serial=8, **low)
        return cls(ark, ask, asvk, product)

    @property
    def hwid(self) -> bytes:
        return bytes(range(64 if self.product == "Genoa" else 8))

    @property
    def roots(self) -> dict[str, str]:
        return {self.product.lower(): digest(self.ark)}

    def chain(self, kind: str = "vcek") -> bytes:
        return pem(self.ask if kind == "vcek" else self.asvk, self.ark)

    def crl(self, *serials: int, days: tuple[float, float] = (-1, 1)) -> bytes:
        return revocations(self.ark, rsa_key("ark"), serials, days)

    def vek(
        self,
        tcb: Mapping[str, int] = TCB,
        kind: str = "vcek",
        changes: Mapping[str, bytes | None] | None = None,
        serial: int = 0,
        issuer: x509.Name | None = None,
        subject: str | x509.Name = "",
        curve: str = "p384",
        critical: bool = False,
        scheme: Any = PSS,
        alter: Callable[[list[bytes]], list[bytes]] = list,
    ) -> bytes:
        """A chip's certificate. `changes` replaces extensions by the end of their OID; None drops one.
        `alter` changes the fields that are signed."""
        ends = {"bl": "3.1", "tee": "3.2", "snp": "3.3", "ucode": "3.8", "fmc": "3.9"}
        values: dict[str, bytes | None] = {"1": number(0), "2": tlv(0x16, self.product.encode())}
        values |= {ends[name]: number(version) for name, version in tcb.items()}
        values |= {"4": self.hwid} if kind == "vcek" else {"5": tlv(0x16, b"CN=cloud.example")}
        values |= changes or {}
        extensions = [
            (x509.UnrecognizedExtension(ObjectIdentifier(AMD_ARC + end), value), critical)
            for end, value in values.items()
            if value is not None
        ]
        signer = self.ask if kind == "vcek" else self.asvk
        builder = (
            x509.CertificateBuilder()
            .subject_name(
                subject if isinstance(subject, x509.Name) else named(subject or f"SEV-{kind.upper()}")
            )
            .issuer_name(issuer or signer.subject)
            .public_key(ec_key("vek", curve).public_key())
            .serial_number(1)
            .not_valid_before(NOW - DAY)
            .not_valid_after(NOW + 300 * DAY)
        )
        for value, must in extensions:
            builder = builder.add_extension(value, must)
        made = builder.sign(rsa_key("ask"), hashes.SHA384(), rsa_padding=scheme)
        # cryptography makes no serial number 0, and AMD no other: the byte is changed and signed over.
        body, algorithm, _ = items(contents(made.public_bytes(Encoding.DER)))
        version, _, *fields = items(contents(body))
        signed = tlv(0x30, *alter([version, tlv(2, bytes((serial,))), *fields]))
        signature = rsa_key("ask").sign(signed, scheme, hashes.SHA384())
        return tlv(0x30, signed, algorithm, tlv(3, b"\0", signature))

    def report(self, **changes: Any) -> bytes:
        """A signed report of version 3; `at` sets bytes by their offset."""
        values: dict[str, Any] = {
            "version": 3,
            "policy": 0x30000,
            "vmpl": 0,
            "platform": 0x25,
            "key_info": 0,
            "report_data": bytes(64),
            "measurement": b"\x11" * 48,
            "host_data": b"\x22" * 32,
            "id_key": bytes(48),
            "author_key": bytes(48),
            "reported": TCB,
            "committed": TCB,
            "launch": TCB,
            "cpuid": (0x19, 0x11, 1),
            "chip_id": self.hwid,
            "guest_svn": 0,
        } | changes

        def tcb(versions: Mapping[str, int]) -> bytes:
            out = bytearray(8)
            places = (("bl", 0), ("tee", 1), ("snp", 6), ("ucode", 7))
            if self.product == "Turin":
                places = (("fmc", 0), ("bl", 1), ("tee", 2), ("snp", 3), ("ucode", 7))
            for name, at in places:
                out[at] = versions.get(name, 0)
            return bytes(out)

        raw = bytearray(1184)

        def put(at: int, value: int | bytes, size: int = 0) -> None:
            data = value.to_bytes(size, "little") if isinstance(value, int) else value
            raw[at : at + len(data)] = data

        put(0, values["version"], 4)
        put(4, values["guest_svn"], 4)
        put(8, values["policy"], 8)
        put(0x30, values["vmpl"], 4)
        put(0x34, 1, 4)
        put(0x40, values["platform"], 8)
        put(0x48, values["key_info"], 4)
        put(0x50, values["report_data"])
        put(0x90, values["measurement"])
        put(0xC0, values["host_data"])
        put(0xE0, values["id_key"])
        put(0x110, values["author_key"])
        put(0x180, tcb(values["reported"]))
        put(0x188, bytes(values["cpuid"]))
        put(0x1A0, values["chip_id"])
        put(0x1E0, tcb(values["committed"]))
        put(0x1F0, tcb(values["launch"]))
        for at, value in values.get("at", {}).items():
            raw[at] = value
        signature = raw_signature(ec_key("vek", "p384"), bytes(raw[:0x2A0]), 48)
        put(0x2A0, signature[:48][::-1])
        put(0x2A0 + 72, signature[48:][::-1])
        return bytes(raw)


# --- Intel -------------------------------------------------------------------------------------------------

SGX_ARC = "1.2.840.113741.1.13.1"
FMSPC = bytes.fromhex("00906ed50000")
PPID = bytes(range(16))


@dataclass
class Intel:
    """A platform of our own: root, PCK CA, PCK, TCB signer, a quoting enclave and its collateral."""

    root: x509.Certificate
    authority: x509.Certificate
    pck: x509.Certificate
    signer: x509.Certificate
    svns: tuple[int, ...] = (5,) * 16

    @classmethod
    def make(cls, change: Callable[[dict[str, bytes]], list[tuple[str, bytes]]] | None = None) -> Intel:
        """`change` gives the fields of the PCK's extension, each with its number, from the usual ones."""
        top = ec_key("intel root")
        root = certificate("Intel SGX Root CA", top, None, top, ca=True, path_length=1)
        mid = certificate(
            "Intel SGX PCK Platform CA", ec_key("pck ca"), root, top, ca=True, path_length=0, serial=21
        )
        signer = certificate("Intel SGX TCB Signing", ec_key("tcb"), root, top, ca=False, serial=22)
        svns = (5,) * 16
        tcb = [tlv(0x30, oid(f"{SGX_ARC}.2.{n}"), number(svn)) for n, svn in enumerate((*svns, 11), 1)]
        tcb.append(tlv(0x30, oid(f"{SGX_ARC}.2.18"), tlv(4, bytes(svns))))
        fields = {
            "1": tlv(4, PPID),
            "2": tlv(0x30, *tcb),
            "3": tlv(4, bytes(2)),
            "4": tlv(4, FMSPC),
            "5": tlv(0x0A, b"\0"),
        }
        chosen = list(fields.items()) if change is None else change(fields)
        value = tlv(0x30, *(tlv(0x30, oid(f"{SGX_ARC}.{end}"), item) for end, item in chosen))
        extension = (x509.UnrecognizedExtension(ObjectIdentifier(SGX_ARC), value), False)
        pck = certificate(
            "Intel SGX PCK Certificate",
            ec_key("pck"),
            mid,
            ec_key("pck ca"),
            ca=False,
            serial=23,
            extensions=[extension],
        )
        return cls(root, mid, pck, signer, svns)

    @property
    def roots(self) -> frozenset[str]:
        return frozenset({digest(self.root)})

    def collateral(
        self,
        *,
        revoked_pck: Sequence[int] = (),
        revoked_ca: Sequence[int] = (),
        days: tuple[float, float] = (-1, 1),
        crl_days: tuple[float, float] = (-1, 1),
        sgx_svn: int = 5,
        status: str = "UpToDate",
        info: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> bytes:
        def stamp(day: float) -> str:
            return (NOW + day * DAY).strftime("%Y-%m-%dT%H:%M:%SZ")

        frame = {"issueDate": stamp(days[0]), "nextUpdate": stamp(days[1]), "tcbEvaluationDataNumber": 19}
        date = {"tcbDate": "2026-01-01T00:00:00Z"}

        def level(svn: int, verdict: str) -> dict[str, Any]:
            parts = {
                "sgxtcbcomponents": [{"svn": svn}] * 16,
                "pcesvn": 11,
                "tdxtcbcomponents": [{"svn": 2}] + [{"svn": 0}] * 15,
            }
            return {"tcb": parts, "tcbStatus": verdict, **date}

        tcb_info = {
            "id": "TDX",
            "version": 3,
            **frame,
            "fmspc": FMSPC.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tdxModule": {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8},
            "tdxModuleIdentities": [],
            "tcbLevels": [level(sgx_svn, status), level(1, "OutOfDate")],
        } | dict(info or {})
        qe_identity = {
            "id": "TD_QE",
            "version": 2,
            **frame,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15,
            "attributesMask": "FB" + "FF" * 7 + "00" * 8,
            "mrsigner": "33" * 32,
            "isvprodid": 2,
            "tcbLevels": [{"tcb": {"isvsvn": 4}, "tcbStatus": "UpToDate", **date}],
        } | dict(identity or {})
        found: dict[str, str] = {
            "pck_crl_issuer_chain": pem(self.authority, self.root).decode(),
            "root_ca_crl": revocations(self.root, ec_key("intel root"), revoked_ca, crl_days).hex(),
            "pck_crl": revocations(self.authority, ec_key("pck ca"), revoked_pck, crl_days).hex(),
        }
        for name, value in (("tcb_info", tcb_info), ("qe_identity", qe_identity)):
            text = json.dumps(value, separators=(",", ":"))
            found[f"{name}_issuer_chain"] = pem(self.signer, self.root).decode()
            found[name] = text
            found[f"{name}_signature"] = raw_signature(ec_key("tcb"), text.encode(), 32).hex()
        return json.dumps(found).encode()

    def quote(self, chain: bytes | None = None, **changes: Any) -> bytes:
        """A version-4 quote by the enclave's fresh attestation key."""
        values: dict[str, Any] = {
            "svn": b"\2\0" + bytes(14),
            "attributes": 1 << 28,
            "mrtd": b"\x44" * 48,
            "rtmr": [b"\x50" * 48, b"\x51" * 48, b"\x52" * 48, bytes(48)],
            "report_data": bytes(64),
            "qe_svn": 4,
            "qe_data": None,
        } | changes
        header = (
            b"\4\0\2\0\x81\0\0\0" + bytes(4) + bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20)
        )
        body = values["svn"] + bytes(48 + 48 + 8) + values["attributes"].to_bytes(8, "little")
        body += (0x3).to_bytes(8, "little") + values["mrtd"] + bytes(48 * 3)
        body += b"".join(values["rtmr"]) + values["report_data"]
        assert len(header) == 48 and len(body) == 584
        key = ec_key("attestation")
        point = key.public_key().public_numbers()
        public = point.x.to_bytes(32, "big") + point.y.to_bytes(32, "big")
        auth = bytes(range(32))
        qe = bytearray(384)
        qe[48:64] = b"\x11" + bytes(15)
        qe[128:160] = b"\x33" * 32
        qe[256:258] = b"\2\0"
        qe[258:260] = values["qe_svn"].to_bytes(2, "little")
        qe[320:352] = values["qe_data"] or hashlib.sha256(public + auth).digest()
        chain = pem(self.pck, self.authority, self.root) if chain is None else chain

        def sized(data: bytes, size: int = 4) -> bytes:
            return len(data).to_bytes(size, "little") + data

        inner = (
            bytes(qe) + raw_signature(ec_key("pck"), bytes(qe), 32) + sized(auth, 2) + b"\5\0" + sized(chain)
        )
        section = raw_signature(key, header + body, 32) + public + b"\6\0" + sized(inner)
        return header + body + sized(section)


# --- AWS ---------------------------------------------------------------------------------------------------


@dataclass
class Aws:
    """A Nitro hypervisor of our own."""

    root: x509.Certificate
    middle: x509.Certificate
    leaf: x509.Certificate

    @classmethod
    def make(cls, **middle: Any) -> Aws:
        top, mid = ec_key("aws", "p384"), ec_key("aws zone", "p384")
        root = certificate("aws.nitro-enclaves", top, None, top, ca=True)
        settings: dict[str, Any] = {"ca": True, "path_length": 0} | middle
        zone = certificate("zone", mid, root, top, **settings)
        leaf = certificate("enclave", ec_key("aws leaf", "p384"), zone, mid, ca=False)
        return cls(root, zone, leaf)

    @property
    def roots(self) -> frozenset[str]:
        return frozenset({digest(self.root)})

    def payload(self, **changes: Any) -> dict[str, Any]:
        der = [each.public_bytes(Encoding.DER) for each in (self.leaf, self.root, self.middle)]
        return {
            "module_id": "i-0-enc0",
            "digest": "SHA384",
            "timestamp": int(NOW.timestamp() * 1000),
            "pcrs": {n: bytes((n + 1,)) * 48 if n < 3 else bytes(48) for n in range(16)},
            "certificate": der[0],
            "cabundle": der[1:],
            "public_key": None,
            "user_data": None,
            "nonce": None,
        } | changes

    def document(self, payload: bytes | None = None, **changes: Any) -> bytes:
        body = cbor2.dumps(self.payload(**changes)) if payload is None else payload
        protected = bytes.fromhex("a1013822")
        signed = cbor2.dumps(["Signature1", protected, b"", body])
        return cbor2.dumps([protected, {}, body, raw_signature(ec_key("aws leaf", "p384"), signed, 48)])


# --- TPM ---------------------------------------------------------------------------------------------------

AK_ATTRIBUTES = 0x00050072


def big(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def sized(data: bytes) -> bytes:
    return big(len(data), 2) + data


@dataclass
class Tpm:
    """A TPM of our own, with an elliptic or an RSA attestation key and an authority that certifies it."""

    pcrs: dict[int, bytes] = field(default_factory=lambda: {n: bytes((n,)) * 32 for n in range(8)})
    kind: str = "ecc"
    bank: str = "sha256"
    label: str = "ak"  # another one is another TPM

    @property
    def key(self) -> Any:
        return ec_key(self.label) if self.kind == "ecc" else rsa_key(self.label)

    def with_label(self, label: str) -> Tpm:
        return replace(self, label=label)

    def with_kind(self, kind: str) -> Tpm:
        return replace(self, kind=kind)

    def public(self, attributes: int = AK_ATTRIBUTES) -> bytes:
        """TPMT_PUBLIC."""
        numbers = self.key.public_key().public_numbers()
        if self.kind == "ecc":
            head = big(0x23, 2) + big(0xB, 2) + big(attributes, 4) + sized(b"") + big(0x10, 2)
            head += big(0x18, 2) + big(0xB, 2) + big(3, 2) + big(0x10, 2)
            return head + sized(big(numbers.x, 32)) + sized(big(numbers.y, 32))
        head = big(1, 2) + big(0xB, 2) + big(attributes, 4) + sized(b"") + big(0x10, 2)
        return head + big(0x14, 2) + big(0xB, 2) + big(2048, 2) + big(0, 4) + sized(big(numbers.n, 256))

    @property
    def name(self) -> str:
        return (b"\0\x0b" + hashlib.sha256(self.public()).digest()).hex()

    def quote(
        self, nonce: bytes, chosen: Sequence[int] | None = None, *, magic: int = 0xFF544347, safe: int = 1
    ) -> tuple[bytes, bytes]:
        """(TPMS_ATTEST, TPMT_SIGNATURE) over the chosen PCRs."""
        chosen = sorted(self.pcrs) if chosen is None else chosen
        bitmap = sum(1 << n for n in chosen).to_bytes(3, "little")
        algorithm = {"sha256": 0xB, "sha384": 0xC, "sha1": 0x4}[self.bank]
        values = hashlib.sha256(b"".join(self.pcrs[n] for n in chosen)).digest()
        raw = big(magic, 4) + big(0x8018, 2) + sized(b"\0\x0b" + bytes(32)) + sized(nonce)
        raw += big(1234, 8) + big(1, 4) + big(0, 4) + big(safe, 1) + big(0x20200312, 8)
        raw += big(1, 4) + big(algorithm, 2) + big(3, 1) + bitmap + sized(values)
        return raw, self.sign(raw)

    def sign(self, raw: bytes, scheme: int = 0) -> bytes:
        if self.kind == "ecc":
            rs = raw_signature(self.key, raw, 32)
            return big(0x18, 2) + big(0xB, 2) + sized(rs[:32]) + sized(rs[32:])
        if scheme == 0x16:
            signature = self.key.sign(raw, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
        else:
            signature = self.key.sign(raw, padding.PKCS1v15(), hashes.SHA256())
        return big(scheme or 0x14, 2) + big(0xB, 2) + sized(signature)

    def certified(self, purpose: str | None = "2.23.133.8.3") -> tuple[x509.Certificate, x509.Certificate]:
        """(AK certificate, root)."""
        top = ec_key("tpm root")
        root = certificate("vTPM root", top, None, top, ca=True)
        usage = x509.ExtendedKeyUsage([ObjectIdentifier(purpose)]) if purpose else None
        extensions = [(usage, False)] if usage else []
        return certificate("AK", self.key, root, top, ca=False, extensions=extensions), root


def event_log(
    events: Sequence[tuple[int, int, bytes]],
    *,
    locality: int | None = None,
    count: int = 1,
    bank: str = "sha256",
) -> bytes:
    """A crypto-agile log of (register, type, digest) with one bank."""
    algorithm, size = {"sha256": (0xB, 32), "sha384": (0xC, 48)}[bank]

    def le(value: int, width: int = 4) -> bytes:
        return value.to_bytes(width, "little")

    spec = b"Spec ID Event03\0" + bytes(8) + le(count) + le(algorithm, 2) + le(size, 2) + b"\0"
    raw = le(0) + le(3) + bytes(20) + le(len(spec)) + spec
    if locality is not None:
        body = b"StartupLocality\0" + bytes((locality,))
        raw += le(0) + le(3) + le(1) + le(algorithm, 2) + bytes(size) + le(len(body)) + body
    for register, kind, value in events:
        raw += le(register) + le(kind) + le(1) + le(algorithm, 2) + value + le(4) + b"text"
    return raw


def hcl(report: bytes, kind: int, own: Tpm) -> bytes:
    """An HCL report naming the RSA key of `own`; kind 2 is SNP, 4 TDX."""
    return _hcl(report, kind, own)[0]


def hcl_digest(own: Tpm) -> bytes:
    """What the hardware's report data must be."""
    return hashlib.sha256(_hcl(bytes(1184), 2, own)[1]).digest() + bytes(32)


def _hcl(report: bytes, kind: int, own: Tpm) -> tuple[bytes, bytes]:
    def text(value: int) -> str:
        raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    numbers = own.key.public_key().public_numbers()
    key = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": text(numbers.e), "n": text(numbers.n)}
    runtime = json.dumps({"keys": [key], "user-data": "00" * 64}).encode()

    def le(value: int) -> bytes:
        return value.to_bytes(4, "little")

    head = b"HCLA" + le(2) + le(32 + 1184 + 20 + len(runtime)) + le(2) + bytes(16)
    tail = le(20 + len(runtime)) + le(1) + le(kind) + le(1) + le(len(runtime)) + runtime
    return head + report + tail + bytes(50), runtime
